"""Host memory behind the pools, on a CPU by the same calls: same bits from every tier, and nothing left behind."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.invariants import check_pool, check_prefix
from tests.engine.small import HELPER, engine_of, params, plan_of, prompt

from pelagos.config import preset, tiny
from pelagos.engine import LocalEngine
from pelagos.engine.pages import PagePool
from pelagos.engine.runner import Pools
from pelagos.engine.tiers import Copy, Tiers, _runs
from pelagos.errors import CacheError, CapacityError
from pelagos.kernels.layout import CacheLayout

PROMPTS = [prompt(length, seed) for seed, length in enumerate((300, 140, 385, 17))]
TIGHT = {"kv_bytes": 310_000, "host_kv_bytes": 4 << 20}  # five pages and four slots, 146 blocks
PLAIN = CacheLayout(tiny())
FIVE = 4 * PLAIN.slot_bytes + 5 * PLAIN.page_bytes  # for five pages without drafts
Answer = list[tuple[int, float]]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def singly(native: bool) -> list[Answer]:
    """What each prompt gets by itself, cold, without drafts and tiers."""
    engine = engine_of(native=native, threaded=False, prefix_cache=False, speculation=False)
    found = [run(engine, [each])[0] for each in PROMPTS]
    engine.close()
    return found


@pytest.fixture(scope="module")
def alone() -> list[Answer]:
    return singly(HELPER)


def tiered(**options: Any) -> LocalEngine:
    return engine_of(**{"native": HELPER, "threaded": False, "speculation": 2} | TIGHT | options)


def run(engine: LocalEngine, prompts: list[list[int]], **changes: Any) -> list[Answer]:
    streams = [engine.submit(each, params(logprobs=True, **changes)) for each in prompts]
    finish(engine, streams)
    return [[(step.token_id, step.logprob) for step in stream] for stream in streams]


def finish(engine: LocalEngine, streams: list[Any]) -> None:
    deadline = time.monotonic() + 60
    while any(stream.finish_reason is None for stream in streams):
        if not engine.step():
            time.sleep(0.0005)
        assert time.monotonic() < deadline, engine.stats()


def tiers_of(engine: LocalEngine) -> Tiers:
    return engine._tiers


def check_empty(engine: LocalEngine) -> None:
    """Nothing is held in any tier once copies are over."""
    tiers_of(engine).drain()
    engine.step()
    stats = engine.stats()
    assert (stats.pages_in_use, stats.slots_in_use, stats.host["in_use"]) == (0, 0, 0)
    assert (engine._scheduler.leaving, engine._packing, len(tiers_of(engine)._spare)) == (0, {}, 4)
    check_pool(engine._pool)
    check_pool(tiers_of(engine).index)
    check_prefix(engine._prefix)


def forget(engine: LocalEngine, *, host: bool = False) -> None:
    """Have every cached page copied out, and evict them all: from the pool, and from the host's tier too."""
    tiers = tiers_of(engine)
    tiers.drain()
    while tiers.clean(engine._pool, lambda: None):
        tiers.drain()
    for pool in (engine._pool, tiers.index) if host else (engine._pool,):
        pages = pool.alloc(pool.free + pool.cached)
        assert pages is not None
        pool.release(pages)


class Gate:
    """Copies of one direction wait until it is opened; nothing is copied out ahead of time, unless `cleans`."""

    def __init__(
        self, engine: LocalEngine, lane: str, monkeypatch: pytest.MonkeyPatch, *, cleans: bool = False
    ) -> None:
        tiers, self.open, self.waiting = tiers_of(engine), threading.Event(), threading.Event()
        move, own = tiers._move, getattr(tiers, lane)

        def slow(lane: Any, copy: Copy, pages: Any, blocks: Any) -> int:
            if lane is own:
                self.waiting.set()
                assert self.open.wait(30)
            return move(lane, copy, pages, blocks)

        monkeypatch.setattr(tiers, "_move", slow)
        if not cleans:
            monkeypatch.setattr(tiers, "clean", lambda *_: False)


