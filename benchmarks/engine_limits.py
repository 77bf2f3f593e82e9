"""Memory of the serving engine against its plan, and what it does at its limits.

python -m benchmarks.engine_limits [--model nano] [--only PART] [--json FILE]

Parts: bytes (pools of nano, flash and pro beside the cost model; tensors and process memory of a running engine beside
its plan), chunks (131,072 tokens in chunks of 512 and of 4,096: the same bits, within the plan), million (decode at
position 1,048,575 from a filled cache), storm (20,000 random submits, forks and aborts leave nothing in use).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.engine_exactness import bits

from pelagos import cost
from pelagos.checkpoint import resolve_model
from pelagos.config import ModelConfig, preset
from pelagos.engine import LLM, SamplingParams
from pelagos.engine.disk_file import HEADER, RECORD
from pelagos.engine.local import LocalEngine
from pelagos.evals.engine_bench import Timed, kv_budget, stamp, text_ids
from pelagos.kernels.layout import CacheLayout

PARTS = ("bytes", "chunks", "million", "storm")
LAYOUTS = {"reference": "float32", "released": "released"}  # of the cost model, by number mode
LONG = 131_072
CHUNKS = (512, 4096)
MILLION, MILLION_STEPS = 1 << 20, 16
STORM, STORM_TOKENS = 20_000, 512  # operations, and tokens of cache a slot: too few for all
RUN, RUN_TOKENS = 4, 4096
SLACK_FRACTION, SLACK_BYTES = 0.02, 64 << 20
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=True)
Figures = dict[str, Any]


def main() -> int:
    """Run what is asked for and print one JSON object; the exit code says whether every check held."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_limits", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one measurement in a process of its own
    parser.add_argument("--json", type=Path, help="also write the result here; parts it has from before are kept")
    args = parser.parse_args()
    if args.alone:
        print(
            json.dumps(
                {"run": measure_run, "chunk": measure_chunk, "million": measure_million}[args.alone.split()[0]](args)
            )
        )
        return 0
    found: Figures = {}
    if args.json and args.json.is_file():
        found = json.loads(args.json.read_text(encoding="utf-8"))["parts"]
    for part in args.only or PARTS:
        marks = stamp("python -m benchmarks.engine_limits " + " ".join(sys.argv[1:]))
        run = {"bytes": check_bytes, "chunks": check_chunks, "million": check_million, "storm": check_storm}[part]
        found[part] = run(args) | {"marks": marks}
        print(f"{'ok  ' if found[part]['passed'] else 'FAIL'} {part}", file=sys.stderr, flush=True)
        text = json.dumps({"bench": "engine_limits", "model": args.model, "parts": found}, indent=1)
        if args.json:
            args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(not all(each["passed"] for each in found.values()))


def alone(args: argparse.Namespace, what: str) -> Figures:
    """Measure in a fresh process, whose peak memory is its own."""
    command = [sys.executable, "-m", "benchmarks.engine_limits", "--model", args.model, "--alone", what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr}")
    return json.loads(done.stdout)


def check_bytes(args: argparse.Namespace) -> Figures:
    """Pools of every layout allocated without weights, and a running engine beside its plan."""
    pools = [pool_bytes(name, mode) for name in ("nano", "flash", "pro") for mode in LAYOUTS]
    running = alone(args, "run")
    passed = all(row["pool"] == row["cost"] for row in pools) and running["passed"]
    return {"pools": pools, "running": running, "passed": passed}


def pool_bytes(name: str, mode: str, pages: int = 8192) -> Figures:
    """Bytes per token of a pool that is really allocated (the system backs it as it is touched) beside the cost."""
    config = preset(name)
    layout = CacheLayout(config, mode=mode)
    pool = np.zeros((pages, layout.page_bytes), np.uint8)
    state = np.zeros((1, layout.slot_bytes), np.uint8)
    cost_layout = LAYOUTS[mode]
    return {
        "model": name, "mode": mode,
        "pool": pool.nbytes / (pages * layout.page_tokens), "cost": cost.kv_bytes_per_token(config, cost_layout),
        "slot": state.nbytes, "state_cost": sum(cost.state_bytes(config, layout=cost_layout, draft=True).values()),
    }  # fmt: skip


