"""Speculative decoding: who drafts tokens, and how many of them are worth verifying.

A draft never changes the output: the sampler's noise belongs to a position, so the target picks the same token
whether it was drafted or not. The drafter picks with the same noise and so agrees often.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pelagos.engine.sampler import Sampler
from pelagos.kernels.layout import Output, Span

_CAUGHT_UP = 32
# How often drafts agree: remembered observations, the weight of a guess in them, the guess before the first.
_MEMORY, _OWN_MEMORY, _GUESS_WEIGHT, _FIRST_GUESS, _BINS = 400, 150, 12.0, 0.6, 8
# Seconds: the share a new sample has, more after so many steps without any, and that of it in all entries; the first
# samples, of which the least counts; entries for each doubling of a step with drafts.
_LEARN, _STALE, _DRIFT, _FIRST, _CLASSES = 0.1, 24, 0.03, 4, 3
# A new plan or a probe holds for three steps, one may catch up; an unchanged one twice as long each time, to a limit;
# a probe out of a rest comes after eight steps of which we are told; after so many steps with drafts, more where there
# is much to gain, a short rest renews what plain steps take: up to 19 steps, 51 at first, fewer where there is much
# to gain.
_PROBE_STEPS, _PLAN_STEPS, _LOOK_STEPS, _FIRST_LOOK_STEPS, _LONGEST, _PLAIN_EVERY = 3, 8, 16, 48, 256, 64
# Drafts are made where they are expected to give this many times the tokens a second: less than that is noise.
_GAIN = 1.1
# The share of all steps that probes may cost, and of a batch's own that drafting may lose against plain ones; how many
# steps more it may lose at the start, or after having gained as much; a probe goes deeper for one request in so many; a
# draft that had to catch up counts as so many steps at most. Losses are counted in plain steps of the batch that had
# them and held against these alone: what all batches together may lose, one that is seldom seen would spend at once.
_SHARE, _START, _CREDIT, _PROBE_PART, _CATCH_UP = 0.004, 1, 8, 4, 6


class Draft(NamedTuple):
    """Drafted tokens, and the drafter's own chance for each that it is accepted if those before it are."""

    tokens: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()


class DraftRequest(NamedTuple):
    """Whom to draft for: at most `depth` tokens that follow the last one fed, up to one of `ends`."""

    key: str
    slot: int
    pages: np.ndarray
    sampler: Sampler
    depth: int
    ends: AbstractSet[int] = frozenset()


@dataclass(slots=True)
class _Fed:
    """What was fed and not yet run through the draft layer: consecutive positions that end before `end`."""

    end: int
    following: deque[int]
    streams: deque[np.ndarray]  # (n, D) each


