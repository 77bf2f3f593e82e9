"""One of two ranks: divided steps and prompts against whole ones, on a CPU by the references or, with `cuda`, on GPUs.

Started by test_cuda_group.
"""

from __future__ import annotations

import dataclasses
import os
import sys

import numpy as np
import pytest
import torch

from pelagos.config import preset
from pelagos.errors import CapacityError
from pelagos.kernels.layout import CacheLayout, Output, Span
from pelagos.kernels.prefill_products import quantise
from pelagos.model import cuda_weights
from pelagos.model.cuda_forward import CudaForward, _Step
from pelagos.model.cuda_group import GroupForward, cut_tensors, cut_width
from pelagos.model.cuda_weights import Weights
from pelagos.parallel import Group

SITE = 0.01  # of an expert site, relative to its norm: both halves are rounded to bfloat16 before they are added
# Of logits: behind that, values fall to the other side of an FP8 or FP4 rounding (tests/model/test_cuda_forward.py).
# The references' products on a CPU depend on their company, so bits can be compared on CUDA alone.
BOUND = 0.12
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if sys.argv[1:] == ["cuda"] else torch.device("cpu")


def cut(whole: Weights, rank: int, ranks: int) -> Weights:
    weights = Weights(cut_width(whole.config, ranks), DEVICE)
    for name, place in weights.places.items():
        source = whole.places[name]
        for into, values in ((place.values, source.values), (place.scales, source.scales)):
            if into is not None and values is not None:
                into.copy_(next(cut_tensors([(name, values)], rank, ranks))[1])
    return weights


def sites(forward: CudaForward, whole: CudaForward, rank: int) -> float:
    """The most that this rank's rows of any expert site are off from those of the whole one."""
    worst = 0.0
    for at, (layer, own) in enumerate(zip(whole.weights.layers, forward.weights.layers, strict=True)):
        for each in (3, 64):  # rows of a rank
            rows = torch.randn((2 * each, 256), generator=torch.Generator().manual_seed(at)).bfloat16().to(DEVICE)
            ids = torch.arange(2 * each, dtype=torch.int32, device=DEVICE)
            mine = slice(each * rank, each * rank + each)
            if isinstance(forward, GroupForward):
                forward._everyone[: 2 * each] = ids
            step = _Step(None, ids[mine], (), True, [])  # pyright: ignore[reportArgumentType]
            got, want = (each._mixture(parts, step, rows[mine], *quantise(rows[mine]))
                         for each, parts in ((forward, own), (whole, layer)))  # fmt: skip
            worst = max(worst, float((got.float() - want.float()).norm() / want.float().norm()))
    return worst


def run(forward: CudaForward, first_slots: list[int]) -> list[Output]:
    """Prompts of three sequences in two calls, two steps of all, one of the first, a draft; i is in first_slots[i]."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 512, count) for count in (300, 3, 129)]
    # Eight ids of each rank's pages in turn; a table holds four of its own.
    pages = [(16 * (slot // 2) + 2 * np.arange(4) + slot % 2).astype(np.int32) for slot in first_slots]
    spans = [
        Span(ids, 0, slot, table, logits=2, streams=1)
        for ids, slot, table in zip(prompts, first_slots, pages, strict=True)
    ]
    longest = spans[0]
    found = [
        forward.forward([longest._replace(tokens=longest.tokens[:40], logits=0, streams=0)]),
        forward.forward([longest._replace(tokens=longest.tokens[40:], start=40), *spans[1:]]),
    ]
    for step in range(2):
        found.append(forward.forward([
            Span(np.array([7 + step]), len(ids) + step, slot, table, decode=True)
            for ids, slot, table in zip(prompts, first_slots, pages, strict=True)
        ]))  # fmt: skip
    found.append(forward.forward([Span(np.array([5]), len(prompts[0]) + 2, first_slots[0], pages[0], decode=True)]))
    drafts = [Span(np.array([11]), len(ids) - 1, slot, table, decode=True)
              for ids, slot, table in zip(prompts, first_slots, pages, strict=True)]  # fmt: skip
    return [*found[1:], forward.draft(drafts, found[1].streams)]


def off(got: list[Output], want: list[Output]) -> float:
    return max(
        float(np.linalg.norm(a.logits - b.logits) / np.linalg.norm(b.logits)) for a, b in zip(got, want, strict=True)
    )


def main() -> None:
    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    cuda_weights._RANDOM_BLOCK = 1 << 20  # pyright: ignore[reportPrivateUsage]
    config = dataclasses.replace(
        preset("nano"), num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0), num_hash_layers=1, vocab_size=512,
        moe_intermediate_size=256, n_routed_experts=8,
    )  # fmt: skip
    whole = Weights(config, torch.device("cpu")).fill_random()  # the same on every rank
    if DEVICE.type == "cuda":
        there = Weights(config, DEVICE)
        for into, source in zip(there.tensors(), whole.tensors(), strict=True):
            into.copy_(source)
        whole = there
    group = Group(DEVICE)
    weights = cut(whole, group.rank, group.size)

    def divided(follow: bool = True) -> GroupForward:
        layout = CacheLayout(weights.config, "released", 4)
        pages, slots = (group.memory(size, torch.uint8) for size in ((32, layout.page_bytes), (4, layout.slot_bytes)))
        for pool in (pages, slots):
            pool[group.rank].zero_()
        return GroupForward(weights, layout, pages, slots, group, positions=512, follow=follow)

    layout = CacheLayout(config, "released", 4)
    sizes = ((64, layout.page_bytes), (6, layout.slot_bytes))
    pages, slots = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for size in sizes)
    single = CudaForward(whole, layout, pages, slots, positions=512)
    assert sites(divided(), single, group.rank) < SITE
    want = run(single, [0, 1, 2])
    # Who holds which sequence; the second time all are on one rank.
    results = []
    for slots, follow in (([0, 1, 2], True), ([0, 2, 4], True), ([0, 1, 2], False), ([1, 0, 3], False)):
        results.append(run(divided(follow), slots))
        errors = [off([a], [b]) for a, b in zip(results[-1], want, strict=True)]
        if group.rank == 0:
            print(slots, follow, [round(each, 4) for each in errors], flush=True)
        assert max(errors) < BOUND, (slots, follow, errors)
        shapes = [[(a.logits.shape, a.streams.shape) for a in each] for each in (results[-1], want)]
        assert shapes[0] == shapes[1]
    for at, own in enumerate(results[-1]):
        again = group.gather(own.logits)
        assert np.array_equal(again[0], again[1])
        if DEVICE.type == "cuda":  # the same bits whoever holds which sequence
            assert np.array_equal(own.logits, results[-2][at].logits), at
    with pytest.raises(CapacityError, match="slot 0 is of rank 0, a page of it is not"):
        divided().forward([Span(np.array([1]), 0, 0, np.array([1], np.int32))])
    print(f"rank {group.rank} of {group.size}: {off(results[-1], want):.4f}", flush=True)
    group.close()


if __name__ == "__main__":
    main()
