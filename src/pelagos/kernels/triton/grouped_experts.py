"""What lies between the grouped products of experts in training: SwiGLU both ways, sums of a token's rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from pelagos import numerics

ROWS, COLUMNS = 16, 128  # a tile of SwiGLU
TOKENS, CHANNELS = 8, 256  # a tile of the sums


@triton.jit
def _pair(both, row, column, mask, limit, WIDTH: tl.constexpr):
    """Clamped gate and up, float32, and what they were."""
    at = row.to(tl.int64)[:, None] * (2 * WIDTH) + column[None, :]
    gate = tl.load(both + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both + at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    level = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return tl.where(gate > limit, limit, gate), level, gate, up


@triton.jit(do_not_specialize=["count"])
def _swiglu_kernel(
    both, weight, hidden, hits, count, limit, WIDTH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """hits (programs, 3) int32: gates above, ups above, ups below the limit."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    live = row < count
    scale = tl.load(weight + row, mask=live, other=0.0)
    high, above, below = tl.zeros((BR, BC), tl.int32), tl.zeros((BR, BC), tl.int32), tl.zeros((BR, BC), tl.int32)
    for begin in range(0, WIDTH, BC):
        column = begin + tl.arange(0, BC)
        mask = live[:, None] & (column < WIDTH)[None, :]
        gate, up, raw, free = _pair(both, row, column, mask, limit, WIDTH)
        high += (raw > limit).to(tl.int32)
        above += (free > limit).to(tl.int32)
        below += (free < -limit).to(tl.int32)
        value = gate / (1 + tl.exp(-gate)) * up * scale[:, None]
        at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(hidden + at, value.to(hidden.dtype.element_ty), mask=mask)
    out = hits + tl.program_id(0) * 3
    tl.store(out, tl.sum(tl.sum(high, 1), 0))
    tl.store(out + 1, tl.sum(tl.sum(above, 1), 0))
    tl.store(out + 2, tl.sum(tl.sum(below, 1), 0))


