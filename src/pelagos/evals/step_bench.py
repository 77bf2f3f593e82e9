"""What `pelagos bench decode` and `prefill` measure: random models of true shape, beside their floor.

Weights are random bytes made on the device, caches random bytes of valid codes; every row of a step is a sequence of
its own at the context's last position. The time of a step is that of its graphs, replayed on the same rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pelagos import cost
from pelagos.config import ModelConfig, preset
from pelagos.errors import CapacityError, ConfigError
from pelagos.evals.kernel_bench import Ceilings, elapsed, measure_ceilings
from pelagos.kernels.layout import CacheLayout, Draw, Span
from pelagos.kernels.rows import LayerRows, Rows
from pelagos.model.cuda_forward import BUCKETS, PROMPT_TOKENS, CudaForward, step_bytes
from pelagos.model.cuda_prefill import prompt_bytes
from pelagos.model.cuda_weights import Weights

ROUNDS = 12  # steps of which the median counts
SPARE_BYTES = 1 << 30  # left to the driver, graphs and libraries
_CHUNK = 512  # units of a pool filled at once
_SCALE_BYTE = 120  # of random cache rows: values around 1


def cut_config(shape: str, layers: str | None) -> ModelConfig:
    """Return a preset without its draft layer, cut to its first N layers ("39") or to layers A to B - 1 ("2:6")."""
    config = preset(shape)
    most = config.num_hidden_layers
    found = re.fullmatch(r"(?:(\d{1,4}):)?(\d{1,4})", layers or str(most))
    begin, end = (int(found[1] or 0), int(found[2])) if found else (0, 0)
    if not begin < end <= most:
        raise ConfigError(f"layers={layers}: {shape} has {most}, expected such as 4 or 2:6")
    return dataclasses.replace(
        config, num_hidden_layers=end - begin, compress_ratios=config.compress_ratios[begin:end],
        num_nextn_predict_layers=0, num_hash_layers=max(0, min(end, config.num_hash_layers) - begin),
    )  # fmt: skip


def step_rows(
    bench: str, shape: str, *, layers: str | None, contexts: Sequence[int], batches: Sequence[int] = (1,)
) -> Iterator[dict[str, Any]]:
    """Yield the ceilings, then one row a context and batch; a plan that does not fit says so in its row.

    `bench` is "decode" or "prefill". Raises KernelUnavailable without CUDA, ConfigError for bad values.
    """
    measure = _decode if bench == "decode" else _prefill
    config = cut_config(shape, layers)
    ceilings, head, first = measure_ceilings(bench)
    torch.cuda.empty_cache()
    yield first
    begun = time.perf_counter()
    weights = Weights(config, torch.device("cuda")).fill_random()
    torch.cuda.synchronize()
    made = round(time.perf_counter() - begun, 2)
    for context, batch in itertools.product(contexts, batches):
        case = f"{shape} layers={config.num_hidden_layers} context={context} batch={batch}"
        row = {"bench": bench, "case": case, **head, "weights": "random", "made_s": made}
        try:
            yield row | measure(weights, ceilings, context, batch)
        except CapacityError as error:
            yield row | {"refused": str(error)}
        torch.cuda.empty_cache()


def _forward(weights: Weights, context: int, batch: int, extra: int) -> tuple[CudaForward, np.ndarray, int]:
    """Return a forward over filled caches, each sequence's pages, and the planned bytes; CapacityError if too many."""
    config, layout = weights.config, CacheLayout(weights.config, "released", 0)
    pages_each = layout.pages_for(context)
    planned = cost.weights_bytes(config, draft=False) + batch * cost.sequence_bytes(config, context) + extra
    total = torch.cuda.get_device_properties(0).total_memory - SPARE_BYTES
    if planned > total:
        raise CapacityError(f"{batch} x {context:,} positions take {planned:,} bytes, there are {total:,}")
    pages = torch.zeros((batch * pages_each, layout.page_bytes), dtype=torch.uint8, device="cuda")
    slots = torch.zeros((batch, layout.slot_bytes), dtype=torch.uint8, device="cuda")
    fill_caches(layout, pages, slots)
    tables = np.random.default_rng(0).permutation(batch * pages_each).astype(np.int32).reshape(batch, -1)
    return CudaForward(weights, layout, pages, slots, positions=context), tables, planned


