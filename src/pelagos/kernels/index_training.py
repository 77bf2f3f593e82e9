"""The indexer in training: its scores of entries and its divergence from the main attention; contract and dispatch.

On CUDA nothing with heads x entries a query is held and the divergence makes its gradient at once; elsewhere torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pelagos.kernels.ref import compress
from pelagos.kernels.ref.tiles import best_mask


def index_scores(q: Tensor, keys: Tensor, gates: Tensor, starts: Tensor, ends: Tensor, *, ratio: int) -> Tensor:
    """Return `ref.compress.index_scores` (B, S, M) float32, differentiable; starts, ends (B, S) bound samples.

    On CUDA what a query cannot see is zero.
    """
    if not q.is_cuda:
        return compress.index_scores(q, keys, gates)
    return Scores.apply(q, keys, gates, starts, ends, ratio)


def divergence(scores: Tensor, weights: Tensor, seen: Tensor) -> Tensor:
    """Return sum_e t_e (log t_e - log softmax(scores)_e) (B, S) over entries `seen` (B, S, M) bool, scores (B, S, M).

    The target t is weights (B, S, M), normalised, and carries no gradient.
    """
    if scores.is_cuda:
        return Divergence.apply(scores, weights, seen)
    target = weights.detach()
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-20)
    log_q = scores.masked_fill(~seen, -1e30).log_softmax(-1)
    return (target * (target.clamp_min(1e-20).log() - log_q)).masked_fill(~seen, 0).sum(-1)


@torch.no_grad()
def pick(scores: Tensor, visible: Tensor, topk: int) -> Tensor:
    """Return which of the visible (B, S, M) bool entries have the `topk` largest scores, a tie to the lower."""
    if scores.is_cuda:
        from pelagos.kernels.triton import index_training as kernel

        return kernel.pick(scores, visible.contiguous().view(torch.uint8), topk)
    return best_mask(scores.masked_fill(~visible, -torch.inf), topk) & visible


class Scores(torch.autograd.Function):
    """`index_scores` by the Triton kernels."""

    @staticmethod
    def forward(ctx: Any, q, keys, gates, starts, ends, ratio):
        from pelagos.kernels.triton import index_training as kernel

        q, keys, gates, starts, ends = (t.contiguous() for t in (q, keys, gates, starts, ends))
        ctx.save_for_backward(q, keys, gates, starts, ends)
        ctx.ratio = ratio
        return kernel.scores(q, keys, gates, starts, ratio)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        from pelagos.kernels.triton import index_training as kernel

        q, keys, gates, starts, ends = ctx.saved_tensors
        found = kernel.scores_backward(grad.contiguous(), q, keys, gates, starts, ends, ctx.ratio)
        return *found, None, None, None


class Divergence(torch.autograd.Function):
    """`divergence` by the Triton kernel."""

    @staticmethod
    def forward(ctx: Any, scores, weights, seen):
        from pelagos.kernels.triton import index_training as kernel

        losses, grad = kernel.divergence(scores, weights, seen.contiguous().view(torch.uint8))
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0] * grad.unsqueeze(-1), None, None
