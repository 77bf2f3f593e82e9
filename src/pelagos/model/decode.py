"""One token of one sequence on the CPU in float32, reference mode: the modules' arithmetic on numpy views.

At batch 1 a small model spends its time starting operators, not in them: numpy starts one in half a microsecond,
torch in two to five. This is the forward of `attention.py`, `experts.py` and `transformer.py` for S = B = 1, over the
same parameters (products that share an input are fused by laying their weights side by side in one buffer, of which
the parameters become views) and over the cache pools in place. `tests/model/test_decode.py` holds it to the forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pelagos.kernels.layout import Output, Span
from pelagos.kernels.ref.hyper_connection import sinkhorn4
from pelagos.kernels.rows import LayerRows, Rows
from pelagos.model.attention import Attention, Compressor, frequencies
from pelagos.model.experts import MoE
from pelagos.model.layers import Linear

if TYPE_CHECKING:
    from pelagos.model.transformer import Block, Transformer

Array = np.ndarray
STREAMS = 4  # sinkhorn4 is unrolled for the released hc_mult
F32 = np.float32
MAX_RUNS = 16  # pages in more runs than this are copied to be scored


def fuse(linears: Sequence[torch.nn.Parameter]) -> Array:
    """Lay weights (o_i, i) side by side in one (sum o, i) buffer and make the parameters views of it."""
    buffer = torch.cat([p.detach() for p in linears])
    for parameter, rows in zip(linears, buffer.split([len(p) for p in linears]), strict=True):
        parameter.data = rows
    return buffer.numpy()


def _inverse_rms(x: Array, eps: float) -> float:
    return 1.0 / math.sqrt(float(x.dot(x)) / x.size + eps)


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return x * F32(_inverse_rms(x, eps)) * weight


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


class _Rope:
    """Unit complex numbers of one rotary base; `at` gives those of a position."""

    def __init__(self, freqs: Tensor) -> None:
        self.freqs = freqs.numpy()
        self.width = 2 * self.freqs.size

    def at(self, position: int) -> Array:
        angle = F32(position) * self.freqs
        turns = np.empty(angle.size, np.complex64)
        turns.real, turns.imag = np.cos(angle), np.sin(angle)
        return turns

    def turn(self, x: Array, turns: Array) -> None:
        """Rotate the last channels of x (..., C) in place, adjacent pairs as complex numbers."""
        pairs = x[..., -self.width :].view(np.complex64)
        pairs *= turns


class _Site:
    """The hyper-connection around one site."""

    def __init__(self, block: Block, site: str) -> None:
        config = block.config
        self.fn, self.base, self.scale = (
            getattr(block, f"hc_{site}_{part}").detach().numpy() for part in ("fn", "base", "scale")
        )
        n = config.hc_mult
        self.part = np.repeat(np.arange(3), (n, n, n * n))  # which scale each mix logit takes
        self.iters, self.hc_eps, self.eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps
        self.norm = getattr(block, f"{site}_norm").weight.detach().numpy()

    def enter(self, streams: Array) -> tuple[Array, Array, Array]:
        """Return the normed input (D,), post (4, 1) and comb (4, 4) of streams (4, D)."""
        flat = streams.ravel()
        mix = self.fn.dot(flat) * F32(_inverse_rms(flat, self.eps)) * self.scale[self.part] + self.base
        gates = _sigmoid(mix[: 2 * STREAMS])
        comb = sinkhorn4(mix[2 * STREAMS :].reshape(STREAMS, STREAMS), self.iters, self.hc_eps)
        x = (gates[:STREAMS] + F32(self.hc_eps)).dot(streams)
        return _norm(x, self.norm, self.eps), (2 * gates[STREAMS:])[:, None], comb


class _Place(NamedTuple):
    """Where one token goes: its position, its sequence's slot and pages, and the entries that exist already."""

    position: int
    slot: int
    pages: Array  # (P,) int64
    runs: Sequence[slice | Array]  # the pages so far, ids that follow one another as one slice
    frozen: int


