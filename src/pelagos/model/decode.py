"""Single tokens of several sequences on the CPU in float32, reference mode: the modules' arithmetic on numpy views.

A small model spends its time starting operators, not in them: numpy starts one in half a microsecond, torch in two to
five. This is the forward of `attention.py`, `experts.py` and `transformer.py` for S = 1, over the same parameters
(products that share an input are fused by laying their weights side by side in one buffer, of which the parameters
become views) and over the cache pools in place. A row's bits do not depend on the other rows of a call: every product
is made row by row, by the call that a row alone gets, and all else is elementwise or along a row of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pelagos.kernels.layout import CacheLayout, Output, Span
from pelagos.kernels.ref.hyper_connection import sinkhorn4
from pelagos.kernels.rows import LayerRows, Rows
from pelagos.model.attention import Attention, Compressor, frequencies
from pelagos.model.experts import MoE
from pelagos.model.layers import Linear
from pelagos.model.streaming import StreamedExperts

if TYPE_CHECKING:
    from pelagos.model.transformer import Block, Transformer

Array = np.ndarray
STREAMS = 4  # sinkhorn4 is unrolled for the released hc_mult
F32 = np.float32
ROWS = 64  # computed at once
GROUP, ENTRIES = 16, 512  # rows and entries of each attended at once
PAGES = 64  # whose index keys are scored at once


def fuse(linears: Sequence[torch.nn.Parameter]) -> Array:
    """Lay weights (o_i, i) side by side in one (sum o, i) buffer and make the parameters views of it."""
    buffer = torch.cat([p.detach() for p in linears])
    for parameter, rows in zip(linears, buffer.split([len(p) for p in linears]), strict=True):
        parameter.data = rows
    return buffer.numpy()


def _product(weight: Array, x: Array) -> Array:
    """Return weight (..., o, i) times x (B, ..., i), one matrix-vector product a row: (B, ..., o)."""
    if x.size == x.shape[-1]:  # the same product, started sooner
        return weight.dot(x[0])[None]
    return np.matmul(weight, x[..., None])[..., 0]


def _inverse_rms(x: Array, eps: float) -> Array | np.float32:
    """Return 1 / rms of x (..., C): (..., 1), or of a single row by the same steps, at half the cost, as a scalar."""
    if x.size == x.shape[-1]:
        row = x.ravel()
        return F32(1.0 / math.sqrt(float(row.dot(row)) / row.size + eps))
    squares = np.matmul(x[..., None, :], x[..., None])[..., 0].astype(np.float64)
    return (1.0 / np.sqrt(squares / x.shape[-1] + eps)).astype(F32)


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return x * _inverse_rms(x, eps) * weight


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


class _Rope:
    """Unit complex numbers of one rotary base; `at` gives those of positions (B,)."""

    def __init__(self, freqs: Tensor) -> None:
        self.freqs = freqs.numpy()
        self.width = 2 * self.freqs.size

    def at(self, positions: Array) -> Array:
        angle = positions.astype(F32)[:, None] * self.freqs
        turns = np.empty(angle.shape, np.complex64)
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
        """Return the normed input (B, D), post (B, 4, 1) and comb transposed (B, 4, 4) of streams (B, 4, D)."""
        flat = streams.reshape(len(streams), -1)
        mix = _product(self.fn, flat) * _inverse_rms(flat, self.eps) * self.scale.take(self.part) + self.base
        gates = _sigmoid(mix[:, : 2 * STREAMS, None])
        comb = sinkhorn4(mix[:, 2 * STREAMS :].reshape(-1, STREAMS, STREAMS), self.iters, self.hc_eps)
        pre = (gates[:, :STREAMS] + self.hc_eps).swapaxes(1, 2)
        return _norm(np.matmul(pre, streams)[:, 0], self.norm, self.eps), 2 * gates[:, STREAMS:], comb


class _Group(NamedTuple):
    """Some rows of a call that attend as many keys: of the window, and picked entries or the first."""

    rows: list[int]
    among: slice | list[int]  # the same, as an index
    window: int
    entries: int
    first: tuple[Array, Array] | None  # page and place in it (1, entries), None for picked ones


class _Call:
    """The tokens of one call: at most `rewind` + 1 of a sequence, so that all they attend is in the rings at once."""

    def __init__(self, rows: Sequence[tuple[Span, int]], layout: CacheLayout) -> None:
        self.page_tokens, self.window, self._rows = layout.page_tokens, layout.config.sliding_window, rows
        self.tokens = np.array([span.tokens[at] for span, at in rows])
        self.positions = [span.start + at for span, at in rows]
        self.slots = [span.slot for span, _ in rows]
        pages = [span.pages[: (span.start + at) // self.page_tokens + 1].astype(np.int64) for span, at in rows]
        self.table = np.zeros((len(rows), max(map(len, pages))), np.int64)
        for place, own in zip(self.table, pages, strict=True):
            place[: len(own)] = own
        blocks = [[own[low : low + PAGES] for low in range(0, len(own), PAGES)] for own in pages]
        # As slices where pages follow one another.
        self.blocks = [[slice(b[0], b[-1] + 1) if (np.diff(b) == 1).all() else b for b in own] for own in blocks]
        self._groups: dict[int, list[_Group]] = {}
        self._tails: dict[int, tuple[list[int], list[int], list[int]]] = {}

    def groups(self, ratio: int, topk: int) -> list[_Group]:
        """Return the rows by how many keys they attend in a layer of that ratio."""
        if ratio not in self._groups:
            found: dict[tuple[int, int, bool, int], list[int]] = {}
            for row, position in enumerate(self.positions):
                count = (position + 1) // ratio if ratio else 0
                picked = 0 < topk < count
                key = min(position + 1, self.window), topk if picked else count, picked, row // GROUP
                found.setdefault(key, []).append(row)
            per_page = self.page_tokens // ratio if ratio else 1
            self._groups[ratio] = [
                _Group(
                    rows, slice(None) if len(found) == 1 else rows, window, count,
                    None if picked else divmod(np.arange(count)[None], per_page),
                )
                for (window, count, picked, _), rows in found.items()
            ]  # fmt: skip
        return self._groups[ratio]

    def tail(self, ratio: int, ring: int) -> tuple[list[int], list[int], list[int]]:
        """Return each row's place in the tail rings of a ratio and in its window, and who completes a new entry."""
        if ratio not in self._tails:
            at, phase = ([position % size for position in self.positions] for size in (ring, ratio))
            fresh = [position >= span.frozen for position, (span, _) in zip(self.positions, self._rows, strict=True)]
            self._tails[ratio] = at, phase, [i for i, new in enumerate(fresh) if new and phase[i] == ratio - 1]
        return self._tails[ratio]


