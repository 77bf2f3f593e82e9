"""RMSNorm and rotary embedding where gradients may follow: contract and dispatch.

On CUDA one Triton kernel each way while gradients are enabled; else `ref.norm_rope`, which defines the meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.kernels.ref import norm_rope as ref


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return `ref.norm_rope.rms_norm`, differentiable."""
    if not x.is_cuda or not torch.is_grad_enabled():
        return ref.rms_norm(x, weight, eps)
    from pelagos.kernels.triton.norm_rope import Norm

    return Norm.apply(x, weight, eps)


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor], *, inverse: bool = False) -> Tensor:
    """Return `ref.norm_rope.apply_rope`, differentiable: x (B, S, C) with a table (B, S, C), or both with heads."""
    width = x.shape[-1]
    whole = table[0].numel() * (x.shape[2] if x.dim() == 4 else 1) == x.numel() and not width & (width - 1)
    if not x.is_cuda or not torch.is_grad_enabled() or not whole:
        return ref.apply_rope(x, table, inverse=inverse)
    from pelagos.kernels.triton.norm_rope import Rope

    return Rope.apply(x, *table, inverse)