def _decode(weights: Weights, ceilings: Ceilings, context: int, batch: int) -> dict[str, Any]:
    """Time four steps in a row, of which one ends a window of CSA and none one of HCA; `us` is their mean."""
    config, rows = weights.config, min(batch, BUCKETS[-1])
    extra = step_bytes(CacheLayout(config, "released", 0), rows, context)
    forward, tables, planned = _forward(weights, context, batch, extra)

    def parts(position: int) -> list[list[Span]]:
        spans = [Span(np.array([7 + i]), position, i, tables[i], decode=True, draws=(Draw(),)) for i in range(batch)]
        return [spans[i : i + rows] for i in range(0, batch, rows)]

    for part in parts(context - 2):
        forward.forward(part)
    reserved = torch.cuda.memory_reserved()
    times = {
        position: statistics.median(sum(_replayed(forward, part) for part in parts(position)) for _ in range(ROUNDS))
        for position in range(context - 5, context)
    }
    walls = []
    for _ in range(5):
        begun = time.perf_counter()
        for part in parts(context - 2):
            forward.forward(part)
        walls.append(time.perf_counter() - begun)
    least, took = cost.decode_step(config, context, batch), statistics.mean(list(times.values())[:4])
    calls = len(parts(context - 2))
    kernels = profiled(forward, parts(context - 2)[0])
    launches = sum(count for count, _ in kernels.values())
    return ceilings.figures(least, took) | {
        "steps_us": [round(each * 1e6, 1) for each in times.values()], "tok_s": round(batch / took, 1),
        "wall_us": round(statistics.median(walls) * 1e6, 1), "launches": launches * calls, "calls": calls,
        "launches_per_layer": round(launches / config.num_hidden_layers, 2),
        "planned_bytes": planned, "reserved_bytes": reserved, "reserved_frac": round(reserved / planned, 4),
        "kernels": kernels, "peer": {},
    }  # fmt: skip


def _prefill(weights: Weights, ceilings: Ceilings, context: int, batch: int) -> dict[str, Any]:
    """Time the first, the middle and the last chunk of a prompt; `us` is the whole prompt's, by Simpson's rule."""
    config, chunk = weights.config, min(context, PROMPT_TOKENS)
    extra = prompt_bytes(CacheLayout(config, "released", 0), chunk, context)
    forward, tables, planned = _forward(weights, context, batch, extra)
    ids, before = np.random.default_rng(0).integers(0, config.vocab_size, chunk), torch.cuda.memory_allocated()
    starts = sorted({0, (context - chunk) // 2 // chunk * chunk, context - chunk})
    took: list[float] = []
    for start in starts:
        span = Span(ids, start, 0, tables[0])
        took.append(min(elapsed(lambda span=span: forward.prefill.run([span])) for _ in range(3)))
    whole = context / chunk * (took[0] if len(took) < 3 else (took[0] + 4 * took[1] + took[2]) / 6)
    moved = cost.decode_step(config, 1, 1 << 16).moved * context / chunk
    flops = context * cost.weighted_flops(config, max(1, context // 2), "index_x1")  # BF16 attention counts twice
    return ceilings.figures(cost.KernelCost(moved, flops), whole) | {
        "chunk_us": {start: round(each * 1e6, 1) for start, each in zip(starts, took, strict=True)},
        "tok_s": round(context / whole), "chunk": chunk, "planned_bytes": planned,
        "transient_bytes": torch.cuda.max_memory_allocated() - before, "peer": {},
    }  # fmt: skip


def _replayed(forward: CudaForward, spans: Sequence[Span]) -> float:
    return [elapsed(staged.call.run) for staged in forward.launch(spans)][-1]


def profiled(forward: CudaForward, spans: Sequence[Span]) -> dict[str, tuple[int, float]]:
    """Return, of one call, each kernel's launches and microseconds, the longest first; kernels may overlap."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for staged in forward.launch(spans):
            staged.call.run()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA" and not event.name.startswith("Mem"):
            count, us = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, us + event.device_time
    # The call ran twice: once when it was staged.
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return {name[:60]: (count // 2, round(us / 2, 1)) for name, (count, us) in ordered}


def fill_caches(layout: CacheLayout, pages: Tensor, slots: Tensor, seed: int = 0) -> None:
    """Overwrite both pools with random rows of valid codes, values around 1."""
    generator = torch.Generator(pages.device).manual_seed(seed)
    nope = layout.config.head_dim - layout.config.qk_rope_head_dim
    for index in range(len(layout.layers)):
        rows = LayerRows(layout, index, pages, slots)
        for main in (rows.window, rows.main):
            if main is not None:
                for values, scales in _chunks(main):
                    values[..., :nope].random_(0, 256, generator=generator).bitwise_and_(0xF7)  # never 0x7F: NaN
                    values[..., nope:].view(torch.bfloat16).normal_(generator=generator)
                    scales[..., : -(-nope // 64)] = _SCALE_BYTE
        if rows.index is not None:
            for values, scales in _chunks(rows.index):
                values.random_(0, 256, generator=generator)
                scales.fill_(126)
        for tail in (rows.main_tail, rows.index_tail):
            for ring in tail or ():
                ring.parts[0].rows.normal_(generator=generator)


def _chunks(rows: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    values, scales = (part.rows for part in rows.parts)
    for begin in range(0, len(values), _CHUNK):
        yield values[begin : begin + _CHUNK], scales[begin : begin + _CHUNK]
