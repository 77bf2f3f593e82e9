"""The page pool: page ids with reference counts and, for pages of a known prefix, a content key.

Knows nothing of what a page holds. A page is free, in use (references > 0) or cached (no reference, but a key by
which `lookup` finds it again); cached pages are given away when free ones run out, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice


class PagePool:
    """`count` page ids; every operation costs O(1) a page. Page p is of rank p % `ranks`.

    Release the pages of a sequence deepest first: a page without the ones before it is unreachable, and pages
    are evicted in the order of their release.
    """

    def __init__(self, count: int, ranks: int = 1) -> None:
        """All `count` pages are free; `MemoryPlan` sees to it that there are enough."""
        self.count = count
        self.evictions = 0
        self.uses = [0] * count  # how often each page was given or shared
        self._references = [0] * count
        self._keys: list[bytes | None] = [None] * count
        self._by_key: dict[bytes, int] = {}
        self._free = [[page for page in range(count - 1, -1, -1) if page % ranks == rank] for rank in range(ranks)]
        self._cached: OrderedDict[int, None] = OrderedDict()  # in order of last use, oldest first

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return sum(map(len, self._free))

    def free_of(self, rank: int) -> int:
        """Pages of a rank that hold nothing."""
        return len(self._free[rank])

    @property
    def cached(self) -> int:
        """Pages without a reference that `lookup` still finds."""
        return len(self._cached)

    @property
    def in_use(self) -> int:
        """Pages with at least one reference."""
        return self.count - self.free - self.cached

    def alloc(self, count: int, rank: int = 0) -> list[int] | None:
        """Return `count` pages of a rank with one reference each, evicting cached pages if need be; None if too few."""
        free, ranks = self._free[rank], len(self._free)
        cached = self.cached if ranks == 1 else sum(page % ranks == rank for page in self._cached)
        if count > len(free) + cached:
            return None
        while len(free) < count:
            self._evict(rank)
        pages, references, uses = [free.pop() for _ in range(count)], self._references, self.uses
        for page in pages:
            references[page] = 1
            uses[page] += 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a reference to each page, which must be in use or cached."""
        references, uses, cached = self._references, self.uses, self._cached  # a long prefix has a thousand pages
        for page in pages:
            if not references[page]:
                assert page in cached, f"page {page} is free"
                del cached[page]
            references[page] += 1
            uses[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference of each page, in this order; the last one makes a page with a key cached, others free.

        A private duplicate of a page that is found by the same key becomes free and counts as a use of that one.
        """
        references, keys, cached, owners = self._references, self._keys, self._cached, self._by_key
        for page in pages:
            assert references[page] > 0, f"page {page} is released more often than held"
            references[page] -= 1
            if references[page]:
                continue
            key = keys[page]
            owner = page if key is None else owners.setdefault(key, page)
            if key is not None and owner == page:
                cached[page] = None
                continue
            self._keys[page] = None
            self._free[page % len(self._free)].append(page)
            if owner in self._cached:
                self.uses[owner] += 1
                self._cached.move_to_end(owner)

    def register(self, page: int, key: bytes) -> int:
        """Name the content of a page in use; return the page that `lookup` finds by this key: it, or an earlier one."""
        assert self._references[page] > 0, f"page {page} is not in use"
        assert self._keys[page] in (None, key), f"page {page} has another content already"
        self._keys[page] = key
        return self._by_key.setdefault(key, page)

    def lookup(self, key: bytes) -> int | None:
        """Return the page of that content, in use or cached; take a reference with `share` before anything else."""
        return self._by_key.get(key)

    def coldest(self, most: int) -> list[tuple[bytes, int]]:
        """Return (key, page) of up to `most` cached pages, the next to be evicted first."""
        return [(key, page) for page in islice(self._cached, most) if (key := self._keys[page]) is not None]

    def demote(self, keys: Sequence[bytes]) -> None:
        """Make those of a chain's pages that nobody holds the next to be evicted, the deepest first."""
        for key in keys:
            page = self._by_key.get(key)
            if page in self._cached:
                self._cached.move_to_end(page, last=False)

    def _evict(self, rank: int) -> None:
        page = next(page for page in self._cached if page % len(self._free) == rank)
        del self._cached[page]
        key = self._keys[page]
        assert key is not None
        del self._by_key[key]
        self._keys[page] = None
        self._free[rank].append(page)
        self.evictions += 1
