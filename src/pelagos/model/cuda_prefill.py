"""Prompts on CUDA: a chunk of one or several sequences in one pass over the layers, in released mode.

The kernels of kernels/prefill_*.py and the library's products; nothing waits for the host between two layers. A row's
bits do not depend on the chunk it comes in. On a CPU (tests) the same calls run through the references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pelagos.kernels import prefill_attention, prefill_cache, prefill_experts, prefill_indexer, query
from pelagos.kernels.cache_write import widths
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.prefill_products import factors, product, quantise, swiglu, wide_product
from pelagos.kernels.ref.experts import route
from pelagos.kernels.site import site
from pelagos.model.attention import CSA_RATIO, frequencies
from pelagos.model.cuda_weights import LayerWeights, SiteWeights, Weights

SITE_ROWS = 129  # least rows of a site's call: with fewer it adds in another order


class _Layer(NamedTuple):
    """What prompts read of a layer besides its weights: float32 scales of products, base bytes of the experts."""

    first: Tensor
    second: Tensor
    wo_a: Tensor
    wo_b: Tensor
    shared13: Tensor
    shared2: Tensor
    bases: tuple[Tensor, Tensor]


class Prefill:
    """Prompt calls of one model over two pools. Raises ConfigError for weights that the prompt kernels do not take."""

    def __init__(self, weights: Weights, layout: CacheLayout, pages: Tensor, slots: Tensor) -> None:
        self.weights, self.layout, self.pages, self.slots = weights, layout, pages, slots
        config = weights.config
        self._freqs = [frequencies(config, compressed, weights.device) for compressed in (False, True)]
        self._layers = [
            _Layer(
                first=factors(layer.first.scales), second=factors(layer.second.scales), wo_a=factors(layer.wo_a.scales),
                wo_b=factors(layer.wo_b.scales), shared13=factors(layer.shared13.scales),
                shared2=factors(layer.shared2.scales),
                bases=(prefill_experts.base_bytes(*layer.w13), prefill_experts.base_bytes(*layer.w2)),
            ) for layer in weights.layers
        ]  # fmt: skip

    @torch.inference_mode()
    def run(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Append the spans' tokens; return logits (sum of span.logits, V) float32 and streams (sum of span.streams, n,
        D) bfloat16 of the last tokens of each, on the device."""
        weights, config, device = self.weights, self.weights.config, self.weights.device
        call = prefill_cache.prompt(spans, self.layout, device)
        ids = torch.cat([torch.from_numpy(span.tokens) for span in spans]).to(device, torch.int64)
        positions = call.rows.positions
        turns = [query.angles(positions, freqs) for freqs in self._freqs]
        entry_turns = {ratio: query.angles(positions - ratio + 1, self._freqs[1]) for ratio in call.entries}
        streams = weights.embed.index_select(0, ids).unsqueeze(1).repeat(1, config.hc_mult, 1)
        state: tuple[Tensor | None, ...] = (None, streams, None, None)
        for index, (layer, extra) in enumerate(zip(weights.layers, self._layers, strict=True)):
            turn = turns[1 if layer.ratio else 0]
            state = self._layer(state, index, layer, extra, call, ids, turn, entry_turns.get(layer.ratio))
        ends = torch.tensor([len(span.tokens) for span in spans]).cumsum(0).tolist()
        wanted, kept = (
            torch.cat([torch.arange(end - getattr(span, name), end) for end, span in zip(ends, spans, strict=True)])
            for name in ("logits", "streams")
        )
        rows = torch.cat((wanted, kept)).to(device)
        last = self._site(tuple(None if each is None else each[rows] for each in state), weights.head_site)
        return wide_product(last[3][: len(wanted)], weights.head, 64), last[0][len(wanted) :]

    def _site(self, state: tuple[Tensor | None, ...], weights: SiteWeights) -> tuple[Tensor, ...]:
        c = self.weights.config
        assert state[1] is not None
        count = len(state[1])
        if count < SITE_ROWS:
            state = tuple(
                None if each is None else torch.cat((each, each.new_zeros((SITE_ROWS - count, *each.shape[1:]))))
                for each in state
            )
        y, streams, post, comb = state
        assert streams is not None
        options = {"iters": c.hc_sinkhorn_iters, "eps": c.hc_eps, "norm_eps": c.rms_norm_eps}
        return tuple(each[:count] for each in site(y, streams, post, comb, *weights, **options))

    def _layer(
        self, state: tuple[Tensor | None, ...], index: int, layer: LayerWeights, extra: _Layer,
        call: prefill_cache.Prompt, ids: Tensor, turn: Tensor, entry_turn: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        c, layout = self.weights.config, self.layout
        streams, post, comb, normed, codes, scales = self._site(state, layer.attn_site)
        first = product(codes, scales, layer.first.codes, extra.first)
        wide = wide_product(normed, layer.first_wide) if layer.ratio else None
        keys = prefill_cache.cache_write(
            first, wide, call, layout, index, self.pages, self.slots, layer.cache, turn, entry_turn
        )
        latent = quantise(first[:, : c.q_lora_rank], layer.cache.q_norm, eps=c.rms_norm_eps)
        shape = (c.index_n_heads, c.index_head_dim) if layer.ratio == CSA_RATIO else (0, 0)
        q, index_q = query.query(
            product(*latent, layer.second.codes, extra.second), turn, c.num_attention_heads, c.head_dim, *shape,
            eps=c.rms_norm_eps,
        )  # fmt: skip
        picks = None
        if index_q is not None and call.entries[CSA_RATIO].most > c.index_topk:
            assert wide is not None
            head = sum(widths(c, layer.ratio)[2:]) - c.index_n_heads
            factor = c.index_head_dim**-0.5 * c.index_n_heads**-0.5
            head_weights = (wide[:, head : head + c.index_n_heads].bfloat16() * factor).float()
            picks = prefill_indexer.pick(index_q, head_weights, call, keys, c.index_topk)
        out = prefill_attention.attend(q, call, keys, layout, index, layer.sink, picks, turn)
        codes, scales = quantise(product(out, None, layer.wo_a.codes, extra.wo_a, groups=c.o_groups))
        y = product(codes, scales, layer.wo_b.codes, extra.wo_b)
        streams, post, comb, normed, codes, scales = self._site((y, streams, post, comb), layer.ffn_site)
        up = product(codes, scales, layer.shared13.codes, extra.shared13)
        shared = product(*swiglu(up, float(c.swiglu_limit)), layer.shared2.codes, extra.shared2)
        chosen, weights = self._route(normed, layer, ids)
        y = prefill_experts.mixture(
            codes, scales, chosen, weights, *layer.w13, *layer.w2, extra.bases, float(c.swiglu_limit), shared=shared
        )
        return y, streams, post, comb

    def _route(self, normed: Tensor, layer: LayerWeights, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return chosen (T, K) int32 and weights (T, K) float32."""
        c = self.weights.config
        scores = functional.softplus(wide_product(normed, layer.gate)[:, : c.n_routed_experts]).sqrt()
        if layer.table is not None:
            chosen = layer.table[ids]
        else:
            assert layer.bias is not None
            chosen = (scores + layer.bias).topk(c.num_experts_per_tok, -1).indices
        return chosen.int(), route(scores, chosen, c.routed_scaling_factor)