class MTPDrafter:
    """Drafts with the MTP block: all requests at once, depth by depth.

    Depth 1 runs over all positions fed since the last draft, which leaves the draft layer's window as if it had run
    at each step; a deeper one goes on from the block's own streams. Later positions are overwritten when fed. `window`
    is how many of a sequence's last streams it can use: spans need ask for no more.
    """

    def __init__(
        self, block: Callable[[Sequence[Span], np.ndarray], Output], *, window: int, max_depth: int, draws: bool = False
    ) -> None:
        """`block`: a forward's `draft`; `window`: its layer's sliding window; max_depth: at most the layout's `rewind`.

        At most _CAUGHT_UP rows are caught up on: on nano as many drafts are accepted as with all 128, for a quarter of
        the seconds; older rows of the window then hold what was there.
        """
        self.window = min(window, _CAUGHT_UP)
        self.max_depth = max_depth
        self._block, self._draws = block, draws
        self._fed: dict[str, _Fed] = {}

    def feed(self, key: str, start: int, following: Sequence[int], streams: np.ndarray) -> None:
        """Hand over what the backbone left at positions start.. of a request, computed and accepted.

        `following` are the S tokens at start + 1.., the last one picked but not computed; streams (S, n, D) stay as
        they are. A start that does not follow the last position begins anew.
        """
        fed = self._fed.get(key)
        if fed is None or fed.end != start:
            fed = self._fed[key] = _Fed(start, deque(maxlen=self.window), deque(maxlen=self.window))
        fed.end = start + len(following)
        fed.following.extend(following)
        fed.streams.extend(streams[-self.window :])

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Return a draft for each request, shorter than its depth or empty where there is nothing to go on."""
        tokens: list[list[int]] = [[] for _ in requests]
        chances: list[list[float]] = [[] for _ in requests]
        accepted = [0] * len(requests)
        spans: dict[int, tuple[Span, np.ndarray]] = {}  # by index of request, with its streams
        for index, request in enumerate(requests):
            fed = self._fed.get(request.key)
            if fed is not None and fed.following and request.depth > 0:
                following = np.array(fed.following, np.int64)
                spans[index] = self._span(request, following, fed.end), np.stack(list(fed.streams))
                fed.following.clear()
                fed.streams.clear()
        while spans:
            out = self._block([span for span, _ in spans.values()], np.concatenate([s for _, s in spans.values()]))
            deeper: dict[int, tuple[Span, np.ndarray]] = {}
            rows = iter(out.logits)
            for row, (index, (span, _)) in enumerate(spans.items()):
                request, end = requests[index], span.start + len(span.tokens)
                try:
                    drawn = out.picks.get(row)
                    pick = drawn[0] if drawn else request.sampler.peek(next(rows), end + 1)
                except Exception:  # a grammar that ends here; verification asks it again, should it come so far
                    continue
                if pick.token < 0:
                    continue
                tokens[index].append(pick.token)
                chances[index].append(float(np.exp(pick.logprob)))
                if len(tokens[index]) < min(request.depth, self.max_depth) and pick.token not in request.ends:
                    request.sampler.accept(pick.token)
                    accepted[index] += 1
                    following = np.array([pick.token], np.int64)
                    deeper[index] = self._span(request, following, end + 1), out.streams[row : row + 1]
            spans = deeper
        for request, count in zip(requests, accepted, strict=True):
            request.sampler.rollback(count)
        return [Draft(tuple(drafted), tuple(chance)) for drafted, chance in zip(tokens, chances, strict=True)]

    def _span(self, request: DraftRequest, following: np.ndarray, end: int) -> Span:
        draws = request.sampler.draws(end + 1, 1) if self._draws else None
        return Span(following, end - len(following), request.slot, request.pages, streams=1, draws=draws or ())

    def forget(self, key: str) -> None:
        """Drop what is kept of a request: it ended, or its slot was given away."""
        self._fed.pop(key, None)


class Outcome(NamedTuple):
    """How one decoding request fared in a step: how many of its drafts were in the forward, and the tokens picked."""

    key: str
    verified: int
    picked: Sequence[int]


class FixedDepth:
    """Always drafts and verifies `depth` tokens: for tests and measurements."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def rests(self, requests: int, last: float | None) -> bool:
        """Never."""
        return False

    def depths(self, keys: Sequence[str]) -> list[int]:
        """The same for all."""
        return [self.depth] * len(keys)

    def cut(self, keys: Sequence[str], drafts: Sequence[Draft], seconds: float) -> list[int]:
        """All that was drafted."""
        return [len(draft.tokens) for draft in drafts]

    def observe(self, outcomes: Sequence[Outcome], seconds: float | None) -> None:
        """Nothing to learn."""

    def forget(self, key: str) -> None:
        """Nothing is kept."""


class _Rate:
    """A running share of successes that forgets; with few samples it leans on a guess."""

    __slots__ = ("_keep", "count", "successes")

    def __init__(self, memory: float) -> None:
        self.successes = self.count = 0.0
        self._keep = 1 - 1 / memory

    def add(self, success: bool) -> None:
        self.successes = self.successes * self._keep + success
        self.count = self.count * self._keep + 1

    def value(self, guess: float) -> float:
        return (self.successes + _GUESS_WEIGHT * guess) / (self.count + _GUESS_WEIGHT)


