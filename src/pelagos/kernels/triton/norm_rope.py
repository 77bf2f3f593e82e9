"""RMSNorm forward and backward, rotary embedding: a program walks tiles of rows, a row whole in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of a tile
PROGRAMS = 1056  # at most, of the norm's backward: each leaves one part of the weight's gradient


@triton.jit
def _norm_kernel(x, weight, out, roots, count, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr, BR: tl.constexpr):
    row, column = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, PADDED)
    live, inside = row < count, column < WIDTH
    at, mask = row.to(tl.int64)[:, None] * WIDTH + column[None, :], live[:, None] & inside[None, :]
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    wide = wide * root[:, None]
    if weight is not None:
        wide = wide * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=mask)
    tl.store(roots + row, root, mask=live)


@triton.jit
def _norm_grad_kernel(
    x, weight, roots, grad, grad_x, parts, count, each, WIDTH: tl.constexpr, PADDED: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    total = tl.zeros((PADDED,), tl.float32)
    for begin in range(tl.program_id(0) * each, (tl.program_id(0) + 1) * each, BR):
        row = begin + tl.arange(0, BR)
        live = row < count
        at, mask = row.to(tl.int64)[:, None] * WIDTH + column[None, :], live[:, None] & inside[None, :]
        root = tl.load(roots + row, mask=live, other=0.0)[:, None]
        unit = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * root
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if weight is not None:
            total += tl.sum(g * unit, 0)
            g = g * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        g = root * (g - unit * (tl.sum(g * unit, 1) / WIDTH)[:, None])
        tl.store(grad_x + at, g.to(grad_x.dtype.element_ty), mask=mask)
    if weight is not None:
        tl.store(parts + tl.program_id(0) * WIDTH + column, total, mask=inside)


@triton.jit
def _rope_kernel(
    x, cos, sin, out, count, SIGN: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """HEADS rows share a line of the tables."""
    row, column = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, WIDTH)
    mask = (row < count)[:, None] & (column >= 0)[None, :]
    line = row.to(tl.int64)[:, None] * WIDTH
    wide = tl.load(x + line + column[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x + line + (column ^ 1)[None, :], mask=mask, other=0.0).to(tl.float32)
    place = (row // HEADS).to(tl.int64)[:, None] * WIDTH + column[None, :]
    turned = other * tl.load(sin + place, mask=mask, other=0.0) * SIGN
    value = wide * tl.load(cos + place, mask=mask, other=0.0) + turned
    tl.store(out + line + column[None, :], value.to(out.dtype.element_ty), mask=mask)


def _tiles(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"WIDTH": width, "PADDED": padded, "BR": max(1, ELEMENTS // padded)}


class Norm(torch.autograd.Function):
    """`kernels.norm_rope.rms_norm`; keeps what each row was multiplied by."""

    @staticmethod
    def forward(ctx: Any, x, weight, eps):
        x, tiles = x.contiguous(), _tiles(x.shape[-1])
        rows = x.numel() // x.shape[-1]
        out, roots = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
        _norm_kernel[(triton.cdiv(rows, tiles["BR"]),)](x, weight, out, roots, rows, eps, **tiles)
        ctx.save_for_backward(x, weight, roots)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        (x, weight, roots), tiles = ctx.saved_tensors, _tiles(grad.shape[-1])
        each = tiles["BR"] * triton.cdiv(triton.cdiv(len(roots), PROGRAMS), tiles["BR"])
        programs, to_x = triton.cdiv(len(roots), each), torch.empty_like(x)
        parts = None if weight is None else roots.new_empty((programs, tiles["WIDTH"]))
        _norm_grad_kernel[(programs,)](x, weight, roots, grad.contiguous(), to_x, parts, len(roots), each, **tiles)
        return to_x, None if parts is None else parts.sum(0).to(weight.dtype), None


class Rope(torch.autograd.Function):
    """`kernels.norm_rope.apply_rope` of a width that is a power of two; its backward is the other direction."""

    @staticmethod
    def forward(ctx: Any, x, cos, sin, inverse):
        ctx.save_for_backward(cos, sin)
        ctx.inverse, width, x = inverse, x.shape[-1], x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        rows, out, tile = x.numel() // width, torch.empty_like(x), max(1, ELEMENTS // width)
        shape = {"HEADS": x.numel() // cos.numel(), "WIDTH": width, "BR": tile}
        _rope_kernel[(triton.cdiv(rows, tile),)](x, cos, sin, out, rows, SIGN=-1.0 if inverse else 1.0, **shape)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return Rope.apply(grad, *ctx.saved_tensors, not ctx.inverse), None, None, None
