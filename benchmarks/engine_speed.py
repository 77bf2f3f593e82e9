"""Speed of the serving engine beside `transformers` on the same weights in the same run, and against its goals.

python -m benchmarks.engine_speed [--model nano] [--tokens 96] [--repeats 3] [--threads 2] [--only PART]
                                  [--side SIDE] [--json FILE]

Float32, greedy, cache on, prompts of real text (this package's sources). Ours are whole requests through the engine,
helper and torch each in a process of its own, timed from outside; theirs is the bare model in a loop, each experts
implementation, the fastest counts. Rounds are interleaved and medians taken. Parts: decode (batches 1-16, helper and
pure torch, the latter exact and not, no draft), prefill, speculation (on against off at every batch from 1 to 16), hits
(first token behind a cached 64K prefix).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import operator
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.engine_exactness import numeric_path
from benchmarks.peer import IMPLEMENTATIONS, decode, load_oracle, their_step

from pelagos.chat import Tokenizer
from pelagos.checkpoint import resolve_model
from pelagos.config import ModelConfig
from pelagos.engine import LLM, SamplingParams
from pelagos.engine.api import EngineOptions
from pelagos.engine.build import aside, build_engine
from pelagos.engine.local import LocalEngine
from pelagos.evals.engine_bench import Decode, decode_window, first_token, forget_files, kv_budget, stamp, text_ids
from pelagos.load import load_model

PARTS = ("decode", "prefill", "speculation", "hits")
SIDES = {  # what `LLM` is told; the helper has one path, exact or not
    "helper": {"native": True, "exact": True},
    "torch": {"native": False, "exact": True},
    "torch fast": {"native": False, "exact": False},
}
BATCHES = (1, 2, 4, 8, 16)
PROMPT = 512
PREFILLS = (256, 4096)
SPECULATION = ("on", "off", "control")
SPECULATION_PROMPT = 64
ROUNDS = 3  # of every batch, an opening of engines
PREFIX = 1 << 16
SLOW_PREFILLS = 1  # theirs of 4,096 tokens takes half a minute
Figures = dict[str, Any]


def main() -> int:
    """Measure what is asked for, print one JSON object and the goals; the exit code says whether all are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--side", choices=tuple(SIDES), action="append", help="of ours, for decode and prefill (all)")
    parser.add_argument("--json", type=Path, help="also write the result here; parts it has from before are kept")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: Figures = {}
    if args.json and args.json.is_file():
        found = json.loads(args.json.read_text(encoding="utf-8"))["parts"]
    for part in args.only or PARTS:
        marks = stamp("python -m benchmarks.engine_speed " + " ".join(sys.argv[1:]))
        measured = {"decode": measure_decode, "prefill": measure_prefill, "speculation": measure_speculation,
                    "hits": measure_hits}[part](args)  # fmt: skip
        found[part] = measured | {"marks": marks | {"load_average_after": stamp("")["load_average"]}}
        goals = goal_lines(found)
        text = json.dumps({"bench": "engine_speed", "model": args.model, "parts": found, "goals": goals}, indent=1)
        if args.json:
            args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    for goal in goals:
        print(f"{'met ' if goal['met'] else 'MISS'} {goal['goal']}: {goal['measured']}", file=sys.stderr)
    return int(not all(goal["met"] for goal in goals))


def open_side(args: argparse.Namespace, side: str, **options: Any) -> LLM:
    """One of ours, without prefix cache and draft unless told otherwise."""
    return LLM(args.model, **({"prefix_cache": False, "speculation": False} | SIDES[side] | options))


class Apart:
    """One of ours in another process: two libraries' idle threads in one process slow both sides down."""

    def __init__(self, process: ProcessPoolExecutor, args: argparse.Namespace, side: str, **options: Any) -> None:
        self._process, self._side = process, side
        process.submit(_open_here, args, side, options).result()

    def __call__(self, function: Callable[..., Any], *values: Any) -> Any:
        """Return function(llm, *values) as it comes out there."""
        return self._process.submit(_call_here, self._side, function, values).result()


_HERE: dict[str, LLM] = {}  # of each `Apart`, in its process


