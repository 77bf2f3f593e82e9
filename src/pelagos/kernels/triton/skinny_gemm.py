"""Products of at most 64 rows: the weights, as the tall operand, are streamed once through the matrix unit.

A program takes 64 or 128 outputs and a fixed part of k. Every 128 columns of FP8 operands end a scale: their sum leaves
the matrix unit and joins a float32 total. Parts of k are left to the reader, or the last program to arrive
adds them in order, which takes 2 us longer. The cut of k depends on the weight's shape alone and the tokens are columns
of the product, so a row's bits are its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.batch_rows import Mixing
from pelagos.kernels.triton import formats
from pelagos.kernels.triton.cache_write import keep, operands
from pelagos.kernels.triton.query import fp4, rotated, rotation
from pelagos.kernels.triton.site import mixing, owed

BLOCK = 128
STAGES = 3  # of the pipeline: residency counts for more than a fourth
FAT = 64  # bfloat16 rows from which a program that quantises has 128 outputs, for rows are most of what it reads
TILES = 256  # programs that a weight should at least be cut into
MERGED_TALL = 64  # outputs a program of a merged product
HUGE = 1 << 15  # outputs of a vocabulary


def as_operand(codes: Tensor) -> Tensor:
    """Return E4M3 bytes as the kernels load them: typed where the matrix unit takes them, which spares registers."""
    return codes.view(torch.float8_e4m3fn) if formats.target() == formats.PTX and codes.dtype == torch.uint8 else codes


@triton.jit
def operand(value):
    """E4M3 as a matrix operand: itself, or the bfloat16 values of its bytes where the unit does not take it."""
    if value.dtype == tl.uint8:
        return formats.e4m3_to_float(value).to(tl.bfloat16)
    else:  # one branch is compiled, and each has a type of its own
        return value


@triton.jit
def _factor(ws, xs, k, live, PART: tl.constexpr):
    """What block k of the sum is to be multiplied by, a number a row of x."""
    inside = k < PART // 128
    byte = tl.load(ws + k, mask=inside, other=127)
    return formats.power_of_two(byte) * formats.power_of_two(tl.load(xs + k, mask=live & inside, other=127))


@triton.jit
def fp8_tile(
    codes, scales, weight, weight_scales, first, begin, row, live, stride,
    DEPTH: tl.constexpr, PART: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """(TALL, WIDE) float32: weight rows from `first` times rows of x, both FP8, over PART columns from `begin`."""
    lane = tl.arange(0, 128)
    output = first + tl.arange(0, TALL)
    blocks: tl.constexpr = DEPTH // 128
    w = weight + output.to(tl.int64)[:, None] * DEPTH + begin + lane[None, :]
    x = codes + (row * stride)[:, None] + begin + lane[None, :]
    ws = weight_scales + first // 128 * blocks + begin // 128
    xs = scales + row * (stride // 128) + begin // 128
    total = tl.zeros((TALL, WIDE), tl.float32)
    # One step ahead: bytes are too narrow for the asynchronous copies that bring the rest.
    factor = _factor(ws, xs, 0, live, PART)
    for k in tl.range(0, PART // 128):
        ahead = _factor(ws, xs, k + 1, live, PART)
        tall = operand(tl.load(w + k * 128))
        wide = operand(tl.load(x + k * 128, mask=live[:, None], other=0.0))
        part = formats.dot(tall, tl.trans(wide), tl.zeros((TALL, WIDE), tl.float32), TARGET)
        total = tl.fma(part, tl.broadcast_to(factor[None, :], (TALL, WIDE)), total)  # whatever a kernel allows to fuse
        factor = ahead
    return total


@triton.jit
def bf16_tile(
    x, weight, first, begin, row, live, DEPTH: tl.constexpr, PART: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """`fp8_tile` of bfloat16 weights and rows."""
    lane = tl.arange(0, 128)
    w = weight + (first + tl.arange(0, TALL)).to(tl.int64)[:, None] * DEPTH + begin + lane[None, :]
    source = x + (row * DEPTH)[:, None] + begin + lane[None, :]
    total = tl.zeros((TALL, WIDE), tl.float32)
    for k in tl.range(0, PART // 128):
        tall = tl.load(w + k * 128)
        wide = tl.load(source + k * 128, mask=live[:, None], other=0.0)
        total = formats.dot(tall, tl.trans(wide), total, TARGET)
    return total


@triton.jit
def store_parts(total, out, partial, counter, place, live, size, part, PARTS: tl.constexpr):
    """Store a tile of sums; of parts of k, the last to arrive adds all in order."""
    if PARTS == 1:
        tl.store(out + place, total.to(out.dtype.element_ty), mask=live)
    else:
        tl.store(partial + part * size + place, total, mask=live)
        tl.debug_barrier()
        before = tl.atomic_add(counter, 1, sem="acq_rel")
        if before == PARTS - 1:
            tl.debug_barrier()
            total = tl.load(partial + place, mask=live, other=0.0)
            for other in tl.static_range(1, PARTS):
                total += tl.load(partial + other * size + place, mask=live, other=0.0)
            tl.store(out + place, total.to(out.dtype.element_ty), mask=live)
            tl.store(counter, 0)


@triton.jit
def _quantise_parts(
    total, out, out_scales, partial, counter, place, first, rows, live, width, size, part,
    PARTS: tl.constexpr, HALVES: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`store_parts` for the next product: whoever comes last of a block of 128 outputs stores its codes and scales.

    HALVES rows of x add up to one.
    """
    tl.store(partial + part * size + place, total, mask=live[None, :])
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == PARTS * (128 // TALL) - 1:
        tl.debug_barrier()
        # A few tokens at a time: all together would cost the products' programs registers.
        few: tl.constexpr = WIDE // HALVES if WIDE // HALVES < 16 else 16
        for turn in range(WIDE // HALVES // few):
            token = turn * few + tl.arange(0, few)
            own = token < rows // HALVES
            block = token[None, :] * width + (first // 128 * 128 + tl.arange(0, 128))[:, None]
            upper = partial + block + token[None, :] * ((HALVES - 1) * width)
            whole = tl.zeros((128, few), tl.float32)
            for other in tl.static_range(HALVES * PARTS):
                whole += tl.load(upper + other % PARTS * size + other // PARTS * width, mask=own[None, :], other=0.0)
            wide = whole.to(tl.bfloat16).to(tl.float32)
            exponent = formats.fp8_scale_exponent(tl.max(tl.abs(wide), 0))
            tl.store(out + block, formats.e4m3_block(wide, exponent[None, :]), mask=own[None, :])
            tl.store(out_scales + token * (width // 128) + first // 128, exponent.to(tl.uint8), mask=own)
        tl.store(counter, 0)


@triton.jit
def _plain_kernel(
    codes, scales, weight, weight_scales, out, out_scales, partial, arrived, rows, outputs, stride,
    DEPTH: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, QUANTISE: tl.constexpr,
    LEFT: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """FP8 weights; x of FP8 codes with scales, or of bfloat16 (then `scales` is not read).

    QUANTISE: codes come out, FP8 rows being halves. LEFT: parts do.
    """
    tile, part, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, WIDE)
    live = row < rows
    first = group * outputs + tile * TALL
    formats.wait_for_inputs(TARGET)
    halves: tl.constexpr = 1 if codes.dtype.element_ty == tl.bfloat16 else 2
    if halves == 1:
        total = _unquantised_tile(codes + group * DEPTH, weight, weight_scales, first, part * PART, row, live, stride,
                                  DEPTH, PART, TALL, WIDE, TARGET)  # fmt: skip
    else:
        total = fp8_tile(
            codes + group * DEPTH, scales + group * (DEPTH // 128), weight, weight_scales, first, part * PART, row,
            live, stride, DEPTH, PART, TALL, WIDE, TARGET,
        )  # fmt: skip
    formats.let_next_start(TARGET)
    width = tl.num_programs(2) * outputs
    place = row[None, :] * width + (first + tl.arange(0, TALL))[:, None]
    size = rows * width
    if QUANTISE:
        _quantise_parts(total, out, out_scales, partial, arrived + first // 128, place, first, rows, live, width, size,
                        part, PARTS, halves, TALL, WIDE)  # fmt: skip
    elif LEFT:
        tl.store(partial + part * size + place, total, mask=live[None, :])
    else:
        counter = arrived + group * tl.num_programs(0) + tile
        store_parts(total, out, partial, counter, place, live[None, :], size, part, PARTS)


@triton.jit
def _unquantised_tile(
    x, weight, weight_scales, first, begin, row, live, stride, DEPTH: tl.constexpr, PART: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """`fp8_tile` with bfloat16 rows: weights become bfloat16 with their scale, which loses nothing."""
    lane = tl.arange(0, 128)
    w = weight + (first + tl.arange(0, TALL)).to(tl.int64)[:, None] * DEPTH + begin + lane[None, :]
    source = x + (row * stride)[:, None] + begin + lane[None, :]
    ws = weight_scales + first // 128 * (DEPTH // 128) + begin // 128
    total = tl.zeros((TALL, WIDE), tl.float32)
    byte = tl.load(ws)
    for k in tl.range(0, PART // 128):
        ahead = tl.load(ws + k + 1, mask=k + 1 < PART // 128, other=127)
        tall = formats.e4m3_times(tl.load(w + k * 128), byte, TARGET)
        wide = tl.load(source + k * 128, mask=live[:, None], other=0.0)
        total = formats.settled(formats.dot(tall, tl.trans(wide), total, TARGET), TARGET)
        byte = ahead
    return total


@triton.jit
def _index_queries(
    total, index_q, turn, token, live, head, heads, factor,
    INDEX: tl.constexpr, ROPE: tl.constexpr, ROUNDS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Store what an index head (INDEX, T) becomes: rope, Hadamard rotation and FP4 on a bfloat16 carrier."""
    rows: tl.constexpr = total.shape[1]
    half: tl.constexpr = INDEX // 2
    x = formats.rounded(tl.trans(total), TARGET)
    pair = tl.arange(0, half) - (half - ROPE // 2)
    place = turn + token[:, None] * ROPE + pair[None, :]
    turned = live[:, None] & (pair >= 0)[None, :]
    cos, sin = tl.load(place, mask=turned, other=1.0), tl.load(place + ROPE // 2, mask=turned, other=0.0)
    a, b = tl.split(x.reshape(rows, half, 2))
    x = formats.rounded(tl.join(a * cos - b * sin, b * cos + a * sin).reshape(rows, INDEX), TARGET)
    _, value, byte = fp4(rotated(x, ROUNDS, factor, TARGET).reshape(rows * (INDEX // 32), 32))
    value = value * (byte << 23).to(tl.float32, bitcast=True)[:, None]
    place = index_q + (token * heads + head)[:, None] * INDEX + tl.arange(0, INDEX)[None, :]
    tl.store(place, value.reshape(rows, INDEX).to(tl.bfloat16), mask=live[:, None])


@triton.jit
def _query_kernel(
    codes, scales, weight, weight_scales, out, index_q, turn, rows, plain, heads, factor,
    DEPTH: tl.constexpr, INDEX: tl.constexpr, ROPE: tl.constexpr, ROUNDS: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """`plain` outputs as they are, `heads` index heads of TALL = INDEX behind, whose tiles go first."""
    tile = tl.program_id(0) - heads
    tile = tl.where(tile < 0, plain // TALL + heads + tile, tile)
    row = tl.arange(0, WIDE)
    live = row < rows
    formats.wait_for_inputs(TARGET)
    total = fp8_tile(codes, scales, weight, weight_scales, tile * TALL, 0, row, live, DEPTH,
                     DEPTH, DEPTH, TALL, WIDE, TARGET)  # fmt: skip
    formats.let_next_start(TARGET)
    if tile < plain // TALL:
        place = row[None, :] * plain + (tile * TALL + tl.arange(0, TALL))[:, None]
        tl.store(out + place, total.to(tl.bfloat16), mask=live[None, :])
    else:
        head = tile - plain // TALL
        _index_queries(total, index_q, turn, row, live, head, heads, factor, INDEX, ROPE, ROUNDS, TARGET)


@triton.jit
def _merged_tile(
    codes, scales, x, weight, weight_scales, wide_weight, rows, narrow, wide, tile, part,
    DEPTH: tl.constexpr, PART: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A tile of sums and its first output: `narrow` FP8 ones before `wide` bfloat16 ones, whose tiles go first."""
    row = tl.arange(0, WIDE)
    live = row < rows
    if tile < wide // TALL:
        first = narrow + tile * TALL
        total = bf16_tile(x, wide_weight, tile * TALL, part * PART, row, live, DEPTH, PART, TALL, WIDE, TARGET)
    else:
        first = (tile - wide // TALL) * TALL
        total = fp8_tile(
            codes, scales, weight, weight_scales, first, part * PART, row, live, DEPTH, DEPTH, PART, TALL, WIDE, TARGET,
        )  # fmt: skip
    return total, first


@triton.jit
def _mix_behind(
    behind, part, parts, base, scale, post, comb, rows, eps, norm_eps,
    PARTS: tl.constexpr, ITERS: tl.constexpr, SUMS: tl.constexpr, DEPTH: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A token's post and comb, by one of the programs behind the tiles."""
    formats.let_next_start(TARGET)
    token = behind * PARTS + part
    mixing(parts, base, scale, post, comb, token, token < rows, eps, norm_eps, ITERS, DEPTH, DEPTH // 128, SUMS, TARGET)


@triton.jit
def _merged_kernel(
    codes, scales, x, weight, weight_scales, wide_weight, out, partial, arrived, rows, narrow, wide,
    mix_parts, mix_base, mix_scale, post, comb, mix_eps, mix_norm_eps,
    DEPTH: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, ITERS: tl.constexpr, SUMS: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Tiles of outputs and, with ITERS, behind them a token's post and comb a program."""
    tile, part = tl.program_id(0), tl.program_id(1)
    formats.wait_for_inputs(TARGET)
    behind = tile - (narrow + wide) // TALL
    if behind < 0:
        total, first = _merged_tile(codes, scales, x, weight, weight_scales, wide_weight, rows, narrow, wide, tile,
                                    part, DEPTH, PART, TALL, WIDE, TARGET)  # fmt: skip
        formats.let_next_start(TARGET)
        row, width = tl.arange(0, WIDE), narrow + wide
        place = row[None, :] * width + (first + tl.arange(0, TALL))[:, None]
        store_parts(total, out, partial, arrived + tile, place, (row < rows)[None, :], rows * width, part, PARTS)
    elif ITERS > 0:
        _mix_behind(behind, part, mix_parts, mix_base, mix_scale, post, comb, rows, mix_eps, mix_norm_eps,
                    PARTS, ITERS, SUMS, DEPTH, TARGET)  # fmt: skip


@triton.jit
def _add_up(partial, out, begin, size, COUNT: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr):
    """Add COUNT sums from `begin` over all parts of k, in order."""
    lane = tl.arange(0, PADDED)
    total = tl.load(partial + begin + lane, mask=lane < COUNT, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(partial + part * size + begin + lane, mask=lane < COUNT, other=0.0)
    tl.store(out + begin + lane, total, mask=lane < COUNT)


@triton.jit(do_not_specialize=["table_stride"])
def _kept_kernel(
    codes, scales, x, weight, weight_scales, wide_weight, out, partial, arrived, rows, narrow, wide, mix_parts,
    mix_base, mix_scale, post, comb, mix_eps, mix_norm_eps, positions, places, firsts, owners, table, frozens,
    table_stride, q_norm, kv_norm, turn, latent_codes, latent_scales, window, window_scale, slot_bytes, ape, norm,
    kv_ring, score_ring, main, main_scale, index_ape, index_norm, index_kv_ring, index_score_ring, index, index_scale,
    page_bytes, entry_turn, head_weights, head_factor, factor, eps, DEPTH: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, ITERS: tl.constexpr, SUMS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    LATENT: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr, RING: tl.constexpr,
    SCALES: tl.constexpr, RATIO: tl.constexpr, SPAN: tl.constexpr, TAIL: tl.constexpr, PAGE: tl.constexpr,
    SLOTS: tl.constexpr, INDEX: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, ROUNDS: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """`_merged_kernel`, and whoever comes last of what a kind of cached thing is made of keeps that of all rows."""
    tile, part = tl.program_id(0), tl.program_id(1)
    formats.wait_for_inputs(TARGET)
    behind = tile - (narrow + wide) // TALL
    if behind < 0:
        total, first = _merged_tile(codes, scales, x, weight, weight_scales, wide_weight, rows, narrow, wide, tile,
                                    part, DEPTH, PART, TALL, WIDE, TARGET)  # fmt: skip
        formats.let_next_start(TARGET)
        token, width = tl.arange(0, WIDE), narrow + wide
        size = rows * width
        place = token[None, :] * width + (first + tl.arange(0, TALL))[:, None]
        tl.store(partial + part * size + place, total, mask=(token < rows)[None, :])
        # Where each kind's columns end; behind the last are the indexer's head weights, which go with the latent.
        kv: tl.constexpr = LATENT + WIDTH
        main_end: tl.constexpr = kv + 2 * SPAN
        index_end: tl.constexpr = main_end + 4 * INDEX
        kind, tiles = 0, (LATENT + width - index_end) // TALL
        if (first >= LATENT) & (first < kv):
            kind, tiles = 1, WIDTH // TALL
        elif (first >= kv) & (first < main_end):
            kind, tiles = 2, 2 * SPAN // TALL
        elif (first >= main_end) & (first < index_end):
            kind, tiles = 3, 4 * INDEX // TALL
        tl.debug_barrier()
        if tl.atomic_add(arrived + kind, 1, sem="acq_rel") == tiles * PARTS - 1:
            tl.debug_barrier()
            row = 0
            while row < rows:  # not range(): the interpreter takes no tensor there
                begin = row * width
                if kind == 0:
                    _add_up(partial, out, begin, size, LATENT, PADDED, PARTS)
                    if INDEX > 0:
                        _add_up(partial, out, begin + index_end, size, HEADS, HEADS_PADDED, PARTS)
                elif kind == 1:
                    _add_up(partial, out, begin + LATENT, size, WIDTH, WIDTH, PARTS)
                elif kind == 2:
                    if SPAN > 0:
                        _add_up(partial, out, begin + kv, size, 2 * SPAN, 2 * SPAN, PARTS)
                elif INDEX > 0:
                    _add_up(partial, out, begin + main_end, size, 4 * INDEX, 4 * INDEX, PARTS)
                row += 1
            tl.debug_barrier()
            row = 0
            while row < rows:
                keep(
                    kind, row, out, width, positions, places, firsts, owners, table, frozens, table_stride, q_norm,
                    kv_norm, turn, latent_codes, latent_scales, window, window_scale, slot_bytes, ape, norm, kv_ring,
                    score_ring, main, main_scale, index_ape, index_norm, index_kv_ring, index_score_ring, index,
                    index_scale, page_bytes, entry_turn, head_weights, head_factor, factor, eps, LATENT, PADDED, WIDTH,
                    ROPE, RING, SCALES, RATIO, SPAN, TAIL, PAGE, SLOTS, INDEX, HEADS, HEADS_PADDED, ROUNDS, TARGET, 1,
                )  # fmt: skip
                row += 1
            tl.store(arrived + kind, 0)
    elif ITERS > 0:
        _mix_behind(behind, part, mix_parts, mix_base, mix_scale, post, comb, rows, mix_eps, mix_norm_eps,
                    PARTS, ITERS, SUMS, DEPTH, TARGET)  # fmt: skip


def cut(outputs: int, depth: int, groups: int, quantise: bool = False) -> tuple[int, int]:
    """Return (outputs a program, parts of k) of a weight's shape; smaller ones for the product that quantises."""
    tall = 64 if quantise or groups * outputs < 32 * 128 else 128
    return tall, parts_of(groups * outputs // tall, depth, 2 * TILES if quantise else TILES)


def parts_of(programs: int, depth: int, wanted: int) -> int:
    """Return into how many parts k is cut, of at least 512 columns, for `wanted` programs."""
    parts = 1
    while programs * parts < wanted and depth // 128 % (2 * parts) == 0 and depth // parts > 512:
        parts *= 2
    return parts


def wide_of(rows: int) -> int:
    """Return how many columns of the product hold so many rows of x."""
    return max(16, triton.next_power_of_2(rows))


def forward(
    codes: Tensor, scales: Tensor | None, weight: Tensor, weight_scales: Tensor, arrived: Tensor, groups: int = 1,
    quantise: bool = False, left: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (T, O) bfloat16, codes with their scales, or the parts twice; operands as in `kernels.skinny_gemm`.

    `arrived` is int32 zeros, left as it was.
    """
    rows, (outputs, depth), new = codes.shape[0], weight.shape, codes.new_empty
    outputs //= groups
    tall, parts = cut(outputs, depth, groups, quantise)
    partial = new((parts if quantise or left or parts > 1 else 0, rows, groups * outputs), dtype=torch.float32)
    shape = (rows // 2 if quantise and scales is not None else rows, groups * outputs)
    out = partial if left else new(shape, dtype=torch.uint8 if quantise else torch.bfloat16)
    out_scales = new((shape[0], shape[1] // BLOCK), dtype=torch.uint8) if quantise else out
    made_for = formats.target()
    # Behind the attention, whose programs fill a multiprocessor, an early start crams all onto a few.
    fat = quantise and scales is None and wide_of(rows) >= FAT and outputs % 128 == 0
    tall = 128 if fat else tall
    options = formats.launch(made_for, num_stages=STAGES, num_warps=8 if fat else 4)
    if quantise and made_for == formats.PTX:
        options["launch_pdl"] = False
    if scales is not None:
        codes, weight = as_operand(codes), as_operand(weight)
    _plain_kernel[(outputs // tall, parts, groups)](
        codes, codes if scales is None else scales, weight, weight_scales, out, out_scales, partial, arrived, rows,
        outputs, codes.shape[1], DEPTH=depth, PART=depth // parts, PARTS=parts, QUANTISE=quantise, LEFT=left, TALL=tall,
        WIDE=wide_of(rows), TARGET=made_for, **options,
    )  # fmt: skip
    return out, out_scales


def queried(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, turn: Tensor, heads: int, width: int
) -> tuple[Tensor, Tensor] | None:
    """Return (T, O) bfloat16 of a weight's first rows and the queries (T, heads, width) of the index heads behind them.

    None where a tile of outputs is not one index head, or k is cut, or rows are many.
    """
    (rows, depth), outputs, made_for = codes.shape, weight.shape[0], formats.target()
    tall, parts = cut(outputs, depth, 1)
    if tall != width or parts > 1 or rows > 16:
        return None
    plain = outputs - heads * width
    out = codes.new_empty((rows, plain), dtype=torch.bfloat16)
    index_q = codes.new_empty((rows, heads, width), dtype=torch.bfloat16)
    _query_kernel[(outputs // tall,)](
        as_operand(codes), scales, as_operand(weight), weight_scales, out, index_q, turn, rows, plain, heads,
        rotation(width)["factor"], DEPTH=depth, INDEX=width, ROPE=2 * turn.shape[2], ROUNDS=rotation(width)["ROUNDS"],
        TALL=tall, WIDE=wide_of(rows), TARGET=made_for,
        **formats.launch(made_for, num_stages=STAGES, enable_fp_fusion=False),
    )  # fmt: skip
    return out, index_q


def merged(
    codes: Tensor | None, scales: Tensor | None, x: Tensor, weight: Tensor | None, weight_scales: Tensor | None,
    wide_weight: Tensor, arrived: Tensor, left: Mixing | None = None, cache: tuple | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return (T, O + O') float32, or with `cache` what `cache_write` returns; operands as in the front."""
    (rows, depth), narrow, wide = x.shape, 0 if weight is None else weight.shape[0], wide_weight.shape[0]
    parts = parts_of((narrow + wide) // MERGED_TALL, depth, TILES)
    # Of a vocabulary's products with many rows the rows are what the L2 has most to give of.
    tall = 2 * MERGED_TALL if rows > 16 and not narrow and wide >= HUGE and wide % 128 == 0 else MERGED_TALL
    tiles = (narrow + wide) // tall
    out = x.new_empty((rows, narrow + wide), dtype=torch.float32)
    keeps = cache is not None
    partial = x.new_empty(parts * out.numel() if parts > 1 or keeps else 1, dtype=torch.float32)
    codes, scales, weight, weight_scales = (
        arrived.view(torch.uint8) if each is None else each for each in (codes, scales, weight, weight_scales)
    )
    codes, weight = as_operand(codes), as_operand(weight)
    made_for = formats.target()
    mix, constants = owed(left, out)
    more = 0 if left is None else triton.cdiv(rows, parts)
    inputs = (codes, scales, x, weight, weight_scales, wide_weight, out, partial, arrived, rows, narrow, wide, *mix)
    constants |= {"DEPTH": depth, "PART": depth // parts, "PARTS": parts, "TALL": tall, "WIDE": wide_of(rows)}
    options = {"TARGET": made_for, **formats.launch(made_for, num_stages=STAGES, enable_fp_fusion=False)}
    if cache is None:
        _merged_kernel[(tiles + more, parts)](*inputs, **constants, **options)
        return out
    results, values, own = operands(out, *cache)
    _kept_kernel[(tiles + more, parts)](*inputs, *values[2:], **constants, **own, **options)
    return results