def measure_run(args: argparse.Namespace) -> Figures:
    """Load, serve RUN prompts that fill the pools, and compare tensors and the growth of the process with the plan."""
    warm_libraries()
    before = memory("VmRSS")
    config = ModelConfig.load(resolve_model(args.model))
    llm = LLM(args.model, max_requests=RUN, kv_bytes=kv_budget(config, RUN, RUN_TOKENS), prefix_cache=False)
    ids = text_ids(llm.tokenizer, RUN * RUN_TOKENS)
    llm.generate([ids[i * RUN_TOKENS : (i + 1) * RUN_TOKENS - GREEDY.max_tokens] for i in range(RUN)], GREEDY)
    planned, grown = llm.stats().bytes_planned, memory("VmHWM") - before
    total = planned["total_bytes"]
    tensors = sum(each.nbytes for each in (*llm.model.parameters(), *llm.model.buffers()))
    llm.close()
    exact = tensors == cost.weights_bytes(config, "float32")
    return {
        "planned": planned, "grown": grown, "over": grown - total, "weights": tensors, "weights_exact": exact,
        "passed": exact and abs(grown - total) <= slack(total),
    }  # fmt: skip


def check_chunks(args: argparse.Namespace) -> Figures:
    """The same long prompt in chunks of two sizes, each in a process of its own."""
    runs = {str(chunk): alone(args, f"chunk {chunk}") for chunk in CHUNKS}
    same = len({(run["logprobs"], run["stored_bits"], run["stored"]) for run in runs.values()}) == 1
    passed = same and all(run["within_plan"] and run["stored"] > LONG // 128 for run in runs.values())
    return {"tokens": LONG, "runs": runs, "same_bits": same, "passed": passed}


def measure_chunk(args: argparse.Namespace) -> Figures:
    """Prefill LONG tokens in chunks of one size and decode a few; bits of log-probabilities, pages and state."""
    chunk = int(args.alone.split()[1])
    warm_libraries()
    before = memory("VmRSS")
    room = kv_budget(ModelConfig.load(resolve_model(args.model)), 2, LONG + 1024)  # a quarter is for snapshots
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(args.model, chunk_tokens=chunk, max_requests=1, kv_bytes=room, disk_dir=folder, speculation=False)
        started = time.perf_counter()
        timed = Timed(llm.engine, text_ids(llm.tokenizer, LONG), GREEDY)
        steps = timed.finish()
        seconds = time.perf_counter() - started
        grown, total = memory("VmHWM") - before, llm.stats().bytes_planned["total_bytes"]
        llm.close()
        stored = stored_bits(Path(folder))
    found = bits(steps)
    return {
        "seconds": round(seconds, 1), "prefill_tok_s": round(LONG / timed.first_token_s, 1), "tokens": len(found),
        "logprobs": hashlib.sha256(repr(found).encode()).hexdigest(), "stored": len(stored),
        "stored_bits": hashlib.sha256(repr(sorted(stored.items())).encode()).hexdigest(),
        "planned_bytes": total, "peak_bytes": grown, "within_plan": grown <= total + slack(total),
    }  # fmt: skip


def stored_bits(folder: Path) -> dict[bytes, bytes]:
    """The digest of every page and state in a disk cache, by its key; see docs/cache_format.md."""
    found: dict[bytes, bytes] = {}
    for path in folder.rglob("*"):
        if not re.search(r"\.(pages|state)\d+$", path.name):
            continue
        content = path.read_bytes()
        *_, count, length = HEADER.unpack_from(content)
        data = len(content) - count * length
        for index in range(count):
            key, *_ = RECORD.unpack_from(content, data - (count - index) * RECORD.size)
            found[key] = hashlib.sha256(content[data + index * length :][:length]).digest()
    return found


def check_million(args: argparse.Namespace) -> Figures:
    """Decode the last position of a million from a cache filled with noise, in a process of its own."""
    return alone(args, "million")


def fill(engine: LocalEngine, prompt: list[int]) -> None:
    """Put random content into the cache for a prompt, all but its last token; no request may be running."""
    position, layout, prefix = len(prompt) - 1, engine._layout, engine._prefix
    pages = engine._pool.alloc(position // layout.page_tokens)
    assert pages is not None
    chain, random = prefix.chain("", np.asarray(prompt)), np.random.default_rng(0)

    def noise(size: int) -> np.ndarray:
        return random.standard_normal(size // 4, np.float32).view(np.uint8)

    for key, page in zip(chain.keys, pages, strict=False):
        engine._pools.page_bytes[page] = noise(layout.page_bytes)
        engine._pool.register(page, key)
    prefix.add_state(chain, position, noise(layout.state_size(position)), anchor=True)
    engine._pool.release(pages[::-1])


def measure_million(args: argparse.Namespace) -> Figures:
    """Fill the cache of a prompt that ends shortly before the last position with noise, and decode up to there."""
    warm_libraries()
    before = memory("VmRSS")
    room = kv_budget(ModelConfig.load(resolve_model(args.model)), 1, MILLION) * 3 // 2  # a quarter is for snapshots
    llm = LLM(args.model, max_requests=1, kv_bytes=room, speculation=False)
    engine = llm.engine
    assert isinstance(engine, LocalEngine)
    prompt = np.random.default_rng(0).integers(0, 256, MILLION - MILLION_STEPS).tolist()
    fill(engine, prompt)
    timed = Timed(engine, prompt, SamplingParams(max_tokens=MILLION_STEPS, temperature=0, ignore_eos=True))
    steps = timed.finish()
    gaps = [1e3 * (after - at) for at, after in itertools.pairwise(timed.times)]
    planned, grown = llm.stats().bytes_planned, memory("VmHWM") - before
    llm.close()
    last = len(prompt) + len(steps) - 1
    within = grown <= planned["total_bytes"] + slack(planned["total_bytes"])
    finite = all(np.isfinite(step.logprob) for step in steps)
    return {
        "last_position": last, "cache": "filled with noise", "numeric_path": engine.numeric_path,
        "ms_per_token": round(statistics.median(gaps), 2), "first_token_ms": round(1e3 * timed.first_token_s, 1),
        "cached_tokens": timed.stream.cached_tokens, "finite": finite, "planned": planned, "peak_bytes": grown,
        "passed": finite and within and last == MILLION - 1 and timed.stream.cached_tokens == len(prompt) - 1,
    }  # fmt: skip


def check_storm(args: argparse.Namespace) -> Figures:
    """Random submits, forks of earlier prompts and aborts; at the end nothing may be in use."""
    room = kv_budget(ModelConfig.load(resolve_model(args.model)), 8, STORM_TOKENS)
    llm = LLM(args.model, max_requests=8, chunk_tokens=256, kv_bytes=room)
    figures = storm(llm, STORM)
    llm.close()
    return figures


def storm(llm: LLM, operations: int, seed: int = 0) -> Figures:
    """Run that many random operations and count them; every stream has to end."""
    draw = random.Random(seed)
    vocab = llm.tokenizer.vocab_size
    seen: list[list[int]] = [[draw.randrange(vocab) for _ in range(draw.randint(1, 400))] for _ in range(8)]
    live: list[Timed] = []
    counts: Counter[str] = Counter()
    started = time.perf_counter()
    for _ in range(operations):
        kind = draw.choices(("submit", "fork", "abort", "cancel"), (4, 3, 2, 1))[0]
        if kind in ("abort", "cancel"):
            if live:
                stream = live.pop(draw.randrange(len(live))).stream
                stream.cancel() if kind == "cancel" else llm.engine.abort(stream.request_id)
                counts[kind] += 1
            continue
        prompt = draw.choice(seen)
        if kind == "fork":
            prompt = [*prompt[: draw.randint(1, len(prompt))], *(draw.randrange(vocab) for _ in range(40))]
        else:
            prompt = [draw.randrange(vocab) for _ in range(draw.randint(1, 400))]
        seen[draw.randrange(len(seen))] = prompt
        wanted = SamplingParams(max_tokens=draw.randint(1, 12), seed=draw.randrange(100), ignore_eos=True)
        live.append(Timed(llm.engine, prompt, wanted, priority=draw.randrange(2)))
        counts[kind] += 1
        while len(live) > 24:
            live.pop(0).finish()
            counts["finished"] += 1
    for each in live:
        each.finish()
    deadline = time.monotonic() + 30
    while (left := llm.stats()).slots_in_use + left.pages_in_use and time.monotonic() < deadline:
        time.sleep(0.01)  # the last aborts take a step
    passed = left.pages_in_use == left.slots_in_use == left.requests_running == left.requests_waiting == 0
    return {
        "operations": operations, "counts": dict(counts), "pages_in_use": left.pages_in_use,
        "slots_in_use": left.slots_in_use, "preemptions": left.preemptions, "evicted_pages": left.evicted_pages,
        "hit_tokens": left.hit_tokens, "seconds": round(time.perf_counter() - started, 1), "passed": passed,
    }  # fmt: skip


def warm_libraries() -> None:
    """Touch what the libraries bring along, which is no part of the plan."""
    a = torch.rand(512, 512)
    (a @ a).sum()


def memory(name: str) -> int:
    """Bytes of this process by /proc: VmRSS now, VmHWM at the peak."""
    line = next(x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def slack(planned: int) -> int:
    """How far process memory may exceed its plan."""
    return max(int(SLACK_FRACTION * planned), SLACK_BYTES)


if __name__ == "__main__":
    raise SystemExit(main())
