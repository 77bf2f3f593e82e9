"""What `kernels.prefill_indexer` computes: float32 scores over decoded keys and the best of those a row sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pelagos.kernels.layout import OVERLAP_RATIO
from pelagos.kernels.ref.indexer import select

if TYPE_CHECKING:
    from pelagos.kernels.prefill_cache import Prompt

ROWS = 64  # scored at once


def scores(index_q: Tensor, head_weights: Tensor, call: Prompt, codes: Tensor, scales: Tensor, row: Tensor) -> Tensor:
    """Return sum_h w_h relu(q_h . k) (R, most) float32 of rows (R,), -inf where a row does not see the entry."""
    found = call.entries[OVERLAP_RATIO]
    index = torch.arange(found.most, device=row.device)
    total = torch.full((len(row), found.most), -torch.inf, device=row.device)
    for owner in call.rows.owner[row].unique().tolist():
        own, count = row[call.rows.owner[row] == owner], int(found.counts[owner])
        place = slice(int(found.base[owner]), int(found.base[owner]) + count)
        keys = codes[place].view(torch.float8_e4m3fn).float() * scales[place, None]
        parts = [
            (head_weights[some].unsqueeze(2) * torch.einsum("thd,kd->thk", index_q[some].float(), keys).relu()).sum(1)
            for some in own.split(max(1, (1 << 26) // (index_q.shape[1] * max(1, count))))
        ]
        total[call.rows.owner[row] == owner, :count] = torch.cat(parts)
    return total.masked_fill(index >= found.seen[row].unsqueeze(1), -torch.inf)


def pick(index_q: Tensor, head_weights: Tensor, call: Prompt, codes: Tensor, scales: Tensor, topk: int) -> Tensor:
    """Return picks (T, topk) int32; see `kernels.prefill_indexer.pick`."""
    seen = call.entries[OVERLAP_RATIO].seen
    if call.entries[OVERLAP_RATIO].most == 0:
        return torch.full((len(index_q), topk), -1, dtype=torch.int32, device=index_q.device)
    return torch.cat([
        select(scores(index_q, head_weights, call, codes, scales, row), seen[row], topk)
        for row in torch.arange(len(index_q), device=index_q.device).split(ROWS)
    ])  # fmt: skip
