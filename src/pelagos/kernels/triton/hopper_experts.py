"""The prompt experts' product for Hopper: four warps copy, two groups of four each expand and multiply 64 weight rows.

A group expands the next 128 columns while the matrix unit has its last ones, and no group waits for the other. Numbers
and order of sums are those of the Triton kernel, so are the bits. A program goes from tile to tile of 128 or 64 picks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, warpgroup_mma, warpgroup_mma_wait

from pelagos.kernels.triton.hopper_attention import arrived, async_load

TILE = 128  # picks of a program; at most 64 take half of the work
STAGES = gl.constexpr(8)
COPY_REGISTERS, EXPAND_REGISTERS = gl.constexpr(72), gl.constexpr(216)

# Four bytes of E2M1 pairs to E4M3 magnitudes, even columns in the first of four words, odd ones in the fifth, and the
# bytes for their signs: a code's low three bits choose from eight bytes of a table.
_EXPAND = gl.constexpr(
    """{
    .reg .b32 s, t, e, o;
    and.b32 s, $12, 0x77777777;
    prmt.b32 e, $13, $17, s;
    shr.u32 t, s, 16;
    prmt.b32 o, $13, $17, t;
    prmt.b32 $0, e, o, 0x6420;
    prmt.b32 $4, e, o, 0x7531;
    mov.b32 $8, $12;
    }"""
)
_WORDS = gl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r")
# Signs join after the wait: what a product under way reads may not be written meanwhile.
_EVEN = gl.constexpr("{.reg .b32 s; shl.b32 s, $5, 4; lop3.b32 $0, s, 0x80808080, $1, 0xEA;}")
_ODD = gl.constexpr("lop3.b32 $0, $5, 0x80808080, $1, 0xEA;")


@gluon.jit
def _place(column):
    """Which pick is column `column` of a product: a lane finds four of its scales beside each other."""
    return column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2


@gluon.jit
def _expanded(w_smem, s_smem, base, PART: gl.constexpr):
    """Magnitudes and signs of 64 rows' 64 bytes: tables of the codes of 0, 0.5, 1, 1.5 and of 2, 3, 4, 6, scaled."""
    groups: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [8, 0, 0]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]], [[16, 0, 0], [32, 0, 0]], [], [64, 4, 16],
    )  # fmt: skip
    scale = s_smem.slice(PART * 64, 64).load(gl.SliceLayout(2, groups)).to(gl.int32)
    r = gl.maximum(scale - base, -8)
    low = gl.where(r < -5, 0x03020100 << gl.minimum(r + 8, 2), 0x3C383000 + r * 0x08080800)
    high = gl.where(r < -7, 0x0C080604, 0x4C484440 + r * 0x08080808)
    low = low.expand_dims(2).broadcast_to(64, 4, 16).reshape(64, 64)
    high = high.expand_dims(2).broadcast_to(64, 4, 16).reshape(64, 64)
    byte = w_smem.slice(PART * 64, 64).load(low.type.layout)
    return gl.inline_asm_elementwise(
        _EXPAND, _WORDS, [byte, low, high], dtype=(gl.int32, gl.int32, gl.int32), is_pure=True, pack=4
    )


@gluon.jit
def _operand(even, odd, sign, LAYOUT: gl.constexpr):
    """The matrix operand (64, 128), no value of which changes its lane."""
    words: gl.constexpr = "=r,r,r,r,r,r,r,r,r"
    even = gl.inline_asm_elementwise(_EVEN, words, [even, sign], dtype=gl.float8e4nv, is_pure=True, pack=4)
    odd = gl.inline_asm_elementwise(_ODD, words, [odd, sign], dtype=gl.float8e4nv, is_pure=True, pack=4)
    both = gl.join(even, odd).reshape(64, 4, 4, 4, 2).permute(0, 4, 2, 1, 3).reshape(64, 128)
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def _factor(f_smem, BEGIN: gl.constexpr, ACC: gl.constexpr):
    """Scales of 64 picks, a product's columns."""
    own: gl.constexpr = gl.DistributedLinearLayout(
        [[1], [2], [16], [32]], [[4], [8], [0], [0], [0]], [[0], [0]], [], [64]
    )
    factor = f_smem.slice(BEGIN, 64).load(own).reshape(4, 4, 2, 2).permute(0, 2, 1, 3).reshape(64)
    return gl.convert_layout(factor, gl.SliceLayout(0, ACC), assert_trivial=True).expand_dims(0)


