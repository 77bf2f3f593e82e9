"""One of two ranks: divided steps and prompts against whole ones, on a CPU by the references or, with `cuda`, on GPUs.

With `halves SEED` one process alone, which computes experts by halves as two ranks do. Started by test_cuda_group.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import numpy as np
import pytest
import torch

from pelagos.config import preset
from pelagos.errors import CapacityError
from pelagos.kernels import prefill_experts, prefill_products, skinny_gemm
from pelagos.kernels.layout import CacheLayout, Draw, Output, Span
from pelagos.kernels.prefill_products import quantise
from pelagos.model import cuda_weights
from pelagos.model.cuda_forward import CudaForward, Told, _Step
from pelagos.model.cuda_group import GroupForward, cut_tensors, cut_width
from pelagos.model.cuda_prefill import Prefill
from pelagos.model.cuda_weights import Fp8, LayerWeights, Weights
from pelagos.parallel import Group

SITE = 0.01  # of an expert site, relative to its norm: both halves are rounded to bfloat16 before they are added
# Of logits: behind that, values fall to the other side of an FP8 or FP4 rounding (tests/model/test_cuda_forward.py),
# which is why `Halved`, one process that rounds where two ranks do, has to give their very bits. The references'
# products on a CPU depend on their company, so bits can be compared on CUDA alone.
BOUND, ALIKE = 0.12, 0.06
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if "cuda" in sys.argv else torch.device("cpu")
# Who holds which sequence ([0, 2, 4]: one rank has all), whether others follow it, and in fused launches.
PLACEMENTS = (([0, 1, 2], True, True), ([0, 2, 4], True, True), ([0, 1, 2], True, False), ([0, 2, 4], True, False),
              ([0, 1, 2], False, False), ([1, 0, 3], False, False))  # fmt: skip


def cut(whole: Weights, rank: int, ranks: int) -> Weights:
    weights = Weights(cut_width(whole.config, ranks), DEVICE)
    for name, place in weights.places.items():
        source = whole.places[name]
        for into, values in ((place.values, source.values), (place.scales, source.scales)):
            if into is not None and values is not None:
                into.copy_(next(cut_tensors([(name, values)], rank, ranks))[1])
    return weights


class HalvedPrefill(Prefill):
    """Prompts whose experts are added up from both ranks' widths."""

    def __init__(self, whole: Prefill, halves: list[Prefill]) -> None:
        vars(self).update(vars(whole))
        cut = zip(whole._layers, *(half._layers for half in halves), strict=True)
        self._parts = {id(layer): parts for layer, *parts in cut}

    def _feed(self, state: list[torch.Tensor | None], layer: LayerWeights, ids: torch.Tensor) -> None:
        normed, codes, scales = self._site(state, layer.ffn_site)
        inputs, limit = (codes, scales, *self._choose(layer, normed, ids)), float(self.weights.config.swiglu_limit)
        operands: list[Any] = [(*inputs, *half.w13, *half.w2, half.bases, limit) for half in self._parts[id(layer)]]
        first, second = (prefill_experts.mixture(*each) for each in operands)
        state[0] = first + second + prefill_products.product(*self._hidden(layer, codes, scales), *layer.shared2)


