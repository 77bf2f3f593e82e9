"""Which replica knows the beginning of a conversation: hashes of what a request begins with, and where they went.

Nothing of Ray and nothing of a network in here. A key stands for all bytes from a conversation's start up to one point,
and for the user, so what one user sent is never found by another; keys are made with a secret of the process and cannot
be turned back into text.
"""

from __future__ import annotations

import json
import secrets
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Generic, NamedTuple, TypeVar

from pelagos.serve.ask import Ask

BLOCK_BYTES = 2048  # a long text has a key every so many bytes, beside the one at its end
KEY_BYTES = 16
R = TypeVar("R", bound=Hashable)


class Point(NamedTuple):
    """A point in a conversation: its key, the bytes up to it, and whether an answer follows it.

    `reach` also counts the model's turns that follow: who computed the rest wrote those.
    """

    key: bytes
    reach: int
    answered: bool


class Hasher:
    """Makes the points of requests; one has one secret."""

    def __init__(self, secret: bytes | None = None) -> None:
        """`secret` None draws one."""
        self._secret = secret or secrets.token_bytes(32)

    def points(self, ask: Ask, key_name: str = "") -> tuple[Point, ...]:
        """Return the points of what a request says, first to last; `key_name` is whose API key it came with."""
        digest = self._hash(json.dumps([key_name, ask.user_id]).encode())
        points: list[Point] = []
        size = 0
        for part, is_answer in _parts(ask):
            ends = [*range(BLOCK_BYTES, len(part), BLOCK_BYTES), len(part)]
            if is_answer and points:
                points[-1] = points[-1]._replace(reach=size + len(part), answered=True)
            for begin, end in zip([0, *ends], ends, strict=False):
                digest = self._hash(digest + (b"end" if end == len(part) else b"part") + part[begin:end])
                points.append(Point(digest, size + end, False))
            size += len(part)
        return tuple(points)

    def _hash(self, content: bytes) -> bytes:
        return blake2b(content, digest_size=KEY_BYTES, key=self._secret).digest()


def _parts(ask: Ask) -> Iterable[tuple[bytes, bool]]:
    """Yield what a prompt is made of, in its order, and whether a part was written by the model."""
    if ask.prompt is not None:
        yield _bytes(ask.prompt if isinstance(ask.prompt, str) else list(ask.prompt)), False
        return
    if tools := ask.body.get("tools"):
        yield _bytes(tools), False
    for message in ask.body.get("messages") or ():
        yield _bytes(message), isinstance(message, Mapping) and message.get("role") == "assistant"


def _bytes(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return text.encode("utf-8", "surrogatepass")


class Known(NamedTuple):
    """How much of a request a replica has seen before, and whether it wrote what the request goes on from."""

    reach: int = 0
    continues: bool = False


class Map(Generic[R]):
    """Which replicas were sent the points of conversations; the least recently used are forgotten first."""

    def __init__(self, most: int) -> None:
        """Hold `most` points."""
        self._most = most
        self._points: OrderedDict[bytes, tuple[R, ...]] = OrderedDict()  # the one sent last comes first

    def __len__(self) -> int:
        """Points held."""
        return len(self._points)

    def find(self, points: Iterable[Point]) -> dict[R, Known]:
        """Return for each replica that has seen any of the points the last one it has."""
        found: dict[R, Known] = {}
        for point in points:  # a point is there only if all before it were, unless those have been forgotten
            for replica in self._points.get(point.key, ()):
                found[replica] = Known(point.reach, point.answered)
        return found

    def learn(self, points: Iterable[Point], replica: R) -> None:
        """Note that a replica was sent these points; of one conversation the beginning is kept longest."""
        for key in reversed([point.key for point in points]):
            others = self._points.get(key, ())
            self._points[key] = (replica, *(other for other in others if other != replica))
            self._points.move_to_end(key)
        while len(self._points) > self._most:
            self._points.popitem(last=False)

    def forget(self, replica: R) -> None:
        """Drop a replica that has ended."""
        for key in [key for key, replicas in self._points.items() if replica in replicas]:
            if left := tuple(other for other in self._points[key] if other != replica):
                self._points[key] = left
            else:
                del self._points[key]


@dataclass(slots=True)
class Choice(Generic[R]):
    """Replicas in the order in which they should be asked, and why: prefix, load, or shed (from the prefix's)."""

    order: list[R]
    why: str
    reach: int = 0


def choose(known: Mapping[R, Known], loads: Mapping[R, float], size: int, busy: int) -> Choice[R]:
    """Order the replicas in `loads` (requests each has; the least recently chosen first) for a request.

    Who wrote what the conversation goes on from, or knows at least half of its `size` bytes, comes first, unless it has
    `busy` requests or more and another has less by half of `busy`. Else the least loaded, of those who knows most.
    """
    by_load = sorted(loads, key=lambda replica: (loads[replica], -known.get(replica, Known()).reach))
    held = [replica for replica in by_load if replica in known]
    best = max(held, key=lambda replica: known[replica].reach, default=None)
    if best is None or not (known[best].continues or known[best].reach * 2 >= size):
        return Choice(by_load, "load", known.get(by_load[0], Known()).reach if by_load else 0)
    if loads[best] >= busy and loads[best] - loads[by_load[0]] > busy / 2:
        return Choice(by_load, "shed", known.get(by_load[0], Known()).reach)
    return Choice([best, *(replica for replica in by_load if replica != best)], "prefix", known[best].reach)
