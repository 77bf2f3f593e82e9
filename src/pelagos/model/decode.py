"""One token of one sequence on the CPU in float32, reference mode: the modules' arithmetic on numpy views.

At batch 1 a small model spends its time starting operators, not in them: numpy starts one in half a microsecond,
torch in two to five. This is the forward of `attention.py`, `experts.py` and `transformer.py` for S = B = 1, over the
same parameters (products that share an input are fused by laying their weights side by side in one buffer, of which
the parameters become views) and the same `Cache`. `tests/model/test_decode.py` holds it to the forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pelagos.kernels.ref.norm_rope import rope_frequencies
from pelagos.model.attention import Attention, Compressor
from pelagos.model.cache import Cache, LayerCache
from pelagos.model.experts import MoE
from pelagos.model.layers import Linear

if TYPE_CHECKING:
    from pelagos.model.transformer import Block, Transformer

Array = np.ndarray
STREAMS = 4  # sinkhorn4 is unrolled for the released hc_mult
F32 = np.float32


def fuse(linears: Sequence[torch.nn.Parameter]) -> Array:
    """Lay weights (o_i, i) side by side in one (sum o, i) buffer and make the parameters views of it."""
    if len(linears) > 1:
        buffer = torch.cat([p.detach() for p in linears])
        start = 0
        for parameter in linears:
            parameter.data = buffer[start : start + parameter.shape[0]]
            start += parameter.shape[0]
    else:
        buffer = linears[0].detach()
    return buffer.numpy()


def sinkhorn4(logits: Array, iters: int, eps: float) -> Array:
    """`ref.hyper_connection.sinkhorn` of one (4, 4) matrix, as row and column scalings of the softmax in float64."""
    k = np.exp((logits - logits.max(1, keepdims=True)).astype(np.float64))
    k = k / k.sum(1, keepdims=True) + eps
    (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3) = k.tolist()
    p = q = r = s = 1.0
    w = 1.0 / (a0 + b0 + c0 + d0 + eps)
    x = 1.0 / (a1 + b1 + c1 + d1 + eps)
    y = 1.0 / (a2 + b2 + c2 + d2 + eps)
    z = 1.0 / (a3 + b3 + c3 + d3 + eps)
    for _ in range(iters - 1):
        p /= p * (a0 * w + a1 * x + a2 * y + a3 * z) + eps
        q /= q * (b0 * w + b1 * x + b2 * y + b3 * z) + eps
        r /= r * (c0 * w + c1 * x + c2 * y + c3 * z) + eps
        s /= s * (d0 * w + d1 * x + d2 * y + d3 * z) + eps
        w /= w * (a0 * p + b0 * q + c0 * r + d0 * s) + eps
        x /= x * (a1 * p + b1 * q + c1 * r + d1 * s) + eps
        y /= y * (a2 * p + b2 * q + c2 * r + d2 * s) + eps
        z /= z * (a3 * p + b3 * q + c3 * r + d3 * s) + eps
    return (k * np.array([[p], [q], [r], [s]]) * np.array([w, x, y, z])).astype(F32)


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


class _Pool:
    """A compressor for one new token."""

    def __init__(self, module: Compressor) -> None:
        self.ratio, self.width, self.overlap, self.eps = module.ratio, module.width, module.overlap, module.eps
        self.ape, self.norm = module.ape.detach().numpy(), module.norm.weight.detach().numpy()
        self.span = self.width * (1 + self.overlap)

    def push(self, kv: Array, score: Array, position: int, cache: LayerCache, name: str) -> Array | None:
        """Append the token's rows; return the entry (width,) they complete, normed, or None."""
        score = score + self.ape[position % self.ratio]
        keep = self.ratio * (1 + self.overlap)
        tails = cache.tail(name, _rows(kv), _rows(score), keep)
        if (position + 1) % self.ratio:
            return None
        values, scores = (t.numpy()[0, -keep:] for t in tails)
        if self.overlap:
            m, w = self.ratio, self.width
            values = np.concatenate((values[:m, :w], values[m:, w:]))
            scores = np.concatenate((scores[:m, :w], scores[m:, w:]))
        weights = np.exp(scores - scores.max(0))
        return _norm((weights * values).sum(0) / weights.sum(0), self.norm, self.eps)


def _rows(x: Array) -> Tensor:
    return torch.from_numpy(x).view(1, 1, -1)


