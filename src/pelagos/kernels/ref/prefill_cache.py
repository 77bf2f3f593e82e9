"""What `kernels.prefill_cache` computes: `ref.cache_write` over spans of any length, and rows read back decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pelagos.kernels import rows as pools
from pelagos.kernels.batch_rows import Rows
from pelagos.kernels.layout import CacheLayout
from pelagos.kernels.ref import cache_write as decode_ref
from pelagos.kernels.ref.cache_write import CacheWeights, turned
from pelagos.kernels.ref.norm_rope import rms_norm

if TYPE_CHECKING:
    from pelagos.kernels.prefill_cache import Prompt

# (preset, spans of (first position, tokens)): edges of window, ratios, pages and rings; several sequences.
CASES = (
    *(("nano", ((first, tokens),)) for first, tokens in (
        (0, 1), (0, 127), (0, 128), (0, 129), (1, 3), (5, 127), (125, 6), (127, 2), (128, 128), (200, 57), (509, 260))),
    ("nano", ((0, 40), (300, 33))), ("nano", ((127, 1), (0, 129), (1000, 130))), ("nano", ((512, 512),)),
    ("flash", ((0, 512),)), ("flash", ((4096, 513),)), ("flash", ((100, 700), (0, 300))), ("flash", ((2047, 4096),)),
    ("pro", ((0, 600),)), ("pro", ((8191, 512), (3, 60))),
)  # fmt: skip


def cache_write(
    first: Tensor, wide: Tensor | None, call: Prompt, layout: CacheLayout, layer: int, pages: Tensor, slots: Tensor,
    weights: CacheWeights, turn: Tensor, entry_turn: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return main keys, index codes and their scales; see `kernels.prefill_cache.cache_write`.

    The tokens go through `ref.cache_write` as many at a time as the smallest ring holds.
    """
    kept, size, rows = pools.LayerRows(layout, layer, pages, slots), layout.config.sliding_window, call.rows
    latent = layout.config.q_lora_rank
    row = turned(rms_norm(first[:, latent:], weights.kv_norm, layout.config.rms_norm_eps), turn)
    fresh, windows = kept.window.decode(kept.window.encode(row)), []
    for owner, start in enumerate(call.start.tolist()):
        at = torch.arange(start - size + 1, start, device=first.device)
        old = kept.window.read(call.slot[owner].long(), at.clamp_min(0) % kept.window.count)
        windows += [old.masked_fill((at < 0).unsqueeze(1), 0), fresh[rows.owner == owner]]
    projected = torch.cat((first.float(), *(() if wide is None else (wide,))), 1)
    most = min(ring.count for ring in (kept.window, *(kept.main_tail or ()), *(kept.index_tail or ())))
    for owner in range(len(call.start)):
        own = (rows.owner == owner).nonzero()[:, 0]
        for part in own.split(most):
            some = Rows(
                *(each if name == "table" else each[part] for name, each in zip(rows._fields, rows, strict=True))
            )
            some = some._replace(first=some.positions[:1].expand(len(part)))
            entry = None if entry_turn is None else entry_turn[part]
            inputs = (pages, slots, weights, turn[part], entry)
            decode_ref.forward(projected[part], some, layout, layer, *inputs)
    parts = [torch.cat(windows)]
    codes = scales = None
    if kept.main is not None:
        found = call.entries[kept.ratio]
        owner = torch.arange(len(found.counts), device=first.device).repeat_interleave(found.counts)
        index = torch.arange(found.total, device=first.device) - found.base[owner]
        place = rows.table[owner, index // kept.main.count].long(), index % kept.main.count
        if found.total:
            parts.append(kept.main.read(*place))
        if kept.index is not None:
            values = kept.index.read(*place) if found.total else first.new_empty((0, kept.index.width))
            codes, scales = index_operand(values)
    return torch.cat(parts).bfloat16(), codes, scales


def index_operand(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return E4M3 codes (..., D) uint8 and scales (...) float32 of vectors of FP4 values: amax in [128, 256)."""
    top = values.float().abs().amax(-1).view(torch.int32) >> 23
    scale = ((top - 7).clamp_min(1) << 23).view(torch.float32)
    return (values.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).view(torch.uint8), scale
