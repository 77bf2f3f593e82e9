"""Prefixes brought back from host memory and from the disk: bytes a second beside the bus and the disk, bits, and what
it costs those who decode meanwhile. JSON rows.

    python -m benchmarks.kv_tiers --shape flash --device cuda --context 128K --batch 8 [--copies]
    python -m benchmarks.kv_tiers --model nano --device cuda

With --shape random weights of that preset, all layers over one layer's experts, released mode, on CUDA; `tiny` is the
small model on a CPU; with --copies no prompt is computed: pages are random bytes, and decode steps run beside them. The
bus is a plain copy of the same bytes out of locked memory; the disk, direct reads of the same files by as many threads
as the cache has, the system's copies dropped before. With --model the bits alone: prompts continued from each tier and
after having been parked, against cold runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pelagos.cli.options import parse_tokens
from pelagos.config import tiny
from pelagos.engine import EngineOptions, LocalEngine, SamplingParams, Stream, build_engine
from pelagos.engine.disk import _MAX_READERS, DiskCache
from pelagos.engine.pages import PagePool
from pelagos.engine.runner import Pools
from pelagos.engine.tiers import Tiers, pinned
from pelagos.evals.commit import commit
from pelagos.evals.engine_bench import forget_files, kv_budget
from pelagos.evals.step_bench import cut_config, fill_caches
from pelagos.kernels.layout import CacheLayout, Draw, Span
from pelagos.load import load_served
from pelagos.model import Transformer
from pelagos.model.cuda_forward import CudaForward
from pelagos.model.cuda_weights import Fp8, Weights
from pelagos.train.init import initialise

PART_BYTES = 8 << 20  # of a direct read
POLL_S = 5e-5
SHORT, DECODED = 1000, 8192  # tokens of those who decode, in an engine and without one
Row = dict[str, Any]


class OneLayersExperts(Weights):
    """Weights in which all layers have the routed experts of the first: the caches are what counts here."""

    _first: tuple[Fp8, Fp8] | None = None

    def _routed(self, prefix: str, layer: int) -> tuple[Fp8, Fp8]:
        found = OneLayersExperts._first = OneLayersExperts._first or super()._routed(prefix, layer)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--copies", action="store_true", help="no prompts: the copies, and decode steps beside them")
    parser.add_argument("--layers", help="the first N layers, or A:B")
    parser.add_argument("--model", help="compare bits with this model instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", default="4K")
    parser.add_argument("--batch", type=int, default=4, help="sequences that decode beside it")
    parser.add_argument("--steps", type=int, default=100, help="steps with copies under way, and without")
    parser.add_argument("--dir", help="where the disk tier lies (default: the system's place for temporary files)")
    args = parser.parse_args()
    context, device = parse_tokens(args.context, "context"), torch.device(args.device)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        rows = (
            bits_rows(args.model, args.device, Path(folder)) if args.model
            else copy_rows(args.shape, device, context, args.batch, args.steps, Path(folder)) if args.copies
            else rate_rows(args.shape, args.layers, context, args.batch, args.steps, Path(folder))
        )  # fmt: skip
        for row in rows:
            print(json.dumps(row), flush=True)


def rate_rows(shape: str, layers: str | None, context: int, batch: int, steps: int, folder: Path) -> Iterator[Row]:
    """Yield a row a figure for one prefix of `context` tokens."""
    if shape == "tiny":
        model: Transformer | Weights = Transformer(tiny()).eval()
        initialise(model, 0)
        layout = "float32"
    else:
        weights = OneLayersExperts(cut_config(shape, layers), torch.device("cuda"))
        model, layout = weights.fill_random(), "released"
    room = kv_budget(model.config, 1, 9 * context // 4, layout=layout)
    room += kv_budget(model.config, batch + 1, 2 * SHORT + 8 * steps, layout=layout)
    engine = build_engine(model, None, EngineOptions(
        chunk_tokens=min(8192, context), max_requests=batch + 2, kv_bytes=room, host_kv_bytes=2 * room,
        disk_dir=folder / "cache", disk_bytes=4 * room, speculation=False, threaded=False,
    ))  # fmt: skip
    tiers = engine._tiers
    assert tiers is not None
    head = {"bench": "kv_tiers", "device": name_of(engine._pools.pages.device), "commit": commit(), "case": shape,
            "torch": torch.__version__, "context": context, "batch": batch, "weights": "random"}  # fmt: skip
    draw = np.random.default_rng(0)
    ids = draw.integers(3, model.config.vocab_size, context).tolist()
    with torch.inference_mode():
        begun = time.perf_counter()
        cold = serve(engine, [*ids, 5], 4)
        yield head | {"what": "cold", "first_token_s": round(cold.times[0] - begun, 3)}
        settle(engine)
        keys = engine._prefix.chain("", ids).keys
        size = len(keys) * engine._layout.page_bytes
        head |= {"bytes": size, "planned_host_bytes": engine.plan.host_bytes, "pages": len(keys)}
        bus = bus_rate(engine._pools.pages.device, size)
        for source in ("host", "ssd"):
            least, direct = bus, None
            if source == "ssd":
                yield head | decode_row(engine, keys, batch, steps, folder, draw)
                least, direct = disk_rate(folder, size)
            restores = [restored(tiers, engine._pool, keys, source, folder)[0] for _ in range(5)]
            rate = size / statistics.median(restores)
            evict(tiers, engine._pool, keys, source, folder)
            begun = time.perf_counter()
            again = serve(engine, [*ids, 5], 4)
            yield head | {
                "what": source, "restore_ms": [round(1e3 * each, 2) for each in restores],
                "gb_s": round(rate / 1e9, 2), "limit_gb_s": round(least / 1e9, 2), "of_limit": round(rate / least, 3),
                "direct_reads": direct,
                "first_token_s": round(again.times[0] - begun, 3), "cached": again.stream.cached_tokens,
                "same_bits": again.bits == cold.bits,
            }  # fmt: skip
    engine.close()
    left = engine.stats()
    yield head | {"what": "end", "in_use": (left.pages_in_use, left.slots_in_use, left.host["in_use"]),
                  "host": left.host, "damaged": left.disk["damaged"]}  # fmt: skip


@dataclasses.dataclass
class Served:
    """A request that has ended: when its steps came, and their bits."""

    stream: Stream
    times: list[float]
    bits: list[tuple[int, float]]


def serve(engine: LocalEngine, ids: list[int], tokens: int, **changes: Any) -> Served:
    """Run one request to its end by hand."""
    times: list[float] = []
    options: dict[str, Any] = {"temperature": 0} | changes
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=True, **options)
    stream = engine.submit(ids, params, on_step=lambda: times.append(time.perf_counter()))
    while stream.finish_reason is None:
        engine.step()
    return Served(stream, times, [(step.token_id, step.logprob) for step in stream])


def settle(engine: LocalEngine) -> None:
    """Wait until what is to be copied or written is."""
    engine._tiers.drain()
    if engine._disk is not None:
        engine._disk.flush(60)


def evict(tiers: Tiers, pool: PagePool, keys: Sequence[bytes], source: str, folder: Path) -> None:
    """Leave a prefix in one tier alone, having had it copied to it."""
    tiers.drain()
    while tiers.clean(pool, lambda: None):
        tiers.drain()
    for each in (pool, tiers.index) if source == "ssd" else (pool,):
        pages = each.alloc(each.free + each.cached)
        assert pages is not None
        each.release(sorted(pages, reverse=True))
    if source == "ssd":
        forget_files(folder)
    assert tiers.known_pages("", keys) == len(keys)


@dataclasses.dataclass
class Coming:
    """A prefix on its way up: the pages that it gets, and how many have come once that is known."""

    pages: list[int]
    came: int | None = None


def restored(tiers: Tiers, pool: PagePool, keys: Sequence[bytes], source: str, folder: Path) -> tuple[float, list[int]]:
    """Seconds to bring a prefix back, from the call to the last byte in its page, and its pages, let go of."""
    evict(tiers, pool, keys, source, folder)
    begun = time.perf_counter()
    coming = begin(tiers, pool, keys)
    while coming.came is None:
        time.sleep(POLL_S)
        tiers.poll()
    took = time.perf_counter() - begun
    finish(pool, coming)
    return took, coming.pages


def begin(tiers: Tiers, pool: PagePool, keys: Sequence[bytes]) -> Coming:
    """Start to bring a prefix into pages of its own, as a request would."""
    pages = pool.alloc(len(keys))
    assert pages is not None
    coming = Coming(sorted(pages))
    tiers.read("", keys, None, coming.pages, lambda came, _: setattr(coming, "came", came))
    return coming


def finish(pool: PagePool, coming: Coming) -> None:
    """Let go of the pages again, and check that all came."""
    assert coming.came == len(coming.pages)
    pool.release(coming.pages)


def name_of(device: torch.device) -> str:
    """What the rows call a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def bus_rate(device: torch.device, size: int) -> float:
    """Bytes a second of one plain copy of so many bytes from the host."""
    source, into = pinned(1, size, device), torch.empty((1, size), dtype=torch.uint8, device=device)
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        into.copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return size / statistics.median(times[1:])


