"""What `pelagos bench kernels` measures: each kernel at the true shapes, beside the floor this device allows.

First the device's ceilings, then kernels. A time is that of one call inside a CUDA graph that holds a round of calls
over operands larger together than the L2 cache, so every call finds its weights cold, as a decode step does. Floors are
cost.py's bytes at the measured rate or FLOPs at the measured rate, whichever takes longer. Weights are random.

Sequences of decode share a pool of pages larger than the L2 cache, in tables drawn at random; every call has rows,
windows and picks of its own, and contexts are full: each sequence is at its last position. A prompt's call is the last
chunk of a context; a BF16 FLOP counts as two of FP8 there, so that floors are those of the FP8 rate.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pelagos import cost
from pelagos.config import ModelConfig, preset
from pelagos.errors import ConfigError, KernelUnavailable
from pelagos.evals.commit import commit
from pelagos.kernels import (
    cache_write,
    decode_attention,
    fp4_experts,
    indexer,
    prefill_attention,
    prefill_cache,
    prefill_experts,
    prefill_indexer,
    prefill_products,
    query,
    sampling,
    site,
    skinny_gemm,
)
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.ref import decode_attention as attention_ref
from pelagos.kernels.ref import fp4_experts as experts_ref
from pelagos.kernels.ref import query as query_ref
from pelagos.kernels.ref import sampling as sampling_ref
from pelagos.kernels.ref import site as site_ref
from pelagos.kernels.ref import skinny_gemm as gemm_ref

ROUNDS = 9  # replays of which the median counts
COLD_BYTES = 512 << 20  # operands of one round
CONTEXTS = (8192, 131072, 1048576)
CALLS = 16  # a round of attention
PAGES = {0: 8, 4: 6000, 128: 200_000}  # of a pool, by ratio
Call = Callable[[], Any]


class Case(NamedTuple):
    """What one row is about: calls that go into one graph, the least they need, and how many launches each is."""

    name: str
    calls: Sequence[Call]
    least: cost.KernelCost
    launches: int = 1
    peer: Mapping[str, Sequence[Call]] = {}


class Ceilings(NamedTuple):
    """What this device does at best, measured: bytes and FLOPs a second, and a launch inside a graph in seconds."""

    copy: float
    read: float
    bf16: float
    fp8: float
    launch: float

    def floor(self, moved: float, flops: float) -> float:
        """Seconds that moving so many bytes or computing so many FP8 FLOPs takes at least."""
        return max(moved / self.read, flops / self.fp8)

    def figures(self, least: cost.KernelCost, took: float) -> dict[str, float]:
        """What a row says of something that took so many seconds, beside its floor."""
        floor = self.floor(least.moved, least.flops)
        return {
            "us": round(took * 1e6, 2), "gbps": round(least.moved / took / 1e9),
            "tflops": round(least.flops / took / 1e12, 1), "floor_us": round(floor * 1e6, 2),
            "floor_frac": round(floor / took, 3),
        }  # fmt: skip


def elapsed(call: Call) -> float:
    """Return the seconds the device takes for a call on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def seconds(calls: Sequence[Call], rounds: int = ROUNDS) -> float:
    """Return the seconds of one call: the median replay of a graph that holds all of them, over their number."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = [elapsed(graph.replay) for _ in range(rounds + 1)]
    return statistics.median(times[1:]) / len(calls)


def measure_ceilings(bench: str) -> tuple[Ceilings, dict[str, Any], dict[str, Any]]:
    """Measure copy and read rates, BF16 and FP8 matrix rates on random data, and the gap of a launch in a graph.

    Returns them, what every row of `bench` carries, and their own row. Raises KernelUnavailable without CUDA.
    """
    if not torch.cuda.is_available():
        raise KernelUnavailable(f"bench {bench}: no CUDA device here; kernels and models are timed where they run")
    operands = [torch.randn(1 << 29, device="cuda") for _ in range(2)]
    copy = 2 * 4 * operands[0].numel() / seconds([lambda: torch.mul(operands[0], 2.0, out=operands[1])])
    read = 4 * operands[0].numel() / seconds([lambda: operands[0].sum()])
    operands.clear()
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    flops = 2 * size**3
    bf16 = flops / seconds([lambda: a @ b] * 4)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")
    kind = functional.ScalingType.TensorWise
    fp8 = flops / seconds([lambda: functional.scaled_mm(a8, b8, one, kind, one, kind)] * 4)
    small = torch.zeros(1, device="cuda")
    found = Ceilings(copy, read, bf16, fp8, seconds([lambda: small.add_(1)] * 1000))
    head = {"device": torch.cuda.get_device_name(), "commit": commit(), "torch": torch.__version__}
    row = {
        "bench": "ceilings", "case": "measured", **head, "us": round(found.launch * 1e6, 3),
        "copy_gbps": round(copy / 1e9), "gbps": round(read / 1e9), "bf16_tflops": round(bf16 / 1e12),
        "tflops": round(fp8 / 1e12),
    }  # fmt: skip
    return found, head, row


def kernel_rows(
    shape: str, benches: Sequence[str] | None = None, tokens: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield one row a figure for the preset `shape`; KernelUnavailable without CUDA, ConfigError for bad names."""
    if odd := set(benches or ()) - MAKERS.keys():
        raise ConfigError(f"bench kernels: no kernel {min(odd)!r}; known: {', '.join(MAKERS)}")
    ceilings, head, row = measure_ceilings("kernels")
    yield row
    config = preset(shape)
    for bench in benches or MAKERS:
        make, counts = MAKERS[bench]
        for count in tokens or counts:
            for case in make(config, count):
                yield {
                    "bench": f"kernels.{bench}", "case": " ".join(filter(None, (shape, case.name, f"T={count}"))),
                    **head, **ceilings.figures(case.least, seconds(case.calls)), "launches": case.launches,
                    "peer": {name: round(seconds(each) * 1e6, 2) for name, each in case.peer.items()},
                    "weights": "random",
                }  # fmt: skip
                del case