class Halved(CudaForward):
    """One process that computes what two ranks do: experts by halves of their width, the output where one has all."""

    left, fuses, _helped = False, False, False

    def __init__(self, whole: Weights, cuts: list[Weights], follow: bool, *given: Any, positions: int) -> None:
        super().__init__(whole, *given, positions=positions)
        self.prefill = HalvedPrefill(self.prefill, [Prefill(each, *given) for each in cuts])
        cut = zip(layers(whole), *map(layers, cuts), strict=True)
        self._parts_of, self._follow = {id(layer): parts for layer, *parts in cut}, follow

    def _prepared(self, told: Told, span: np.ndarray, /, *rows: np.ndarray, drafts: bool) -> Any:
        self._helped = self._follow and len(set((told.fields[2, span] % 2).tolist())) == 1
        self._owner = int(self._helped)  # no graph of the other kind
        self.fused = self.fuses and self._helped
        return super()._prepared(told, span, *rows, drafts=drafts)

    def _output(self, index: int, layer: LayerWeights, attended: Any) -> Any:
        if not self._helped:
            return super()._output(index, layer, attended)
        found = []
        for rank, own in enumerate(attended.chunk(2, 1)):
            wo_a, wo_b = (Fp8(*(each.chunk(2, dim)[rank].contiguous() for each in weight))
                          for dim, weight in enumerate((layer.wo_a, layer.wo_b)))  # fmt: skip
            groups = self.weights.config.o_groups // 2
            own = skinny_gemm.quantised_product(own.contiguous(), None, *wo_a, self._arrived, groups=groups)
            found.append(skinny_gemm.product(*own, *wo_b, self._arrived).float())
        return (found[0] + found[1]).bfloat16()

    def _mixture(
        self, layer: LayerWeights, step: _Step, normed: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
    ) -> Any:
        if not self._helped:
            codes, scales = quantise(normed)
        parts = self._parts_of[id(layer)]
        found: list[Any] = [super(Halved, self)._mixture(half, step, normed, codes, scales) for half in parts]
        return (found[0].float() + found[1].float()).bfloat16()


def layers(weights: Weights) -> list[LayerWeights]:
    return [*weights.layers, *([] if weights.draft is None else [weights.draft.layer])]


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
            assert isinstance(got, torch.Tensor)
            assert isinstance(want, torch.Tensor)
            worst = float(np.max([worst, float((got.float() - want.float()).norm() / want.float().norm())]))
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
        spans = [Span(np.array([7 + step]), len(ids) + step, slot, table, decode=True)
                 for ids, slot, table in zip(prompts, first_slots, pages, strict=True)]  # fmt: skip
        found.append(forward.forward(spans))
        drawn = forward.forward([span._replace(draws=(Draw(),)) for span in spans])  # of which every rank has all
        assert not len(drawn.logits)
        assert [drawn.picks[at][0].token for at in range(3)] == found[-1].logits.argmax(1).tolist()
    found.append(forward.forward([Span(np.array([5]), len(prompts[0]) + 2, first_slots[0], pages[0], decode=True)]))
    drafts = [Span(np.array([11]), len(ids) - 1, slot, table, decode=True)
              for ids, slot, table in zip(prompts, first_slots, pages, strict=True)]  # fmt: skip
    return [*found[1:], forward.draft(drafts, found[1].streams)]


def off(got: list[Output], want: list[Output]) -> float:
    return max(
        float(np.linalg.norm(a.logits - b.logits) / np.linalg.norm(b.logits)) for a, b in zip(got, want, strict=True)
    )


def made(seed: int) -> Weights:
    """Random weights, the same on every rank."""
    cuda_weights._RANDOM_BLOCK = 1 << 20  # pyright: ignore[reportPrivateUsage]
    config = dataclasses.replace(
        preset("nano"), num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0), num_hash_layers=1, vocab_size=512,
        moe_intermediate_size=256, n_routed_experts=8,
    )  # fmt: skip
    whole = Weights(config, torch.device("cpu")).fill_random(seed)
    if DEVICE.type == "cpu":
        return whole
    there = Weights(config, DEVICE)
    for into, source in zip(there.tensors(), whole.tensors(), strict=True):
        into.copy_(source)
    return there


def single(kind: Any, whole: Weights, *more: Any) -> CudaForward:
    layout = CacheLayout(whole.config, "released", 4)
    sizes = ((64, layout.page_bytes), (6, layout.slot_bytes))
    pools = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for size in sizes)
    return kind(whole, *more, layout, *pools, positions=512)


