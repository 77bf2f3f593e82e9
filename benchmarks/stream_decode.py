"""Decode steps of a model whose least used experts are in pinned host memory, on one CUDA device: a JSON line a trace.

    python benchmarks/stream_decode.py --shape flash --context 8K --trace 0,1

Random weights. Every layer is routed by a table of token ids drawn for the stated trace (exponent 0 is uniform, s > 0
Zipf with weight rank^-s within a layer), so that routes are known exactly; tokens are drawn uniformly. A step takes
from its call on the host to the end of its graph, exchanges of experts running beside it. With --prompt a row more a
trace: so many tokens from the start in one call of the prompts' kernels, the median of three. With --engine one row
more, of an engine over the same weights: a prompt in chunks, then so many drawn tokens up to the context; whoever
routes, random weights draw tokens nearly uniformly.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pelagos import cost
from pelagos.cli.options import parse_tokens
from pelagos.config import ModelConfig
from pelagos.engine import EngineOptions, SamplingParams, build_engine
from pelagos.errors import CapacityError, KernelUnavailable
from pelagos.evals.commit import commit
from pelagos.evals.engine_bench import kv_budget
from pelagos.evals.step_bench import cut_config, fill_caches
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.model.cuda_forward import CudaForward, step_bytes
from pelagos.model.cuda_prefill import prompt_bytes
from pelagos.model.cuda_weights import Weights
from pelagos.model.streaming import ExpertBlocks

IDS = 4096  # tokens that are drawn, each with routes of its own
STEPS = 200  # measured ones
SPARE_BYTES = 3 << 29  # left to graphs, libraries and the allocator's rounding
CHUNK = 512  # tokens of a prompt that the engine computes at once


def stream_rows(
    shape: str,
    *,
    layers: str | None,
    context: int,
    exponents: Sequence[float],
    warmup: int,
    fast_bytes: int | None = None,
    prompt: int = 0,
    engine: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield a row a trace, two with a `prompt`, one of an `engine`; `fast_bytes` of experts on the device, None for all
    that fit."""
    if not torch.cuda.is_available():
        raise KernelUnavailable("stream_decode: no CUDA device here; a model is only timed where it runs")
    config = cut_config(shape, layers)
    config = dataclasses.replace(config, num_hash_layers=config.num_hidden_layers)
    begun = time.perf_counter()
    forward, weights, blocks = _make(config, context, fast_bytes, max(prompt, CHUNK if engine else 0))
    head = {
        "bench": "stream", "device": torch.cuda.get_device_name(), "commit": commit(), "torch": torch.__version__,
        "weights": "random", "made_s": round(time.perf_counter() - begun, 1), "blocks": len(blocks.cache.place),
        "fast_blocks": len(blocks.fast), "block_bytes": blocks.block_bytes,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    pages = np.arange(len(forward.pages), dtype=np.int32)
    for exponent in exponents:
        for layer in weights.layers:
            routes = draw_routes(
                rng, IDS, experts=config.n_routed_experts, picks=config.num_experts_per_tok, exponent=exponent
            )
            assert layer.table is not None
            layer.table[:IDS].copy_(torch.from_numpy(routes))
        times = []
        for step in range(warmup + STEPS):
            if step == warmup:
                cache = blocks.cache
                cache.hits = cache.misses = cache.tokens = blocks.moved = 0
            span = Span(rng.integers(0, IDS, 1), context - 2, 0, pages, decode=True)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for staged in forward.launch([span]):
                assert staged.call.chosen is not None
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        took, report = statistics.mean(times[warmup:]), blocks.report()
        trace = "uniform" if exponent == 0 else f"zipf {exponent:g}"
        yield head | {
            "case": f"{shape} layers={config.num_hidden_layers} context={context} batch=1 trace={trace}",
            "us": round(took * 1e6, 1), "median_us": round(statistics.median(times[warmup:]) * 1e6, 1),
            "tok_s": round(1 / took, 1), "warmup": warmup, "steps": STEPS, **report,
            "host_gbps": round(report["bytes_per_token"] / took / 1e9, 1),
            "reserved_bytes": torch.cuda.memory_reserved(), "free_bytes": torch.cuda.mem_get_info()[0],
        }  # fmt: skip
        if prompt:
            outside, times = int((blocks.home >= 0).sum()) * blocks.block_bytes, []
            for _ in range(4):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                forward.prefill.run([Span(rng.integers(0, IDS, prompt), 0, 0, pages)])
                torch.cuda.synchronize()
                times.append(time.perf_counter() - begun)
            took = statistics.median(times[1:])
            yield head | {
                "case": f"{shape} layers={config.num_hidden_layers} prompt={prompt} trace={trace}",
                "us": round(took * 1e6, 1), "tok_s": round(prompt / took, 1), "outside_bytes": outside,
            }  # fmt: skip
    if engine:
        forward = staged = None  # and what they hold
        torch.cuda.empty_cache()
        yield head | engine_row(weights, blocks, context, engine)


def engine_row(weights: Weights, blocks: ExpertBlocks, context: int, tokens: int) -> dict[str, Any]:
    """One request up to `context` through an engine."""
    begun = time.perf_counter()
    engine = build_engine(weights, None, EngineOptions(
        chunk_tokens=CHUNK, max_requests=1, kv_bytes=kv_budget(weights.config, 1, context, layout="released"),
        prefix_cache=False, preemption="recompute", speculation=False,
    ))  # fmt: skip
    made, rng, cache = time.perf_counter() - begun, np.random.default_rng(0), blocks.cache
    ids = rng.integers(3, IDS, context - tokens - 1).tolist()
    begun = time.perf_counter()
    stream = engine.submit(ids, SamplingParams(max_tokens=tokens, seed=0, ignore_eos=True))
    times = []
    for _ in stream:
        times.append(time.perf_counter())
        if len(times) == tokens // 4:
            cache.hits = cache.misses = cache.tokens = blocks.moved = 0
    engine.close()
    took = statistics.mean(np.diff(times[tokens // 4 - 1 :]).tolist())
    return {
        "case": f"{len(weights.layers)} layers context={context} batch=1 engine", "engine_s": round(made, 1),
        "first_token_s": round(times[0] - begun, 2), "us": round(took * 1e6, 1), "tok_s": round(1 / took, 1),
        "tokens": tokens, **blocks.report(),
    }  # fmt: skip


def draw_routes(rng: np.random.Generator, tokens: int, *, experts: int, picks: int, exponent: float) -> np.ndarray:
    """Draw (tokens, picks) int64 distinct experts each, the one of rank r with weight r^-exponent: 0 is uniform.

    Ranks are a permutation drawn first.
    """
    weight = -exponent * np.log1p(rng.permutation(experts))
    keys = weight + rng.gumbel(size=(tokens, experts))
    return np.argpartition(-keys, picks - 1, 1)[:, :picks]


def _make(
    config: ModelConfig, context: int, fast_bytes: int | None, prompt: int
) -> tuple[CudaForward, Weights, ExpertBlocks]:
    """Return a forward over random weights and caches of one sequence, with as many experts on the device as fit."""
    layout, device = CacheLayout(config, "released", 0), torch.device("cuda")
    torch.zeros(1, device=device)
    routed = sum(
        size
        for group in cost.inventory(config)
        if group.part == "routed_experts"
        for _, size in group.stored().values()
    )
    others = cost.weights_bytes(config, draft=False) - routed + cost.sequence_bytes(config, context)
    room = torch.cuda.mem_get_info()[0] - others - step_bytes(layout, 1, context) - SPARE_BYTES
    room -= prompt_bytes(layout, prompt, context) if prompt else 0
    fast = room if fast_bytes is None else fast_bytes
    if not 0 < fast <= room:
        raise CapacityError(f"{fast:,} bytes of experts on the device: there is room for {max(0, room):,}")
    blocks = ExpertBlocks(config, device, fast)
    weights = Weights(config, device, blocks).fill_random()
    pages = torch.zeros((layout.pages_for(context), layout.page_bytes), dtype=torch.uint8, device=device)
    slots = torch.zeros((1, layout.slot_bytes), dtype=torch.uint8, device=device)
    fill_caches(layout, pages, slots)
    torch.cuda.empty_cache()
    return CudaForward(weights, layout, pages, slots, positions=context), weights, blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="flash")
    parser.add_argument("--layers", help="the first N layers, or A:B")
    parser.add_argument("--context", default="8K")
    parser.add_argument("--trace", default="0,1")
    parser.add_argument("--warmup", type=int, default=1000, help="steps before the measured ones")
    parser.add_argument("--prompt", default="0", help="tokens of a prompt that is timed too")
    parser.add_argument("--engine", type=int, default=0, metavar="TOKENS", help="that an engine generates")
    parser.add_argument("--fast-bytes", help="of experts on the device, such as 1024M (default: what fits)")
    args = parser.parse_args()
    rows = stream_rows(
        args.shape, layers=args.layers, context=parse_tokens(args.context, "context"), warmup=args.warmup,
        exponents=[float(each) for each in args.trace.split(",")], prompt=int(parse_tokens(args.prompt, "prompt")),
        engine=args.engine,
        fast_bytes=None if args.fast_bytes is None else parse_tokens(args.fast_bytes, "fast-bytes"),
    )  # fmt: skip
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
