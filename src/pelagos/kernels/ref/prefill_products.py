"""What `kernels.prefill_products` computes: float32 products of decoded operands, norm, SwiGLU and quantisation."""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos import numerics
from pelagos.kernels.ref import experts
from pelagos.kernels.ref.norm_rope import rms_norm
from pelagos.kernels.ref.skinny_gemm import decoded


def product(codes: Tensor, scales: Tensor | None, weight: Tensor, weight_factors: Tensor, groups: int = 1) -> Tensor:
    """Return the product (T, O) bfloat16; see `kernels.prefill_products.product`."""
    x = decoded(codes, scales, numerics.ACT_BLOCK)
    w = numerics.decode_fp8(weight.view(torch.float8_e4m3fn), weight_factors, numerics.FP8_BLOCK)
    parts = zip(x.chunk(groups, 1), w.chunk(groups, 0), strict=True)
    return torch.cat([a @ b.T for a, b in parts], 1).to(torch.bfloat16)


def wide_product(x: Tensor, weight: Tensor, _: int) -> Tensor:
    """Return (T, O) float32; see `kernels.prefill_products.wide_product`."""
    return x.float() @ weight.float().T


def quantise(x: Tensor, norm: Tensor | None, eps: float, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """Return (codes, scales); see `kernels.prefill_products.quantise`; with a limit those of the SwiGLU of x."""
    if limit is not None:
        gate, up = x.chunk(2, 1)
        x = experts.swiglu(gate, up, limit).bfloat16()
    codes, scales = numerics.encode_fp8(x if norm is None else rms_norm(x, norm, eps), numerics.ACT_BLOCK)
    return codes.view(torch.uint8), scales.view(torch.uint8)
