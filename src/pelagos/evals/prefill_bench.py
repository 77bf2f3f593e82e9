"""What `pelagos bench kernels` measures of prompts, and `pelagos bench prefill`: a chunk of a prompt at a context.

Random operands at the true shapes; a BF16 FLOP counts as two of FP8, so that floors are those of the FP8 rate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from pelagos import cost
from pelagos.config import ModelConfig
from pelagos.kernels import prefill_attention, prefill_cache, prefill_experts, prefill_indexer, prefill_products
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.ref import decode_attention as calls_ref
from pelagos.kernels.ref import fp4_experts as experts_ref
from pelagos.kernels.ref import skinny_gemm as gemm_ref

Case = tuple[str, list[Callable[[], Any]], cost.KernelCost, int, dict[str, list[Callable[[], Any]]]]
CONTEXTS = (8192, 131072)


def _cut(config: ModelConfig, ratio: int) -> CacheLayout:
    """The layout of a model of two layers of one ratio."""
    ratios = (ratio, 4) if ratio == 0 else (ratio, ratio)
    cut = dataclasses.replace(config, num_hidden_layers=2, compress_ratios=ratios, num_nextn_predict_layers=0)
    return CacheLayout(cut, "released")


def _prompt(config: ModelConfig, ratio: int, context: int, tokens: int) -> tuple[CacheLayout, prefill_cache.Prompt]:
    """The last tokens of a context as one call."""
    layout = _cut(config, ratio)
    span = Span(np.zeros(tokens, np.int64), context - tokens, 0, np.arange(layout.pages_for(context), dtype=np.int32))
    return layout, prefill_cache.prompt([span], layout, "cuda")


def _pools(layout: CacheLayout, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = (layout.pages_for(context), layout.page_bytes), (1, layout.slot_bytes)
    pages, slots = (torch.randint(0, 120, size, dtype=torch.uint8, device="cuda") for size in sizes)
    return pages, slots


def attention(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Attention of the last tokens of a context over their window and picked (ratio 4) or all entries."""
    heads, width = config.num_attention_heads, config.head_dim
    for ratio, contexts in ((0, CONTEXTS[:1]), (4, CONTEXTS), (128, CONTEXTS)):
        for context in contexts:
            layout, call = _prompt(config, ratio, context, tokens)
            entries = call.entries.get(ratio)
            main = torch.randn(call.windows + (entries.total if entries else 0), width, device="cuda").bfloat16()
            keys, picks, rows = prefill_cache.Keys(main, None, None), None, min(config.sliding_window, context) * tokens
            if entries is not None:
                rows += int(entries.seen.clamp_max(config.index_topk if ratio == 4 else 1 << 30).sum())
            if entries is not None and ratio == 4:
                scores = torch.rand(tokens, entries.most, device="cuda")
                hidden = torch.arange(entries.most, device="cuda") >= entries.seen[:, None]
                best = scores.masked_fill_(hidden, -1).topk(min(config.index_topk, entries.most)).values[:, -1:]
                picks = torch.where(scores >= best.clamp_min(0), torch.arange(entries.most, device="cuda"), 1 << 30)
                picks = picks.sort(1).values[:, : config.index_topk]
                picks = picks.masked_fill(picks == 1 << 30, -1).int().contiguous()
                del scores, hidden
            turn = torch.rand(tokens, 2, config.qk_rope_head_dim // 2, device="cuda")
            q = torch.randn(tokens, heads, width, device="cuda").bfloat16()
            sink = torch.zeros(heads, device="cuda")
            run = functools.partial(prefill_attention.attend, q, call, keys, layout, 0, sink, picks, turn)
            least = cost.KernelCost(4.0 * tokens * heads * width, 2 * 4.0 * rows * heads * width)
            yield f"ratio={ratio} context={context}", [run] * 2, least, 1, {}


def index(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Scores of FP4 keys and the choice among them."""
    heads, width = config.index_n_heads, config.index_head_dim
    for context in (*CONTEXTS, 1048576):
        _, call = _prompt(config, 4, context, tokens)
        entries = call.entries[4]
        codes = torch.randint(0, 120, (entries.total, width), dtype=torch.uint8, device="cuda")
        keys = prefill_cache.Keys(codes, codes, torch.ones(entries.total, device="cuda"))
        q = torch.randn(tokens, heads, width, device="cuda").bfloat16()
        weights = torch.randn(tokens, heads, device="cuda")
        run = functools.partial(prefill_indexer.pick, q, weights, call, keys, config.index_topk)
        scored = int(entries.seen.sum())
        least = cost.KernelCost(q.nbytes + codes.nbytes + 4 * tokens * config.index_topk, 2.0 * scored * heads * width)
        yield f"context={context}", [run] * 2, least, 1 + 2 * -(-entries.most // 4096), {}


def writes(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """What a chunk leaves in the cache and decodes to attend."""
    for ratio in (0, 4, 128):
        layout, call = _prompt(config, ratio, CONTEXTS[0], tokens)
        pages, slots = _pools(layout, CONTEXTS[0])
        shape = {64: "flash", 128: "pro"}.get(config.num_attention_heads, "nano")
        made = calls_ref.make_call(shape, ratio, ((CONTEXTS[0] - tokens, tokens),), device="cuda")
        projected, weights, turn, entry_turn = calls_ref.make_projected(made)
        columns = config.q_lora_rank + config.head_dim
        first, wide = projected[:, :columns].bfloat16(), projected[:, columns:].contiguous()
        inputs = (first, wide if ratio else None, call, layout, 0, pages, slots, weights, turn, entry_turn)
        run = functools.partial(prefill_cache.cache_write, *inputs)
        entries = call.entries[ratio].total if ratio else 0
        moved = tokens * 4 * wide.shape[1] * bool(ratio) + 2 * config.head_dim * (3 * tokens + 2 * entries)
        yield f"ratio={ratio}", [run] * 2, cost.KernelCost(moved, 0), 5 if ratio == 4 else 4 if ratio else 2, {}


def experts(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """A layer's routed experts, routing even on average."""
    count, picks, width = config.n_routed_experts, config.num_experts_per_tok, config.hidden_size
    weights = experts_ref.make_inputs(1, count, picks, width, config.moe_intermediate_size, device="cuda")[4:]
    bases = (prefill_experts.base_bytes(*weights[:2]), prefill_experts.base_bytes(*weights[2:]))
    x = experts_ref.make_inputs(tokens, 1, 1, width, 128, device="cuda")
    chosen = torch.rand(tokens, count, device="cuda").topk(picks).indices.int()
    run = functools.partial(prefill_experts.mixture, *x[:2], chosen, torch.rand(tokens, picks, device="cuda"), *weights,
                            bases, config.swiglu_limit)  # fmt: skip
    yield "", [run] * 2, cost.experts_kernel(config, tokens, count), 8, {}


def products(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Dense FP8 products, beside the library's best over operands of the same size with one scale."""
    c, q = config, config.num_attention_heads * config.head_dim
    shapes = {
        "wq_a+wkv": (c.q_lora_rank + c.head_dim, c.hidden_size, 1), "wq_b": (q, c.q_lora_rank, 1),
        "wo_a": (c.o_lora_rank, q // c.o_groups, c.o_groups), "wo_b": (c.hidden_size, c.o_groups * c.o_lora_rank, 1),
        "shared w13": (2 * c.moe_intermediate_size, c.hidden_size, 1),
    }  # fmt: skip
    for name, (outputs, depth, groups) in shapes.items():
        inputs = gemm_ref.make_inputs(tokens, outputs, depth, groups, device="cuda")
        inputs = (*inputs[:3], prefill_products.factors(inputs[3]))
        run = functools.partial(prefill_products.product, *inputs, groups=groups)
        yield name, [run] * 2, cost.product_kernel(groups * outputs, depth, tokens, groups), 1 + groups, {}


MAKERS: dict[str, Callable[[ModelConfig, int], Iterator[Case]]] = {
    "prefill_attention": attention, "prefill_indexer": index, "prefill_cache": writes, "prefill_experts": experts,
    "prefill_products": products,
}  # fmt: skip
TOKENS = dict.fromkeys(MAKERS, (4096, 8192))
