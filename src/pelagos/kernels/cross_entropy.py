"""Cross-entropy whose logits exist for some tokens at a time, its gradient made where they lie.

Products are torch's; between them CUDA takes Triton. `train.objective.token_loss` is what it is held against.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, *, rows: int = 8192) -> Tensor:
    """Return the mean cross-entropy in nats of vectors (T, D) under head (V, D) where targets (T,) are not IGNORE.

    Holds logits (rows, V) instead of (T, V); differentiable in hidden and head.
    """
    count = (targets != IGNORE).sum().clamp_min(1)
    return CrossEntropy.apply(hidden, head, targets, rows) / count


def turn(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each token's loss (T,) float32, zero where IGNORE, and put its gradient in the place of logits (T, V)."""
    wide, real = logits.float(), targets != IGNORE
    own = targets.clamp_min(0).unsqueeze(1)
    losses = wide.logsumexp(-1) - wide.gather(1, own).squeeze(1)
    chances = wide.softmax(-1).scatter_add_(1, own, wide.new_full(own.shape, -1.0))
    logits.copy_(chances * real.unsqueeze(1))
    return losses * real


class CrossEntropy(torch.autograd.Function):
    """The sum of the losses; both gradients are made in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, rows: int):
        step = turn
        if hidden.is_cuda:
            from pelagos.kernels.triton.cross_entropy import turn as step
        weight, total = head.to(hidden.dtype), hidden.new_zeros((), dtype=torch.float32)
        to_hidden, to_head = torch.empty_like(hidden), torch.zeros_like(head)
        for part, own, out in zip(hidden.split(rows), targets.split(rows), to_hidden.split(rows), strict=True):
            logits = functional.linear(part, weight)
            total += step(logits, own).sum()
            torch.mm(logits, weight, out=out)
            to_head += logits.T @ part
        ctx.save_for_backward(to_hidden, to_head)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        to_hidden, to_head = ctx.saved_tensors
        return (to_hidden * grad).to(to_hidden.dtype), to_head * grad, None, None
