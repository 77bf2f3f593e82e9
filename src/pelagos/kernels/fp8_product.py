"""FP8 products in training, forward and both gradients: contract and dispatch.

E4M3 times E4M3 under UE8M0 scales: activations and gradients in 1x128 blocks along the summed dimension, weights in
128x128. On CUDA (Hopper or later) torch's `scaled_mm` multiplies the codes; elsewhere the same values meet in the
carrier, by the reference of quantised products. Source: technical report 4; V3's framework.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pelagos import numerics
from pelagos.kernels.ref.gemm import quantized_linear

BLOCK = numerics.ACT_BLOCK[1]
SUMMED, ROWS = 512, 4  # what scaled_mm wants multiples of: four scales along the sum, four rows


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, numerics.FP8_BLOCK)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        to_x = _multiply(grad, weight.T, numerics.FP8_BLOCK)  # a 128x128 block keeps its codes when transposed
        rows = -grad.shape[0] % (SUMMED if grad.is_cuda else BLOCK)
        turned = [functional.pad(t, (0, 0, 0, rows)).T.contiguous() for t in (grad, x)]
        return to_x, _multiply(turned[0], turned[1], numerics.ACT_BLOCK).to(weight.dtype)


def fp8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (..., I) times weight (O, I) transposed in x's dtype, every operand of every product in FP8.

    The gradient of the float32 master `weight` is that of its FP8 value (straight through).
    """
    return _Fp8Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def _multiply(x: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    """x (T, K) in 1x128 blocks times weight (O, K) in `block`s, transposed: (T, O) in x's dtype."""
    if x.is_cuda and x.dtype == torch.bfloat16 and not (weight.shape[0] % BLOCK or x.shape[1] % SUMMED):
        return _scaled_mm(x, weight, block)
    rounded = numerics.fake_quant_fp8(weight.detach(), block).to(x.dtype)
    return quantized_linear(numerics.fake_quant_fp8(x.detach(), numerics.ACT_BLOCK), rounded)


def _scaled_mm(x: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    recipes, rows = functional.ScalingType, len(x)
    codes, scale = numerics.encode_fp8(functional.pad(x, (0, 0, 0, -rows % ROWS)), numerics.ACT_BLOCK)
    other, other_scale = (t.contiguous() for t in numerics.encode_fp8(weight, block))
    by_rows, square = recipes.BlockWise1x128, block == numerics.FP8_BLOCK
    # In memory scales of rows lie block after block, those of squares row after row; the call sees the former turned.
    second = other_scale.float() if square else other_scale.float().T.contiguous()
    return functional.scaled_mm(
        codes, other.T, scale.float().T.contiguous().T, by_rows,
        second.T, recipes.BlockWise128x128 if square else by_rows, output_dtype=x.dtype,
    )[:rows]  # fmt: skip
