"""Queries of attention and indexer: norm and rope a head; rope, Hadamard rotation and FP4 an index head; one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.triton.formats import launch, let_next_start, rounded, target, wait_for_inputs

ROWS, INDEX_ROWS = 4, 8  # heads a program


@triton.jit
def normed(x, weight, eps, WIDTH: tl.constexpr, TARGET: tl.constexpr):
    """Rows (R, PADDED) over their root mean square, times weight (PADDED,), rounded; columns past WIDTH hold zero."""
    square = tl.sum(x * x, 1) / WIDTH
    return rounded(x * tl.rsqrt(square + eps)[:, None] * weight[None, :], TARGET)


@triton.jit
def turned(x, turn, ROPE: tl.constexpr, TARGET: tl.constexpr):
    """Rotate the last ROPE columns of x (R, WIDTH) by cos and sin at turn (2, ROPE / 2), rounded."""
    rows: tl.constexpr = x.shape[0]
    half: tl.constexpr = x.shape[1] // 2
    pair = tl.arange(0, half) - (half - ROPE // 2)
    cos = tl.load(turn + pair, mask=pair >= 0, other=1.0)[None, :]
    sin = tl.load(turn + ROPE // 2 + pair, mask=pair >= 0, other=0.0)[None, :]
    a, b = tl.split(x.reshape(rows, half, 2))
    return rounded(tl.join(a * cos - b * sin, b * cos + a * sin).reshape(rows, 2 * half), TARGET)


@triton.jit
def rotated(x, ROUNDS: tl.constexpr, factor, TARGET: tl.constexpr):
    """x (R, 2^ROUNDS) times the Hadamard matrix and a factor, rounded: a round adds and subtracts neighbours."""
    rows: tl.constexpr = x.shape[0]
    half: tl.constexpr = x.shape[1] // 2
    for _ in tl.static_range(ROUNDS):
        a, b = tl.split(x.reshape(rows, half, 2))
        x = tl.permute(tl.join(a + b, a - b), (0, 2, 1)).reshape(rows, 2 * half)
    return rounded(x * factor, TARGET)


@triton.jit
def _nearest(x):
    """float32 0 <= x < 2^22 to a whole number, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def fp4(x):
    """Round x (G, 32) to E2M1 under a scale a row: (codes 0..15 int32, float32 values unscaled, UE8M0 bytes int32)."""
    amax = tl.maximum(tl.max(tl.abs(x), 1), 7.052966104933725e-38)  # 6 * 2^-126
    bits = tl.div_rn(amax, 6.0).to(tl.int32, bitcast=True)
    byte = (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
    scaled = x * ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, None]
    size = tl.minimum(tl.abs(scaled), 6.0)
    near, middle, far = _nearest(size * 2.0), _nearest(size), _nearest(size * 0.5)
    value = tl.where(size < 2.0, near * 0.5, tl.where(size < 4.0, middle, far * 2.0))
    code = tl.where(size < 2.0, near, tl.where(size < 4.0, middle + 2.0, far + 4.0)).to(tl.int32)
    sign = (scaled.to(tl.int32, bitcast=True) >> 28) & 8
    return code | sign, tl.where(sign > 0, -value, value), byte


@triton.jit
def _kernel(
    product, turn, q, index_q, heads, columns, index_heads, parts, eps, factor, WIDTH: tl.constexpr, ROPE: tl.constexpr,
    ROWS: tl.constexpr, INDEX_WIDTH: tl.constexpr, ROUNDS: tl.constexpr, INDEX_ROWS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    let_next_start(TARGET)
    wait_for_inputs(TARGET)
    part, row = tl.program_id(0), tl.program_id(1)
    turned_by = turn + row * ROPE
    if part < parts:
        head = part * ROWS + tl.arange(0, ROWS)
        place = head[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        live = (head < heads)[:, None] & (place >= 0)
        x = tl.load(product + row.to(tl.int64) * columns + place, mask=live, other=0.0).to(tl.float32)
        x = turned(normed(x, tl.full((WIDTH,), 1.0, tl.float32), eps, WIDTH, TARGET), turned_by, ROPE, TARGET)
        tl.store(q + row * heads * WIDTH + place, x.to(tl.bfloat16), mask=live)
    elif INDEX_WIDTH > 0:
        other = (part - parts) * INDEX_ROWS + tl.arange(0, INDEX_ROWS)
        at = other[:, None] * INDEX_WIDTH + tl.arange(0, INDEX_WIDTH)[None, :]
        real = (other < index_heads)[:, None] & (at >= 0)
        y = tl.load(product + row.to(tl.int64) * columns + heads * WIDTH + at, mask=real, other=0.0).to(tl.float32)
        y = rotated(turned(y, turned_by, ROPE, TARGET), ROUNDS, factor, TARGET)
        _, value, byte = fp4(y.reshape(INDEX_ROWS * (INDEX_WIDTH // 32), 32))
        value = value * (byte << 23).to(tl.float32, bitcast=True)[:, None]
        tl.store(index_q + row * index_heads * INDEX_WIDTH + at,
                 value.reshape(INDEX_ROWS, INDEX_WIDTH).to(tl.bfloat16), mask=real)  # fmt: skip


def rotation(width: int) -> dict[str, int | float]:
    """Return the rounds of a Hadamard rotation of `width` channels and the bfloat16 factor behind it."""
    return {"ROUNDS": width.bit_length() - 1, "factor": float(torch.tensor(width**-0.5).bfloat16())}


def forward(
    product: Tensor, turn: Tensor, heads: int, width: int, index_heads: int, index_width: int, *, eps: float,
    index_only: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (q, index_q) as `kernels.query.query` does, or with `index_only` q as it came."""
    tokens, columns = product.shape
    if index_only:
        q, parts = product[:, : heads * width].unflatten(1, (heads, width)), 0
    else:
        q, parts = product.new_empty((tokens, heads, width)), triton.cdiv(heads, ROWS)
    index_q = product.new_empty((tokens, index_heads, index_width)) if index_heads else q
    made_for = target()
    if parts or index_heads:
        _kernel[(parts + triton.cdiv(index_heads, INDEX_ROWS), tokens)](
            product, turn, q, index_q, heads, columns, index_heads, parts, eps, WIDTH=width, ROPE=2 * turn.shape[2],
            ROWS=ROWS, INDEX_WIDTH=index_width, INDEX_ROWS=INDEX_ROWS, TARGET=made_for, **rotation(max(index_width, 1)),
            **launch(made_for, num_warps=4, enable_fp_fusion=False),
        )  # fmt: skip
    return q, index_q if index_heads else None
