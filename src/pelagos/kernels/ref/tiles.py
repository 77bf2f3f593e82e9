"""Attention and the indexer's choice over keys that come in tiles, so that nothing grows with their number.

A query's result depends on its own tiles and their order alone: a fully hidden tile changes no bit, products have the
same shape a tile, and every sum runs in a fixed order. Source: technical report 2.3; online softmax as usual.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pelagos.kernels.ref.gemm import elementwise, ordered_sum

TILE = 64  # entries a tile, and the grid of positions that cuts queries into blocks


class TiledAttention:
    """Softmax attention of a block of queries, with a sink, over key tiles added one after another.

    q (B, Q, H, C); sink (H,). Keys are values too. Products and sums are float32; with `wide` products are summed in
    float64, logits and weights rounded to float32 between, as `sparse_attention` does for a float64 q. Heads are padded
    to a `multiple`.
    """

    def __init__(self, q: Tensor, sink: Tensor, *, wide: bool = False, multiple: int = 1) -> None:
        self.heads, missing = q.shape[2], -q.shape[2] % multiple
        if missing:
            q, sink = functional.pad(q, (0, 0, 0, missing)), functional.pad(sink, (0, missing))
        self.shape = q.shape
        self.q = (q.double() if wide else q.float()) * q.shape[-1] ** -0.5
        self.top = sink.float().expand(q.shape[:3]).unsqueeze(-1)  # (B, Q, H, 1), the largest logit so far
        self.total = torch.ones_like(self.top)
        self.out = torch.zeros_like(self.q)

    def add(self, keys: Tensor, mask: Tensor) -> None:
        """Attend a tile: keys (B, K, C) for all queries of a block or (B, Q, K, C) one set a query; mask (B, Q, K)."""
        batch, queries, heads, width = self.shape
        keys = keys.to(self.q.dtype).flatten(0, -3)  # (B or B*Q, K, C)
        rows = self.q.reshape(len(keys), -1, width)
        logits = torch.bmm(rows, keys.transpose(1, 2)).float().view(batch, queries, heads, -1)
        logits.masked_fill_(~mask.unsqueeze(2), -torch.inf)
        top = torch.maximum(self.top, logits.amax(-1, keepdim=True))
        weights = elementwise(torch.exp_, logits.sub_(top))
        keep = elementwise(torch.exp, self.top - top)
        mixed = torch.bmm(weights.to(keys.dtype).view(len(keys), -1, keys.shape[1]), keys)
        self.total.mul_(keep).add_(weights.sum(-1, keepdim=True))
        self.out.mul_(keep).add_(mixed.view(self.shape))
        self.top = top

    def result(self) -> Tensor:
        """Return the attended values (B, Q, H, C) float32."""
        return (self.out / self.total).float()[:, :, : self.heads]


def tile_scores(q: Tensor, keys: Tensor, weights: Tensor, *, multiple: int = 1) -> Tensor:
    """Return sum_h w_h relu(q_h . k_s) (B, Q, M) float32: q (B, Q, H, D), weights (B, Q, H), keys (B, M, D), 64 | M.

    Heads are padded to a `multiple`.
    """
    missing = -q.shape[2] % multiple
    if missing:
        q, weights = functional.pad(q, (0, 0, 0, missing)), functional.pad(weights, (0, missing))
    batch, queries, heads, width = q.shape
    tiles = keys.shape[1] // TILE
    rows = q.flatten(1, 2).unsqueeze(1).expand(-1, tiles, -1, -1).reshape(batch * tiles, -1, width)
    logits = torch.bmm(rows, keys.reshape(batch * tiles, TILE, width).transpose(1, 2)).float()
    weighted = logits.relu().view(batch, tiles, queries, heads, TILE) * weights.float().view(
        batch, 1, queries, heads, 1
    )
    return ordered_sum(weighted, 3).transpose(1, 2).flatten(2)


def best(scores: Tensor, count: int) -> Tensor:
    """Return the places (..., count) int64, ascending, of the largest of scores (..., M >= count); a tie to the lower.

    NaN counts as the least.
    """
    return best_mask(scores, count).nonzero()[:, -1].view(*scores.shape[:-1], count)


def best_mask(scores: Tensor, count: int) -> Tensor:
    """Return whether each of scores (..., M) is among those of `best`, bool."""
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    least = scores.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    above, tie = scores > least, scores == least
    room = count - above.sum(-1, keepdim=True)
    return above | (tie & (tie.cumsum(-1) <= room))