class _StepSeconds:
    """Seconds of a step by its number of tokens, a small table that forgets.

    Steps with drafts share entries with those of about their size. All entries share a scale that follows what the
    last steps took, so those not visited for long keep their ratio to the others as contexts grow or the machine gets
    busy. A size never seen is guessed on the bright side.
    """

    def __init__(self) -> None:
        self._scale = 1.0
        self._seen: dict[tuple[int, bool], list[float]] = {}  # (size class, plain): mean size, seconds / scale,
        self._steps = 0  # samples, and the step of the last

    def add(self, size: int, plain: bool, seconds: float) -> float:
        """Take in a step's seconds and return what steps like it take, which no outlier moves far."""
        key = (size if plain else int(_CLASSES * math.log2(size)), plain)
        entry = self._seen.setdefault(key, [size, math.inf, 0, 0])
        mean, old, samples, last = entry
        self._steps += 1
        if self._steps - last > _STALE:
            samples = min(samples, _FIRST)
        entry[2:] = samples + 1, self._steps
        if samples < _FIRST:  # slow for other reasons, perhaps; too low a guess is corrected by what follows from it
            entry[1] = min(old, max(seconds, 1e-9) / self._scale)
        else:
            ratio = min(max(seconds / (old * self._scale), 0.6), 1.6)
            self._scale *= ratio**_DRIFT
            entry[1] = old * ratio ** (max(_LEARN, 1 / (samples - _FIRST + 2)) - _DRIFT)
        entry[0] = mean + (size - mean) * max(_LEARN, 1 / (samples + 1))
        return entry[1] * self._scale

    def table(self, first: int, count: int) -> np.ndarray | None:
        """Return seconds of first, first + 1, .. tokens, (count,), None before any sample.

        The first one's own time counts where steps without drafts were seen; between known sizes linear; below the
        smallest in proportion; above the largest the mean slope goes on.
        """
        if not self._seen:
            return None
        known = sorted(self._seen.values())
        places = np.array([0.0, *(entry[0] for entry in known)])
        seconds = np.maximum.accumulate([0.0, *(entry[1] for entry in known)])
        slope = (seconds[-1] - seconds[1]) / max(places[-1] - places[1], 1.0)
        sizes = np.arange(first, first + count)
        guess = np.interp(sizes, places, seconds) + np.maximum(0, sizes - places[-1]) * slope
        if (first, True) in self._seen:
            guess[0] = self._seen[first, True][1]
        return guess * self._scale


