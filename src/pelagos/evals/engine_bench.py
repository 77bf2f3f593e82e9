"""What `pelagos bench engine` measures: prefill and decode at context frontiers, batch sweeps, cache hits.

Times are a client's: from `submit` to the steps that come out of the stream. Beside each stands its floor, the least
bytes at the measured read rate or the least FLOPs at the measured GEMM rate, whichever takes longer (cost.py counts).
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pelagos import cost
from pelagos.chat import Tokenizer
from pelagos.checkpoint import resolve_model
from pelagos.config import ModelConfig
from pelagos.engine.api import MAX_DRAFT, Engine, Step, Stream
from pelagos.engine.llm import LLM
from pelagos.engine.memory import LAYOUTS
from pelagos.engine.sampler import SamplingParams
from pelagos.errors import ConfigError
from pelagos.evals.commit import commit

PREFILL_TOKENS = 2048  # measured at each frontier
TAIL_TOKENS = 16  # each sequence of a batch has its own, behind the shared context


class Rates(NamedTuple):
    """Bytes per second this machine reads and FLOPs per second its float32 GEMM makes."""

    read: float
    gemm: float

    def floor(self, moved: float, flops: float) -> float:
        """Seconds that reading so many bytes or computing so many FLOPs takes at least."""
        return max(moved / self.read, flops / self.gemm)


class Timed:
    """One request under a clock: when it was submitted and when each of its steps came."""

    def __init__(self, engine: Engine, prompt: Sequence[int], params: SamplingParams, **options: Any) -> None:
        """Submit the request, `options` being those of `Engine.submit`; the clock starts now."""
        self.times: list[float] = []
        self.submitted = time.perf_counter()
        self.stream: Stream = engine.submit(
            prompt, params, on_step=lambda: self.times.append(time.perf_counter()), **options
        )

    def finish(self) -> list[Step]:
        """Wait for the end and return the steps; `times` then has one entry for each."""
        steps = list(self.stream)
        del self.times[len(steps) :]  # the end of the stream is told too
        return steps

    @property
    def first_token_s(self) -> float:
        """Seconds from submit to the first token."""
        return self.times[0] - self.submitted


class Decode(NamedTuple):
    """A window of time in which a whole batch decoded: `tokens` came out in `seconds`."""

    batch: int
    tokens: int
    seconds: float
    accepted: int  # drafted tokens accepted, of the whole run
    drafted: int
    emitted: int  # tokens of the whole run

    @property
    def ms_per_step(self) -> float:
        """Milliseconds between two tokens of one sequence, all sequences advancing."""
        return 1e3 * self.seconds * self.batch / self.tokens

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all sequences together."""
        return self.tokens / self.seconds

    @property
    def steps_per_s(self) -> float:
        """Model steps per second: accepted drafts came without one of their own."""
        return self.tokens_per_s / self.batch * (1 - self.accepted / self.emitted)


def decode_window(
    engine: Engine, prompts: Sequence[Sequence[int]], *, tokens: int, settle: int = 64, temperature: float = 0.0
) -> Decode:
    """Run the prompts together and time them from the last one's first token to the first one's last.

    Each asks for `tokens` plus `settle`, which outlast the prefills of the others. Raises ConfigError when fewer than
    half the wanted tokens fall into the window.
    """
    before = engine.stats()
    wanted = SamplingParams(
        max_tokens=tokens + settle * (len(prompts) > 1), temperature=temperature, seed=0, ignore_eos=True
    )
    running = [Timed(engine, prompt, wanted) for prompt in prompts]
    for each in running:
        each.finish()
    begin, end = max(each.times[0] for each in running), min(each.times[-1] for each in running)
    emitted = sum(len(each.times) for each in running)
    inside = sum(begin < at <= end for each in running for at in each.times)
    if 2 * inside < tokens * len(prompts):
        raise ConfigError(
            f"decode of {len(prompts)} sequences: {inside} of {tokens * len(prompts)} tokens fell into the common "
            "window; some ended early, or their prefills took longer than the first decoded: raise settle"
        )
    after = engine.stats()
    accepted, drafted = after.accepted_drafts - before.accepted_drafts, after.drafted_tokens - before.drafted_tokens
    return Decode(len(prompts), inside, end - begin, accepted, drafted, emitted)


def first_token(engine: Engine, prompt: Sequence[int], *, cuts: Sequence[int] = ()) -> tuple[float, int]:
    """Complete one token of a prompt; return seconds to it and how many prompt tokens were not computed."""
    timed = Timed(engine, prompt, SamplingParams(max_tokens=1, temperature=0), cuts=cuts)
    timed.finish()
    return timed.first_token_s, timed.stream.cached_tokens


def element_bytes(llm: LLM) -> float:
    """Return the bytes an element of the weights takes where the forward reads it: packed by the helper, or float32."""
    packed = llm.stats().bytes_planned["weight_bytes"] - cost.weights_bytes(llm.config, "float32")
    groups = [g for g in cost.inventory(llm.config, draft=True) if g.part != "embedding" and g.format != "i64"]
    return packed / sum(group.count * group.elements for group in groups) if packed > 0 else 4.0


