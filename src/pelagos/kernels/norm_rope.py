"""RMSNorm and rotary embedding where gradients may follow: contract and dispatch.

On CUDA one Triton kernel each way while gradients are enabled; else `ref.norm_rope`, which defines the meaning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pelagos.kernels.ref import norm_rope as ref


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return `ref.norm_rope.rms_norm`, differentiable."""
    if not x.is_cuda or not torch.is_grad_enabled():
        return ref.rms_norm(x, weight, eps)
    return Norm.apply(x, weight, eps)


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor], *, inverse: bool = False) -> Tensor:
    """Return `ref.norm_rope.apply_rope`, differentiable: x (B, S, C) with a table (B, S, C), or both with heads."""
    width = x.shape[-1]
    whole = table[0].numel() * (x.shape[2] if x.dim() == 4 else 1) == x.numel() and not width & (width - 1)
    if not x.is_cuda or not torch.is_grad_enabled() or not whole:
        return ref.apply_rope(x, table, inverse=inverse)
    return Rope.apply(x, *table, inverse)


class Norm(torch.autograd.Function):
    """`rms_norm` by the Triton kernels."""

    @staticmethod
    def forward(ctx: Any, x, weight, eps):
        from pelagos.kernels.triton import norm_rope as kernel

        flat = x.contiguous().view(-1, x.shape[-1])
        out, roots = kernel.norm(flat, weight, eps)
        ctx.save_for_backward(flat, weight, roots)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        from pelagos.kernels.triton import norm_rope as kernel

        x, weight, roots = ctx.saved_tensors
        to_x, to_weight = kernel.norm_backward(x, weight, roots, grad.contiguous().view(x.shape))
        return to_x.view(grad.shape), None if to_weight is None else to_weight.to(weight.dtype), None


class Rope(torch.autograd.Function):
    """`apply_rope` by the Triton kernel, whose backward is the other direction."""

    @staticmethod
    def forward(ctx: Any, x, cos, sin, inverse):
        from pelagos.kernels.triton import norm_rope as kernel

        ctx.save_for_backward(cos, sin)
        ctx.inverse, width = inverse, x.shape[-1]
        cos, sin = (t.reshape(-1, width).contiguous() for t in (cos, sin))
        heads = x.numel() // cos.numel()
        return kernel.rope(x.contiguous().view(-1, width), cos, sin, heads, inverse=inverse).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return Rope.apply(grad, *ctx.saved_tensors, not ctx.inverse), None, None, None
