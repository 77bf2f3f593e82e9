"""FP8 products with many rows, weights as released, and what quantises between them: contracts, checks and dispatch.

On CUDA the library's block-scaled product in calls of a fixed number of rows; elsewhere `ref.prefill_products`, which
defines the meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.dispatch import contract, select

BLOCK = 128
# Of BF16 products, in which the library's order of adding can depend on the number of rows: large weights keep it from
# LEAST_ROWS on (seen on an H200 from 256 to 8,192), for others every call has CALL_ROWS.
LEAST_ROWS, CALL_ROWS, STEADY_WEIGHT = 512, 2048, 1 << 22
SCALED_DEPTH = 512  # the library takes block scales of depths that this divides; others are decoded to BF16


def factors(weight_scales: Tensor) -> Tensor:
    """Return UE8M0 block scales (..., uint8) as the float32 that `product` wants of a weight; made once a weight."""
    return weight_scales.view(torch.float8_e8m0fnu).float()


def product(codes: Tensor, scales: Tensor | None, weight: Tensor, weight_factors: Tensor, *, groups: int = 1) -> Tensor:
    """Return x W^T (T, O) bfloat16 of rows x and FP8 weights W, summed in float32.

    codes (T, G * I) E4M3 with scales (T, G * I / 128) UE8M0, weight (O, I) E4M3, all as uint8, weight_factors
    (O/128, I/128) float32 (`factors`). Without scales x is bfloat16 (T, G * I). With G `groups` (wo_a) rows O/G of the
    weight multiply columns I of x. A row's bits do not depend on the other rows or their number. Raises ConfigError for
    other shapes. Source: inference/kernel.py fp8_gemm.
    """
    (rows, columns), (outputs, depth) = codes.shape, weight.shape
    if columns != groups * depth or outputs % (groups * BLOCK) or depth % BLOCK:
        raise ConfigError(
            f"prefill_products: x {tuple(codes.shape)}, weight {tuple(weight.shape)}, groups={groups}: "
            f"expected columns of x = groups * columns of weight, multiples of {BLOCK}"
        )
    contract("prefill_products", {
        "scales": (scales, (rows, columns // BLOCK)), "codes": (codes, (rows, columns)),
        "weight_factors": (weight_factors, (outputs // BLOCK, depth // BLOCK)),
    })  # fmt: skip
    return select("prefill_products", codes).product(codes, scales, weight, weight_factors, groups)


def steady_rows(rows: int, outputs: int, depth: int) -> int:
    """Return how many rows a call of a BF16 product has, so that a row's bits are its own."""
    return max(LEAST_ROWS, rows) if outputs * depth >= STEADY_WEIGHT else CALL_ROWS


def wide_product(x: Tensor, weight: Tensor, call_rows: int = CALL_ROWS) -> Tensor:
    """Return x W^T (T, O) float32 of bfloat16 x (T, I) and weight (O, I).

    The library is called for `call_rows` rows at a time, filled up: of those calls a row's bits are its own.
    """
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or x.shape[1:] != weight.shape[1:]:
        raise ConfigError(f"wide_product: x {x.dtype} {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)}: "
                          "expected bfloat16 with as many columns")  # fmt: skip
    return select("prefill_products", x).wide_product(x, weight, call_rows)


def quantise(x: Tensor, norm: Tensor | None = None, *, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the E4M3 codes (T, N) and UE8M0 scales (T, N/128), as uint8, of x (T, N) bfloat16.

    With a norm (N,) x is first divided by its root mean square, multiplied and rounded. Raises ConfigError for other N.
    """
    if x.shape[1] % BLOCK or x.dtype != torch.bfloat16 or x.stride(1) != 1:
        raise ConfigError(f"quantise: x is {x.dtype} {tuple(x.shape)}, expected bfloat16 (T, multiple of {BLOCK})")
    return select("prefill_products", x).quantise(x, norm, eps)


def swiglu(up: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Return the codes (T, F) and scales (T, F/128) of the clamped SwiGLU of up (T, 2F) bfloat16, gate before up."""
    if up.shape[1] % (2 * BLOCK) or up.dtype != torch.bfloat16 or not up.is_contiguous():
        raise ConfigError(f"swiglu: up is {up.dtype} {tuple(up.shape)}, expected bfloat16 (T, multiple of {2 * BLOCK})")
    return select("prefill_products", up).quantise(up, None, 0.0, limit)
