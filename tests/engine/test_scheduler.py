"""The scheduler alone: shares, order, pages, and who gives way."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pelagos.engine.pages import PagePool
from pelagos.engine.prefix import KeyChain, Match
from pelagos.engine.scheduler import Plan, Preempted, Request, Scheduler

PAGE = 128


def scheduler(pages: int = 100, slots: int = 4, chunk: int = 512, stop: int = 1 << 40, **given: Any) -> Scheduler:
    return Scheduler(
        PagePool(pages), slots=slots, page_tokens=PAGE, chunk_tokens=chunk,
        match=lambda _: Match(), next_stop=lambda _: stop, **given,
    )  # fmt: skip


def request(name: str, length: int, arrival: int, priority: int = 0) -> Request:
    chain = KeyChain(b"", "", PAGE)
    return Request(name, [5] * length, length, chain, priority=priority, arrival=arrival)


def run(plan: Plan) -> dict[str, int]:
    """Pretend the step ran: positions computed, and one more token for whoever has computed all."""
    for work in plan.works:
        work.request.computed += work.tokens
        if work.request.pending == 0:
            work.request.tokens.append(7)
    return {work.request.request_id: work.tokens for work in plan.works}


def test_decodes_go_on_beside_prefill_which_shares_what_is_left() -> None:
    book = scheduler()
    book.add(request("a", 10, 0))
    assert run(book.plan()) == {"a": 10}
    book.add(request("b", 2000, 1))
    book.add(request("c", 100, 2))
    assert run(book.plan()) == {"a": 1, "b": 511}
    # c comes in at the next step with its share, and what it does not need goes back to b.
    assert run(book.plan()) == {"a": 1, "b": 411, "c": 100}
    book.add(request("d", 2000, 3))
    assert run(book.plan()) == {"a": 1, "b": 255, "c": 1, "d": 255}


def test_two_long_prompts_share_each_step() -> None:
    book = scheduler(chunk=512)
    book.add(request("a", 300, 0))
    book.add(request("b", 3000, 1))
    assert run(book.plan()) == {"a": 300, "b": 212}
    book.add(request("c", 3000, 2))
    assert run(book.plan()) == {"a": 1, "b": 256, "c": 255}
    book.running[1].computed = 3000 - 100  # b is nearly through: c has the rest
    assert run(book.plan()) == {"a": 1, "b": 100, "c": 411}


def test_a_share_that_nobody_can_take_is_used() -> None:
    book = scheduler(pages=8, slots=4, chunk=512)
    book.add(request("a", 1000, 0))
    assert run(book.plan()) == {"a": 512}
    book._match = lambda _: None  # what b has on disk is still being read
    book.add(request("b", 900, 1))
    assert run(book.plan()) == {"a": 488}


def test_a_chunk_ends_where_state_is_kept() -> None:
    book = scheduler(stop=384)
    book.add(request("a", 1000, 0))
    assert run(book.plan()) == {"a": 384}


def test_the_lowest_rank_gives_way_and_comes_back() -> None:
    book = scheduler(pages=4, slots=4)
    book.add(request("a", 250, 0))
    book.add(request("b", 250, 1))
    assert run(book.plan()) == {"a": 250, "b": 250}
    seen: list[str] = []
    for _ in range(8):
        plan = book.plan()
        seen += [each.request.request_id for each in plan.preempted]
        run(plan)
    assert seen == ["b"]
    assert [each.request_id for each in book.waiting] == ["b"]
    [a] = book.running
    book.remove(a)
    assert "b" in run(book.plan())


def test_what_is_swapped_out_keeps_its_frozen_entries_while_it_waits_for_room() -> None:
    book = scheduler(pages=4)
    book.add(request("a", 500, 0))
    run(book.plan())
    swapped = request("b", 300, 1)
    swapped.swapped_at, swapped.frozen = 200, 256
    book.add(swapped)
    run(book.plan())
    assert (swapped.slot, swapped.computed, swapped.frozen) == (-1, 0, 256)
    book.remove(book.running[0])
    assert run(book.plan()) == {"b": 100}
    assert (swapped.computed, swapped.frozen) == (300, 256)


def test_a_higher_priority_takes_the_slot_of_a_lower_one() -> None:
    book = scheduler(slots=1)
    book.add(request("low", 50, 0))
    run(book.plan())
    book.add(request("same", 50, 1))
    assert list(run(book.plan())) == ["low"]
    book.add(request("high", 50, 2, priority=1))
    plan = book.plan()
    assert [each.request.request_id for each in plan.preempted] == ["low"]
    assert list(run(plan)) == ["high"]


def test_who_cannot_start_yet_makes_nobody_give_way() -> None:
    book = scheduler(slots=1)
    book.add(request("low", 50, 1))
    run(book.plan())
    high = request("high", 50, 2, priority=1)
    high.moving = True
    book.add(high)
    assert not book.plan().preempted
    high.moving = False
    assert [each.request.request_id for each in book.plan().preempted] == ["low"]


def test_a_copy_that_cannot_begin_loses_neither_slot_nor_pages() -> None:
    def save(_: Preempted) -> bool:
        raise MemoryError("no staging")

    book = scheduler(pages=4, slots=2, save=save)
    low, high = request("low", 2 * PAGE, 0), request("high", 2 * PAGE, 1, priority=1)
    for each in (low, high):
        book.add(each)
    run(book.plan())
    with pytest.raises(MemoryError, match="no staging"):
        book.plan()
    for each in (low, high):  # as the engine does with all it knows when a step fails
        book.remove(each)
    assert (book._pool.free, book.slots_in_use) == (4, 0)


def test_a_storm_of_requests_leaves_nothing() -> None:
    choose = random.Random(4)
    book = scheduler(pages=30, slots=3, chunk=300)
    live: list[Request] = []
    for turn in range(3000):
        if choose.random() < 0.2 and len(live) < 8:
            live.append(request(f"r{turn}", choose.randint(1, 900), turn, choose.randint(0, 2)))
            book.add(live[-1])
        if choose.random() < 0.05 and live:
            gone = live.pop(choose.randrange(len(live)))
            book.remove(gone)
        plan = book.plan()
        owned = [page for each in book.running for page in each.pages]
        assert len(owned) == len(set(owned))
        slots = [each.slot for each in book.running]
        assert len(slots) == len(set(slots)) <= 3
        assert sum(work.tokens for work in plan.works) <= 300 + PAGE + 3
        for work in plan.works:
            assert len(work.request.pages) * PAGE >= work.request.computed + work.tokens
        assert plan.works or not live
        run(plan)
        for each in [each for each in live if len(each.tokens) > each.prompt_tokens + 20]:
            live.remove(each)
            book.remove(each)
    for each in live:
        book.remove(each)
    assert (book.slots_in_use, book._pool.in_use) == (0, 0)
