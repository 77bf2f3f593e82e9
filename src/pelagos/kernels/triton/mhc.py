"""Hyper-connections forward and backward: a warp a token walks the channels with all four streams in registers.

Products with fn are torch's, on BFloat16 parts of what is float32; Sinkhorn has a token a thread and keeps the divisors
of rows and columns instead of iterates. Sums over tokens go through partial buffers in a fixed order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 4  # a program that walks channels, a warp each
GATES = 128  # tokens a program of the gates, a thread each


@triton.jit
def _one(base, token, live, K: tl.constexpr, STRIDE: tl.constexpr):
    return tl.load(base + token * STRIDE + K, mask=live, other=0.0)


@triton.jit
def _tile(base, token, column, live, K: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """float32 tile of stream K of (T, COUNT, WIDTH)."""
    place = token.to(tl.int64)[:, None] * (COUNT * WIDTH) + K * WIDTH + column[None, :]
    return tl.load(base + place, mask=live[:, None] & (column < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _put(base, value, token, column, live, K: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    place = token.to(tl.int64)[:, None] * (COUNT * WIDTH) + K * WIDTH + column[None, :]
    tl.store(base + place, value.to(base.dtype.element_ty), mask=live[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _weighed(base, token, live, tiles, FIRST: tl.constexpr, STEP: tl.constexpr, STRIDE: tl.constexpr):
    """Four tiles weighed by every STEP-th of a token's numbers from FIRST on."""
    total = _one(base, token, live, FIRST, STRIDE)[:, None] * tiles[0]
    for k in tl.static_range(1, 4):
        total += _one(base, token, live, FIRST + k * STEP, STRIDE)[:, None] * tiles[k]
    return total


