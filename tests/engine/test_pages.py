"""The page pool: who holds a page, which content finds it, and which one goes first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.invariants import check_pool

from pelagos.engine.pages import PagePool


def taken(pool: PagePool, count: int) -> list[int]:
    pages = pool.alloc(count)
    assert pages is not None
    return pages


def cached(pool: PagePool, *keys: bytes) -> list[int]:
    """Pages published under the keys and let go of, deepest first."""
    pages = taken(pool, len(keys))
    for page, key in zip(pages, keys, strict=True):
        assert pool.register(page, key) == page
    pool.release(reversed(pages))
    return pages


def test_all_or_nothing() -> None:
    pool = PagePool(3)
    pages = taken(pool, 2)
    assert pool.alloc(2) is None
    assert (pool.in_use, pool.free, pool.cached) == (2, 1, 0)
    assert len({*pages, *taken(pool, 1)}) == 3
    assert pool.alloc(0) == []


def test_a_page_is_freed_by_its_last_holder() -> None:
    pool = PagePool(2)
    (page,) = taken(pool, 1)
    pool.share([page])
    pool.release([page])
    assert pool.in_use == 1
    pool.release([page])
    assert (pool.in_use, pool.free) == (0, 2)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release([page])
    with pytest.raises(AssertionError, match="is free"):
        pool.share([page])


def test_a_named_page_outlives_its_holders_and_comes_back() -> None:
    pool = PagePool(2)
    (page,) = cached(pool, b"a")
    assert (pool.in_use, pool.cached, (pool.free + pool.cached)) == (0, 1, 2)
    assert pool.lookup(b"a") == page
    pool.share([page])
    assert (pool.in_use, pool.cached) == (1, 0)
    assert pool.alloc(2) is None, "a held page is never evicted"


def test_free_pages_go_before_cached_ones_and_children_before_parents() -> None:
    pool = PagePool(5)
    cached(pool, b"old 0", b"old 1")
    cached(pool, b"new 0", b"new 1")
    taken(pool, 1)
    assert pool.evictions == 0
    taken(pool, 1)
    assert [pool.lookup(key) is not None for key in (b"old 0", b"old 1", b"new 0", b"new 1")] == [
        True,
        False,
        True,
        True,
    ]
    taken(pool, 2)
    assert [pool.lookup(key) is not None for key in (b"old 0", b"new 0", b"new 1")] == [False, True, False]
    assert pool.evictions == 3
    check_pool(pool)


def test_a_use_makes_a_page_young() -> None:
    pool = PagePool(2)
    a, _ = cached(pool, b"a")[0], cached(pool, b"b")
    pool.share([a])
    pool.release([a])
    taken(pool, 1)
    assert (pool.lookup(b"a"), pool.lookup(b"b")) == (a, None)


def test_a_duplicate_stays_private_and_its_release_counts_as_a_use_of_the_first() -> None:
    pool = PagePool(4)
    first, other = cached(pool, b"a")[0], cached(pool, b"b")[0]
    (twin,) = taken(pool, 1)
    assert pool.register(twin, b"a") == first != twin
    assert pool.lookup(b"a") == first
    pool.release([twin])
    assert (pool.cached, pool.free) == (2, 2)
    taken(pool, 3)
    assert (pool.lookup(b"a"), pool.lookup(b"b")) == (first, None), f"page {other} was the older one"
    check_pool(pool)


def test_a_duplicate_takes_the_place_of_a_first_that_is_gone() -> None:
    pool = PagePool(2)
    cached(pool, b"a")
    (twin,) = taken(pool, 1)
    pool.register(twin, b"a")
    taken(pool, 1)  # evicts the first
    assert pool.lookup(b"a") is None
    pool.release([twin])
    assert pool.lookup(b"a") == twin
    check_pool(pool)


def test_a_page_has_one_content() -> None:
    pool = PagePool(2)
    (page,) = taken(pool, 1)
    pool.register(page, b"a")
    assert pool.register(page, b"a") == page
    with pytest.raises(AssertionError, match="another content"):
        pool.register(page, b"b")
    with pytest.raises(AssertionError, match="not in use"):
        pool.register(1 - page, b"b")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from("arsnl"), st.integers(0, 11)), max_size=120))
def test_any_sequence_of_operations_keeps_the_books(count: int, operations: list[tuple[str, int]]) -> None:
    pool, held = PagePool(count), Counter[int]()
    named: dict[int, bytes] = {}  # what the holders of a page think it is
    for name, number in operations:
        if name == "a":
            room = pool.free + pool.cached
            pages = pool.alloc(number)
            assert (pages is None) == (number > room)
            for page in pages or ():
                assert not held[page]
                held[page] = 1
                named.pop(page, None)
        elif held[number] and name == "r":
            held[number] -= 1
            pool.release([number])
        elif held[number] and name == "s":
            held[number] += 1
            pool.share([number])
        elif held[number] and name == "n" and number not in named:
            named[number] = bytes([number % 4])
            assert named[pool.register(number, named[number])] == named[number]
        elif name == "l" and (found := pool.lookup(bytes([number]))) is not None:
            assert named[found] == bytes([number])
        assert pool.in_use == sum(references > 0 for references in held.values())
        assert pool.in_use + pool.cached + pool.free == count
        check_pool(pool)
    pool.release(page for page, references in held.items() for _ in range(references))
    assert pool.in_use == 0
    check_pool(pool)


def test_a_rank_gives_and_takes_back_its_own_pages() -> None:
    pool = PagePool(7, ranks=2)
    mine = pool.alloc(3, 1)
    assert mine is not None
    assert {page % 2 for page in mine} == {1}
    assert pool.alloc(1, 1) is None
    for page, key in zip(mine, (b"0", b"1", b"2"), strict=True):
        pool.register(page, key)
    pool.release(mine)
    assert (pool.free_of(0), pool.free_of(1), pool.cached) == (4, 0, 3)
    others = pool.alloc(4, 0)
    assert others is not None
    assert pool.evictions == 0  # of the other rank's cached pages
    assert pool.alloc(1, 0) is None
    again = pool.alloc(2, 1)
    assert again is not None
    assert pool.evictions == 2
    pool.release([*others, *again])
    check_pool(pool)
    assert (pool.free_of(0), pool.free_of(1), pool.cached) == (4, 2, 1)
