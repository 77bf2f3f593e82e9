"""FP8 products with few rows, weights as released: contract, checks and dispatch.

On CUDA one Triton launch; elsewhere `ref.skinny_gemm`, which defines the meaning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pelagos import numerics
from pelagos.errors import ConfigError
from pelagos.kernels.batch_rows import Halves, Mixing, Parts
from pelagos.kernels.dispatch import contract
from pelagos.kernels.ref import cache_write as cache_ref
from pelagos.kernels.ref import skinny_gemm as ref

BLOCK = 128
TALL = 64  # outputs of a merged product are a multiple of it
MAX_ROWS = 64
COUNTERS = 4096  # int32 zeros that `arrived` has to hold


def product(
    codes: Tensor, scales: Tensor | None, weight: Tensor, weight_scales: Tensor, arrived: Tensor, *, groups: int = 1
) -> Tensor:
    """Return x W^T (T, O) bfloat16 of rows x and FP8 weights W, summed in float32.

    codes (T, G * I) E4M3 with scales (T, G * I / 128) UE8M0, T <= 64; weight (O, I) E4M3 with weight_scales
    (O/128, I/128) UE8M0, all as uint8. Without scales x is bfloat16 (T, G * I). With G `groups` (wo_a) rows O/G of the
    weight multiply columns I of x. `arrived` (4096,) int32 zeros is scratch, zero again afterwards; calls that may
    overlap need their own. Raises ConfigError for other shapes. Source: inference/kernel.py fp8_gemm.
    """
    _check(codes, scales, weight, weight_scales, groups)
    if not codes.is_cuda:
        return ref.forward(codes, scales, weight, weight_scales, groups)
    from pelagos.kernels.triton import skinny_gemm as kernel

    return kernel.forward(codes, scales, weight, weight_scales, arrived, groups)[0]


def left_product(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, arrived: Tensor
) -> Tensor | Parts:
    """Return `product`, on CUDA in parts for a site to add up, which saves the programs meeting."""
    if not codes.is_cuda:
        return product(codes, scales, weight, weight_scales, arrived)
    _check(codes, scales, weight, weight_scales, 1)
    from pelagos.kernels.triton import skinny_gemm as kernel

    return Parts(kernel.forward(codes, scales, weight, weight_scales, arrived, left=True)[0])


def quantised_product(
    codes: Tensor, scales: Tensor | None, weight: Tensor, weight_scales: Tensor, arrived: Tensor, *, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return `product` as the next product reads it: E4M3 codes (T, O) and UE8M0 scales (T, O/128), both uint8.

    x is bfloat16 (T, G * I) without scales, or `batch_rows.Halves` (2 T, G * I) with them.
    """
    _check(codes, scales, weight, weight_scales, groups, MAX_ROWS if scales is None else 2 * MAX_ROWS)
    if not codes.is_cuda:
        x = codes if scales is None else Halves(codes, scales).whole()
        found = numerics.encode_fp8(ref.forward(x, None, weight, weight_scales, groups), numerics.ACT_BLOCK)
        return found[0].view(torch.uint8), found[1].view(torch.uint8)
    from pelagos.kernels.triton import skinny_gemm as kernel

    return kernel.forward(codes, scales, weight, weight_scales, arrived, groups, quantise=True)


def _check(
    codes: Tensor, scales: Tensor | None, weight: Tensor, weight_scales: Tensor, groups: int, most: int = MAX_ROWS
) -> None:
    (rows, columns), (outputs, depth) = codes.shape, weight.shape
    if not 1 <= rows <= most:
        raise ConfigError(f"skinny_gemm: {rows} rows, expected 1..{most}")
    if (scales is None) != (codes.dtype == torch.bfloat16):
        raise ConfigError(f"skinny_gemm: x is {codes.dtype}, expected uint8 codes with scales or bfloat16 without")
    if columns != groups * depth or outputs % (groups * BLOCK) or depth % BLOCK:
        raise ConfigError(
            f"skinny_gemm: x {tuple(codes.shape)}, weight {tuple(weight.shape)}, groups={groups}: "
            f"expected columns of x = groups * columns of weight, multiples of {BLOCK}"
        )
    contract("skinny_gemm", {
        "weight_scales": (weight_scales, (outputs // BLOCK, depth // BLOCK)),
        "scales": (scales, (rows, columns // BLOCK)),
    })  # fmt: skip


def merged(
    codes: Tensor | None, scales: Tensor | None, x: Tensor, weight: Tensor | None, weight_scales: Tensor | None,
    wide_weight: Tensor, arrived: Tensor, left: Mixing | None = None,
) -> Tensor:  # fmt: skip
    """Return the products (T, O + O') float32 of rows with FP8 weights and, behind them, with bfloat16 ones.

    x (T, I) bfloat16 meets wide_weight (O', I) bfloat16; its FP8 copy `codes` with `scales` meets weight (O, I) with
    `weight_scales`, all four None where there is no such weight; the rest as `product`, O and O' multiples of 64.
    What a site has `left` is finished beside. Raises ConfigError for other shapes.
    """
    return _merged(codes, scales, x, weight, weight_scales, wide_weight, arrived, left, None)


def kept(
    codes: Tensor, scales: Tensor, x: Tensor, weight: Tensor, weight_scales: Tensor, wide_weight: Tensor,
    arrived: Tensor, left: Mixing | None, cache: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return what `cache_write` does of `merged`, in one launch; `cache` are its operands but the first."""
    return _merged(codes, scales, x, weight, weight_scales, wide_weight, arrived, left, cache)


def _merged(
    codes: Tensor | None, scales: Tensor | None, x: Tensor, weight: Tensor | None, weight_scales: Tensor | None,
    wide_weight: Tensor, arrived: Tensor, left: Mixing | None, cache: tuple[Any, ...] | None,
) -> Any:  # fmt: skip
    (rows, depth), outputs = x.shape, 0 if weight is None else weight.shape[0]
    if not 1 <= rows <= MAX_ROWS:
        raise ConfigError(f"skinny_gemm: {rows} rows, expected 1..{MAX_ROWS}")
    if wide_weight.shape[1] != depth or depth % BLOCK or outputs % BLOCK or wide_weight.shape[0] % TALL:
        raise ConfigError(
            f"skinny_gemm: x {tuple(x.shape)}, {outputs} FP8 outputs, wide_weight {tuple(wide_weight.shape)}: expected "
            f"columns alike, multiples of {BLOCK}, and outputs in multiples of {BLOCK} and {TALL}"
        )
    if weight is not None and (codes is None or tuple(codes.shape) != (rows, depth)):
        raise ConfigError(f"skinny_gemm: codes for x {tuple(x.shape)} have another shape or are missing")
    if not x.is_cuda:
        out = ref.merged(codes, scales, x, weight, weight_scales, wide_weight)
        return out if cache is None else cache_ref.forward(out, *cache)
    from pelagos.kernels.triton import skinny_gemm as kernel

    return kernel.merged(codes, scales, x, weight, weight_scales, wide_weight, arrived, left, cache)
