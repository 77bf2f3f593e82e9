"""Sparse attention of a prompt's queries for Hopper: four warps gather tiles of 64 keys, eight attend them.

Each group of four warps scores 32 of the 64 keys and holds half of the 512 value columns, so no product is made twice;
weights cross over in shared memory. A program goes from query to query, its gathers ahead of its products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # its older name
TILE = gl.constexpr(64)  # keys, and heads of a program
STAGES = gl.constexpr(2)
GATHER_REGISTERS = gl.constexpr(72)
LOG2_E = gl.constexpr(1.4426950408889634)
_PAIR = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")


@gluon.jit
def arrived(full, turn, STAGES: gl.constexpr, pred=True):
    """Wait for what other warps copy, on behalf of the matrix unit too, which reads by another proxy."""
    mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1, pred=pred)
    fence_async_shared()


@gluon.jit
def _gather(rows, keys, turn, k_smem, full, empty):
    """Start the copy of one tile of rows (64, 1) and columns."""
    slot = turn % STAGES
    mbarrier.wait(empty.index(slot), (turn // STAGES & 1) ^ 1)
    async_load(k_smem.index(slot), keys + rows)
    async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
    return turn + 1


@gluon.jit
def _produce(
    q, keys, positions, owners, starts, windows, base, seen, entries, picks, items, shared,
    HEADS: gl.constexpr, WIDTH: gl.constexpr, SIZE: gl.constexpr, FAR: gl.constexpr, PICKS: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, _, q_full, q_empty, full, empty = shared
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lane = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    row = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        token = item // (HEADS // TILE)
        position, owner = gl.load(positions + token), gl.load(owners + token)
        own = gl.load(windows + owner) + SIZE - 1 + position - gl.load(starts + owner)
        near = gl.minimum(position + 1, SIZE)
        for t in range(0, SIZE // TILE):
            at = own - gl.minimum(SIZE - 1 - t * TILE - row, near - 1)
            turn = _gather(at.to(gl.int64)[:, None] * WIDTH + lane, keys, turn, k_smem, full, empty)
            if t == 0:
                mbarrier.wait(q_empty, (item // gl.num_programs(0) & 1) ^ 1)
                place = item.to(gl.int64) * (TILE * WIDTH) + row[:, None] * WIDTH + lane
                async_load(q_smem, q + place)
                async_copy.mbarrier_arrive(q_full, increment_count=False)
        if FAR:
            first, count = entries + gl.load(base + owner), gl.load(seen + token)
            if PICKS > 0:
                count = gl.minimum(count, PICKS)
            for t in range(0, (count + TILE - 1) // TILE):
                entry = gl.minimum(t * TILE + row, count - 1)
                if PICKS > 0:
                    entry = gl.load(picks + token * PICKS + entry)
                turn = _gather((first + entry).to(gl.int64)[:, None] * WIDTH + lane, keys, turn, k_smem, full, empty)


@gluon.jit
def _query(
    item, positions, seen, sink, ROWS: gl.constexpr,
    HEADS: gl.constexpr, SIZE: gl.constexpr, FAR: gl.constexpr, PICKS: gl.constexpr,
):  # fmt: skip
    """Keys of the window that are there, entries, and the sinks of the heads."""
    token = item // (HEADS // TILE)
    near = gl.minimum(gl.load(positions + token) + 1, SIZE)
    count = 0
    if FAR:
        count = gl.load(seen + token)
        if PICKS > 0:
            count = gl.minimum(count, PICKS)
    return near, count, gl.load(sink + item % (HEADS // TILE) * TILE + gl.arange(0, TILE, ROWS)) * LOG2_E


@gluon.jit
def _consume(
    positions, seen, sink, angles, out, scale, items, shared,
    HEADS: gl.constexpr, WIDTH: gl.constexpr, ROPE: gl.constexpr, SIZE: gl.constexpr, FAR: gl.constexpr,
    PICKS: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, p_smem, q_full, q_empty, full, empty = shared
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    heads: gl.constexpr = gl.SliceLayout(1, scores)
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    column = gl.arange(0, TILE, gl.SliceLayout(0, scores))
    place = gl.arange(0, TILE, gl.SliceLayout(1, stored))[:, None] * WIDTH
    place += gl.arange(0, WIDTH, gl.SliceLayout(0, stored))[None, :]
    turn = 0
    near, count, none = _query(gl.program_id(0), positions, seen, sink, heads, HEADS, SIZE, FAR, PICKS)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        top = none
        sums = gl.zeros((TILE, TILE), gl.float32, scores)
        mixed = gl.zeros((TILE, WIDTH), gl.float32, values)
        mbarrier.wait(q_full, item // gl.num_programs(0) & 1)
        tiles = (SIZE + count + TILE - 1) // TILE
        for t in range(0, tiles):
            slot = turn % STAGES
            arrived(full, turn, STAGES)
            key, zero = k_smem.index(slot), gl.zeros((TILE, TILE), gl.float32, scores)
            logits = warpgroup_mma(q_smem, key.permute((1, 0)), zero, use_acc=False, is_async=True)
            logits = warpgroup_mma_wait(0, deps=[logits])
            mbarrier.arrive(q_empty, pred=t + 1 == tiles)
            at = t * TILE + column
            live = (at >= SIZE - near) & (at < SIZE + count)
            logits = gl.where(live[None, :], logits * scale, -float("inf"))
            higher = gl.maximum(top, gl.max(logits, 1))
            weight, keep = gl.exp2(logits - higher[:, None]), gl.exp2(top - higher)
            top, sums = higher, sums * keep[:, None] + weight
            p_smem.store(weight.to(gl.bfloat16))
            fence_async_shared()
            mixed = mixed * gl.convert_layout(keep, gl.SliceLayout(1, values))[:, None]
            mixed = warpgroup_mma_wait(0, deps=[warpgroup_mma(p_smem, key, mixed, is_async=True)])
            mbarrier.arrive(empty.index(slot), pred=t + 1 < tiles)
            turn += 1
        total, token = gl.sum(sums, 1) + gl.exp2(none - top), item // (HEADS // TILE)
        after = gl.minimum(item + gl.num_programs(0), items - 1)
        near, count, none = _query(after, positions, seen, sink, heads, HEADS, SIZE, FAR, PICKS)
        mixed = mixed * gl.convert_layout(1.0 / total, gl.SliceLayout(1, values))[:, None]
        mixed = gl.inline_asm_elementwise(_PAIR, "=r,r,r", [mixed], dtype=gl.bfloat16, is_pure=True, pack=2)
        even, odd = gl.split(mixed.to(gl.float32).reshape(TILE, WIDTH // 2, 2))
        half: gl.constexpr = even.type.layout
        pair = gl.arange(0, WIDTH // 2, gl.SliceLayout(0, half)) - (WIDTH - ROPE) // 2
        cos = gl.load(angles + token * ROPE + pair, mask=pair >= 0, other=1.0)[None, :]
        sin = gl.load(angles + token * ROPE + ROPE // 2 + pair, mask=pair >= 0, other=0.0)[None, :]
        mixed = gl.join(even * cos + odd * sin, odd * cos - even * sin).reshape(TILE, WIDTH)
        mixed = gl.inline_asm_elementwise(_PAIR, "=r,r,r", [mixed], dtype=gl.bfloat16, is_pure=True, pack=2)
        last = (turn - 1) % STAGES  # its keys are done with: the way out leads through their place
        k_smem.index(last).store(gl.convert_layout(mixed, values, assert_trivial=True))
        gl.store(out + item.to(gl.int64) * (TILE * WIDTH) + place, k_smem.index(last).load(stored))
        mbarrier.arrive(empty.index(last))


@gluon.jit
def _attend_kernel(
    q, keys, positions, owners, starts, windows, base, seen, entries, picks, sink, turn, out, scale, items,
    HEADS: gl.constexpr, WIDTH: gl.constexpr, ROPE: gl.constexpr, SIZE: gl.constexpr, FAR: gl.constexpr,
    PICKS: gl.constexpr,
):  # fmt: skip
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [TILE, WIDTH], swizzled)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, WIDTH], swizzled)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [TILE, TILE], swizzled)
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(q_full, count=128)
    mbarrier.init(q_empty, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=1)
    shared = (q_smem, k_smem, p_smem, q_full, q_empty, full, empty)
    gl.warp_specialize(
        [
            (_consume, (positions, seen, sink, turn, out, scale, items, shared, HEADS, WIDTH, ROPE, SIZE, FAR, PICKS)),
            (_produce, (q, keys, positions, owners, starts, windows, base, seen, entries, picks, items, shared, HEADS,
                        WIDTH, SIZE, FAR, PICKS)),
        ],
        [4], [GATHER_REGISTERS],
    )  # fmt: skip


def attend(q: Tensor, *inputs: Tensor | int | float, **constants: int | bool) -> None:
    """Launch for the operands of the Triton kernel of this name; 64 heads or a multiple, 512 columns."""
    items = q.shape[0] * q.shape[1] // TILE.value
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    _attend_kernel[(min(items, programs),)](q, *inputs, items, num_warps=8, **constants)
