"""`LocalEngine`: requests, scheduler, pools, caches and one model joined in a loop of steps.

One thread owns everything that changes; `submit`, `abort` and `cancel` only leave notes for it. A step plans, saves
what gives way, restores what comes in, runs one forward over all of it, picks, drafts, and keeps state where
a later prompt may start. A request's failure is its own; nothing it holds outlives it.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import itertools
import operator
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from pelagos.config import ModelConfig
from pelagos.engine.api import PROMPT_LOGPROB_TOKENS, EngineOptions, EngineStats, Stream, check_context
from pelagos.engine.disk import StatePolicy
from pelagos.engine.memory import MemoryPlan
from pelagos.engine.output import Decoder, TextStream
from pelagos.engine.pages import PagePool
from pelagos.engine.prefix import Cut, Match, PrefixCache
from pelagos.engine.runner import Forward
from pelagos.engine.sampler import Sampler, SamplingParams, token_logprobs
from pelagos.engine.scheduler import Admitted, Preempted, Request, Scheduler, Work
from pelagos.engine.speculation import AdaptiveDepth, Draft, DraftRequest, FixedDepth, MTPDrafter, Outcome
from pelagos.engine.tiers import Copy, Over, Parked, Tiers
from pelagos.errors import CapacityError, ConfigError, PelagosError, RequestError
from pelagos.kernels.layout import Drawn, Output, Span

FAR = 1 << 62  # a position no sequence reaches
DISK_POLL_SECONDS = 0.001
LINGER_SECONDS = 0.5
WRITE_PAGES = 64  # completed pages that are written to disk together while a long prompt runs
NO_TEXT: Any = SimpleNamespace(push=lambda _: "", flush=str)  # stands in where there is no tokenizer


@dataclass(eq=False, slots=True, kw_only=True)
class Live(Request):
    """A request with all the engine knows of it."""

    stream: Stream
    sampler: Sampler
    text: TextStream
    deadline: float = float("inf")
    stops: list[Cut] = field(default_factory=list)  # where chunks end because state is kept there, ascending
    exact: int = 0  # outputs of positions before this are not to be used
    published: int = 0  # pages the prefix cache knows
    written: int = 0  # pages queued for the disk
    table: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    parked: Parked | None = None
    load: Copy | None = None  # of its state, into its slot
    asked_disk: bool = False
    counted: bool = False
    prompt_logprobs: list[float | None] | None = None


class LocalEngine:
    """Serves requests with one model in this process; see `api.Engine` for what each method promises."""

    def __init__(
        self, config: ModelConfig, options: EngineOptions, *, tiers: Tiers, forward: Forward, plan: MemoryPlan,
        salt: bytes, decoder: Callable[[], Decoder] | None = None, disk_policy: StatePolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Join the parts; `salt` is what cached content must never be shared across."""
        self.config, self.plan = config, plan
        self.numeric_path = forward.numeric_path
        self._tiers, self._pools, self._disk = tiers, tiers.pools, tiers.disk
        self._forward, self._layout = forward, self._pools.layout
        self._decoder, self._clock, self._swap = decoder or (lambda: NO_TEXT), clock, options.preemption == "swap"
        self._pool = PagePool(plan.pages, plan.ranks)
        interval, drafts = max(512, options.chunk_tokens), self._layout.rewind
        self._counters = EngineStats()
        self._prefix = PrefixCache(
            self._pool, self._layout, salt=salt, state_bytes=plan.state_bytes, interval=interval, stats=self._counters
        )
        self._caches, self._policy = options.prefix_cache, disk_policy or StatePolicy("zero")
        self._packing: dict[bytes, int] = {}  # positions of states on their way to the prefix cache, by key
        window, draws = config.sliding_window, forward.draws
        self._drafter = MTPDrafter(forward.draft, window=window, max_depth=drafts, draws=draws) if drafts else None
        fixed = options.speculation is not True
        self._depth = FixedDepth(int(options.speculation)) if fixed else AdaptiveDepth(drafts)
        self._drafting = False  # this step, or it rests
        self._rest_s: float | None = None  # what the last step took if it rested
        self._two_kinds = forward.two_kinds
        self._scheduler = Scheduler(
            self._pool, slots=plan.slots, page_tokens=self._layout.page_tokens, chunk_tokens=options.chunk_tokens,
            match=self._match, next_stop=self._next_stop, save=self._set_aside, ranks=plan.ranks,
        )  # fmt: skip
        self._live: dict[str, Live] = {}
        self._inbox: deque[Live] = deque()
        self._aborts: deque[str] = deque()
        self._ids, self._process = itertools.count(1), os.getpid()
        self._wake = threading.Condition()
        self._closed = False
        self._threaded = options.threaded
        self._thread: threading.Thread | None = None  # there while there is work, and a little longer

    # What callers of any thread use.

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, user_id: str = "", priority: int = 0,
        timeout_s: float | None = None, cuts: Sequence[int] = (), on_step: Callable[[], None] | None = None,
    ) -> Stream:  # fmt: skip
        """Queue one prompt and return its stream at once; see `api.Engine.submit`."""
        kinds = (("params", params, SamplingParams), ("user_id", user_id, str), ("priority", priority, int))
        for name, value, kind in kinds:
            if not isinstance(value, kind):
                raise RequestError(f"{name}={value!r}: expected {kind.__name__}")
        if timeout_s is not None and not (isinstance(timeout_s, (int, float)) and timeout_s >= 0):
            raise RequestError(f"timeout_s={timeout_s!r}: expected seconds >= 0, or None for no limit")
        ids, cuts = _whole("prompt", prompt_ids), _whole("cuts", cuts)
        self._check(ids, params)
        number = next(self._ids)
        stream = Stream(f"req-{number}", on_step=on_step)
        request = Live(
            request_id=stream.request_id, tokens=ids, prompt_tokens=len(ids), user_id=user_id,
            chain=self._prefix.chain(user_id, ids if self._caches else ()), priority=priority, arrival=number,
            cuts=tuple(sorted({cut for cut in cuts if 0 < cut <= len(ids)})),
            reads_cache=self._caches and not params.prompt_logprobs,
            deadline=float("inf") if timeout_s is None else self._clock() + timeout_s,
            stream=stream, sampler=Sampler(params, self.config.vocab_size, ids),
            text=TextStream(self._decoder(), params, self.config.eos_token_id),
            prompt_logprobs=[None] if params.prompt_logprobs else None,
        )  # fmt: skip
        if os.getpid() != self._process:
            raise CapacityError(f"the engine belongs to process {self._process} and this is a fork: make another")
        with self._wake:
            if self._closed:
                raise CapacityError("the engine is closed and takes no more requests")
            self._inbox.append(request)
            if self._threaded and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                atexit.register(self.close)  # a thread inside a forward must not outlive the interpreter
                self._thread.start()
            self._wake.notify()
        return stream

    def fork(self, request_id: str, params: SamplingParams, *, on_step: Callable[[], None] | None = None) -> Stream:
        """Start a new request from the prompt and what was generated so far of a running one, sharing its pages.

        Raises RequestError for an unknown or ended request.
        """
        parent = self._live.get(request_id)
        if parent is None:
            raise RequestError(f"request {request_id!r} is not running: only a running request can be forked")
        return self.submit(
            list(parent.tokens), params, user_id=parent.user_id, priority=parent.priority, on_step=on_step
        )

    def abort(self, request_id: str) -> None:
        """End a request at the next step; an unknown id is ignored."""
        with self._wake:
            self._aborts.append(request_id)
            self._wake.notify()

    def stats(self) -> EngineStats:
        """Return a copy of the counters and of what is in use now."""
        held = self._scheduler
        return dataclasses.replace(
            self._counters,
            requests_running=len(held.running), requests_waiting=len(held.waiting) + len(self._inbox),
            pages_total=self._pool.count, pages_in_use=self._pool.in_use, pages_cached=self._pool.cached,
            slots_total=held.slots_total, slots_in_use=held.slots_in_use,
            evicted_pages=self._pool.evictions, host=self._tiers.stats() if self.plan.host_pages else {},
            disk={} if self._disk is None else self._disk.stats(), bytes_planned=self.plan.describe(),
        )  # fmt: skip

    def close(self) -> None:
        """Abort what runs, finish writes and end the thread; idempotent. Not for `on_step`, where it raises."""
        if os.getpid() != self._process:
            return  # a fork's: the threads are its parent's, and a lock may be held by one of them for ever
        with self._wake:
            if self._thread is threading.current_thread():
                raise ConfigError("close was called from on_step: the engine's thread cannot wait for its own end")
            if self._closed:
                return
            self._closed = True
            thread = self._thread
            self._wake.notify()
        if thread is not None:
            thread.join()
        self._end_all()
        self._tiers.close()
        if self._disk is not None:
            self._disk.close(timeout=30)

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        if not ids:
            raise RequestError("the prompt is empty: give at least one character or token id")
        vocab = self.config.vocab_size
        for position, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < vocab:
                raise RequestError(f"prompt[{position}]={token!r}: expected a token id from 0 to {vocab - 1}")
        check_context(self.config.max_position_embeddings, len(ids), params.max_tokens)
        if reason := self.plan.refuse(len(ids), params.max_tokens):
            raise CapacityError(reason)

    # The loop.

    def _run(self) -> None:
        with torch.inference_mode():
            while self._has_work():
                try:
                    computed = self.step()
                except Exception as error:  # a defect: whoever waits hears of it, and the engine goes on empty
                    for request in list(self._live.values()):
                        self._end(request, None, error)
                    continue
                if not computed:  # all wait for copies, the disk, or room
                    time.sleep(DISK_POLL_SECONDS)

    def _has_work(self) -> bool:
        """Wait a while for work; False when there is none or the engine closes, and the thread is to end."""
        with self._wake:
            if not (self._is_busy() or self._closed):
                self._wake.wait(LINGER_SECONDS)
            if self._closed or not self._is_busy():
                self._thread = None
                atexit.unregister(self.close)
                return False
            return True

    def _is_busy(self) -> bool:
        return bool(self._live or self._inbox or self._tiers.busy)

    def step(self) -> bool:
        """Run one step; whether anything was computed. Errors end the requests they belong to, never the engine."""
        started = self._clock()
        self._take_notes()
        plan = self._scheduler.plan()
        failed = {admitted.request for admitted in plan.admitted if not self._start(admitted)}
        works = [
            work for work in plan.works
            if work.request not in failed and work.request.slot >= 0 and not work.request.moving
        ]  # fmt: skip
        if not works:
            return False
        if self._drafter is not None:
            decoding = sum(work.request.computed + work.tokens >= work.request.prompt_tokens for work in works)
            self._drafting, self._rest_s = not self._depth.rests(decoding, self._rest_s), None
        spans = [self._span(work) for work in works]
        try:
            output = self._forward.forward(spans)
        except Exception as error:
            for work in works:
                self._end(_live(work.request), None, error)
            return True
        self._counters.steps += 1
        outcomes = self._take_output(works, spans, output)
        seconds = self._clock() - started
        if self._drafter is not None and not self._drafting and sum(work.tokens for work in works) == len(works):
            self._rest_s = seconds
        if self._drafter is not None and self._drafting:
            self._draft(self._drafter, outcomes, None if len(outcomes) < len(works) else seconds)
        if self._tiers.clean(self._pool, self._cleaned):
            self._scheduler.leaving += 1
        return True

    def _cleaned(self) -> None:
        self._scheduler.leaving -= 1

    def _take_notes(self) -> None:
        self._tiers.poll()
        aborted = {self._aborts.popleft() for _ in range(len(self._aborts))}  # of requests that are in the inbox by now
        while self._inbox:
            request = self._inbox.popleft()
            self._live[request.request_id] = request
            self._scheduler.add(request)
        now = self._clock()
        for request in list(self._live.values()):
            if request.stream.is_cancelled or request.request_id in aborted:
                self._end(request, "cancelled")
            elif request.deadline <= now:
                self._end(request, "deadline")

    def _match(self, request: Request) -> Match | None:
        """Find a waiting request's cached prefix; None while part of it is still being read from disk."""
        request = _live(request)
        if not request.reads_cache:
            request.stops = self._stops(request, Match())
            return Match()
        if request.fetch is not None:
            return None
        limit = min(len(request.tokens), self._shared(request)) - 1
        if any(at <= limit and request.chain.state_key(at) == key for key, at in self._packing.items()):
            return None
        below = self._tiers if self._tiers.has_any and not request.asked_disk else None
        match = self._prefix.match(request.chain, limit, below)
        if match.disk_resume:
            self._fetch(request, match)
            return None
        request.stops = self._stops(request, match)
        return match

    def _fetch(self, request: Live, match: Match) -> None:
        """Get pages for what lies below them of a request's prefix, and have it read."""
        request.asked_disk = True
        pages = sorted(self._pool.alloc(match.disk_pages) or [])
        keys = request.chain.keys[len(match.pages) : len(match.pages) + len(pages)]

        def absorb(count: int, state: memoryview | None) -> None:
            """Hand what came back to the prefix cache, and let go of the rest."""
            request.fetch = None
            for at, page in enumerate(pages[:count], len(match.pages)):
                self._pool.register(page, request.chain.keys[at])
            if state is not None and len(state) == self._layout.state_size(match.disk_resume):
                packed = np.frombuffer(state, np.uint8)
                self._prefix.add_state(request.chain, match.disk_resume, packed, anchor=True)
            self._pool.release([*match.pages, *pages][::-1])
            request.asked_disk = not 0 < count == len(fetch.blocks) < len(pages)  # the host had room for so many

        request.fetch = fetch = self._tiers.read(request.user_id, keys, match.disk_state, pages, absorb)

    def _shared(self, request: Live) -> int:
        """How many of a request's positions leave behind what others may use: all, or those of its prompt."""
        return request.prompt_tokens if self._two_kinds else FAR

    def _next_stop(self, request: Request) -> int:
        request = _live(request)
        while request.stops and request.stops[0].position <= request.computed:
            request.stops.pop(0)
        stop = request.stops[0].position if request.stops else FAR
        if request.computed < self._shared(request):
            stop = min(stop, self._shared(request))
        if request.prompt_logprobs is not None:
            scored = min(sum(each.prompt_logprobs is not None for each in self._live.values()), self.plan.slots)
            stop = min(stop, request.computed + max(1, PROMPT_LOGPROB_TOKENS // scored))
        return stop

    def _set_aside(self, preempted: Preempted) -> bool:
        """Copy out what a request held; False when that goes on."""
        request = _live(preempted.request)
        self._counters.preemptions += 1
        request.asked_disk = False
        pages = preempted.pages[: self._layout.pages_for(preempted.computed)]  # not those of rejected drafts alone
        # Else it is computed again; so is one on its way through a lost window, whose entries lie ahead of it.
        if not self._swap or preempted.computed < request.frozen:
            return True

        def over(error: BaseException | None) -> None:
            request.moving = False
            if error is not None:
                self._drop_parked(request)  # it is computed again
            self._scheduler.give_back(preempted)

        request.parked = self._tiers.park(preempted.slot, pages, over)
        request.moving = request.parked is not None
        if request.moving:
            request.swapped_at = preempted.computed
            self._counters.swaps += 1
        elif not self.plan.host_pages:  # what is still there of its pages is found again, and its state with it
            self._keep(request, preempted.computed, "interior")
        return not request.moving

    def _start(self, admitted: Admitted) -> bool:
        """Put an admitted request's state into its slot; False when that failed and the request has ended."""
        request, match = _live(admitted.request), admitted.match
        request.table = np.empty(0, np.int32)
        try:
            if match is None:
                assert request.parked is not None
                parked = request.parked, request.slot, request.pages
                self._load(
                    request, functools.partial(self._tiers.unpark, *parked), lambda _: self._scheduler.restart(request)
                )
                return True
            if match.state is None:
                self._pools.clear(request.slot)
            else:
                page = match.resume // self._layout.page_tokens
                opens = match.resume % self._layout.page_tokens and page >= len(match.pages)
                state = match.state, request.slot, request.pages[page] if opens else None, match.resume
                end = functools.partial(self._end, request, None)
                self._load(request, functools.partial(self._tiers.unpack, *state), end)
        except PelagosError as error:
            self._end(request, None, error)
            return False
        request.exact, request.published = match.exact, len(match.pages)
        if request.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        if not request.counted:
            request.counted = True
            request.stream.cached_tokens = min(match.resume, request.prompt_tokens)
            self._counters.prompt_tokens += request.prompt_tokens
            self._counters.computed_tokens += request.prompt_tokens - request.stream.cached_tokens
            self._prefix.record(match)
        return True

    def _load(
        self, request: Live, start: Callable[[Over], Copy | None], failed: Callable[[BaseException], None]
    ) -> None:
        """Start copying a request's state into its slot; it has no part in steps until that is over."""

        def over(error: BaseException | None) -> None:
            request.moving, request.load = False, None
            self._drop_parked(request)
            if error is not None:
                failed(error)

        request.moving = True
        load = start(over)
        request.load = load if request.moving else None

    def _stops(self, request: Live, match: Match) -> list[Cut]:
        """Where state is kept on the way through the tokens known now, for RAM and for the disk's policy."""
        if not self._caches:
            return []
        end = len(request.tokens)
        cuts = self._prefix.cuts(match, match.resume, end, prompt=request.prompt_tokens, marks=request.cuts)
        if self._disk is not None:
            known = {cut.position for cut in cuts}
            first = max(match.resume + 1, match.exact)
            marks = request.cuts or (request.prompt_tokens,)
            wanted = [p for p in self._policy.positions(match.resume, end, marks) if p >= first and p not in known]
            cuts = sorted([*cuts, *(Cut(position, False) for position in wanted)])
        return cuts

    def _span(self, work: Work) -> Span:
        request, count = _live(work.request), work.tokens
        start, known = request.computed, min(count, work.request.pending)
        tokens = request.tokens[start : start + known] + request.drafts[: count - known]
        if new := request.pages[request.table.size :]:
            request.table = np.concatenate((request.table, np.array(new, np.int32)))
        last = start + known == len(request.tokens)
        logits = 1 + count - known if last else 0
        if request.prompt_logprobs is not None and start < request.prompt_tokens:
            logits = count
        streams = 0
        if self._drafter is not None and self._drafting:
            near = self._drafter.window - (len(request.tokens) - start - known)  # older ones leave the draft's window
            streams = max(0, min(count, near))
        draws = None
        if self._forward.draws and logits and request.prompt_logprobs is None:
            draws = request.sampler.draws(len(request.tokens), logits)
        return Span(
            np.asarray(tokens, np.int64), start, request.slot, request.table, request.frozen, logits, streams,
            start >= request.prompt_tokens, draws or (),
        )  # fmt: skip

    def _take_output(self, works: list[Work], spans: list[Span], output: Output) -> list[Outcome]:
        """Pick from the logits, tell the streams, publish pages, keep state; how each decoding request fared."""
        row = stream = 0
        outcomes: list[Outcome] = []
        for index, (work, span) in enumerate(zip(works, spans, strict=True)):
            request = _live(work.request)
            rows = output.picks.get(index)
            if rows is None:
                rows, row = output.logits[row : row + span.logits], row + span.logits
            streams, stream = output.streams[stream : stream + span.streams], stream + span.streams
            before, known = request.computed, len(request.tokens)
            drafts, request.drafts = request.drafts, []
            request.computed = min(span.start + len(span.tokens), known)
            try:
                if isinstance(rows, np.ndarray):
                    rows = self._note_prompt(request, span, rows)
                if len(rows):
                    self._pick(request, drafts, rows)
                self._publish(request)
                self._keep_states(request, before)
            except Exception as error:  # its own, or its grammar's or its tokenizer's
                self._end(request, None, error)
                continue
            if before == known - 1 and self._drafting:
                outcomes.append(Outcome(request.request_id, len(drafts), request.tokens[known:]))
            if request.text.finish_reason is not None:
                self._keep(request, request.computed, "end")
                self._end(request, request.text.finish_reason)
            elif self._drafter is not None and len(streams):
                first = span.start + len(span.tokens) - len(streams)
                following = request.tokens[first + 1 : request.computed + 1]
                self._drafter.feed(request.request_id, first, following, streams[: len(following)])
        return outcomes

    def _draft(self, drafter: MTPDrafter, outcomes: list[Outcome], step_s: float | None) -> None:
        """Draft for the requests that decode in the next step, as deep as has paid so far."""
        self._depth.observe(outcomes, step_s)
        decoding = [
            each
            for each in self._live.values()
            # not a prompt's last token
            if each.slot >= 0 and each.pending == 1 and each.computed >= each.prompt_tokens and not each.moving
        ]
        if not decoding:
            return
        keys = [request.request_id for request in decoding]
        started, depths = self._clock(), self._depth.depths(keys)
        if not any(depths):
            self._depth.cut((), (), 0.0)
            return
        asked = [
            DraftRequest(key, each.slot, each.table, each.sampler, min(depth, each.text.left - 1), each.text.ends)
            for key, each, depth in zip(keys, decoding, depths, strict=True)
        ]
        drafts = drafter.draft(asked) if any(each.depth > 0 for each in asked) else [Draft()] * len(asked)
        counts = self._depth.cut(keys, drafts, self._clock() - started)
        for request, draft, count in zip(decoding, drafts, counts, strict=True):
            request.drafts = list(draft.tokens[:count])

    def _note_prompt(self, request: Live, span: Span, rows: np.ndarray) -> np.ndarray:
        """Score the prompt's own tokens where they were asked for; return the rows that are left to pick from."""
        if request.prompt_logprobs is None or span.start >= request.prompt_tokens:
            return rows
        end = span.start + len(span.tokens)
        targets = request.tokens[span.start + 1 : min(end + 1, request.prompt_tokens)]
        request.prompt_logprobs += token_logprobs(rows[: len(targets)], targets)
        if end < request.prompt_tokens:
            return rows[:0]
        request.stream.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        request.reads_cache = self._caches
        return rows[-1:]

    def _pick(self, request: Live, drafts: list[int], rows: np.ndarray | Sequence[Drawn]) -> None:
        """Pick while the drafts agree, give the steps to the stream, and take back what was computed beyond them."""
        position = len(request.tokens)
        picks = request.sampler.verify(rows, drafts, position, request.text.ends)
        steps = request.text.push(picks)
        tokens = [step.token_id for step in steps]
        agreed = min(len(picks) - 1, len(tokens))
        request.tokens += tokens
        request.computed = position + agreed
        if self._caches:
            request.chain.push(tokens)
        self._counters.generated_tokens += len(tokens)
        self._counters.drafted_tokens += len(drafts)
        self._counters.accepted_drafts += agreed
        request.stream.accepted_drafts += agreed
        for step in steps:
            request.stream.put(step)

    def _publish(self, request: Live) -> None:
        """Give completed pages to the prefix cache, and in bundles to the disk."""
        if not self._caches:
            return
        computed = min(request.computed, self._shared(request))
        complete = min(computed // self._layout.page_tokens, len(request.chain.keys))
        for page in range(request.published, complete):
            self._pool.register(request.pages[page], request.chain.keys[page])
        request.published = max(request.published, complete)
        if request.pending > 1 and complete - request.written >= WRITE_PAGES:  # a prompt that goes on
            self._write_pages(request)

    def _write_pages(self, request: Live) -> None:
        if self._disk is None or request.published <= request.written:
            return
        items = [(request.chain.keys[at], request.pages[at]) for at in range(request.written, request.published)]
        self._tiers.write(self._pool, request.user_id, items, request.written)
        request.written = request.published

    def _keep_states(self, request: Live, before: int) -> None:
        """Keep the state at the stops this step has reached, and while decoding at the intervals it has passed."""
        if not self._caches:
            return
        at = request.computed
        if request.stops and request.stops[0].position == at:
            kind = "cut" if at in (request.cuts or (request.prompt_tokens,)) else "interior"
            self._keep(request, at, kind, anchor=request.stops[0].anchor)
        elif before >= request.prompt_tokens:
            page = at // self._layout.page_tokens * self._layout.page_tokens
            if before < page <= at and (page % self._prefix.interval == 0 or self._policy.keeps(page, "interior")):
                self._keep(request, page, "interior", anchor=False)
        if self._disk is not None and at == request.prompt_tokens:
            self._write_pages(request)

    def _keep(self, request: Live, position: int, kind: str, *, anchor: bool = True) -> None:
        """Copy the state at `position` into RAM, and to the disk where its policy asks for it."""
        if not self._caches or not max(1, request.exact) <= position <= self._shared(request):
            return
        on_disk = self._disk is not None and self._policy.keeps(position, kind)
        if self._prefix.has_state(request.chain, position) and not on_disk:
            return
        page, inside = divmod(position, self._layout.page_tokens)
        key, node, chain = request.chain.state_key(position), request.chain.node_key(page), request.chain

        def write(packed: np.ndarray) -> None:
            if self._disk is not None and on_disk:
                self._disk.write_state(request.user_id, node, inside, key, position, packed.data)

        def add(packed: np.ndarray | None) -> None:
            self._packing.pop(key, None)
            if packed is not None:
                self._prefix.add_state(chain, position, packed, anchor=anchor)

        self._packing[key] = position
        self._tiers.pack(request.slot, request.pages[page] if inside else None, position, write, add)

    def _end(self, request: Live, reason: str | None, error: BaseException | None = None) -> None:
        """Take a request out, free all it holds, and close its stream."""
        if self._live.pop(request.request_id, None) is None:
            return
        if request.slot >= 0 and error is None and request.parked is None:  # else its pages are still on their way in
            self._write_pages(request)
        if request.fetch is not None:
            request.fetch.cancel()  # what is read into is freed when the reader has let go of it
        if request.load is not None:
            request.load.stop()
        self._scheduler.remove(request)
        if self._caches:
            self._prefix.finish(request.chain, request.cuts[-1] if request.cuts else request.prompt_tokens)
        self._drop_parked(request)
        self._counters.requests_done += 1
        if self._drafter is not None:
            self._drafter.forget(request.request_id)
            self._depth.forget(request.request_id)
        request.stream.close(reason, error)

    def _drop_parked(self, request: Live) -> None:
        if request.parked is not None:
            self._tiers.drop(request.parked)
        request.parked, request.swapped_at = None, 0

    def _end_all(self) -> None:
        self._take_notes()
        for request in list(self._live.values()):
            self._end(request, "cancelled")
        self._tiers.drain()
        self._take_notes()


def _whole(name: str, values: Sequence[int]) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise RequestError(f"{name}: expected a sequence of whole numbers ({error})") from None


def _live(request: Request) -> Live:
    assert isinstance(request, Live)
    return request