def wait_for(gate: Gate, engine: LocalEngine) -> None:
    """Step until a copy stands at the gate."""
    deadline = time.monotonic() + 30
    while not gate.waiting.is_set():
        engine.step()
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "options", [{}, {"native": False}, {"chunk_tokens": 50, "speculation": False}], ids=["drafts", "torch", "chunks"]
)
def test_the_same_bits_through_host_memory(options: dict[str, Any], alone: list[Answer]) -> None:
    """Pages come back, sequences are parked and come back, states go out and in."""
    engine, alone = tiered(**options), singly(False) if "native" in options else alone
    for _ in range(3):
        assert run(engine, PROMPTS) == alone
    forget(engine)
    before = engine.stats()
    assert [run(engine, [each])[0] for each in PROMPTS] == alone
    stats = engine.stats()
    assert stats.host["copied_in"] >= before.host["copied_in"] + 3
    assert stats.cached_tokens > before.cached_tokens + 500
    assert stats.swaps > 0
    check_empty(engine)
    engine.close()


def test_what_is_planned_is_used() -> None:
    engine = tiered()
    plan, tiers = engine.plan, tiers_of(engine)
    held = tiers._blocks.nbytes + tiers._states.nbytes
    assert plan.host_bytes == held + plan.state_bytes <= TIGHT["host_kv_bytes"] < plan.host_bytes + plan.page_bytes
    assert plan.kv_bytes == engine._pools.page_bytes.nbytes + engine._pools.slot_bytes.nbytes <= TIGHT["kv_bytes"]
    assert engine.stats().bytes_planned["host_bytes"] == plan.host_bytes
    run(engine, [prompt(500, seed) for seed in range(6)])
    assert engine.stats().state_bytes_cached <= plan.state_bytes
    engine.close()


@pytest.mark.parametrize("damage", [False, True])
def test_from_disk_through_host_memory(tmp_path: Path, damage: bool, alone: list[Answer]) -> None:
    options = {"disk_dir": tmp_path / "cache", "disk_policy": "turns", "kv_bytes": 1 << 20}
    engine = tiered(**options)
    run(engine, PROMPTS[::-1])
    check_empty(engine)
    engine.close()
    if damage:
        largest = max((tmp_path / "cache").rglob("*.pages1"), key=lambda path: path.stat().st_size)
        raw = bytearray(largest.read_bytes())
        raw[-1] ^= 1  # the last of several pages
        largest.write_bytes(raw)
    engine = tiered(**options)
    assert [run(engine, [each])[0] for each in PROMPTS] == alone
    stats = engine.stats()
    assert stats.disk["damaged"] == damage
    assert damage or stats.host["copied_in"] == 6
    assert stats.disk["hits"] > 0
    forget(engine)  # what came from the disk is in host memory now
    hits = engine.stats().disk["hits"]
    assert run(engine, PROMPTS[:1]) == alone[:1]
    assert engine.stats().disk["hits"] == hits
    forget(engine, host=True)
    assert run(engine, PROMPTS[1:2]) == alone[1:2]
    assert engine.stats().disk["hits"] > hits
    check_empty(engine)
    engine.close()


def test_the_coldest_are_copied_first_and_stay_the_next_to_go() -> None:
    pools, pool = Pools(PLAIN, pages=8, slots=1), PagePool(8)
    pools.pages.random_(0, 256)
    tiers, keys = Tiers(pools, 6), [bytes([at]) * 16 for at in range(6)]
    pages = pool.alloc(6)
    assert pages is not None
    for key, page in zip(keys, pages, strict=True):
        pool.register(page, key)
    pool.release(pages[::-1])  # a chain: its end is the first to go
    over: list[int] = []
    for count in (1, 2, 3):
        assert tiers.clean(pool, lambda: over.append(1))
        assert pool.in_use == 1  # held while it is copied
        tiers.drain()
        assert len(over) == count
        assert [tiers.index.lookup(key) is not None for key in keys] == [at >= 6 - count for at in range(6)]
        assert [key for key, _ in pool.coldest(9)] == keys[::-1]
    assert not tiers.clean(pool, lambda: None)  # half of the blocks: more would drive out what is there
    taken = pool.alloc(5)  # the three ends are evicted
    assert taken is not None
    assert [pool.lookup(key) for key in keys] == [*pages[:3], None, None, None]
    for _ in range(3):
        assert tiers.clean(pool, lambda: None)
        tiers.drain()
    assert tiers.index.coldest(9) == [(key, tiers.index.lookup(key)) for key in keys[::-1]]
    came: list[int] = []
    tiers.read("", keys[3:], None, taken[:3], lambda count, _: came.append(count))
    tiers.drain()
    assert came == [3]
    assert torch.equal(pools.pages[pages[0]], tiers._blocks[tiers.index.lookup(keys[0])])
    assert all(torch.equal(pools.pages[page], tiers._blocks[tiers.index.lookup(key)])
               for key, page in zip(keys[3:], taken, strict=False))  # fmt: skip
    tiers.close()


