"""Attention of a query over its sliding window and its compressed entries, with a sink, in one softmax.

Keys and values are the same vectors (one KV head). Source: technical report 2.3.3; inference/kernel.py sparse_attn.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def window_mask(start: int, length: int, window: int, segments: Tensor | None, device: torch.device) -> Tensor:
    """Say which rows [start - window, start + length) each query sees: itself and the window - 1 rows before it.

    Returns (1, S, window + S) bool for S <= window, else tiles (1, N, window, 2 * window) around the diagonal,
    N = ceil(S / window). With segments (B, S) a query sees only rows of its own segment and the result has B; up to
    `window` more columns before them are those of rows before the first.
    """
    blocks = max(1, -(-length // window))
    size = length if blocks == 1 else window
    row = torch.arange(window + size, device=device)
    back = torch.arange(size, device=device)[:, None] + window - row
    band = ((back >= 0) & (back < window)).expand(blocks, -1, -1)
    tile = torch.arange(blocks, device=device)[:, None, None] * size
    mask = (band & (row + tile >= window - start)).unsqueeze(0)  # (1, N, size, window + size)
    if segments is not None:
        pad = blocks * size - length
        own = functional.pad(segments[:, -length:], (0, pad), value=-3).unflatten(1, (blocks, size))
        before = window + length - segments.shape[1]
        rows = functional.pad(segments, (before, pad), value=-2).unfold(1, window + size, size)
        mask = mask & (own.unsqueeze(3) == rows.unsqueeze(2))
    return mask.squeeze(1) if blocks == 1 else mask


def sparse_attention(
    q: Tensor,
    rows: Tensor,
    row_mask: Tensor,
    entries: Tensor | None,
    entry_mask: Tensor | None,
    sink: Tensor,
    *,
    window: int,
) -> tuple[Tensor, Tensor | None]:
    """Attend q (B, S, H, C) to rows (B, window + S, C) and entries; return (B, S, H, C) and the entries' weights.

    row_mask as `window_mask` returns it. entries (B, M, C) are shared by all queries, or (B, S, K, C) picked
    for each; entry_mask broadcasts to (B, S, M or K). sink (H,) float32 joins the denominator only. Softmax in
    float32; for a float64 q in float64, between logits and weights rounded to float32 as products of the
    carrier are. The weights are (B, S, H, M or K) float32, None without entries.
    """
    length, heads, width = q.shape[1:]
    scale, pad = width**-0.5, -length % window if length > window else 0
    if length > window:  # queries in blocks of `window`, each against its own and the previous block of rows
        tiles = functional.pad(rows, (0, 0, 0, pad)).unflatten(1, (-1, window))
        keys = torch.cat((tiles[:, :-1], tiles[:, 1:]), 2)  # (B, N, 2W, C)
    else:
        keys, row_mask = rows.unsqueeze(1), row_mask.unsqueeze(1)
    blocks = (keys.shape[1], -1)

    def tiled(each: Tensor) -> Tensor:
        return functional.pad(each, (0, 0, 0, 0, 0, pad)).unflatten(1, blocks).flatten(2, 3)  # (B, N, W*H, ...)

    near = _logits(torch.matmul(tiled(q), keys.transpose(2, 3))).unflatten(2, (-1, heads)) * scale
    near = near.masked_fill(~row_mask.unsqueeze(3), -torch.inf).flatten(1, 2)[:, :length]
    far = _entry_logits(q, entries, entry_mask, scale)
    p_near, p_far = _softmax_with_sink(near, far, sink)
    out = torch.matmul(tiled(p_near.to(q.dtype)), keys).unflatten(2, (-1, heads)).flatten(1, 2)[:, :length]
    if entries is not None and p_far is not None:
        out = out + _mix_entries(p_far.to(q.dtype), entries)
    return out.reshape(q.shape), p_far


def _logits(product: Tensor) -> Tensor:
    rounded = product.float()
    return rounded.double() if product.dtype == torch.float64 else rounded


def _entry_logits(q: Tensor, entries: Tensor | None, mask: Tensor | None, scale: float) -> Tensor | None:
    if entries is None or mask is None:
        return None
    if entries.dim() == 3:
        logits = torch.matmul(q.flatten(1, 2), entries.transpose(1, 2)).unflatten(1, q.shape[1:3])
    else:
        logits = torch.matmul(q, entries.transpose(2, 3))
    return (_logits(logits) * scale).masked_fill(~mask.unsqueeze(2), -torch.inf)


def _mix_entries(weights: Tensor, entries: Tensor) -> Tensor:
    if entries.dim() == 3:
        return torch.matmul(weights.flatten(1, 2), entries).unflatten(1, weights.shape[1:3])
    return torch.matmul(weights, entries)


def _softmax_with_sink(near: Tensor, far: Tensor | None, sink: Tensor) -> tuple[Tensor, Tensor | None]:
    """Softmax over near, far and one sink logit a head (dim 2), the sink's share dropped."""
    parts = [near] if far is None else [near, far]
    last = sink.to(near.dtype)[:, None].expand(*near.shape[:-1], 1)
    weights = torch.cat([*parts, last], -1).softmax(-1).float()
    if far is None:
        return weights[..., :-1], None
    return weights[..., : near.shape[-1]], weights[..., near.shape[-1] : -1]