def by_halves(whole: Weights, want: list[Output], placements: Any = PLACEMENTS) -> tuple[list[Any], list[str]]:
    """What one process gives that computes as two ranks do, in each placement, and what is wrong with it."""
    cuts, found, wrong = [cut(whole, rank, 2) for rank in range(2)], [], []
    for slots, follow, fuses in placements:
        halved = single(Halved, whole, cuts, follow)
        halved.fuses = fuses  # pyright: ignore[reportAttributeAccessIssue]
        found.append(run(halved, slots))
        errors = [off([a], [b]) for a, b in zip(found[-1], want, strict=True)]
        print(slots, follow, fuses, "halved from whole", [round(each, 4) for each in errors], flush=True)
        if not np.max(errors) < BOUND:
            wrong.append(f"{slots} {follow} {fuses}: {errors} from whole experts, computed by halves")
    return found, wrong


def main() -> None:
    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    seed = int(sys.argv[-1]) if "halves" in sys.argv else 0
    whole = made(seed)
    want = run(single(CudaForward, whole), [0, 1, 2])
    if "halves" in sys.argv:
        _, wrong = by_halves(whole, want)
        assert not wrong, "\n".join(wrong)
        return
    group = Group(DEVICE)
    own = range(0, len(PLACEMENTS)) if DEVICE.type == "cuda" else range(group.rank, len(PLACEMENTS), 2)
    found, wrong = by_halves(whole, want, [PLACEMENTS[at] for at in own])
    halved = dict(zip(own, found, strict=True))  # what both ranks give in it is the same
    weights = cut(whole, group.rank, group.size)

    def divided(follow: bool = True, fuses: bool = False) -> GroupForward:
        layout = CacheLayout(weights.config, "released", 4)
        pages, slots = (group.memory(size, torch.uint8) for size in ((32, layout.page_bytes), (4, layout.slot_bytes)))
        for pool in (pages, slots):
            pool[group.rank].zero_()
        forward = GroupForward(weights, layout, pages, slots, group, positions=512, follow=follow)
        forward.fuses = fuses
        return forward

    summed = single(CudaForward, whole)
    summed.left = False  # on CUDA, too, sites' outputs are to be seen
    worst = sites(divided(), summed, group.rank)
    if not worst < SITE:
        wrong.append(f"expert sites {worst:.4f} off")
    results = []
    for at, (slots, follow, fuses) in enumerate(PLACEMENTS):  # all, before any is called wrong
        results.append(run(divided(follow, fuses), slots))
        for every in (group.gather(output.logits) for output in results[-1]):
            if not np.array_equal(every[0], every[1]):
                wrong.append(f"{slots} {follow} {fuses}: the ranks have other outputs")
        if at not in halved:
            continue
        errors = [off([a], [b]) for a, b in zip(results[-1], want, strict=True)]
        apart = [off([a], [b]) for a, b in zip(results[-1], halved[at], strict=True)]
        if group.rank == own[0]:
            for name, values in (("whole", errors), ("halved", apart)):
                print(slots, follow, fuses, f"from {name}", [round(each, 4) for each in values], flush=True)
        if not np.max(apart) <= (0 if DEVICE.type == "cuda" else ALIKE):  # a lost rank makes NaN
            wrong.append(f"{slots} {follow} {fuses}: {apart} from one process that rounds alike")
        if not np.max(errors) < BOUND:
            wrong.append(f"{slots} {follow} {fuses}: {errors} from whole experts")
        shapes = [[(a.logits.shape, a.streams.shape) for a in each] for each in (results[-1], want)]
        assert shapes[0] == shapes[1]
    for at, output in enumerate(results[-1]):
        if DEVICE.type == "cuda" and not np.array_equal(output.logits, results[-2][at].logits):
            wrong.append(f"output {at}: other bits where another rank holds the sequences")
    assert not wrong, "\n".join(wrong)
    with pytest.raises(CapacityError, match="slot 0 is of rank 0, a page of it is not"):
        divided().forward([Span(np.array([1]), 0, 0, np.array([1], np.int32))])
    print(f"rank {group.rank} of {group.size}: done", flush=True)
    group.close()


if __name__ == "__main__":
    main()
