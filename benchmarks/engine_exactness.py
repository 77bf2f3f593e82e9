"""Exactness of the serving engine: every way of serving a prompt gives the bits of the plainest one.

python -m benchmarks.engine_exactness [--tiny] [--nano] [--cuts | --only-cuts] [--path helper|torch|cuda]
                                      [--sample FRACTION --seed N] [--json FILE]

The plain run of a prompt: alone, cold, in chunks of 1,024, without speculation, on the same numeric path. Each case
serves a batch in another way and counts tokens that differ and log-probabilities that differ in any bit. A case that
did not do what it is for (no hit, no accepted draft, no preemption) fails. tiny (random weights, made here) gets the
full factorial, nano a list in which every pair of factors meets. `--cuts` restores one prompt at every cut point under
each disk policy, `--only-cuts` does nothing else. `cuda` is released mode on a CUDA device. Finished cases are kept in
FILE and not run again while the code of the engine stays the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.engine.small_tokens import TEXTS, config_for

from pelagos import cost
from pelagos.chat import Tokenizer, train_tokenizer
from pelagos.chat.tokens import SPECIAL_TOKENS
from pelagos.engine import LLM, SamplingParams, Step
from pelagos.engine.api import MAX_DRAFT
from pelagos.engine.local import LocalEngine
from pelagos.engine.speculation import Draft, FixedDepth
from pelagos.evals.engine_bench import Timed, stamp, text_ids
from pelagos.load import load_model, save_model
from pelagos.model import Transformer
from pelagos.model.transformer import MTPBlock
from pelagos.train.init import initialise

FACTORS: dict[str, tuple[Any, ...]] = {
    "path": ("helper", "torch"),
    "batch": (1, 2, 7, 16),
    "chunk": (128, 256, 1024),
    "source": ("cold", "ram", "ssd"),
    "speculation": (False, True),
    "sampling": ("greedy", "seeded"),
    "pressure": ("none", "recompute", "swap"),
}
PATHS = (*FACTORS["path"], "cuda")
NANO_RUNS = 400
OUTPUT_TOKENS = 64
SHORTEST, LONGEST = 300, 3000
LEAST_CUT = 256
POLICIES = ("full", "periodic(256)", "turns")  # of the SSD cases; `zero` keeps no state, --cuts has it
CUT_POLICIES = ("full", "periodic(512)", "zero", "turns")
CUT_POINTS = 2048
PROMPTS_LAST = 4  # rounds of the nano list
STUCK_SECONDS = 20
CODE = ("src/pelagos/engine", "src/pelagos/kernels", "src/pelagos/model", "src/pelagos/numerics.py")
Bits = list[tuple[int, bytes]]  # token and the eight bytes of its log-probability


@dataclass(frozen=True, slots=True)
class Case:
    """One way of serving `batch` prompts; `seed` draws prompts, cuts and disk policy."""

    model: str
    path: str
    batch: int
    chunk: int
    source: str
    speculation: bool
    sampling: str
    pressure: str
    seed: int = 0

    @property
    def key(self) -> str:
        """The name under which its outcome is kept."""
        return " ".join(str(each) for each in asdict(self).values())


@dataclass(slots=True)
class Outcome:
    """What a case showed; `missing` names what it should have exercised and did not."""

    tokens: int = 0
    differing_tokens: int = 0
    differing_logprobs: int = 0
    hits: int = 0
    cached_tokens: int = 0
    disk_hits: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    swaps: int = 0
    steps: int = 0
    seconds: float = 0.0
    missing: list[str] = field(default_factory=list)
    code: str = ""

    @property
    def passed(self) -> bool:
        """Same tokens, same bits, and everything exercised."""
        return not (self.differing_tokens or self.differing_logprobs or self.missing or not self.tokens)


def factorial(model: str, paths: Sequence[str]) -> list[Case]:
    """Every combination of the factors; a request alone is never preempted."""
    rows = itertools.product(paths, *(FACTORS[name] for name in list(FACTORS)[1:]))
    cases = [Case(model, *row) for row in rows]
    return [case for case in cases if case.batch > 1 or case.pressure == "none"]


def pairwise(model: str, paths: Sequence[str], runs: int, seed: int = 0) -> list[Case]:
    """`runs` cases: covering arrays of strength two one after another, each with prompts of its own."""
    everything, cases = factorial(model, paths), []
    draw = random.Random(seed)
    for round_seed in itertools.count():
        left = set(itertools.chain.from_iterable(map(pairs, everything)))
        while left:
            tried = draw.sample(everything, min(40, len(everything)))
            best = max(tried, key=lambda case: len(left & set(pairs(case))))
            left -= set(pairs(best))
            cases.append(Case(**{**asdict(best), "seed": round_seed}))
            if len(cases) == runs:
                return cases
    raise AssertionError


def pairs(case: Case) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Every two factors with their values in this case."""
    values = asdict(case)
    return itertools.combinations(((name, values[name]) for name in FACTORS), 2)


