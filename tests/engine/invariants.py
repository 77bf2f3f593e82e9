"""What must hold of the page pool and the prefix cache between any two operations."""

from __future__ import annotations

from pelagos.engine.pages import PagePool
from pelagos.engine.prefix import PrefixCache


def check_pool(pool: PagePool) -> None:
    """Assert that every page is in exactly one state and that keys and pages agree."""
    free, cached = {page for pages in pool._free for page in pages}, set(pool._cached)
    held = {page for page, references in enumerate(pool._references) if references}
    assert len(free) == pool.free, "a page is free twice"
    assert len(free | cached | held) == pool.count, "a page is lost"
    assert len(free) + len(cached) + len(held) == pool.count, "a page is in two states"
    assert min(pool._references) >= 0, "a page has fewer than no references"
    assert all(pool._keys[page] == key for key, page in pool._by_key.items()), "a key finds another content"
    assert all(pool._keys[page] is None for page in free), "a free page has a key"
    assert cached <= set(pool._by_key.values()), "a cached page cannot be found"


def check_prefix(cache: PrefixCache) -> None:
    """Assert that the index, the states and the counters agree."""
    states = [*cache._anchors.values(), *cache._between.values()]
    assert cache.stats.states_cached == len(states) == len(cache._anchors.keys() | cache._between.keys())
    assert cache.stats.state_bytes_cached == sum(state.packed.nbytes for state in states) <= cache._state_bytes
    assert cache._between_bytes == sum(state.packed.nbytes for state in cache._between.values())
    under = [(node, key) for node, keys in cache._under.items() for key in keys]
    held = (cache._anchors | cache._between).items()
    assert sorted(under) == sorted((state.node, key) for key, state in held)
