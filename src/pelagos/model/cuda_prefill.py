"""Prompts on CUDA: a chunk of one or several sequences in one pass over the layers, in released mode.

The kernels of kernels/prefill_*.py and the library's products; nothing waits for the host between two layers. A row's
bits do not depend on the chunk it comes in. On a CPU (tests) the same calls run through the references.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pelagos.kernels import prefill_attention, prefill_cache, prefill_experts, prefill_indexer, query
from pelagos.kernels import prefill_products as products
from pelagos.kernels.cache_write import widths
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.site import site
from pelagos.kernels.skinny_gemm import TALL
from pelagos.model.attention import CSA_RATIO, frequencies
from pelagos.model.cuda_weights import Fp8, LayerWeights, SiteWeights, Weights

SITE_ROWS = 129  # least rows of a site's call: with fewer it adds in another order


def scaled(layer: LayerWeights, *names: str) -> LayerWeights:
    """Return a layer in which the named products have float32 scales, as the library takes them."""
    weights = {name: getattr(layer, name) for name in names}
    return dataclasses.replace(
        layer, **{name: Fp8(codes, products.factors(scales)) for name, (codes, scales) in weights.items()}
    )


class Prefill:
    """Prompt calls of one model over two pools. Raises ConfigError for weights that the prompt kernels do not take."""

    late = False  # keys come behind the queries, for there is something to wait for

    def __init__(self, weights: Weights, layout: CacheLayout, pages: Tensor, slots: Tensor) -> None:
        self.weights, self.layout, self.pages, self.slots = weights, layout, pages, slots
        config = weights.config
        self._freqs = [frequencies(config, compressed, weights.device) for compressed in (False, True)]
        self._layers = [
            dataclasses.replace(scaled(layer, "first", "second", "wo_a", "wo_b", "shared13", "shared2"), bases=bases)
            for layer, bases in zip(weights.layers, weights.bases(), strict=True)
        ]

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
        # What one site hands to the next, replaced in place: output, streams, and how the one enters the others.
        state = [None, weights.embed.index_select(0, ids).unsqueeze(1).repeat(1, config.hc_mult, 1), None, None]
        for index, layer in enumerate(self._layers):
            turn = turns[1 if layer.ratio else 0]
            self._attend(state, index, layer, call, turn, entry_turns.get(layer.ratio))
            self._feed(state, layer, ids)
        ends = torch.tensor([len(span.tokens) for span in spans]).cumsum(0).tolist()
        wanted, kept = (
            torch.cat([torch.arange(end - getattr(span, name), end) for end, span in zip(ends, spans, strict=True)])
            for name in ("logits", "streams")
        )
        rows = torch.cat((wanted, kept)).to(device)
        state = [None if each is None else each[rows] for each in state]
        normed, _, _ = self._site(state, weights.head_site)
        assert state[1] is not None
        return products.wide_product(normed[: len(wanted)], weights.head, 64), state[1][len(wanted) :]

    def _site(self, state: list[Tensor | None], weights: SiteWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Take the last output into the streams; return this site's normed input, its codes and scales."""
        c = self.weights.config
        assert state[1] is not None
        count = len(state[1])
        y, streams, post, comb = (
            each if each is None or count >= SITE_ROWS
            else torch.cat((each, each.new_zeros((SITE_ROWS - count, *each.shape[1:]))))
            for each in state
        )  # fmt: skip
        assert streams is not None
        options = {"iters": c.hc_sinkhorn_iters, "eps": c.hc_eps, "norm_eps": c.rms_norm_eps}
        found = [each[:count] for each in site(y, streams, post, comb, *weights, **options)]
        state[:] = None, *found[:3]
        return found[3], found[4], found[5]

    def _attend(
        self, state: list[Tensor | None], index: int, layer: LayerWeights,
        call: prefill_cache.Prompt, turn: Tensor, entry_turn: Tensor | None,
    ) -> None:  # fmt: skip
        c, layout = self.weights.config, self.layout
        normed, codes, scales = self._site(state, layer.attn_site)
        first = products.product(codes, scales, *layer.first)
        wide = products.wide_product(normed, layer.first_wide) if layer.ratio else None
        inputs = (first, wide, call, layout, index, self.pages, self.slots, layer.cache, turn, entry_turn)
        keys = None if self.late else self._keys(*inputs)
        latent = products.quantise(first[:, : c.q_lora_rank], layer.cache.q_norm, eps=c.rms_norm_eps)
        shape = (c.index_n_heads, c.index_head_dim) if layer.ratio == CSA_RATIO else (0, 0)
        second = products.product(*latent, *layer.second)
        q, index_q = query.query(second, turn, c.num_attention_heads, c.head_dim, *shape, eps=c.rms_norm_eps)
        del second
        keys, picks = keys or self._keys(*inputs), None
        if index_q is not None and call.entries[CSA_RATIO].most > c.index_topk:
            assert wide is not None
            head = sum(widths(c, layer.ratio)[2:]) - c.index_n_heads
            factor = c.index_head_dim**-0.5 * c.index_n_heads**-0.5
            head_weights = (wide[:, head : head + c.index_n_heads].bfloat16() * factor).float()
            picks = prefill_indexer.pick(index_q, head_weights, call, keys, c.index_topk)
        out = prefill_attention.attend(q, call, keys, layout, index, layer.sink, picks, turn)
        del q, index_q, wide, keys, inputs, picks, normed  # what follows wants their room
        codes, scales = products.quantise(products.product(out, None, *layer.wo_a, groups=c.o_groups))
        state[0] = products.product(codes, scales, *layer.wo_b)

    def _keys(self, *inputs: Any) -> prefill_cache.Keys:
        return prefill_cache.cache_write(*inputs)

    def _feed(self, state: list[Tensor | None], layer: LayerWeights, ids: Tensor) -> None:
        c = self.weights.config
        normed, codes, scales = self._site(state, layer.ffn_site)
        shared = products.product(*self._hidden(layer, codes, scales), *layer.shared2)
        chosen, weights = self._choose(layer, normed, ids)
        del normed
        assert layer.bases is not None
        state[0] = prefill_experts.mixture(
            codes, scales, chosen, weights, *layer.w13, *layer.w2, layer.bases, float(c.swiglu_limit), shared=shared,
            place=layer.place,
        )  # fmt: skip

    def _hidden(self, layer: LayerWeights, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """What the shared expert's second product takes."""
        up = products.product(codes, scales, *layer.shared13)
        return products.swiglu(up, float(self.weights.config.swiglu_limit))

    def _choose(self, layer: LayerWeights, normed: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        c = self.weights.config
        scores, count, picks = products.wide_product(normed, layer.gate), c.n_routed_experts, c.num_experts_per_tok
        return prefill_experts.choose(scores, layer.bias, layer.table, ids, count, picks, c.routed_scaling_factor)


def prompt_bytes(layout: CacheLayout, tokens: int, positions: int) -> int:
    """Return what a prompt call of so many tokens that ends at `positions` takes at its widest point, logits apart."""
    c = layout.config
    ratios = {ratio for ratio in c.layer_ratios if ratio}
    heads, index, d = c.num_attention_heads * c.head_dim, c.index_n_heads * c.index_head_dim, c.hidden_size
    called = tokens + -tokens % products.CALL_ROWS
    streams, latent, inner = 2 * c.hc_mult * d, c.q_lora_rank + c.head_dim, c.moe_intermediate_size
    site = max(tokens, SITE_ROWS) * (streams + 5 * d + 768) + 768 * d
    # Before attention: keys, the normed input and its codes, first products.
    entry = {ratio: 2 * c.head_dim + (c.index_head_dim + 4) * (ratio == CSA_RATIO) for ratio in ratios}
    keys = 2 * (tokens + c.sliding_window) * c.head_dim
    keys += max((positions // ratio * size for ratio, size in entry.items()), default=0)
    wide = max((sum(widths(c, ratio)[2:]) for ratio in ratios), default=0)
    before = keys + tokens * (3 * d + 2 * latent + c.q_lora_rank) + 4 * called * (wide + -wide % TALL)
    second = 2 * (heads + index) * (called if c.q_lora_rank % products.SCALED_DEPTH else tokens)
    scored = min(prefill_indexer.CHUNK, 1 << (max(128, positions // CSA_RATIO) - 1).bit_length())
    chosen = tokens * (4 * scored + 16 * c.index_topk + index)
    query_ = before + tokens * 2 * (heads + index) + max(second, chosen, tokens * 2 * heads)
    rows = products.steady_rows(tokens, c.o_lora_rank, heads // c.o_groups)
    output = 2 * heads * (tokens + c.o_lora_rank) + 2 * (tokens + -tokens % rows) * c.o_groups * c.o_lora_rank
    picks = c.num_experts_per_tok * tokens
    room = picks + prefill_experts.SPARE * min(c.n_routed_experts, picks)
    experts = tokens * 6 * d + room * (5 * inner + 2 * d + d // 32 + inner // 32)
    each = streams + 4 * c.qk_rope_head_dim * (2 + len(ratios)) + 128
    return tokens * each + max(site, query_, output, experts) + (1 << 20)  # what the allocator does not split
