"""The indexer in training: its scores of entries and its divergence from the main attention; contract and dispatch.

On CUDA nothing with heads x entries a query is held and the divergence makes its gradient at once; elsewhere torch.
"""

from __future__ import annotations

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
    from pelagos.kernels.triton.index_training import Scores

    return Scores.apply(q, keys, gates, starts, ends, ratio)


def divergence(scores: Tensor, weights: Tensor, seen: Tensor) -> Tensor:
    """Return sum_e t_e (log t_e - log softmax(scores)_e) (B, S) over entries `seen` (B, S, M) bool, scores (B, S, M).

    The target t is weights (B, S, M), normalised, and carries no gradient.
    """
    if scores.is_cuda:
        from pelagos.kernels.triton.index_training import Divergence

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
