"""What `kernels.prefill_products` computes: float32 products of decoded operands, norm, SwiGLU and quantisation."""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos import numerics
from pelagos.kernels.ref import experts
from pelagos.kernels.ref.norm_rope import rms_norm
from pelagos.kernels.ref.skinny_gemm import decoded

# (tokens, outputs of a group, depth, groups): edges of the library's tiles and of a call's rows, grouped weights.
CASES = (
    *((tokens, 256, 512, 1) for tokens in (1, 2, 3, 65, 127, 128, 129, 511, 512, 513, 1000)),
    (4096, 1024, 1024, 1), (8192, 1536, 4096, 1), (100, 128, 512, 8), (700, 1024, 4096, 8), (512, 4096, 8192, 1),
    (1025, 32768, 1024, 1), (513, 4096, 4096, 1), (640, 4096, 2048, 1), (2047, 384, 512, 2), (300, 512, 256, 1),
    (77, 256, 128, 2),
)  # fmt: skip


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
