"""RMSNorm and rotary embedding as the released model applies them.

Source: inference/model.py RMSNorm, precompute_freqs_cis, apply_rotary_emb.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pelagos.kernels.ref.gemm import elementwise


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise x (..., C) by its root mean square in float32, weight (C,) or None, one cast back at the end."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * weight.float()).to(x.dtype)


def rope_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    original: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Return the (dim/2,) float32 angular frequencies; `original` > 0 applies YaRN to them (amplitude stays 1)."""
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
    if original <= 0:
        return freqs

    def turns(beta: float) -> float:
        return dim * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(turns(beta_fast)), 0), min(math.ceil(turns(beta_slow)), dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / span).clamp(0, 1)
    return freqs / factor * ramp + freqs * (1 - ramp)


def rope_table(positions: Tensor, freqs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each (..., width) float32, that rotate the last 2 * len(freqs) of `width` channels.

    Channels in front get cos 1 and sin 0. The angle is the float32 product the release computes, so a
    float64 table would not be bit-compatible. sin carries the sign of the pair: (-sin, +sin).
    """
    angle = positions[..., None].float() * freqs  # (..., r/2)
    lead = angle.new_zeros((*angle.shape[:-1], width - 2 * freqs.numel()))
    cos, sin = elementwise(torch.cos, angle), elementwise(torch.sin, angle)
    pairs_cos = torch.stack((cos, cos), -1).flatten(-2)
    pairs_sin = torch.stack((-sin, sin), -1).flatten(-2)
    return torch.cat((lead + 1, pairs_cos), -1), torch.cat((lead, pairs_sin), -1)


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor], *, inverse: bool = False) -> Tensor:
    """Rotate adjacent pairs of x (..., C) by a table broadcastable to it; `inverse` conjugates. Keeps x's dtype."""
    cos, sin = table
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned = swapped * sin
    return (wide * cos - turned if inverse else wide * cos + turned).to(x.dtype)
