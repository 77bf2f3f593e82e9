"""What a server sees of the engine: submit a prompt, read a stream of steps, abort, ask for statistics.

`Engine` is a protocol; `LocalEngine` runs a model, a scripted one serves tests. Everything above this floor uses
these names and nothing else of the engine.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from pelagos.engine.sampler import SamplingParams
from pelagos.errors import ConfigError, ContextLengthError

CANCEL_POLL_SECONDS = 0.02
PROMPT_LOGPROB_TOKENS = 128  # rows of logits held at once for prompt_logprobs, of all requests
MAX_DRAFT = 4  # drafted tokens a step may verify; state slots have room to take as many back


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How an engine serves; a value that means nothing raises ConfigError.

    chunk_tokens: tokens one step computes at most; max_requests: sequences in memory at once; kv_bytes: memory of
    the caches (None: a share of what is free); host_kv_bytes: of a tier in host memory behind them (None: where the
    device has memory of its own, half as much). disk_dir: where prefixes outlive the process, with `disk_policy`
    full, periodic(P), zero or turns, at most disk_bytes, and user_disk_bytes of one user. exact: bit-identical logits
    whatever the batch (None: where the host's library can keep them, with a warning where not; True insists; on CUDA in
    released mode they always are). speculation: draft with MTP as deep as pays, or always that deep. native: the
    compiled helper (None: where it can run). preemption: swap, which needs a tier in host memory (without one it is
    recompute, from a state in the prefix cache), or recompute. threaded: steps run on a thread of the engine's own;
    without it the caller calls `step`.
    """

    chunk_tokens: int = 512
    max_requests: int = 16
    kv_bytes: int | None = None
    host_kv_bytes: int | None = None
    prefix_cache: bool = True
    disk_dir: str | Path | None = None
    disk_policy: str = "turns"
    disk_bytes: int = 8 << 30
    user_disk_bytes: int | None = None
    speculation: bool | int = True
    exact: bool | None = None
    native: bool | None = None
    preemption: str = "swap"
    threaded: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_requests", 1), ("chunk_tokens", 1), ("kv_bytes", 0), ("host_kv_bytes", 0)):
            value = getattr(self, name)
            if (type(value) is not int or value < least) and (least or value is not None):
                raise ConfigError(f"{name}={value!r}: expected a whole number >= {least}")
        if self.preemption not in ("swap", "recompute"):
            raise ConfigError(f"preemption={self.preemption!r}: expected swap or recompute")
        if type(self.speculation) not in (bool, int) or not 0 <= self.speculation <= MAX_DRAFT:
            raise ConfigError(f"speculation={self.speculation!r}: expected true, false or a depth to {MAX_DRAFT}")
        for name, also in (("prefix_cache", False), ("threaded", False), ("exact", None), ("native", None)):
            if type(value := getattr(self, name)) is not bool and value is not also:
                raise ConfigError(f"{name}={value!r}: expected true or false")
        if not isinstance(self.disk_dir, (str, Path, type(None))):
            raise ConfigError(f"disk_dir={self.disk_dir!r}: expected a directory's name")
        if self.disk_dir is not None and not self.prefix_cache:
            raise ConfigError("disk_dir is given with prefix_cache=False: the disk holds prefixes, so switch it on")
        if self.host_kv_bytes and not self.keeps:
            raise ConfigError(
                f"host_kv_bytes={self.host_kv_bytes:,} with prefix_cache=False and preemption=recompute: nothing would "
                "be kept there; leave it out, or switch one of them on"
            )

    @property
    def keeps(self) -> bool:
        """Whether anything is kept of sequences that do not run."""
        return self.prefix_cache or self.preemption == "swap"