def test_others_go_on_while_one_is_copied_out(monkeypatch: pytest.MonkeyPatch, alone: list[Answer]) -> None:
    engine = tiered(speculation=False, kv_bytes=FIVE)
    gate = Gate(engine, "_out", monkeypatch)
    first = engine.submit(PROMPTS[1], params(110, logprobs=True))
    second = engine.submit(PROMPTS[0], params(90, logprobs=True))
    wait_for(gate, engine)
    assert engine._scheduler.leaving == 1
    parked = next(each for each in engine._live.values() if each.moving)
    assert parked.request_id == second.request_id
    made = engine.stats().generated_tokens
    for _ in range(20):
        engine.step()
    assert engine.stats().generated_tokens == made + 20
    gate.open.set()
    finish(engine, [first, second])
    assert [(step.token_id, step.logprob) for step in second][:16] == alone[0]
    assert engine.stats().swaps >= 1
    check_empty(engine)
    engine.close()


@pytest.mark.parametrize("lane", ["_out", "_in"])
@pytest.mark.parametrize("what", ["parked", "prefix"])
def test_an_abort_in_the_middle_of_a_copy_frees_everything(
    lane: str, what: str, monkeypatch: pytest.MonkeyPatch, alone: list[Answer]
) -> None:
    engine = tiered(speculation=False, kv_bytes=FIVE if what == "parked" else 1 << 20)
    if what == "parked":
        gate = Gate(engine, lane, monkeypatch)
        streams = [engine.submit(each, params(110)) for each in (PROMPTS[1], PROMPTS[0])]
    elif lane == "_out":  # what is cached is copied when the first request ends
        gate = Gate(engine, lane, monkeypatch, cleans=True)
        run(engine, PROMPTS[:1])
        streams = [engine.submit(PROMPTS[0], params(40)) for _ in range(2)]
    else:
        run(engine, PROMPTS[:1])
        forget(engine)
        gate = Gate(engine, lane, monkeypatch)
        streams = [engine.submit(PROMPTS[0], params(40)) for _ in range(2)]
    wait_for(gate, engine)
    for stream in streams:
        engine.abort(stream.request_id)
    threading.Timer(0.05, gate.open.set).start()
    finish(engine, streams)
    assert streams[1].finish_reason == "cancelled"
    check_empty(engine)
    assert run(engine, PROMPTS) == alone
    engine.close()


@pytest.mark.skipif(not HELPER, reason="pages of answers are kept where prompts and answers have the same bits")
def test_what_has_not_come_back_when_its_request_ends_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reopened(place: str, kv_bytes: int = 1 << 20) -> LocalEngine:
        return tiered(kv_bytes=kv_bytes, disk_dir=tmp_path / place, speculation=False, native=None)

    engine = reopened("aborted", FIVE)
    gate = Gate(engine, "_in", monkeypatch)
    streams = [engine.submit(PROMPTS[1], params(110)), engine.submit(PROMPTS[0], params(150))]
    wait_for(gate, engine)
    live = engine._live[streams[1].request_id]
    assert live.published > live.written
    keys, found = list(live.chain.keys), []
    streams[1].cancel()
    threading.Timer(0.05, gate.open.set).start()
    finish(engine, streams)
    engine.close()
    engine = reopened("whole")
    run(engine, [PROMPTS[0]], max_tokens=150)
    engine.close()
    for place in ("aborted", "whole"):
        engine = reopened(place)
        assert engine._disk is not None
        ticket = engine._disk.read("", keys, None)
        assert ticket.wait(30)
        found.append([bytes(page) for page in ticket.pages])
        engine.close()
    assert found[0] == found[1][:2] != []


