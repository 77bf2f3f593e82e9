"""RMSNorm forward and backward, rotary embedding: a program walks tiles of rows, a row whole in registers."""
# Inside a kernel Triton turns Python numbers into constexpr and blocks into tensors; its annotations say neither.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

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


def _tiles(width: int) -> tuple[int, int]:
    padded = triton.next_power_of_2(width)
    return padded, max(1, ELEMENTS // padded)


def norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return x (R, C) normed, in its dtype, and what each row was multiplied by (R,) float32."""
    (rows, width), (padded, tile) = x.shape, _tiles(x.shape[1])
    out, roots = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    _norm_kernel[(triton.cdiv(rows, tile),)](x, weight, out, roots, rows, eps, WIDTH=width, PADDED=padded, BR=tile)
    return out, roots


def norm_backward(x: Tensor, weight: Tensor | None, roots: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and weight from that of `norm` (R, C)."""
    (rows, width), (padded, tile) = x.shape, _tiles(x.shape[1])
    each = tile * triton.cdiv(triton.cdiv(rows, PROGRAMS), tile)
    programs = triton.cdiv(rows, each)
    grad_x, parts = torch.empty_like(x), None if weight is None else x.new_empty((programs, width), dtype=torch.float32)
    _norm_grad_kernel[(programs,)](
        x, weight, roots, grad, grad_x, parts, rows, each, WIDTH=width, PADDED=padded, BR=tile
    )
    return grad_x, None if parts is None else parts.sum(0)


def rope(x: Tensor, cos: Tensor, sin: Tensor, heads: int, *, inverse: bool) -> Tensor:
    """Return x (R, C) turned by tables (R / heads, C) float32, C a power of two."""
    out, tile = torch.empty_like(x), max(1, ELEMENTS // x.shape[1])
    shape = {"HEADS": heads, "WIDTH": x.shape[1], "BR": tile}
    _rope_kernel[(triton.cdiv(len(x), tile),)](x, cos, sin, out, len(x), SIGN=-1.0 if inverse else 1.0, **shape)
    return out
