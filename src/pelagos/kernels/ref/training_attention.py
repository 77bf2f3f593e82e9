"""What `kernels.training_attention` computes, with every key of a row at once."""

from __future__ import annotations

import torch
from torch import Tensor

# (lengths of the samples of a row, padding last; heads, width, window, ratio, picks a query or 0 for all visible).
CASES = (
    ((20, 12), 4, 16, 8, 4, 0), ((32,), 4, 16, 8, 8, 0), ((24, 8), 4, 16, 8, 4, 3), ((17, 15), 2, 32, 31, 0, 0),
    ((1024, 512, 512), 8, 128, 128, 128, 0), ((1536, 512), 8, 128, 128, 4, 128), ((2048,), 16, 64, 128, 4, 0),
)  # fmt: skip
SMALL = 4  # of CASES, from the front, that an interpreter can run


def make_inputs(
    lengths: tuple[int, ...], heads: int, width: int, window: int, ratio: int, picks: int, *, device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16, batch: int = 2,
) -> dict[str, Tensor | int | None]:  # fmt: skip
    """Return random arguments of `kernels.training_attention.attend`; samples start at multiples of the ratio."""
    generator = torch.Generator().manual_seed(0)
    length = sum(lengths)
    q, rows = (torch.randn(batch, length, *s, generator=generator) for s in ((heads, width), (width,)))
    bounds = torch.tensor([0, *lengths]).cumsum(0).repeat(batch, 1)
    sizes = torch.tensor(lengths)
    starts, ends = (bounds[0, part].repeat_interleave(sizes) for part in (slice(0, -1), slice(1, None)))
    entries = chosen = None
    if ratio:
        entries = torch.randn(batch, length // ratio, width, generator=generator)
        first, last = -(-starts // ratio), torch.arange(1, length + 1) // ratio
        if picks:
            noise = torch.rand(batch, length, length // ratio, generator=generator)
            at = torch.arange(length // ratio)
            hidden = (at < first[:, None]) | (at >= last[:, None])
            best = noise.masked_fill(hidden, -1).topk(picks, -1)
            chosen = torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, best.indices, best.values >= 0)
    tensors = {"q": q.to(dtype), "rows": rows.to(dtype), "entries": None if entries is None else entries.to(dtype)}
    tensors |= {"sink": torch.randn(heads, generator=generator), "picked": chosen}
    tensors |= {"starts": starts.repeat(batch, 1).int(), "ends": ends.repeat(batch, 1).int()}
    placed = {name: None if t is None else t.to(device) for name, t in tensors.items()}
    return {**placed, "window": window, "ratio": ratio}


def attend(
    q: Tensor, rows: Tensor, entries: Tensor | None, sink: Tensor, picked: Tensor | None, starts: Tensor, ends: Tensor,
    *, window: int, ratio: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (out, weights); see `kernels.training_attention.attend`."""
    length, at = q.shape[1], torch.arange(q.shape[1], device=q.device)
    back = at[:, None] - at
    masks = [((back >= 0) & (back < window)) & (at >= starts.unsqueeze(2))]  # (B, S, S)
    keys = rows
    if entries is not None:
        place = torch.arange(entries.shape[1], device=q.device)
        seen = (place * ratio >= starts.unsqueeze(2)) & ((place + 1) * ratio <= at[:, None] + 1)
        masks.append(seen if picked is None else seen & picked)
        keys = torch.cat((rows, entries), 1)
    mask = torch.cat(masks, 2).unsqueeze(2)  # (B, S, 1, S + M)
    logits = torch.einsum("bshc,bkc->bshk", q.float(), keys.float()) * q.shape[-1] ** -0.5
    last = sink.float()[:, None].expand(*logits.shape[:-1], 1)
    weights = torch.cat((logits.masked_fill(~mask, -torch.inf), last), -1).softmax(-1)[..., :-1]
    out = torch.einsum("bshk,bkc->bshc", weights, keys.float()).to(q.dtype)
    if entries is None:
        return out, None
    return out, weights.detach()[..., length:].sum(2)