def test_a_state_that_does_not_fit_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiered()
    run(engine, PROMPTS[:1])

    def refuse(*_: Any) -> None:
        raise CacheError("it was written by another layout")

    monkeypatch.setattr(CacheLayout, "unpack_state", refuse)
    streams = [engine.submit([*PROMPTS[0], 5], params(3)), engine.submit(prompt(30, 9), params(3))]
    finish(engine, streams[1:])
    while streams[0].finish_reason is None and engine._live:
        engine.step()
    with pytest.raises(CacheError, match="another layout"):
        list(streams[0])
    monkeypatch.undo()
    check_empty(engine)
    engine.close()


@pytest.mark.parametrize(("native", "disk", "rounds"), [(False, False, 20), (HELPER, False, 60), (HELPER, True, 60)])
def test_a_storm_leaves_nothing_in_any_tier(tmp_path: Path, native: bool, disk: bool, rounds: int) -> None:
    choose = random.Random(5)
    place = {"disk_dir": tmp_path / "cache", "disk_bytes": 1 << 20} if disk else {}
    engine = tiered(native=native, host_kv_bytes=550_000, **place)
    streams: list[Any] = []
    for _ in range(rounds):
        roll = choose.random()
        running = [stream for stream in streams if stream.finish_reason is None]
        if roll < 0.45 or not running:
            asked, options = (
                params(choose.randint(1, 30)),
                {"priority": choose.randint(0, 1), "user_id": choose.choice("ab")},
            )
            streams.append(engine.submit(prompt(choose.randint(1, 400), choose.randint(0, 3)), asked, **options))
        elif roll < 0.6:
            choose.choice(running).cancel()
        elif roll < 0.7 and (name := choose.choice(running).request_id) in engine._live:
            streams.append(engine.fork(name, params(choose.randint(1, 20))))
        for _ in range(choose.randint(0, 4)):
            engine.step()
    finish(engine, streams)
    check_empty(engine)
    stats = engine.stats()
    assert stats.requests_done == len(streams)
    assert min(stats.swaps, stats.host["copied_out"]) > 0
    engine.close()