class RandomDepth(FixedDepth):
    """Drafts and verifies at random depths up to `depth`, whether it pays or not."""

    def __init__(self, depth: int, seed: str) -> None:
        super().__init__(depth)
        self._draw = random.Random(seed)

    def depths(self, keys: Sequence[str]) -> list[int]:
        """Any depth for each request."""
        return [self._draw.randint(0, self.depth) for _ in keys]

    def cut(self, keys: Sequence[str], drafts: Sequence[Draft], seconds: float) -> list[int]:
        """Any part of each draft."""
        return [self._draw.randint(0, len(draft.tokens)) for draft in drafts]


class Bed:
    """A model, prompts for it and the plain runs they are compared with."""

    def __init__(self, folder: str | Path, *, name: str, cuda: bool = False) -> None:
        """Load a model; tiny gets random prompts, any other pieces of real text."""
        self.name = name
        options: dict[str, Any] = {"mode": "released", "dtype": torch.bfloat16, "device": "cuda"} if cuda else {}
        self.model, self.tokenizer = load_model(folder, **options), Tokenizer.load(folder)
        self.vocab = self.tokenizer.vocab_size
        self._text = [] if name == "tiny" else text_ids(self.tokenizer, 120_000)
        self._plain: dict[str, LLM] = {}
        self._known: dict[tuple[Any, ...], Bits] = {}

    def open(self, path: str, chunk: int, **options: Any) -> LLM:
        """An engine on a numeric path that steps when told to, so that a case is the same every time."""
        options |= {"chunk_tokens": chunk, "native": path == "helper", "threaded": False}
        return LLM.from_parts(self.model, self.tokenizer, **options)

    def plain(self, path: str) -> LLM:
        """The engine of the plain runs, kept open."""
        if path not in self._plain:
            self._plain[path] = self.open(path, 1024, max_requests=1, prefix_cache=False, speculation=False)
        return self._plain[path]

    def close(self) -> None:
        """Close the engines of the plain runs."""
        for llm in self._plain.values():
            llm.close()

    def prompts(self, case: Case) -> list[list[int]]:
        """The prompts of a case: text or random ids, every second one a fork of the one before it."""
        found: list[list[int]] = []
        for index in range(case.batch):
            draw = random.Random(f"{self.name} {case.seed // PROMPTS_LAST} {index}")
            length = draw.randint(SHORTEST, LONGEST)
            fresh = self._draw(draw, length)
            if index % 2:
                shared = draw.randint(1, min(length, len(found[-1])) - 1)
                fresh[:shared] = found[-1][:shared]
            found.append(fresh)
        return found

    def _draw(self, draw: random.Random, length: int) -> list[int]:
        if not self._text:
            return [draw.randrange(self.vocab) for _ in range(length)]
        start = draw.randrange(len(self._text) - length)
        return self._text[start : start + length]

    def reference(self, path: str, prompt: list[int], params: SamplingParams) -> Bits:
        """What the plain run of a prompt gives."""
        key = (path, tuple(prompt), params.temperature, params.seed, params.max_tokens)
        if key not in self._known:
            [done] = run(self.plain(path), [Timed(self.plain(path).engine, prompt, params)])
            self._known[key] = bits(done)
        return self._known[key]


def run(llm: LLM, requests: Sequence[Timed], *, until: Callable[[], bool] = lambda: False) -> list[list[Step]]:
    """Step the engine until these requests have ended (then their steps), or earlier when `until` says so."""
    engine = llm.engine
    assert isinstance(engine, LocalEngine)
    moved = time.monotonic()
    with torch.inference_mode():
        while any(each.stream.finish_reason is None for each in requests):
            if until():
                return []
            if engine.step():
                moved = time.monotonic()
            elif not engine.stats().requests_waiting + engine.stats().requests_running:
                break  # one ended with an error, which `finish` raises
            elif time.monotonic() - moved > STUCK_SECONDS:
                raise TimeoutError(f"nothing moved for {STUCK_SECONDS} s: {llm.stats()}")
            else:
                time.sleep(0.0005)  # waits for the disk
    return [each.finish() for each in requests]


