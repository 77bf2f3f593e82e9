"""What `kernels.prefill_attention` computes: one float32 softmax over a row's window and entries, with a sink."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pelagos.kernels.ref.cache_write import turned

if TYPE_CHECKING:
    from pelagos.kernels.prefill_cache import Prompt

ROWS = 128  # attended at once


def attend(
    q: Tensor, call: Prompt, keys: Tensor, ratio: int, sink: Tensor, picks: Tensor | None, turn: Tensor, size: int
) -> Tensor:
    """Return (T, H * C) bfloat16; see `kernels.prefill_attention.attend`."""
    found, parts = call.entries.get(ratio), []
    for row in torch.arange(len(q), device=q.device).split(ROWS):
        position, owner = call.rows.positions[row].long(), call.rows.owner[row].long()
        back = torch.arange(size - 1, -1, -1, device=q.device)
        at = (call.window[owner] + size - 1 + position - call.start[owner]).unsqueeze(1) - back
        mask = back <= position.unsqueeze(1)
        if found is not None and found.most:
            entry = torch.arange(found.most, device=q.device).expand(len(row), -1) if picks is None else picks[row]
            far = (entry >= 0) & (entry < found.seen[row].unsqueeze(1))
            at = torch.cat((at, (call.windows + found.base[owner].unsqueeze(1) + entry).where(far, at[:, -1:])), 1)
            mask = torch.cat((mask, far), 1)
        own = keys[at].float()
        logits = torch.einsum("thc,tkc->thk", q[row].float() * q.shape[-1] ** -0.5, own)
        logits = logits.masked_fill(~mask.unsqueeze(1), -torch.inf)
        weights = torch.cat((logits, sink.view(1, -1, 1).expand(len(row), -1, 1)), 2).softmax(2)[..., :-1]
        parts.append(
            turned(torch.einsum("thk,tkc->thc", weights, own).bfloat16(), turn[row].unsqueeze(1), inverse=True)
        )
    return torch.cat(parts).flatten(1)
