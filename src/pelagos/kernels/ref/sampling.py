"""What `kernels.sampling` computes: log-probability, top-k, top-p, min-p, and a draw by noise that belongs to an id."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN, MIX1, MIX2 = (word - (1 << 64) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def make_inputs(
    tokens: int, vocab: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float,
    *, seed: int = 0, device: str = "cpu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return random (logits, draws) as `kernels.sampling.pick` takes them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocab, generator=generator) * spread
    draws = torch.empty(tokens, 5, dtype=torch.int64)
    draws[:, :3] = torch.tensor([temperature, top_p, min_p], dtype=torch.float64).view(torch.int64)
    draws[:, 3] = top_k
    draws[:, 4] = torch.randint(-(1 << 62), 1 << 62, (tokens,), generator=generator)
    return logits.to(device), draws.to(device)


def forward(logits: Tensor, draws: Tensor) -> Tensor:
    """See `kernels.sampling.pick`."""
    settings = draws[:, :3].contiguous().view(torch.float64).tolist()
    counts, keys = draws[:, 3].tolist(), draws[:, 4].tolist()
    found = [_pick(row, *each) for row, *each in zip(logits.double(), settings, counts, keys, strict=True)]
    return torch.tensor(found, dtype=torch.float64, device=logits.device)


def _pick(row: Tensor, setting: list[float], top_k: int, key: int) -> tuple[float, float]:
    temperature, top_p, min_p = setting
    peak, likeliest = float(row.max()), int(row.argmax())
    if not math.isfinite(peak):
        return -1.0, math.nan
    normaliser = peak + math.log(float((row - peak).exp().sum()))
    if temperature == 0:
        return float(likeliest), peak - normaliser
    scaled = (row - peak) / temperature
    order = scaled.argsort(descending=True, stable=True)
    if 0 < top_k < len(row):
        order = order[:top_k]
    if top_p < 1:
        heads = scaled[order].exp().cumsum(0)
        order = order[: 1 + int((heads[:-1] < top_p * heads[-1]).sum())]
    kept = order.sort().values
    if min_p > 0:
        kept = kept[scaled[kept] >= math.log(min_p)]
    token = int(kept[(scaled[kept] + noise(key, kept)).argmax()])
    return float(token), float(row[token]) - normaliser


def noise(key: int, ids: Tensor) -> Tensor:
    """Return standard Gumbel noise (N,) float64 of the ids, from the top 52 bits of SplitMix64's outputs."""
    words = key + (ids + 1) * GOLDEN
    words = (words ^ words.bitwise_right_shift(30).bitwise_and((1 << 34) - 1)) * MIX1
    words = (words ^ words.bitwise_right_shift(27).bitwise_and((1 << 37) - 1)) * MIX2
    words = words ^ words.bitwise_right_shift(31).bitwise_and((1 << 33) - 1)
    uniform = (words.bitwise_right_shift(12).bitwise_and((1 << 52) - 1).double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log()
