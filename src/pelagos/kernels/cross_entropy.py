"""Cross-entropy whose logits exist for one chunk of the vocabulary at a time, forward and backward, on any device.

It is products and sums over rows, so plain torch is both its meaning and its speed; `train.objective.token_loss` is
what it is held against.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, *, chunk: int = 16384) -> Tensor:
    """Return the mean cross-entropy in nats of vectors (T, D) under head (V, D) where targets (T,) are not IGNORE.

    Holds logits (T, chunk) instead of (T, V); differentiable in hidden and head.
    """
    count = (targets != IGNORE).sum().clamp_min(1)
    return _CrossEntropy.apply(hidden, head, targets, chunk) / count


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int):
        top = hidden.new_full(hidden.shape[:1], -torch.inf, dtype=torch.float32)
        total, picked = torch.zeros_like(top), torch.zeros_like(top)
        for begin in range(0, len(head), chunk):
            logits = functional.linear(hidden, head[begin : begin + chunk].to(hidden.dtype)).float()
            largest = torch.maximum(top, logits.amax(-1))
            total = total * (top - largest).exp() + (logits - largest.unsqueeze(-1)).exp().sum(-1)
            top, place = largest, targets - begin
            inside = (place >= 0) & (place < logits.shape[1])
            own = logits.gather(1, place.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
            picked = torch.where(inside, own, picked)
        each = top + total.log()
        ctx.save_for_backward(hidden, head, targets, each)
        ctx.chunk = chunk
        return (each - picked).masked_fill(targets == IGNORE, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, head, targets, each = ctx.saved_tensors
        weight = (grad * (targets != IGNORE)).unsqueeze(1)
        to_hidden, to_head = torch.zeros_like(hidden, dtype=torch.float32), torch.zeros_like(head)
        for begin in range(0, len(head), ctx.chunk):
            part = head[begin : begin + ctx.chunk].to(hidden.dtype)
            chances = (functional.linear(hidden, part).float() - each.unsqueeze(1)).exp()
            place = torch.arange(begin, begin + len(part), device=targets.device)
            change = ((chances - (targets.unsqueeze(1) == place).float()) * weight).to(hidden.dtype)
            to_hidden += change @ part
            to_head[begin : begin + ctx.chunk] = change.T @ hidden
        return to_hidden.to(hidden.dtype), to_head, None, None
