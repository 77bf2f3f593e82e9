"""What `pelagos bench kernels` measures of attention (decode attention, indexer, queries, cache writes) and picks.

Sequences of a bench share a pool of pages larger than the L2 cache, in tables drawn at random; every call has rows,
windows and picks of its own. Contexts are full: each sequence is at its last position.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pelagos import cost
from pelagos.config import ModelConfig
from pelagos.kernels import cache_write, decode_attention, indexer, query, sampling
from pelagos.kernels.ref import decode_attention as ref
from pelagos.kernels.ref import query as query_ref
from pelagos.kernels.ref import sampling as sampling_ref

Case = tuple[str, list[Callable[[], Any]], cost.KernelCost, int, dict[str, list[Callable[[], Any]]]]
CONTEXTS = (8192, 131072, 1048576)
CALLS = 16  # a round
PAGES = {0: 8, 4: 6000, 128: 200_000}  # of a pool, by ratio
TOKENS = {"attention": (1, 4, 16, 32, 128), "indexer": (1, 8, 32), "cache_write": (1, 16, 64), "query": (1, 16, 64),
          "sampling": (1, 16, 64)}  # fmt: skip


def _parts(call: ref.Call, tokens: int, count: int) -> list[slice]:
    return [slice(i * tokens, (i + 1) * tokens) for i in range(min(count, len(call.rows.positions) // tokens))]


def _rows(call: ref.Call, part: slice) -> Any:
    rows = call.rows
    return rows._replace(**{name: getattr(rows, name)[part] for name in rows._fields if name != "table"})


def _call(config: ModelConfig, ratio: int, context: int, tokens: int) -> ref.Call:
    shape = "flash" if config.num_attention_heads == 64 else "pro" if config.num_attention_heads == 128 else "nano"
    count = CALLS if tokens < 64 else 4
    return ref.make_call(shape, ratio, ((context - 1, 1),) * (tokens * count), pages=PAGES[ratio], device="cuda")


def attention(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Decode attention over window and picked (ratio 4) or all (ratio 128) entries."""
    for ratio, contexts in ((4, CONTEXTS[:1]), (128, CONTEXTS)):
        for context in contexts:
            call = _call(config, ratio, context, tokens)
            q, sink, picks, turn = ref.make_queries(call, picked=ratio == 4)
            calls: list[Callable[[], Any]] = [
                functools.partial(decode_attention.attend, q[part], _rows(call, part), call.layout, 0, call.pages,
                                  call.slots, sink, None if picks is None else picks[part], turn[part], call.most)
                for part in _parts(call, tokens, CALLS)
            ]  # fmt: skip
            yield (
                f"ratio={ratio} context={context}",
                calls,
                cost.attention_kernel(config, ratio, context, tokens),
                2,
                {},
            )


def index(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Index scores and choice together, then each by itself."""
    from pelagos.kernels.triton import indexer as kernel

    counts = torch.zeros(tokens, indexer.COUNTS, dtype=torch.int32, device="cuda")
    for context in CONTEXTS:
        call = _call(config, 4, context, tokens)
        shape = (len(call.rows.positions), config.index_n_heads, config.index_head_dim)
        index_q, weights = torch.randn(shape, device="cuda").bfloat16(), torch.rand(shape[:2], device="cuda")
        parts = _parts(call, tokens, CALLS)
        common = [(index_q[part], weights[part], _rows(call, part), call.layout, 0, call.pages) for part in parts]
        least = cost.indexer_kernel(config, context, tokens)
        calls = [functools.partial(indexer.pick, *each, counts, call.most) for each in common]
        yield f"context={context}", calls, least, 2, {}
        yield (
            f"scores context={context}",
            [functools.partial(kernel.score, *each, call.most) for each in common],
            least,
            1,
            {},
        )
        found = [(*kernel.score(*each, call.most), each[2].positions) for each in common]
        topk = config.index_topk
        picks = [functools.partial(kernel.choose, *each, 4, topk, counts) for each in found]
        yield f"choice context={context}", picks, cost.KernelCost(tokens * (call.most + topk) * 4, 0), 1, {}


def writes(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """A step's cache writes where a window ends with every row (the dearest step) and where none does."""
    for ratio in (0, 4, 128):
        for position in (1023, 1022):
            call = _call(config, ratio, position + 1, tokens)
            projected, weights, turn, entry_turn = ref.make_projected(call)
            calls = [
                functools.partial(cache_write.cache_write, projected[part], _rows(call, part), call.layout, 0,
                                  call.pages, call.slots, weights, turn[part],
                                  None if entry_turn is None else entry_turn[part])
                for part in _parts(call, tokens, CALLS)
            ]  # fmt: skip
            moved = tokens * (4 * sum(cache_write.widths(config, ratio)) + 2 * cost.row_bytes(config)[0])
            yield f"ratio={ratio} {'ends' if position == 1023 else 'none'}", calls, cost.KernelCost(moved, 0), 1, {}


def queries(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Norm and rope of queries with and without index queries."""
    for heads in (0, config.index_n_heads):
        shape = (config.num_attention_heads, config.head_dim, heads, config.index_head_dim if heads else 0)
        inputs = [query_ref.make_inputs(tokens, *shape, seed=i, device="cuda") for i in range(CALLS)]
        calls = [functools.partial(query.query, *each, *shape) for each in inputs]
        yield (
            f"index heads={heads}",
            calls,
            cost.KernelCost(tokens * 4 * (shape[0] * shape[1] + heads * shape[3]), 0),
            1,
            {},
        )


def picks(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Tokens picked from logits: the likeliest, drawn from all, and from what top-p or top-k leave."""
    settings = {"greedy": (0.0, 0, 1.0), "drawn": (1.0, 0, 1.0), "top_p": (1.0, 0, 0.95), "top_k": (1.0, 20, 1.0)}
    for name, setting in settings.items():
        made = [
            sampling_ref.make_inputs(tokens, config.vocab_size, 3.0, *setting, 0.0, seed=i, device="cuda")
            for i in range(CALLS)
        ]
        calls = [functools.partial(sampling.pick, *each) for each in made]
        yield name, calls, cost.KernelCost(4 * tokens * config.vocab_size, 0), 4, {}


MAKERS: dict[str, Callable[[ModelConfig, int], Iterator[Case]]] = {
    "attention": attention, "indexer": index, "cache_write": writes, "query": queries, "sampling": picks
}  # fmt: skip
