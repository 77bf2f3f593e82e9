"""What `kernels.skinny_gemm` computes: a float32 product of decoded FP8 operands, group by group."""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos import numerics
from pelagos.kernels.batch_rows import Halves


def make_inputs(
    tokens: int, outputs: int, depth: int, groups: int, *, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """Return random (codes, scales, weight, weight_scales) as `kernels.skinny_gemm.product` takes them."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    x = torch.randn(tokens, groups * depth, **options) * torch.rand(tokens, 1, **options) * 4
    codes, scales = numerics.encode_fp8(x, numerics.ACT_BLOCK)
    # All codes but the two NaNs.
    weight = torch.randint(0, 127, (groups * outputs, depth), dtype=torch.uint8, **options)
    weight |= torch.randint(0, 2, weight.shape, dtype=torch.uint8, **options) << 7
    size = (groups * outputs // 128, depth // 128)
    weight_scales = torch.randint(112, 116, size, dtype=torch.uint8, **options)
    return codes.view(torch.uint8), scales.view(torch.uint8), weight, weight_scales


def halves(x: Tensor) -> Halves:
    """Return bfloat16 rows (T, C) as the attention kernels leave them."""
    upper, scales = numerics.encode_fp8(x, numerics.ACT_BLOCK)
    lower = scales.view(torch.uint8) - 4
    rest = (x.float() - numerics.decode_fp8(upper, scales, numerics.ACT_BLOCK)).unflatten(1, (-1, 128))
    rest = (rest / lower.view(torch.float8_e8m0fnu).float().unsqueeze(2)).flatten(1).to(torch.float8_e4m3fn)
    pairs = ((upper, rest), (scales, lower))
    return Halves(*(torch.stack([each.view(torch.uint8) for each in pair], 1).flatten(0, 1) for pair in pairs))


def decoded(codes: Tensor, scales: Tensor | None, block: tuple[int, int]) -> Tensor:
    """Return the float32 values of uint8 E4M3 codes with UE8M0 scales, or of bfloat16 without."""
    if scales is None:
        return codes.float()
    return numerics.decode_fp8(codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), block)


def forward(codes: Tensor, scales: Tensor | None, weight: Tensor, weight_scales: Tensor, groups: int = 1) -> Tensor:
    """Return the product (T, O) bfloat16; see `kernels.skinny_gemm.product`."""
    x, w = decoded(codes, scales, numerics.ACT_BLOCK), decoded(weight, weight_scales, numerics.FP8_BLOCK)
    parts = zip(x.chunk(groups, 1), w.chunk(groups, 0), strict=True)
    return torch.cat([a @ b.T for a, b in parts], 1).to(torch.bfloat16)


def merged(
    codes: Tensor | None, scales: Tensor | None, x: Tensor, weight: Tensor | None, weight_scales: Tensor | None,
    wide_weight: Tensor,
) -> Tensor:  # fmt: skip
    """Return the products (T, O + O') float32; see `kernels.skinny_gemm.merged`."""
    wide = x.float() @ wide_weight.float().T
    if codes is None or weight is None:
        return wide
    narrow = decoded(codes, scales, numerics.ACT_BLOCK) @ decoded(weight, weight_scales, numerics.FP8_BLOCK).T
    return torch.cat((narrow, wide), 1)