def measure_rates(repeats: int = 5) -> Rates:
    """Measure this machine with the threads torch has: a sum over 400 MB and a GEMM of 1,024 cubed, best of some."""
    block, square = torch.ones(100_000_000), torch.ones(1024, 1024)
    read = min(_seconds(block.sum) for _ in range(repeats))
    gemm = min(_seconds(lambda: square @ square) for _ in range(repeats))
    return Rates(block.numel() * 4 / read, 2 * 1024**3 / gemm)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def stamp(command: str) -> dict[str, Any]:
    """Return what every recorded figure carries: device, commit, command, torch, threads, load and date."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    device = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "device": f"{device or platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "commit": commit(),
        "command": command,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": [round(each, 2) for each in os.getloadavg()],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def text_ids(tokenizer: Tokenizer, count: int) -> list[int]:
    """Return `count` token ids of real text: the sources of this package one after another, again from the start."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")))
    whole: list[int] = []
    for text in texts:
        whole += tokenizer.encode(text)
        if len(whole) >= count:
            break
    return (whole * -(-count // len(whole)))[:count]


def forget_files(folder: Path) -> None:
    """Ask the system to drop its copies of the files below a folder, so that the next read comes from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def kv_budget(config: ModelConfig, batch: int, context: int, *, layout: str = "float32") -> int:
    """Return pool bytes for `batch` sequences of `context` tokens that share nothing, without any for snapshots."""
    state = cost.state_bytes(config, layout=layout, draft=True, rewind=MAX_DRAFT)
    page = cost.page_bytes(config, tokens=cost.page_tokens(config), layout=layout)
    return batch * (sum(state.values()) + -(-context // cost.page_tokens(config)) * sum(page.values()))


def engine_rows(
    model: str | Path, *, contexts: Sequence[int], batches: Sequence[int], tokens: int = 64, **options: Any
) -> Iterator[dict[str, Any]]:
    """Measure one model and yield a row a figure: `prefill`, `decode`, `hit_ram` and `hit_ssd` at each context.

    `options` go to `LLM`. A row has tok/s, steps/s, GB/s and the share of the floor reached. Raises ConfigError for
    contexts or batches that are empty or not positive.
    """
    for name, values in (("contexts", contexts), ("batches", batches)):
        if not values or min(values) < 1:
            raise ConfigError(f"{name}={list(values)}: expected whole numbers >= 1")
    rates = measure_rates()
    marks = {"bench": "engine", "model": str(model)} | stamp(" ".join(["pelagos", *sys.argv[1:]]))
    marks |= {"read_gb_s": round(rates.read / 1e9, 2), "gemm_gflop_s": round(rates.gemm / 1e9, 1)}
    config, layout = ModelConfig.load(resolve_model(model)), LAYOUTS[options.get("mode", "reference")]
    memory = 2 * kv_budget(config, 1, max(contexts), layout=layout)  # with room for snapshots
    memory += 2 * kv_budget(config, max(batches), 1024, layout=layout)
    with tempfile.TemporaryDirectory() as folder:

        def load() -> LLM:
            return LLM(model, max_requests=max(batches), kv_bytes=memory, disk_dir=folder, **options)

        llm = load()
        ids = text_ids(llm.tokenizer, max(contexts) + TAIL_TOKENS * max(batches))
        first_token(llm.engine, ids[:300])  # warms up
        for context in sorted(contexts):
            for row in _frontier(llm, ids, context, batches, tokens, rates, layout):
                yield marks | row
        llm.close()
        for context in sorted(contexts):
            forget_files(Path(folder))
            llm = load()
            yield marks | _hit(llm.engine, "hit_ssd", ids, context)
            llm.close()


def _frontier(
    llm: LLM, ids: Sequence[int], context: int, batches: Iterable[int], tokens: int, rates: Rates, layout: str
) -> Iterator[dict[str, Any]]:
    """The rows of one context on a warm engine: what lies before the frontier is in its cache."""
    engine, config = llm.engine, llm.config
    element = element_bytes(llm)
    if context > PREFILL_TOKENS:
        first_token(engine, ids[: context - PREFILL_TOKENS])
    seconds, cached = first_token(engine, ids[:context], cuts=(context,))
    done = context - cached
    moved = cost.weights_read(config, done, element)
    flops = done * sum(cost.flops(config, context - done // 2).values())
    yield _row("prefill", context, 1, done / seconds, None, moved / seconds, rates.floor(moved, flops) / seconds)
    yield _hit(engine, "hit_ram", ids, context)
    for batch in batches:
        tails = [ids[context + i * TAIL_TOKENS :][:TAIL_TOKENS] for i in range(batch)]
        got = decode_window(engine, [[*ids[:context], *tail] for tail in tails], tokens=tokens)
        least = cost.decode_step(config, context, batch, layout, element)
        floor, moved = rates.floor(least.moved, least.flops) * got.steps_per_s, least.moved * got.steps_per_s
        row = _row("decode", context, batch, got.tokens_per_s, got.steps_per_s, moved, floor)
        yield row | {"acceptance": round(got.accepted / got.drafted, 3) if got.drafted else None}


def _row(
    case: str, context: int, batch: int, rate: float, steps: float | None, moved: float, floor: float
) -> dict[str, Any]:
    figures = {"tok_s": round(rate, 1), "steps_s": None if steps is None else round(steps, 2)}
    return {"case": case, "context": context, "batch": batch} | figures | {
        "gb_s": round(moved / 1e9, 2), "floor_frac": round(floor, 3),
    }  # fmt: skip


def _hit(engine: Engine, case: str, ids: Sequence[int], context: int) -> dict[str, Any]:
    """One more token behind a cached context: milliseconds to the first token."""
    seconds, cached = first_token(engine, [*ids[:context], ids[0]])
    return {"case": case, "context": context, "batch": 1, "first_token_ms": round(1e3 * seconds, 2), "cached": cached}
