"""Between the library's FP8 products: scales as it wants them, norm, SwiGLU and quantisation of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from pelagos.kernels.prefill_products import SCALED_DEPTH, steady_rows
from pelagos.kernels.triton import formats
from pelagos.kernels.triton.fp4_experts import _gated

COLUMNS = 1024


@triton.jit
def _factor_kernel(scales, factors, rows, room, blocks, TILE: tl.constexpr):
    """float32 scales, those of a block of columns next to each other; rows past the end count 1."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    block = tl.program_id(1) * 16 + tl.arange(0, 16)
    inside = (block < blocks)[None, :]
    byte = tl.load(scales + row[:, None] * blocks + block[None, :], mask=(row < rows)[:, None] & inside, other=127)
    tl.store(
        factors + block[None, :] * room + row[:, None], formats.power_of_two(byte), mask=(row < room)[:, None] & inside
    )


@triton.jit
def _quantise_kernel(
    x, norm, codes, scales, stride, limit, eps, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr,
    SWIGLU: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < WIDTH
    own = x + row.to(tl.int64) * stride + column
    value = tl.load(own, mask=live, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(own + WIDTH, mask=live, other=0.0).to(tl.float32)
        value = formats.rounded(_gated(value, up, limit), TARGET)
    if NORM:
        weight = tl.load(norm + column, mask=live, other=0.0).to(tl.float32)
        value = formats.rounded(value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps) * weight, TARGET)
    value = value.reshape(COLUMNS // 128, 128)
    exponent = formats.fp8_scale_exponent(tl.max(tl.abs(value), 1))
    code = formats.e4m3_block(value, exponent[:, None]).reshape(COLUMNS)
    tl.store(codes + row.to(tl.int64) * WIDTH + column, code, mask=live)
    block = tl.program_id(1) * (COLUMNS // 128) + tl.arange(0, COLUMNS // 128)
    tl.store(scales + row * (WIDTH // 128) + block, exponent.to(tl.uint8), mask=block < WIDTH // 128)


def quantise(x: Tensor, norm: Tensor | None, eps: float, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """Return (codes, scales) as `kernels.prefill_products.quantise` does; with a limit those of the SwiGLU of x."""
    rows, width = len(x), x.shape[1] if limit is None else x.shape[1] // 2
    codes = torch.empty((rows, width), dtype=torch.uint8, device=x.device)
    scales = torch.empty((rows, width // 128), dtype=torch.uint8, device=x.device)
    columns = COLUMNS if norm is None else max(128, triton.next_power_of_2(width))
    _quantise_kernel[(rows, triton.cdiv(width, columns))](
        x, norm, codes, scales, x.stride(0), limit or 0.0, eps, WIDTH=width, COLUMNS=columns, NORM=norm is not None,
        SWIGLU=limit is not None, TARGET=formats.target(),
    )  # fmt: skip
    return codes, scales


def scale_factors(scales: Tensor, room: int) -> Tensor:
    """Return float32 (blocks, room) of UE8M0 scales (T, blocks), 1 past T."""
    rows, blocks = scales.shape
    factors = torch.empty((blocks, room), dtype=torch.float32, device=scales.device)
    _factor_kernel[(triton.cdiv(room, 64), triton.cdiv(blocks, 16))](scales, factors, rows, room, blocks, TILE=64)
    return factors


@triton.jit
def _widen_kernel(codes, factors, out, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    """bfloat16 values of FP8 weights, which hold them exactly."""
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < DEPTH
    place = row.to(tl.int64) * DEPTH + column
    factor = tl.load(factors + row // 128 * (DEPTH // 128) + column // 128, mask=live, other=1.0)
    value = formats.e4m3_to_float(tl.load(codes + place, mask=live, other=0)) * factor
    tl.store(out + place, value.to(tl.bfloat16), mask=live)


def _filled(x: Tensor, rows: int) -> Tensor:
    """x with rows of zeros after it, up to so many."""
    missing = rows - len(x)
    return functional.pad(x, (0, 0, 0, missing)) if missing > 0 else x


def wide_product(x: Tensor, weight: Tensor, call_rows: int) -> Tensor:
    """Return (T, O) float32 as `kernels.prefill_products.wide_product` does."""
    parts = [torch.mm(_filled(part, call_rows), weight.t(), out_dtype=torch.float32) for part in x.split(call_rows)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[: len(x)]


def _wide(x: Tensor, weight: Tensor, factors: Tensor, groups: int) -> Tensor:
    """The product of BF16 rows with decoded weights."""
    (outputs, depth), rows = weight.shape, len(x)
    wide = torch.empty_like(weight, dtype=torch.bfloat16)
    _widen_kernel[(outputs, triton.cdiv(depth, COLUMNS))](weight, factors, wide, DEPTH=depth, COLUMNS=COLUMNS)
    own = outputs // groups
    step = steady_rows(rows, own, depth)
    out = torch.empty((rows + -rows % step, outputs), dtype=torch.bfloat16, device=x.device)
    for begin in range(0, rows, step):
        part = _filled(x[begin : begin + step], step)
        for g in range(groups):
            some = slice(g * own, (g + 1) * own)
            torch.mm(part[:, g * depth : (g + 1) * depth], wide[some].t(), out=out[begin : begin + step, some])
    return out[:rows]


def product(codes: Tensor, scales: Tensor | None, weight: Tensor, weight_factors: Tensor, groups: int) -> Tensor:
    """Return (T, O) bfloat16 as `kernels.prefill_products.product` does."""
    (outputs, depth), rows = weight.shape, len(codes)
    if scales is not None and depth % SCALED_DEPTH:  # BF16 holds the values exactly
        row_factors = scales.view(torch.float8_e8m0fnu).bfloat16().repeat_interleave(128, 1)
        codes, scales = codes.view(torch.float8_e4m3fn).bfloat16() * row_factors, None
    if scales is None:
        return _wide(codes, weight, weight_factors, groups)
    x, kinds = _filled(codes, rows + -rows % 4).view(torch.float8_e4m3fn), functional.ScalingType
    row_scales, own, blocks = scale_factors(scales, len(x)), outputs // groups, depth // 128
    parts = [
        functional.scaled_mm(
            x[:, g * depth : (g + 1) * depth], weight[g * own : (g + 1) * own].view(torch.float8_e4m3fn).t(),
            row_scales[g * blocks : (g + 1) * blocks].t(), kinds.BlockWise1x128,
            weight_factors[g * own // 128 : (g + 1) * own // 128].t(), kinds.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )
        for g in range(groups)
    ]  # fmt: skip
    return (parts[0] if groups == 1 else torch.cat(parts, 1))[:rows]
