"""A compressor in training on CUDA: both projections as one product, pooling and its gradient; contract.

What it means: `model.attention.Compressor` with its rows and pool; there is nothing to dispatch, the model asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pool(x: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, opens: Tensor, *, ratio: int, width: int) -> Tensor:
    """Return the pooled entries (B, N, width) of bfloat16 x (B, S, I), before norm and rotation.

    wkv, wgate (span, I), ape (ratio, span) float32; with a span of 2 width windows overlap unless the entry `opens`
    (B, N) a sample. Products take BFloat16 and give float32. Differentiable.
    """
    return Pool.apply(x, torch.cat((wkv, wgate)), ape, opens, ratio, width)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, I) times weight (O, I) transposed, float32."""
    return torch.mm(x, weight.T, out_dtype=torch.float32) if x.is_cuda else x @ weight.T


class Pool(torch.autograd.Function):
    """`pool` over joined weights (2 span, I)."""

    @staticmethod
    def forward(ctx: Any, x, weight, ape, opens, ratio, width):
        from pelagos.kernels.triton import compressor as kernel

        flat, weight = x.reshape(-1, x.shape[-1]), weight.to(x.dtype)
        both = project(flat, weight).view(*x.shape[:2], len(weight))
        pooled, levels = kernel.pool(both, ape, opens, ratio, width, x.dtype)
        ctx.save_for_backward(flat, weight, ape, opens, both, pooled, levels)
        ctx.ratio = ratio
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        from pelagos.kernels.triton import compressor as kernel

        x, weight, ape, opens, both, pooled, levels = ctx.saved_tensors
        change = kernel.pool_backward(grad.contiguous(), both, ape, opens, pooled, levels, ctx.ratio)
        span, flat = ape.shape[1], change.view(len(x), -1)
        to_ape = change[:, : opens.shape[1] * ctx.ratio, span:].float().unflatten(1, (-1, ctx.ratio)).sum((0, 1))
        to_x = (flat @ weight).view(*change.shape[:2], -1) if ctx.needs_input_grad[0] else None
        return to_x, (flat.T @ x).float(), to_ape, None, None, None
