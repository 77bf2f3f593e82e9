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

from pelagos.kernels.triton import formats

BLOCK = 128
STAGES = 3  # of the pipeline: residency counts for more than a fourth
TILES = 256  # programs that a weight should at least be cut into
MERGED_TALL = 64  # outputs a program of a merged product


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
        total += formats.dot(tall, tl.trans(wide), tl.zeros((TALL, WIDE), tl.float32), TARGET) * factor[None, :]
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
        token = tl.arange(0, WIDE // HALVES)
        own = token < rows // HALVES
        block = token[None, :] * width + (first // 128 * 128 + tl.arange(0, 128))[:, None]
        upper = partial + block + token[None, :] * ((HALVES - 1) * width)
        whole = tl.zeros((128, WIDE // HALVES), tl.float32)
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
def _merged_kernel(
    codes, scales, x, weight, weight_scales, wide_weight, out, partial, arrived, rows, narrow, wide,
    DEPTH: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """`narrow` FP8 outputs before `wide` bfloat16 ones; the latter's tiles, being longer, go first."""
    tile, part = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, WIDE)
    live = row < rows
    width = narrow + wide
    formats.wait_for_inputs(TARGET)
    if tile < wide // TALL:
        first = narrow + tile * TALL
        total = bf16_tile(x, wide_weight, tile * TALL, part * PART, row, live, DEPTH, PART, TALL, WIDE, TARGET)
    else:
        first = (tile - wide // TALL) * TALL
        total = fp8_tile(
            codes, scales, weight, weight_scales, first, part * PART, row, live, DEPTH,
            DEPTH, PART, TALL, WIDE, TARGET,
        )  # fmt: skip
    formats.let_next_start(TARGET)
    place = row[None, :] * width + (first + tl.arange(0, TALL))[:, None]
    store_parts(total, out, partial, arrived + tile, place, live[None, :], rows * width, part, PARTS)


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
    options = formats.launch(made_for, num_stages=STAGES)
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


def merged(
    codes: Tensor | None, scales: Tensor | None, x: Tensor, weight: Tensor | None, weight_scales: Tensor | None,
    wide_weight: Tensor, arrived: Tensor,
) -> Tensor:  # fmt: skip
    """Return (T, O + O') float32; operands as in `kernels.skinny_gemm.merged`."""
    (rows, depth), narrow, wide = x.shape, 0 if weight is None else weight.shape[0], wide_weight.shape[0]
    tiles = (narrow + wide) // MERGED_TALL
    parts = parts_of(tiles, depth, TILES)
    out = x.new_empty((rows, narrow + wide), dtype=torch.float32)
    partial = x.new_empty(parts * out.numel() if parts > 1 else 1, dtype=torch.float32)
    codes, scales, weight, weight_scales = (
        arrived.view(torch.uint8) if each is None else each for each in (codes, scales, weight, weight_scales)
    )
    codes, weight = as_operand(codes), as_operand(weight)
    made_for = formats.target()
    _merged_kernel[(tiles, parts)](
        codes, scales, x, weight, weight_scales, wide_weight, out, partial, arrived, rows, narrow, wide,
        DEPTH=depth, PART=depth // parts, PARTS=parts, TALL=MERGED_TALL, WIDE=wide_of(rows),
        TARGET=made_for, **formats.launch(made_for, num_stages=STAGES),
    )  # fmt: skip
    return out