@pytest.mark.parametrize("direct", [1, 1 << 30])
def test_copies_of_any_pages_and_blocks_go_where_they_belong(direct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pelagos.engine.tiers.DIRECT_BYTES", direct)
    draw = random.Random(1)
    pools = Pools(PLAIN, pages=40, slots=2)
    tiers = Tiers(pools, 60)
    tiers._in.most = tiers._out.most = 5
    pools.pages.random_(0, 256)
    before = pools.pages.clone()
    for count in (1, 4, 5, 6, 23, 40):
        pages = draw.sample(range(40), count) if count % 2 else list(range(40 - count, 40))
        blocks, others = draw.sample(range(60), count), draw.sample(range(40), count)
        for lane, given in ((tiers._out, pages), (tiers._in, others)):
            copy = lane.start(functools.partial(tiers._move, lane, pages=given, blocks=blocks))
            assert copy.future.result() == count
        assert torch.equal(pools.pages[others], before[pages])
        pools.pages.copy_(before)
    stopped = Copy()
    stopped.cancelled = True
    assert tiers._move(tiers._in, stopped, [1, 2], [0, 1]) == 0
    assert list(_runs([3, 4, 9, 8, 7, 8])) == [(0, 2), (2, 1), (3, 1), (4, 2)]
    assert list(_runs([3, 4, 5, 6], [1, 2, 8, 9])) == [(0, 2), (2, 2)]
    tiers.close()


def test_the_tier_is_planned() -> None:
    flash = preset("flash")
    alike = {"mode": "released", "kv_bytes": 3 << 30, "max_requests": 4}
    own = plan_of(flash, **alike)
    behind = plan_of(flash, **alike, apart=True, host_available=64 << 30)
    assert own.host_pages == own.host_bytes == 0
    assert behind.pages > own.pages * 1.3  # snapshots no longer take the device's room
    assert behind.host_bytes == pytest.approx(3 << 29, abs=behind.page_bytes)
    assert plan_of(flash, **alike, apart=True, host_available=4 << 30).host_bytes <= 1 << 30
    large = plan_of(flash, **alike, host_kv_bytes=20 << 30)
    assert 20 << 30 >= large.host_bytes > (20 << 30) - large.page_bytes
    assert plan_of(flash, **alike, apart=True, prefix_cache=False, swap=False).host_pages == 0
    for wrong in ({"host_kv_bytes": 1 << 20}, {"host_kv_bytes": 9 << 30, "host_available": 8 << 30}):
        with pytest.raises(CapacityError, match=f"host_kv_bytes={wrong['host_kv_bytes']:,}"):
            plan_of(flash, **alike, **wrong)


@pytest.mark.parametrize("case", ["clean", "park", "unpark", "pack", "restore"])
def test_a_copy_that_fails_once_costs_time_alone(
    case: str, monkeypatch: pytest.MonkeyPatch, alone: list[Answer]
) -> None:
    parks = case in ("park", "unpark")
    engine = tiered(speculation=False, kv_bytes=FIVE if parks else 1 << 20)
    tiers, failed = tiers_of(engine), threading.Event()
    where, name = (CacheLayout, "pack_state") if case == "pack" else (tiers, "_move")
    real, lane = getattr(where, name), tiers._in if case in ("restore", "unpark") else tiers._out

    def once(*given: Any) -> Any:
        if not failed.is_set() and (case == "pack" or given[0] is lane):
            failed.set()
            raise MemoryError("once")
        return real(*given)

    monkeypatch.setattr(where, name, once)
    if parks:
        monkeypatch.setattr(tiers, "clean", lambda *_: False)
        answers = run(engine, [PROMPTS[1], PROMPTS[0]], max_tokens=100)
        assert [each[:16] for each in answers] == [alone[1], alone[0]]
    for _ in range(3):
        assert run(engine, PROMPTS[:1]) == alone[:1]
        if not parks:
            forget(engine)
    assert engine.stats().host["failed"] == failed.is_set() == 1
    check_empty(engine)
    engine.close()


def test_the_disk_gets_all_pages_through_few_blocks(tmp_path: Path) -> None:
    options = {"disk_dir": tmp_path / "cache", "kv_bytes": 2 << 20, "host_kv_bytes": 480_000, "speculation": False}
    long, cached = prompt(2500, 3), []
    for _ in range(2):
        engine = tiered(**options)
        stream = engine.submit(long, params(2))
        finish(engine, [stream])
        check_empty(engine)
        assert engine.stats().disk["dropped"] == 0
        cached.append((engine.plan.host_pages, stream.cached_tokens))
        engine.close()
        engine = engine_of(**(options | {"threaded": False, "native": HELPER, "host_kv_bytes": 0}))
        chain = engine._prefix.chain("", long)
        assert tiers_of(engine).known_pages("", chain.keys) == 19
        engine.close()
    assert cached == [(12, 0), (12, 19 * 128 - PLAIN.recompute_tokens)]


def test_what_is_used_while_others_are_copied_out_is_the_last_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    pools, pool, opened = Pools(PLAIN, pages=16, slots=1), PagePool(16), threading.Event()
    tiers, keys = Tiers(pools, 16), [bytes([at]) * 16 for at in range(6)]
    pages = pool.alloc(6)
    assert pages is not None
    for key, page in zip(keys, pages, strict=True):
        pool.register(page, key)
    pool.release(pages)
    move = tiers._move
    monkeypatch.setattr(tiers, "_move", lambda *given: (opened.wait(30), move(*given))[1])
    assert tiers.clean(pool, lambda: None)
    for used in (5, 0):  # one that lay cached, one that is being copied
        pool.share([pages[used]])
        pool.release([pages[used]])
    opened.set()
    tiers.drain()
    order = [key[0] for key, _ in pool.coldest(9)]
    assert order[:4] == [1, 2, 3, 4]
    assert set(order[4:]) == {0, 5}
    tiers.close()


def test_states_leave_while_pages_are_copied_out(alone: list[Answer]) -> None:
    engine, opened = tiered(speculation=False, kv_bytes=2 << 20, max_requests=6), threading.Event()
    tiers = tiers_of(engine)
    tiers._start(tiers._out, lambda _: opened.wait(60), lambda _: None)
    prompts = [prompt(17, seed) for seed in range(6)]  # their states leave at once, more than there are rows
    answers = run(engine, [*prompts, PROMPTS[3]])
    assert not opened.is_set()
    assert answers[-1] == alone[3]
    opened.set()
    check_empty(engine)
    assert engine.stats().states_cached == (1 + HELPER) * len(prompts)  # behind answers too where those have their bits
    engine.close()
