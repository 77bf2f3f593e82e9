"""One hyper-connection site: post of the one before, mix logits, Sinkhorn, collapse, norm and quantisation.

A mix kernel writes the new streams and, for a range of channels, partial sums of the 24 logits and of the streams' Gram
matrix, which gives the norm of the collapsed vector before it exists; `_finish_kernel` adds the parts and collapses.
Where all programs of a call fit on the device together they meet behind their sums instead, and each collapses its own
channels. Up to FEW_TOKENS each token is a program of its own over float32 weights. Longer calls multiply tiles: streams
are bfloat16, so three bfloat16 terms of a weight multiply them exactly. Which of the two is taken shows in the last
bits of the parts, and nothing else about the other tokens does.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.batch_rows import Mixing, Parts
from pelagos.kernels.triton import formats

BLOCK = 128  # channels a part, and of an activation scale
RUN = 4  # blocks of channels that a program collapses, at most
FEW_TOKENS = 128  # up to here each token is a program, so that a token's bits are its own
TILE = 16  # tokens of a tile
WIDE_TILE, SPAN, STEP, STAGES = 64, 1024, 32, 3  # tokens and channels of a program of the products, channels a step
LOGITS, STATS = 24, 40  # 4 pre + 4 post + 16 comb; then 10 of the Gram matrix, the rest is padding


@triton.jit
def _split_kernel(fn, terms, WIDTH: tl.constexpr, TARGET: tl.constexpr):
    """Cut float32 weights into three bfloat16 terms (3, 32, 4 * WIDTH), 8 bits of the mantissa each, a channel's four
    streams beside each other."""
    formats.let_next_start(TARGET)
    formats.wait_for_inputs(TARGET)
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    inner = at % (4 * WIDTH)
    rest = tl.load(fn + at - inner + inner % 4 * WIDTH + inner // 4, mask=at < 96 * WIDTH, other=0.0)
    for term in tl.static_range(3):
        bits = rest.to(tl.int32, bitcast=True)
        tl.store(terms + term * (128 * WIDTH) + at, formats.bits_to_bfloat16(bits >> 16), mask=at < 128 * WIDTH)
        rest -= (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _shares_of(comb, post, token, live, K: tl.constexpr):
    """(T, 1) each: what the four streams and the previous site's output count in stream K after it."""
    place = comb + token * 16 + K
    streams = [tl.load(place + 4 * i, mask=live, other=0.0)[:, None] for i in (0, 1, 2, 3)]
    return streams, tl.load(post + token * 4 + K, mask=live, other=0.0)[:, None]


@triton.jit
def _stream(y, s, shares, own, K: tl.constexpr, HAS_POST: tl.constexpr, TARGET: tl.constexpr):
    """bfloat16 stream K after the previous site, computed once."""
    x = s[K]
    if HAS_POST:
        x = shares[0] * s[0] + shares[1] * s[1] + shares[2] * s[2] + shares[3] * s[3] + own * y
    return formats.pinned(x.to(tl.bfloat16), TARGET)


@triton.jit
def _products(x):
    """The ten products of four streams, squares first."""
    return (x[0] * x[0], x[1] * x[1], x[2] * x[2], x[3] * x[3],
            x[0] * x[1], x[0] * x[2], x[0] * x[3], x[1] * x[2], x[1] * x[3], x[2] * x[3])  # fmt: skip


