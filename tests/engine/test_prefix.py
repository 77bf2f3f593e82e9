"""The prefix cache: keys of tokens, the best place to resume, separate lifetimes, and nothing wrong ever found."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.invariants import check_pool, check_prefix

from pelagos.engine.pages import PagePool
from pelagos.engine.prefix import Cut, KeyChain, Match, PrefixCache
from pelagos.errors import RequestError
from pelagos.kernels.layout import CacheLayout


class Grain:
    """What the cache asks of a layout, with small pages and a tail of several."""

    page_tokens = 16
    recompute_tokens = 90

    def pages_for(self, positions: int) -> int:
        return -(-positions // self.page_tokens)


P, TAIL = Grain.page_tokens, Grain.recompute_tokens


def make(pages: int = 64, state_bytes: int = 1000, **settings: int) -> tuple[PagePool, PrefixCache]:
    pool = PagePool(pages)
    return pool, PrefixCache(pool, cast(CacheLayout, Grain()), salt=b"model", state_bytes=state_bytes, **settings)


def ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100_000, count)


def packed(size: int = 1) -> np.ndarray:
    return np.zeros(size, np.uint8)


def publish(pool: PagePool, cache: PrefixCache, chain: KeyChain) -> list[int]:
    """Pages of a whole sequence, computed, published and let go of."""
    pages = pool.alloc(len(chain.keys))
    assert pages is not None
    for key, page in zip(chain.keys, pages, strict=True):
        assert pool.register(page, key) == page
    pool.release(reversed(pages))
    return pages


# Keys


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), max_size=70), st.lists(st.integers(0, 70), max_size=4), st.text(max_size=5))
def test_keys_do_not_depend_on_how_tokens_come(tokens: list[int], cuts: list[int], user: str) -> None:
    whole, pieces = KeyChain(b"s", user, P), KeyChain(b"s", user, P)
    whole.push(tokens)
    at = 0
    for cut in sorted(cuts):
        pieces.push(np.array(tokens[at:cut], np.int64))
        at = max(at, cut)
    pieces.push(tokens[at:])
    assert whole.keys == pieces.keys
    assert len(whole) == len(pieces) == len(tokens)
    positions = range(1, len(tokens) + 1)
    assert [whole.state_key(p) for p in positions] == [pieces.state_key(p) for p in positions]
    assert len({*whole.keys, *(whole.state_key(p) for p in positions)}) == len(whole.keys) + len(tokens)


@pytest.mark.parametrize(("salt", "user"), [(b"model", "v"), (b"other", "u"), (b"modelu", ""), (b"mode", "lu")])
def test_salt_and_user_isolate(salt: bytes, user: str) -> None:
    chain, other = KeyChain(b"model", "u", P), KeyChain(salt, user, P)
    for each in (chain, other):
        each.push(ids(4 * P))
    assert not {*chain.keys, chain.state_key(5), chain.node_key(0)} & {
        *other.keys,
        other.state_key(5),
        other.node_key(0),
    }


def test_any_name_of_a_user_works() -> None:
    assert KeyChain(b"s", "\ud800", P).node_key(0) != KeyChain(b"s", "?", P).node_key(0)


@pytest.mark.parametrize("token", [-1, 2**31])
def test_ids_that_keys_cannot_hold_are_refused(token: int) -> None:
    with pytest.raises(RequestError, match="token ids"):
        KeyChain(b"s", "u", P).push([1, token])


# Matches


def test_nothing_cached_is_an_empty_match() -> None:
    _, cache = make()
    assert cache.match(cache.chain("u", ids(100)), 99) == Match()


def test_pages_alone_resume_where_the_tail_restores_the_state() -> None:
    pool, cache = make()
    chain = cache.chain("u", ids(20 * P + 5))
    pages = publish(pool, cache, chain)
    found = cache.match(chain, 20 * P + 4)
    assert found == Match(tuple(pages), 20 * P - TAIL, 20 * P, 20 * P, None)
    assert found.hit_tokens == 20 * P
    assert pool.in_use == 20
    pool.release(reversed(found.pages))
    ends_with_page = cache.match(cache.chain("u", ids(20 * P)), 20 * P - 1)
    assert (ends_with_page.resume, ends_with_page.exact) == (20 * P - 1 - TAIL, 20 * P - 1)
    assert ends_with_page.frozen == 20 * P


def test_too_few_pages_are_shared_though_every_token_is_computed() -> None:
    pool, cache = make()
    chain = cache.chain("u", ids(5 * P))
    pages = publish(pool, cache, chain)
    assert cache.match(chain, 5 * P - 1) == Match(tuple(pages), 0, 5 * P, 0, None)
    assert pool.in_use == 5


@pytest.mark.parametrize("position", [1, P - 1, P, 3 * P, 10 * P + 7, 20 * P - 1, 20 * P, 20 * P + 3, 20 * P + 4])
def test_a_state_at_any_position_is_where_to_resume(position: int) -> None:
    pool, cache = make()
    chain = cache.chain("u", ids(20 * P + 5))
    pages = publish(pool, cache, chain)
    state = packed()
    assert cache.add_state(chain, position, state, anchor=True)
    found = cache.match(chain, 20 * P + 4)
    assert found.pages == tuple(pages)
    if position < 20 * P - TAIL:  # the tail before the end of the pages is shorter
        assert (found.resume, found.state) == (20 * P - TAIL, None)
    else:
        assert (found.resume, found.exact) == (position, position)
        assert found.state is state


def test_a_state_beyond_the_limit_or_of_other_tokens_is_not_used() -> None:
    pool, cache = make()
    chain = cache.chain("u", ids(5 * P + 5))
    publish(pool, cache, chain)
    for position in (4 * P, 5 * P + 2, 5 * P + 5):
        cache.add_state(chain, position, packed(), anchor=True)
    assert cache.match(chain, 5 * P + 4).resume == 5 * P + 2
    assert cache.match(chain, 5 * P + 1).resume == 4 * P
    other = ids(5 * P + 5)
    other[5 * P + 1] += 1
    assert cache.match(cache.chain("u", other), 5 * P + 4).resume == 4 * P
    other[4 * P - 1] += 1
    parted = cache.match(cache.chain("u", other), 5 * P + 4)
    assert (parted.resume, parted.frozen) == (0, 3 * P)
    assert cache.match(cache.chain("v", ids(5 * P + 5)), 5 * P + 4) == Match()


def test_two_states_of_one_length_under_one_page() -> None:
    pool, cache = make()
    chains = [cache.chain("u", [*ids(P), *ids(8, seed=seed)]) for seed in (1, 2)]
    publish(pool, cache, chains[0])
    states = [packed(), packed()]
    for chain, state in zip(chains, states, strict=True):
        cache.add_state(chain, P + 8, state, anchor=True)
    for chain, state in zip(chains, states, strict=True):
        chain.push([1])
        assert cache.match(chain, P + 8).state is state


def test_a_state_without_its_pages_waits_until_they_are_back() -> None:
    pool, cache = make(pages=8)
    chain = cache.chain("u", ids(4 * P + 5))
    publish(pool, cache, chain)
    cache.add_state(chain, 2 * P + 3, packed(), anchor=True)
    cache.add_state(chain, 4 * P + 1, packed(), anchor=True)
    others = pool.alloc(6)
    assert others is not None  # two pages of four are left
    found = cache.match(chain, 4 * P + 4)
    assert (found.resume, len(found.pages)) == (2 * P + 3, 2)
    pool.release([*found.pages[::-1], *others])
    others = pool.alloc(7)
    assert others is not None
    found = cache.match(chain, 4 * P + 4)
    assert (found.resume, len(found.pages)) == (0, 1)
    pool.release([*found.pages, *others])
    again = pool.alloc(4)
    assert again is not None
    for key, page in zip(chain.keys, again, strict=True):
        pool.register(page, key)
    assert cache.match(chain, 4 * P + 4).resume == 4 * P + 1


def test_a_page_already_known_is_not_swapped() -> None:
    pool, cache = make()
    chain = cache.chain("u", ids(P))
    (first,) = publish(pool, cache, chain)
    mine = pool.alloc(1)
    assert mine is not None
    assert pool.register(mine[0], chain.keys[0]) != mine[0]
    assert cache.match(chain, P - 1).pages == (first,)


def test_only_used_matches_count() -> None:
    pool, cache = make()
    chain = cache.chain("u", ids(20 * P))
    publish(pool, cache, chain)
    cache.match(chain, 20 * P - 1)
    assert cache.stats.hit_tokens == 0
    cache.record(cache.match(chain, 20 * P - 1))
    assert (cache.stats.hit_tokens, cache.stats.cached_tokens) == (20 * P, 20 * P - 1 - TAIL)


# States


def test_anchors_outlive_what_lies_between_and_use_makes_an_anchor() -> None:
    pool, cache = make(state_bytes=4)
    chain = cache.chain("u", ids(6 * P))
    publish(pool, cache, chain)
    for position, anchor in ((1, False), (2, True), (3, False), (4, False)):
        assert cache.add_state(chain, position, packed(), anchor=anchor)
    assert cache.has_state(chain, 1)  # an anchor now, and younger than 2
    assert cache.add_state(chain, 5, packed(2), anchor=True)
    assert [cache.has_state(chain, p) for p in (1, 2, 3, 4, 5)] == [True, True, False, False, True]
    assert not cache.add_state(chain, 6, packed(), anchor=False), "no anchor goes for a state between"
    assert cache.add_state(chain, 6, packed(), anchor=True)
    assert [cache.has_state(chain, p) for p in (1, 2, 5, 6)] == [False, True, True, True]
    assert (cache.stats.states_cached, cache.stats.state_bytes_cached, cache.stats.evicted_states) == (3, 4, 3)
    assert not cache.add_state(chain, 7, packed(5), anchor=True), "larger than all room"
    assert cache.stats.states_cached == 3
    check_prefix(cache)


def test_a_state_is_kept_once() -> None:
    _, cache = make(state_bytes=2)
    chain = cache.chain("u", ids(9))
    for _ in range(3):
        assert cache.add_state(chain, 9, packed(), anchor=True)
    assert (cache.stats.states_cached, cache.stats.state_bytes_cached) == (1, 1)


def test_where_states_are_kept() -> None:
    _, cache = make(interval=P + 1)
    assert cache.interval == 2 * P
    cold = cache.cuts(Match(), 0, 5 * P + 3, prompt=5 * P + 3)
    between = [Cut(2 * P, False), Cut(4 * P, False)]
    assert cold == [*between, Cut(5 * P, False), Cut(5 * P + 3, True)]
    assert cache.cuts(Match(), 0, 6 * P, prompt=6 * P) == [*between, Cut(5 * P, False), Cut(6 * P, True)]
    marked = cache.cuts(Match(), 0, 5 * P + 3, prompt=5 * P + 3, marks=[7, 4 * P])
    assert marked == [Cut(7, True), Cut(2 * P, False), Cut(4 * P, True)]
    parted = Match((1, 2, 3), resume=P, frozen=3 * P, exact=P)
    assert cache.cuts(parted, P, 4 * P, prompt=9 * P) == [between[0], Cut(3 * P, True), between[1]]
    tail = Match((1, 2, 3), resume=P, frozen=3 * P, exact=3 * P)
    assert cache.cuts(tail, P, 4 * P, prompt=9 * P) == [Cut(3 * P, True), between[1]], "none before it is exact"
    assert cache.cuts(tail, 3 * P, 4 * P - 1, prompt=9 * P) == []


# Endings


def test_what_followed_a_mark_goes_first_once_a_prompt_went_another_way() -> None:
    pool, cache = make(pages=12)
    mark = 2 * P + 5
    older = cache.chain("u", ids(4 * P, seed=1))
    publish(pool, cache, older)
    thought = cache.chain("u", ids(7 * P))
    publish(pool, cache, thought)
    cache.finish(thought, mark)
    beside = cache.chain("u", [*ids(P), *ids(P, seed=2)])  # leaves before the mark: says nothing of what followed it
    pool.release(reversed(cache.match(beside, 2 * P - 1).pages))
    following = cache.chain("u", [*ids(mark), *ids(2 * P, seed=3)])
    taken = [pool.alloc(2)]
    assert [pool.lookup(key) is not None for key in older.keys] == [True, True, True, False], "the older one ages"
    assert len(cache.match(following, 4 * P).pages) == 2
    taken.append(pool.alloc(3))
    assert None not in taken
    assert [pool.lookup(key) is not None for key in thought.keys] == [True] * 4 + [False] * 3
    assert [pool.lookup(key) is not None for key in older.keys] == [True, True, True, False]


def test_what_followed_a_mark_stays_when_prompts_go_on_with_it() -> None:
    pool, cache = make(pages=8)
    publish(pool, cache, cache.chain("u", ids(4 * P, seed=1)))
    answered = cache.chain("u", ids(4 * P))
    publish(pool, cache, answered)
    cache.finish(answered, P + 3)
    between = cache.chain("u", [*ids(3 * P), 5])
    pool.release(reversed(cache.match(between, 3 * P).pages))  # takes the first two pages of what followed
    pool.release(reversed(cache.match(cache.chain("u", ids(5 * P)), 5 * P - 1).pages))
    pool.release(reversed(cache.match(cache.chain("u", [*ids(P + 3), *ids(P, seed=2)]), 2 * P).pages))
    pool.alloc(4)
    assert all(pool.lookup(key) is not None for key in answered.keys), "older ones went"


def test_endings_are_forgotten_in_time() -> None:
    pool, cache = make(pages=3)
    for seed in range(10):
        chain = cache.chain("u", ids(2 * P, seed=seed))
        publish(pool, cache, chain)
        cache.finish(chain, P)
        cache.finish(chain, 2 * P)  # nothing followed
    assert len(cache._endings) == 3


# The disk


class Disk:
    """Keys that are on disk, as its index would know them."""

    def __init__(self, pages: Sequence[bytes] = (), states: Sequence[tuple[bytes, int, bytes]] = ()) -> None:
        self.pages, self.states = set(pages), states

    def known_pages(self, user_id: str, keys: Sequence[bytes]) -> int:
        assert user_id == "u"
        return next((i for i, key in enumerate(keys) if key not in self.pages), len(keys))

    def known_states(self, user_id: str, node_key: bytes) -> list[tuple[int, bytes]]:
        assert user_id == "u"
        return [(after, key) for node, after, key in self.states if node == node_key]


def on_disk(chain: KeyChain, pages: Sequence[int] = (), states: Sequence[int] = ()) -> Disk:
    named = [(chain.node_key(p // P), p % P, chain.state_key(p)) for p in states]
    return Disk([chain.keys[i] for i in pages], named)


def test_the_disk_is_named_only_where_it_is_better() -> None:
    pool, cache = make()
    chain = cache.chain("u", ids(20 * P + 5))
    short = cache.chain("u", ids(10 * P))
    publish(pool, cache, short)
    ram = cache.match(chain, 20 * P + 4)
    assert ram.resume == 10 * P - TAIL
    for disk in (Disk(), on_disk(chain, range(11, 20)), on_disk(chain, (), [12 * P]), on_disk(chain, (), [3])):
        assert cache.match(chain, 20 * P + 4, disk) == ram
    beside = cache.chain("u", [*ids(10 * P), 1, 2, 3, 4])
    assert cache.match(chain, 20 * P + 4, on_disk(beside, (), [10 * P + 3])) == ram


@pytest.mark.parametrize(
    ("pages", "states", "resume", "read", "state"),
    [
        (range(20), [], 20 * P - TAIL, 10, None),
        (range(10, 15), [], 15 * P - TAIL, 5, None),
        (range(20), [20 * P + 4], 20 * P + 4, 10, 20 * P + 4),
        (range(20), [20 * P + 5, 17 * P + 1], 17 * P + 1, 7, 17 * P + 1),
        (range(20), [20 * P - TAIL], 20 * P - TAIL, 10, None),
        ((), [10 * P + 3, 11 * P], 10 * P + 3, 0, 10 * P + 3),
        ((), [9 * P], 9 * P, 0, 9 * P),
    ],
)
def test_what_to_read_from_disk(
    pages: Sequence[int], states: list[int], resume: int, read: int, state: int | None
) -> None:
    pool, cache = make()
    chain = cache.chain("u", ids(20 * P + 5))
    publish(pool, cache, cache.chain("u", ids(10 * P)))
    found = cache.match(chain, 20 * P + 4, on_disk(chain, pages, states))
    assert (found.resume, len(found.pages)) == (10 * P - TAIL, 10)
    assert (found.disk_resume, found.disk_pages) == (resume, read)
    assert found.disk_state == (None if state is None else chain.state_key(state))


def test_a_state_in_ram_may_want_pages_from_disk() -> None:
    _, cache = make()
    chain = cache.chain("u", ids(6 * P + 5))
    cache.add_state(chain, 5 * P + 1, packed(), anchor=True)
    found = cache.match(chain, 6 * P + 4, on_disk(chain, range(6)))
    assert (found.resume, found.disk_resume, found.disk_pages, found.disk_state) == (0, 5 * P + 1, 5, None)


def test_what_is_remembered_of_ended_sequences_is_bounded() -> None:
    pool, cache = make()
    for seed in range(500):  # short prompts, long answers: all part at the root, and no prompt ever passes it
        chain = cache.chain("u", ids(2 * P, seed=seed % 250))
        cache.finish(chain, 3)
    (endings,) = cache._endings.values()
    assert endings[-1] == chain.keys
    assert len(endings) == len({each[0] for each in endings}) <= pool.count


# Storms


class Running(NamedTuple):
    user: str
    chain: KeyChain
    tokens: list[int]
    pages: list[int]


class Storm:
    """Requests of a few users over a small pool, beside a plain record of what every page and state stands for."""

    def __init__(self, seed: int) -> None:
        self.luck = random.Random(seed)
        self.pool, self.cache = make(pages=60, state_bytes=40)
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}  # page -> user and all tokens to its end
        self.states: dict[int, tuple[str, tuple[int, ...]]] = {}  # id of a packed state -> user and tokens before it
        self.arrays: list[np.ndarray] = []  # keeps ids apart
        self.running: list[Running] = []
        self.past: list[tuple[str, list[int]]] = [("a", []), ("b", [])]
        self.hits = 0

    def more(self, most: int) -> list[int]:
        return [self.luck.randrange(2) for _ in range(self.luck.randrange(1, most))]

    def submit(self) -> None:
        user, tokens = self.luck.choice(self.past)
        tokens = [*tokens[: self.luck.randrange(len(tokens) + 1)], *self.more(2 * P)]
        if self.luck.random() < 0.1:
            user = self.luck.choice("ab")
        chain = self.cache.chain(user, tokens)
        limit = len(tokens) - 1
        expected = self.best(user, tokens, limit)
        match = self.cache.match(chain, limit)
        assert (len(match.pages), match.resume) == expected
        for at, page in enumerate(match.pages):
            assert self.content[page] == (user, tuple(tokens[: (at + 1) * P])), "a wrong page"
        if match.state is not None:
            assert self.states[id(match.state)] == (user, tuple(tokens[: match.resume])), "a wrong state"
        self.hits += match.resume > 0
        request = Running(user, chain, tokens, list(match.pages))
        if not self.compute(request):
            self.release(request)
            return
        self.running.append(request)

    def best(self, user: str, tokens: list[int], limit: int) -> tuple[int, int]:
        """(pages, resume) by looking at everything there is, but at twins of a page only once they have its place."""
        found = {self.content[page] for page in self.pool._by_key.values()}
        depth = 0
        while (depth + 1) * P <= limit + 1 and (user, tuple(tokens[: (depth + 1) * P])) in found:
            depth += 1
        held = [*self.cache._anchors.values(), *self.cache._between.values()]
        states = [self.states[id(state.packed)] for state in held]
        fits = [
            len(before) for owner, before in states
            if owner == user and len(before) <= limit and len(before) < (depth + 1) * P
            and tuple(tokens[: len(before)]) == before
        ]  # fmt: skip
        return depth, max([*fits, min(depth * P, limit) - TAIL, 0])

    def compute(self, request: Running) -> bool:
        pages = self.pool.alloc(-(-len(request.tokens) // P) - len(request.pages))
        if pages is None:
            return False
        for page in pages:
            self.content.pop(page, None)
        request.pages.extend(pages)
        for at in range(len(request.tokens) // P):
            self.content.setdefault(request.pages[at], (request.user, tuple(request.tokens[: (at + 1) * P])))
            self.pool.register(request.pages[at], request.chain.keys[at])
        return True

    def extend(self) -> None:
        request = self.luck.choice(self.running)
        new = self.more(P)
        request.tokens.extend(new)
        request.chain.push(new)
        if not self.compute(request):
            self.finish(request)

    def keep(self) -> None:
        request = self.luck.choice(self.running)
        position = self.luck.randrange(1, len(request.tokens) + 1)
        packed = np.zeros(self.luck.randrange(1, 4), np.uint8)
        if self.cache.has_state(request.chain, position):
            return
        self.arrays.append(packed)
        self.states[id(packed)] = request.user, tuple(request.tokens[:position])
        self.cache.add_state(request.chain, position, packed, anchor=self.luck.random() < 0.5)

    def finish(self, request: Running) -> None:
        self.running.remove(request)
        self.past = [*self.past[-30:], (request.user, request.tokens[: 12 * P])]
        self.release(request)
        self.cache.finish(request.chain, self.luck.randrange(len(request.tokens)))

    def release(self, request: Running) -> None:
        self.pool.release(reversed(request.pages))

    def run(self, operations: int) -> None:
        for number in range(operations):
            act = self.luck.random()
            if not self.running or (act < 0.3 and len(self.running) < 8):
                self.submit()
            elif act < 0.6:
                self.extend()
            elif act < 0.8:
                self.keep()
            else:
                self.finish(self.luck.choice(self.running))
            holders = [page for request in self.running for page in request.pages]
            assert self.pool.in_use == len(set(holders))
            if number % 100 == 0:
                assert all(self.pool._references[page] == holders.count(page) for page in set(holders))
                check_pool(self.pool)
                check_prefix(self.cache)
        for request in list(self.running):
            self.finish(request)
        check_pool(self.pool)
        check_prefix(self.cache)


def test_a_storm_leaks_nothing_and_finds_the_best_and_nothing_wrong() -> None:
    storm = Storm(seed=1)
    storm.run(20_000)
    assert storm.pool.in_use == 0
    assert storm.hits > 1000
    assert storm.pool.evictions > 1000
    assert storm.cache.stats.evicted_states > 1000
