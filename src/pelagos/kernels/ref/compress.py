"""Pooling of token rows into compressed entries, and the indexer's choice among them.

Source: technical report 2.3.1-2.3.2; inference/model.py Compressor and Indexer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.kernels.ref.gemm import elementwise, ordered_sum
from pelagos.kernels.ref.tiles import best


def pool_windows(kv: Tensor, score: Tensor) -> Tensor:
    """Pool slots by a per-channel softmax: kv, score (B, N, slots, D) float32 -> (B, N, D); -inf hides a slot."""
    weights = elementwise(torch.exp, score - score.amax(2, keepdim=True))
    return ordered_sum(weights / ordered_sum(weights, 2).unsqueeze(2) * kv, 2)


def overlap_slots(rows: Tensor, *, dim: int, first: int, count: int, ratio: int) -> Tensor:
    """Return the 2*ratio slots of `count` overlapping windows from rows (B, R, 2*dim).

    Window i spans rows [first + i*ratio, +ratio). The previous window gives its first `dim` channels, the
    current one its last; rows before the sequence are the caller's (kv 0, score -inf).
    """
    span = count * ratio
    previous = rows[:, first - ratio : first - ratio + span, :dim].unflatten(1, (count, ratio))
    current = rows[:, first : first + span, dim:].unflatten(1, (count, ratio))
    return torch.cat((previous, current), 2)


def visible_entries(start: int, length: int, ratio: int, entries: int, device: torch.device) -> Tensor:
    """Return (length, entries) bool: entry s may be seen by position t iff ratio * (s + 1) <= t + 1."""
    ends = (torch.arange(entries, device=device) + 1) * ratio
    return ends <= torch.arange(start + 1, start + length + 1, device=device)[:, None]


def index_scores(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Return sum_h w_h relu(q_h . k_s): q (B, S, H, D), keys (B, M, D), weights (B, S, H) -> (B, S, M) float32."""
    logits = torch.matmul(q.flatten(1, 2), keys.transpose(1, 2)).unflatten(1, q.shape[1:3])  # (B, S, H, M)
    return torch.matmul(weights.float().unsqueeze(2), logits.relu().float()).squeeze(2)


def index_topk(scores: Tensor, visible: Tensor, topk: int) -> Tensor:
    """Return the picked entries (B, S, K) int64 ascending, K = min(topk, M), a tie to the lower; -1 where fewer."""
    masked = scores.masked_fill(~visible, -torch.inf)
    picks = best(masked, min(topk, scores.shape[-1]))
    return picks.masked_fill(~visible.expand(scores.shape).gather(-1, picks), -1)
