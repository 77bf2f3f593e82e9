"""Blocks of experts on a CPU: whatever changes places, a table entry points at all bytes of its own expert."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from benchmarks.stream_decode import draw_routes

from pelagos.config import preset
from pelagos.errors import ConfigError
from pelagos.kernels.prefill_experts import base_bytes
from pelagos.model.streaming import AT_ONCE, ExpertBlocks

CONFIG = dataclasses.replace(preset("nano"), num_nextn_predict_layers=0, moe_intermediate_size=128, hidden_size=128)
COUNT = CONFIG.num_hidden_layers * CONFIG.n_routed_experts


def filled(fast: int) -> tuple[ExpertBlocks, torch.Tensor]:
    """Blocks whose every byte is drawn, and what each expert's are."""
    size = ExpertBlocks(CONFIG, torch.device("cpu"), 1 << 30).block_bytes
    blocks = ExpertBlocks(CONFIG, torch.device("cpu"), fast * size)
    assert len(blocks.fast) == fast
    want = torch.randint(116, 121, (COUNT, blocks.block_bytes), dtype=torch.uint8)
    for number in range(COUNT):
        layer, expert = divmod(number, blocks.experts)
        for part, source in zip(blocks.parts(layer, expert), blocks._views(want[number]), strict=True):
            part.copy_(source)
    return blocks, want


def check(blocks: ExpertBlocks, want: torch.Tensor) -> None:
    base = blocks.fast.view(-1)
    for number, offset in enumerate(blocks.table.view(-1).tolist()):
        block = base.as_strided((blocks.block_bytes,), (1,), offset)
        for got, source in zip(blocks._views(block), blocks._views(want[number]), strict=True):
            assert torch.equal(got, source)
    outside = sorted([*blocks.home[blocks.home >= 0].tolist(), *blocks.spares])
    taken = [move.spare for move in blocks._moving if blocks.home[move.cold] != move.spare]
    assert sorted([*outside, *taken]) == list(range(len(blocks.slow)))


def test_every_entry_points_at_its_expert_at_every_turn() -> None:
    blocks, want = filled(120)
    check(blocks, want)
    rng = np.random.default_rng(0)
    layers, experts = CONFIG.num_hidden_layers, CONFIG.n_routed_experts
    routes = [draw_routes(rng, 400, experts=experts, picks=4, exponent=1.5) for _ in range(layers)]
    for token in range(400):
        blocks.note(0, np.stack([own[token : token + 1] for own in routes]))
        blocks.turn()
        if token % 7 == 0 or token > 390:
            check(blocks, want)
    report = blocks.report()
    assert report["exchanges"] >= AT_ONCE
    assert report["tokens"] == 400
    assert report["hit_rate"] > 0.75
    read = (blocks.cache.misses + blocks.moved) * blocks.block_bytes
    assert report["bytes_per_token"] == round(read / 400)


def test_a_copy_under_way_is_waited_for() -> None:
    """Nothing moves on while a copy's event has not come; the table stays what it is."""

    class Event:
        done = False

        def query(self) -> bool:
            return self.done

    blocks, want = filled(120)
    outside = np.flatnonzero(blocks.cache.place < 0)[:1]
    for _ in range(60):
        blocks.cache.note(outside, 1)
    blocks.turn()
    assert [move.hot for move in blocks._moving] == outside.tolist()
    blocks._copied = event = Event()  # pyright: ignore[reportAttributeAccessIssue]
    before = blocks.table.clone()
    blocks.turn()
    assert torch.equal(blocks.table, before)
    event.done = True
    blocks.turn()
    assert not torch.equal(blocks.table, before)
    check(blocks, want)
    blocks.turn()
    assert blocks.cache.place[outside[0]] >= 0
    check(blocks, want)


def test_bases_are_those_of_stacked_experts_wherever_they_are() -> None:
    """Before, during and after exchanges: an engine may be built over weights that have been stepped for long."""
    blocks, want = filled(120)
    views = [torch.stack(each) for each in zip(*map(blocks._views, want), strict=True)]
    first, second = (base_bytes(*views[at : at + 2]).view(blocks.layers, blocks.experts, -1) for at in (0, 2))

    def check_bases() -> None:
        for layer, found in enumerate(blocks.bases()):
            assert torch.equal(found[0], first[layer])
            assert torch.equal(found[1], second[layer])

    check_bases()
    blocks.slow[blocks.spares] = 255  # nobody's: scales that no product could hold
    for hot in np.array_split(np.flatnonzero(blocks.cache.place < 0), 12):
        for _ in range(60):
            blocks.cache.note(hot, 1)
        for _ in range(2):  # cold ones on their way out, then nobody in their places
            blocks.turn()
            assert blocks._moving
            check_bases()
    assert (blocks.cache.held < 0).any()
    blocks.turn()
    assert blocks.home.max() >= (blocks.home >= 0).sum()
    check_bases()


def test_all_may_be_inside_and_too_little_is_refused() -> None:
    blocks = ExpertBlocks(CONFIG, torch.device("cpu"), 1 << 40)
    assert len(blocks.fast) == COUNT
    blocks.note(0, np.zeros((CONFIG.num_hidden_layers, 3, 4), np.int32))
    blocks.turn()
    assert blocks.report()["hit_rate"] == 1
    with pytest.raises(ConfigError, match="hold 3 of"):
        ExpertBlocks(CONFIG, torch.device("cpu"), 3 * blocks.block_bytes)