def bits(steps: Sequence[Step]) -> Bits:
    """Tokens beside the bytes of their log-probabilities."""
    return [(step.token_id, struct.pack("<d", step.logprob)) for step in steps]


def params_for(case: Case, index: int, tokens: int = OUTPUT_TOKENS) -> SamplingParams:
    """Greedy, or a temperature with a seed of its own for each prompt."""
    heat = {"temperature": 0.0} if case.sampling == "greedy" else {"temperature": 0.8, "top_p": 0.95, "seed": 7 + index}
    return SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=True, **heat)


def run_case(bed: Bed, case: Case) -> Outcome:
    """Serve the batch as the case says and compare it with the plain runs."""
    draw = random.Random(case.key)
    prompts = bed.prompts(case)
    params = [params_for(case, index) for index in range(case.batch)]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"speculation": case.speculation}
        if case.source == "ssd":
            options |= {"disk_dir": Path(folder), "disk_policy": draw.choice(POLICIES)}
        if case.pressure == "none":
            options["max_requests"] = case.batch
        else:
            options |= squeeze(bed, case, prompts) | {"preemption": case.pressure}
        llm = bed.open(case.path, case.chunk, **options)
        if case.source != "cold":
            prime(llm, [prompt[: draw.randint(LEAST_CUT, len(prompt) - 1)] for prompt in prompts])
        if case.source == "ssd":
            llm.close()  # nothing is left in memory
            llm = bed.open(case.path, case.chunk, **options)
        before = llm.stats()
        if case.speculation:
            llm.engine._depth = RandomDepth(MAX_DRAFT, case.key)  # type: ignore[attr-defined]
        most = OUTPUT_TOKENS // (1 + MAX_DRAFT) if case.speculation else 40  # the first must not end before
        steps = draw.randint(1, most) if case.pressure != "none" else None
        running = serve(llm, prompts, params, steps=steps, alone=case.source == "cold")
        results = run(llm, running)
        after = llm.stats()
        llm.close()
    outcome = Outcome(
        drafted=after.drafted_tokens - before.drafted_tokens,
        preemptions=after.preemptions - before.preemptions,
        swaps=after.swaps - before.swaps,
        steps=after.steps - before.steps,
        disk_hits=after.disk.get("hits", 0) - before.disk.get("hits", 0),
    )
    for prompt, each, request, result in zip(prompts, params, running, results, strict=True):
        compare(outcome, bits(result), bed.reference(case.path, prompt, each))
        outcome.hits += request.stream.cached_tokens > 0
        outcome.cached_tokens += request.stream.cached_tokens
        outcome.accepted += request.stream.accepted_drafts
    outcome.seconds = round(time.perf_counter() - started, 2)
    outcome.missing = unexercised(case, outcome)
    if numeric_path(llm) != numeric_path(bed.plain(case.path)):
        outcome.missing.append("same numeric path")  # somebody changed the code meanwhile
    return outcome


def numeric_path(llm: LLM) -> str:
    """The name of the arithmetic an engine runs on."""
    assert isinstance(llm.engine, LocalEngine)
    return llm.engine.numeric_path


def prime(llm: LLM, prompts: Sequence[list[int]]) -> None:
    """Let the engine see the prompts, the first one last, marking their ends as cuts."""
    params = SamplingParams(max_tokens=1, temperature=0)
    for prompt in reversed(prompts):
        run(llm, [Timed(llm.engine, prompt, params, cuts=(len(prompt),))])


