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

from pelagos.kernels.triton.formats import (
    dot,
    e4m3_code,
    fp8_scale_exponent,
    quantise_block,
    target,
    to_bfloat16,
)

if TYPE_CHECKING:
    from pelagos.kernels.prefill_cache import Prompt

TILE, MOST_HEADS = 64, 64  # keys and heads of a tile
STAGES, WARPS = 2, 8


@triton.jit
def _attended(rows, key, live, top, total, mixed, scale, TARGET: tl.constexpr):
    """One step of an online softmax: heads (H, C) over keys (K, C), which are values too, where `live`."""
    logits = dot(rows, tl.trans(key), tl.zeros((rows.shape[0], key.shape[0]), tl.float32), TARGET)
    logits = tl.where(live[None, :], logits * scale, -float("inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    weight = tl.exp2(logits - higher[:, None])
    keep = tl.exp2(top - higher)
    mixed = dot(to_bfloat16(weight, TARGET), key, mixed * keep[:, None], TARGET)
    return higher, total * keep + tl.sum(weight, 1), mixed


@triton.jit
def _attend_kernel(
    q, keys, positions, owners, starts, windows, base, seen, entries, picks, sink, turn, out, codes, scales, scale,
    HEADS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr, SIZE: tl.constexpr,
    FAR: tl.constexpr, PICKS: tl.constexpr, QUANTISED: tl.constexpr, TILE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """SIZE keys of the window, then with FAR those picked, at most PICKS, or all seen; rows of entries from `entries`."""
    token = tl.program_id(0)
    head, lane = tl.program_id(1) * PADDED + tl.arange(0, PADDED), tl.arange(0, WIDTH)
    real = head < HEADS
    place = (token.to(tl.int64) * HEADS + head)[:, None]
    rows = tl.load(q + place * WIDTH + lane[None, :], mask=real[:, None], other=0.0)
    top = tl.load(sink + head, mask=real, other=0.0) * 1.4426950408889634
    total = tl.full((PADDED,), 1.0, tl.float32)
    mixed = tl.zeros((PADDED, WIDTH), tl.float32)
    position, owner = tl.load(positions + token), tl.load(owners + token)
    own = tl.load(windows + owner) + SIZE - 1 + position - tl.load(starts + owner)
    near = tl.minimum(position + 1, SIZE)
    tile = tl.arange(0, TILE)
    for begin in tl.range(0, SIZE, TILE):
        back = SIZE - 1 - begin - tile
        key = tl.load(keys + (own - tl.minimum(tl.maximum(back, 0), near - 1))[:, None].to(tl.int64) * WIDTH + lane[None, :])
        top, total, mixed = _attended(rows, key, (back >= 0) & (back < near), top, total, mixed, scale, TARGET)
    if FAR:
        own, count = entries + tl.load(base + owner), tl.load(seen + token)
        if PICKS > 0:
            count = tl.minimum(count, PICKS)
        for begin in tl.range(0, count, TILE):
            entry = tl.minimum(begin + tile, count - 1)
            if PICKS > 0:
                entry = tl.load(picks + token * PICKS + entry)
            key = tl.load(keys + (own + entry)[:, None].to(tl.int64) * WIDTH + lane[None, :])
            top, total, mixed = _attended(rows, key, begin + tile < count, top, total, mixed, scale, TARGET)
    mixed = to_bfloat16(mixed / total[:, None], TARGET).to(tl.float32)
    even, odd = tl.split(mixed.reshape(PADDED, WIDTH // 2, 2))
    pair = tl.arange(0, WIDTH // 2) - (WIDTH - ROPE) // 2
    cos = tl.load(turn + token * ROPE + pair, mask=pair >= 0, other=1.0)[None, :]
    sin = tl.load(turn + token * ROPE + ROPE // 2 + pair, mask=pair >= 0, other=0.0)[None, :]
    mixed = to_bfloat16(tl.join(even * cos + odd * sin, odd * cos - even * sin).reshape(PADDED, WIDTH), TARGET)
    if QUANTISED:
        mixed = mixed.to(tl.float32).reshape(PADDED, WIDTH // 128, 128)
        exponent = fp8_scale_exponent(tl.max(tl.abs(mixed), 2))
        code = e4m3_code(quantise_block(mixed, exponent[:, :, None])).reshape(PADDED, WIDTH)
        tl.store(codes + place * WIDTH + lane[None, :], code, mask=real[:, None])
        block = tl.arange(0, WIDTH // 128)
        tl.store(scales + place * (WIDTH // 128) + block[None, :], exponent.to(tl.uint8), mask=real[:, None])
    else:
        tl.store(out + place * WIDTH + lane[None, :], mixed, mask=real[:, None])


def attend(
    q: Tensor, call: Prompt, keys: Tensor, ratio: int, sink: Tensor, picks: Tensor | None, turn: Tensor, size: int,
    quantised: bool,
) -> tuple[Tensor, ...]:
    """Return (out,) or (codes, scales) as `kernels.prefill_attention.attend` does."""
    tokens, heads, width = q.shape
    found = call.entries.get(ratio)
    far = found is not None and found.total > 0
    base, seen = (found.base, found.seen) if found is not None else (call.start, call.start)
    sizes = (width, width // 128) if quantised else (width,)
    kinds = (torch.uint8, torch.uint8) if quantised else (torch.bfloat16,)
    made = tuple(torch.empty((tokens, heads * n), dtype=kind, device=q.device) for n, kind in zip(sizes, kinds, strict=True))
    padded = min(MOST_HEADS, max(16, triton.next_power_of_2(heads)))
    _attend_kernel[(tokens, triton.cdiv(heads, padded))](
        q, keys, call.rows.positions, call.rows.owner, call.start, call.window, base, seen, call.windows,
        call.start if picks is None else picks, sink, turn, made[0], made[0], made[-1],
        width**-0.5 * 1.4426950408889634,
        HEADS=heads, PADDED=padded, WIDTH=width, ROPE=2 * turn.shape[2],
        SIZE=size, FAR=far, PICKS=0 if picks is None else picks.shape[1], QUANTISED=quantised,
        TILE=TILE, TARGET=target(), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return made