def _place(span: Span, page_tokens: int) -> _Place:
    pages = span.pages[: span.start // page_tokens + 1].astype(np.int64)
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    runs = [pages] if len(cuts) > MAX_RUNS else [slice(run[0], run[-1] + 1) for run in np.split(pages, cuts)]
    return _Place(span.start, span.slot, pages, runs, span.frozen)


class _Pool:
    """A compressor for one new token, and the entries it leaves in the pages."""

    def __init__(self, module: Compressor, tail: tuple[Rows, Rows], entries: Rows, rope: _Rope) -> None:
        self.ratio, self.width, self.overlap, self.eps = module.ratio, module.width, module.overlap, module.eps
        self.ape, self.norm = module.ape.detach().numpy(), module.norm.weight.detach().numpy()
        self.kv, self.score = (rows.parts[0].rows.numpy() for rows in tail)  # (slots, ring, channels)
        self.entries, self.rope = entries.parts[0].rows.numpy(), rope  # (pages, entries, width)

    def push(self, kv: Array, score: Array, place: _Place) -> None:
        """Put the token's rows into the tail rings, and the entry they complete, if any, into its page."""
        position, ring = place.position, self.kv.shape[1]
        self.kv[place.slot, position % ring] = kv
        np.add(score, self.ape[position % self.ratio], out=self.score[place.slot, position % ring])
        if (position + 1) % self.ratio or position < place.frozen:
            return
        first = max(0, position + 1 - self.ratio * (1 + self.overlap))
        rows = np.arange(first, position + 1) % ring
        values, scores = self.kv[place.slot, rows], self.score[place.slot, rows]
        if self.overlap:
            values, scores = self._halves(values), self._halves(scores)
        weights = np.exp(scores - scores.max(0))
        entry = _norm((weights * values).sum(0) / weights.sum(0), self.norm, self.eps)
        self.rope.turn(entry, self.rope.at(position + 1 - self.ratio))
        page, row = divmod(position // self.ratio, self.entries.shape[1])
        self.entries[place.pages[page], row] = entry

    def _halves(self, rows: Array) -> Array:
        cut, width = len(rows) - self.ratio, self.width
        return np.concatenate((rows[:cut, :width], rows[cut:, width:]))

    def first(self, count: int, place: _Place) -> Array:
        """Return entries 0..count-1 (count, width), a view where every page holds one and the pages follow."""
        per_page = self.entries.shape[1]
        pages = place.pages[: -(-count // per_page)]
        if per_page == 1 and len(place.runs) == 1 and isinstance(run := place.runs[0], slice):
            return self.entries[run.start : run.start + count, 0]
        return self.entries[pages].reshape(-1, self.width)[:count]


class _Attend:
    """The attention site's inner part for one token."""

    def __init__(self, module: Attention, ropes: dict[bool, _Rope], rows: LayerRows) -> None:
        self.ratio, self.heads, self.width, self.eps = module.ratio, module.heads, module.width, module.eps
        self.window, self.rope = module.window_size, ropes[module.ratio > 0]
        first: list[Linear] = [module.wq_a, module.wkv]
        second: list[Linear] = [module.wq_b]
        self.ring = rows.window.parts[0].rows.numpy()  # (slots, rows, C)
        self.pool = self.index_pool = None
        if module.compressor is not None:
            assert rows.main is not None
            assert rows.main_tail is not None
            first += [module.compressor.wkv, module.compressor.wgate]
            self.pool = _Pool(module.compressor, rows.main_tail, rows.main, self.rope)
        if module.indexer is not None:
            assert rows.index is not None
            assert rows.index_tail is not None
            inner = module.indexer.compressor
            first += [inner.wkv, inner.wgate, module.indexer.weights_proj]
            second.append(module.indexer.wq_b)
            self.index_pool = _Pool(inner, rows.index_tail, rows.index, self.rope)
            self.index_heads, self.index_width = module.indexer.heads, module.indexer.width
            self.topk = module.indexer.topk
        ends = np.cumsum([m.weight.shape[0] for m in first]).tolist()
        self.cuts = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self.first = fuse([m.weight for m in first])
        self.second = fuse([m.weight for m in second])
        self.q_norm, self.kv_norm = module.q_norm.weight.detach().numpy(), module.kv_norm.weight.detach().numpy()
        self.sink = module.attn_sink.detach().numpy()[:, None]
        self.wo_a = module.wo_a.weight.detach().unflatten(0, (module.groups, -1)).numpy()
        self.wo_b = module.wo_b.weight.detach().numpy()

    def __call__(self, x: Array, place: _Place, tables: dict[bool, Array]) -> Array:
        """Attend x (D,), already normed; return (D,)."""
        table = tables[self.ratio > 0]
        fused = self.first.dot(x)
        parts = [fused[cut] for cut in self.cuts]
        second = self.second.dot(_norm(parts[0], self.q_norm, self.eps))
        q = second[: self.heads * self.width].reshape(self.heads, self.width)
        q = q * (1.0 / np.sqrt(np.einsum("hc,hc->h", q, q) / self.width + self.eps)).astype(F32)[:, None]
        self.rope.turn(q, table)
        kv = _norm(parts[1], self.kv_norm, self.eps)
        self.rope.turn(kv, table)
        keys = self._window(kv, place)
        if self.pool is not None:
            self.pool.push(parts[2], parts[3], place)
            if self.index_pool is not None:
                self.index_pool.push(parts[4], parts[5], place)
            if count := (place.position + 1) // self.ratio:
                keys.append(self._entries(self.pool, count, second, parts, table, place))
        return self._output(q, keys, table)

    def _window(self, kv: Array, place: _Place) -> list[Array]:
        """Put kv into the ring; return the rows of the window, at most two views."""
        ring, count = self.ring[place.slot], self.ring.shape[1]
        low, last = max(0, place.position + 1 - self.window) % count, place.position % count
        ring[last] = kv
        return [ring[low : last + 1]] if low <= last else [ring[low:], ring[: last + 1]]

    def _entries(
        self, pool: _Pool, count: int, second: Array, parts: list[Array], table: Array, place: _Place
    ) -> Array:
        """Return the entries to attend, picked from `count` where they are more than the indexer picks."""
        if self.index_pool is None or count <= self.topk:
            return pool.first(count, place)
        q = second[self.heads * self.width :].reshape(self.index_heads, self.index_width).copy()
        self.rope.turn(q, table)
        weights = (parts[6] * F32(self.index_width**-0.5 * self.index_heads**-0.5))[None]
        keys = self.index_pool.entries
        runs = [np.matmul(weights, np.maximum(np.matmul(q, keys[run].transpose(0, 2, 1)), 0)) for run in place.runs]
        scores = np.concatenate([run.ravel() for run in runs])[:count]
        page, row = divmod(np.argpartition(-scores, self.topk - 1)[: self.topk], keys.shape[1])
        return pool.entries[place.pages[page], row]

    def _output(self, q: Array, keys: list[Array], table: Array) -> Array:
        scaled = q * F32(self.width**-0.5)
        logits = np.concatenate([self.sink, *(scaled.dot(k.T) for k in keys)], 1)  # (H, 1 + K)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        out, start = np.zeros_like(q), 1
        for k in keys:
            out += weights[:, start : start + len(k)].dot(k)
            start += len(k)
        self.rope.turn(out, table.conj())
        grouped = out.reshape(len(self.wo_a), -1)
        latent = np.empty(self.wo_a.shape[:2], F32)
        for weight, group, place in zip(self.wo_a, grouped, latent, strict=True):
            np.dot(weight, group, out=place)
        return self.wo_b.dot(latent.ravel())


class _Mixture:
    """The MoE site's inner part for one token."""

    def __init__(self, module: MoE) -> None:
        gate, shared = module.gate, module.shared_experts
        self.topk, self.scaling, self.limit = gate.topk, gate.scaling, module.experts.limit
        self.table = None if gate.tid2eid is None else gate.tid2eid.numpy()
        self.bias = None if gate.bias is None else gate.bias.numpy()
        self.count, self.width = gate.weight.shape[0], shared.w1.weight.shape[0]
        self.first = fuse([gate.weight, shared.w1.weight, shared.w3.weight])
        self.shared_w2 = shared.w2.weight.detach().numpy()
        self.w13, self.w2 = module.experts.w13.detach().numpy(), module.experts.w2.detach().numpy()

    def __call__(self, x: Array, token: int) -> Array:
        """Return the experts' and the shared expert's sum (D,) for x (D,)."""
        first = self.first.dot(x)
        scores = np.sqrt(np.logaddexp(0, first[: self.count]))
        if self.table is not None:
            chosen = self.table[token]
        else:
            chosen = np.argpartition(-(scores + self.bias), self.topk - 1)[: self.topk]
        weights = scores[chosen]
        weights = weights * F32(self.scaling / (float(weights.sum()) + 1e-20))
        hidden = np.empty((self.topk + 1, 2 * self.width), F32)
        for place, expert in zip(hidden, chosen, strict=False):
            np.dot(self.w13[expert], x, out=place)
        hidden[-1] = first[self.count :]
        gate, up = np.minimum(hidden[:, : self.width], self.limit), hidden[:, self.width :]
        hidden = gate * _sigmoid(gate) * np.clip(up, -self.limit, self.limit)
        out = self.shared_w2.dot(hidden[-1])
        for expert, row in zip(chosen, hidden[:-1] * weights[:, None], strict=True):
            out += self.w2[expert].dot(row)
        return out


class Decoder:
    """A model's parameters arranged for `step` over the float32 rows of two pools; in-place updates are followed."""

    def __init__(self, model: Transformer, layers: Sequence[LayerRows], page_tokens: int) -> None:
        config = model.config
        self.ropes = {compressed: _Rope(frequencies(config, compressed, None)) for compressed in (False, True)}
        self.layers = [
            (_Site(b, "attn"), _Attend(b.attn, self.ropes, rows), _Site(b, "ffn"), _Mixture(b.ffn))
            for b, rows in zip(model.blocks, layers, strict=False)
        ]
        self.page_tokens = page_tokens
        self.embed = model.embed.weight.detach().numpy()
        self.head = tuple(
            p.detach().numpy() for p in (model.hc_head_fn, model.hc_head_base, model.hc_head_scale, model.norm.weight)
        )
        self.vocabulary = model.head.weight.detach().numpy()
        self.hc_eps, self.eps = config.hc_eps, config.rms_norm_eps

    @staticmethod
    def covers(model: Transformer) -> bool:
        """Whether the model is one for it: float32 on the CPU, reference mode, four streams."""
        plain = model.mode == "reference" and model.carrier == torch.float32 and model.config.hc_mult == STREAMS
        return plain and model.embed.weight.device.type == "cpu"

    def step(self, span: Span) -> Output:
        """Append a span of one token; return what it asks for."""
        place, token = _place(span, self.page_tokens), int(span.tokens[0])
        tables = {kind: rope.at(place.position) for kind, rope in self.ropes.items()}
        streams = np.repeat(self.embed[token][None], STREAMS, 0)
        for attn_site, attend, ffn_site, mixture in self.layers:
            x, post, comb = attn_site.enter(streams)
            streams = comb.T.dot(streams) + post * attend(x, place, tables)
            x, post, comb = ffn_site.enter(streams)
            streams = comb.T.dot(streams) + post * mixture(x, token)
        logits = np.empty((0, len(self.vocabulary)), F32)
        if span.logits:
            fn, base, scale, norm = self.head
            flat = streams.ravel()
            mix = fn.dot(flat) * F32(_inverse_rms(flat, self.eps)) * scale + base
            hidden = _norm((_sigmoid(mix) + F32(self.hc_eps)).dot(streams), norm, self.eps)
            logits = self.vocabulary.dot(hidden)[None]
        return Output(logits, streams[None] if span.streams else np.empty((0, *streams.shape), F32))
