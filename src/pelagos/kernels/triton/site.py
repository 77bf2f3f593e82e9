"""One hyper-connection site: post of the one before, mix logits, Sinkhorn, collapse, norm and quantisation.

Two launches. A mix kernel writes the new streams and, for a range of channels, partial sums of the 24 logits and of the
streams' Gram matrix; `_finish_kernel` adds the parts and collapses. The Gram matrix gives the norm of the collapsed
vector before it exists, so no block waits for another. Up to FEW_TOKENS each token is a program of its own over float32
weights. Longer calls multiply tiles: streams are bfloat16, so three bfloat16 terms of a weight multiply them exactly.
Which of the two is taken shows in the last bits of the parts, and nothing else about the other tokens does.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.batch_rows import Parts
from pelagos.kernels.triton.formats import (
    bits_to_bfloat16,
    dot,
    e4m3_code,
    fp8_scale_exponent,
    launch,
    let_next_start,
    pinned,
    quantise_block,
    reciprocal,
    settled,
    target,
    to_bfloat16,
    wait_for_inputs,
)

BLOCK = 128  # channels a part, and of an activation scale
FEW_TOKENS = 128  # up to here each token is a program, so that a token's bits are its own
TILE = 16  # tokens of a tile
WIDE_TILE, SPAN, STEP, STAGES = 64, 1024, 32, 3  # tokens and channels of a program of the products, channels a step
LOGITS, STATS = 24, 40  # 4 pre + 4 post + 16 comb; then 10 of the Gram matrix, the rest is padding


@triton.jit
def _split_kernel(fn, terms, WIDTH: tl.constexpr, TARGET: tl.constexpr):
    """Cut float32 weights into three bfloat16 terms (3, 32, 4 * WIDTH), 8 bits of the mantissa each, a channel's four
    streams beside each other."""
    let_next_start(TARGET)
    wait_for_inputs(TARGET)
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    inner = at % (4 * WIDTH)
    rest = tl.load(fn + at - inner + inner % 4 * WIDTH + inner // 4, mask=at < 96 * WIDTH, other=0.0)
    for term in tl.static_range(3):
        bits = rest.to(tl.int32, bitcast=True)
        tl.store(terms + term * (128 * WIDTH) + at, bits_to_bfloat16(bits >> 16), mask=at < 128 * WIDTH)
        rest -= (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _shares_of(comb, post, token, live, K: tl.constexpr):
    """(T,) each: what the four streams and the previous site's output count in stream K after it."""
    place = comb + token * 16 + K
    return (
        tl.load(place, mask=live, other=0.0)[:, None], tl.load(place + 4, mask=live, other=0.0)[:, None],
        tl.load(place + 8, mask=live, other=0.0)[:, None], tl.load(place + 12, mask=live, other=0.0)[:, None],
        tl.load(post + token * 4 + K, mask=live, other=0.0)[:, None],
    )  # fmt: skip


@triton.jit
def _stream(y, s, shares, K: tl.constexpr, HAS_POST: tl.constexpr, TARGET: tl.constexpr):
    """bfloat16 stream K after the previous site, computed once."""
    if HAS_POST:
        mixed = shares[0] * s[0]
        mixed += shares[1] * s[1]
        mixed += shares[2] * s[2]
        mixed += shares[3] * s[3]
        return pinned((mixed + shares[4] * y).to(tl.bfloat16), TARGET)
    return pinned(s[K].to(tl.bfloat16), TARGET)