def disk_rate(folder: Path, size: int) -> tuple[float, bool]:
    """Bytes a second of reads of the cache's files, about `size` of them, best of three; whether they were direct."""
    files = sorted(folder.rglob("*.pages*"), key=lambda path: path.stat().st_size, reverse=True)
    parts: list[tuple[Path, int]] = []
    for path in files:
        parts += [(path, at) for at in range(0, path.stat().st_size, PART_BYTES)]
    parts = parts[: -(-size // PART_BYTES)]
    threads = max(1, min(_MAX_READERS, (os.cpu_count() or 1) // 2))
    buffers = [mmap.mmap(-1, PART_BYTES) for _ in range(threads)]
    for buffer in buffers:
        buffer.write(bytes(PART_BYTES))

    direct = True

    def read(which: int) -> int:
        nonlocal direct
        done = 0
        for path, at in parts[which::threads]:
            try:
                file = os.open(path, os.O_RDONLY | os.O_DIRECT)
                done += os.preadv(file, [buffers[which]], at)
            except OSError:  # a file system without direct reads
                direct = False
                file = os.open(path, os.O_RDONLY)
                done += os.preadv(file, [buffers[which]], at)
            os.close(file)
        return done

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            forget_files(folder)
            begun = time.perf_counter()
            done = sum(pool.map(read, range(threads)))
            best = max(best, done / (time.perf_counter() - begun))
    return best, direct


def beside_row(
    tiers: Tiers, pool: PagePool, keys: Sequence[bytes], steps: int, size: int, step: Callable[[], object]
) -> Row:
    """Time steps alone, and while one restore after another is under way, in turns."""

    def timed(each: Callable[[], None]) -> list[float]:
        times = []
        for _ in range(steps):
            begun = time.perf_counter()
            step()
            each()
            times.append(1e3 * (time.perf_counter() - begun))
        return times

    under_way: list[Coming] = []
    brought = 0

    def again() -> None:
        nonlocal brought
        tiers.poll()
        if under_way and under_way[0].came is not None:
            finish(pool, under_way.pop())
            brought += 1
        if not under_way:
            under_way.append(begin(tiers, pool, keys))

    plain, beside = [], []
    for _ in range(3):
        plain += timed(lambda: None)
        beside += timed(again)
        tiers.drain()
        finish(pool, under_way.pop())
    took = {name: round(what(beside) / what(plain) - 1, 4) for name, what in
            (("slower_median", statistics.median), ("slower_mean", statistics.mean))}  # fmt: skip
    return {"what": "steps beside restores", "ms": round(statistics.median(plain), 3), "steps": 3 * steps,
            "ms_beside": round(statistics.median(beside), 3), "most_ms": round(max(plain), 3),
            "most_ms_beside": round(max(beside), 3), "restores": brought,
            "gb_s": round(brought * size / sum(beside) / 1e6, 2), **took}  # fmt: skip


def decode_row(
    engine: LocalEngine, keys: list[bytes], batch: int, steps: int, folder: Path, draw: np.random.Generator
) -> Row:
    """`beside_row` of an engine's steps over `batch` sequences."""
    tiers, vocab = engine._tiers, engine.config.vocab_size
    assert tiers is not None
    evict(tiers, engine._pool, keys, "host", folder)
    params = SamplingParams(max_tokens=10 * steps, ignore_eos=True, temperature=0)
    streams = [engine.submit(draw.integers(3, vocab, SHORT).tolist(), params) for _ in range(batch)]
    while len(engine._scheduler.running) < batch or any(each.pending > 1 for each in engine._scheduler.running):
        engine.step()
    for _ in range(4):
        engine.step()
    row = beside_row(tiers, engine._pool, keys, steps, len(keys) * engine._layout.page_bytes, engine.step)
    for stream in streams:
        stream.cancel()
    engine.step()
    return row


def copy_rows(shape: str, device: torch.device, context: int, batch: int, steps: int, folder: Path) -> Iterator[Row]:
    """Yield the rows of copies alone: random pages of a preset's layout, and decode steps of its shape beside them."""
    config = cut_config(shape, None)
    layout = CacheLayout(config, "released")
    count, own = layout.pages_for(context), layout.pages_for(DECODED)
    pools = Pools(layout, pages=2 * count + batch * own + 64, slots=batch, device=device)
    pool = PagePool(len(pools.pages))
    disk = DiskCache(folder / "cache", fingerprint=b"copies", page_bytes=layout.page_bytes,
                     quota_bytes=4 * count * layout.page_bytes, queue_bytes=2 * count * layout.page_bytes)  # fmt: skip
    tiers = Tiers(pools, 2 * count + 64)
    tiers.disk = disk
    head = {"bench": "kv_tiers", "device": name_of(device), "commit": commit(), "case": f"{shape} copies",
            "torch": torch.__version__, "context": context, "batch": batch, "pages": count,
            "bytes": (size := count * layout.page_bytes)}  # fmt: skip
    fill_caches(layout, pools.pages, pools.slots)
    tables = [pool.alloc(own) for _ in range(batch)]
    pages, keys = pool.alloc(count), [number.to_bytes(16, "big") for number in range(count)]
    assert pages is not None
    want = pools.pages[pages].clone()
    for key, page in zip(keys, pages, strict=True):
        pool.register(page, key)
    for at in range(0, count, 64):
        tiers.write(pool, "", list(zip(keys, pages, strict=True))[at : at + 64], at)
        tiers.drain()
        disk.flush(60)
    pool.release(pages[::-1])
    with torch.inference_mode():
        for source in ("host", "ssd"):
            least, direct = (bus_rate(device, size), None) if source == "host" else disk_rate(folder, size)
            found = [restored(tiers, pool, keys, source, folder) for _ in range(5)]
            times = [took for took, _ in found]
            rate = size / statistics.median(times)
            yield head | {
                "what": source, "restore_ms": [round(1e3 * each, 2) for each in times], "gb_s": round(rate / 1e9, 2),
                "limit_gb_s": round(least / 1e9, 2), "of_limit": round(rate / least, 3), "direct_reads": direct,
                "same_bytes": torch.equal(pools.pages[found[-1][1]], want),
            }  # fmt: skip
        weights = OneLayersExperts(config, device).fill_random()
        forward = CudaForward(weights, layout, pools.pages, pools.slots, positions=DECODED)
        spans = [Span(np.array([7 + slot]), DECODED - 2, slot, np.array(table, np.int32), decode=True, draws=(Draw(),))
                 for slot, table in enumerate(tables)]  # fmt: skip
        for _ in range(4):
            forward.forward(spans)
        yield head | beside_row(tiers, pool, keys, steps, size, lambda: forward.forward(spans))
    tiers.close()
    disk.close()


def bits_rows(name: str, device: str, folder: Path) -> Iterator[Row]:
    """Yield a row a source: prompts continued from it against cold runs, greedy and drawn, drafts on."""
    mode = "released" if device == "cuda" else "reference"
    model = load_served(name, mode=mode, device=device)
    draw = np.random.default_rng(1)
    prompts = [draw.integers(3, model.config.vocab_size, n).tolist() for n in (300, 514, 1023, 1900, 2600, 3000)]
    head = {"bench": "kv_tiers", "what": "bits", "model": name, "commit": commit(), "torch": torch.__version__,
            "device": name_of(torch.device(device))}  # fmt: skip
    layout = "released" if mode == "released" else "float32"
    room = kv_budget(model.config, 7, 3200, layout=layout)
    tight = kv_budget(model.config, 5, 1, layout=layout) + kv_budget(model.config, 1, 4000, layout=layout)
    plain: list[Any] = []
    for source in ("cold", "host", "ssd", "parked"):
        options: dict[str, Any] = {"kv_bytes": tight if source == "parked" else room, "host_kv_bytes": 4 * room}
        if source == "cold":
            options["prefix_cache"] = False
        if source == "ssd":
            options |= {"disk_dir": folder / "bits", "disk_policy": "turns"}
        engine = build_engine(model, None, EngineOptions(
            chunk_tokens=512, max_requests=len(prompts), threaded=False, **options
        ))  # fmt: skip
        with torch.inference_mode():
            if source in ("host", "ssd"):
                for prompt in prompts:
                    cut = int(draw.integers(200, len(prompt)))
                    keys = engine._prefix.chain("", prompt[:cut]).keys
                    serve(engine, prompt[:cut], 1)
                    settle(engine)
                    evict(engine._tiers, engine._pool, keys, source, folder)
            streams = [
                engine.submit(prompt, SamplingParams(
                    max_tokens=64, ignore_eos=True, logprobs=True, temperature=at % 2, seed=at
                )) for at, prompt in enumerate(prompts)
            ]  # fmt: skip
            while any(stream.finish_reason is None for stream in streams):
                engine.step()
        found = [(step.token_id, step.logprob) for stream in streams for step in stream]
        plain = plain or found
        stats = engine.stats()
        engine.close()
        yield head | {
            "source": source, "tokens": len(found), "cached": stats.cached_tokens, "swaps": stats.swaps,
            "copied_in": stats.host["copied_in"], "path": engine.numeric_path,
            "differing_tokens": sum(a[0] != b[0] for a, b in zip(found, plain, strict=True)),
            "differing_logprobs": sum(a[1] != b[1] for a, b in zip(found, plain, strict=True)),
            "disk_hits": stats.disk.get("hits", 0), "in_use": engine._tiers and engine._tiers.index.in_use,
        }  # fmt: skip


if __name__ == "__main__":
    main()
