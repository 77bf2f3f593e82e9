"""Sinkhorn normalisation of the mixing matrices: contract and dispatch.

On CUDA one Triton kernel each way; elsewhere `ref.hyper_connection.sinkhorn`, which defines the meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from pelagos.kernels.ref import hyper_connection as ref


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Make each (n, n) matrix of logits (..., n, n) float32 nearly doubly stochastic; differentiable.

    Source: technical report 2.2. The CUDA path keeps the 2 * iters - 1 normalisers and walks back through them
    in the backward instead of storing the iterates.
    """
    if not logits.is_cuda:
        return ref.sinkhorn(logits, iters, eps)
    mixed, _ = torch.ops.pelagos.sinkhorn(logits.contiguous(), iters, eps)
    return mixed


@library.custom_op("pelagos::sinkhorn", mutates_args=())
def _forward(logits: Tensor, iters: int, eps: float) -> tuple[Tensor, Tensor]:
    from pelagos.kernels.triton import sinkhorn as kernel

    return kernel.forward(logits, iters, eps)


@_forward.register_fake
def _(logits: Tensor, iters: int, eps: float) -> tuple[Tensor, Tensor]:
    n = logits.shape[-1]
    count = logits.numel() // (n * n)
    return torch.empty_like(logits), logits.new_empty((2 * iters - 1, count, n))


@library.custom_op("pelagos::sinkhorn_backward", mutates_args=())
def _backward(grad: Tensor, mixed: Tensor, normalisers: Tensor, eps: float) -> Tensor:
    from pelagos.kernels.triton import sinkhorn as kernel

    return kernel.backward(grad, mixed, normalisers, eps)


@_backward.register_fake
def _(grad: Tensor, mixed: Tensor, normalisers: Tensor, eps: float) -> Tensor:
    return torch.empty_like(mixed)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.eps = inputs[2]  # pyright: ignore[reportAttributeAccessIssue]


def _differentiate(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    mixed, normalisers = ctx.saved_tensors
    return torch.ops.pelagos.sinkhorn_backward(grad.contiguous(), mixed, normalisers, ctx.eps), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
