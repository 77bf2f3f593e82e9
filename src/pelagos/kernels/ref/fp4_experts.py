"""What `kernels.fp4_experts` computes: `experts.mixture` on a float32 carrier over decoded operands."""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos import numerics
from pelagos.kernels.batch_rows import Routed
from pelagos.kernels.ref.experts import mixture, swiglu
from pelagos.kernels.ref.skinny_gemm import decoded


def make_inputs(
    tokens: int, experts: int, picks: int, width: int, inner: int, *, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """Return random (codes, scales, chosen, weights, w13, s13, w2, s2) as `kernels.fp4_experts.mixture` takes them.

    Weights are random bytes: every nibble is a value. Tokens choose with a bias, so that some experts are hot.
    """
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    x = torch.randn(tokens, width, **options) * torch.rand(tokens, 1, **options) * 4
    codes, scales = numerics.encode_fp8(x, numerics.ACT_BLOCK)
    heat = torch.rand(experts, **options) * 2
    chosen = (torch.rand(tokens, experts, **options) + heat).topk(picks, -1).indices.int()
    weights = torch.rand(tokens, picks, **options) * 1.5

    def weight(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        packed = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, **options)
        scale = torch.randint(116, 121, (experts, rows, columns // 32), dtype=torch.uint8, **options)
        return packed, scale

    return (codes.view(torch.uint8), scales.view(torch.uint8), chosen, weights,
            *weight(2 * inner, width), *weight(width, inner))  # fmt: skip


def decode(packed: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 values of uint8 FP4 weights (..., C/2) and their UE8M0 bytes (..., C/32)."""
    return numerics.decode_fp4(packed.view(torch.int8), scale.view(torch.float8_e8m0fnu))


def placed(first: Tensor, place: Tensor) -> Tensor:
    """Return all experts' weights (E, ...) of one storage, given the first block's (1, ...) and byte offsets (E,)."""
    views = [first.as_strided(first.shape, first.stride(), first.storage_offset() + at) for at in place.tolist()]
    return torch.cat(views)


def forward(
    codes: Tensor, scales: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor,
    limit: float,
) -> Tensor:  # fmt: skip
    """Return the chosen experts' weighted sum (T, D) float32; only chosen experts are decoded."""
    x = numerics.decode_fp8(codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), numerics.ACT_BLOCK)
    used, places = chosen.long().unique(return_inverse=True)

    def quantize(values: Tensor) -> Tensor:
        return numerics.fake_quant_fp8(values, numerics.ACT_BLOCK)

    return mixture(
        x, places.view(chosen.shape), weights, decode(w13[used], s13[used]), decode(w2[used], s2[used]), limit, quantize
    )


def site(
    codes: Tensor, scales: Tensor, routed: Routed, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared2: Tensor,
    shared2_scales: Tensor, limit: float,
) -> Tensor:  # fmt: skip
    """Return the sum (T, D) bfloat16 of routed and shared experts; see `kernels.fp4_experts.site`."""
    out = forward(codes, scales, routed.chosen, routed.weights, w13, s13, w2, s2, limit)
    gate, up = routed.shared.to(torch.bfloat16).chunk(2, 1)
    hidden = swiglu(gate, up, limit).to(torch.bfloat16)
    hidden = numerics.fake_quant_fp8(hidden, numerics.ACT_BLOCK).float()
    shared = hidden @ decoded(shared2, shared2_scales, numerics.FP8_BLOCK).T
    return (out + shared.to(torch.bfloat16).float()).to(torch.bfloat16)