def _site(config: ModelConfig, tokens: int) -> Iterator[Case]:
    least = cost.site_kernel(config, tokens)
    options = {"iters": config.hc_sinkhorn_iters, "eps": config.hc_eps, "norm_eps": config.rms_norm_eps}
    sets = _sets(least.moved, functools.partial(site_ref.make_inputs, tokens, config.hidden_size, device="cuda"))
    calls = [functools.partial(site.site, *each, **options) for each in sets]
    torch_calls = [functools.partial(site_ref.forward, *each, **options) for each in sets[:4]]
    yield Case("", calls, least, 2 if tokens <= 128 else 3, {"torch": torch_calls} if tokens < 1024 else {})


def _experts(config: ModelConfig, tokens: int) -> Iterator[Case]:
    count, picks = config.n_routed_experts, config.num_experts_per_tok
    shape = (count, picks, config.hidden_size, config.moe_intermediate_size)
    weights = experts_ref.make_inputs(1, *shape, device="cuda")[4:]
    generator = torch.Generator("cuda").manual_seed(1)

    def inputs(seed: int) -> tuple[Tensor, ...]:
        x = experts_ref.make_inputs(tokens, 1, 1, config.hidden_size, 128, seed=seed, device="cuda")
        chosen = torch.rand(tokens, count, generator=generator, device="cuda").topk(picks).indices.int()
        return *x[:2], chosen, torch.rand(tokens, picks, generator=generator, device="cuda"), *weights

    sets = [inputs(seed) for seed in range(8)]
    distinct = statistics.mean(len(each[2].unique()) for each in sets)
    calls = [functools.partial(fp4_experts.mixture, *each, config.swiglu_limit) for each in sets]
    yield Case(f"distinct={distinct:.1f}", calls, cost.experts_kernel(config, tokens, round(distinct)), 5)