class _Pool:
    """A compressor for new tokens, and the entries it leaves in the pages."""

    def __init__(self, module: Compressor, tail: tuple[Rows, Rows], entries: Rows, rope: _Rope) -> None:
        self.ratio, self.width, self.overlap, self.eps = module.ratio, module.width, module.overlap, module.eps
        self.ape, self.norm = module.ape.detach().numpy(), module.norm.weight.detach().numpy()
        self.kv, self.score = (rows.parts[0].rows.numpy() for rows in tail)  # (slots, ring, channels)
        self.entries, self.rope = entries.parts[0].rows.numpy(), rope  # (pages, entries, width)

    def push(self, kv: Array, score: Array, call: _Call) -> None:
        """Put the tokens' rows (B, channels) into the tail rings, and the entries they complete into their pages."""
        places, phases, ends = call.tail(self.ratio, self.kv.shape[1])
        for row, (slot, at, phase) in enumerate(zip(call.slots, places, phases, strict=True)):
            self.kv[slot, at] = kv[row]
            np.add(score[row], self.ape[phase], out=self.score[slot, at])
        for row in ends:
            self._complete(call, row)

    def _complete(self, call: _Call, row: int) -> None:
        position, slot = call.positions[row], call.slots[row]
        first = max(0, position + 1 - self.ratio * (1 + self.overlap))
        at = np.arange(first, position + 1) % self.kv.shape[1]
        values, scores = self.kv[slot, at], self.score[slot, at]
        if self.overlap:
            cut, width = len(at) - self.ratio, self.width
            values, scores = (np.concatenate((rows[:cut, :width], rows[cut:, width:])) for rows in (values, scores))
        weights = np.exp(scores - scores.max(0))
        entry = _norm((weights * values).sum(0) / weights.sum(0), self.norm, self.eps)
        self.rope.turn(entry, self.rope.at(np.array([position + 1 - self.ratio]))[0])
        page, place = divmod(position // self.ratio, self.entries.shape[1])
        self.entries[call.table[row, page], place] = entry


class _Attend:
    """The attention site's inner part."""

    def __init__(self, module: Attention, ropes: dict[bool, _Rope], rows: LayerRows) -> None:
        self.ratio, self.heads, self.width, self.eps = module.ratio, module.heads, module.width, module.eps
        self.rope, self.scale = ropes[module.ratio > 0], F32(module.width**-0.5)
        first: list[Linear] = [module.wq_a, module.wkv]
        second: list[Linear] = [module.wq_b]
        self.ring = rows.window.parts[0].rows.numpy()  # (slots, rows, C)
        self.pool = self.index_pool = None
        self.topk = 0
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
            self.topk, self.index_scale = module.indexer.topk, (self.index_width * self.index_heads) ** -0.5
        ends = np.cumsum([m.weight.shape[0] for m in first]).tolist()
        self.cuts = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self.first = fuse([m.weight for m in first])
        self.second = fuse([m.weight for m in second])
        self.q_norm, self.kv_norm = module.q_norm.weight.detach().numpy(), module.kv_norm.weight.detach().numpy()
        self.sink = module.attn_sink.detach().numpy()[:, None]
        self.wo_a = module.wo_a.weight.detach().unflatten(0, (module.groups, -1)).numpy()
        self.wo_b = module.wo_b.weight.detach().numpy()

    def __call__(self, x: Array, call: _Call, turns: Array, back: Array) -> Array:
        """Attend x (B, D), already normed; return (B, D). turns (B, 1, rope / 2), `back` against them."""
        fused = _product(self.first, x)
        parts = [fused[:, cut] for cut in self.cuts]
        second = _product(self.second, _norm(parts[0], self.q_norm, self.eps))
        q = second[:, : self.heads * self.width].reshape(len(x), self.heads, self.width)
        q = q * (_inverse_rms(q, self.eps) * self.scale)
        self.rope.turn(q, turns)
        kv = _norm(parts[1], self.kv_norm, self.eps)
        self.rope.turn(kv, turns[:, 0])
        for slot, position, own in zip(call.slots, call.positions, kv, strict=True):
            self.ring[slot, position % self.ring.shape[1]] = own
        if self.pool is not None:
            self.pool.push(parts[2], parts[3], call)
        if self.index_pool is not None:
            self.index_pool.push(parts[4], parts[5], call)
        out, groups = q, call.groups(self.ratio, self.topk)
        for group in groups:
            entries = group.first
            if entries is None:
                index_q = second[group.among, self.heads * self.width :].reshape(-1, self.index_heads, self.index_width)
                self.rope.turn(index_q, turns[group.among])
                weights = parts[6][group.among, None] * self.index_scale
                picks = [self._picks(index_q[i], weights[i], call, row) for i, row in enumerate(group.rows)]
                entries = divmod(np.array(picks), call.page_tokens // self.ratio)
            found = self._group(q[group.among], entries, group, call)
            if len(groups) == 1:
                out = found
            else:
                out[group.rows] = found
        self.rope.turn(out, back)
        latent = _product(self.wo_a, out.reshape(len(x), len(self.wo_a), -1))
        return _product(self.wo_b, latent.reshape(len(x), -1))

    def _picks(self, q: Array, weights: Array, call: _Call, row: int) -> Array:
        """Return the entries that a row attends (topk,), for q (h, c) and weights (1, h)."""
        assert self.index_pool is not None
        keys, count = self.index_pool.entries, (call.positions[row] + 1) // self.ratio
        scores = found = np.empty(0, np.int64)
        for at, block in enumerate(call.blocks[row]):
            fresh = np.matmul(weights, np.maximum(np.matmul(q, keys[block].transpose(0, 2, 1)), 0)).ravel()
            index = np.arange(at * PAGES * keys.shape[1], count)[: len(fresh)]
            fresh = fresh[: len(index)]
            if at:
                fresh, index = np.concatenate((scores, fresh)), np.concatenate((found, index))
            best = (-fresh).argpartition(min(self.topk, len(fresh)) - 1)[: self.topk]
            scores, found = fresh[best], index[best]
        return found

    def _group(self, q: Array, entries: tuple[Array, Array], group: _Group, call: _Call) -> Array:
        """Attend q (b, H, C) over the window and entries, tile by tile from the sink on."""
        peak, total, out = self.sink, F32(1), None
        for low in range(0, max(group.entries, 1), ENTRIES):
            keys = self._keys(entries, group, call, low)
            logits = np.matmul(q, keys.swapaxes(1, 2))
            top = np.maximum(np.maximum.reduce(logits, 2, keepdims=True), peak)
            weights, fade = np.exp(logits - top), np.exp(peak - top)
            total = total * fade + np.add.reduce(weights, 2, keepdims=True)
            part = np.matmul(weights, keys)
            peak, out = top, part if out is None else out * fade + part
        assert out is not None
        return out / total

    def _keys(self, entries: tuple[Array, Array], group: _Group, call: _Call, low: int) -> Array:
        """Return a tile of keys (b, K, C): entries from `low` on, before the first ones the window."""
        window, count = 0 if low else group.window, min(group.entries - low, ENTRIES)
        keys = np.empty((len(group.rows), window + count, self.ring.shape[2]), F32)
        for own, row in zip(keys, group.rows if window else (), strict=False):
            slot = self.ring[call.slots[row]]
            first = (call.positions[row] + 1 - window) % len(slot)
            head = min(window, len(slot) - first)
            own[:head], own[head:window] = slot[first : first + head], slot[: window - head]
        if self.pool is not None and count:
            page, place = (part[:, low : low + ENTRIES] for part in entries)
            keys[:, window:] = self.pool.entries[call.table[np.array(group.rows)[:, None], page], place]
        return keys


class _Mixture:
    """The MoE site's inner part."""

    def __init__(self, module: MoE) -> None:
        gate, shared = module.gate, module.shared_experts
        self.topk, self.scaling, self.limit = gate.topk, gate.scaling, module.experts.limit
        self.table = None if gate.tid2eid is None else gate.tid2eid.numpy()
        self.bias = None if gate.bias is None else gate.bias.numpy()
        self.count, self.width = gate.weight.shape[0], shared.w1.weight.shape[0]
        self.first = fuse([gate.weight, shared.w1.weight, shared.w3.weight])
        self.shared_w2 = shared.w2.weight.detach().numpy()
        experts = module.experts
        if isinstance(experts, StreamedExperts):
            self.layer, (self.places, w13, w2) = experts.layer, experts.store.stacked
        else:
            self.places, w13, w2 = None, experts.w13, experts.w2
        self.w13, self.w2 = (list(part.detach().numpy()) for part in (w13, w2))

    def __call__(self, x: Array, tokens: Array) -> Array:
        """Return the experts' and the shared expert's sum (B, D) for x (B, D)."""
        first = _product(self.first, x)
        scores = np.sqrt(np.logaddexp(0, first[:, : self.count]))
        if self.table is not None:
            chosen = self.table[tokens]
        else:
            chosen = (-(scores + self.bias)).argpartition(self.topk - 1)[:, : self.topk]
        weights = scores.take(chosen + np.arange(0, scores.size, self.count)[:, None])
        weights *= self.scaling / (np.add.reduce(weights, 1, keepdims=True) + F32(1e-20))
        hidden = np.empty((len(x), self.topk + 1, 2 * self.width), F32)
        hidden[:, -1] = first[:, self.count :]
        if self.places is not None:
            self.places.fetch(self.layer, chosen)
            chosen = self.places.of(self.layer)[chosen]
        lists = chosen.tolist()
        for row, experts, places in zip(x, lists, hidden, strict=True):
            for expert, place in zip(experts, places, strict=False):
                self.w13[expert].dot(row, place)
        np.minimum(hidden, self.limit, out=hidden)
        gate, up = hidden[..., : self.width], np.maximum(hidden[..., self.width :], -self.limit)
        hidden = gate * up / (1.0 + np.exp(-gate))
        parts = np.empty((len(x), self.topk, x.shape[1]), F32)
        for experts, rows, places in zip(lists, hidden, parts, strict=True):
            for expert, row, place in zip(experts, rows, places, strict=False):
                self.w2[expert].dot(row, place)
        return _product(self.shared_w2, hidden[:, -1]) + np.matmul(weights[:, None], parts)[:, 0]


class Decoder:
    """A model's parameters arranged for `step` over the float32 rows of two pools; in-place updates are followed."""

    def __init__(self, model: Transformer, layers: Sequence[LayerRows], layout: CacheLayout) -> None:
        config = model.config
        self.ropes = {compressed: _Rope(frequencies(config, compressed, None)) for compressed in (False, True)}
        self.layers = [
            (_Site(b, "attn"), _Attend(b.attn, self.ropes, rows), _Site(b, "ffn"), _Mixture(b.ffn))
            for b, rows in zip(model.blocks, layers, strict=False)
        ]
        self.layout = layout
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

    def forward(self, spans: Sequence[Span]) -> Output:
        """Append the spans' tokens to their sequences; return the logits and streams they ask for, in span order."""
        rows = [(span, at) for span in spans for at in range(len(span.tokens))]
        calls: dict[int, list[int]] = {}  # in ascending order
        for index, (_, at) in enumerate(rows):
            calls.setdefault(at // (self.layout.rewind + 1), []).append(index)
        streams = np.empty((len(rows), STREAMS, self.embed.shape[1]), F32)
        for call in calls.values():
            for some in (call[low : low + ROWS] for low in range(0, len(call), ROWS)):
                streams[some] = self._streams(_Call([rows[index] for index in some], self.layout))
        wanted = [index for index, (span, at) in enumerate(rows) if len(span.tokens) - at <= span.logits]
        kept = [index for index, (span, at) in enumerate(rows) if len(span.tokens) - at <= span.streams]
        return Output(self._logits(streams[wanted]), streams[kept])

    def _streams(self, call: _Call) -> Array:
        found = {kind: rope.at(np.array(call.positions))[:, None] for kind, rope in self.ropes.items()}
        turns = {kind: (each, each.conj()) for kind, each in found.items()}
        streams = np.repeat(self.embed[call.tokens][:, None], STREAMS, 1)
        for attn_site, attend, ffn_site, mixture in self.layers:
            x, post, comb = attn_site.enter(streams)
            streams = np.matmul(comb, streams) + post * attend(x, call, *turns[attend.ratio > 0])[:, None]
            x, post, comb = ffn_site.enter(streams)
            streams = np.matmul(comb, streams) + post * mixture(x, call.tokens)[:, None]
        return streams

    def _logits(self, streams: Array) -> Array:
        fn, base, scale, norm = self.head
        flat = streams.reshape(len(streams), -1)
        mix = _product(fn, flat) * _inverse_rms(flat, self.eps) * scale + base
        hidden = np.matmul((_sigmoid(mix) + self.hc_eps)[:, None], streams)[:, 0]
        return _product(self.vocabulary, _norm(hidden, norm, self.eps))