@triton.jit
def _inner(a, b, STEP: tl.constexpr):
    """Sums of a * b over the eight channels of a lane."""
    return tl.sum((a * b).reshape(a.shape[0], STEP // 8, 8), 2)


@triton.jit
def _mix_kernel(
    y, streams, post, comb, terms, out, parts, tokens,
    WIDTH: tl.constexpr, HAS_POST: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, SPAN: tl.constexpr,
    STAGES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """SPAN channels of TILE tokens, STEP at a time: new streams are stored; their share of all sums goes to `parts`."""
    let_next_start(TARGET)
    wait_for_inputs(TARGET)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live, lane = token < tokens, tl.arange(0, 32)
    both, wide = live[:, None], token.to(tl.int64)[:, None] * WIDTH
    w0, w1 = _shares_of(comb, post, token, live, 0), _shares_of(comb, post, token, live, 1)
    w2, w3 = _shares_of(comb, post, token, live, 2), _shares_of(comb, post, token, live, 3)
    logits, zero = tl.zeros((TILE, 32), tl.float32), tl.zeros((TILE, STEP // 8), tl.float32)
    g0, g1, g2, g3, g4, g5, g6, g7, g8, g9 = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    for begin in tl.range(tl.program_id(0) * SPAN, (tl.program_id(0) + 1) * SPAN, STEP, num_stages=STAGES):
        column = begin + tl.arange(0, STEP)[None, :]
        row = 4 * wide + column
        s0 = tl.load(streams + row, mask=both, other=0.0).to(tl.float32)
        s1 = tl.load(streams + row + WIDTH, mask=both, other=0.0).to(tl.float32)
        s2 = tl.load(streams + row + 2 * WIDTH, mask=both, other=0.0).to(tl.float32)
        s3 = tl.load(streams + row + 3 * WIDTH, mask=both, other=0.0).to(tl.float32)
        s, added = (s0, s1, s2, s3), s0
        if HAS_POST:
            added = tl.load(y + wide + column, mask=both, other=0.0).to(tl.float32)
        x0, x1 = _stream(added, s, w0, 0, HAS_POST, TARGET), _stream(added, s, w1, 1, HAS_POST, TARGET)
        x2, x3 = _stream(added, s, w2, 2, HAS_POST, TARGET), _stream(added, s, w3, 3, HAS_POST, TARGET)
        if HAS_POST:
            tl.store(out + row, x0, mask=both)
            tl.store(out + row + WIDTH, x1, mask=both)
            tl.store(out + row + 2 * WIDTH, x2, mask=both)
            tl.store(out + row + 3 * WIDTH, x3, mask=both)
        x = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(TILE, 4 * STEP)
        place = terms + lane[:, None] * (4 * WIDTH) + 4 * begin + tl.arange(0, 4 * STEP)[None, :]
        for term in tl.static_range(3):
            logits = dot(x, tl.trans(tl.load(place + term * (128 * WIDTH))), logits, TARGET)
        logits = settled(logits, TARGET)
        f0, f1, f2, f3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
        g0, g1, g2 = g0 + _inner(f0, f0, STEP), g1 + _inner(f1, f1, STEP), g2 + _inner(f2, f2, STEP)
        g3, g4, g5 = g3 + _inner(f3, f3, STEP), g4 + _inner(f0, f1, STEP), g5 + _inner(f0, f2, STEP)
        g6, g7, g8 = g6 + _inner(f0, f3, STEP), g7 + _inner(f1, f2, STEP), g8 + _inner(f1, f3, STEP)
        g9 += _inner(f2, f3, STEP)
    count: tl.constexpr = WIDTH // SPAN
    to = parts + token * (40 * count) + tl.program_id(0)
    tl.store(to[:, None] + lane[None, :] * count, logits, mask=both & (lane[None, :] < 24))
    gram = (g0, g1, g2, g3, g4, g5, g6, g7, g8, g9)
    for i in tl.static_range(10):
        tl.store(to + (24 + i) * count, tl.sum(gram[i], 1), mask=live)


@triton.jit
def _added(parts, token, live, which: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """(T,) float32: sum `which` over all blocks of channels."""
    block = tl.arange(0, PADDED)
    place = parts + token[:, None] * (40 * BLOCKS) + which * BLOCKS + block[None, :]
    return tl.sum(tl.load(place, mask=live[:, None] & (block < BLOCKS)[None, :], other=0.0), 1)


@triton.jit
def _root(parts, token, live, norm_eps, WIDTH: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """(T,) reciprocal root mean square of the flattened streams, and the diagonal of their Gram matrix."""
    g0 = _added(parts, token, live, 24, PARTS, PADDED)
    g1 = _added(parts, token, live, 25, PARTS, PADDED)
    g2 = _added(parts, token, live, 26, PARTS, PADDED)
    g3 = _added(parts, token, live, 27, PARTS, PADDED)
    return tl.rsqrt((g0 + g1 + g2 + g3) / (4 * WIDTH) + norm_eps), g0, g1, g2, g3


@triton.jit
def _gate(parts, token, live, base, factor, root, which: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    logit = _added(parts, token, live, which, BLOCKS, PADDED) * root * factor + tl.load(base + which)
    return 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def _collapse_weights(
    parts, token, live, base, factor, eps, norm_eps, WIDTH: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr
):
    """(T,) each: the four weights of the streams and the reciprocal RMS of the vector they give."""
    root, g0, g1, g2, g3 = _root(parts, token, live, norm_eps, WIDTH, PARTS, PADDED)
    p0 = _gate(parts, token, live, base, factor, root, 0, PARTS, PADDED) + eps
    p1 = _gate(parts, token, live, base, factor, root, 1, PARTS, PADDED) + eps
    p2 = _gate(parts, token, live, base, factor, root, 2, PARTS, PADDED) + eps
    p3 = _gate(parts, token, live, base, factor, root, 3, PARTS, PADDED) + eps
    crossed = p0 * p1 * _added(parts, token, live, 28, PARTS, PADDED)
    crossed += p0 * p2 * _added(parts, token, live, 29, PARTS, PADDED)
    crossed += p0 * p3 * _added(parts, token, live, 30, PARTS, PADDED)
    crossed += p1 * p2 * _added(parts, token, live, 31, PARTS, PADDED)
    crossed += p1 * p3 * _added(parts, token, live, 32, PARTS, PADDED)
    crossed += p2 * p3 * _added(parts, token, live, 33, PARTS, PADDED)
    square = p0 * p0 * g0 + p1 * p1 * g1 + p2 * p2 * g2 + p3 * p3 * g3 + 2.0 * crossed
    return p0, p1, p2, p3, tl.rsqrt(tl.maximum(square, 0.0) / WIDTH + norm_eps)


@triton.jit
def _shares(a, b, c, d, eps, TARGET: tl.constexpr):
    """Four numbers over their sum."""
    inverse = reciprocal((a + b) + (c + (d + eps)), TARGET)
    return a * inverse, b * inverse, c * inverse, d * inverse


@triton.jit
def _first_row(
    parts, base, factor, root, token, live, eps, which: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Softmax of four comb logits, plus eps."""
    a = _added(parts, token, live, which, BLOCKS, PADDED) * root * factor + tl.load(base + which)
    b = _added(parts, token, live, which + 1, BLOCKS, PADDED) * root * factor + tl.load(base + which + 1)
    c = _added(parts, token, live, which + 2, BLOCKS, PADDED) * root * factor + tl.load(base + which + 2)
    d = _added(parts, token, live, which + 3, BLOCKS, PADDED) * root * factor + tl.load(base + which + 3)
    top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = _shares(tl.exp(a - top), tl.exp(b - top), tl.exp(c - top), tl.exp(d - top), 0.0, TARGET)
    return a + eps, b + eps, c + eps, d + eps


@triton.jit
def _store_row(place, a, b, c, d, live):
    tl.store(place, a, mask=live)
    tl.store(place + 1, b, mask=live)
    tl.store(place + 2, c, mask=live)
    tl.store(place + 3, d, mask=live)


@triton.jit
def _mixing(
    parts, base, scale, post, comb, token, live, eps, norm_eps,
    ITERS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Store post (T, 4) and the Sinkhorn-normalised comb (T, 4, 4)."""
    root, _, _, _, _ = _root(parts, token, live, norm_eps, WIDTH, PARTS, PADDED)
    factor = tl.load(scale + 1)
    for i in tl.static_range(4):
        tl.store(
            post + token * 4 + i, 2.0 * _gate(parts, token, live, base, factor, root, 4 + i, PARTS, PADDED), mask=live
        )
    factor = tl.load(scale + 2)
    a0, a1, a2, a3 = _first_row(parts, base, factor, root, token, live, eps, 8, PARTS, PADDED, TARGET)
    b0, b1, b2, b3 = _first_row(parts, base, factor, root, token, live, eps, 12, PARTS, PADDED, TARGET)
    c0, c1, c2, c3 = _first_row(parts, base, factor, root, token, live, eps, 16, PARTS, PADDED, TARGET)
    d0, d1, d2, d3 = _first_row(parts, base, factor, root, token, live, eps, 20, PARTS, PADDED, TARGET)
    for i in range(ITERS):
        if i > 0:
            a0, a1, a2, a3 = _shares(a0, a1, a2, a3, eps, TARGET)
            b0, b1, b2, b3 = _shares(b0, b1, b2, b3, eps, TARGET)
            c0, c1, c2, c3 = _shares(c0, c1, c2, c3, eps, TARGET)
            d0, d1, d2, d3 = _shares(d0, d1, d2, d3, eps, TARGET)
        a0, b0, c0, d0 = _shares(a0, b0, c0, d0, eps, TARGET)
        a1, b1, c1, d1 = _shares(a1, b1, c1, d1, eps, TARGET)
        a2, b2, c2, d2 = _shares(a2, b2, c2, d2, eps, TARGET)
        a3, b3, c3, d3 = _shares(a3, b3, c3, d3, eps, TARGET)
    _store_row(comb + token * 16, a0, a1, a2, a3, live)
    _store_row(comb + token * 16 + 4, b0, b1, b2, b3, live)
    _store_row(comb + token * 16 + 8, c0, c1, c2, c3, live)
    _store_row(comb + token * 16 + 12, d0, d1, d2, d3, live)


@triton.jit
def _emit(
    x0, x1, x2, x3, p0, p1, p2, p3, inverse, norm, normed, codes, scales, token, live, block, WIDTH: tl.constexpr
):
    """Collapse, norm and quantise 128 channels."""
    column = block * 128 + tl.arange(0, 128)
    z = p0[:, None] * x0.to(tl.float32)
    z += p1[:, None] * x1.to(tl.float32)
    z += p2[:, None] * x2.to(tl.float32)
    z += p3[:, None] * x3.to(tl.float32)
    z = z.to(tl.bfloat16).to(tl.float32) * inverse[:, None] * tl.load(norm + column).to(tl.float32)[None, :]
    z = z.to(tl.bfloat16)
    both = live[:, None]
    place = token.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(normed + place, z, mask=both)
    wide = z.to(tl.float32)
    exponent = fp8_scale_exponent(tl.max(tl.abs(wide), 1))
    tl.store(codes + place, e4m3_code(quantise_block(wide, exponent[:, None])), mask=both)
    tl.store(scales + token * (WIDTH // 128) + block, exponent.to(tl.uint8), mask=live)


@triton.jit
def _add_ten(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8, a9 + b9


@triton.jit
def _mixed(y, s0, s1, s2, s3, post, comb, K: tl.constexpr, HAS_POST: tl.constexpr):
    """float32 values of bfloat16 stream K of one token after the previous site."""
    if HAS_POST:
        mixed = tl.load(comb + K) * s0 + tl.load(comb + 4 + K) * s1 + tl.load(comb + 8 + K) * s2
        mixed += tl.load(comb + 12 + K) * s3
        return (mixed + tl.load(post + K) * y).to(tl.bfloat16).to(tl.float32)
    if K == 0:
        return s0
    if K == 1:
        return s1
    if K == 2:
        return s2
    return s3


@triton.jit
def _added_up(
    last, routed, token, tokens, column, WIDTH: tl.constexpr, LAST: tl.constexpr, PICKED: tl.constexpr,
    PARTS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """float32 values of a token's bfloat16 y from what `batch_rows.Parts` holds."""
    total = tl.load(last + token * WIDTH + column)
    for part in tl.static_range(1, LAST):
        total += tl.load(last + (part * tokens + token) * WIDTH + column)
    total = to_bfloat16(total, TARGET).to(tl.float32)
    if PICKED > 0:
        mixed = tl.zeros(column.shape, tl.float32)
        for pick in tl.static_range(PICKED):
            own = tl.load(routed + (token * PICKED + pick) * WIDTH + column)
            for part in tl.static_range(1, PARTS):
                own += tl.load(routed + ((part * tokens + token) * PICKED + pick) * WIDTH + column)
            mixed += own
        total = to_bfloat16(mixed + total, TARGET).to(tl.float32)
    return total


@triton.jit
def _mix_token_kernel(
    y, routed, streams, post, comb, fn, out, parts, tokens,
    WIDTH: tl.constexpr, HAS_POST: tl.constexpr, LAST: tl.constexpr, PICKED: tl.constexpr, PARTS: tl.constexpr,
    EACH: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """`_mix_kernel` for single tokens: weights stay in registers and wait there for the streams.

    LAST > 0: y comes in parts.
    """
    let_next_start(TARGET)
    block = tl.program_id(0)
    column = block * 128 + tl.arange(0, 128)
    lane = tl.arange(0, 32)
    weight = fn + lane[:, None] * (4 * WIDTH) + column[None, :]
    real = lane[:, None] < 24
    w0 = tl.load(weight, mask=real, other=0.0)
    w1 = tl.load(weight + WIDTH, mask=real, other=0.0)
    w2 = tl.load(weight + 2 * WIDTH, mask=real, other=0.0)
    w3 = tl.load(weight + 3 * WIDTH, mask=real, other=0.0)
    wait_for_inputs(TARGET)
    for i in range(EACH):
        token = (tl.program_id(1) * EACH + i).to(tl.int64)
        if token < tokens:
            row = token * (4 * WIDTH) + column
            s0 = tl.load(streams + row).to(tl.float32)
            s1 = tl.load(streams + row + WIDTH).to(tl.float32)
            s2 = tl.load(streams + row + 2 * WIDTH).to(tl.float32)
            s3 = tl.load(streams + row + 3 * WIDTH).to(tl.float32)
            added = s0
            if HAS_POST:
                if LAST > 0:
                    added = _added_up(y, routed, token, tokens, column, WIDTH, LAST, PICKED, PARTS, TARGET)
                else:
                    added = tl.load(y + token * WIDTH + column).to(tl.float32)
            x0 = _mixed(added, s0, s1, s2, s3, post + token * 4, comb + token * 16, 0, HAS_POST)
            x1 = _mixed(added, s0, s1, s2, s3, post + token * 4, comb + token * 16, 1, HAS_POST)
            x2 = _mixed(added, s0, s1, s2, s3, post + token * 4, comb + token * 16, 2, HAS_POST)
            x3 = _mixed(added, s0, s1, s2, s3, post + token * 4, comb + token * 16, 3, HAS_POST)
            if HAS_POST:
                tl.store(out + row, x0.to(tl.bfloat16))
                tl.store(out + row + WIDTH, x1.to(tl.bfloat16))
                tl.store(out + row + 2 * WIDTH, x2.to(tl.bfloat16))
                tl.store(out + row + 3 * WIDTH, x3.to(tl.bfloat16))
            logits = tl.sum(w0 * x0[None, :] + w1 * x1[None, :] + w2 * x2[None, :] + w3 * x3[None, :], 1)
            blocks: tl.constexpr = WIDTH // 128
            place = parts + token * (40 * blocks) + block
            tl.store(place + lane * blocks, logits, mask=lane < 24)
            gram = tl.reduce(
                (x0 * x0, x1 * x1, x2 * x2, x3 * x3, x0 * x1, x0 * x2, x0 * x3, x1 * x2, x1 * x3, x2 * x3), 0, _add_ten
            )
            for j in tl.static_range(10):
                tl.store(place + (24 + j) * blocks, gram[j])


@triton.jit
def _finish_kernel(
    streams, parts, base, scale, norm, post, comb, normed, codes, scales, tokens, tiles, eps, norm_eps,
    ITERS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    RUN: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    let_next_start(TARGET)
    wait_for_inputs(TARGET)
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    token = tile * TILE + tl.arange(0, TILE)
    live = token < tokens
    if part == 0:
        _mixing(parts, base, scale, post, comb, token, live, eps, norm_eps, ITERS, WIDTH, PARTS, PADDED, TARGET)
    else:
        p0, p1, p2, p3, inverse = _collapse_weights(
            parts, token, live, base, tl.load(scale), eps, norm_eps, WIDTH, PARTS, PADDED
        )
        for step in tl.range(0, RUN, num_stages=2):
            block = (part - 1) * RUN + step
            row = token.to(tl.int64)[:, None] * (4 * WIDTH) + (block * 128 + tl.arange(0, 128))[None, :]
            x0 = tl.load(streams + row, mask=live[:, None], other=0.0)
            x1 = tl.load(streams + row + WIDTH, mask=live[:, None], other=0.0)
            x2 = tl.load(streams + row + 2 * WIDTH, mask=live[:, None], other=0.0)
            x3 = tl.load(streams + row + 3 * WIDTH, mask=live[:, None], other=0.0)
            _emit(x0, x1, x2, x3, p0, p1, p2, p3, inverse, norm, normed, codes, scales, token, live, block, WIDTH)


def forward(
    y: Tensor | Parts | None, streams: Tensor, old_post: Tensor | None, old_comb: Tensor | None, fn: Tensor,
    base: Tensor, scale: Tensor, norm: Tensor, *, iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (streams, post, comb, normed, codes, scales) as `kernels.site.site` does."""
    tokens, _, width = streams.shape
    blocks, few = width // BLOCK, tokens <= FEW_TOKENS
    count = blocks if few else width // math.gcd(width, SPAN)
    new, has_post = streams.new_empty, y is not None
    out = new(streams.shape) if has_post else streams
    parts = new((tokens, STATS, count), dtype=torch.float32)
    post, comb = new((tokens, 4), dtype=torch.float32), new((tokens, 4, 4), dtype=torch.float32)
    normed = new((tokens, width))
    codes, scales = new((tokens, width), dtype=torch.uint8), new((tokens, blocks), dtype=torch.uint8)
    made_for = target()
    left = y if isinstance(y, Parts) and few else None
    y = left.last if left is not None else y.whole() if isinstance(y, Parts) else y
    y, old_post, old_comb = (streams if each is None else each for each in (y, old_post, old_comb))
    results = (out, post, comb, normed, codes, scales)
    options = {"WIDTH": width, "HAS_POST": has_post, "TARGET": made_for}
    sizes = {"WIDTH": width, "PARTS": count, "PADDED": triton.next_power_of_2(count)}
    finish = {"ITERS": iters, "TARGET": made_for, **sizes}
    outputs = (out, parts, base, scale, norm, *results[1:])
    if few:
        each = 1 if tokens <= TILE else 4
        routed = None if left is None else left.routed
        picked = {"PICKED": 0, "PARTS": 1} if routed is None else {"PICKED": routed.shape[2], "PARTS": routed.shape[0]}
        _mix_token_kernel[(blocks, triton.cdiv(tokens, each))](
            y, y if routed is None else routed, streams, old_post, old_comb, fn, out, parts, tokens,
            LAST=0 if left is None else len(y), EACH=each, **picked, **options,
            **launch(made_for, num_warps=4),
        )  # fmt: skip
        _finish_kernel[(tokens * (1 + blocks),)](
            *outputs, tokens, tokens, eps, norm_eps, TILE=1, RUN=1, **finish, **launch(made_for, num_warps=1)
        )
        return results
    terms = new((3, 32, 4 * width))
    _split_kernel[(triton.cdiv(128 * width, 1024),)](fn, terms, WIDTH=width, TARGET=made_for, **launch(made_for))
    inputs = (y, streams, old_post, old_comb, terms, out, parts)
    _mix_kernel[(count, triton.cdiv(tokens, WIDE_TILE))](
        *inputs, tokens, TILE=WIDE_TILE, STEP=STEP, SPAN=width // count, STAGES=STAGES, **options,
        **launch(made_for, num_warps=4),
    )  # fmt: skip
    tiles, run = triton.cdiv(tokens, TILE), math.gcd(blocks, 4)
    _finish_kernel[(tiles * (1 + blocks // run),)](
        *outputs, tokens, tiles, eps, norm_eps, TILE=TILE, RUN=run, **finish, **launch(made_for, num_warps=8)
    )
    return results