class _Attend:
    """The attention site's inner part for one token."""

    def __init__(self, module: Attention, ropes: dict[bool, _Rope]) -> None:
        self.ratio, self.heads, self.width, self.eps = module.ratio, module.heads, module.width, module.eps
        self.window, self.rope = module.window_size, ropes[module.ratio > 0]
        first: list[Linear] = [module.wq_a, module.wkv]
        second: list[Linear] = [module.wq_b]
        self.pool = self.index_pool = None
        if module.compressor is not None:
            first += [module.compressor.wkv, module.compressor.wgate]
            self.pool = _Pool(module.compressor)
        if module.indexer is not None:
            inner = module.indexer.compressor
            first += [inner.wkv, inner.wgate, module.indexer.weights_proj]
            second.append(module.indexer.wq_b)
            self.index_pool = _Pool(inner)
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

    def __call__(self, x: Array, position: int, tables: dict[bool, Array], cache: LayerCache) -> Array:
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
        rows = cache.window(_rows(kv)).numpy()[0, -min(position + 1, self.window) :]  # (K, C)
        keys = [rows]
        if self.pool is not None:
            entries = self._append(self.pool, parts[2], parts[3], position, cache, "main")
            if self.index_pool is not None:
                index_keys = self._append(self.index_pool, parts[4], parts[5], position, cache, "index")
                if len(entries) > self.topk:
                    entries = entries[self._picks(second, parts[6], index_keys, table)]
            if len(entries):
                keys.append(entries)
        return self._output(q, keys, table)

    def _append(self, pool: _Pool, kv: Array, score: Array, position: int, cache: LayerCache, name: str) -> Array:
        entry = pool.push(kv, score, position, cache, name)
        if entry is None:
            new = torch.empty(1, 0, pool.width)
        else:
            self.rope.turn(entry, self.rope.at(position + 1 - pool.ratio))
            new = _rows(entry)
        return cache.entries(name, new).numpy()[0]  # (M, width); all are visible to the newest token

    def _picks(self, second: Array, weights: Array, keys: Array, table: Array) -> Array:
        q = second[self.heads * self.width :].reshape(self.index_heads, self.index_width).copy()
        self.rope.turn(q, table)
        scale = F32(self.index_width**-0.5 * self.index_heads**-0.5)
        scores = (weights * scale).dot(np.maximum(q.dot(keys.T), 0))
        return np.sort(np.argpartition(-scores, self.topk - 1)[: self.topk])

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
    """A model's parameters arranged for `step`; build it once, it follows in-place updates of the parameters."""

    def __init__(self, model: Transformer) -> None:
        config = model.config
        rope = config.rope_scaling
        yarn = {} if rope is None else {
            "factor": rope.factor, "original": rope.original_max_position_embeddings,
            "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow,
        }  # fmt: skip
        self.ropes = {
            False: _Rope(rope_frequencies(config.qk_rope_head_dim, config.rope_theta)),
            True: _Rope(rope_frequencies(config.qk_rope_head_dim, config.compress_rope_theta, **yarn)),
        }
        self.layers = [
            (_Site(b, "attn"), _Attend(b.attn, self.ropes), _Site(b, "ffn"), _Mixture(b.ffn)) for b in model.blocks
        ]
        self.embed = model.embed.weight.detach().numpy()
        self.head = tuple(
            p.detach().numpy() for p in (model.hc_head_fn, model.hc_head_base, model.hc_head_scale, model.norm.weight)
        )
        self.hc_eps, self.eps = config.hc_eps, config.rms_norm_eps
        self._addresses = addresses(model)

    def is_current(self, model: Transformer) -> bool:
        """Whether the parameters still live where they did; moving or casting the model makes it stale."""
        return self._addresses == addresses(model)

    def step(self, token: int, cache: Cache) -> Tensor:
        """Append one token; return the normed vector (1, 1, D) float32 that the vocabulary head reads."""
        position = cache.position
        tables = {kind: rope.at(position) for kind, rope in self.ropes.items()}
        streams = np.repeat(self.embed[token][None], STREAMS, 0)
        for index, (attn_site, attend, ffn_site, mixture) in enumerate(self.layers):
            x, post, comb = attn_site.enter(streams)
            streams = comb.T.dot(streams) + post * attend(x, position, tables, cache.layer(index))
            x, post, comb = ffn_site.enter(streams)
            streams = comb.T.dot(streams) + post * mixture(x, token)
        fn, base, scale, norm = self.head
        flat = streams.ravel()
        mix = fn.dot(flat) * F32(_inverse_rms(flat, self.eps)) * scale + base
        return _rows(_norm((_sigmoid(mix) + F32(self.hc_eps)).dot(streams), norm, self.eps))


def addresses(model: Transformer) -> tuple[int, ...]:
    """Where the first and last layers' parameters live."""
    first, last = model.blocks[0], model.blocks[-1]
    return tuple(p.data_ptr() for p in (model.embed.weight, first.attn.wq_a.weight, last.ffn.experts.w2))
