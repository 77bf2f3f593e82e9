"""What `kernels.decode_attention` computes: one float32 softmax over decoded rows, with a sink; and random calls."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from pelagos.config import preset
from pelagos.kernels import rows as pools
from pelagos.kernels.batch_rows import Rows
from pelagos.kernels.layout import CacheLayout
from pelagos.kernels.ref.cache_write import CacheWeights, turned, widths

# (preset, ratio, spans of (first position, rows), padding rows): edges of window, ratios and tiles, verification.
CASES = (
    *(("nano", ratio, ((p, 1),), 0) for ratio in (0, 4, 128) for p in (0, 1, 127, 128, 129, 700)),
    ("nano", 4, ((3, 1), (250, 3), (1023, 2)), 2), ("nano", 128, ((126, 4), (5000, 1), (0, 2)), 1),
    ("nano", 0, ((5, 4), (1000, 3)), 1), ("nano", 4, ((1048573, 3),), 0), ("nano", 128, ((1048575, 1),), 1),
    *(("flash", ratio, ((p, 1),), 0) for ratio in (0, 4, 128) for p in (0, 127, 130, 8191)),
    ("flash", 4, ((2050, 3), (1048575, 1), (77, 2)), 2), ("flash", 128, ((1048575, 1), (8190, 4)), 1),
    ("pro", 4, ((1048575, 1), (4095, 2)), 1), ("pro", 128, ((300000, 2),), 0),
    ("flash", 4, tuple((1000 * i, 1) for i in range(40)), 24),
    ("flash", 128, tuple((999 * i, 1) for i in range(48)), 0),
)  # fmt: skip
REWIND = 3


class Call(NamedTuple):
    """The rows of a call over random pools of a model with one layer (0) of a ratio."""

    layout: CacheLayout
    rows: Rows
    pages: Tensor
    slots: Tensor
    most: int  # entries that the row which sees most sees


def make_call(
    shape: str, ratio: int, spans: tuple[tuple[int, int], ...], padding: int = 0, *, pages: int = 16, seed: int = 0,
    device: str = "cpu", pool: tuple[Tensor, Tensor] | None = None,
) -> Call:  # fmt: skip
    """Make a call of a preset's shape. Old positions share `pages` random pages; those that spans write are their own.

    `pool` takes the pools of an earlier call with as many sequences instead of filling new ones.
    """
    config = dataclasses.replace(preset(shape), num_hidden_layers=1, compress_ratios=(ratio,) if ratio else (0,),
                                 num_nextn_predict_layers=0)  # fmt: skip
    if not ratio:  # a page needs some compressor: the layer asked for comes first
        config = dataclasses.replace(config, num_hidden_layers=2, compress_ratios=(0, 4))
    layout = CacheLayout(config, "released", REWIND)
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    longest = max(layout.pages_for(first + count) for first, count in spans)
    table = torch.randint(0, pages, (len(spans), longest), dtype=torch.int32, **options)
    own = pages
    for i, (first, count) in enumerate(spans):
        for page in range(first // layout.page_tokens, layout.pages_for(first + count)):
            table[i, page], own = own, own + 1
    columns = [[], [], [], []]
    for i, (first, count) in enumerate(spans):
        for position in range(first, first + count):
            for column, value in zip(columns, (position, i, first, i), strict=True):
                column.append(value)
    positions, owner, start, slot = (
        torch.tensor(each + [fill] * padding, dtype=torch.int32, device=device)
        for each, fill in zip(columns, (-1, 0, 0, 0), strict=True)
    )
    rows = Rows(positions, slot, start, owner, table, torch.zeros_like(positions))
    if pool is None:
        pool = (torch.zeros(own, layout.page_bytes, dtype=torch.uint8, device=device),
                torch.zeros(len(spans), layout.slot_bytes, dtype=torch.uint8, device=device))  # fmt: skip
        kept = pools.LayerRows(layout, 0, *pool)
        tails = [ring for tail in (kept.main_tail, kept.index_tail) for ring in tail or ()]
        for section, units in ((kept.window, len(spans)), (kept.main, own), (kept.index, own),
                               *((ring, len(spans)) for ring in tails)):  # fmt: skip
            if section is not None:
                unit = torch.arange(units, device=device).repeat_interleave(section.count)
                row = torch.arange(section.count, device=device).repeat(units)
                values = torch.randn(len(unit), section.width, **options)
                section.write(unit, row, section.encode(values.bfloat16().float()))
    most = max((first + count) // ratio for first, count in spans) if ratio else 0
    return Call(layout, rows, *pool, most)


def make_queries(call: Call, *, picked: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return random (q, sink, picks, turn) for a call; with `picked` up to index_topk entries a row, else None."""
    config, positions = call.layout.config, call.rows.positions
    options = {"generator": torch.Generator(positions.device).manual_seed(seed), "device": positions.device}
    q = torch.randn(len(positions), config.num_attention_heads, config.head_dim, **options).bfloat16() * 1.5
    sink = torch.randn(config.num_attention_heads, **options)
    angle = torch.rand(len(positions), config.qk_rope_head_dim // 2, **options) * 1e6
    picks = None
    if picked:
        picks = torch.full((len(positions), config.index_topk), -1, dtype=torch.int32, device=positions.device)
        for row, position in zip(picks, positions.tolist(), strict=True):
            seen = (position + 1) // call.layout.layers[0].ratio
            chosen = torch.randperm(seen, **options)[: config.index_topk].sort().values
            row[: len(chosen)] = chosen.int()
    return q, sink, picks, torch.stack((angle.cos(), angle.sin()), 1)


def make_projected(call: Call, *, seed: int = 0) -> tuple[Tensor, CacheWeights, Tensor, Tensor | None]:
    """Return random (projected, weights, turn, entry_turn) for a call, as `kernels.cache_write` takes them."""
    config, positions, ratio = call.layout.config, call.rows.positions, call.layout.layers[0].ratio
    options = {"generator": torch.Generator(positions.device).manual_seed(seed), "device": positions.device}
    projected = torch.randn(len(positions), sum(widths(config, ratio)), **options)
    spans = [(config.q_lora_rank,), (config.head_dim,)]
    for width, overlap in ((config.head_dim, ratio == 4), *(((config.index_head_dim, True),) if ratio == 4 else ())):
        spans += [(ratio, width * (1 + overlap)), (width,)] if ratio else []
    weights = [
        1 + torch.randn(span, **options) / 4 if len(span) == 1 else torch.randn(span, **options) for span in spans
    ]
    angle = torch.rand(2, len(positions), config.qk_rope_head_dim // 2, **options) * 1e6
    turn, entry_turn = torch.stack((angle.cos(), angle.sin()), 2).contiguous()
    return projected, CacheWeights(*weights), turn, entry_turn if ratio else None


def forward(
    q: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, slots: Tensor, sink: Tensor,
    picks: Tensor | None, turn: Tensor, most: int, *_: object,
) -> Tensor:  # fmt: skip
    """Return the attended values (T, H * C) bfloat16, whole and turned back; see `kernels.decode_attention.attend`."""
    kept, ratio = pools.LayerRows(layout, layer, pages, slots), layout.layers[layer].ratio
    positions = rows.positions.long().unsqueeze(1)
    window = layout.config.sliding_window
    at = positions + torch.arange(1 - window, 1, device=q.device)
    keys = kept.window.read(rows.slots.long().unsqueeze(1), at.clamp_min(0) % kept.window.count)
    mask = at >= 0
    if kept.main is not None and most:
        index = torch.arange(most, device=q.device).expand(len(q), -1) if picks is None else picks.long()
        unit = rows.table[rows.owner.long()].gather(1, index.clamp_min(0) // kept.main.count).long()
        keys = torch.cat((keys, kept.main.read(unit, index.clamp_min(0) % kept.main.count)), 1)
        mask = torch.cat((mask, (index >= 0) & (index < (positions + 1) // ratio)), 1)
    logits = torch.einsum("thc,tkc->thk", q.float() * q.shape[-1] ** -0.5, keys)
    logits = logits.masked_fill(~(mask & (positions >= 0)).unsqueeze(1), -torch.inf)
    weights = torch.cat((logits, sink.view(1, -1, 1).expand(len(q), -1, 1)), 2).softmax(2)[..., :-1]
    found = turned(torch.einsum("thk,tkc->thc", weights, keys).bfloat16(), turn.unsqueeze(1), inverse=True)
    return found.flatten(1)
