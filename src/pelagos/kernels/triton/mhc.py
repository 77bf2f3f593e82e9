"""Hyper-connections forward and backward: a warp a token walks the channels with all four streams in registers.

Products with fn are torch's, on BFloat16 parts of what is float32; Sinkhorn has a token a thread and keeps the divisors
of rows and columns instead of iterates. Sums over tokens go through partial buffers in a fixed order: no atomics.
"""
# Inside a kernel Triton turns Python numbers into constexpr and blocks into tensors; its annotations say neither.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

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
def _enter_kernel(
    y, post, comb, streams, out, square, count,
    WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PENDING: tl.constexpr,
):  # fmt: skip
    """Streams after what is pending, and the sum of their squares a token."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    live, squares = token < count, tl.zeros((BT,), tl.float32)
    for begin in range(0, WIDTH, BD):
        column = begin + tl.arange(0, BD)
        s0, s1 = _tile(streams, token, column, live, 0, 4, WIDTH), _tile(streams, token, column, live, 1, 4, WIDTH)
        s2, s3 = _tile(streams, token, column, live, 2, 4, WIDTH), _tile(streams, token, column, live, 3, 4, WIDTH)
        if PENDING:
            own = _tile(y, token, column, live, 0, 1, WIDTH)
        for k in tl.static_range(4):
            if PENDING:
                value = _one(comb, token, live, k, 16)[:, None] * s0 + _one(comb, token, live, 4 + k, 16)[:, None] * s1
                value += _one(comb, token, live, 8 + k, 16)[:, None] * s2
                value += _one(comb, token, live, 12 + k, 16)[:, None] * s3
                value = _one(post, token, live, k, 4)[:, None] * own + value
                value = value.to(out.dtype.element_ty)
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
    a, b = _logit(mix, base, scale, token, live, root, C), _logit(mix, base, scale, token, live, root, C + 1)
    c, d = _logit(mix, base, scale, token, live, root, C + 2), _logit(mix, base, scale, token, live, root, C + 3)
    top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - top), tl.exp(b - top), tl.exp(c - top), tl.exp(d - top)
    total = a + b + c + d
    return a / total + eps, b / total + eps, c / total + eps, d / total + eps


@triton.jit
def _dot(a, b, c, d, p, q, r, s):
    return a * p + b * q + c * r + d * s


@triton.jit
def _keep(base, token, live, a, b, c, d):
    tl.store(base + token * 4, a, mask=live)
    tl.store(base + token * 4 + 1, b, mask=live)
    tl.store(base + token * 4 + 2, c, mask=live)
    tl.store(base + token * 4 + 3, d, mask=live)


@triton.jit
def _kept(base, token, live):
    """Four kept divisors as factors."""
    a, b = tl.load(base + token * 4, mask=live, other=1.0), tl.load(base + token * 4 + 1, mask=live, other=1.0)
    c, d = tl.load(base + token * 4 + 2, mask=live, other=1.0), tl.load(base + token * 4 + 3, mask=live, other=1.0)
    return 1 / a, 1 / b, 1 / c, 1 / d


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
    k00, k01, k02, k03 = _row(mix, base, third, token, live, root, eps, 8)
    k10, k11, k12, k13 = _row(mix, base, third, token, live, root, eps, 12)
    k20, k21, k22, k23 = _row(mix, base, third, token, live, root, eps, 16)
    k30, k31, k32, k33 = _row(mix, base, third, token, live, root, eps, 20)
    p0, p1 = tl.full((BT,), 1.0, tl.float32), tl.full((BT,), 1.0, tl.float32)
    p2, p3 = tl.full((BT,), 1.0, tl.float32), tl.full((BT,), 1.0, tl.float32)
    w0 = k00 + k10 + k20 + k30 + eps
    w1 = k01 + k11 + k21 + k31 + eps
    w2 = k02 + k12 + k22 + k32 + eps
    w3 = k03 + k13 + k23 + k33 + eps
    _keep(divisors, token, live, w0, w1, w2, w3)
    for i in range(ITERS - 1):
        a, b, c, d = 1 / w0, 1 / w1, 1 / w2, 1 / w3
        p0 = _dot(k00, k01, k02, k03, a, b, c, d) + eps * p0
        p1 = _dot(k10, k11, k12, k13, a, b, c, d) + eps * p1
        p2 = _dot(k20, k21, k22, k23, a, b, c, d) + eps * p2
        p3 = _dot(k30, k31, k32, k33, a, b, c, d) + eps * p3
        _keep(divisors + (2 * i + 1) * count * 4, token, live, p0, p1, p2, p3)
        a, b, c, d = 1 / p0, 1 / p1, 1 / p2, 1 / p3
        w0 = _dot(k00, k10, k20, k30, a, b, c, d) + eps * w0
        w1 = _dot(k01, k11, k21, k31, a, b, c, d) + eps * w1
        w2 = _dot(k02, k12, k22, k32, a, b, c, d) + eps * w2
        w3 = _dot(k03, k13, k23, k33, a, b, c, d) + eps * w3
        _keep(divisors + (2 * i + 2) * count * 4, token, live, w0, w1, w2, w3)
    _keep(comb + 0, 4 * token, live, k00 / (p0 * w0), k01 / (p0 * w1), k02 / (p0 * w2), k03 / (p0 * w3))
    _keep(comb + 4, 4 * token, live, k10 / (p1 * w0), k11 / (p1 * w1), k12 / (p1 * w2), k13 / (p1 * w3))
    _keep(comb + 8, 4 * token, live, k20 / (p2 * w0), k21 / (p2 * w1), k22 / (p2 * w2), k23 / (p2 * w3))
    _keep(comb + 12, 4 * token, live, k30 / (p3 * w0), k31 / (p3 * w1), k32 / (p3 * w2), k33 / (p3 * w3))


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
    live = token < count
    a, b = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    c, d = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    for begin in range(0, WIDTH, BD):
        column = begin + tl.arange(0, BD)
        g = _tile(grad_x, token, column, live, 0, 1, WIDTH)
        a += tl.sum(g * _tile(streams, token, column, live, 0, 4, WIDTH), 1)
        b += tl.sum(g * _tile(streams, token, column, live, 1, 4, WIDTH), 1)
        c += tl.sum(g * _tile(streams, token, column, live, 2, 4, WIDTH), 1)
        d += tl.sum(g * _tile(streams, token, column, live, 3, 4, WIDTH), 1)
    _keep(grad_pre, token, live, a, b, c, d)


@triton.jit
def _leave(g, mix, scale, grad_mix, out, token, live, root, C: tl.constexpr):
    """Gradient g of a logit: sums for base and scale, on to the raw mix; return its part of the root's gradient."""
    raw, g = tl.load(mix + token * 24 + C, mask=live, other=0.0), tl.where(live, g, 0.0)
    tl.store(out + C, tl.sum(g, 0))
    tl.store(out + 24 + C, tl.sum(g * raw * root, 0))
    tl.store(grad_mix + token * 24 + C, g * scale * root, mask=live)
    return g * scale * raw


