"""The kernel bench: its floors are cost.py's, and without a device it says so."""

from __future__ import annotations

import pytest
import torch

from pelagos import cost
from pelagos.config import preset
from pelagos.errors import KernelUnavailable
from pelagos.evals.kernel_bench import Ceilings, kernel_rows

FLASH = preset("flash")
CEILINGS = Ceilings(copy=4e12, read=4e12, bf16=8e14, fp8=1.5e15, launch=1e-6)


def test_floor_is_the_longer_of_bytes_and_flops():
    assert CEILINGS.floor(4e12, 1.5e15) == 1
    assert CEILINGS.floor(8e12, 1.5e15) == 2
    assert CEILINGS.floor(4e12, 4.5e15) == 3


def test_expert_weights_are_those_of_the_checkpoint():
    """All experts of a layer chosen: the bytes are the inventory's, plus a token's activations."""
    stored = [each.stored() for each in cost.inventory(FLASH) if each.name.startswith("layers.5.ffn.experts.")]
    weights = sum(size for formats in stored for _, size in formats.values())
    moved = cost.experts_kernel(FLASH, 0, FLASH.n_routed_experts).moved
    assert moved == weights
    assert cost.experts_kernel(FLASH, 2, 12).flops == 2 * 6 * 6 * FLASH.hidden_size * FLASH.moe_intermediate_size


def test_product_weights_are_those_of_the_checkpoint():
    (group,) = (each for each in cost.inventory(FLASH) if each.name == "layers.5.attn.wq_b.weight")
    outputs, depth = group.shape
    assert cost.product_kernel(outputs, depth, 0).moved == sum(size for _, size in group.stored().values())
    assert cost.product_kernel(outputs, depth, 3).flops == 2 * 3 * group.elements


def test_site_grows_by_ten_vectors_and_the_quantised_copy():
    """Streams in and out, y in, the normed vector out in bfloat16 and FP8."""
    step = cost.site_kernel(FLASH, 8).moved - cost.site_kernel(FLASH, 7).moved
    d = FLASH.hidden_size
    assert step == 2 * d * (4 + 4 + 1 + 1) + d + d // 128 + 2 * 4 * (4 + 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device_it_says_so():
    with pytest.raises(KernelUnavailable, match="no CUDA device"):
        next(kernel_rows("flash"))