@triton.jit
def _enter_kernel(
    y, post, comb, streams, out, square, count,
    WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PENDING: tl.constexpr,
):  # fmt: skip
    """Streams after what is pending, and the sum of their squares a token."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    live, squares = token < count, tl.zeros((BT,), tl.float32)
    for begin in range(0, WIDTH, BD):
        column = begin + tl.arange(0, BD)
        if PENDING:
            tiles = [_tile(streams, token, column, live, k, 4, WIDTH) for k in (0, 1, 2, 3)]
            own = _tile(y, token, column, live, 0, 1, WIDTH)
        for k in tl.static_range(4):
            if PENDING:
                value = _weighed(comb, token, live, tiles, k, 4, 16)
                value = (_one(post, token, live, k, 4)[:, None] * own + value).to(out.dtype.element_ty)
                _put(out, value, token, column, live, k, 4, WIDTH)
                value = value.to(tl.float32)
            else:
                value = _tile(streams, token, column, live, k, 4, WIDTH)
            squares += tl.sum(value * value, 1)
    tl.store(square + token, squares, mask=live)


@triton.jit
def _logit(mix, base, scale, token, live, root, C: tl.constexpr):
    return tl.load(mix + token * 24 + C, mask=live, other=0.0) * root * scale + tl.load(base + C)


@triton.jit
def _row(mix, base, scale, token, live, root, eps, C: tl.constexpr):
    """A row of the matrix before Sinkhorn: softmax of four logits, plus eps."""
    x = [_logit(mix, base, scale, token, live, root, C + k) for k in (0, 1, 2, 3)]
    top = tl.maximum(tl.maximum(x[0], x[1]), tl.maximum(x[2], x[3]))
    x = [tl.exp(each - top) for each in x]
    total = x[0] + x[1] + x[2] + x[3]
    return [each / total + eps for each in x]


@triton.jit
def _dot(a, p):
    return a[0] * p[0] + a[1] * p[1] + a[2] * p[2] + a[3] * p[3]


@triton.jit
def _columns(rows):
    """Four rows of four as columns, or columns as rows."""
    return [[row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], [row[3] for row in rows]]


@triton.jit
def _keep(base, token, live, four):
    for k in tl.static_range(4):
        tl.store(base + token * 4 + k, four[k], mask=live)


@triton.jit
def _kept(base, token, live):
    """Four kept divisors as factors."""
    found = [tl.load(base + token * 4 + k, mask=live, other=1.0) for k in (0, 1, 2, 3)]
    return [1 / each for each in found]


@triton.jit
def _root(square, token, live, norm_eps, WIDTH: tl.constexpr):
    return tl.rsqrt(tl.load(square + token, mask=live, other=1.0) / (4 * WIDTH) + norm_eps)


@triton.jit
def _gates_kernel(
    mix, square, base, scale, pre, post, comb, divisors, count, eps, norm_eps,
    WIDTH: tl.constexpr, ITERS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """divisors (2 ITERS - 1, T, 4): of columns, then of rows and columns in turn; a cell is divided by both of its."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    live = token < count
    root = _root(square, token, live, norm_eps, WIDTH)
    first, second, third = tl.load(scale), tl.load(scale + 1), tl.load(scale + 2)
    for n in tl.static_range(4):
        gate = _logit(mix, base, first, token, live, root, n)
        tl.store(pre + token * 4 + n, 1 / (1 + tl.exp(-gate)) + eps, mask=live)
        gate = _logit(mix, base, second, token, live, root, 4 + n)
        tl.store(post + token * 4 + n, 2 / (1 + tl.exp(-gate)), mask=live)
    k = [_row(mix, base, third, token, live, root, eps, c) for c in (8, 12, 16, 20)]
    c = _columns(k)
    p = [tl.full((BT,), 1.0, tl.float32) for _ in (0, 1, 2, 3)]  # what rows are divided by
    w = [c[j][0] + c[j][1] + c[j][2] + c[j][3] + eps for j in (0, 1, 2, 3)]  # what columns are
    _keep(divisors, token, live, w)
    for i in range(ITERS - 1):
        by = [1 / w[j] for j in (0, 1, 2, 3)]
        p = [_dot(k[j], by) + eps * p[j] for j in (0, 1, 2, 3)]
        _keep(divisors + (2 * i + 1) * count * 4, token, live, p)
        by = [1 / p[j] for j in (0, 1, 2, 3)]
        w = [_dot(c[j], by) + eps * w[j] for j in (0, 1, 2, 3)]
        _keep(divisors + (2 * i + 2) * count * 4, token, live, w)
    for i in tl.static_range(4):
        _keep(comb + 4 * i, 4 * token, live, [k[i][j] / (p[i] * w[j]) for j in (0, 1, 2, 3)])


@triton.jit
def _collapse_kernel(streams, pre, x, count, WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    token, column = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD)
    live = token < count
    total = _one(pre, token, live, 0, 4)[:, None] * _tile(streams, token, column, live, 0, 4, WIDTH)
    for k in tl.static_range(1, 4):
        total += _one(pre, token, live, k, 4)[:, None] * _tile(streams, token, column, live, k, 4, WIDTH)
    _put(x, total, token, column, live, 0, 1, WIDTH)


