"""Attention of decode and verify rows over 584-byte cache rows, in a fixed order of 64-key chunks.

A chunk (128 window rows in order of position, then entries by index or rank) has a softmax of its own; chunks are
folded one after another, 18 of them make a section, sections are folded in turn. Few rows: every chunk is a program and
the combine folds them all. Many rows: a program folds a section in registers by the same steps. So how the work is cut
changes no bit. Operands are float16: it holds what codes, rope and queries hold to 2^-25, and weights more closely than
bfloat16 would.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.batch_rows import Rows
from pelagos.kernels.layout import CacheLayout, Section
from pelagos.kernels.triton.formats import (
    dot,
    e4m3_to_float,
    launch,
    let_next_start,
    target,
    wait_for_inputs,
)
from pelagos.kernels.triton.query import rounded

KEYS = 64  # of a chunk
SECTION = 18  # chunks: all that a CSA row of Flash or Pro attends
RUN = 18  # chunks of a section that the combine reads at once
PROGRAMS = 600  # up to here every chunk is a program
NOTHING = tl.constexpr(-1e30)  # the largest logit of no keys

# Four E4M3 bytes and the scales of their columns to float16.
_WIDEN = tl.constexpr(
    """{
    .reg .b16 p, q;
    .reg .b32 a, b;
    mov.b32 {p, q}, $2;
    cvt.rn.f16x2.e4m3x2 a, p; mul.rn.f16x2 $0, a, $3;
    cvt.rn.f16x2.e4m3x2 b, q; mul.rn.f16x2 $1, b, $4;
    }"""
)


@triton.jit
def _scales(scale, live, SCALES: tl.constexpr):
    """float16 2^(byte - 127) (KEYS, SCALES) of UE8M0 bytes of 103..142 at pointers (KEYS,)."""
    byte = tl.load(scale[:, None] + tl.arange(0, SCALES)[None, :], mask=live[:, None], other=127).to(tl.int32)
    bits = tl.where(byte >= 113, (byte - 112) << 10, 1 << tl.maximum(byte - 103, 0))
    return bits.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _codes(part, live, B: tl.constexpr, BLOCKS: tl.constexpr):
    """E4M3 codes (KEYS, 128) of columns from 128 B; of the last block only the first 64 are."""
    lane = tl.arange(0, 128)[None, :]
    fp8 = live[:, None] & (lane < 64) if B == BLOCKS - 1 else live[:, None]
    return tl.load(part[:, None] + (B * 128 + lane), mask=fp8, other=0)


@triton.jit
def _rope(part, live, BLOCKS: tl.constexpr):
    """bfloat16 (KEYS, 128) of which the last 64 are the rotated columns."""
    lane = tl.arange(0, 128)[None, :]
    rope = (part + (BLOCKS * 128 - 64)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    return tl.load(tl.multiple_of(rope, 8)[:, None] + (lane - 64), mask=live[:, None] & (lane >= 64), other=0.0)


@triton.jit
def _wide(code, scale, TARGET: tl.constexpr):
    """float16 (KEYS, 128) values of codes; scale (KEYS, 2) is for 64 columns each."""
    factor = tl.broadcast_to(scale[:, :, None], (code.shape[0], 2, 64)).reshape(code.shape[0], 128)
    if TARGET == "ptx":
        return tl.inline_asm_elementwise(_WIDEN, "=r,=r,r,r,r", [code, factor], dtype=tl.float16, is_pure=True, pack=4)
    return (e4m3_to_float(code) * factor.to(tl.float32)).to(tl.float16)


@triton.jit
def _fold(total, part, keep, join):
    """total * keep + part * join in two roundings, whoever folds."""
    return tl.fma(part, join, total * keep)


@triton.jit
def _mix(total, p, keys, keep, join, ONLY: tl.constexpr, TARGET: tl.constexpr):
    """Fold the product of a chunk's weights p (HEADS, KEYS) and keys (KEYS, 128) into a total, or make it the total."""
    part = dot(p, keys, tl.zeros(total.shape, tl.float32), TARGET)
    if ONLY:
        return part
    return _fold(total, part, tl.broadcast_to(keep[:, None], total.shape), tl.broadcast_to(join[:, None], total.shape))