class _DraftSeconds:
    """Seconds of drafting as calls x a + tokens x b, by least squares that forget."""

    def __init__(self) -> None:
        self._moments = np.zeros((2, 3))  # weighted sums of (calls, tokens) x (calls, tokens, seconds)
        self._samples, self._least = 0, math.inf  # the least seconds of a call or token so far

    def add(self, calls: int, tokens: int, seconds: float) -> float:
        """Take in a draft's seconds and return what drafts like it take, which no outlier moves far."""
        if self._samples < _FIRST:
            self._least = min(self._least, seconds / (calls + tokens))
            seconds = self._least * (calls + tokens)
        else:
            guess = float(self.of(np.array([calls]), np.array([tokens]))[0])
            seconds = min(max(seconds, 0.6 * guess), 1.6 * guess)
        self._samples += 1
        size = np.array([calls, tokens], float)
        self._moments = self._moments * (1 - _LEARN) + np.outer(size, [*size, seconds])
        return seconds

    def of(self, calls: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return seconds for calls (N,) and tokens (N,); 0 before any sample."""
        square = self._moments[:, :2] + 1e-3 * np.eye(2)
        a, b = np.linalg.solve(square, self._moments[:, 2])
        if min(a, b) < 0:  # noise along a direction that was hardly varied: one of the two explains all
            trace = np.diag(square)
            a, b = (0.0, self._moments[1, 2] / trace[1]) if a < b else (self._moments[0, 2] / trace[0], 0.0)
        return a * calls + b * tokens


@dataclass(slots=True)
class _Plain:
    """The seconds of a step without drafts, the steps with drafts since, and after how many to look again.

    `seen`: the seconds are a rest's, not a guess from before any.
    """

    seconds: float
    drafted: int = 0
    seen: bool = False
    look_after: int = _PLAN_STEPS


class AdaptiveDepth:
    """Chooses how many tokens to draft and verify for each request, to get the most tokens a second.

    It keeps how often drafts of a depth agree (by request, leaning on all requests), what the drafter's confidence
    was worth, and the seconds of drafting and of steps by their tokens. Steps that are not the best known choice are
    probes, which together may cost a small share of the time; and when drafting has lost more than that against plain
    steps, for whatever reason, it rests. A function of what it was told: it reads no clock.
    Each step: `rests`, and where it does not `depths`, then `cut` of what was drafted, then `observe`.
    """

    def __init__(self, max_depth: int) -> None:
        """`max_depth` is the drafter's."""
        self.max_depth = max_depth
        self._agreed = [_Rate(_MEMORY) for _ in range(max_depth)]
        self._own: dict[str, list[_Rate]] = {}
        self._worth = [[_Rate(_MEMORY) for _ in range(_BINS)] for _ in range(max_depth)]
        self._step_seconds, self._draft_seconds = _StepSeconds(), _DraftSeconds()
        self._plan: list[int] = []
        self._planned_for: list[str] = []
        self._times: np.ndarray | None = None  # of a step by drafts verified, as the plan saw it
        self._worths: list[list[float]] = []  # of a draft by depth and confidence, as the plan saw it
        self._prices: list[float] = []  # in tokens, of a step by drafts verified
        self._pace = self._gain = 0.0  # tokens a second that the plan expects; what part of those without drafts more
        self._hold = self._left = 0  # steps the plan holds: in all, from now on
        self._probes: list[int] | None = None  # the depths of a running probe
        self._turn = 0  # probes so far
        self._loss = _CATCH_UP / 2  # what the last probe cost; the first will have something to catch up on
        self._rests: dict[int, int] = {}  # steps without a thought of drafts that are left, by requests
        self._resting_for = 0  # requests of the last step
        self._rested: list[float] = []  # what its steps in a rest took
        self._told = 0  # steps since the last rest
        self._plain: dict[int, _Plain] = {}  # what a step takes in a rest, by requests
        self._spent = 0.0  # in plain steps: lost by probes; and by requests, all there were and those lost by drafting
        self._elapsed, self._debt = defaultdict[int, float](float), defaultdict[int, float](float)
        self._made: dict[str, Draft] = {}  # for the coming step
        self._draft_s = 0.0  # what these took
        self._drafted: frozenset[str] = frozenset()  # for whom the last step drafted: they have nothing to catch up

    def rests(self, requests: int, last: float | None) -> bool:
        """Whether the coming step, which leaves so many requests that decode, neither drafts for them nor has anything
        to tell: asked once a step.

        `last` is what the last step took, None where it rested not or did other work too. A rest is of a number of
        requests, whoever they are: it goes on when there are as many again.
        """
        if last is not None:
            self._rested.append(last)
        if requests != self._resting_for:
            self._note_rest()
            self._resting_for = requests
        left = self._rests.get(requests, 0)
        self._rests[requests] = max(0, left - 1)
        return left > 1

    def _note_rest(self) -> None:
        """Learn what a step takes in a rest: other work only ever makes it longer."""
        self._elapsed[self._resting_for] += len(self._rested)
        if len(self._rested) > 1:
            late = self._rested[len(self._rested) // 2 :]  # drafts have left the processor's caches
            seconds = max(statistics.median(late), 1e-9)
            plain = self._plain.setdefault(self._resting_for, _Plain(seconds))
            ratio = min(max(seconds / plain.seconds, 0.25), 4.0)
            plain.seconds *= ratio ** (len(late) / (len(late) + _LOOK_STEPS) if plain.seen and ratio > 1 else 1.0)
            plain.seen = True
        self._rested.clear()

    def _plain_s(self) -> float:
        """Return the seconds of a step without a thought of drafts for the requests of the plan."""
        assert self._times is not None
        known = self._plain.get(len(self._planned_for))
        return float(self._times[0]) if known is None else known.seconds

    def depths(self, keys: Sequence[str]) -> list[int]:
        """Return how many tokens to draft for each decoding request of the coming step."""
        self._told += 1
        if not self._left or self._planned_for != list(keys):
            self._planned_for, last = list(keys), self._plan
            self._plan, self._probes = self._best(keys), None
            if self._times is None:
                return self._plan
            if self._debt[len(keys)] > _SHARE * self._elapsed[len(keys)] + _START:
                self._plan = [0] * len(keys)  # whatever the estimates say, it did not pay
            self._choose(last)
        self._left -= 1
        return self._probes or self._plan

    def _choose(self, last: list[int]) -> None:
        """Set for how long the new plan holds and what comes of it now: a probe, a rest, or itself."""
        drafts, batch, before = any(self._plan), len(self._plan), self._hold
        unchanged = self._plan == last if drafts else not any(last)
        if drafts and not any(last):  # what pays for some is worth a look for other numbers of requests
            self._rests.clear()
        self._left = self._hold = min(max(2 * before, _PLAN_STEPS), _LONGEST) if unchanged else _PROBE_STEPS
        plain = self._plain.get(batch)
        if drafts and (plain is None or plain.drafted >= plain.look_after):
            self._probes = [0] * batch  # what plain steps take comes first
            if plain is None:  # what we were told, should there be no rest without other work
                plain = self._plain[batch] = _Plain(max(self._plain_s(), 1e-9), look_after=_PLAN_STEPS // 2)
            plain.drafted = 0
            plain.look_after = min(2 * plain.look_after, int(_PLAIN_EVERY * (1 + 4 * self._gain)))
            look = _LOOK_STEPS if plain.seen else _FIRST_LOOK_STEPS
            self._rest_for(int(look / (1 + 8 * self._gain)) + _PROBE_STEPS)
        elif (drafts or self._told >= _PLAN_STEPS) and (probes := self._probe()):
            self._probes, self._left = probes, _PROBE_STEPS
            self._hold = _PROBE_STEPS if drafts else before  # it leads back to the rest it came from
        elif not drafts and self._told < _PLAN_STEPS and self._affordable():
            self._left = _PLAN_STEPS - self._told  # something for the draft layer to go on from
        elif not drafts:
            self._rest_for(self._hold)

    def _rest_for(self, steps: int) -> None:
        self._rests[len(self._plan)], self._left, self._told = steps, 1, 0

    def _affordable(self) -> bool:
        return self._spent + max(self._loss, 0.0) <= _SHARE * sum(self._elapsed.values())

    def _best(self, keys: Sequence[str]) -> list[int]:
        """Return the depths with the most expected tokens a second, if only the confident drafts are verified."""
        batch, depths = len(keys), [0] * len(keys)
        self._times = self._step_seconds.table(batch, 1 + self.max_depth * batch)
        if self._times is None or not batch or not self.max_depth:
            return depths  # the first step of all shows what one without drafts takes
        guesses = self._guesses()
        passes = self._gate(guesses)
        chances = []
        for at, key in enumerate(keys):
            chance, own = 1.0, self._own.get(key)
            for depth, (guess, (_, kept)) in enumerate(zip(guesses, passes, strict=True)):
                chance *= kept * (guess if own is None else own[depth].value(guess))
                chances.append((-chance, depth, at))
        chances.sort()  # a request's own stay in order: they fall with depth
        order = [depth for _, depth, _ in chances]
        tokens = batch + np.cumsum([0.0, *(-chance for chance, _, _ in chances)])
        shares = np.cumprod([share for share, _ in passes])
        verified = np.cumsum([0.0, *shares[order]])
        self._note_rest()
        seconds = np.interp(verified, np.arange(self._times.size), self._times)
        seconds[0] = self._plain_s()
        seconds += self._draft_seconds.of(
            np.maximum.accumulate([0, *(1 + depth for depth in order)]), np.arange(verified.size)
        )
        paces = tokens / seconds
        best = int(paces.argmax())
        if paces[best] < _GAIN * paces[0]:
            best = 0
        self._pace, self._gain = float(paces[best]), float(paces[best] / paces[0]) - 1
        self._prices = (self._pace * self._times).tolist()
        for _, _, at in chances[:best]:
            depths[at] += 1
        return depths

    def _guesses(self) -> list[float]:
        """Return the chance of each depth, if those before it agree, up to one deeper than any was tried."""
        guess, guesses = _FIRST_GUESS, []
        for rate in self._agreed:
            guess = rate.value(guess)
            guesses.append(guess)
            if not rate.count:
                break
        return guesses

    def _gate(self, guesses: list[float]) -> list[tuple[float, float]]:
        """Set what a draft of each depth and confidence is worth; return the share of drafts `cut` will verify.

        With each share goes the part of the accepted ones that are among them.
        """
        assert self._times is not None
        batch = len(self._planned_for)
        price = self._pace * float(self._times[batch] - self._times[0]) / batch  # of verifying a token, in tokens
        self._worths, passes = [], []
        for guess, rates in zip(guesses, self._worth, strict=False):
            values = [rate.value(guess) for rate in rates]
            counts = [rate.count + 1e-6 for rate in rates]
            kept = [count if value > price else 0.0 for value, count in zip(values, counts, strict=True)]
            good = [value * count for value, count in zip(values, kept, strict=True)]
            every = sum(value * count for value, count in zip(values, counts, strict=True))
            passes.append((sum(kept) / sum(counts), sum(good) / every))
            self._worths.append(values)
        return passes

    def _probe(self) -> list[int] | None:
        """Return the depths of a probe if one can be afforded: some requests deeper."""
        probes = self._plan.copy()
        some = len(probes) if all(self._plan) else -(-len(probes) // _PROBE_PART)  # much to catch up on
        for at in range(self._turn * some, (self._turn + 1) * some):
            at %= len(probes)
            probes[at] = min(self._plan[at] + 1, self.max_depth)
        if probes == self._plan:
            self._turn += 1
            return None
        if not self._affordable():
            return None
        self._turn += 1
        self._loss = 0.0
        return probes

    def cut(self, keys: Sequence[str], drafts: Sequence[Draft], seconds: float) -> list[int]:
        """Return how many tokens of each draft to verify, given the drafter's confidence and what drafting took."""
        lengths = [len(draft.tokens) for draft in drafts]
        if not any(lengths):
            self._made, self._draft_s, self._drafted = {}, 0.0, frozenset()
            return lengths
        self._made = {key: draft for key, draft in zip(keys, drafts, strict=True) if draft.tokens}
        if self._made.keys() <= self._drafted:
            self._draft_s = self._draft_seconds.add(max(lengths), sum(lengths), seconds)
        else:
            self._draft_s = min(seconds, _CATCH_UP * float(self._times[0])) if self._times is not None else 0.0
        self._drafted = frozenset(self._made)
        if self._probes or self._planned_for != list(keys):
            return lengths
        chances: list[tuple[float, int]] = []
        for at, draft in enumerate(drafts):
            chance = 1.0
            for confidence, worths in zip(draft.confidence, self._worths, strict=False):
                chance *= worths[_bin(confidence)]
                chances.append((-chance, at))
        chances.sort()
        best, top, gain = 0, -self._prices[0], 0.0
        for count, (chance, _) in enumerate(chances, 1):
            gain -= chance
            if gain - self._prices[count] > top:
                best, top = count, gain - self._prices[count]
        counts = [0] * len(drafts)
        for _, at in chances[:best]:
            counts[at] += 1
        return counts

    def observe(self, outcomes: Sequence[Outcome], seconds: float | None) -> None:
        """Learn from a step, before the next is planned: what its requests picked, and how long forward and picks took.

        `seconds` is None where the forward also did other work (prefill chunks): its time then says nothing new.
        """
        for outcome in outcomes if self._made else ():
            if outcome.key in self._made:
                self._judge(outcome, self._made[outcome.key])
        if not outcomes or (seconds is None and self._times is None):
            return
        verified = sum(outcome.verified for outcome in outcomes)
        if seconds is not None:
            seconds = self._step_seconds.add(len(outcomes) + verified, not verified, seconds)
        else:  # what drafts cost there is booked as it would have been without the other work
            assert self._times is not None
            seconds = float(self._times[min(verified, self._times.size - 1)])
        batch, tokens = len(self._planned_for), sum(len(outcome.picked) for outcome in outcomes)
        if self._times is None:
            self._elapsed[batch] += 1
            return
        plain = max(self._plain_s(), 1e-9)
        # Where a size is met for the first time, kernels may be compiled: that says nothing about drafts.
        steps = min(seconds / plain, _CATCH_UP) + self._draft_s / plain
        self._elapsed[batch] += steps
        if self._draft_s:
            if (known := self._plain.get(batch)) is not None:
                known.drafted += 1
            self._debt[batch] = max(self._debt[batch] + steps - tokens / batch, -_CREDIT)
        if self._probes and any(self._probes):
            loss = steps - tokens / max(self._pace * plain, 1e-9)
            self._spent = max(0.0, self._spent + loss)
            self._loss += loss

    def _judge(self, outcome: Outcome, draft: Draft) -> None:
        """Note which drafts agreed: one more than was verified can be told."""
        own = self._own.get(outcome.key)
        if own is None:
            own = self._own[outcome.key] = [_Rate(_OWN_MEMORY) for _ in range(self.max_depth)]
        for depth, (token, chance, picked) in enumerate(zip(*draft, outcome.picked, strict=False)):
            for rate in (self._agreed[depth], own[depth], self._worth[depth][_bin(chance)]):
                rate.add(token == picked)
            if token != picked:
                break

    def forget(self, key: str) -> None:
        """Drop what is kept of a request that ended, an outcome not yet told included."""
        self._own.pop(key, None)
        self._made.pop(key, None)


def _bin(confidence: float) -> int:
    return min(int(confidence * _BINS), _BINS - 1)