def serve(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams], *, steps: int | None, alone: bool
) -> list[Timed]:
    """Submit all at once, or the second half, with priority, when that many steps were made and the slots are full.

    alone: every request is another user's, so that none finds what another left.
    """
    first = len(prompts) if steps is None else -(-len(prompts) // 2)
    users = [str(index) if alone else "" for index in range(len(prompts))]

    def submit(index: int, priority: int) -> Timed:
        return Timed(llm.engine, prompts[index], params[index], user_id=users[index], priority=priority)

    running = [submit(index, 0) for index in range(first)]
    if steps is not None:
        goal = llm.stats().steps + steps

        def is_busy() -> bool:
            now = llm.stats()
            return now.steps >= goal and now.requests_running == now.slots_total

        run(llm, running, until=is_busy)
    return [*running, *(submit(index, 1) for index in range(first, len(prompts)))]


def squeeze(bed: Bed, case: Case, prompts: list[list[int]]) -> dict[str, Any]:
    """Slots for a quarter of the batch, and pages for its longest prompt or for a third of all, whichever is more.

    A quarter of what the slots leave, or of a tier of the host, is for snapshots: room for three of them, and in the
    tier for two sequences that are swapped.
    """
    config, layout = bed.model.config, "float32" if bed.model.mode == "reference" else "released"
    slots, tokens = -(-case.batch // 4), cost.page_tokens(config)
    lengths = [len(prompt) + OUTPUT_TOKENS for prompt in prompts]
    longest = -(-max(lengths) // tokens) + 1
    pages = max(longest, -(-case.chunk // tokens), sum(lengths) // (3 * tokens))
    page = sum(cost.page_bytes(config, tokens=tokens, layout=layout).values())
    state = sum(cost.state_bytes(config, layout=layout, draft=True, rewind=MAX_DRAFT).values())
    kept = 3 * (state + page) * (case.source != "cold")
    if case.pressure == "swap":
        host = 4 * max(kept, -(-(4 * state + 2 * (longest + 2) * page) // 3))
        return {"max_requests": slots, "kv_bytes": slots * state + pages * page, "host_kv_bytes": host}
    return {"max_requests": slots, "kv_bytes": slots * state + 4 * max(-(-pages * page // 3), kept)}


def compare(outcome: Outcome, got: Bits, wanted: Bits) -> None:
    """Count the tokens and the log-probabilities that differ; what is missing at the end differs."""
    empty = (-1, b"")
    for ours, plain in itertools.zip_longest(got, wanted, fillvalue=empty):
        outcome.tokens += 1
        outcome.differing_tokens += ours[0] != plain[0]
        outcome.differing_logprobs += ours[1] != plain[1]


def unexercised(case: Case, outcome: Outcome) -> list[str]:
    """Name what the case is for and did not happen; without pressure every prompt of a warm case has to hit."""
    needed = {"none": case.batch}.get(case.pressure, 1)
    checks = {
        "hits": case.source == "cold" or outcome.hits >= needed,
        "no hits": case.source != "cold" or not outcome.hits,
        "disk hits": case.source != "ssd" or outcome.disk_hits > 0,
        "accepted drafts": not case.speculation or outcome.accepted > 0,
        # One greedy sequence may well have all of its few drafts right.
        "rejected drafts": not case.speculation or case.batch == 1 or outcome.drafted > outcome.accepted,
        "preemptions": case.pressure == "none" or outcome.preemptions > 0,
        "swaps": case.pressure != "swap" or outcome.swaps > 0,
        "batched steps": case.batch == 1 or case.pressure != "none" or outcome.steps < outcome.tokens,
    }
    return [name for name, happened in checks.items() if not happened]


def run_cuts(bed: Bed, path: str, policy: str, points: Sequence[int], *, tokens: int = 3) -> Outcome:
    """Restore one prompt at each cut point from the disk, go on with another token, and compare with plain runs.

    `turns` marks each point as a cut beforehand; the other policies see the whole prompt once.
    """
    case = Case(bed.name, path, 1, 512, "ssd", False, "greedy", "none", seed=-1)
    prompt = bed._draw(random.Random(0), CUT_POINTS)
    outcome, started = Outcome(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"max_requests": 1, "disk_dir": Path(folder), "disk_policy": policy}
        llm = bed.open(path, case.chunk, **options)
        prime(llm, [prompt[:cut] for cut in sorted(points)] if policy == "turns" else [prompt])
        llm.close()
        llm = bed.open(path, case.chunk, **options)
        for cut in points:
            forked = [*prompt[:cut], (prompt[cut % CUT_POINTS] + 1) % bed.vocab]
            params = params_for(case, 0, tokens)
            request = Timed(llm.engine, forked, params)
            [steps] = run(llm, [request])
            compare(outcome, bits(steps), bed.reference(path, forked, params))
            outcome.hits += request.stream.cached_tokens > 0
            outcome.cached_tokens += request.stream.cached_tokens
        outcome.disk_hits = llm.stats().disk.get("hits", 0)
        llm.close()
    outcome.seconds = round(time.perf_counter() - started, 2)
    outcome.missing = [] if outcome.disk_hits else ["disk hits"]
    return outcome


def make_tiny(folder: Path, seed: int = 3) -> Path:
    """Write a tiny checkpoint with random weights whose draft is right about two times in three."""
    full = train_tokenizer(TEXTS, len(SPECIAL_TOKENS) + 256 + 60)
    model = Transformer(config_for(Tokenizer(full)))
    initialise(model, seed)
    with torch.no_grad():
        # The next token is mostly a permutation of the last: the draft sees that one too.
        order = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(seed))
        model.head.weight.copy_(0.35 * model.embed.weight[order])
        block = model.mtp[0]
        assert isinstance(block, MTPBlock)
        block.e_proj.weight.copy_(torch.eye(model.config.hidden_size))
        block.h_proj.weight.mul_(2.0)
    save_model(model, folder, exact=True)
    full.save(str(folder / "tokenizer.json"))
    return folder


def code_mark() -> str:
    """The last commit that touched what decides a bit, with + when the tree differs from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()

    return git("log", "-1", "--format=%h", "--", *CODE) + (
        "+" if git("diff", "--name-only", "HEAD", "--", *CODE) else ""
    )


def summary(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """Sums over outcomes, and how many of them really did what they are for."""
    sums: Counter[str] = Counter()
    for each in outcomes:
        sums.update(runs=1, passed=each.passed, tokens=each.tokens)
        sums.update(differing_tokens=each.differing_tokens, differing_logprobs=each.differing_logprobs)
        sums.update(with_hits=each.hits > 0, with_disk_hits=each.disk_hits > 0, with_preemptions=each.preemptions > 0)
        sums.update(with_swaps=each.swaps > 0)
        sums.update(with_accepted_drafts=each.accepted > 0, accepted=each.accepted, drafted=each.drafted)
    return dict(sums)


def by_code(known: dict[str, Outcome]) -> dict[str, dict[str, dict[str, int]]]:
    """Sums by the code that was run, and by model and path (cuts for themselves)."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for key, each in known.items():
        words = key.split()
        groups.setdefault((each.code, " ".join(words[: 3 if words[0] == "cuts" else 2])), []).append(each)
    sums: dict[str, dict[str, dict[str, int]]] = {}
    for (code, group), outcomes in groups.items():
        sums.setdefault(code, {})[group] = summary(outcomes)
    return sums


def main() -> int:
    """Run what is asked for and not yet done; the exit code says whether everything passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_exactness", description=__doc__.splitlines()[0])
    for name in ("tiny", "nano", "cuts", "only-cuts"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--path", choices=PATHS, action="append", help="default: those of a CPU")
    parser.add_argument("--sample", type=float, default=1.0, help="share of the cases to run")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    mark, kept = code_mark(), {}
    if args.json and args.json.is_file():
        kept = json.loads(args.json.read_text(encoding="utf-8"))["cases"]
    known = {key: Outcome(**each) for key, each in kept.items()}
    done = {key for key, each in known.items() if each.code == mark}

    def record(key: str, outcome: Outcome) -> None:
        outcome.code = mark
        known[key] = outcome
        print(f"{'ok  ' if outcome.passed else 'FAIL'} {key} {outcome}", file=sys.stderr, flush=True)
        if args.json:
            marks = {"bench": "engine_exactness"} | stamp(
                "python -m benchmarks.engine_exactness " + " ".join(sys.argv[1:])
            )
            found = {"summary": by_code(known), "cases": {name: asdict(each) for name, each in known.items()}}
            args.json.with_suffix(".part").write_text(json.dumps(marks | found, indent=0) + "\n", encoding="utf-8")
            args.json.with_suffix(".part").replace(args.json)

    paths = args.path or FACTORS["path"]
    if "cuda" in paths and len(paths) > 1:
        parser.error("--path cuda: a run of its own, the weights lie elsewhere")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tiny", "nano"):
            if not getattr(args, name):
                continue
            made = make_tiny(Path(folder) / "tiny") if name == "tiny" else name
            bed = Bed(made, name=name, cuda=tuple(paths) == ("cuda",))
            cases = factorial(name, paths) if name == "tiny" else pairwise(name, paths, NANO_RUNS)
            draw = random.Random(args.seed)
            for case in [case for case in cases if draw.random() < args.sample and not args.only_cuts]:
                if case.key not in done:
                    try:
                        record(case.key, run_case(bed, case))
                    except Exception as error:  # a case that breaks has failed, the others go on
                        record(case.key, Outcome(missing=[repr(error)]))
            for path, policy in itertools.product(paths, CUT_POLICIES if args.cuts or args.only_cuts else ()):
                points = [cut for cut in range(1, CUT_POINTS + 1) if draw.random() < args.sample]
                key = f"cuts {name} {path} {policy} {len(points)}"
                if key not in done:
                    record(key, run_cuts(bed, path, policy, points))
            bed.close()
    print(json.dumps(by_code(known), indent=1))
    return int(not all(each.passed for each in known.values() if each.code == mark))


if __name__ == "__main__":
    raise SystemExit(main())
