"""An engine over two ranks: requests go to the one with room, what fits on none is refused; over gloo."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests import two_ranks

from pelagos.config import preset
from pelagos.engine.memory import MemoryPlan
from pelagos.engine.over_ranks import _Lead
from pelagos.engine.pages import PagePool
from pelagos.engine.prefix import KeyChain, Match
from pelagos.engine.scheduler import Request, Scheduler
from pelagos.kernels.layout import CacheLayout, Draw, Span
from pelagos.model.cuda_group import cut_width, group_bytes

ROOT = Path(__file__).resolve().parents[2]


def test_two_ranks_serve() -> None:
    start()


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_nano_over_two_gpus_gives_the_same_bits_in_any_company() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    start("cuda")


def start(*arguments: str) -> None:
    said = two_ranks.run(Path(__file__).with_name("ranks_worker.py"), *arguments)
    assert all(f"rank {rank} of 2: done" in said for rank in range(2))


def test_as_many_as_the_budget_holds_run_at_once_and_one_more_waits() -> None:
    """The bench of thirty requests of a million, with four of a thousand; what no memory is there for is refused."""
    sizes = ("--shape", "nano", "--device", "cpu", "--layers", "0:3", "--context", "1024", "--requests", "4")
    bench = ROOT / "benchmarks" / "group_admit.py"
    row = json.loads(two_ranks.run(bench, *sizes, "--beyond", "100000000", "--steps", "1"))
    assert row["good"]
    assert (row["running"], row["waiting"], row["shortest"] > 896) == (4, 1, True)
    assert "ask for at most" in row["refusal"]


def test_what_the_others_are_told_does_not_grow_with_the_context() -> None:
    """Thirty rows a step: of pages what is new, and that once; the others know the same tables."""
    sizes = []
    for count in (8, 8192):
        sent: list[bytes] = []
        group = SimpleNamespace(told=lambda thing, sent=sent: sent.append(pickle.dumps(thing)))
        given = {"numeric_path": "", "two_kinds": True, "draws": True, "weight_bytes": 0, "scratch_bytes": None}
        forward = SimpleNamespace(**given, known={}, forward=lambda told: None)
        lead, theirs = _Lead(forward, group), dict[int, np.ndarray]()  # pyright: ignore[reportArgumentType]
        longer = [np.arange(count + 1, dtype=np.int32) + slot for slot in range(30)]
        shorter = [table[:count] for table in longer]
        for tables in (shorter, shorter, longer, longer):
            lead.forward([Span(np.array([7]), 128 * count - 1, slot, table, decode=True, draws=(Draw(),))
                          for slot, table in enumerate(tables)])  # fmt: skip
            told = pickle.loads(sent[-1])[1].whole(theirs)
            assert all(map(np.array_equal, told.pages, tables))
            forward.known |= dict(enumerate(tables))  # as a forward does that runs them
            theirs |= dict(enumerate(told.pages))
        sizes.append([len(each) for each in sent[1:]])
    assert sizes[0][::2] == sizes[1][::2]
    assert sizes[0][0] == sizes[0][2]
    assert max(map(max, sizes)) < 6_000


def test_thirty_sequences_of_a_million_on_two_h200() -> None:
    config, million = cut_width(preset("flash"), 2), 1 << 20
    layout = CacheLayout(config, "released", 4)
    assert layout.page_bytes / layout.page_tokens < 3_700
    each = layout.pages_for(million)
    # The device, a GB of the driver's, and weights as measured: docs/log/0009-placement.md.
    room = 150_754_820_096 - (1 << 30) - 83_762_280_184 - group_bytes(layout, 2, million)
    assert 15 * (each * layout.page_bytes + layout.slot_bytes) <= room
    pool, tokens = PagePool(30 * each, ranks=2), [0] * million
    scheduler = Scheduler(
        pool, slots=40, page_tokens=layout.page_tokens, chunk_tokens=million, match=lambda _: Match(),
        next_stop=lambda _: 1 << 62, ranks=2,
    )  # fmt: skip
    for arrival in range(32):
        scheduler.add(Request(str(arrival), tokens, million, KeyChain(b"", "", layout.page_tokens), arrival=arrival))
    for _ in range(40):
        for request, count in scheduler.plan().works:
            request.computed = min(request.computed + count, million - 1)  # it goes on decoding
    assert sorted(request.home for request in scheduler.running) == [0] * 15 + [1] * 15
    assert all({page % 2 for page in request.pages} == {request.home} for request in scheduler.running)
    assert len(scheduler.waiting) == 2
    plan = MemoryPlan(30 * each, 40, 0, layout.page_bytes, layout.slot_bytes, layout.page_tokens, ranks=2)
    assert plan.refuse(million, 0) is None
    assert "the engine has" in (plan.refuse(16 * million, 0) or "")