@gluon.jit
def _store(out, total, first, end, row, OUTPUTS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    at = first + _place(gl.arange(0, 64, gl.SliceLayout(0, layout)))
    to = out + at.to(gl.int64)[None, :] * OUTPUTS + (row + gl.arange(0, 64, gl.SliceLayout(1, layout)))[:, None]
    gl.store(to, gl.convert_layout(total.to(gl.bfloat16), layout), mask=(at < end)[None, :])


@gluon.jit
def _multiply(
    out, shared, turn, low, first, end, row,
    PART: gl.constexpr, BLOCKS: gl.constexpr, OUTPUTS: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    v_smem, w_smem, s_smem, f_smem, full, empty = shared
    acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    tall: gl.constexpr = gl.DotOperandLayout(0, acc, 4)
    zero = gl.zeros((64, 64), gl.float32, acc)
    total, more = zero, zero
    arrived(full, turn, STAGES)
    even, odd, sign = _expanded(w_smem.index(turn % STAGES), s_smem.index(turn % STAGES), low, PART)
    for k in range(0, BLOCKS):
        here, there = turn % STAGES, (turn + 1) % STAGES
        turn += 1
        values = v_smem.index(here)
        a = _operand(even, odd, sign, tall)
        product = warpgroup_mma(a, values.slice(0, 64).permute((1, 0)), zero, use_acc=False, is_async=True)
        factor = _factor(f_smem.index(here), 0, acc)
        if TILE == 128:
            other = warpgroup_mma(a, values.slice(64, 64).permute((1, 0)), zero, use_acc=False, is_async=True)
            other_factor = _factor(f_smem.index(here), 64, acc)
        arrived(full, turn, STAGES, k + 1 < BLOCKS)
        even, odd, sign = _expanded(w_smem.index(there), s_smem.index(there), low, PART)
        if TILE == 128:
            total += warpgroup_mma_wait(1, deps=[product]) * factor
            other, total = warpgroup_mma_wait(0, deps=[other, total])
            mbarrier.arrive(empty.index(here))
            more += other * other_factor
        else:
            product = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(empty.index(here))
            total += product * factor
    power = (low << 23).to(gl.float32, bitcast=True)
    _store(out, total * power, first, end, row + PART * 64, OUTPUTS)
    if TILE == 128:
        _store(out, more * power, first + 64, end, row + PART * 64, OUTPUTS)


@gluon.jit
def _consume(
    tile_expert, tile_first, tile_end, base, out, items, shared,
    PART: gl.constexpr, DEPTH: gl.constexpr, OUTPUTS: gl.constexpr,
):  # fmt: skip
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, block = item // (OUTPUTS // 128), item % (OUTPUTS // 128)
        first, end = gl.load(tile_first + tile), gl.load(tile_end + tile)
        if first < end:
            low = gl.load(base + gl.load(tile_expert + tile) * (OUTPUTS // 128) + block).to(gl.int32)
            if end - first > 64:
                _multiply(out, shared, turn, low, first, end, block * 128, PART, DEPTH // 128, OUTPUTS, 128)
            else:
                _multiply(out, shared, turn, low, first, end, block * 128, PART, DEPTH // 128, OUTPUTS, 64)
            turn += DEPTH // 128


@gluon.jit
def _produce(
    x, xs, order, tile_expert, tile_first, tile_end, w, scale, homes, items, room, shared,
    SHARED: gl.constexpr, DEPTH: gl.constexpr, OUTPUTS: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    v_smem, w_smem, s_smem, f_smem, full, empty = shared
    lines: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    halves: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    words: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    turn = 0
    column, byte = _place(gl.arange(0, 128, gl.SliceLayout(1, lines))), gl.arange(0, 128, gl.SliceLayout(0, lines))
    row = gl.arange(0, 128, gl.SliceLayout(1, halves))[:, None] * (DEPTH // 2)
    row += gl.arange(0, 64, gl.SliceLayout(0, halves))[None, :]
    group = gl.arange(0, 128, gl.SliceLayout(1, words))[:, None] * (DEPTH // 32)
    group += gl.arange(0, 4, gl.SliceLayout(0, words))[None, :]
    pick = gl.arange(0, 128, gl.BlockedLayout([4], [32], [4], [0]))
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, block = item // (OUTPUTS // 128), item % (OUTPUTS // 128)
        first, end = gl.load(tile_first + tile), gl.load(tile_end + tile)
        if first < end:
            own, row_at = gl.load(tile_expert + tile).to(gl.int64), block * 128
            place = first + column
            if SHARED > 0:
                source = gl.load(order + place, mask=place < end, other=0) // SHARED
            else:
                source = gl.where(place < end, place, first)
            live = (place < end)[:, None] & (byte >= 0)[None, :]
            values = x + source.to(gl.int64)[:, None] * DEPTH + byte[None, :]
            factors = xs + gl.multiple_of(first, 8) + pick
            if PLACED:  # bytes from the first block, the same for codes and scales
                home = gl.multiple_of(gl.load(homes + own), 256)
                weight, group_scale = w + home, scale + home
            else:
                weight, group_scale = w + own * OUTPUTS * (DEPTH // 2), scale + own * OUTPUTS * (DEPTH // 32)
            weight, group_scale = weight + row_at * (DEPTH // 2) + row, group_scale + row_at * (DEPTH // 32) + group
            for _ in range(0, DEPTH // 128):
                slot = turn % STAGES
                mbarrier.wait(empty.index(slot), (turn // STAGES & 1) ^ 1)
                async_load(v_smem.index(slot), values, mask=live)
                async_load(w_smem.index(slot), weight)
                async_load(s_smem.index(slot), group_scale)
                async_load(f_smem.index(slot), factors)
                async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
                values, weight, group_scale, factors = values + 128, weight + 64, group_scale + 4, factors + room
                turn += 1


@gluon.jit
def _product_kernel(
    x, xs, order, tile_expert, tile_first, tile_end, w, scale, base, homes, out, room, items,
    SHARED: gl.constexpr, DEPTH: gl.constexpr, OUTPUTS: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    v_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], gl.NVMMASharedLayout(128, 8))
    w_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, 128, 64], plain)
    s_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, 128, 4], plain)
    f_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=2)
    shared = (v_smem, w_smem, s_smem, f_smem, full, empty)
    gl.warp_specialize(
        [
            (_consume, (tile_expert, tile_first, tile_end, base, out, items, shared, 0, DEPTH, OUTPUTS)),
            (_consume, (tile_expert, tile_first, tile_end, base, out, items, shared, 1, DEPTH, OUTPUTS)),
            (_produce, (x, xs, order, tile_expert, tile_first, tile_end, w, scale, homes, items, room, shared, SHARED,
                        DEPTH, OUTPUTS, PLACED)),
        ],
        [4, 4], [EXPAND_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def product(tiles: int, x: Tensor, *inputs: Tensor | int, **sizes: int) -> None:
    """Launch for the operands and sizes of the Triton kernel of this name, over tiles of TILE picks."""
    items = tiles * sizes["OUTPUTS"] // 128
    programs = min(items, torch.cuda.get_device_properties(x.device).multi_processor_count)
    _product_kernel[(programs,)](x.view(torch.float8_e4m3fn), *inputs, items, num_warps=4, **sizes)
