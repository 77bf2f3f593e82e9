"""FP8 products of at most 64 rows: the weights, as the tall operand, are streamed once through the matrix unit.

A program takes 64 or 128 outputs and a fixed part of k. Every 128 columns end a scale: their sum leaves the matrix
unit and joins a float32 total. Parts of k meet in memory; the last program to arrive adds them in order. The cut of k
depends on the weight's shape alone and the tokens are columns of the product, so a row's bits are its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.triton.formats import (
    dot,
    e4m3_to_float,
    power_of_two,
    target,
)

BLOCK = 128
STAGES = 4  # of the pipeline, the best of 3 to 8 on an H200
TILES = 128  # programs that a weight should at least be cut into


@triton.jit
def _operand(byte, TARGET: tl.constexpr):
    """E4M3 bytes as a matrix operand: themselves where the unit takes them, else their bfloat16 values."""
    if TARGET == "ptx":
        return byte.to(tl.float8e4nv, bitcast=True)
    else:  # one branch is compiled, and each has a type of its own
        return e4m3_to_float(byte).to(tl.bfloat16)


@triton.jit
def _factor(ws, xs, k, live, PART: tl.constexpr):
    """What block k of the sum is to be multiplied by, a number a row of x."""
    inside = k < PART // 128
    byte = tl.load(ws + k, mask=inside, other=127)
    return power_of_two(byte) * power_of_two(tl.load(xs + k, mask=live & inside, other=127))


@triton.jit
def _kernel(
    codes, scales, weight, weight_scales, out, partial, arrived, rows, outputs, stride,
    DEPTH: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    tile, part, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    output = tile * TALL + tl.arange(0, TALL)
    row = tl.arange(0, WIDE)
    live = row < rows
    lane = tl.arange(0, 128)
    blocks: tl.constexpr = DEPTH // 128
    begin = part * PART
    w = weight + (group * outputs + output).to(tl.int64)[:, None] * DEPTH + begin + lane[None, :]
    x = codes + (row * stride + group * DEPTH)[:, None] + begin + lane[None, :]
    ws = weight_scales + (group * outputs + tile * TALL) // 128 * blocks + begin // 128
    xs = scales + row * (stride // 128) + group * blocks + begin // 128
    total = tl.zeros((TALL, WIDE), tl.float32)
    # One step ahead: bytes are too narrow for the asynchronous copies that bring the rest.
    factor = _factor(ws, xs, 0, live, PART)
    for k in tl.range(0, PART // 128):
        ahead = _factor(ws, xs, k + 1, live, PART)
        tall = _operand(tl.load(w + k * 128), TARGET)
        wide = _operand(tl.load(x + k * 128, mask=live[:, None], other=0), TARGET)
        total += dot(tall, tl.trans(wide), tl.zeros((TALL, WIDE), tl.float32), TARGET) * factor[None, :]
        factor = ahead
    place = row[None, :] * outputs + output[:, None] + group * rows * outputs
    if PARTS == 1:
        tl.store(out + row[None, :] * (tl.num_programs(2) * outputs) + group * outputs + output[:, None],
                 total.to(tl.bfloat16), mask=live[None, :])  # fmt: skip
    else:
        size = rows * outputs * tl.num_programs(2)
        tl.store(partial + part * size + place, total, mask=live[None, :])
        tl.debug_barrier()
        counter = arrived + group * tl.num_programs(0) + tile
        before = tl.atomic_add(counter, 1, sem="acq_rel")
        if before == PARTS - 1:
            tl.debug_barrier()
            total = tl.load(partial + place, mask=live[None, :], other=0.0)
            for other in tl.static_range(1, PARTS):
                total += tl.load(partial + other * size + place, mask=live[None, :], other=0.0)
            tl.store(out + row[None, :] * (tl.num_programs(2) * outputs) + group * outputs + output[:, None],
                     total.to(tl.bfloat16), mask=live[None, :])  # fmt: skip
            tl.store(counter, 0)


def cut(outputs: int, depth: int, groups: int) -> tuple[int, int]:
    """Return (outputs a program, parts of k) of a weight's shape."""
    tall = 128 if groups * outputs >= 32 * 128 else 64
    programs, parts = groups * outputs // tall, 1
    while programs * parts < TILES and depth // 128 % (2 * parts) == 0 and depth // parts > 512:
        parts *= 2
    return tall, parts


def forward(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, arrived: Tensor, groups: int = 1
) -> Tensor:
    """Return (T, O) bfloat16; operands as in `kernels.skinny_gemm`. `arrived` is int32 zeros, left as it was."""
    rows, (outputs, depth) = codes.shape[0], weight.shape
    outputs //= groups
    tall, parts = cut(outputs, depth, groups)
    out = torch.empty((rows, groups * outputs), dtype=torch.bfloat16, device=codes.device)
    partial = torch.empty(parts * rows * groups * outputs if parts > 1 else 1, dtype=torch.float32, device=codes.device)
    _kernel[(outputs // tall, parts, groups)](
        codes, scales, weight, weight_scales, out, partial, arrived, rows, outputs, codes.shape[1],
        DEPTH=depth, PART=depth // parts, PARTS=parts, TALL=tall, WIDE=max(16, triton.next_power_of_2(rows)),
        TARGET=target(), num_stages=STAGES,
    )  # fmt: skip
    return out