@triton.jit
def _mix_kernel(
    y, streams, post, comb, terms, out, parts, tokens, WIDTH: tl.constexpr, HAS_POST: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """SPAN channels of TILE tokens, STEP at a time: new streams are stored; their share of all sums goes to `parts`."""
    formats.let_next_start(TARGET)
    formats.wait_for_inputs(TARGET)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live, lane = token < tokens, tl.arange(0, 32)
    both, wide = live[:, None], token.to(tl.int64)[:, None] * WIDTH
    shares = [_shares_of(comb, post, token, live, k) for k in (0, 1, 2, 3)]
    logits, gram = tl.zeros((TILE, 32), tl.float32), [tl.zeros((TILE, STEP // 8), tl.float32)] * 10
    for begin in tl.range(tl.program_id(0) * SPAN, (tl.program_id(0) + 1) * SPAN, STEP, num_stages=STAGES):
        column = begin + tl.arange(0, STEP)[None, :]
        row = 4 * wide + column
        s = [tl.load(streams + row + k * WIDTH, mask=both, other=0.0).to(tl.float32) for k in (0, 1, 2, 3)]
        added = s[0]
        if HAS_POST:
            added = tl.load(y + wide + column, mask=both, other=0.0).to(tl.float32)
        x = [_stream(added, s, shares[k][0], shares[k][1], k, HAS_POST, TARGET) for k in (0, 1, 2, 3)]
        if HAS_POST:
            for k in tl.static_range(4):
                tl.store(out + row + k * WIDTH, x[k], mask=both)
        joined = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3])).reshape(TILE, 4 * STEP)
        place = terms + lane[:, None] * (4 * WIDTH) + 4 * begin + tl.arange(0, 4 * STEP)[None, :]
        for term in tl.static_range(3):
            logits = formats.dot(joined, tl.trans(tl.load(place + term * (128 * WIDTH))), logits, TARGET)
        logits = formats.settled(logits, TARGET)
        found = _products([each.to(tl.float32) for each in x])
        gram = [gram[i] + tl.sum(found[i].reshape(TILE, STEP // 8, 8), 2) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    count: tl.constexpr = WIDTH // SPAN
    to = parts + token * (40 * count) + tl.program_id(0)
    tl.store(to[:, None] + lane[None, :] * count, logits, mask=both & (lane[None, :] < 24))
    for i in tl.static_range(10):
        tl.store(to + (24 + i) * count, tl.sum(gram[i], 1), mask=live)


@triton.jit
def _sums(parts, token, live, which, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """Some sums over all blocks of channels, of a token or of several (T,); all are asked for before one is added up.

    A sum of a vector of tokens meets in shared memory, behind which a load could only begin when the one before it has
    ended.
    """
    block = tl.arange(0, PADDED)
    if len(token.shape) == 0:
        own, there = parts + token * (40 * BLOCKS) + block, live & (block < BLOCKS)
    else:
        own = parts + token[:, None] * (40 * BLOCKS) + block[None, :]
        there = live[:, None] & (block < BLOCKS)[None, :]
    found = [tl.load(own + each * BLOCKS, mask=there, other=0.0) for each in which]
    return [tl.sum(each, len(token.shape)) for each in found]


@triton.jit
def _root(g, norm_eps, WIDTH: tl.constexpr):
    """Reciprocal root mean square of the flattened streams, from the diagonal of their Gram matrix."""
    return tl.rsqrt((g[0] + g[1] + g[2] + g[3]) / (4 * WIDTH) + norm_eps)


@triton.jit
def _gate(total, offset, factor, root):
    return 1.0 / (1.0 + tl.exp(-(total * root * factor + offset)))


@triton.jit
def _collapse_weights(
    parts, token, live, base, factor, eps, norm_eps, WIDTH: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr
):
    """The four weights of the streams, for four numbers `base`, and the reciprocal RMS of what they give."""
    g = _sums(parts, token, live, (24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 0, 1, 2, 3), PARTS, PADDED)
    root = _root(g, norm_eps, WIDTH)
    p = [_gate(g[10 + k], base[k], factor, root) + eps for k in (0, 1, 2, 3)]
    crossed = p[0] * p[1] * g[4]
    crossed += p[0] * p[2] * g[5]
    crossed += p[0] * p[3] * g[6]
    crossed += p[1] * p[2] * g[7]
    crossed += p[1] * p[3] * g[8]
    crossed += p[2] * p[3] * g[9]
    square = p[0] * p[0] * g[0] + p[1] * p[1] * g[1] + p[2] * p[2] * g[2] + p[3] * p[3] * g[3] + 2.0 * crossed
    return p, tl.rsqrt(tl.maximum(square, 0.0) / WIDTH + norm_eps)


@triton.jit
def _shares(x, eps, TARGET: tl.constexpr):
    """Four numbers over their sum."""
    inverse = formats.reciprocal((x[0] + x[1]) + (x[2] + (x[3] + eps)), TARGET)
    return [each * inverse for each in x]


@triton.jit
def _first_row(g, offsets, factor, root, eps, which: tl.constexpr, TARGET: tl.constexpr):
    """Softmax of four comb logits, plus eps."""
    x = [g[which + k] * root * factor + offsets[which + k] for k in (0, 1, 2, 3)]
    top = tl.maximum(tl.maximum(x[0], x[1]), tl.maximum(x[2], x[3]))
    return [each + eps for each in _shares([tl.exp(each - top) for each in x], 0.0, TARGET)]


@triton.jit
def mixing(
    parts, base, scale, post, comb, token, live, eps, norm_eps,
    ITERS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Store post (T, 4) and the Sinkhorn-normalised comb (T, 4, 4)."""
    offsets = [tl.load(base + k) for k in (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)]
    factor, last = tl.load(scale + 1), tl.load(scale + 2)
    found = _sums(
        parts, token, live, (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27),
        PARTS, PADDED,
    )  # fmt: skip
    root = _root(found[20:], norm_eps, WIDTH)
    for i in tl.static_range(4):
        tl.store(post + token * 4 + i, 2.0 * _gate(found[i], offsets[i], factor, root), mask=live)
    rows = [_first_row(found, offsets, last, root, eps, 4 + 4 * k, TARGET) for k in (0, 1, 2, 3)]
    for i in range(ITERS):
        if i > 0:
            rows = [_shares(row, eps, TARGET) for row in rows]
        columns = [_shares([row[k] for row in rows], eps, TARGET) for k in (0, 1, 2, 3)]
        rows = [[column[k] for column in columns] for k in (0, 1, 2, 3)]
    for i in tl.static_range(16):
        tl.store(comb + token * 16 + i, rows[i // 4][i % 4], mask=live)


@triton.jit
def _emit(x, p, inverse, weight, normed, codes, scales, token, live, block, WIDTH: tl.constexpr):
    """Collapse, norm and quantise 128 channels: one block or several of a token, or one of several tokens."""
    column = tl.arange(0, 128)
    if len(x[0].shape) == 1:
        place, both = token.to(tl.int64) * WIDTH + block * 128 + column, live & (column >= 0)
    elif len(token.shape) == 0:
        place, both = token.to(tl.int64) * WIDTH + block[:, None] * 128 + column[None, :], live & (block >= 0)[:, None]
    else:
        p, inverse, weight, both = [each[:, None] for each in p], inverse[:, None], weight[None, :], live[:, None]
        place = token.to(tl.int64)[:, None] * WIDTH + block * 128 + column[None, :]
    z = p[0] * x[0].to(tl.float32)
    for k in tl.static_range(1, 4):
        z += p[k] * x[k].to(tl.float32)
    z = z.to(tl.bfloat16).to(tl.float32) * inverse * weight.to(tl.float32)
    z = z.to(tl.bfloat16)
    tl.store(normed + place, z, mask=both)
    wide = z.to(tl.float32)
    exponent = formats.fp8_scale_exponent(tl.max(tl.abs(wide), len(x[0].shape) - 1))
    shared = exponent
    if len(x[0].shape) > 1:
        shared = exponent[:, None]
    tl.store(codes + place, formats.e4m3_block(wide, shared), mask=both)
    tl.store(scales + token * (WIDTH // 128) + block, exponent.to(tl.uint8), mask=live)


@triton.jit
def _add_ten(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8, a9 + b9


@triton.jit
def _mixed(y, s, post, comb, K: tl.constexpr, HAS_POST: tl.constexpr):
    """float32 values of bfloat16 stream K of one token after the previous site."""
    x = s[K]
    if HAS_POST:
        x = tl.load(comb + K) * s[0] + tl.load(comb + 4 + K) * s[1] + tl.load(comb + 8 + K) * s[2]
        x = (x + tl.load(comb + 12 + K) * s[3] + tl.load(post + K) * y).to(tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def _added_up(
    last, routed, token, tokens, column, WIDTH: tl.constexpr, LAST: tl.constexpr, PICKED: tl.constexpr,
    PARTS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """float32 values of a token's bfloat16 y from what `batch_rows.Parts` holds."""
    total = tl.load(last + token * WIDTH + column)
    for part in tl.static_range(1, LAST):
        total += tl.load(last + (part * tokens + token) * WIDTH + column)
    total = formats.to_bfloat16(total, TARGET).to(tl.float32)
    if PICKED > 0:
        mixed = tl.zeros(column.shape, tl.float32)
        for pick in tl.static_range(PICKED):
            own = tl.load(routed + (token * PICKED + pick) * WIDTH + column)
            for part in tl.static_range(1, PARTS):
                own += tl.load(routed + ((part * tokens + token) * PICKED + pick) * WIDTH + column)
            mixed += own
        total = formats.to_bfloat16(mixed + total, TARGET).to(tl.float32)
    return total


@triton.jit
def _entered(
    y, routed, streams, post, comb, token, tokens, column, WIDTH: tl.constexpr, HAS_POST: tl.constexpr,
    LAST: tl.constexpr, PICKED: tl.constexpr, PARTS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """float32 values of a token's bfloat16 streams after the previous site."""
    s = [tl.load(streams + token * (4 * WIDTH) + k * WIDTH + column).to(tl.float32) for k in (0, 1, 2, 3)]
    added = s[0]
    if HAS_POST:
        if LAST > 0:
            added = _added_up(y, routed, token, tokens, column, WIDTH, LAST, PICKED, PARTS, TARGET)
        else:
            added = tl.load(y + token * WIDTH + column).to(tl.float32)
    return [_mixed(added, s, post + token * 4, comb + token * 16, k, HAS_POST) for k in (0, 1, 2, 3)]


@triton.jit
def _mix_token_kernel(
    y, routed, streams, post, comb, fn, out, parts, tokens, base, scale, norm, normed, codes, scales, arrived, eps,
    norm_eps, WIDTH: tl.constexpr, HAS_POST: tl.constexpr, LAST: tl.constexpr, PICKED: tl.constexpr,
    PARTS: tl.constexpr, EACH: tl.constexpr, ONE: tl.constexpr, PADDED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """`_mix_kernel` for single tokens: weights stay in registers and wait there for the streams.

    LAST > 0: y comes in parts. ONE: a token's programs meet and do what `_finish_kernel` does but for post and comb.
    """
    formats.let_next_start(TARGET)
    block = tl.program_id(0)
    column = block * 128 + tl.arange(0, 128)
    lane = tl.arange(0, 32)
    weight = fn + lane[:, None] * (4 * WIDTH) + column[None, :]
    real = lane[:, None] < 24
    w = [tl.load(weight + k * WIDTH, mask=real, other=0.0) for k in (0, 1, 2, 3)]
    if ONE:
        channels, factor, offsets = tl.load(norm + column), tl.load(scale), [tl.load(base + k) for k in (0, 1, 2, 3)]
    formats.wait_for_inputs(TARGET)
    blocks: tl.constexpr = WIDTH // 128
    # What four tokens need is asked for before the first is summed up: sums meet in shared memory, past which no load
    # moves. Places past the end repeat the last token, to the same bits.
    for begin in range(0, EACH, 4):
        place = [tl.minimum(tl.program_id(1) * EACH + begin + i, tokens - 1).to(tl.int64) for i in (0, 1, 2, 3)[:EACH]]
        mixed = [
            _entered(y, routed, streams, post, comb, each, tokens, column, WIDTH, HAS_POST, LAST, PICKED, PARTS, TARGET)
            for each in place
        ]
        for i in tl.static_range(min(EACH, 4)):
            token, x = place[i], mixed[i]
            if HAS_POST:
                for k in tl.static_range(4):
                    tl.store(out + token * (4 * WIDTH) + k * WIDTH + column, x[k].to(tl.bfloat16))
            logits = w[0] * x[0][None, :] + w[1] * x[1][None, :] + w[2] * x[2][None, :] + w[3] * x[3][None, :]
            logits = tl.sum(logits, 1)
            sums = parts + token * (40 * blocks) + block
            tl.store(sums + lane * blocks, logits, mask=lane < 24)
            gram = tl.reduce(_products(x), 0, _add_ten)
            for j in tl.static_range(10):
                tl.store(sums + (24 + j) * blocks, gram[j])
            if ONE:
                formats.meet(arrived + token, blocks, TARGET)
                there = token < tokens
                p, inverse = _collapse_weights(
                    parts, token, there, offsets, factor, eps, norm_eps, WIDTH, blocks, PADDED
                )
                _emit(x, p, inverse, channels, normed, codes, scales, token, there, block, WIDTH)
                formats.part(arrived + token, blocks)


@triton.jit
def _finish_kernel(
    streams, parts, base, scale, norm, post, comb, normed, codes, scales, tokens, tiles, eps, norm_eps,
    ITERS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    RUN: tl.constexpr, FIRST: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """A part from FIRST on of a tile of tokens: 0 gives post and comb, others collapse RUN blocks of channels each.

    One token is no vector: nothing then meets in shared memory.
    """
    formats.let_next_start(TARGET)
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles + FIRST
    token = tile if TILE == 1 else tile * TILE + tl.arange(0, TILE)
    live = token < tokens
    offsets, factor = [tl.load(base + k) for k in (0, 1, 2, 3)], tl.load(scale)
    formats.wait_for_inputs(TARGET)
    if part == 0:
        mixing(parts, base, scale, post, comb, token, live, eps, norm_eps, ITERS, WIDTH, PARTS, PADDED, TARGET)
    elif TILE == 1:
        block, column = (part - 1) * RUN, (part - 1) * (RUN * 128) + tl.arange(0, 128)
        if RUN > 1:  # a warp has a block, and what a block shares it finds by itself
            block += tl.arange(0, RUN)
            column = block[:, None] * 128 + tl.arange(0, 128)[None, :]
        found = [tl.load(streams + token.to(tl.int64) * (4 * WIDTH) + k * WIDTH + column) for k in (0, 1, 2, 3)]
        weight = tl.load(norm + column)
        p, inverse = _collapse_weights(parts, token, live, offsets, factor, eps, norm_eps, WIDTH, PARTS, PADDED)
        _emit(found, p, inverse, weight, normed, codes, scales, token, live, block, WIDTH)
    else:
        p, inverse = _collapse_weights(parts, token, live, offsets, factor, eps, norm_eps, WIDTH, PARTS, PADDED)
        for step in tl.range(0, RUN, num_stages=2):
            block = (part - 1) * RUN + step
            column = block * 128 + tl.arange(0, 128)
            row = token.to(tl.int64)[:, None] * (4 * WIDTH) + column[None, :]
            x = [tl.load(streams + row + k * WIDTH, mask=live[:, None], other=0.0) for k in (0, 1, 2, 3)]
            _emit(x, p, inverse, tl.load(norm + column), normed, codes, scales, token, live, block, WIDTH)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(
    y: Tensor | Parts | None, streams: Tensor, old_post: Tensor | None, old_comb: Tensor | None, fn: Tensor,
    base: Tensor, scale: Tensor, norm: Tensor, *, iters: int, eps: float, norm_eps: float,
    leave: bool = False, arrived: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (streams, post, comb, normed, codes, scales) as `kernels.site.site` does, and `Mixing` with `leave`."""
    tokens, _, width = streams.shape
    blocks, few = width // BLOCK, tokens <= FEW_TOKENS
    count = blocks if few else width // math.gcd(width, SPAN)
    new, has_post = streams.new_empty, y is not None
    out = new(streams.shape) if has_post else streams
    parts = new((tokens, STATS, count), dtype=torch.float32)
    post, comb = new((tokens, 4), dtype=torch.float32), new((tokens, 4, 4), dtype=torch.float32)
    normed = new((tokens, width))
    codes, scales = new((tokens, width), dtype=torch.uint8), new((tokens, blocks), dtype=torch.uint8)
    made_for = formats.target()
    left = y if isinstance(y, Parts) and few else None
    y = left.last if left is not None else y.whole() if isinstance(y, Parts) else y
    y, old_post, old_comb = (streams if each is None else each for each in (y, old_post, old_comb))
    results = (out, post, comb, normed, codes, scales)
    options = {"WIDTH": width, "HAS_POST": has_post, "TARGET": made_for, **formats.launch(made_for, num_warps=4)}
    # A token's bits do not depend on which launch adds up: nothing is contracted where there may be one or two.
    exact = {"enable_fp_fusion": False} if few else {}
    one = leave and arrived is not None and made_for == formats.PTX and tokens * blocks <= _processors(streams.device)
    padded = triton.next_power_of_2(count)
    run = 1 if tokens <= TILE else math.gcd(blocks, RUN)
    tile, warps = (1, 4) if few else (TILE, 8)
    if few:
        each = 1 if tokens <= TILE else 4 if tokens <= 2 * TILE else 8  # no more programs than fit on an H200 at once
        routed = None if left is None else left.routed
        picked = {"PICKED": 0, "PARTS": 1} if routed is None else {"PICKED": routed.shape[2], "PARTS": routed.shape[0]}
        _mix_token_kernel[(blocks, triton.cdiv(tokens, each))](
            y, y if routed is None else routed, streams, old_post, old_comb, fn, out, parts, tokens,
            base, scale, norm, normed, codes, scales, parts if arrived is None else arrived, eps, norm_eps,
            LAST=0 if left is None else len(y), EACH=each, ONE=one, PADDED=padded, **picked, **options, **exact,
        )  # fmt: skip
    else:
        terms = new((3, 32, 4 * width))
        _split_kernel[(width // 8,)](fn, terms, WIDTH=width, TARGET=made_for, **formats.launch(made_for))
        _mix_kernel[(count, triton.cdiv(tokens, WIDE_TILE))](
            y, streams, old_post, old_comb, terms, out, parts, tokens,
            TILE=WIDE_TILE, STEP=STEP, SPAN=width // count, STAGES=STAGES, **options,
        )  # fmt: skip
    tiles, leaves = triton.cdiv(tokens, tile), few and leave
    if not one:
        _finish_kernel[(tiles * ((not leaves) + blocks // run),)](
            out, parts, base, scale, norm, *results[1:], tokens, tiles, eps, norm_eps, ITERS=iters, WIDTH=width,
            PARTS=count, PADDED=padded, TILE=tile, RUN=run, FIRST=int(leaves), TARGET=made_for,
            **formats.launch(made_for, num_warps=warps, **exact),
        )  # fmt: skip
    if not leave:
        return results
    return (*results, Mixing(parts, base, scale, post, comb, iters, eps, norm_eps) if leaves else None)


def owed(left: Mixing | None, instead: Tensor) -> tuple[tuple[Tensor | float, ...], dict[str, int]]:
    """Return the operands and constants by which a kernel calls `mixing`; ITERS is 0 where nothing was left."""
    if left is None:
        return (*(instead,) * 5, 0.0, 0.0), {"ITERS": 0, "SUMS": 1}
    sums = triton.next_power_of_2(left.parts.shape[2])
    return (*left[:5], left.eps, left.norm_eps), {"ITERS": left.iters, "SUMS": sums}
