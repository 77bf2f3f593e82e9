"""What `pelagos bench kernels` measures: each kernel at the true shapes, beside the floor this device allows.

First the device's ceilings, then kernels. A time is that of one call inside a CUDA graph that holds a round of calls
over operands larger together than the L2 cache, so every call finds its weights cold, as a decode step does. Floors are
cost.py's bytes at the measured rate or FLOPs at the measured rate, whichever takes longer. Weights are random.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pelagos import cost
from pelagos.config import ModelConfig, preset
from pelagos.errors import ConfigError, KernelUnavailable
from pelagos.evals import attention_bench, prefill_bench
from pelagos.evals.commit import commit
from pelagos.kernels import fp4_experts, site, skinny_gemm
from pelagos.kernels.ref import fp4_experts as experts_ref
from pelagos.kernels.ref import site as site_ref
from pelagos.kernels.ref import skinny_gemm as gemm_ref

ROUNDS = 9  # replays of which the median counts
COLD_BYTES = 512 << 20  # operands of one round
BENCHES = ("site", "fp4_experts", "skinny_gemm", *attention_bench.MAKERS, *prefill_bench.MAKERS)
TOKENS = {"site": (1, 16, 64, 128, 1024, 8192), "fp4_experts": (1, 8, 32, 128), "skinny_gemm": (1, 16, 32, 64),
          **attention_bench.TOKENS, **prefill_bench.TOKENS}  # fmt: skip

Call = Callable[[], Any]


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
        times = []
        for _ in range(rounds + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:]) / len(calls)


def measure_ceilings() -> Ceilings:
    """Measure copy and read rates, BF16 and FP8 matrix rates on random data, and the gap of a launch in a graph."""
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
    return Ceilings(copy, read, bf16, fp8, seconds([lambda: small.add_(1)] * 1000))


def kernel_rows(
    shape: str, benches: Sequence[str] = BENCHES, tokens: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield one row a figure for the preset `shape`; KernelUnavailable without CUDA, ConfigError for bad names."""
    if not torch.cuda.is_available():
        raise KernelUnavailable("bench kernels: no CUDA device here; kernels are only timed where they run")
    for bench in benches:
        if bench not in _MAKERS:
            raise ConfigError(f"bench kernels: no kernel {bench!r}; known: {', '.join(_MAKERS)}")
    ceilings = measure_ceilings()
    head = {"device": torch.cuda.get_device_name(), "commit": commit(), "torch": torch.__version__}
    yield {
        "bench": "ceilings", "case": "measured", **head, "us": round(ceilings.launch * 1e6, 3),
        "copy_gbps": round(ceilings.copy / 1e9), "gbps": round(ceilings.read / 1e9),
        "bf16_tflops": round(ceilings.bf16 / 1e12), "tflops": round(ceilings.fp8 / 1e12),
    }  # fmt: skip
    config = preset(shape)
    for bench in benches:
        for count in tokens or TOKENS[bench]:
            for case, calls, least, launches, peer in _MAKERS[bench](config, count):
                took = seconds(calls)
                yield {
                    "bench": f"kernels.{bench}", "case": " ".join(filter(None, (shape, case, f"T={count}"))), **head,
                    "us": round(took * 1e6, 2),
                    "gbps": round(least.moved / took / 1e9), "tflops": round(least.flops / took / 1e12, 1),
                    "floor_us": round(ceilings.floor(least.moved, least.flops) * 1e6, 2),
                    "floor_frac": round(ceilings.floor(least.moved, least.flops) / took, 3), "launches": launches,
                    "peer": {name: round(seconds(each) * 1e6, 2) for name, each in peer.items()}, "weights": "random",
                }  # fmt: skip
                del calls, peer


Case = tuple[str, list[Call], cost.KernelCost, int, dict[str, list[Call]]]


def _site(config: ModelConfig, tokens: int) -> Iterator[Case]:
    least = cost.site_kernel(config, tokens)
    options = {"iters": config.hc_sinkhorn_iters, "eps": config.hc_eps, "norm_eps": config.rms_norm_eps}
    sets = _sets(least.moved, lambda seed: site_ref.make_inputs(tokens, config.hidden_size, seed=seed, device="cuda"))
    calls = [functools.partial(site.site, *each, **options) for each in sets]
    torch_calls = [functools.partial(site_ref.forward, *each, **options) for each in sets[:4]]
    yield "", calls, least, 2 if tokens <= 128 else 3, {"torch": torch_calls} if tokens < 1024 else {}


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
    yield f"distinct={distinct:.1f}", calls, cost.experts_kernel(config, tokens, round(distinct)), 5, {}


def _products(config: ModelConfig, tokens: int) -> Iterator[Case]:
    c, q = config, config.num_attention_heads * config.head_dim
    shapes = {
        "wq_a+wkv": (c.q_lora_rank + c.head_dim, c.hidden_size, 1), "wq_b": (q, c.q_lora_rank, 1),
        "wo_a": (c.o_lora_rank, q // c.o_groups, c.o_groups), "wo_b": (c.hidden_size, c.o_groups * c.o_lora_rank, 1),
        "shared w13": (2 * c.moe_intermediate_size, c.hidden_size, 1),
        "shared w2": (c.hidden_size, c.moe_intermediate_size, 1),
        "index wq_b": (c.index_n_heads * c.index_head_dim, c.q_lora_rank, 1),
    }  # fmt: skip
    arrived = torch.zeros(skinny_gemm.COUNTERS, dtype=torch.int32, device="cuda")
    for name, shape in shapes.items():
        outputs, depth, groups = shape
        least = cost.product_kernel(groups * outputs, depth, tokens, groups)
        sets = _sets(least.moved, functools.partial(_product_inputs, tokens, shape))
        calls = [functools.partial(skinny_gemm.product, *each, arrived, groups=groups) for each in sets]
        peer = {} if groups > 1 or depth % 512 else {"scaled_mm": [_block_scaled(*each) for each in sets]}
        yield name, calls, least, 1, peer


def _product_inputs(tokens: int, shape: tuple[int, int, int], seed: int) -> tuple[Tensor, ...]:
    return gemm_ref.make_inputs(tokens, *shape, seed=seed, device="cuda")


def _block_scaled(codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Call:
    """The library's product on the same operands: block scales in float32, rows padded to 4."""
    pad = -codes.shape[0] % 4
    x = functional.pad(codes, (0, 0, 0, pad)).view(torch.float8_e4m3fn)
    row_scales = (
        functional.pad(scales, (0, 0, 0, pad), value=127).view(torch.float8_e8m0fnu).float().t().contiguous().t()
    )
    w, w_scales = weight.view(torch.float8_e4m3fn).t(), weight_scales.view(torch.float8_e8m0fnu).float().t()
    kinds = functional.ScalingType
    return lambda: functional.scaled_mm(
        x, w, row_scales, kinds.BlockWise1x128, w_scales, kinds.BlockWise128x128, output_dtype=torch.bfloat16
    )


def _sets(size: float, make: Callable[[int], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Make operands until they fill COLD_BYTES, at most 64 times and at least twice."""
    return [make(seed) for seed in range(max(2, min(64, int(COLD_BYTES // size))))]


_MAKERS = {"site": _site, "fp4_experts": _experts, "skinny_gemm": _products, **attention_bench.MAKERS,
           **prefill_bench.MAKERS}  # fmt: skip
