"""The prefix cache: which pages and which state a prompt can start from, found by what its tokens are.

Keys are chained hashes of tokens, salted by what must never be mixed (model, number mode, numeric path) and by
user, so a key stands for one content. Pages (compressed entries) and states (window rows and compressor tails at one
position) live and die apart: where no state is left, the tokens before the end of the pages are computed again over
frozen entries, which restores the state exactly. No I/O and no tensors. Source: technical report 6.1 and 6.2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pelagos.engine.api import EngineStats
from pelagos.engine.pages import PagePool
from pelagos.errors import RequestError
from pelagos.kernels.layout import CacheLayout

if TYPE_CHECKING:
    from pelagos.engine.tiers import Tiers

KEY_BYTES = 16
_ENDINGS = 64  # ended sequences remembered behind one page
_TOKEN = np.dtype("<i4")


class KeyChain:
    """The keys of one growing sequence: one a completed page, and one for the state at any position."""

    def __init__(self, salt: bytes, user_id: str, page_tokens: int) -> None:
        """The keys of an empty sequence; `PrefixCache.chain` makes one with its own salt."""
        self.user_id = user_id
        self.keys: list[bytes] = []  # of the completed pages, first to last
        self._page_bytes = page_tokens * _TOKEN.itemsize
        self._tokens = bytearray()
        self._root = _hash(len(salt).to_bytes(8, "little") + salt + user_id.encode("utf-8", "surrogatepass"))

    def __len__(self) -> int:
        """Tokens pushed."""
        return len(self._tokens) // _TOKEN.itemsize

    def push(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append token ids (any integer sequence or array) after those pushed before.

        Raises RequestError for an id that is negative or needs more than 31 bits.
        """
        ids = np.asarray(tokens, np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() < 2**31):
            raise RequestError(f"token ids {ids.min()}..{ids.max()}: expected 0..2147483647")
        self._tokens += ids.astype(_TOKEN).tobytes()
        size = self._page_bytes
        for page in range(len(self.keys), len(self._tokens) // size):
            self.keys.append(_hash(self.node_key(page) + self._tokens[page * size : (page + 1) * size]))

    def node_key(self, page: int) -> bytes:
        """The key before page `page`: the root for 0, else the key of page - 1."""
        return self.keys[page - 1] if page else self._root

    def state_key(self, position: int) -> bytes:
        """The key of the state after `position` tokens, 1..len."""
        assert 0 < position <= len(self), f"state at {position} of {len(self)} tokens"
        end = position * _TOKEN.itemsize
        page, inside = divmod(end, self._page_bytes)
        return _hash(self.node_key(page) + self._tokens[end - inside : end] + b"state")


def _hash(content: bytes) -> bytes:
    return blake2b(content, digest_size=KEY_BYTES).digest()


@dataclass(frozen=True, slots=True)
class Match:
    """What a prompt can start from.

    `pages` (a reference of each is taken: `pool.release(reversed(pages))` gives up) are the first of the page table;
    compute positions resume..n-1 with the span's `frozen`. With `state` the slot is unpacked from it at `resume`, and
    if `resume` lies beyond the pages, so is the open page, into a page of the sequence's own. Without `state` the slot
    is zeroed, and what comes out before position `exact` is not to be used. Pages are shared even where all tokens
    must be computed (resume 0): it saves their room.

    If the disk makes it better, `disk_resume` is where the prompt could resume after reading the `disk_pages` page
    keys that follow `pages` and, unless None, the state `disk_state` of position disk_resume: add them and match again.
    """

    pages: tuple[int, ...] = ()
    resume: int = 0
    frozen: int = 0
    exact: int = 0
    state: np.ndarray | None = None
    disk_resume: int = 0
    disk_pages: int = 0
    disk_state: bytes | None = None

    @property
    def hit_tokens(self) -> int:
        """Tokens whose compressed entries need not be made again."""
        return max(self.resume, self.frozen)


class Cut(NamedTuple):
    """A position at which to keep the state; an anchor is kept longer than what lies between."""

    position: int
    anchor: bool


class _State(NamedTuple):
    node: bytes  # key of the last completed page
    packed: np.ndarray


class PrefixCache:
    """The index over a page pool and a store of packed states bounded by `state_bytes`."""

    def __init__(
        self, pool: PagePool, layout: CacheLayout, *, salt: bytes, state_bytes: int, interval: int = 512,
        stats: EngineStats | None = None,
    ) -> None:  # fmt: skip
        """`salt` names model, number mode and numeric path; `interval` is rounded up to whole pages.

        Of `stats` it counts the tokens that were hit, and the states.
        """
        self.stats = stats or EngineStats()
        self.interval = layout.pages_for(max(1, interval)) * layout.page_tokens
        self._pool = pool
        self._salt = salt
        self._page_tokens = layout.page_tokens
        self._recompute = layout.recompute_tokens
        self._state_bytes = state_bytes
        self._anchors: OrderedDict[bytes, _State] = OrderedDict()  # by state key, in order of last use, oldest first
        self._between: OrderedDict[bytes, _State] = OrderedDict()
        self._between_bytes = 0
        # Key before a mark's page -> keys of the pages that followed in each sequence that has ended, oldest first.
        self._endings: OrderedDict[bytes, list[list[bytes]]] = OrderedDict()
        self._under: dict[bytes, dict[bytes, int]] = {}  # key of the last completed page -> {state key: tokens after}

    def chain(self, user_id: str, tokens: Sequence[int] | np.ndarray = ()) -> KeyChain:
        """Start the keys of a user's sequence; keep the chain with the request, hashing is its cost."""
        chain = KeyChain(self._salt, user_id, self._page_tokens)
        chain.push(tokens)
        return chain

    def match(self, chain: KeyChain, limit: int, disk: Tiers | None = None) -> Match:
        """Find where the chain's sequence can resume, at `limit` at most (prompt length - 1), computing the least.

        The deepest state over the pages that are there, or, where that is deeper, as many tokens before the end of
        the pages as restore the window state of all layers.
        """
        assert 0 <= limit <= len(chain), f"limit {limit} of {len(chain)} tokens"
        keys = chain.keys[: (limit + 1) // self._page_tokens]
        pages = list(self._pages_of(keys))
        here = len(pages)
        self._supersede(chain, here)
        end, start = self._recomputed(here, limit)
        resume, state_key = next(self._states_on(chain, here, max(start, 1), limit, None), (start, None))
        on_disk = (0, 0, None)
        if disk is not None:
            disk.known_pages(chain.user_id, keys[:here])  # a use of them there too
            there = here + disk.known_pages(chain.user_id, keys[here:])
            _, far = self._recomputed(there, limit)
            deepest, key = next(self._states_on(chain, there, max(far, resume) + 1, limit, disk), (far, None))
            if deepest > resume:
                needed = there if key is None else max(here, deepest // self._page_tokens)
                on_disk = (deepest, needed - here, None if key is None or self._find(key) else key)
        self._pool.share(pages)
        state = None if state_key is None else self._use(state_key).packed
        exact = resume if state is not None or not resume else end
        return Match(tuple(pages), resume, here * self._page_tokens, exact, state, *on_disk)

    def _supersede(self, chain: KeyChain, pages: int) -> None:
        nodes = [chain.node_key(0), *chain.keys[: min(pages, len(chain.keys) - 1)]] if chain.keys else []
        for page in [page for page, node in enumerate(nodes) if node in self._endings]:
            for ending in self._endings.pop(nodes[page]):
                pairs = zip(ending, chain.keys[page:], strict=False)
                same = next((i for i, (ours, new) in enumerate(pairs) if ours != new), None)
                if same is not None:
                    self._pool.demote(ending[same:])
                elif page + len(ending) > len(chain.keys):
                    self._remember(chain.keys[-1], ending[len(chain.keys) - page :])

    def _pages_of(self, keys: Sequence[bytes]) -> Iterator[int]:
        for key in keys:
            page = self._pool.lookup(key)
            if page is None:
                return
            yield page

    def _recomputed(self, pages: int, limit: int) -> tuple[int, int]:
        """Where the state is exact again, and where to start for it, when only pages are there."""
        end = min(pages * self._page_tokens, limit)
        return end, max(0, end - self._recompute)

    def _states_on(
        self, chain: KeyChain, pages: int, least: int, limit: int, disk: Tiers | None
    ) -> Iterator[tuple[int, bytes]]:
        """(position, key) of the states from `least` to `limit` that need at most `pages` pages, deepest first."""
        for page in range(min(pages, limit // self._page_tokens), -1, -1):
            if (page + 1) * self._page_tokens <= least:
                return
            node, begin = chain.node_key(page), page * self._page_tokens
            stored = set(disk.known_states(chain.user_id, node)) if disk is not None else set()
            for remainder in sorted({*self._under.get(node, {}).values(), *(at for at, _ in stored)}, reverse=True):
                if least <= begin + remainder <= limit:
                    key = chain.state_key(begin + remainder)
                    if self._find(key) is not None or (remainder, key) in stored:
                        yield begin + remainder, key

    def record(self, match: Match) -> None:
        """Count a match that was used (a request may be matched many times before it is admitted)."""
        self.stats.hit_tokens += match.hit_tokens
        self.stats.cached_tokens += match.resume

    def finish(self, chain: KeyChain, mark: int) -> None:
        """Say that a request ended whose prompt a later one is likely to leave at `mark`, its last cut or its length.

        The pages after the mark are evicted first once a prompt went past it another way: a thought that is not shown
        again, an answer not taken. If no prompt does, they age like all others.
        """
        first = mark // self._page_tokens
        if ending := chain.keys[first:]:
            self._remember(chain.node_key(first), ending)
            while len(self._endings) > self._pool.count:
                self._endings.popitem(last=False)

    def _remember(self, node: bytes, ending: list[bytes]) -> None:
        others = [each for each in self._endings.get(node, ()) if each != ending]
        self._endings[node] = [*others[1 - _ENDINGS :], ending]

    def has_state(self, chain: KeyChain, position: int) -> bool:
        """Whether the state after `position` tokens is held; counts as a use of it."""
        key = chain.state_key(position)
        if self._find(key) is None:
            return False
        self._use(key)
        return True

    def add_state(self, chain: KeyChain, position: int, packed: np.ndarray, *, anchor: bool) -> bool:
        """Keep `layout.pack_state(...)` of that position, uint8, handed over and not copied; whether it is held now.

        Room is made by dropping the longest unused: states between anchors first, and for one of those no anchor.
        """
        key = chain.state_key(position)
        if self._find(key) is not None:
            self._use(key)
            return True
        kept = 0 if anchor else self.stats.state_bytes_cached - self._between_bytes
        if packed.nbytes > self._state_bytes - kept:
            return False
        while self.stats.state_bytes_cached + packed.nbytes > self._state_bytes:
            self._drop(next(iter(self._between or self._anchors)))
        page, remainder = divmod(position, self._page_tokens)
        state = _State(chain.node_key(page), packed)
        (self._anchors if anchor else self._between)[key] = state
        self._between_bytes += 0 if anchor else packed.nbytes
        self._under.setdefault(state.node, {})[key] = remainder
        self.stats.states_cached += 1
        self.stats.state_bytes_cached += packed.nbytes
        return True

    def cuts(self, match: Match, start: int, stop: int, *, prompt: int, marks: Sequence[int] = ()) -> list[Cut]:
        """Positions in (start, stop] at which the engine keeps the state, ascending: end chunks there.

        `match` is what the request resumed from, `prompt` the prompt's length, `marks` the request's cuts. Anchors:
        the marks (without any the prompt's end) and the end of the matched pages, where this prompt parts from an
        earlier one. Between: every `interval` positions and, without marks, the last page boundary of the prompt,
        for who asks the same again. None where the state is not exact yet. The end of the output is an anchor too,
        which only the engine knows.
        """
        anchors = {match.frozen, *(marks or (prompt,))}
        between = {*range(0, stop + 1, self.interval)}
        if not marks:
            between.add((prompt - 1) // self._page_tokens * self._page_tokens)
        first = max(start + 1, match.exact)
        return [Cut(at, at in anchors) for at in sorted(anchors | between) if first <= at <= stop]

    def _find(self, key: bytes) -> _State | None:
        return self._anchors.get(key) or self._between.get(key)

    def _use(self, key: bytes) -> _State:
        """Make a state the last used; one between anchors has shown its worth and becomes an anchor."""
        state = self._pop(key)
        self._anchors[key] = state
        return state

    def _pop(self, key: bytes) -> _State:
        if key in self._anchors:
            return self._anchors.pop(key)
        self._between_bytes -= self._between[key].packed.nbytes
        return self._between.pop(key)

    def _drop(self, key: bytes) -> None:
        state = self._pop(key)
        siblings = self._under[state.node]
        del siblings[key]
        if not siblings:
            del self._under[state.node]
        self.stats.states_cached -= 1
        self.stats.state_bytes_cached -= state.packed.nbytes
        self.stats.evicted_states += 1
