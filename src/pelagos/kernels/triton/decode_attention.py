"""Attention of decode and verify rows over 584-byte cache rows, in a fixed order of 64-key chunks.

A chunk (128 window rows in order of position, then entries by index or rank) has a softmax of its own; chunks are
folded one after another, 18 of them make a section, sections are folded in turn. Few rows: every chunk is a program and
the combine folds them all, a section a program. Many rows: a program folds half of the columns of a section in
registers by the same steps. So how the work is cut changes no bit. Operands are float16: it holds what codes, rope and
queries hold to 2^-25, and weights more closely than bfloat16 would.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.batch_rows import Halves, Rows
from pelagos.kernels.layout import CacheLayout, Section
from pelagos.kernels.triton import formats
from pelagos.kernels.triton.query import turned

KEYS = 64  # of a chunk
SECTION = 18  # chunks: all that a CSA row of Flash or Pro attends
PROGRAMS = 300  # up to here every chunk is a program
FEW, FEW_ROWS = 3, 32  # so few chunks of more rows become whole results where they are made, a launch less
HALVES = 2  # of a row's columns, of which a program of many chunks folds one
RESIDENT = 132  # up to here every block of its columns too
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

# Two bfloat16, or the powers of two of two UE8M0 bytes, to float16; two float32 to bfloat16 and back. One at a time
# these conversions take four times as long.
_NARROW = tl.constexpr("{.reg .b32 a, b; shl.b32 a, $1, 16; and.b32 b, $1, 0xFFFF0000; cvt.rn.f16x2.f32 $0, b, a;}")
_POWERS = tl.constexpr("{.reg .b32 a, b; shl.b32 a, $1, 23; shl.b32 b, $2, 23; cvt.rn.f16x2.f32 $0, b, a;}")
_ROUND = tl.constexpr("{.reg .b32 a; cvt.rn.bf16x2.f32 a, $3, $2; shl.b32 $0, a, 16; and.b32 $1, a, 0xFFFF0000;}")


@triton.jit
def _rounded(x, TARGET: tl.constexpr):
    """`formats.rounded`, of an even number of values a thread."""
    if TARGET == "ptx":
        return tl.inline_asm_elementwise(_ROUND, "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    return formats.rounded(x, TARGET)


@triton.jit
def _scales(scale, live, SCALES: tl.constexpr, BLOCKS: tl.constexpr, TARGET: tl.constexpr):
    """float16 2^(byte - 127) (KEYS, 2) of every 128 columns, for UE8M0 bytes of 103..142 at addresses (KEYS,)."""
    place = tl.multiple_of(scale.to(tl.pointer_type(tl.uint8)), 8)[:, None] + tl.arange(0, SCALES)[None, :]
    byte = tl.load(place, mask=live[:, None], other=127).to(tl.int32)
    if TARGET == "ptx":
        factors = tl.inline_asm_elementwise(_POWERS, "=r,r,r", [byte], dtype=tl.float16, is_pure=True, pack=2)
    else:
        factors = formats.power_of_two(byte).to(tl.float16)
    keys: tl.constexpr = scale.shape[0]
    if BLOCKS == 1:
        first, _ = tl.split(tl.permute(factors.reshape(keys, 4, 2), (0, 2, 1)).reshape(keys, 2, 2, 2))
        first, _ = tl.split(first)
        return [first]
    else:  # one branch is compiled, and each has a type of its own
        first, third = tl.split(tl.permute(factors.reshape(keys, 2, 2, 2), (0, 3, 2, 1)))
        first, second = tl.split(first)
        third, fourth = tl.split(third)
        return [first, second, third, fourth]


@triton.jit
def _codes(part, live, B: tl.constexpr, BLOCKS: tl.constexpr):
    """E4M3 codes (KEYS, 128) of columns from 128 B; of the last block only the first 64 are."""
    lane = tl.arange(0, 128)[None, :]
    fp8 = live[:, None] & (lane < 64) if B == BLOCKS - 1 else live[:, None]
    return tl.load(tl.multiple_of(part.to(tl.pointer_type(tl.uint8)), 8)[:, None] + (B * 128 + lane), mask=fp8, other=0)


@triton.jit
def _rope(part, live, BLOCKS: tl.constexpr, TARGET: tl.constexpr):
    """float16 (KEYS, 128) of which the last 64 are the rotated columns."""
    lane, place = tl.arange(0, 128)[None, :], (part + (BLOCKS * 128 - 64)).to(tl.pointer_type(tl.bfloat16))
    place = tl.multiple_of(place, 8)[:, None] + (lane - 64)
    rope = tl.load(place, mask=live[:, None] & (lane >= 64), other=0.0)
    if TARGET == "ptx":
        return tl.inline_asm_elementwise(_NARROW, "=r,r", [rope], dtype=tl.float16, is_pure=True, pack=2)
    return rope.to(tl.float16)


@triton.jit
def _wide(code, scale, rope, LAST: tl.constexpr, TARGET: tl.constexpr):
    """float16 (KEYS, 128) values of codes, scale (KEYS, 2) for 64 columns each; the last 64 columns are `rope`'s."""
    factor = tl.broadcast_to(scale[:, :, None], (code.shape[0], 2, 64)).reshape(code.shape[0], 128)
    if TARGET == "ptx":
        x = tl.inline_asm_elementwise(_WIDEN, "=r,=r,r,r,r", [code, factor], dtype=tl.float16, is_pure=True, pack=4)
    else:
        x = (formats.e4m3_to_float(code) * factor.to(tl.float32)).to(tl.float16)
    return tl.where(tl.arange(0, 128)[None, :] < 64, x, rope) if LAST else x