class Step(NamedTuple):
    """One generated token: its id, the text it makes certain, its log-probability, and on the last one why it ended.

    finish_reason is None except on the last step: `stop` (end token, stop id or stop string) or `length`. A stream
    that is aborted or runs out of time ends without a last step. `top_logprobs` holds (token id, log-probability) of
    the most likely tokens where they were asked for.
    """

    token_id: int
    text: str
    logprob: float
    finish_reason: str | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Stream:
    """The steps of one request as they come; iterate it in one thread, `cancel` from any.

    `finish_reason` is None while it runs, then `stop`, `length`, `cancelled` or `deadline`, or None still if it ended
    with an error, which reading raises. cached_tokens is how many prompt tokens were not computed again,
    accepted_drafts how many generated tokens came from a draft.
    """

    def __init__(self, request_id: str, *, on_step: Callable[[], None] | None = None) -> None:
        """`on_step` is called from the engine's thread after anything is put into the stream.

        Should it raise, nobody is there any more: the request is cancelled, and reading the stream raises the error.
        """
        self.request_id = request_id
        self.finish_reason: str | None = None
        self.cached_tokens = 0
        self.accepted_drafts = 0
        self.prompt_logprobs: list[float | None] | None = None
        self._steps: queue.SimpleQueue[Step | BaseException | None] = queue.SimpleQueue()
        self._on_step = on_step
        self._cancelled = threading.Event()
        self.is_ended = False  # the last step has been read and nothing follows

    def cancel(self) -> None:
        """Ask the engine to end this request at its next step; idempotent, returns at once."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def close(self, reason: str | None, error: BaseException | None = None) -> None:
        """End the stream with a reason or an error, which iteration raises (the engine's side)."""
        self.finish_reason = reason
        self.put(error)

    def put(self, item: Step | BaseException | None) -> None:
        """Append a step, or what reading ends with (the engine's side)."""
        self._steps.put(item)
        try:
            if self._on_step is not None:
                self._on_step()
        except Exception as error:
            self._on_step = None
            self._steps.put(error)
            self.cancel()

    def wait(self, timeout: float | None = None) -> Step | None:
        """Return the next step; None when none came in `timeout` seconds (None: no limit) or the stream has ended.

        Raises the error that ended the request.
        """
        if self.is_ended:
            return None
        try:
            item = self._steps.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, Step):
            return item
        self.is_ended = True
        if item is not None:
            raise item
        return None

    def __iter__(self) -> Iterator[Step]:
        while (step := self.wait()) is not None:
            yield step


class StepReader(Iterator[Step]):
    """Reads a stream until it ends or `cancel` is set; a stream that nobody reads any more is cancelled."""

    def __init__(self, stream: Stream, cancel: threading.Event | None) -> None:
        self._stream, self._cancel = stream, cancel

    def __next__(self) -> Step:
        while not self._stream.is_ended and not (self._cancel is not None and self._cancel.is_set()):
            step = self._stream.wait(None if self._cancel is None else CANCEL_POLL_SECONDS)
            if step is not None:
                return step
        self._stream.cancel()
        raise StopIteration

    def __del__(self) -> None:
        self._stream.cancel()


@dataclass(slots=True)
class EngineStats:
    """Counters since the start, and what is in use now; bytes are of tensors and buffers, exact."""

    requests_running: int = 0
    requests_waiting: int = 0
    requests_done: int = 0
    preemptions: int = 0
    swaps: int = 0  # preemptions whose state was copied out; the others compute it again
    steps: int = 0
    prompt_tokens: int = 0  # of admitted requests
    computed_tokens: int = 0  # prompt tokens that went through the model, recomputed window tails included
    hit_tokens: int = 0  # prompt tokens whose compressed entries were there already
    cached_tokens: int = 0  # prompt tokens that did not go through the model
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_drafts: int = 0
    pages_total: int = 0
    pages_in_use: int = 0  # held by requests; cached pages nobody holds are not in use
    pages_cached: int = 0
    slots_total: int = 0
    slots_in_use: int = 0
    states_cached: int = 0
    state_bytes_cached: int = 0
    evicted_pages: int = 0
    evicted_states: int = 0
    host: dict[str, int] = field(default_factory=dict)  # see `Tiers.stats`
    disk: dict[str, int] = field(default_factory=dict)  # hits, misses, written, damaged, dropped, evicted, bytes
    bytes_planned: dict[str, int] = field(default_factory=dict)


def check_context(limit: int, prompt: int, completion: int) -> None:
    """Raise ContextLengthError, in the words of DeepSeek's API, where both are together more than `limit` tokens."""
    if prompt + completion > limit:
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens. However, you requested {prompt + completion} "
            f"tokens ({prompt} in the messages, {completion} in the completion). Please reduce the length of the "
            "messages or completion."
        )


class Engine(Protocol):
    """A source of completions that many requests share."""

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, user_id: str = "", priority: int = 0,
        timeout_s: float | None = None, cuts: Sequence[int] = (), on_step: Callable[[], None] | None = None,
    ) -> Stream:  # fmt: skip
        """Queue one prompt and return its stream at once.

        Higher `priority` goes first; after `timeout_s` the stream ends with `deadline`. `user_id` isolates cached
        prefixes. `cuts` are prompt lengths at which a later prompt is likely to part from this one (the end of the
        messages before the generation suffix): state is kept there. Raises RequestError for a bad prompt,
        ContextLengthError beyond the model's positions, CapacityError for what never fits this engine's memory.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request and free what it holds at the next step; an unknown id is ignored."""
        ...

    def stats(self) -> EngineStats:
        """Return a copy of the counters; those of a step that is under way may be ahead of others."""
        ...

    def close(self) -> None:
        """Abort what runs, finish writes and end the engine's threads; further submits raise CapacityError."""
        ...