def _open_here(args: argparse.Namespace, side: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(args.threads)
    _HERE[side] = open_side(args, side, **options)


def _call_here(side: str, function: Callable[..., Any], values: tuple[Any, ...]) -> Any:
    return function(_HERE[side], *values)


@contextmanager
def sides_apart(args: argparse.Namespace, **options: Any) -> Iterator[dict[str, Apart]]:
    """Ours, those of one library in one process, so that what differs between them is not their processes."""
    sides = args.side or SIDES
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        processes = {
            native: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn))
            for native in {SIDES[side]["native"] for side in sides}
        }
        opened = {side: Apart(processes[SIDES[side]["native"]], args, side, **options) for side in sides}
        yield opened
        for each in opened.values():
            each(LLM.close)


def decode_ms(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    """Milliseconds a step of all prompts together."""
    return decode_window(llm.engine, prompts, tokens=tokens).ms_per_step


def first_ms(llm: LLM, prompt: list[int]) -> float:
    """Milliseconds from submit to the first token."""
    return 1e3 * first_token(llm.engine, prompt)[0]


def rounds(
    repeats: int, makers: dict[str, Callable[[], float]], *, limits: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """Call every maker once a round, after one round that warms up; `limits` has fewer rounds for the slow ones."""
    taken: dict[str, list[float]] = {name: [] for name in makers}
    for index in range(repeats + 1):
        for name, make in list(makers.items())[:: -1 if index % 2 else 1]:
            if index > (limits or {}).get(name, repeats):
                continue
            value = make()
            if index:
                taken[name].append(value)
            print(f"{name}: {value:.3f}{'' if index else ' (warm-up)'}", file=sys.stderr, flush=True)
    return taken


def medians(taken: dict[str, list[float]], digits: int = 3) -> dict[str, Any]:
    """Median, least and most of each list."""
    return {
        name: {"median": round(statistics.median(v), digits), "range": [round(min(v), digits), round(max(v), digits)]}
        for name, v in taken.items()
    }


def text_prompts(model: str, count: int, length: int) -> list[list[int]]:
    """Pieces of real text that follow one another."""
    ids = text_ids(Tokenizer.load(resolve_model(model)), count * length)
    return [ids[i * length : (i + 1) * length] for i in range(count)]


@torch.inference_mode()
def measure_decode(args: argparse.Namespace) -> Figures:
    """Milliseconds a step of ours at each batch and of theirs at 1 and 16."""
    with sides_apart(args, max_requests=max(BATCHES)) as ours:
        return _measure_decode(args, ours)


def _measure_decode(args: argparse.Namespace, ours: dict[str, Apart]) -> Figures:
    prompts = text_prompts(args.model, max(BATCHES), PROMPT)
    makers: dict[str, Callable[[], float]] = {}
    for batch in BATCHES:
        for side, llm in ours.items():
            makers[f"{side} {batch}"] = lambda llm=llm, batch=batch: llm(decode_ms, prompts[:batch], args.tokens)
    oracle = load_oracle(resolve_model(args.model))
    for batch in (1, max(BATCHES)):
        ids = torch.tensor(prompts[:batch])
        for name in IMPLEMENTATIONS:
            makers[f"transformers {name} {batch}"] = lambda ids=ids, name=name: (
                1e3 * decode_batch(oracle, name, ids, args.tokens) / args.tokens
            )
    taken = rounds(args.repeats, makers)
    paths = {side: llm(numeric_path) for side, llm in ours.items()}
    loose = open_side(args, "helper", exact=False)
    paths["helper, exact=False"] = numeric_path(loose)
    loose.close()
    same = next(iter(ours.values()))(greedy_tokens, prompts[0], args.tokens)
    _, theirs = decode(their_step(oracle, "eager"), torch.tensor([prompts[0]]), args.tokens)
    prices = {
        batch: round(statistics.median(map(operator.truediv, exact, fast)) - 1, 3)
        for batch in BATCHES
        if (exact := taken.get(f"torch {batch}")) and (fast := taken.get(f"torch fast {batch}"))
    }
    return {
        "ms_per_step": medians(taken), "torch_exact_price": prices, "prompt": PROMPT, "tokens": args.tokens,
        "numeric_paths": paths, "same_tokens": same[1:] == theirs,
    }  # fmt: skip


def decode_batch(oracle: Any, implementation: str, prompts: torch.Tensor, count: int) -> float:
    """Prefill (B, S) outside the clock (by the way that is quick at it), then seconds of `count` greedy steps."""
    step = their_step(oracle, "grouped_mm")
    token = step(prompts).argmax(-1, keepdim=True)
    oracle.set_experts_implementation(implementation)
    started = time.perf_counter()
    for _ in range(count):
        token = step(token).argmax(-1, keepdim=True)
    return time.perf_counter() - started


def greedy_tokens(llm: LLM, prompt: list[int], count: int) -> list[int]:
    """Our greedy continuation, one token longer than theirs is recorded."""
    [done] = llm.generate([prompt], SamplingParams(max_tokens=count + 1, temperature=0, ignore_eos=True))
    return done.token_ids


@torch.inference_mode()
def measure_prefill(args: argparse.Namespace) -> Figures:
    """Milliseconds from submit to the first token, theirs from the call to the logits."""
    with sides_apart(args, max_requests=1) as ours:
        return _measure_prefill(args, ours)


def _measure_prefill(args: argparse.Namespace, ours: dict[str, Apart]) -> Figures:
    [ids] = text_prompts(args.model, 1, max(PREFILLS))
    oracle = load_oracle(resolve_model(args.model))
    makers: dict[str, Callable[[], float]] = {}
    limits = {}
    skipped = ("batched_mm", max(PREFILLS))  # a minute a run, far behind the others
    for length in PREFILLS:
        for side, llm in ours.items():
            makers[f"{side} {length}"] = lambda llm=llm, n=length: llm(first_ms, ids[:n])
        for name in IMPLEMENTATIONS:
            if (name, length) == skipped:
                continue
            key = f"transformers {name} {length}"
            limits[key] = SLOW_PREFILLS if length == max(PREFILLS) else args.repeats
            makers[key] = lambda name=name, n=length: 1e3 * seconds(their_step(oracle, name), torch.tensor([ids[:n]]))
    taken = rounds(args.repeats, makers, limits=limits)
    return {"first_token_ms": medians(taken)}


def seconds(step: Callable[[torch.Tensor], torch.Tensor], prompt: torch.Tensor) -> float:
    """Seconds one forward takes."""
    started = time.perf_counter()
    step(prompt)
    return time.perf_counter() - started


def total(runs: Sequence[Decode]) -> float:
    """Tokens a second of all runs together."""
    return sum(each.tokens for each in runs) / sum(each.seconds for each in runs)


class InTurns:
    """A batch that decodes while others do, a step of each in turn: what disturbs the machine disturbs all of them."""

    def __init__(self, engine: LocalEngine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        """Submit the prompts and compute until each has its first token; `engine` runs no thread of its own."""
        self._engine, self._seconds, told = engine, 0.0, [0] * len(prompts)

        def count(at: int) -> None:
            told[at] += 1

        self._before = engine.stats()
        self._streams = [
            engine.submit(prompt, params, on_step=functools.partial(count, at)) for at, prompt in enumerate(prompts)
        ]
        while not all(told):
            engine.step()
        self._emitted = engine.stats().generated_tokens

    @property
    def runs(self) -> bool:
        """Whether none of its requests has ended."""
        return self._engine.stats().requests_done == self._before.requests_done

    def step(self) -> None:
        """Run one step on the clock."""
        started = time.perf_counter()
        self._engine.step()
        self._seconds += time.perf_counter() - started

    def finish(self) -> Decode:
        """Return the window from the last one's first token to the end of the first; the others end off the clock."""
        tokens = self._engine.stats().generated_tokens - self._emitted
        while self._engine.step():
            pass
        for stream in self._streams:
            list(stream)
        after, before = self._engine.stats(), self._before
        return Decode(
            len(self._streams), tokens, self._seconds, after.accepted_drafts - before.accepted_drafts,
            after.drafted_tokens - before.drafted_tokens, after.generated_tokens - before.generated_tokens,
        )  # fmt: skip


def in_turns(
    engines: dict[str, LocalEngine], prompts: Sequence[Sequence[int]], params: SamplingParams, first: int
) -> dict[str, Decode]:
    """Decode the prompts by all engines, a step of each in turn; `first` begins, and each next turn its follower."""
    runs = {name: InTurns(engine, prompts, params) for name, engine in engines.items()}
    names = list(engines)
    while any(run.runs for run in runs.values()):
        for name in names[first % len(names) :] + names[: first % len(names)]:
            if runs[name].runs:
                runs[name].step()
        first += 1
    return {name: run.finish() for name, run in runs.items()}


def measure_speculation(args: argparse.Namespace) -> Figures:
    """Tokens per second with a draft over those without, at every batch from 1 to 16, greedy and sampled.

    Two equal engines do without: `ratio` is that to both, `control` of one to the other, each of all tokens over all
    seconds. The three have the same weights in memory and take a step in turn, since on a busy host a run of 48 steps
    differs from its repetition by a tenth, neighbouring steps by less. Each of --repeats opens engines anew.
    """
    prompts = text_prompts(args.model, 16, SPECULATION_PROMPT)
    model = aside(lambda: load_model(resolve_model(args.model)))
    got: dict[tuple[int, float], dict[str, list[Decode]]] = {}
    for repeat in range(args.repeats):
        plain = EngineOptions(prefix_cache=False, max_requests=16, threaded=False, native=True, speculation=False)
        options = {"on": dataclasses.replace(plain, speculation=True), "off": plain, "control": plain}
        engines = {name: build_engine(model, None, options[name]) for name in SPECULATION}

        def decode(batch: int, temperature: float, first: int, engines: dict[str, LocalEngine]) -> dict[str, Decode]:
            params = SamplingParams(max_tokens=args.tokens, temperature=temperature, seed=0, ignore_eos=True)
            return in_turns(engines, prompts[:batch], params, first)

        for batch in (1, 16):  # the first runs of an engine are slow, and teach the depth what drafts cost
            decode(batch, 0.0, 0, engines)
        for batch, temperature in itertools.product(range(1, 17), (0.0, 1.0)):
            runs = got.setdefault((batch, temperature), {name: [] for name in engines})
            for turn in range(ROUNDS):
                for name, window in decode(batch, temperature, repeat + turn, engines).items():
                    runs[name].append(window)
        for engine in engines.values():
            engine.close()
        print(f"{repeat + 1} of {args.repeats} openings", file=sys.stderr, flush=True)
    rows = [
        {"batch": batch, "temperature": temperature} | speculation_row(runs)
        for (batch, temperature), runs in got.items()
    ]
    return {"rows": rows, "tokens": args.tokens, "prompt": SPECULATION_PROMPT, "rounds": ROUNDS * args.repeats}


def speculation_row(runs: dict[str, list[Decode]]) -> Figures:
    """Ratios of the engine `on` and of the two without a draft, with their standard errors and what was drafted."""
    both = [*zip(runs["off"], runs["control"], strict=True)]

    def ratio(rounds: Sequence[int]) -> float:
        return total([runs["on"][i] for i in rounds]) / total([each for i in rounds for each in both[i]])

    def control(rounds: Sequence[int]) -> float:
        return total([both[i][0] for i in rounds]) / total([both[i][1] for i in rounds])

    drafted, accepted = (sum(getattr(each, name) for each in runs["on"]) for name in ("drafted", "accepted"))
    count = len(both)
    return {
        "ratio": round(ratio(range(count)), 3), "ratio_error": round(jackknife(ratio, count), 4),
        "control": round(control(range(count)), 3), "control_error": round(jackknife(control, count), 4),
        "acceptance": round(accepted / drafted, 3) if drafted else None, "drafted": drafted,
        "tok_s": {name: round(total(those), 1) for name, those in runs.items()},
        "steps_s": round(statistics.median(each.steps_per_s for each in runs["on"]), 1),
    }  # fmt: skip


def jackknife(figure: Callable[[Sequence[int]], float], count: int) -> float:
    """Return the standard error of a figure of `count` rounds, from what it is without each; 0 for a single round."""
    if count < 2:
        return 0.0
    without = [figure([i for i in range(count) if i != left]) for left in range(count)]
    return math.sqrt((count - 1) / count * sum((each - statistics.fmean(without)) ** 2 for each in without))


def measure_hits(args: argparse.Namespace) -> Figures:
    """Milliseconds to the first token behind a cached prefix of 64K: from RAM, then from disk by a fresh engine."""
    with tempfile.TemporaryDirectory() as folder:
        room = 2 * kv_budget(ModelConfig.load(resolve_model(args.model)), 1, PREFIX)
        options: dict[str, Any] = {"prefix_cache": True, "kv_bytes": room, "disk_dir": folder, "disk_policy": "turns"}
        llm = open_side(args, "helper", max_requests=1, **options)
        ids = text_ids(llm.tokenizer, PREFIX)
        cold, _ = first_token(llm.engine, ids, cuts=(PREFIX,))
        ram = [first_token(llm.engine, [*ids, token]) for token in range(5, 10)]
        llm.close()
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        ssd = []
        for token in range(20, 23):
            forget_files(Path(folder))
            llm = open_side(args, "helper", max_requests=1, **options)
            first_token(llm.engine, ids[-40:])  # any engine's first step is slow
            ssd.append(first_token(llm.engine, [*ids, token]))
            llm.close()
    taken = {"ram": [1e3 * each[0] for each in ram], "ssd": [1e3 * each[0] for each in ssd]}
    return {
        "prefix": PREFIX, "cold_ms": round(1e3 * cold, 1), "disk_bytes": written, "first_token_ms": medians(taken, 2),
        "cached_tokens": {"ram": [each[1] for each in ram], "ssd": [each[1] for each in ssd]},
    }  # fmt: skip


def goal_lines(found: Figures) -> list[Figures]:
    """Each goal that the measured parts speak to: what is asked, what was measured, whether it is met."""
    goals: list[Figures] = []

    def add(goal: str, measured: float, met: bool) -> None:
        goals.append({"goal": goal, "measured": round(measured, 3), "met": bool(met)})

    def peer(times: dict[str, Any], size: int) -> float:
        names = [f"transformers {name} {size}" for name in IMPLEMENTATIONS]
        return min(times[name]["median"] for name in names if name in times)

    if "decode" in found:
        times = found["decode"]["ms_per_step"]
        for side, batch, least in (("helper", 1, 10), ("helper", 16, 6), ("torch", 1, 3), ("torch fast", 1, 3)):
            if f"{side} {batch}" not in times:
                continue
            ratio = peer(times, batch) / times[f"{side} {batch}"]["median"]
            add(f"{side} decode at batch {batch} >= {least}x transformers", ratio, ratio >= least)
        paths = found["decode"]["numeric_paths"]
        one = paths.get("helper") == paths["helper, exact=False"]
        add("helper exact costs <= 15 % at every batch (0: exact=False is the same path)", 1 - one, one)
        for batch, price in found["decode"].get("torch_exact_price", {}).items():
            if int(batch) >= 4:
                add(f"torch exact costs <= 15 % at batch {batch}", price, price <= 0.15)
    if "prefill" in found:
        times = found["prefill"]["first_token_ms"]
        for length, least in ((4096, 6), (256, 1)):
            if f"helper {length}" not in times:
                continue
            ratio = peer(times, length) / times[f"helper {length}"]["median"]
            add(f"helper prefill of {length} >= {least}x transformers", ratio, ratio >= least)
    if "speculation" in found:
        worst = min(row["ratio"] for row in found["speculation"]["rows"])
        add("speculation never under 0.97x of none at batches 1-16", worst, worst >= 0.97)
    if "hits" in found:
        for source, most in (("ram", 150), ("ssd", 300)):
            took = found["hits"]["first_token_ms"][source]["median"]
            used = min(found["hits"]["cached_tokens"][source])
            add(f"first token behind 64K from {source} <= {most} ms", took, took <= most and used > PREFIX // 2)
    return goals


if __name__ == "__main__":
    raise SystemExit(main())
