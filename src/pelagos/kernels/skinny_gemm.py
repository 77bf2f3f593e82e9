"""FP8 products with few rows, weights as released: contract, checks and dispatch.

On CUDA one Triton launch; elsewhere `ref.skinny_gemm`, which defines the meaning.
"""

from __future__ import annotations

from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.ref import skinny_gemm as ref

BLOCK = 128
MAX_ROWS = 64
COUNTERS = 4096  # int32 zeros that `arrived` has to hold


def product(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, arrived: Tensor, *, groups: int = 1
) -> Tensor:
    """Return x W^T (T, O) bfloat16 of quantised rows x and weights W, summed in float32.

    codes (T, G * I) E4M3 with scales (T, G * I / 128) UE8M0, T <= 64; weight (O, I) E4M3 with weight_scales
    (O/128, I/128) UE8M0, all as uint8. With G `groups` (wo_a) rows O/G of the weight multiply columns I of x. `arrived`
    (4096,) int32 zeros is scratch, zero again afterwards; calls that may overlap need their own. Raises ConfigError for
    other shapes. Source: inference/kernel.py fp8_gemm.
    """
    (rows, columns), (outputs, depth) = codes.shape, weight.shape
    if not 1 <= rows <= MAX_ROWS:
        raise ConfigError(f"skinny_gemm: {rows} rows, expected 1..{MAX_ROWS}")
    if columns != groups * depth or outputs % (groups * BLOCK) or depth % BLOCK:
        raise ConfigError(
            f"skinny_gemm: x {tuple(codes.shape)}, weight {tuple(weight.shape)}, groups={groups}: "
            f"expected columns of x = groups * columns of weight, multiples of {BLOCK}"
        )
    expected = {"scales": (scales, (rows, columns // BLOCK)),
                "weight_scales": (weight_scales, (outputs // BLOCK, depth // BLOCK))}  # fmt: skip
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"skinny_gemm: {name} is {tuple(tensor.shape)}, expected {shape}")
    if not codes.is_cuda:
        return ref.forward(codes, scales, weight, weight_scales, groups)
    from pelagos.kernels.triton import skinny_gemm as kernel

    return kernel.forward(codes, scales, weight, weight_scales, arrived, groups)
