"""The prefix cache: which pages and which state a prompt can start from, found by what its tokens are.

Keys are chained hashes of tokens, salted by what must never be mixed (model, number mode, numeric path) and by
user, so a key stands for one content. Pages (compressed entries) and states (window rows and compressor tails at one
position) live and die apart: where no state is left, the tokens before the end of the pages are computed again over
frozen entries, which restores the state exactly. No I/O and no tensors. Source: technical report 6.1 and 6.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from pelagos.engine.pages import PagePool
from pelagos.kernels.layout import CacheLayout

KEY_BYTES = 16
STATE_INTERVAL = 512  # positions between states taken inside a prompt


class KeyChain:
    """The keys of one growing sequence: one a completed page, and one for the state at any position."""

    def __init__(self, salt: bytes, user_id: str, page_tokens: int) -> None:
        """The keys of an empty sequence; `PrefixCache.chain` makes one with its own salt."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Tokens pushed."""
        raise NotImplementedError

    user_id: str
    keys: list[bytes]  # of the completed pages, first to last

    def push(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append token ids (any integer sequence or array) after those pushed before."""
        raise NotImplementedError

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on (rejected drafts)."""
        raise NotImplementedError

    def node_key(self, page: int) -> bytes:
        """The key before page `page`: the root for 0, else the key of page - 1."""
        raise NotImplementedError

    def state_key(self, position: int) -> bytes:
        """The key of the state after `position` tokens, 1..len."""
        raise NotImplementedError


class DiskIndex(Protocol):
    """What the disk tier knows without reading a file."""

    def known_pages(self, user_id: str, keys: Sequence[bytes]) -> int:
        """How many of the keys, from the first on without a gap, are on disk."""
        ...

    def known_states(self, user_id: str, node_key: bytes) -> Sequence[tuple[int, bytes]]:
        """(tokens after the node, state key) of every state on disk whose last completed page has that key."""
        ...


@dataclass(frozen=True, slots=True)
class Match:
    """What a prompt can start from.

    `pages` (a reference of each is taken: `pool.release(reversed(pages))` gives up) are the first of the page table;
    compute positions resume..n-1 with the span's `frozen`. With `state` the slot is unpacked from it at `resume`; if
    `resume` is beyond the pages (`opens_page`), the open page is too, into a page of the sequence's own. Without state
    and with resume > 0 the slot is zeroed, and outputs before `exact` are not to be used. All zero when nothing
    would be saved.

    disk_pages counts further page keys (after `pages`) worth reading from disk, disk_state is the state worth
    reading, at disk_position; both zero or None when the disk makes nothing better. Read them, `add` them, match again.
    """

    pages: tuple[int, ...] = ()
    resume: int = 0
    frozen: int = 0
    exact: int = 0
    state: np.ndarray | None = None
    disk_pages: int = 0
    disk_state: bytes | None = None
    disk_position: int = 0

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens whose compressed entries need not be made again."""
        return max(self.resume, self.frozen) if self.state is not None else self.frozen


class Cut(NamedTuple):
    """A position at which to keep the state; an anchor is kept longer than what lies between."""

    position: int
    anchor: bool


@dataclass(slots=True)
class PrefixStats:
    """Counters since the start, and the states held now."""

    hit_tokens: int = 0
    cached_tokens: int = 0
    states: int = 0
    state_bytes: int = 0
    evicted_states: int = 0


class PrefixCache:
    """The index over a page pool and a store of packed states bounded by `state_bytes`."""

    def __init__(
        self, pool: PagePool, layout: CacheLayout, *, salt: bytes, state_bytes: int, interval: int = STATE_INTERVAL
    ) -> None:
        """`salt` names model, number mode and numeric path; `interval` is rounded up to whole pages."""
        self.stats = PrefixStats()
        raise NotImplementedError

    def chain(self, user_id: str, tokens: Sequence[int] | np.ndarray = ()) -> KeyChain:
        """Start the keys of a user's sequence; keep the chain with the request, hashing is its cost."""
        raise NotImplementedError

    def match(self, chain: KeyChain, limit: int, disk: DiskIndex | None = None) -> Match:
        """Find where the chain's sequence can resume, at `limit` at most (prompt length - 1), computing the least."""
        raise NotImplementedError

    def record(self, match: Match) -> None:
        """Count a match that was used (a request may be matched many times before it is admitted)."""
        raise NotImplementedError

    def add_page(self, key: bytes, page: int) -> bool:
        """Publish a completed page of a running sequence under chain.keys[i]; whether `lookup` now finds this page.

        False: another page has that content. The caller goes on with its own; nothing is swapped.
        """
        raise NotImplementedError

    def has_state(self, chain: KeyChain, position: int) -> bool:
        """Whether the state after `position` tokens is held; counts as a use of it."""
        raise NotImplementedError

    def add_state(self, chain: KeyChain, position: int, packed: np.ndarray, *, anchor: bool) -> bool:
        """Keep `layout.pack_state(...)` (not copied: hand it over) of that position; False when it is beyond the budget."""
        raise NotImplementedError

    def cuts(self, start: int, stop: int, *, prompt: int, marks: Sequence[int] = ()) -> list[Cut]:
        """Positions in (start, stop] at which the engine keeps the state, ascending: end chunks there.

        `prompt` is the prompt's length, `marks` the request's cuts. Anchors: the marks, or the prompt's end without
        marks. Between: every `interval` positions and the last page boundary before the prompt's end. The end of
        the output is an anchor too, which only the engine knows.
        """
        raise NotImplementedError