def _products(config: ModelConfig, tokens: int) -> Iterator[Case]:
    c = config
    shapes = _product_shapes(c) | {
        "shared w2": (c.hidden_size, c.moe_intermediate_size, 1),
        "index wq_b": (c.index_n_heads * c.index_head_dim, c.q_lora_rank, 1),
    }
    arrived = torch.zeros(skinny_gemm.COUNTERS, dtype=torch.int32, device="cuda")
    for name, shape in shapes.items():
        outputs, depth, groups = shape
        least = cost.product_kernel(groups * outputs, depth, tokens, groups)
        sets = _sets(
            least.moved, lambda seed, shape=shape: gemm_ref.make_inputs(tokens, *shape, seed=seed, device="cuda")
        )
        calls = [functools.partial(skinny_gemm.product, *each, arrived, groups=groups) for each in sets]
        peer = {} if groups > 1 or depth % 512 else {"scaled_mm": [_block_scaled(*each) for each in sets]}
        yield Case(name, calls, least, 1, peer)


def _block_scaled(codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Call:
    """The library's product on the same operands: block scales in float32, rows padded to 4."""
    pad = -codes.shape[0] % 4
    x = functional.pad(codes, (0, 0, 0, pad)).view(torch.float8_e4m3fn)
    padded = functional.pad(scales, (0, 0, 0, pad), value=127)
    row_scales = padded.view(torch.float8_e8m0fnu).float().t().contiguous().t()
    w, w_scales = weight.view(torch.float8_e4m3fn).t(), weight_scales.view(torch.float8_e8m0fnu).float().t()
    kinds = functional.ScalingType
    return lambda: functional.scaled_mm(
        x, w, row_scales, kinds.BlockWise1x128, w_scales, kinds.BlockWise128x128, output_dtype=torch.bfloat16
    )


def _sets(size: float, make: Callable[..., tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Make operands until they fill COLD_BYTES, at most 64 times and at least twice."""
    return [make(seed=seed) for seed in range(max(2, min(64, int(COLD_BYTES // size))))]


def _parts(call: attention_ref.Call, tokens: int, count: int) -> list[slice]:
    return [slice(i * tokens, (i + 1) * tokens) for i in range(min(count, len(call.rows.positions) // tokens))]


def _rows(call: attention_ref.Call, part: slice) -> Any:
    rows = call.rows
    return rows._replace(**{name: getattr(rows, name)[part] for name in rows._fields if name != "table"})


def _shape(config: ModelConfig) -> str:
    """The preset's name."""
    return {64: "flash", 128: "pro"}.get(config.num_attention_heads, "nano")


def _call(config: ModelConfig, ratio: int, context: int, tokens: int) -> attention_ref.Call:
    spans = ((context - 1, 1),) * (tokens * (CALLS if tokens < 64 else 4))
    return attention_ref.make_call(_shape(config), ratio, spans, pages=PAGES[ratio], device="cuda")


def _decode_attention(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Decode attention over window and picked (ratio 4) or all (ratio 128) entries."""
    for ratio, contexts in ((4, CONTEXTS[:1]), (128, CONTEXTS)):
        for context in contexts:
            call = _call(config, ratio, context, tokens)
            q, sink, picks, turn = attention_ref.make_queries(call, picked=ratio == 4)
            calls: list[Call] = [
                functools.partial(decode_attention.attend, q[part], _rows(call, part), call.layout, 0, call.pages,
                                  call.slots, sink, None if picks is None else picks[part], turn[part], call.most)
                for part in _parts(call, tokens, CALLS)
            ]  # fmt: skip
            least = cost.attention_kernel(config, ratio, context, tokens)
            yield Case(f"ratio={ratio} context={context}", calls, least, 2)


def _decode_index(config: ModelConfig, tokens: int) -> Iterator[Case]:
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
        yield Case(f"context={context}", calls, least, 2)
        scores = [functools.partial(kernel.score, *each, call.most) for each in common]
        yield Case(f"scores context={context}", scores, least)
        found = [(*kernel.score(*each, call.most), each[2].positions) for each in common]
        topk = config.index_topk
        picks = [functools.partial(kernel.choose, *each, 4, topk, counts) for each in found]
        yield Case(f"choice context={context}", picks, cost.KernelCost(tokens * (call.most + topk) * 4, 0))


def _decode_writes(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """A step's cache writes where a window ends with every row (the dearest step) and where none does."""
    for ratio in (0, 4, 128):
        for position in (1023, 1022):
            call = _call(config, ratio, position + 1, tokens)
            projected, weights, turn, entry_turn = attention_ref.make_projected(call)
            calls = [
                functools.partial(cache_write.cache_write, projected[part], _rows(call, part), call.layout, 0,
                                  call.pages, call.slots, weights, turn[part],
                                  None if entry_turn is None else entry_turn[part])
                for part in _parts(call, tokens, CALLS)
            ]  # fmt: skip
            moved = tokens * (4 * sum(cache_write.widths(config, ratio)) + 2 * cost.row_bytes(config)[0])
            yield Case(f"ratio={ratio} {'ends' if position == 1023 else 'none'}", calls, cost.KernelCost(moved, 0))


def _queries(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Norm and rope of queries with and without index queries."""
    for heads in (0, config.index_n_heads):
        shape = (config.num_attention_heads, config.head_dim, heads, config.index_head_dim if heads else 0)
        inputs = [query_ref.make_inputs(tokens, *shape, seed=i, device="cuda") for i in range(CALLS)]
        calls = [functools.partial(query.query, *each, *shape) for each in inputs]
        moved = tokens * 4 * (shape[0] * shape[1] + heads * shape[3])
        yield Case(f"index heads={heads}", calls, cost.KernelCost(moved, 0))


def _picks(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Tokens picked from logits: the likeliest, drawn from all, and from what top-p or top-k leave."""
    settings = {"greedy": (0.0, 0, 1.0), "drawn": (1.0, 0, 1.0), "top_p": (1.0, 0, 0.95), "top_k": (1.0, 20, 1.0)}
    for name, setting in settings.items():
        given = (tokens, config.vocab_size, 3.0, *setting, 0.0)
        made = [sampling_ref.make_inputs(*given, seed=i, device="cuda") for i in range(CALLS)]
        calls = [functools.partial(sampling.pick, *each) for each in made]
        yield Case(name, calls, cost.KernelCost(4 * tokens * config.vocab_size, 0), 4)


def _prompt(config: ModelConfig, ratio: int, context: int, tokens: int) -> tuple[CacheLayout, prefill_cache.Prompt]:
    """The last tokens of a context as one call, and the layout of a model of two layers of one ratio."""
    ratios = (ratio, ratio or 4)
    cut = dataclasses.replace(config, num_hidden_layers=2, compress_ratios=ratios, num_nextn_predict_layers=0)
    layout = CacheLayout(cut, "released")
    span = Span(np.zeros(tokens, np.int64), context - tokens, 0, np.arange(layout.pages_for(context), dtype=np.int32))
    return layout, prefill_cache.prompt([span], layout, "cuda")


def _prefill_attention(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Attention of the last tokens of a context over their window and picked (ratio 4) or all entries."""
    heads, width = config.num_attention_heads, config.head_dim
    for ratio, contexts in ((0, CONTEXTS[:1]), (4, CONTEXTS[:2]), (128, CONTEXTS[:2])):
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
            yield Case(f"ratio={ratio} context={context}", [run] * 2, least)


def _prefill_index(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Scores of FP4 keys and the choice among them."""
    heads, width = config.index_n_heads, config.index_head_dim
    for context in CONTEXTS:
        _, call = _prompt(config, 4, context, tokens)
        entries = call.entries[4]
        codes = torch.randint(0, 120, (entries.total, width), dtype=torch.uint8, device="cuda")
        keys = prefill_cache.Keys(codes, codes, torch.ones(entries.total, device="cuda"))
        q = torch.randn(tokens, heads, width, device="cuda").bfloat16()
        weights = torch.randn(tokens, heads, device="cuda")
        run = functools.partial(prefill_indexer.pick, q, weights, call, keys, config.index_topk)
        scored = int(entries.seen.sum())
        least = cost.KernelCost(q.nbytes + codes.nbytes + 4 * tokens * config.index_topk, 2.0 * scored * heads * width)
        yield Case(f"context={context}", [run] * 2, least, 1 + 2 * -(-entries.most // 4096))


def _prefill_writes(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """What a chunk leaves in the cache and decodes to attend."""
    for ratio in (0, 4, 128):
        layout, call = _prompt(config, ratio, CONTEXTS[0], tokens)
        sizes = (layout.pages_for(CONTEXTS[0]), layout.page_bytes), (1, layout.slot_bytes)
        pools = [torch.randint(0, 120, size, dtype=torch.uint8, device="cuda") for size in sizes]
        made = attention_ref.make_call(_shape(config), ratio, ((CONTEXTS[0] - tokens, tokens),), device="cuda")
        projected, weights, turn, entry_turn = attention_ref.make_projected(made)
        columns = config.q_lora_rank + config.head_dim
        first, wide = projected[:, :columns].bfloat16(), projected[:, columns:].contiguous()
        inputs = (first, wide if ratio else None, call, layout, 0, *pools, weights, turn, entry_turn)
        run = functools.partial(prefill_cache.cache_write, *inputs)
        entries = call.entries[ratio].total if ratio else 0
        moved = tokens * 4 * wide.shape[1] * bool(ratio) + 2 * config.head_dim * (3 * tokens + 2 * entries)
        yield Case(f"ratio={ratio}", [run] * 2, cost.KernelCost(moved, 0), {0: 2, 4: 5}.get(ratio, 4))


def _prefill_experts(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """A layer's routed experts, routing even on average."""
    count, picks, width = config.n_routed_experts, config.num_experts_per_tok, config.hidden_size
    weights = experts_ref.make_inputs(1, count, picks, width, config.moe_intermediate_size, device="cuda")[4:]
    bases = (prefill_experts.base_bytes(*weights[:2]), prefill_experts.base_bytes(*weights[2:]))
    x = experts_ref.make_inputs(tokens, 1, 1, width, 128, device="cuda")
    chosen = torch.rand(tokens, count, device="cuda").topk(picks).indices.int()
    run = functools.partial(prefill_experts.mixture, *x[:2], chosen, torch.rand(tokens, picks, device="cuda"), *weights,
                            bases, config.swiglu_limit)  # fmt: skip
    yield Case("", [run] * 2, cost.experts_kernel(config, tokens, count), 8)


def _product_shapes(c: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """Return outputs, depth and groups of a layer's dense products that take a prompt's rows."""
    q = c.num_attention_heads * c.head_dim
    return {
        "wq_a+wkv": (c.q_lora_rank + c.head_dim, c.hidden_size, 1), "wq_b": (q, c.q_lora_rank, 1),
        "wo_a": (c.o_lora_rank, q // c.o_groups, c.o_groups), "wo_b": (c.hidden_size, c.o_groups * c.o_lora_rank, 1),
        "shared w13": (2 * c.moe_intermediate_size, c.hidden_size, 1),
    }  # fmt: skip


def _prefill_products(config: ModelConfig, tokens: int) -> Iterator[Case]:
    """Dense FP8 products, beside the library's best over operands of the same size with one scale."""
    for name, (outputs, depth, groups) in _product_shapes(config).items():
        inputs = gemm_ref.make_inputs(tokens, outputs, depth, groups, device="cuda")
        inputs = (*inputs[:3], prefill_products.factors(inputs[3]))
        run = functools.partial(prefill_products.product, *inputs, groups=groups)
        yield Case(name, [run] * 2, cost.product_kernel(groups * outputs, depth, tokens, groups), 1 + groups)


# By name: what makes the cases of so many tokens a call, and how many there are by default.
MAKERS: dict[str, tuple[Callable[[ModelConfig, int], Iterator[Case]], tuple[int, ...]]] = {
    "site": (_site, (1, 16, 64, 128, 1024, 8192)), "fp4_experts": (_experts, (1, 8, 32, 128)),
    "skinny_gemm": (_products, (1, 16, 32, 64)), "attention": (_decode_attention, (1, 4, 16, 32, 128)),
    "indexer": (_decode_index, (1, 8, 32)), "cache_write": (_decode_writes, (1, 16, 64)),
    "query": (_queries, (1, 16, 64)), "sampling": (_picks, (1, 16, 64)),
    "prefill_attention": (_prefill_attention, (4096, 8192)), "prefill_indexer": (_prefill_index, (4096, 8192)),
    "prefill_cache": (_prefill_writes, (4096, 8192)), "prefill_experts": (_prefill_experts, (4096, 8192)),
    "prefill_products": (_prefill_products, (4096, 8192)),
}  # fmt: skip
