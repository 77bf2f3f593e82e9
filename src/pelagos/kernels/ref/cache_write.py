"""What `kernels.cache_write` computes: norms, rope, pooling and encoders of the model on a bfloat16 carrier."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pelagos import numerics
from pelagos.config import ModelConfig
from pelagos.kernels import rows as pools
from pelagos.kernels.batch_rows import Rows
from pelagos.kernels.layout import OVERLAP_RATIO, CacheLayout
from pelagos.kernels.ref.compress import pool_windows
from pelagos.kernels.ref.norm_rope import rms_norm


class CacheWeights(NamedTuple):
    """What one layer norms and biases its cached rows by; the ape are float32, norms of any float type."""

    q_norm: Tensor  # (q_lora,)
    kv_norm: Tensor  # (C,)
    ape: Tensor | None = None  # (ratio, C or 2C) of the compressor
    norm: Tensor | None = None  # (C,)
    index_ape: Tensor | None = None  # (4, 2 * index_head_dim) of the indexer's compressor
    index_norm: Tensor | None = None  # (index_head_dim,)


def widths(config: ModelConfig, ratio: int) -> tuple[int, ...]:
    """Return the columns of `projected`: query latent, window row; a compressor's kv and gate; the indexer's kv, gate
    and head weights."""
    span = config.head_dim * (1 + (ratio == OVERLAP_RATIO))
    index = (2 * config.index_head_dim,) * 2 + (config.index_n_heads,) if ratio == OVERLAP_RATIO else ()
    return (config.q_lora_rank, config.head_dim, *((span, span) if ratio else ()), *index)


def turned(x: Tensor, turn: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last channels of x (..., C) by turn (..., 2, rope/2), which broadcasts; keeps x's dtype."""
    cos, sin = turn.unbind(-2)
    lead, pairs = x[..., : -2 * cos.shape[-1]], x[..., -2 * cos.shape[-1] :].float().unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)
    sin = -sin if inverse else sin
    return torch.cat((lead, torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)), -1)


def forward(
    projected: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, slots: Tensor,
    weights: CacheWeights, turn: Tensor, entry_turn: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return (codes, scales, head_weights); see `kernels.cache_write.cache_write`."""
    config, eps, kept = layout.config, layout.config.rms_norm_eps, pools.LayerRows(layout, layer, pages, slots)
    live = rows.positions.ge(0).nonzero()[:, 0]
    positions, slot = rows.positions[live].long(), rows.slots[live].long()
    columns = widths(config, kept.ratio)
    latent, kv, *rest = projected[:, : sum(columns)].split(columns, 1)
    codes, scales = numerics.encode_fp8(rms_norm(latent.bfloat16(), weights.q_norm, eps), numerics.ACT_BLOCK)
    row = turned(rms_norm(kv.bfloat16(), weights.kv_norm, eps), turn)[live]
    kept.window.write(slot, positions % kept.window.count, kept.window.encode(row))
    if kept.main is not None:
        assert kept.main_tail is not None
        assert entry_turn is not None
        _append(rest[:2], rows, kept.ratio, kept.main_tail, kept.main, weights.ape, weights.norm, entry_turn, eps)
    head_weights = None
    if kept.index is not None:
        assert kept.index_tail is not None
        inner = (weights.index_ape, weights.index_norm)
        _append(rest[2:4], rows, kept.ratio, kept.index_tail, kept.index, *inner, entry_turn, eps)
        factor = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
        head_weights = (rest[4].bfloat16() * factor).float()
    return codes.view(torch.uint8), scales.view(torch.uint8), head_weights


def _append(
    fresh: list[Tensor], rows: Rows, ratio: int, rings: tuple[pools.Rows, pools.Rows], entries: pools.Rows,
    ape: Tensor | None, norm: Tensor | None, turn: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Put the rows' kv and gate (T, channels) into the rings and the entries they complete into the pages."""
    assert ape is not None
    assert turn is not None
    positions, slots, overlap = rows.positions.long(), rows.slots.long(), ratio == OVERLAP_RATIO
    fresh = [fresh[0], fresh[1] + ape[positions % ratio]]
    ends = (((positions + 1) % ratio == 0) & (positions >= rows.frozen) & (positions >= 0)).nonzero()[:, 0]
    if len(ends):
        back = torch.arange(ratio * (1 + overlap) - 1, -1, -1, device=positions.device)
        at = positions[ends, None] - back  # (N, slots)
        old = (at < rows.first[ends, None]).unsqueeze(-1)
        pooled = []
        for ring, new in zip(rings, fresh, strict=True):
            past = ring.read(slots[ends, None], at.clamp_min(0) % ring.count)
            values = torch.where(old, past, new[(ends[:, None] - back).clamp_min(0)])
            if overlap:
                values = torch.cat((values[:, :ratio, : entries.width], values[:, ratio:, entries.width :]), 1)
            pooled.append(values.masked_fill((at < 0).unsqueeze(-1), -torch.inf if pooled else 0).unsqueeze(0))
        entry = turned(rms_norm(pool_windows(pooled[0], pooled[1])[0].bfloat16(), norm, eps), turn[ends])
        if isinstance(entries, pools.IndexRows):
            entry = numerics.hadamard(entry)
        index = positions[ends] // ratio
        page = rows.table[rows.owner[ends].long(), index // entries.count].long()
        entries.write(page, index % entries.count, entries.encode(entry))
    live = positions >= 0
    for ring, new in zip(rings, fresh, strict=True):
        ring.write(slots[live], positions[live] % ring.count, (new[live],))
