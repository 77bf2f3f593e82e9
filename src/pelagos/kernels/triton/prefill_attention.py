"""Sparse attention of a prompt's queries: one program a query and 64 heads, keys gathered in tiles of 64.

Keys are the decoded rows of `prefill_cache`: a query's window is a run of them, its entries are chosen by picks or are
a run too. Tiles come in the order of positions, then of ranks, so a query's bits are its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.triton import hopper_attention
from pelagos.kernels.triton.formats import dot, hopper, settled, target, to_bfloat16

if TYPE_CHECKING:
    from pelagos.kernels.prefill_cache import Prompt

TILE, MOST_HEADS = 64, 64  # keys and heads of a tile
HOPPER_WIDTH = 512  # columns that its kernel is laid out for
STAGES, WARPS = 2, 8
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attended(rows, key, live, top, total, mixed, scale, TARGET: tl.constexpr):
    """One step of an online softmax: heads (H, C) over keys (K, C), which are values too, where `live`."""
    logits = dot(rows, tl.trans(key), tl.zeros((rows.shape[0], key.shape[0]), tl.float32), TARGET)
    logits = tl.where(live[None, :], logits * scale, -float("inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    weight = tl.exp2(logits - higher[:, None])
    keep = tl.exp2(top - higher)
    mixed = settled(dot(to_bfloat16(weight, TARGET), key, mixed * keep[:, None], TARGET), TARGET)
    return higher, total * keep + tl.sum(weight, 1), mixed


@triton.jit
def _attend_kernel(
    q, keys, positions, owners, starts, windows, base, seen, entries, picks, sink, turn, out, scale,
    HEADS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr, SIZE: tl.constexpr,
    FAR: tl.constexpr, PICKS: tl.constexpr, TILE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """SIZE keys of the window, then with FAR those of entries (rows from `entries`): PICKS picked or all seen."""
    token = tl.program_id(0)
    head, lane = tl.program_id(1) * PADDED + tl.arange(0, PADDED), tl.arange(0, WIDTH)
    real = head < HEADS
    place = (token.to(tl.int64) * HEADS + head)[:, None]
    rows = tl.load(q + place * WIDTH + lane[None, :], mask=real[:, None], other=0.0)
    top = tl.load(sink + head, mask=real, other=0.0) * LOG2_E
    total = tl.full((PADDED,), 1.0, tl.float32)
    mixed = tl.zeros((PADDED, WIDTH), tl.float32)
    position, owner = tl.load(positions + token), tl.load(owners + token)
    own = tl.load(windows + owner) + SIZE - 1 + position - tl.load(starts + owner)
    near = tl.minimum(position + 1, SIZE)
    tile = tl.arange(0, TILE)
    for begin in tl.range(0, SIZE, TILE):
        back = SIZE - 1 - begin - tile
        at = own - tl.minimum(tl.maximum(back, 0), near - 1)
        key = tl.load(keys + at.to(tl.int64)[:, None] * WIDTH + lane[None, :])
        top, total, mixed = _attended(rows, key, (back >= 0) & (back < near), top, total, mixed, scale, TARGET)
    if FAR:
        own, count = entries + tl.load(base + owner), tl.load(seen + token)
        if PICKS > 0:
            count = tl.minimum(count, PICKS)
        for begin in tl.range(0, count, TILE):
            entry = tl.minimum(begin + tile, count - 1)
            if PICKS > 0:
                entry = tl.load(picks + token * PICKS + entry)
            key = tl.load(keys + (own + entry).to(tl.int64)[:, None] * WIDTH + lane[None, :])
            top, total, mixed = _attended(rows, key, begin + tile < count, top, total, mixed, scale, TARGET)
    mixed = to_bfloat16(mixed / total[:, None], TARGET).to(tl.float32)
    even, odd = tl.split(mixed.reshape(PADDED, WIDTH // 2, 2))
    pair = tl.arange(0, WIDTH // 2) - (WIDTH - ROPE) // 2
    cos = tl.load(turn + token * ROPE + pair, mask=pair >= 0, other=1.0)[None, :]
    sin = tl.load(turn + token * ROPE + ROPE // 2 + pair, mask=pair >= 0, other=0.0)[None, :]
    mixed = to_bfloat16(tl.join(even * cos + odd * sin, odd * cos - even * sin).reshape(PADDED, WIDTH), TARGET)
    tl.store(out + place * WIDTH + lane[None, :], mixed, mask=real[:, None])


def attend(
    q: Tensor, call: Prompt, keys: Tensor, ratio: int, sink: Tensor, picks: Tensor | None, turn: Tensor, size: int
) -> Tensor:
    """Return (T, H * C) bfloat16 as `kernels.prefill_attention.attend` does."""
    tokens, heads, width = q.shape
    found = call.entries.get(ratio)
    base, seen = (call.start, call.start) if found is None else (found.base, found.seen)
    out = torch.empty((tokens, heads * width), dtype=torch.bfloat16, device=q.device)
    inputs = (
        q, keys, call.rows.positions, call.rows.owner, call.start, call.window, base, seen, call.windows,
        call.start if picks is None else picks, sink, turn, out, width**-0.5 * LOG2_E.value,
    )  # fmt: skip
    sizes = {"HEADS": heads, "WIDTH": width, "ROPE": 2 * turn.shape[2], "SIZE": size,
             "FAR": found is not None and found.total > 0, "PICKS": 0 if picks is None else picks.shape[1]}  # fmt: skip
    if hopper(q.device) and heads % MOST_HEADS == 0 and width == HOPPER_WIDTH and size % TILE == 0:
        hopper_attention.attend(*inputs, **sizes)
        return out
    padded = min(MOST_HEADS, max(16, triton.next_power_of_2(heads)))
    _attend_kernel[(tokens, triton.cdiv(heads, padded))](
        *inputs, PADDED=padded, TILE=TILE, TARGET=target(), num_warps=WARPS, num_stages=STAGES, **sizes
    )
    return out