@triton.jit
def _row_leaves(a, b, c, d, p, q, r, s, eps, mix, scale, grad_mix, out, token, live, root, C: tl.constexpr):
    """`_leave` of a row whose softmax, plus eps, is p, q, r, s with gradient a, b, c, d."""
    p, q, r, s = p - eps, q - eps, r - eps, s - eps
    mean = _dot(a, b, c, d, p, q, r, s)
    inner = _leave(p * (a - mean), mix, scale, grad_mix, out, token, live, root, C)
    inner += _leave(q * (b - mean), mix, scale, grad_mix, out, token, live, root, C + 1)
    inner += _leave(r * (c - mean), mix, scale, grad_mix, out, token, live, root, C + 2)
    return inner + _leave(s * (d - mean), mix, scale, grad_mix, out, token, live, root, C + 3)


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
    k00, k01, k02, k03 = _row(mix, base, third, token, live, root, eps, 8)
    k10, k11, k12, k13 = _row(mix, base, third, token, live, root, eps, 12)
    k20, k21, k22, k23 = _row(mix, base, third, token, live, root, eps, 16)
    k30, k31, k32, k33 = _row(mix, base, third, token, live, root, eps, 20)
    p0, p1 = tl.full((BT,), 1.0, tl.float32), tl.full((BT,), 1.0, tl.float32)
    p2, p3 = tl.full((BT,), 1.0, tl.float32), tl.full((BT,), 1.0, tl.float32)
    if ITERS > 1:
        p0, p1, p2, p3 = _kept(divisors + (2 * ITERS - 3) * count * 4, token, live)
    w0, w1, w2, w3 = _kept(divisors + (2 * ITERS - 2) * count * 4, token, live)
    g00, g01 = _one(grad_comb, token, live, 0, 16) * p0 * w0, _one(grad_comb, token, live, 1, 16) * p0 * w1
    g02, g03 = _one(grad_comb, token, live, 2, 16) * p0 * w2, _one(grad_comb, token, live, 3, 16) * p0 * w3
    g10, g11 = _one(grad_comb, token, live, 4, 16) * p1 * w0, _one(grad_comb, token, live, 5, 16) * p1 * w1
    g12, g13 = _one(grad_comb, token, live, 6, 16) * p1 * w2, _one(grad_comb, token, live, 7, 16) * p1 * w3
    g20, g21 = _one(grad_comb, token, live, 8, 16) * p2 * w0, _one(grad_comb, token, live, 9, 16) * p2 * w1
    g22, g23 = _one(grad_comb, token, live, 10, 16) * p2 * w2, _one(grad_comb, token, live, 11, 16) * p2 * w3
    g30, g31 = _one(grad_comb, token, live, 12, 16) * p3 * w0, _one(grad_comb, token, live, 13, 16) * p3 * w1
    g32, g33 = _one(grad_comb, token, live, 14, 16) * p3 * w2, _one(grad_comb, token, live, 15, 16) * p3 * w3
    for j in range(ITERS - 1):
        i = ITERS - 2 - j
        t = _dot(k00, k10, k20, k30, g00, g10, g20, g30) * w0
        g00, g10, g20, g30 = g00 - t * p0, g10 - t * p1, g20 - t * p2, g30 - t * p3
        t = _dot(k01, k11, k21, k31, g01, g11, g21, g31) * w1
        g01, g11, g21, g31 = g01 - t * p0, g11 - t * p1, g21 - t * p2, g31 - t * p3
        t = _dot(k02, k12, k22, k32, g02, g12, g22, g32) * w2
        g02, g12, g22, g32 = g02 - t * p0, g12 - t * p1, g22 - t * p2, g32 - t * p3
        t = _dot(k03, k13, k23, k33, g03, g13, g23, g33) * w3
        g03, g13, g23, g33 = g03 - t * p0, g13 - t * p1, g23 - t * p2, g33 - t * p3
        w0, w1, w2, w3 = _kept(divisors + 2 * i * count * 4, token, live)
        t = _dot(k00, k01, k02, k03, g00, g01, g02, g03) * p0
        g00, g01, g02, g03 = g00 - t * w0, g01 - t * w1, g02 - t * w2, g03 - t * w3
        t = _dot(k10, k11, k12, k13, g10, g11, g12, g13) * p1
        g10, g11, g12, g13 = g10 - t * w0, g11 - t * w1, g12 - t * w2, g13 - t * w3
        t = _dot(k20, k21, k22, k23, g20, g21, g22, g23) * p2
        g20, g21, g22, g23 = g20 - t * w0, g21 - t * w1, g22 - t * w2, g23 - t * w3
        t = _dot(k30, k31, k32, k33, g30, g31, g32, g33) * p3
        g30, g31, g32, g33 = g30 - t * w0, g31 - t * w1, g32 - t * w2, g33 - t * w3
        p0, p1, p2, p3 = _kept(divisors + tl.maximum(2 * i - 1, 0) * count * 4, token, live)
    t = _dot(k00, k10, k20, k30, g00, g10, g20, g30) * w0
    g00, g10, g20, g30 = g00 - t, g10 - t, g20 - t, g30 - t
    t = _dot(k01, k11, k21, k31, g01, g11, g21, g31) * w1
    g01, g11, g21, g31 = g01 - t, g11 - t, g21 - t, g31 - t
    t = _dot(k02, k12, k22, k32, g02, g12, g22, g32) * w2
    g02, g12, g22, g32 = g02 - t, g12 - t, g22 - t, g32 - t
    t = _dot(k03, k13, k23, k33, g03, g13, g23, g33) * w3
    g03, g13, g23, g33 = g03 - t, g13 - t, g23 - t, g33 - t
    inner += _row_leaves(g00, g01, g02, g03, k00, k01, k02, k03, eps, mix, third, grad_mix, out, token, live, root, 8)
    inner += _row_leaves(g10, g11, g12, g13, k10, k11, k12, k13, eps, mix, third, grad_mix, out, token, live, root, 12)
    inner += _row_leaves(g20, g21, g22, g23, k20, k21, k22, k23, eps, mix, third, grad_mix, out, token, live, root, 16)
    inner += _row_leaves(g30, g31, g32, g33, k30, k31, k32, k33, eps, mix, third, grad_mix, out, token, live, root, 20)
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
def _streams_grad_kernel(
    grad_out, grad_x, y, post, comb, streams, out, pre, by_mix, grad_square,
    grad_y, grad_post, grad_comb, grad_streams, count,
    WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PENDING: tl.constexpr, MIX: tl.constexpr,
):  # fmt: skip
    """by_mix (T, 4, WIDTH): what reaches the streams through the mix logits."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    live, doubled = token < count, tl.zeros((BT, 1), tl.float32)
    if MIX:
        doubled = 2 * tl.load(grad_square + token, mask=live, other=0.0)[:, None]
    if PENDING:
        b00, b10, b20 = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
        b30, b40 = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
        b01, b11, b21 = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
        b31, b41 = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
        b02, b12, b22 = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
        b32, b42 = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
        b03, b13, b23 = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
        b33, b43 = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    for begin in range(0, WIDTH, BD):
        column = begin + tl.arange(0, BD)
        g_x = tl.zeros((BT, BD), tl.float32)
        if MIX:
            g_x = _tile(grad_x, token, column, live, 0, 1, WIDTH)
        if PENDING:
            s0, s1 = _tile(streams, token, column, live, 0, 4, WIDTH), _tile(streams, token, column, live, 1, 4, WIDTH)
            s2, s3 = _tile(streams, token, column, live, 2, 4, WIDTH), _tile(streams, token, column, live, 3, 4, WIDTH)
            own = _tile(y, token, column, live, 0, 1, WIDTH)
            g0 = _reaching(grad_out, g_x, out, pre, by_mix, doubled, token, column, live, 0, WIDTH, MIX)
            b00, b10, b20 = b00 + tl.sum(g0 * own, 1), b10 + tl.sum(g0 * s0, 1), b20 + tl.sum(g0 * s1, 1)
            b30, b40 = b30 + tl.sum(g0 * s2, 1), b40 + tl.sum(g0 * s3, 1)
            g1 = _reaching(grad_out, g_x, out, pre, by_mix, doubled, token, column, live, 1, WIDTH, MIX)
            b01, b11, b21 = b01 + tl.sum(g1 * own, 1), b11 + tl.sum(g1 * s0, 1), b21 + tl.sum(g1 * s1, 1)
            b31, b41 = b31 + tl.sum(g1 * s2, 1), b41 + tl.sum(g1 * s3, 1)
            g2 = _reaching(grad_out, g_x, out, pre, by_mix, doubled, token, column, live, 2, WIDTH, MIX)
            b02, b12, b22 = b02 + tl.sum(g2 * own, 1), b12 + tl.sum(g2 * s0, 1), b22 + tl.sum(g2 * s1, 1)
            b32, b42 = b32 + tl.sum(g2 * s2, 1), b42 + tl.sum(g2 * s3, 1)
            g3 = _reaching(grad_out, g_x, out, pre, by_mix, doubled, token, column, live, 3, WIDTH, MIX)
            b03, b13, b23 = b03 + tl.sum(g3 * own, 1), b13 + tl.sum(g3 * s0, 1), b23 + tl.sum(g3 * s1, 1)
            b33, b43 = b33 + tl.sum(g3 * s2, 1), b43 + tl.sum(g3 * s3, 1)
            for j in tl.static_range(4):
                d = (
                    _one(comb, token, live, 4 * j, 16)[:, None] * g0
                    + _one(comb, token, live, 4 * j + 1, 16)[:, None] * g1
                )
                d += _one(comb, token, live, 4 * j + 2, 16)[:, None] * g2
                d += _one(comb, token, live, 4 * j + 3, 16)[:, None] * g3
                _put(grad_streams, d, token, column, live, j, 4, WIDTH)
            d = _one(post, token, live, 0, 4)[:, None] * g0 + _one(post, token, live, 1, 4)[:, None] * g1
            d += _one(post, token, live, 2, 4)[:, None] * g2 + _one(post, token, live, 3, 4)[:, None] * g3
            _put(grad_y, d, token, column, live, 0, 1, WIDTH)
        else:
            for k in tl.static_range(4):
                g = _reaching(grad_out, g_x, out, pre, by_mix, doubled, token, column, live, k, WIDTH, MIX)
                _put(grad_streams, g, token, column, live, k, 4, WIDTH)
    if PENDING:
        _keep(grad_post, token, live, b00, b01, b02, b03)
        _keep(grad_comb + 0, 4 * token, live, b10, b11, b12, b13)
        _keep(grad_comb + 4, 4 * token, live, b20, b21, b22, b23)
        _keep(grad_comb + 8, 4 * token, live, b30, b31, b32, b33)
        _keep(grad_comb + 12, 4 * token, live, b40, b41, b42, b43)


def _parts(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (R, C) float32 as rows (2R, C) of BFloat16 that add up to it to 2^-17, or as it is for other dtypes."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    upper = x.to(dtype)
    return torch.cat((upper, (x - upper.float()).to(dtype)))


def _product(x: Tensor, other: Tensor) -> Tensor:
    """x (M, K) times other (K, N), summed and returned in float32."""
    return torch.mm(x, other, out_dtype=torch.float32) if x.is_cuda and x.dtype == torch.bfloat16 else x @ other


def _block(width: int) -> int:
    """Channels a step of a warp."""
    return min(256, triton.next_power_of_2(width))


def forward(y, post, comb, streams, fn, base, scale, iters: int, eps: float, norm_eps: float) -> tuple[Tensor, ...]:
    """Return (streams, x, post, comb, mix, square, pre, post, divisors); without fn all but the first are empty."""
    count, _, width = streams.shape
    out = torch.empty_like(streams) if y is not None else streams.clone()
    floats = {"device": streams.device, "dtype": torch.float32}
    square, shapes = torch.empty(count, **floats), {"WIDTH": width, "BT": TOKENS, "BD": _block(width)}
    grid = (triton.cdiv(count, TOKENS),)
    _enter_kernel[grid](y, post, comb, streams, out, square, count, PENDING=y is not None, **shapes)
    there = 0 if fn is None else count
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
    return out, x, new_post, new_comb, mix, square, pre, new_post, divisors


def backward(saved: tuple, grads: tuple, eps: float, norm_eps: float) -> tuple[Tensor | None, ...]:
    """Return the gradients of (y, post, comb, streams, fn, base, scale) from those of (streams, x, post, comb)."""
    y, post, comb, streams, out, fn, base, scale, mix, square, pre, new_post, divisors = saved
    count, _, width = out.shape
    grad_out, grad_x, grad_new_post, grad_new_comb = (None if g is None else g.contiguous() for g in grads)
    grid, shapes = (triton.cdiv(count, TOKENS),), {"WIDTH": width, "BT": TOKENS, "BD": _block(width)}
    grad_fn = grad_base = grad_scale = by_mix = grad_square = None
    if fn is not None:
        grad_pre, grad_mix, grad_square = torch.empty_like(pre), torch.empty_like(mix), torch.empty_like(square)
        _pre_grad_kernel[grid](out, grad_x, grad_pre, count, **shapes)
        programs = triton.cdiv(count, GATES)
        parts = mix.new_empty(programs, 48)
        _gates_grad_kernel[(programs,)](
            grad_pre, grad_new_post, grad_new_comb, mix, square, base, scale, pre, new_post, divisors, grad_mix,
            grad_square, parts, count, eps, norm_eps, WIDTH=width, ITERS=(len(divisors) + 1) // 2, BT=GATES,
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
    return grad_y, grad_post, grad_comb, grad_streams, grad_fn, grad_base, grad_scale