@triton.jit
def _pre_grad_kernel(streams, grad_x, grad_pre, count, WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    live, sums = token < count, [tl.zeros((BT,), tl.float32) for _ in (0, 1, 2, 3)]
    for begin in range(0, WIDTH, BD):
        column = begin + tl.arange(0, BD)
        g = _tile(grad_x, token, column, live, 0, 1, WIDTH)
        sums = [sums[k] + tl.sum(g * _tile(streams, token, column, live, k, 4, WIDTH), 1) for k in (0, 1, 2, 3)]
    _keep(grad_pre, token, live, sums)


@triton.jit
def _leave(g, mix, scale, grad_mix, out, token, live, root, C: tl.constexpr):
    """Gradient g of a logit: sums for base and scale, on to the raw mix; return its part of the root's gradient."""
    raw, g = tl.load(mix + token * 24 + C, mask=live, other=0.0), tl.where(live, g, 0.0)
    tl.store(out + C, tl.sum(g, 0))
    tl.store(out + 24 + C, tl.sum(g * raw * root, 0))
    tl.store(grad_mix + token * 24 + C, g * scale * root, mask=live)
    return g * scale * raw


@triton.jit
def _row_leaves(g, k, eps, mix, scale, grad_mix, out, token, live, root, C: tl.constexpr):
    """`_leave` of a row whose softmax, plus eps, is k with gradient g."""
    p = [each - eps for each in k]
    mean = _dot(g, p)
    inner = _leave(p[0] * (g[0] - mean), mix, scale, grad_mix, out, token, live, root, C)
    for j in tl.static_range(1, 4):
        inner += _leave(p[j] * (g[j] - mean), mix, scale, grad_mix, out, token, live, root, C + j)
    return inner


@triton.jit
def _before(g, k, own, by):
    """Gradient before one column (or row) k was divided by 1 / own, from g behind; by: what else divides, if any."""
    t = _dot(k, g) * own
    return [g[i] - (t if by is None else t * by[i]) for i in (0, 1, 2, 3)]


@triton.jit
def _gates_grad_kernel(
    grad_pre, grad_post, grad_comb, mix, square, base, scale, pre, post, divisors, grad_mix, grad_square, parts,
    count, eps, norm_eps, WIDTH: tl.constexpr, ITERS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gradients of raw mix logits and squares; parts (programs, 48): sums of logits' gradients, and of these x mix."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    live, out = token < count, parts + tl.program_id(0) * 48
    root, inner = _root(square, token, live, norm_eps, WIDTH), tl.zeros((BT,), tl.float32)
    first, second, third = tl.load(scale), tl.load(scale + 1), tl.load(scale + 2)
    for n in tl.static_range(4):
        s = _one(pre, token, live, n, 4) - eps
        g = _one(grad_pre, token, live, n, 4) * s * (1 - s)
        inner += _leave(g, mix, first, grad_mix, out, token, live, root, n)
        s = _one(post, token, live, n, 4) * 0.5
        g = _one(grad_post, token, live, n, 4) * 2 * s * (1 - s)
        inner += _leave(g, mix, second, grad_mix, out, token, live, root, 4 + n)
    k = [_row(mix, base, third, token, live, root, eps, c) for c in (8, 12, 16, 20)]
    c = _columns(k)
    p = [tl.full((BT,), 1.0, tl.float32) for _ in (0, 1, 2, 3)]
    if ITERS > 1:
        p = _kept(divisors + (2 * ITERS - 3) * count * 4, token, live)
    w = _kept(divisors + (2 * ITERS - 2) * count * 4, token, live)
    grads = [[_one(grad_comb, token, live, 4 * i + j, 16) * p[i] * w[j] for j in (0, 1, 2, 3)]
             for i in (0, 1, 2, 3)]  # fmt: skip
    for step in range(ITERS - 1):
        turn, down = ITERS - 2 - step, _columns(grads)
        grads = _columns([_before(down[n], c[n], w[n], p) for n in (0, 1, 2, 3)])
        w = _kept(divisors + 2 * turn * count * 4, token, live)
        grads = [_before(grads[n], k[n], p[n], w) for n in (0, 1, 2, 3)]
        p = _kept(divisors + tl.maximum(2 * turn - 1, 0) * count * 4, token, live)
    down = _columns(grads)
    grads = _columns([_before(down[n], c[n], w[n], None) for n in (0, 1, 2, 3)])
    for n in tl.static_range(4):
        inner += _row_leaves(grads[n], k[n], eps, mix, third, grad_mix, out, token, live, root, 8 + 4 * n)
    tl.store(grad_square + token, inner * root * root * root * (-0.5 / (4 * WIDTH)), mask=live)


@triton.jit
def _reaching(
    grad_out, g_x, out, pre, by_mix, doubled, token, column, live, K: tl.constexpr, WIDTH: tl.constexpr,
    MIX: tl.constexpr,
):  # fmt: skip
    """Gradient of stream K after what is pending: from behind, through x, through the norm and the mix logits."""
    g = _tile(grad_out, token, column, live, K, 4, WIDTH)
    if MIX:
        g += _one(pre, token, live, K, 4)[:, None] * g_x + doubled * _tile(out, token, column, live, K, 4, WIDTH)
        g += _tile(by_mix, token, column, live, K, 4, WIDTH)
    return g


@triton.jit
def _met(g, tiles, sums):
    """g, and sums plus its products with y and the streams before."""
    return g, [sums[i] + tl.sum(g * tiles[i], 1) for i in (0, 1, 2, 3, 4)]


@triton.jit
def _streams_grad_kernel(
    grad_out, grad_x, y, post, comb, streams, out, pre, by_mix, grad_square, grad_y, grad_post, grad_comb, grad_streams,
    count, WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PENDING: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    """by_mix (T, 4, WIDTH): what reaches the streams through the mix logits."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    live, doubled = token < count, tl.zeros((BT, 1), tl.float32)
    if MIX:
        doubled = 2 * tl.load(grad_square + token, mask=live, other=0.0)[:, None]
    if PENDING:  # of each stream after: its products with y and the streams before
        sums = [[tl.zeros((BT,), tl.float32) for _ in (0, 1, 2, 3, 4)] for _ in (0, 1, 2, 3)]
    for begin in range(0, WIDTH, BD):
        column = begin + tl.arange(0, BD)
        g_x = tl.zeros((BT, BD), tl.float32)
        if MIX:
            g_x = _tile(grad_x, token, column, live, 0, 1, WIDTH)
        if PENDING:
            s = [_tile(streams, token, column, live, k, 4, WIDTH) for k in (0, 1, 2, 3)]
            tiles = (_tile(y, token, column, live, 0, 1, WIDTH), s[0], s[1], s[2], s[3])
            found = [_met(_reaching(grad_out, g_x, out, pre, by_mix, doubled, token, column, live, k, WIDTH, MIX),
                          tiles, sums[k]) for k in (0, 1, 2, 3)]  # fmt: skip
            grads, sums = [found[k][0] for k in (0, 1, 2, 3)], [found[k][1] for k in (0, 1, 2, 3)]
            for j in tl.static_range(4):
                d = _weighed(comb, token, live, grads, 4 * j, 1, 16)
                _put(grad_streams, d, token, column, live, j, 4, WIDTH)
            d = _one(post, token, live, 0, 4)[:, None] * grads[0] + _one(post, token, live, 1, 4)[:, None] * grads[1]
            d += _one(post, token, live, 2, 4)[:, None] * grads[2] + _one(post, token, live, 3, 4)[:, None] * grads[3]
            _put(grad_y, d, token, column, live, 0, 1, WIDTH)
        else:
            for k in tl.static_range(4):
                g = _reaching(grad_out, g_x, out, pre, by_mix, doubled, token, column, live, k, WIDTH, MIX)
                _put(grad_streams, g, token, column, live, k, 4, WIDTH)
    if PENDING:
        _keep(grad_post, token, live, [sums[k][0] for k in (0, 1, 2, 3)])
        for j in tl.static_range(4):
            _keep(grad_comb + 4 * j, 4 * token, live, [sums[k][j + 1] for k in (0, 1, 2, 3)])


def _parts(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (R, C) float32 as rows (2R, C) of BFloat16 that add up to it to 2^-17, or as it is for other dtypes."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    upper = x.to(dtype)
    return torch.cat((upper, (x - upper.float()).to(dtype)))


def _product(x: Tensor, other: Tensor) -> Tensor:
    """x (M, K) times other (K, N), summed and returned in float32."""
    return torch.mm(x, other, out_dtype=torch.float32) if x.is_cuda and x.dtype == torch.bfloat16 else x @ other


def _shapes(width: int) -> dict[str, int]:
    """Of a program: tokens and channels a step."""
    return {"WIDTH": width, "BT": TOKENS, "BD": min(256, triton.next_power_of_2(width))}


class Site(torch.autograd.Function):
    """`kernels.mhc.site` over flat tokens; without fn it is `leave` and all but the streams is empty."""

    @staticmethod
    def forward(ctx: Any, y, post, comb, streams, fn, base, scale, iters, eps, norm_eps):
        count, _, width = streams.shape
        out = torch.empty_like(streams) if y is not None else streams.clone()
        floats = {"device": streams.device, "dtype": torch.float32}
        square, shapes = torch.empty(count, **floats), _shapes(width)
        grid, there = (triton.cdiv(count, TOKENS),), 0 if fn is None else count
        _enter_kernel[grid](y, post, comb, streams, out, square, count, PENDING=y is not None, **shapes)
        mix, x = torch.empty(there, 24, **floats), streams.new_empty(there, width)
        pre, new_post = torch.empty(there, 4, **floats), torch.empty(there, 4, **floats)
        new_comb, divisors = torch.empty(there, 4, 4, **floats), torch.empty(max(0, 2 * iters - 1), there, 4, **floats)
        if fn is not None:
            both = _product(out.view(count, -1), _parts(fn, out.dtype).T)
            mix = both if both.shape[1] == 24 else both[:, :24] + both[:, 24:]
            _gates_kernel[(triton.cdiv(count, GATES),)](
                mix, square, base, scale, pre, new_post, new_comb, divisors, count, eps, norm_eps,
                WIDTH=width, ITERS=iters, BT=GATES,
            )  # fmt: skip
            _collapse_kernel[(*grid, triton.cdiv(width, shapes["BD"]))](out, pre, x, count, **shapes)
        before = (y, post, comb, streams if y is not None else None)
        ctx.save_for_backward(*before, out, fn, base, scale, mix, square, pre, new_post, divisors)
        ctx.norm_eps, ctx.eps = norm_eps, eps
        return out, x, new_post, new_comb

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        y, post, comb, streams, out, fn, base, scale, mix, square, pre, new_post, divisors = ctx.saved_tensors
        count, _, width = out.shape
        grad_out, grad_x, grad_new_post, grad_new_comb = (None if g is None else g.contiguous() for g in grads)
        grid, shapes = (triton.cdiv(count, TOKENS),), _shapes(width)
        grad_fn = grad_base = grad_scale = by_mix = grad_square = None
        if fn is not None:
            grad_pre, grad_mix, grad_square = torch.empty_like(pre), torch.empty_like(mix), torch.empty_like(square)
            _pre_grad_kernel[grid](out, grad_x, grad_pre, count, **shapes)
            programs = triton.cdiv(count, GATES)
            parts = mix.new_empty(programs, 48)
            _gates_grad_kernel[(programs,)](
                grad_pre, grad_new_post, grad_new_comb, mix, square, base, scale, pre, new_post, divisors, grad_mix,
                grad_square, parts, count, ctx.eps, ctx.norm_eps, WIDTH=width, ITERS=(len(divisors) + 1) // 2, BT=GATES,
            )  # fmt: skip
            grad_base, by_scale = parts.sum(0).split(24)
            grad_scale = torch.stack([part.sum() for part in by_scale.split([4, 4, 16])])
            both = _product(_parts(grad_mix.T, out.dtype), out.view(count, -1))
            grad_fn = both if len(both) == 24 else both[:24] + both[24:]
            by_mix = torch.mm(grad_mix.to(out.dtype), fn.to(out.dtype))
        grad_streams = torch.empty_like(out)
        grad_y, grad_post, grad_comb = (None if t is None else torch.empty_like(t) for t in (y, post, comb))
        _streams_grad_kernel[grid](
            grad_out, grad_x, y, post, comb, streams, out, pre, by_mix, grad_square,
            grad_y, grad_post, grad_comb, grad_streams, count, PENDING=y is not None, MIX=fn is not None, **shapes,
        )  # fmt: skip
        return grad_y, grad_post, grad_comb, grad_streams, grad_fn, grad_base, grad_scale, None, None, None
