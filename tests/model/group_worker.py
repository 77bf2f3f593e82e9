"""One of two ranks: the divided step against the whole one, on a CPU by the references. Started by test_cuda_group."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pelagos.config import preset
from pelagos.errors import CapacityError
from pelagos.kernels.layout import CacheLayout, Output, Span
from pelagos.kernels.prefill_products import quantise
from pelagos.model import cuda_weights
from pelagos.model.cuda_forward import CudaForward
from pelagos.model.cuda_group import GroupForward, cut_tensors, cut_width
from pelagos.model.cuda_weights import Weights
from pelagos.parallel import Group

SITE = 0.01  # of an expert site, relative to its norm: both halves are rounded to bfloat16 before they are added
# Of logits: behind that, values fall to the other side of an FP8 or FP4 rounding (tests/model/test_cuda_forward.py).
# The references' products on a CPU depend on their company, so bits cannot be compared.
BOUND = 0.12
CPU = torch.device("cpu")


def cut(whole: Weights, rank: int, ranks: int) -> Weights:
    weights = Weights(cut_width(whole.config, ranks), CPU)
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
        rows = torch.randn((6, 256), generator=torch.Generator().manual_seed(at)).bfloat16()
        ids = torch.arange(6, dtype=torch.int32)
        mine = slice(3 * rank, 3 * rank + 3)
        if isinstance(forward, GroupForward):
            forward._everyone[:6] = ids
        got = forward._mixture(at, own, rows[mine], *quantise(rows[mine]), ids[mine], [])
        want = whole._mixture(at, layer, rows, *quantise(rows), ids, [])[mine]
        worst = max(worst, float((got.float() - want.float()).norm() / want.float().norm()))
    return worst


def run(forward: CudaForward, first_slots: list[int]) -> list[Output]:
    """Prompts of three sequences, two steps of all, a draft; sequence i is in slot first_slots[i]."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 512, count) for count in (70, 3, 9)]
    # Four ids of each rank's pages in turn; a table holds two of its own.
    pages = [np.array([8 * (slot // 2) + slot % 2, 8 * (slot // 2) + 2 + slot % 2], np.int32) for slot in first_slots]
    spans = [
        Span(ids, 0, slot, table, logits=2, streams=1)
        for ids, slot, table in zip(prompts, first_slots, pages, strict=True)
    ]
    found = [forward.forward(spans)]
    for step in range(2):
        found.append(forward.forward([
            Span(np.array([7 + step]), len(ids) + step, slot, table, decode=True)
            for ids, slot, table in zip(prompts, first_slots, pages, strict=True)
        ]))  # fmt: skip
    drafts = [Span(np.array([11]), len(ids) - 1, slot, table, decode=True)
              for ids, slot, table in zip(prompts, first_slots, pages, strict=True)]  # fmt: skip
    return [*found, forward.draft(drafts, found[0].streams)]


def off(got: list[Output], want: list[Output]) -> float:
    return max(
        float(np.linalg.norm(a.logits - b.logits) / np.linalg.norm(b.logits)) for a, b in zip(got, want, strict=True)
    )


def main() -> None:
    torch.set_num_threads(1)
    cuda_weights._RANDOM_BLOCK = 1 << 20  # pyright: ignore[reportPrivateUsage]
    config = dataclasses.replace(
        preset("nano"), num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0), num_hash_layers=1, vocab_size=512,
        moe_intermediate_size=256, n_routed_experts=8,
    )  # fmt: skip
    whole = Weights(config, CPU).fill_random()
    group = Group(CPU, 0)
    weights = cut(whole, group.rank, group.size)

    def pools(layout: CacheLayout) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.zeros((16, layout.page_bytes), dtype=torch.uint8),
                torch.zeros((4, layout.slot_bytes), dtype=torch.uint8))  # fmt: skip

    def divided() -> GroupForward:
        layout = CacheLayout(weights.config, "released", 4)
        return GroupForward(weights, layout, *pools(layout), group, positions=256)

    layout = CacheLayout(config, "released", 4)
    single = CudaForward(whole, layout, *pools(layout), positions=256)
    single.two_kinds = False
    assert sites(divided(), single, group.rank) < SITE
    want = run(single, [0, 1, 2])
    for slots in ([0, 1, 2], [1, 0, 3], [0, 2, 4]):  # who holds which sequence; all on one rank
        got = run(divided(), slots)
        assert off(got, want) < BOUND, off(got, want)
        shapes = [[(a.logits.shape, a.streams.shape) for a in each] for each in (got, want)]
        assert shapes[0] == shapes[1]
    again = group.gather(got[-1].logits)
    assert np.array_equal(again[0], again[1])
    with pytest.raises(CapacityError, match="slot 0 is of rank 0, a page of it is not"):
        divided().forward([Span(np.array([1]), 0, 0, np.array([1], np.int32))])
    print(f"rank {group.rank} of {group.size}: {off(got, want):.4f}")
    group.close()


if __name__ == "__main__":
    main()
