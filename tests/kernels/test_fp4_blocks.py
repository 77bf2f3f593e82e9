"""Experts found by a table of offsets, blocks in any order: the bits of stacked ones."""

from __future__ import annotations

import pytest
import torch
from test_fp4_experts import LIMIT
from triton_cases import run

from pelagos.kernels import fp4_experts
from pelagos.kernels.batch_rows import Routed
from pelagos.kernels.prefill_experts import base_bytes
from pelagos.kernels.ref import fp4_experts as ref

SCRIPT = """
from test_fp4_blocks import in_blocks, same_bits, same_prompt
import torch
torch.set_num_threads(1)
from pelagos.kernels.ref import fp4_experts as ref
for case in ((1, 8, 2, 128, 128), (3, 4, 4, 256, 128), (17, 8, 2, 128, 256)):
    inputs = ref.make_inputs(*case)
    arena, place = in_blocks(inputs[4:])
    assert same_bits(inputs, arena, place), case
    assert case[0] != 3 or same_prompt(inputs, arena, place)
print("equal")
"""


def in_blocks(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy stacked experts into rows of a tensor, in a random order behind an empty one; return it and offsets."""
    sizes = [-(-part[0].numel() // 256) * 256 for part in parts]
    arena = torch.zeros((len(parts[0]) + 1, sum(sizes)), dtype=torch.uint8)
    order = 1 + torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(0))
    for expert, block in enumerate(order.tolist()):
        for view, part in zip(views(arena, parts, block), parts, strict=True):
            view.copy_(part[expert : expert + 1])
    return arena, order * arena.shape[1]


def views(arena: torch.Tensor, parts: tuple[torch.Tensor, ...], block: int = 0) -> list[torch.Tensor]:
    """The four parts (1, ...) of a block."""
    found, begin = [], 0
    for part in parts:
        found.append(arena[block, begin : begin + part[0].numel()].view(1, *part.shape[1:]))
        begin += -(-part[0].numel() // 256) * 256
    return found


def same_bits(inputs: tuple[torch.Tensor, ...], arena: torch.Tensor, place: torch.Tensor) -> bool:
    """Whether the kernels give the same by stacked experts and by blocks."""
    from pelagos.kernels.triton import fp4_experts as kernel

    codes, _, chosen, weights = inputs[:4]
    lists, spread = kernel.list_rows(chosen, len(inputs[4]), codes)
    routed = Routed(chosen, weights, spread, spread, lists)
    out = [torch.empty(codes.shape, device=codes.device) for _ in range(2)]
    for parts, where, into in ((inputs[4:], None, out[0]), (views(arena, inputs[4:]), place, out[1])):
        kernel.site(inputs[1], routed, *parts, None, LIMIT, where, into)
    return torch.equal(*out)


def same_prompt(inputs: tuple[torch.Tensor, ...], arena: torch.Tensor, place: torch.Tensor) -> bool:
    """The same of the kernels for prompts."""
    from pelagos.kernels.triton import prefill_experts as kernel

    bases = [base_bytes(inputs[at], inputs[at + 1]) for at in (4, 6)]
    stacked = kernel.apart(*inputs, (bases[0], bases[1]), LIMIT)
    found = kernel.apart(*inputs[:4], *views(arena, inputs[4:]), (bases[0], bases[1]), LIMIT, place)
    return torch.equal(found(slice(None)), stacked(slice(None)))


def test_the_reference_finds_them() -> None:
    inputs = ref.make_inputs(5, 6, 2, 128, 128)
    arena, place = in_blocks(inputs[4:])
    first = views(arena, inputs[4:])
    assert all(torch.equal(ref.placed(each, place), part) for each, part in zip(first, inputs[4:], strict=True))
    generator = torch.Generator().manual_seed(1)
    shared2 = torch.randint(0, 64, (128, 128), dtype=torch.uint8, generator=generator)
    routed = Routed(inputs[2], inputs[3], torch.randn(5, 256, generator=generator))
    rest = (shared2, torch.full((1, 1), 120, dtype=torch.uint8), LIMIT)
    got = fp4_experts.site(*inputs[:2], routed, *first, *rest, place)
    assert torch.equal(got, fp4_experts.site(*inputs[:2], routed, *inputs[4:], *rest))


def test_kernels_find_them_in_the_interpreter() -> None:
    assert run(SCRIPT, interpret=True) == "equal\n"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 40, 300])
def test_kernels_read_pinned_memory_on_the_device(tokens: int) -> None:
    """Half of the experts in pinned host memory."""
    inputs = ref.make_inputs(tokens, 16, 6, 512, 256, device="cuda")
    arena, place = in_blocks(tuple(each.cpu() for each in inputs[4:]))
    fast, slow = arena.cuda(), arena.pin_memory()
    outside = torch.arange(16) % 2 == 1
    place = torch.where(outside, slow.data_ptr() - fast.data_ptr() + place, place).cuda()
    assert same_prompt(inputs, fast, place)
    assert tokens > 64 or same_bits(inputs, fast, place)