@triton.jit(do_not_specialize=["count"])
def _swiglu_grad_kernel(
    both, weight, grad, grad_both, grad_weight, count, limit, WIDTH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    live = row < count
    scale, total = tl.load(weight + row, mask=live, other=0.0), tl.zeros((BR,), tl.float32)
    for begin in range(0, WIDTH, BC):
        column = begin + tl.arange(0, BC)
        mask = live[:, None] & (column < WIDTH)[None, :]
        gate, up, raw, free = _pair(both, row, column, mask, limit, WIDTH)
        at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        chance = 1 / (1 + tl.exp(-gate))
        silu = gate * chance
        total += tl.sum(g * silu * up, 1)
        g = g * scale[:, None]
        to_gate = tl.where(raw > limit, 0.0, g * up * chance * (1 + gate * (1 - chance)))
        to_up = tl.where((free > limit) | (free < -limit), 0.0, g * silu)
        at = row.to(tl.int64)[:, None] * (2 * WIDTH) + column[None, :]
        tl.store(grad_both + at, to_gate.to(grad_both.dtype.element_ty), mask=mask)
        tl.store(grad_both + at + WIDTH, to_up.to(grad_both.dtype.element_ty), mask=mask)
    tl.store(grad_weight + row, total, mask=live)


@triton.jit(do_not_specialize=["tokens"])
def _sum_kernel(
    rows, places, out, tokens, WIDTH: tl.constexpr, PICKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    token, column = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
    live, inside = token < tokens, (column < WIDTH)[None, :]
    total = tl.zeros((BT, BC), tl.float32)
    for k in tl.static_range(PICKS):
        place = tl.load(places + token * PICKS + k, mask=live, other=0).to(tl.int64)[:, None]
        total += tl.load(rows + place * WIDTH + column[None, :], mask=live[:, None] & inside, other=0.0).to(tl.float32)
    at = token.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live[:, None] & inside)


def swiglu(both: Tensor, weight: Tensor, limit: float, hits: Tensor | None) -> Tensor:
    """Return silu(gate) up weight (R, F) in both's dtype, clamped, of both (R, 2F), weight (R,) float32; count hits."""
    rows, width = len(both), both.shape[1] // 2
    programs = triton.cdiv(rows, ROWS)
    hidden, counts = both.new_empty(rows, width), both.new_empty((programs, 3), dtype=torch.int32)
    _swiglu_kernel[(programs,)](both, weight, hidden, counts, rows, limit, WIDTH=width, BR=ROWS, BC=COLUMNS)
    if hits is not None:
        hits += counts.sum(0)
    return hidden


def swiglu_backward(both: Tensor, weight: Tensor, grad: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of both and weight from that of `swiglu` (R, F)."""
    rows, width = grad.shape
    grad_both, grad_weight = torch.empty_like(both), torch.empty_like(weight)
    _swiglu_grad_kernel[(triton.cdiv(rows, ROWS),)](
        both, weight, grad, grad_both, grad_weight, rows, limit, WIDTH=width, BR=ROWS, BC=COLUMNS
    )
    return grad_both, grad_weight


def sum_rows(rows: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums (T, D) in `dtype` of rows (R, D) at places (T, K), in order of K."""
    (tokens, picks), width = places.shape, rows.shape[1]
    out = rows.new_empty((tokens, width), dtype=dtype)
    grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(width, CHANNELS))
    _sum_kernel[grid](rows, places, out, tokens, WIDTH=width, PICKS=picks, BT=TOKENS, BC=CHANNELS)
    return out


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (R, I), an expert's rows end at `ends` (E,), by its weight (E, I, O); x (I, R) by weight (R, O): (E, I, O)."""
    return functional.grouped_mm(x, weight, offs=ends)


def _whole(weight: Tensor, x: Tensor) -> Tensor:
    """A weight (E, S, ...), the same for all sources, or (E, ...), in x's dtype: a master is cast anew each time."""
    return weight.view(len(weight), -1, *weight.shape[-2:])[:, 0].to(x.dtype)


class Swiglu(torch.autograd.Function):
    """`kernels.grouped_experts.swiglu` of both (T, 2F)."""

    @staticmethod
    def forward(ctx: Any, both, limit, hits):
        ones = both.new_ones(len(both), dtype=torch.float32)
        ctx.save_for_backward(both, ones)
        ctx.limit = limit
        return swiglu(both, ones, limit, hits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        both, ones = ctx.saved_tensors
        return swiglu_backward(both, ones, grad.contiguous(), ctx.limit)[0], None, None


class Mixture(torch.autograd.Function):
    """`kernels.grouped_experts.mixture` behind the quantisation of x."""

    @staticmethod
    def forward(ctx: Any, x, chosen, weights, w13, w2, limit, quantize, hits, fp8):
        flat, order = chosen.flatten().sort(stable=True)
        apart = w13.shape[1:-2].numel()
        parts = torch.searchsorted(flat, torch.arange(len(w13) * apart, device=x.device), right=True, out_int32=True)
        ends = parts[apart - 1 :: apart].contiguous()  # of an expert's rows, where `parts` ends those of each source
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=x.device)
        places, wide, narrow = places.view(chosen.shape), _whole(w13, x), _whole(w2, x)
        rows, scale = x[order // chosen.shape[1]], weights.flatten()[order]
        both = _product(rows, wide.transpose(1, 2), ends)
        hidden = swiglu(both, scale, limit, hits)
        hidden = quantize(hidden) if quantize else hidden
        out = _product(hidden, narrow.transpose(1, 2), ends)
        ctx.save_for_backward(rows, order, places, ends, parts, scale, both, hidden, w13, w2)
        ctx.limit, ctx.fp8 = limit, fp8
        return sum_rows(out, places, torch.float32 if chosen.shape[1] > 1 else out.dtype)  # one row is no sum

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        rows, order, places, ends, parts, scale, both, hidden, w13, w2 = ctx.saved_tensors
        to_out = grad.to(rows.dtype)[order // places.shape[1]]
        to_out = numerics.fake_quant_fp8(to_out, numerics.ACT_BLOCK) if ctx.fp8 else to_out
        to_hidden = _product(to_out, _whole(w2, rows), ends)
        to_both, to_scale = swiglu_backward(both, scale, to_hidden, ctx.limit)
        to_both = numerics.fake_quant_fp8(to_both, numerics.ACT_BLOCK) if ctx.fp8 else to_both
        pairs = (w13, to_both, rows), (w2, to_out, hidden)
        masters = [_product(up.T, x, parts).view(w.shape).to(w.dtype) for w, up, x in pairs]
        to_x = sum_rows(_product(to_both, _whole(w13, rows), ends), places, rows.dtype)
        return to_x, None, to_scale[places], *masters, *[None] * 4
