"""What `kernels.indexer` computes: float32 scores over decoded keys and the best of those a row sees."""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.kernels import rows as pools
from pelagos.kernels.batch_rows import Rows
from pelagos.kernels.layout import CacheLayout
from pelagos.kernels.ref.tiles import best

KEYS = 4096  # scored at once


def scores(
    index_q: Tensor, head_weights: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, most: int
) -> Tensor:
    """Return sum_h w_h relu(q_h . k) (T, most) float32, -inf where a row does not see the entry."""
    section = layout.layers[layer].index
    assert section is not None
    keys, q = pools.IndexRows(pages, section), index_q.float()
    table = rows.table[rows.owner.long()].long()
    parts = []
    for low in range(0, most, KEYS):
        index = torch.arange(low, min(low + KEYS, most), device=q.device)
        found = keys.read(table[:, index // section.rows], index % section.rows)  # (T, K, D)
        logits = torch.einsum("thd,tkd->thk", q, found).relu()
        parts.append((head_weights.unsqueeze(2) * logits).sum(1))
    visible = (rows.positions.long() + 1) // layout.layers[layer].ratio
    hidden = torch.arange(most, device=q.device) >= visible.unsqueeze(1)
    return torch.cat(parts, 1).masked_fill(hidden, -torch.inf)


def select(scored: Tensor, visible: Tensor, topk: int) -> Tensor:
    """Return the places (T, topk) int32, ascending, of the largest of scored (T, M), then -1; visible (T,) are real."""
    count = min(topk, scored.shape[1])
    picks = best(scored, count)
    picks = picks.masked_fill(picks >= visible.unsqueeze(1), -1).int()
    return torch.nn.functional.pad(picks, (0, topk - count), value=-1)


def forward(
    index_q: Tensor, head_weights: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, most: int
) -> Tensor:
    """Return picks (T, topk) int32; see `kernels.indexer.pick`."""
    scored = scores(index_q, head_weights, rows, layout, layer, pages, most)
    visible = (rows.positions.long() + 1) // layout.layers[layer].ratio
    return select(scored, visible, layout.config.index_topk)