@triton.jit
def _place(
    chunk, row, position, seen, pages, slots, picks, table, slot, owner, window_scale, entry_scale, page_bytes,
    PICKED: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, PER_PAGE: tl.constexpr, BYTES: tl.constexpr,
    SCALES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Pointers (KEYS,) to the FP8 part and the scales of a chunk's rows, and which of them are attended."""
    at = chunk * KEYS + tl.arange(0, KEYS)
    back = position - (WINDOW - 1) + at
    near, rank = at < WINDOW, at - WINDOW
    live = (near & (back >= 0)) | ((rank >= 0) & (rank < seen))  # none at position -1
    far = live & (rank >= 0)
    index = rank
    if PICKED > 0:
        index = tl.load(picks + row * PICKED + rank, mask=(rank >= 0) & (rank < PICKED), other=0)
        live, far = live & (index >= 0), far & (index >= 0)
    index = tl.where(far, index, 0)
    page = tl.load(table + owner + index // PER_PAGE, mask=far, other=0).to(tl.int64) * page_bytes
    ring, inner = tl.maximum(back, 0) % RING, index % PER_PAGE
    part = tl.where(near, slots + slot + ring * BYTES, pages + page + inner * BYTES)
    scale = tl.where(near, slots + slot + window_scale + ring * SCALES, pages + page + entry_scale + inner * SCALES)
    return tl.multiple_of(part, 8), tl.multiple_of(scale, 8), live


@triton.jit
def _seen(picks, row, position, most, RATIO: tl.constexpr, PICKED: tl.constexpr):
    """How many entries a row attends."""
    if RATIO == 0:
        return position * 0
    seen = tl.minimum((position + 1) // RATIO, most)
    return tl.minimum(seen, PICKED) if PICKED > 0 else seen


@triton.jit
def _emit(out, turn, stored, column, live, ROPE: tl.constexpr, TARGET: tl.constexpr):
    """Turn back (the last 64 columns, with ROPE), round and store 128 columns (HEADS, 128) of heads at `column`."""
    heads: tl.constexpr = out.shape[0]
    out = rounded(out, TARGET)
    if ROPE:
        pair = tl.arange(0, 64)
        cos = tl.load(turn + pair - 32, mask=pair >= 32, other=1.0)[None, :]
        sin = tl.load(turn + pair, mask=pair >= 32, other=0.0)[None, :]
        a, b = tl.split(out.reshape(heads, 64, 2))
        out = rounded(tl.join(a * cos + b * sin, b * cos - a * sin).reshape(heads, 128), TARGET)
    place = stored + column[:, None] + tl.arange(0, 128)[None, :]
    tl.store(place, out.to(tl.bfloat16), mask=live[:, None])


@triton.jit
def _finish(top, total, sink):
    """What to multiply a folded total by: the sink joins the denominator."""
    most = tl.maximum(top, sink)
    keep = tl.exp2(top - most)
    return keep / (total * keep + tl.exp2(sink - most))


@triton.jit(do_not_specialize=["heads", "parts", "most", "table_stride"])
def _attend_kernel(
    q, pages, slots, table, picks, positions, owners, places, sink, turn, stored, partial, tops,
    heads, parts, most, table_stride, slot_bytes, page_bytes, window_scale, entry_scale, scale,
    RATIO: tl.constexpr, PICKED: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, PER_PAGE: tl.constexpr,
    SCALES: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, EACH: tl.constexpr,
    DONE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Fold EACH chunks for HEADS heads of a row; with DONE these are all it has and the result is stored."""
    let_next_start(TARGET)
    wait_for_inputs(TARGET)
    part, tile, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    slot = tl.load(places + row).to(tl.int64) * slot_bytes
    owner = tl.load(owners + row).to(tl.int64) * table_stride
    head = tile * HEADS + tl.arange(0, HEADS)
    real = head < heads
    lane = tl.arange(0, 128)
    seen = _seen(picks, row, position, most, RATIO, PICKED)
    end = tl.minimum((part + 1) * EACH, tl.where(position < 0, 0, (WINDOW + seen + KEYS - 1) // KEYS))
    begin = part * EACH
    if DONE or begin < end:
        width: tl.constexpr = BLOCKS * 128
        row_bytes: tl.constexpr = width + 64
        own = q + (row * heads + head)[:, None] * width + lane[None, :]
        q0 = tl.load(own, mask=real[:, None], other=0.0).to(tl.float16)
        acc0 = tl.zeros((HEADS, 128), tl.float32)
        q1, q2, q3, acc1, acc2, acc3 = q0, q0, q0, acc0, acc0, acc0
        if BLOCKS == 4:
            q1 = tl.load(own + 128, mask=real[:, None], other=0.0).to(tl.float16)
            q2 = tl.load(own + 256, mask=real[:, None], other=0.0).to(tl.float16)
            q3 = tl.load(own + 384, mask=real[:, None], other=0.0).to(tl.float16)
        top = tl.full((HEADS,), NOTHING, tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        steps = end - begin
        if TARGET == "interpreter":  # which takes no tensor for a range; chunks past the end change nothing
            steps = EACH
        for step in tl.range(0, steps):
            chunk = begin + step
            bits, factor, live = _place(
                chunk, row, position, seen, pages, slots, picks, table, slot, owner, window_scale, entry_scale,
                page_bytes, PICKED, WINDOW, RING, PER_PAGE, row_bytes, SCALES, KEYS,
            )  # fmt: skip
            # All that is read is asked for before the first of it is needed.
            c0, c1, c2, c3 = _codes(bits, live, 0, BLOCKS), None, None, None
            if BLOCKS == 4:
                c1, c2, c3 = _codes(bits, live, 1, 4), _codes(bits, live, 2, 4), _codes(bits, live, 3, 4)
            rope, f0 = _rope(bits, live, BLOCKS).to(tl.float16), _scales(factor, live, SCALES)
            near_rope = lane[None, :] < 64
            if BLOCKS == 4:
                f0, f2 = tl.split(tl.permute(f0.reshape(KEYS, 2, 2, 2), (0, 3, 2, 1)))
                f0, f1 = tl.split(f0)
                f2, f3 = tl.split(f2)
                k0, k1, k2 = _wide(c0, f0, TARGET), _wide(c1, f1, TARGET), _wide(c2, f2, TARGET)
                k3 = tl.where(near_rope, _wide(c3, f3, TARGET), rope)
                s = dot(q0, tl.trans(k0), tl.zeros((HEADS, KEYS), tl.float32), TARGET)
                s = dot(q1, tl.trans(k1), s, TARGET)
                s = dot(q2, tl.trans(k2), s, TARGET)
                s = dot(q3, tl.trans(k3), s, TARGET)
            else:
                f0, _ = tl.split(tl.permute(f0.reshape(KEYS, 4, 2), (0, 2, 1)).reshape(KEYS, 2, 2, 2))
                f0, _ = tl.split(f0)
                k0 = tl.where(near_rope, _wide(c0, f0, TARGET), rope)
                k1, k2, k3 = k0, k0, k0
                s = dot(q0, tl.trans(k0), tl.zeros((HEADS, KEYS), tl.float32), TARGET)
            s = tl.where(live[None, :], s * scale, NOTHING)
            own_top = tl.max(s, 1)
            p = tl.where(live[None, :], tl.exp2(s - own_top[:, None]), 0.0)
            most_top = tl.maximum(top, own_top)
            keep, join = tl.exp2(top - most_top), tl.exp2(own_top - most_top)
            total = _fold(total, tl.sum(p, 1), keep, join)
            top = most_top
            p = p.to(tl.float16)
            acc0 = _mix(acc0, p, k0, keep, join, EACH == 1, TARGET)
            if BLOCKS == 4:
                acc1 = _mix(acc1, p, k1, keep, join, EACH == 1, TARGET)
                acc2 = _mix(acc2, p, k2, keep, join, EACH == 1, TARGET)
                acc3 = _mix(acc3, p, k3, keep, join, EACH == 1, TARGET)
        if DONE:
            factor = _finish(top, total, tl.load(sink + head, mask=real, other=0.0) * 1.4426950408889634)[:, None]
            column, turned = (row * heads + head) * width, turn + row * 64
            _emit(acc0 * factor, turned, stored, column, real, BLOCKS == 1, TARGET)
            if BLOCKS == 4:
                _emit(acc1 * factor, turned, stored, column + 128, real, False, TARGET)
                _emit(acc2 * factor, turned, stored, column + 256, real, False, TARGET)
                _emit(acc3 * factor, turned, stored, column + 384, real, True, TARGET)
        else:
            at = (row * parts + part).to(tl.int64) * heads + head
            tl.store(tops + at * 2, top, mask=real)
            tl.store(tops + at * 2 + 1, total, mask=real)
            place = partial + at[:, None] * width + lane[None, :]
            tl.store(place, acc0, mask=real[:, None])
            if BLOCKS == 4:
                tl.store(place + 128, acc1, mask=real[:, None])
                tl.store(place + 256, acc2, mask=real[:, None])
                tl.store(place + 384, acc3, mask=real[:, None])


@triton.jit(do_not_specialize=["parts", "most"])
def _combine_kernel(
    partial, tops, positions, sink, turn, stored, parts, most,
    RATIO: tl.constexpr, PICKED: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr,
    EACH: tl.constexpr, SECTION: tl.constexpr, SECTIONS: tl.constexpr, RUN: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Fold the parts of 128 columns of one head, EACH chunks a part, in sections of SECTION chunks; finish."""
    let_next_start(TARGET)
    wait_for_inputs(TARGET)
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    lane = tl.arange(0, 128)[None, :]
    position = tl.load(positions + row)
    seen = _seen(tops, row, position, most, RATIO, PICKED)
    count = tl.where(position < 0, 0, ((WINDOW + seen + KEYS - 1) // KEYS + EACH - 1) // EACH)
    each: tl.constexpr = SECTION // EACH
    top, total = tl.full((1,), NOTHING, tl.float32), tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, 128), tl.float32)
    for section in tl.range(0, SECTIONS):
        if (SECTIONS == 1) | (section * each < count):
            own_top, own_total = tl.full((1,), NOTHING, tl.float32), tl.zeros((1,), tl.float32)
            own = tl.zeros((1, 128), tl.float32)
            for low in tl.range(0, each, RUN):
                for i in tl.static_range(RUN):
                    part = section * each + low + i
                    there = (low + i < each) & (part < parts)  # the load does not wait for `count`
                    at = (row * parts + part).to(tl.int64) * heads + head
                    part_top = tl.load(tops + at * 2 + tl.arange(0, 1), mask=there, other=0.0)
                    part_total = tl.load(tops + at * 2 + 1 + tl.arange(0, 1), mask=there, other=0.0)
                    values = tl.load(partial + (at * BLOCKS + block) * 128 + lane, mask=there, other=0.0)
                    live = there & (part < count)
                    part_top = tl.where(live, part_top, NOTHING)
                    part_total, values = tl.where(live, part_total, 0.0), tl.where(live, values, 0.0)
                    most_top = tl.maximum(own_top, part_top)
                    keep, join = tl.exp2(own_top - most_top), tl.exp2(part_top - most_top)
                    own_total = _fold(own_total, part_total, keep, join)
                    own = _fold(own, values, tl.broadcast_to(keep[:, None], (1, 128)),
                                tl.broadcast_to(join[:, None], (1, 128)))  # fmt: skip
                    own_top = most_top
            most_top = tl.maximum(top, own_top)
            keep, join = tl.exp2(top - most_top), tl.exp2(own_top - most_top)
            total = _fold(total, own_total, keep, join)
            acc = _fold(acc, own, tl.broadcast_to(keep[:, None], (1, 128)), tl.broadcast_to(join[:, None], (1, 128)))
            top = most_top
    factor = _finish(top, total, tl.load(sink + head + tl.arange(0, 1)) * 1.4426950408889634)[:, None]
    column = (row * heads + head) * (BLOCKS * 128) + block * 128 + tl.arange(0, 1)
    if block == BLOCKS - 1:
        _emit(acc * factor, turn + row * 64, stored, column, column >= 0, True, TARGET)
    else:
        _emit(acc * factor, turn + row * 64, stored, column, column >= 0, False, TARGET)


def forward(
    q: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, slots: Tensor, sink: Tensor,
    picks: Tensor | None, turn: Tensor, most: int,
) -> Tensor:  # fmt: skip
    """Return what `kernels.decode_attention.attend` does."""
    (tokens, heads, width), place = q.shape, layout.layers[layer]
    new, made_for, window = q.new_empty, target(), place.window
    main = place.main or Section(0, 1, 0, (0, 0))
    picked = 0 if picks is None or not place.ratio else picks.shape[1]
    most = 0 if not place.ratio else min(most, picked) if picked else most
    chunks = triton.cdiv(layout.config.sliding_window + most, KEYS)
    tall = 64 if heads >= 64 else max(16, triton.next_power_of_2(heads))
    tiles = triton.cdiv(heads, tall)
    each = 1 if tokens * tiles * chunks <= PROGRAMS else SECTION
    parts = triton.cdiv(chunks, each)
    stored = new((tokens, heads * width), dtype=torch.bfloat16)
    size = tokens * parts * heads if parts > 1 else 1
    partial, tops = new(size * width, dtype=torch.float32), new(size * 2, dtype=torch.float32)
    constants = {"RATIO": place.ratio, "PICKED": picked, "WINDOW": layout.config.sliding_window,
                 "BLOCKS": width // 128, "KEYS": KEYS, "EACH": each, "TARGET": made_for}  # fmt: skip
    _attend_kernel[(parts, tiles, tokens)](
        q, pages.view(-1)[main.offset :], slots.view(-1)[window.offset :], rows.table, q if picks is None else picks,
        rows.positions, rows.owner, rows.slots, sink, turn, stored, partial, tops,
        heads, parts, most, rows.table.shape[1], layout.slot_bytes, layout.page_bytes,
        window.part(1) - window.offset, main.part(1) - main.offset, width**-0.5 * math.log2(math.e),
        RING=window.rows, PER_PAGE=main.rows, SCALES=window.parts[1], HEADS=tall, DONE=parts == 1, **constants,
        **launch(made_for, num_warps=8 if width > 128 else 4, num_stages=1, enable_fp_fusion=False),
    )  # fmt: skip
    if parts > 1:
        _combine_kernel[(width // 128, heads, tokens)](
            partial, tops, rows.positions, sink, turn, stored, parts, most,
            SECTION=SECTION, SECTIONS=triton.cdiv(parts * each, SECTION), RUN=RUN if each == 1 else 1, **constants,
            **launch(made_for, num_warps=1, enable_fp_fusion=False),
        )  # fmt: skip
    return stored
