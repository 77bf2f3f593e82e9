"""Hyper-connections forward and backward: tiles of tokens walk the channels with all four streams in registers.

Forward is three launches (streams and mix logits; gates and Sinkhorn; collapse), backward four (gradient of pre;
gates; streams and what came by them; fn). Sums over tokens go through partial buffers in a fixed order: no atomics.
"""
# Inside a kernel Triton turns Python numbers into constexpr and blocks into tensors; its annotations say neither.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.triton.formats import INTERPRETER, target

TOKENS = 32  # a tile of the walks over channels
BACK = 16  # a tile of the backward, which keeps 20 sums a token
GATES = 64  # tokens a program of the gates
SPLITS = 32  # parts of the sum over tokens for the gradient of fn


@triton.jit
def _row(base, token, live, K: tl.constexpr, STRIDE: tl.constexpr):
    return tl.load(base + token * STRIDE + K, mask=live, other=0.0)[:, None]


@triton.jit
def _tile(base, token, column, live, K: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """float32 tile of stream K of (T, COUNT, WIDTH)."""
    place = token.to(tl.int64)[:, None] * (COUNT * WIDTH) + K * WIDTH + column[None, :]
    return tl.load(base + place, mask=live[:, None], other=0.0).to(tl.float32)


@triton.jit
def _put(base, value, token, column, live, K: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    place = token.to(tl.int64)[:, None] * (COUNT * WIDTH) + K * WIDTH + column[None, :]
    tl.store(base + place, value.to(base.dtype.element_ty), mask=live[:, None])


@triton.jit
def _weights(fn, column, lane, K: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of fn, padded to 32, for channels of stream K: (32, BD)."""
    return tl.load(fn + lane[:, None] * (4 * WIDTH) + K * WIDTH + column[None, :], mask=lane[:, None] < 24, other=0.0)


@triton.jit
def _mix_kernel(
    y, post, comb, streams, fn, out, mix, square, count,
    WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PENDING: tl.constexpr, MIX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    live, lane = token < count, tl.arange(0, 32)
    total = tl.zeros((BT, 32), tl.float32)
    squares = tl.zeros((BT,), tl.float32)
    for begin in range(0, WIDTH, BD):
        column = begin + tl.arange(0, BD)
        if PENDING:
            own = _tile(y, token, column, live, 0, 1, WIDTH)
        for k in tl.static_range(4):
            if PENDING:
                value = _row(comb, token, live, k, 16) * _tile(streams, token, column, live, 0, 4, WIDTH)
                value += _row(comb, token, live, 4 + k, 16) * _tile(streams, token, column, live, 1, 4, WIDTH)
                value += _row(comb, token, live, 8 + k, 16) * _tile(streams, token, column, live, 2, 4, WIDTH)
                value += _row(comb, token, live, 12 + k, 16) * _tile(streams, token, column, live, 3, 4, WIDTH)
                value = _row(post, token, live, k, 4) * own + value
                value = value.to(out.dtype.element_ty)
                _put(out, value, token, column, live, k, 4, WIDTH)
                value = value.to(tl.float32)
            else:
                value = _tile(streams, token, column, live, k, 4, WIDTH)
            if MIX:
                weight = _weights(fn, column, lane, k, WIDTH)
                total = tl.dot(value, tl.trans(weight), total, input_precision=PRECISION)
                squares += tl.sum(value * value, 1)
    if MIX:
        tl.store(mix + token[:, None] * 24 + lane[None, :], total, mask=live[:, None] & (lane < 24)[None, :])
        tl.store(square + token, squares, mask=live)


@triton.jit
def _gates_kernel(
    mix, square, base, scale, pre, post, comb, normalisers, count, eps, norm_eps,
    WIDTH: tl.constexpr, ITERS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    token, n = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, 4)
    live = token < count
    r = tl.rsqrt(tl.load(square + token, mask=live, other=1.0) / (4 * WIDTH) + norm_eps)
    both, at = live[:, None] & (n[None, :] >= 0), token[:, None] * 24 + n[None, :]
    gate = tl.load(mix + at, mask=both, other=0.0) * r[:, None] * tl.load(scale) + tl.load(base + n)[None, :]
    tl.store(pre + token[:, None] * 4 + n[None, :], 1 / (1 + tl.exp(-gate)) + eps, mask=both)
    right = tl.load(mix + at + 4, mask=both, other=0.0) * r[:, None] * tl.load(scale + 1)
    gate = right + tl.load(base + 4 + n)[None, :]
    tl.store(post + token[:, None] * 4 + n[None, :], 2 / (1 + tl.exp(-gate)), mask=both)
    cell = n[:, None] * 4 + n[None, :]
    whole = live[:, None, None] & (cell >= 0)[None, :, :]
    m = tl.load(mix + token[:, None, None] * 24 + 8 + cell[None, :, :], mask=whole, other=0.0)
    m = m * r[:, None, None] * tl.load(scale + 2) + tl.load(base + 8 + cell)[None, :, :]
    m = tl.exp(m - tl.max(m, 2)[:, :, None])
    m = m / tl.sum(m, 2)[:, :, None] + eps
    stat = normalisers + token[:, None] * 4 + n[None, :]
    s = tl.sum(m, 1) + eps
    tl.store(stat, s, mask=both)
    m = m / s[:, None, :]
    for i in range(ITERS - 1):
        s = tl.sum(m, 2) + eps
        tl.store(stat + (2 * i + 1) * count * 4, s, mask=both)
        m = m / s[:, :, None]
        s = tl.sum(m, 1) + eps
        tl.store(stat + (2 * i + 2) * count * 4, s, mask=both)
        m = m / s[:, None, :]
    tl.store(comb + token[:, None, None] * 16 + cell[None, :, :], m, mask=whole)


@triton.jit
def _collapse_kernel(streams, pre, x, count, WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    token, column = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD)
    live = token < count
    total = _row(pre, token, live, 0, 4) * _tile(streams, token, column, live, 0, 4, WIDTH)
    for k in tl.static_range(1, 4):
        total += _row(pre, token, live, k, 4) * _tile(streams, token, column, live, k, 4, WIDTH)
    _put(x, total, token, column, live, 0, 1, WIDTH)


@triton.jit
def _pre_grad_kernel(streams, grad_x, grad_pre, count, WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    token, n = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, 4)
    live = token < count
    total = tl.zeros((BT, 4), tl.float32)
    for begin in range(0, WIDTH, BD):
        column = begin + tl.arange(0, BD)
        g = _tile(grad_x, token, column, live, 0, 1, WIDTH)
        for k in tl.static_range(4):
            part = tl.sum(g * _tile(streams, token, column, live, k, 4, WIDTH), 1)
            total += tl.where(n == k, 1.0, 0.0)[None, :] * part[:, None]
    tl.store(grad_pre + token[:, None] * 4 + n[None, :], total, mask=live[:, None] & (n[None, :] >= 0))


@triton.jit
def _gates_grad_kernel(
    grad_pre, grad_post, grad_comb, mix, square, pre, post, comb, normalisers, scale, grad_mix, grad_square, parts,
    count, eps, norm_eps, WIDTH: tl.constexpr, ITERS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gradients of raw mix logits and squares; parts (programs, 48): sums of gates' gradients, and of these x mix."""
    token, n = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, 4)
    live = token < count
    r = tl.rsqrt(tl.load(square + token, mask=live, other=1.0) / (4 * WIDTH) + norm_eps)
    both, four = live[:, None] & (n[None, :] >= 0), token[:, None] * 4 + n[None, :]
    out, at = parts + tl.program_id(0) * 48, token[:, None] * 24 + n[None, :]
    inner = tl.zeros((BT,), tl.float32)
    for half in tl.static_range(2):
        if half == 0:
            s = tl.load(pre + four, mask=both, other=0.0) - eps
            g = tl.load(grad_pre + four, mask=both, other=0.0) * s * (1 - s)
        else:
            s = tl.load(post + four, mask=both, other=0.0) * 0.5
            g = tl.load(grad_post + four, mask=both, other=0.0) * 2 * s * (1 - s)
        raw = tl.load(mix + at + 4 * half, mask=both, other=0.0)
        tl.store(out + 4 * half + n, tl.sum(g, 0))
        tl.store(out + 24 + 4 * half + n, tl.sum(g * raw * r[:, None], 0))
        g = g * tl.load(scale + half)
        inner += tl.sum(g * raw, 1)
        tl.store(grad_mix + at + 4 * half, g * r[:, None], mask=both)
    cell = n[:, None] * 4 + n[None, :]
    whole, place = live[:, None, None] & (cell >= 0)[None, :, :], token[:, None, None] * 16 + cell[None, :, :]
    m = tl.load(comb + place, mask=whole, other=0.0)
    g = tl.load(grad_comb + place, mask=whole, other=0.0)
    stat = normalisers + four
    for j in range(ITERS - 1):
        i = ITERS - 2 - j
        s = tl.load(stat + (2 * i + 2) * count * 4, mask=both, other=1.0)
        g = (g - tl.sum(g * m, 1)[:, None, :]) / s[:, None, :]
        m = m * s[:, None, :]
        s = tl.load(stat + (2 * i + 1) * count * 4, mask=both, other=1.0)
        g = (g - tl.sum(g * m, 2)[:, :, None]) / s[:, :, None]
        m = m * s[:, :, None]
    s = tl.load(stat, mask=both, other=1.0)
    g = (g - tl.sum(g * m, 1)[:, None, :]) / s[:, None, :]
    p = m * s[:, None, :] - eps
    g = tl.where(whole, p * (g - tl.sum(g * p, 2)[:, :, None]), 0.0)
    raw = tl.load(mix + token[:, None, None] * 24 + 8 + cell[None, :, :], mask=whole, other=0.0)
    tl.store(out + 8 + cell, tl.sum(g, 0))
    tl.store(out + 32 + cell, tl.sum(g * raw * r[:, None, None], 0))
    g = g * tl.load(scale + 2)
    inner += tl.sum(tl.sum(g * raw, 2), 1)
    tl.store(grad_mix + token[:, None, None] * 24 + 8 + cell[None, :, :], g * r[:, None, None], mask=whole)
    tl.store(grad_square + token, inner * r * r * r * (-0.5 / (4 * WIDTH)), mask=live)


@triton.jit
def _streams_grad_kernel(
    grad_out, grad_x, y, post, comb, streams, out, pre, grad_mix, grad_square, fn,
    grad_y, grad_post, grad_comb, grad_streams, count,
    WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PENDING: tl.constexpr, MIX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    live, lane, n = token < count, tl.arange(0, 32), tl.arange(0, 4)
    to_post, to_comb = tl.zeros((BT, 4), tl.float32), tl.zeros((BT, 16), tl.float32)
    cell = tl.arange(0, 16)
    if MIX:
        logits = tl.load(
            grad_mix + token[:, None] * 24 + lane[None, :], mask=live[:, None] & (lane < 24)[None, :], other=0.0
        )
        doubled = 2 * tl.load(grad_square + token, mask=live, other=0.0)[:, None]
    for begin in range(0, WIDTH, BD):
        column = begin + tl.arange(0, BD)
        if MIX:
            g_x = _tile(grad_x, token, column, live, 0, 1, WIDTH)
        if PENDING:
            s0, s1 = _tile(streams, token, column, live, 0, 4, WIDTH), _tile(streams, token, column, live, 1, 4, WIDTH)
            s2, s3 = _tile(streams, token, column, live, 2, 4, WIDTH), _tile(streams, token, column, live, 3, 4, WIDTH)
            own = _tile(y, token, column, live, 0, 1, WIDTH)
            d0, d1 = tl.zeros((BT, BD), tl.float32), tl.zeros((BT, BD), tl.float32)
            d2, d3, d_y = tl.zeros((BT, BD), tl.float32), tl.zeros((BT, BD), tl.float32), tl.zeros((BT, BD), tl.float32)
        for k in tl.static_range(4):
            g = _tile(grad_out, token, column, live, k, 4, WIDTH)
            if MIX:
                g += _row(pre, token, live, k, 4) * g_x + doubled * _tile(out, token, column, live, k, 4, WIDTH)
                g = tl.dot(logits, _weights(fn, column, lane, k, WIDTH), g, input_precision=PRECISION)
            if PENDING:
                d0 += _row(comb, token, live, k, 16) * g
                d1 += _row(comb, token, live, 4 + k, 16) * g
                d2 += _row(comb, token, live, 8 + k, 16) * g
                d3 += _row(comb, token, live, 12 + k, 16) * g
                d_y += _row(post, token, live, k, 4) * g
                to_post += tl.where(n == k, 1.0, 0.0)[None, :] * tl.sum(g * own, 1)[:, None]
                to_comb += tl.where(cell == k, 1.0, 0.0)[None, :] * tl.sum(g * s0, 1)[:, None]
                to_comb += tl.where(cell == 4 + k, 1.0, 0.0)[None, :] * tl.sum(g * s1, 1)[:, None]
                to_comb += tl.where(cell == 8 + k, 1.0, 0.0)[None, :] * tl.sum(g * s2, 1)[:, None]
                to_comb += tl.where(cell == 12 + k, 1.0, 0.0)[None, :] * tl.sum(g * s3, 1)[:, None]
            else:
                _put(grad_streams, g, token, column, live, k, 4, WIDTH)
        if PENDING:
            _put(grad_streams, d0, token, column, live, 0, 4, WIDTH)
            _put(grad_streams, d1, token, column, live, 1, 4, WIDTH)
            _put(grad_streams, d2, token, column, live, 2, 4, WIDTH)
            _put(grad_streams, d3, token, column, live, 3, 4, WIDTH)
            _put(grad_y, d_y, token, column, live, 0, 1, WIDTH)
    if PENDING:
        tl.store(grad_post + token[:, None] * 4 + n[None, :], to_post, mask=live[:, None] & (n[None, :] >= 0))
        tl.store(grad_comb + token[:, None] * 16 + cell[None, :], to_comb, mask=live[:, None] & (cell[None, :] >= 0))


@triton.jit
def _fn_grad_kernel(
    streams, grad_mix, parts, count, each,
    WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column, lane = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, 32)
    total = tl.zeros((32, BD), tl.float32)
    first = tl.program_id(1) * each
    for begin in range(first, first + each, BT):
        token = begin + tl.arange(0, BT)
        live = token < count
        value = tl.load(
            streams + token.to(tl.int64)[:, None] * (4 * WIDTH) + column[None, :], mask=live[:, None], other=0.0
        )
        g = tl.load(
            grad_mix + token[None, :] * 24 + lane[:, None], mask=live[None, :] & (lane < 24)[:, None], other=0.0
        )
        total = tl.dot(g, value.to(tl.float32), total, input_precision=PRECISION)
    place = (tl.program_id(1) * 24 + lane[:, None]) * (4 * WIDTH) + column[None, :]
    tl.store(parts + place, total, mask=(lane < 24)[:, None])


def _precision() -> str:
    return "ieee" if target() == INTERPRETER else "tf32x3"


def forward(y, post, comb, streams, fn, base, scale, iters: int, eps: float, norm_eps: float) -> tuple[Tensor, ...]:
    """Return (streams, x, post, comb, mix, square, pre, post, normalisers); without fn x, post, comb are empty."""
    count, _, width = streams.shape
    tiles = triton.cdiv(count, TOKENS)
    out = torch.empty_like(streams) if y is not None else streams.clone()
    floats = {"device": streams.device, "dtype": torch.float32}
    mixes = fn is not None
    mix, square = torch.empty(count if mixes else 0, 24, **floats), torch.empty(count if mixes else 0, **floats)
    shapes = {"WIDTH": width, "BT": TOKENS, "BD": 64}
    if y is not None or mixes:
        _mix_kernel[(tiles,)](
            y, post, comb, streams, fn, out, mix, square, count,
            PENDING=y is not None, MIX=mixes, PRECISION=_precision(), **shapes,
        )  # fmt: skip
    x = streams.new_empty(count if mixes else 0, width)
    pre, new_post = torch.empty(len(mix), 4, **floats), torch.empty(len(mix), 4, **floats)
    new_comb, normalisers = torch.empty(len(mix), 4, 4, **floats), torch.empty(2 * iters, len(mix), 4, **floats)
    if mixes:
        _gates_kernel[(triton.cdiv(count, GATES),)](
            mix, square, base, scale, pre, new_post, new_comb, normalisers, count, eps, norm_eps,
            WIDTH=width, ITERS=iters, BT=GATES,
        )  # fmt: skip
        _collapse_kernel[(tiles, width // 64)](out, pre, x, count, **shapes)
    return out, x, new_post, new_comb, mix, square, pre, new_post, normalisers


def backward(saved: tuple, grads: tuple, eps: float, norm_eps: float) -> tuple[Tensor | None, ...]:
    """Return the gradients of (y, post, comb, streams, fn, base, scale) from those of (streams, x, post, comb)."""
    y, post, comb, streams, out, fn, scale, new_comb, mix, square, pre, new_post, normalisers = saved
    count, _, width = out.shape
    grad_out, grad_x, grad_new_post, grad_new_comb = (None if g is None else g.contiguous() for g in grads)
    shapes = {"WIDTH": width, "BT": BACK, "BD": 64, "PRECISION": _precision()}
    grad_fn = grad_base = grad_scale = grad_mix = grad_square = None
    if fn is not None:
        grad_pre, grad_mix, grad_square = torch.empty_like(pre), torch.empty_like(mix), torch.empty_like(square)
        walk = {"WIDTH": width, "BT": TOKENS, "BD": 64}
        _pre_grad_kernel[(triton.cdiv(count, TOKENS),)](out, grad_x, grad_pre, count, **walk)
        programs = triton.cdiv(count, GATES)
        parts = mix.new_empty(programs, 48)
        _gates_grad_kernel[(programs,)](
            grad_pre, grad_new_post, grad_new_comb, mix, square, pre, new_post, new_comb, normalisers, scale, grad_mix,
            grad_square, parts, count, eps, norm_eps, WIDTH=width, ITERS=len(normalisers) // 2, BT=GATES,
        )  # fmt: skip
        sums = parts.sum(0)
        grad_base, by_mix = sums[:24], sums[24:]
        grad_scale = torch.stack([by_mix[:4].sum(), by_mix[4:8].sum(), by_mix[8:].sum()])
        each = triton.cdiv(triton.cdiv(count, SPLITS), 32) * 32
        splits = triton.cdiv(count, each)
        partial = mix.new_empty(splits, 24, 4 * width)
        _fn_grad_kernel[(4 * width // 64, splits)](
            out, grad_mix, partial, count, each, WIDTH=width, BT=32, BD=64, PRECISION=_precision()
        )
        grad_fn = partial.sum(0)
    grad_streams = torch.empty_like(out)
    grad_y, grad_post, grad_comb = (None if t is None else torch.empty_like(t) for t in (y, post, comb))
    _streams_grad_kernel[(triton.cdiv(count, BACK),)](
        grad_out, grad_x, y, post, comb, streams, out, pre, grad_mix, grad_square, fn,
        grad_y, grad_post, grad_comb, grad_streams, count, PENDING=y is not None, MIX=fn is not None, **shapes,
    )  # fmt: skip
    return grad_y, grad_post, grad_comb, grad_streams, grad_fn, grad_base, grad_scale
