"""Speculative decoding: who drafts tokens, and how many of them are worth verifying.

A draft never changes the output: the sampler's noise belongs to a position, so the target picks the same token
whether it was drafted or not. The drafter picks with the same noise and so agrees often.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from pelagos.engine.sampler import Sampler
from pelagos.kernels.layout import Output, Span


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


class Drafter(Protocol):
    """Guesses the next tokens of running requests; may keep rows of its own in their slots and streams by request.

    `window` is how many of a sequence's last streams it can use: spans need ask for no more.
    """

    window: int
    max_depth: int

    def feed(self, key: str, start: int, following: np.ndarray, streams: np.ndarray) -> None:
        """Hand over what the backbone left at positions start.. of a request, computed and accepted.

        following (S,) int64 are the tokens at start + 1.., the last one picked but not computed; streams (S, n, D).
        """
        ...

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """Return a draft for each request, shorter than its depth or empty where there is nothing to go on."""
        ...

    def forget(self, key: str) -> None:
        """Drop what is kept of a request: it ended, or its slot was given away."""
        ...


class DraftForward(Protocol):
    """The part of a forward that MTP drafting needs; see `kernels.layout`."""

    def draft(self, spans: Sequence[Span], streams: np.ndarray) -> Output:
        """Run the MTP block over spans of following tokens and streams (sum S, n, D)."""
        ...


@dataclass(slots=True)
class _Fed:
    """What was fed and not yet run through the draft layer: consecutive positions that end before `end`."""

    end: int
    following: deque[int]
    streams: deque[np.ndarray]  # (n, D) each


class MTPDrafter:
    """Drafts with the MTP block: all requests at once, depth by depth.

    Depth 1 runs over all positions fed since the last draft, which leaves the draft layer's window as if it had run
    at each step; a deeper one goes on from the block's own streams. Later positions are overwritten when fed.
    """

    def __init__(self, forward: DraftForward, *, window: int, max_depth: int) -> None:
        """`window` is the draft layer's sliding window; max_depth at most the layout's `rewind`."""
        self.window = window
        self.max_depth = max_depth
        self._forward = forward
        self._fed: dict[str, _Fed] = {}

    def feed(self, key: str, start: int, following: np.ndarray, streams: np.ndarray) -> None:
        """See `Drafter.feed`; a start that does not follow the last position begins anew."""
        fed = self._fed.get(key)
        if fed is None or fed.end != start:
            fed = self._fed[key] = _Fed(start, deque(maxlen=self.window), deque(maxlen=self.window))
        fed.end = start + len(following)
        fed.following.extend(following.tolist())
        fed.streams.extend(streams[-self.window :].copy())

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """See `Drafter.draft`."""
        tokens: list[list[int]] = [[] for _ in requests]
        chances: list[list[float]] = [[] for _ in requests]
        spans: dict[int, tuple[Span, np.ndarray]] = {}  # by index of request, with its streams
        for index, request in enumerate(requests):
            fed = self._fed.get(request.key)
            if fed is not None and fed.following and request.depth > 0:
                following = np.array(fed.following, np.int64)
                span = Span(following, fed.end - len(following), request.slot, request.pages, streams=1)
                spans[index] = span, np.stack(list(fed.streams))
                fed.following.clear()
                fed.streams.clear()
        while spans:
            out = self._forward.draft(
                [span for span, _ in spans.values()], np.concatenate([s for _, s in spans.values()])
            )
            deeper: dict[int, tuple[Span, np.ndarray]] = {}
            for row, (index, (span, _)) in enumerate(spans.items()):
                request, end = requests[index], span.start + len(span.tokens)
                pick = request.sampler.peek(out.logits[row], end + 1)
                tokens[index].append(pick.token)
                chances[index].append(float(np.exp(pick.logprob)))
                if len(tokens[index]) < min(request.depth, self.max_depth) and pick.token not in request.ends:
                    request.sampler.accept(pick.token)
                    following = np.array([pick.token], np.int64)
                    deeper[index] = span._replace(tokens=following, start=end), out.streams[row : row + 1]
            spans = deeper
        for request, drafted in zip(requests, tokens, strict=True):
            request.sampler.rollback(max(0, len(drafted) - 1))
        return [Draft(tuple(drafted), tuple(chance)) for drafted, chance in zip(tokens, chances, strict=True)]

    def forget(self, key: str) -> None:
        """See `Drafter.forget`."""
        self._fed.pop(key, None)


class Outcome(NamedTuple):
    """How one request fared in a step: its draft, how many of it were verified, and the tokens that were picked."""

    key: str
    draft: Draft
    verified: int
    picked: Sequence[int]


class AdaptiveDepth:
    """Chooses how many tokens to draft and verify for each request; a function of what it was told, no clock."""

    def __init__(self, max_depth: int) -> None:
        """`max_depth` is the drafter's."""
        self.max_depth = max_depth

    def depths(self, keys: Sequence[str]) -> list[int]:
        """Return how many tokens to draft for each decoding request of the coming step."""
        return [1] * len(keys)

    def cut(self, keys: Sequence[str], drafts: Sequence[Draft]) -> list[int]:
        """Return how many tokens of each draft to verify, given the drafter's confidence."""
        return [len(draft.tokens) for draft in drafts]

    def observe(self, outcomes: Sequence[Outcome], draft_s: float, step_s: float | None) -> None:
        """Learn from a step: seconds of drafting and of the forward with its picks.

        `step_s` is None where the forward also did other work (prefill chunks): its time then says nothing.
        """

    def forget(self, key: str) -> None:
        """Drop what is kept of a request that ended."""