@triton.jit
def _fold(total, part, keep, join):
    """total * keep + part * join in two roundings, whoever folds."""
    return tl.fma(part, join, total * keep)


@triton.jit
def _mix(total, p, keys, keep, join, ONLY: tl.constexpr, TARGET: tl.constexpr):
    """Fold the product of a chunk's weights p (HEADS, KEYS) and keys (KEYS, 128) into a total, or make it the total."""
    part = formats.dot(p, keys, tl.zeros(total.shape, tl.float32), TARGET)
    if ONLY:
        return part
    return _fold(total, part, tl.broadcast_to(keep[:, None], total.shape), tl.broadcast_to(join[:, None], total.shape))


@triton.jit
def _mixed(acc, p, keys, keep, join, FIRST: tl.constexpr, ONLY: tl.constexpr, TARGET: tl.constexpr):
    """`_mix` of as many blocks of columns as there are totals, from block FIRST on."""
    return [_mix(acc[b], p, keys[FIRST + b], keep, join, ONLY, TARGET) for b in (0, 1, 2, 3)[: len(acc)]]


@triton.jit
def _fetch(part, BYTES: tl.constexpr, TARGET: tl.constexpr):
    """Bring rows of Flash or Pro to the L2, from the multiple of 16 at or before each, as has to be asked for."""
    if TARGET == "ptx" and BYTES == 576:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s64 p, $1, 0; @p cp.async.bulk.prefetch.L2.global [$1], 576; mov.b32 $0, 0;}",
            "=r,l", [part & -16], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _place(
    chunk, row, position, seen, pages, slots, picks, table, slot, owner, window_scale, entry_scale, page_bytes,
    PICKED: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, PER_PAGE: tl.constexpr, BYTES: tl.constexpr,
    SCALES: tl.constexpr, KEYS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Addresses (COUNT,) of the FP8 part and the scales of rows from a chunk on, and which of them are attended."""
    at = chunk * KEYS + tl.arange(0, COUNT)
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
    return part.to(tl.int64), scale.to(tl.int64), live


@triton.jit
def _seen(picks, row, position, most, RATIO: tl.constexpr, PICKED: tl.constexpr):
    """How many entries a row attends."""
    if RATIO == 0:
        return position * 0
    seen = tl.minimum((position + 1) // RATIO, most)
    return tl.minimum(seen, PICKED) if PICKED > 0 else seen


@triton.jit
def _emit(out, turn, stored, scales, column, low, live, ROPE: tl.constexpr, TARGET: tl.constexpr):
    """Turn back (the last 64 columns, with ROPE), round and store 128 columns (HEADS, 128) of heads at `column`.

    As codes they become two E4M3 rows that add up, the lower half `low` columns behind.
    """
    heads: tl.constexpr = out.shape[0]
    out = _rounded(out, TARGET)
    if ROPE:
        pair = tl.arange(0, 64)
        cos = tl.load(turn + pair - 32, mask=pair >= 32, other=1.0)[None, :]
        sin = tl.load(turn + pair, mask=pair >= 32, other=0.0)[None, :]
        a, b = tl.split(out.reshape(heads, 64, 2))
        out = _rounded(tl.join(a * cos + b * sin, b * cos - a * sin).reshape(heads, 128), TARGET)
    place = stored + column[:, None] + tl.arange(0, 128)[None, :]
    if stored.dtype.element_ty == tl.bfloat16:
        tl.store(place, out.to(tl.bfloat16), mask=live[:, None])
    else:
        exponent = formats.fp8_scale_exponent(tl.max(tl.abs(out), 1))
        upper = formats.quantise_block(out, exponent[:, None])
        rest = out - upper * formats.power_of_two(exponent)[:, None]
        tl.store(place, formats.e4m3_code(upper), mask=live[:, None])
        tl.store(place + low, formats.e4m3_block(rest, exponent[:, None] - 4), mask=live[:, None])
        tl.store(scales + column // 128, exponent.to(tl.uint8), mask=live)
        tl.store(scales + (column + low) // 128, (exponent - 4).to(tl.uint8), mask=live)


@triton.jit
def _normed(blocks, again, eps, turn, BLOCKS: tl.constexpr, TARGET: tl.constexpr):
    """Heads (HEADS, 128) a block of columns over their root mean square, the last 64 columns turned; float32."""
    wide = blocks[0].to(tl.float32)
    square = wide * wide
    for b in tl.static_range(1, BLOCKS):
        wide = blocks[b].to(tl.float32)
        square += wide * wide
    for _ in tl.static_range(7):  # by neighbours: a sum's order is its layout's, which each way to cut has of its own
        even, odd = tl.split(square.reshape(square.shape[0], square.shape[1] // 2, 2))
        square = even + odd
    root = tl.rsqrt(square / (BLOCKS * 128) + eps)
    wide = [_rounded(each.to(tl.float32) * root, TARGET) for each in again]
    last = turned(wide[BLOCKS - 1], turn, 64, TARGET)
    return [last if b == BLOCKS - 1 else wide[b] for b in (0, 1, 2, 3)[:BLOCKS]]


@triton.jit
def _finish(top, total, sink):
    """What to multiply a folded total by: the sink joins the denominator."""
    most = tl.maximum(top, sink)
    keep = tl.exp2(top - most)
    return keep / (total * keep + tl.exp2(sink - most))


@triton.jit(do_not_specialize=["heads", "parts", "most", "table_stride", "q_blocks"])
def _attend_kernel(
    q, pages, slots, table, picks, positions, owners, places, sink, turn, stored, stored_scales, partial, tops, noted,
    heads, parts, most, table_stride, q_blocks, eps, slot_bytes, page_bytes, window_scale, entry_scale, scale,
    RATIO: tl.constexpr, PICKED: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, PER_PAGE: tl.constexpr,
    SCALES: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, EACH: tl.constexpr,
    DONE: tl.constexpr, CUT: tl.constexpr, NORM: tl.constexpr, COUNT: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Fold EACH chunks for HEADS heads of a row; with DONE these are all it has and the result is stored.

    CUT > 1: of the values this program takes one of so many parts of the columns. EACH > 1: where the rows of its
    chunks lie, COUNT at most, is noted first: to find out chunk by chunk would take two round trips each, and as many
    instructions in every layout that wants to know.
    """
    formats.let_next_start(TARGET)
    part, tile, row = tl.program_id(0), tl.program_id(1) // CUT, tl.program_id(2)
    block = tl.program_id(1) % CUT
    position = tl.load(positions + row)
    slot = tl.load(places + row).to(tl.int64) * slot_bytes
    owner = tl.load(owners + row).to(tl.int64) * table_stride
    formats.wait_for_inputs(TARGET)
    head = tile * HEADS + tl.arange(0, HEADS)
    real = head < heads
    lane = tl.arange(0, 128)
    seen = _seen(picks, row, position, most, RATIO, PICKED)
    end = tl.minimum((part + 1) * EACH, tl.where(position < 0, 0, (WINDOW + seen + KEYS - 1) // KEYS))
    begin = part * EACH
    if DONE or begin < end:
        width: tl.constexpr = BLOCKS * 128
        row_bytes: tl.constexpr = width + 64
        own = q + row.to(tl.int64) * q_blocks * 128 + head[:, None] * width + lane[None, :]
        where = (begin, row, position, seen, pages, slots, picks, table, slot, owner, window_scale, entry_scale,
                 page_bytes)  # fmt: skip
        key, first, last = tl.arange(0, KEYS), WINDOW - 1 - position, WINDOW + seen
        if EACH > 1:  # the addresses of a chunk's rows, then of their scales; 0 of those that are not attended
            noted += (row * parts + part).to(tl.int64) * (EACH * 2 * KEYS)
            rows_at, scales_at, lives = _place(*where, PICKED, WINDOW, RING, PER_PAGE, row_bytes, SCALES, KEYS, COUNT)
            every = tl.arange(0, COUNT)
            note, there = noted + every // KEYS * (2 * KEYS) + every % KEYS, every < EACH * KEYS
            tl.store(note, tl.where(lives, rows_at, 0), mask=there)
            tl.store(note + KEYS, tl.where(lives, scales_at, 0), mask=there)
            if PICKED > 0:
                last = tl.sum((lives & (begin * KEYS + every >= WINDOW)).to(tl.int32), 0)
                last += tl.maximum(begin * KEYS, WINDOW)
        queries = [tl.load(own + b * 128, mask=real[:, None], other=0.0) for b in (0, 1, 2, 3)[:BLOCKS]]
        if NORM:
            again = queries
            if EACH > 1:  # rather than kept: four warps have no registers for all of them
                again = [tl.load(own + b * 128, mask=real[:, None], other=0.0, cache_modifier=".ca")
                         for b in (0, 1, 2, 3)[:BLOCKS]]  # fmt: skip
            queries = _normed(queries, again, eps, turn + row * 64, BLOCKS, TARGET)
        queries = [each.to(tl.float16) for each in queries]
        mine: tl.constexpr = BLOCKS // CUT
        acc = [tl.zeros((HEADS, 128), tl.float32)] * mine
        top = tl.full((HEADS,), NOTHING, tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        steps = end - begin
        if TARGET == "interpreter":  # which takes no tensor for a range; chunks past the end change nothing
            steps = min(EACH, COUNT // KEYS)
        if EACH > 1:
            tl.debug_barrier()
        for step in tl.range(0, steps):
            if EACH > 1:
                entry = noted + step * (2 * KEYS) + key
                part_at, scale_at = tl.load(entry), tl.load(entry + KEYS)
                live, scaled = part_at != 0, scale_at != 0
            else:
                part_at, scale_at, live = _place(*where, PICKED, WINDOW, RING, PER_PAGE, row_bytes, SCALES, KEYS, KEYS)
            if EACH == 1 or BLOCKS < 4:  # all that is read is asked for before the first of it is needed
                codes = [_codes(part_at, live, b, BLOCKS) for b in (0, 1, 2, 3)[:BLOCKS]]
                rope, factors = _rope(part_at, live, BLOCKS, TARGET), _scales(scale_at, live, SCALES, BLOCKS, TARGET)
                keys = [_wide(codes[b], factors[b], rope, b == BLOCKS - 1, TARGET) for b in (0, 1, 2, 3)[:BLOCKS]]
            else:  # four warps have registers for two blocks; the next chunk's rows come to the L2 meanwhile
                first_codes, second_codes = _codes(part_at, live, 0, 4), _codes(part_at, live, 1, 4)
                factors = _scales(scale_at, scaled, SCALES, 4, TARGET)
                _fetch(tl.load(noted + tl.minimum(step + 1, steps - 1) * (2 * KEYS) + key), row_bytes, TARGET)
                first_keys, third_codes = _wide(first_codes, factors[0], 0, False, TARGET), _codes(part_at, live, 2, 4)
                second_keys, last_codes = _wide(second_codes, factors[1], 0, False, TARGET), _codes(part_at, live, 3, 4)
                rope, third_keys = _rope(part_at, live, 4, TARGET), _wide(third_codes, factors[2], 0, False, TARGET)
                keys = [first_keys, second_keys, third_keys, _wide(last_codes, factors[3], rope, True, TARGET)]
            s = tl.zeros((HEADS, KEYS), tl.float32)
            for b in tl.static_range(BLOCKS):
                s = formats.dot(queries[b], tl.trans(keys[b]), s, TARGET)
            s *= scale
            at = (begin + step) * KEYS
            if EACH == 1:
                s = tl.where(live[None, :], s, NOTHING)
            elif (at < first) | (at + KEYS > last):  # what is attended lies beside each other, and mostly that is all
                s = tl.where(((at + key >= first) & (at + key < last))[None, :], s, NOTHING)
            own_top = tl.max(s, 1)
            p = tl.exp2(s - tl.maximum(own_top, NOTHING / 2)[:, None])  # 0 where there is nothing at all, too
            most_top = tl.maximum(top, own_top)
            keep, join = tl.exp2(top - most_top), tl.exp2(own_top - most_top)
            total = _fold(total, tl.sum(p, 1), keep, join)
            top = most_top
            p = p.to(tl.float16)
            if CUT == 1 or block == 0:
                acc = _mixed(acc, p, keys, keep, join, 0, EACH == 1, TARGET)
            elif CUT == 2:
                acc = _mixed(acc, p, keys, keep, join, 2, EACH == 1, TARGET)
            elif block == 1:
                acc = _mixed(acc, p, keys, keep, join, 1, EACH == 1, TARGET)
            elif block == 2:
                acc = _mixed(acc, p, keys, keep, join, 2, EACH == 1, TARGET)
            else:
                acc = _mixed(acc, p, keys, keep, join, 3, EACH == 1, TARGET)
        if DONE:
            factor = _finish(top, total, tl.load(sink + head, mask=real, other=0.0) * 1.4426950408889634)[:, None]
            halves: tl.constexpr = 1 if stored.dtype.element_ty == tl.bfloat16 else 2
            column, turned, low = (halves * row * heads + head) * width, turn + row * 64, heads * width
            column += block * (mine * 128)
            for b in tl.static_range(mine - 1):
                _emit(acc[b] * factor, turned, stored, stored_scales, column + b * 128, low, real, False, TARGET)
            out, column = acc[mine - 1] * factor, column + (mine - 1) * 128
            if CUT == 1 or block == CUT - 1:
                _emit(out, turned, stored, stored_scales, column, low, real, True, TARGET)
            else:
                _emit(out, turned, stored, stored_scales, column, low, real, False, TARGET)
        else:
            at = (row * parts + part).to(tl.int64) * heads + head
            tl.store(tops + at * 2, top, mask=real & (head * 0 + block == 0))
            tl.store(tops + at * 2 + 1, total, mask=real & (head * 0 + block == 0))
            place = partial + at[:, None] * width + (block * (mine * 128) + lane)[None, :]
            for b in tl.static_range(mine):
                tl.store(place + b * 128, acc[b], mask=real[:, None])


@triton.jit
def _folded(
    partial, tops, at, stride, there, live, block, COUNT: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Fold COUNT parts from `at` on, `stride` apart, of which `there` are in memory and `live` count.

    Top and total are scalars, so that no value waits for another layout; 18 parts are asked for at a time.
    """
    lane = block * 128 + tl.arange(0, 128)
    total = (at * 0).to(tl.float32)
    top, own = total + NOTHING, tl.zeros((128,), tl.float32)
    for base in tl.static_range(0, COUNT, 18):
        places = [
            at + tl.minimum(base + i, there - 1) * stride
            for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17)[: COUNT - base]
        ]
        found = [
            (tl.load(tops + place * 2), tl.load(tops + place * 2 + 1), tl.load(partial + place * (BLOCKS * 128) + lane))
            for place in places
        ]
        for i in tl.static_range(min(COUNT - base, 18)):
            counts = base + i < live
            part_top = tl.where(counts, found[i][0], NOTHING)
            most_top = tl.maximum(top, part_top)
            keep, join = tl.exp2(top - most_top), tl.exp2(part_top - most_top)
            total = _fold(total, tl.where(counts, found[i][1], 0.0), keep, join)
            values = tl.where(counts, found[i][2], 0.0)
            own = _fold(own, values, tl.broadcast_to(keep, own.shape), tl.broadcast_to(join, own.shape))
            top = most_top
    return top, total, own


@triton.jit(do_not_specialize=["parts", "most"])
def _combine_kernel(
    partial, tops, positions, sink, turn, stored, stored_scales, arrived, parts, most,
    RATIO: tl.constexpr, PICKED: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr,
    EACH: tl.constexpr, SECTIONS: tl.constexpr, RUN: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Fold the parts of 128 columns of one head, EACH chunks a part, RUN parts a program; finish.

    SECTIONS > 1: a program folds one section, and the last to arrive folds what they leave.
    """
    formats.let_next_start(TARGET)
    block, head, row, section = tl.program_id(0), tl.program_id(1), tl.program_id(2) // SECTIONS, 0
    heads, rows = tl.num_programs(1), tl.num_programs(2) // SECTIONS
    if SECTIONS > 1:
        section = tl.program_id(2) % SECTIONS
    position = tl.load(positions + row)
    formats.wait_for_inputs(TARGET)
    seen = _seen(tops, row, position, most, RATIO, PICKED)
    count = tl.where(position < 0, 0, ((WINDOW + seen + KEYS - 1) // KEYS + EACH - 1) // EACH)
    first = section * RUN
    at = (row * parts + first).to(tl.int64) * heads + head
    top, total, own = _folded(partial, tops, at, heads, parts - first, count - first, block, RUN, BLOCKS)
    last = True
    if SECTIONS > 1:
        at = (rows * parts + row * SECTIONS).to(tl.int64) * heads + head
        here = at + section * heads
        # All four blocks leave the same top and total.
        tl.store(tops + here * 2, top)
        tl.store(tops + here * 2 + 1, total)
        tl.store(partial + here * (BLOCKS * 128) + block * 128 + tl.arange(0, 128), own)
        counter = arrived + (row * heads + head) * BLOCKS + block
        tl.debug_barrier()
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SECTIONS - 1
        tl.debug_barrier()
        if last:
            tl.store(counter, 0)
            every = section * 0 + SECTIONS
            top, total, own = _folded(partial, tops, at, heads, every, every, block, SECTIONS, BLOCKS)
    if last:
        factor = _finish(top, total, tl.load(sink + head) * 1.4426950408889634)
        halves: tl.constexpr = 1 if stored.dtype.element_ty == tl.bfloat16 else 2
        column = (halves * row * heads + head) * (BLOCKS * 128) + block * 128 + tl.arange(0, 1)
        low, out = heads * (BLOCKS * 128), (own * factor)[None, :]
        if block == BLOCKS - 1:
            _emit(out, turn + row * 64, stored, stored_scales, column, low, column >= 0, True, TARGET)
        else:
            _emit(out, turn + row * 64, stored, stored_scales, column, low, column >= 0, False, TARGET)


def forward(
    q: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, slots: Tensor, sink: Tensor,
    picks: Tensor | None, turn: Tensor, most: int, whole: bool, arrived: Tensor | None, norm_eps: float | None = None,
) -> Tensor | Halves:  # fmt: skip
    """Return what `kernels.decode_attention.attend` does."""
    (tokens, heads, width), place = q.shape, layout.layers[layer]
    new, made_for, window = q.new_empty, formats.target(), place.window
    main = place.main or Section(0, 1, 0, (0, 0))
    picked = 0 if picks is None or not place.ratio else picks.shape[1]
    most = 0 if not place.ratio else min(most, picked) if picked else most
    chunks = triton.cdiv(layout.config.sliding_window + most, KEYS)
    tall = 64 if heads >= 64 else max(16, triton.next_power_of_2(heads))
    tiles = triton.cdiv(heads, tall)
    many = tokens * tiles * chunks > PROGRAMS or (whole and chunks <= FEW and tokens * tiles > FEW_ROWS)
    each = SECTION if many else 1
    parts = triton.cdiv(chunks, each)
    cut = width // 128 if each == 1 < parts and tokens * tiles * chunks * (width // 128) <= RESIDENT else 1
    cut = HALVES if many and width == 512 else cut
    stored = new((tokens, heads * width)) if whole else new((2 * tokens, heads * width), dtype=torch.uint8)
    scales = new((2 * tokens, heads * width // 128), dtype=torch.uint8)
    sections = triton.cdiv(parts, SECTION) if each == 1 else 1
    size = tokens * (parts + (sections if sections > 1 else 0)) * heads if parts > 1 else 1
    partial, tops = new(size * width, dtype=torch.float32), new(size * 2, dtype=torch.float32)
    noted = new(tokens * parts * each * 2 * KEYS if many else 1, dtype=torch.int64)
    constants = {"RATIO": place.ratio, "PICKED": picked, "WINDOW": layout.config.sliding_window,
                 "BLOCKS": width // 128, "KEYS": KEYS, "EACH": each, "TARGET": made_for}  # fmt: skip
    _attend_kernel[(parts, tiles * cut, tokens)](
        q, pages.view(-1)[main.offset :], slots.view(-1)[window.offset :], rows.table, q if picks is None else picks,
        rows.positions, rows.owner, rows.slots, sink, turn, stored, scales, partial, tops, noted,
        heads, parts, most, rows.table.shape[1], q.stride(0) // 128, norm_eps or 0.0, layout.slot_bytes,
        layout.page_bytes, window.part(1) - window.offset, main.part(1) - main.offset, width**-0.5 * math.log2(math.e),
        RING=window.rows, PER_PAGE=main.rows, SCALES=window.parts[1], HEADS=tall, DONE=parts == 1, CUT=cut,
        NORM=norm_eps is not None, COUNT=triton.next_power_of_2(min(each, chunks) * KEYS), **constants,
        **formats.launch(made_for, num_warps=4 if many or width == 128 else 8, num_stages=1, enable_fp_fusion=False),
    )  # fmt: skip
    if parts > 1:
        if arrived is None:
            arrived = rows.positions if sections == 1 else rows.positions.new_zeros(tokens * heads * width // 128)
        options = formats.launch(made_for, num_warps=1, enable_fp_fusion=False)
        if sections > 1 and made_for == formats.PTX:  # an early start crams all onto the first that are free
            options["launch_pdl"] = False
        _combine_kernel[(width // 128, heads, tokens * sections)](
            partial, tops, rows.positions, sink, turn, stored, scales, arrived, parts, most,
            SECTIONS=sections, RUN=min(parts, SECTION) if each == 1 else parts, **constants, **options,
        )  # fmt: skip
    return stored if whole else Halves(stored, scales)
