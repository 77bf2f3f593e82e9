"""Experts with FP4 weights for a few tokens: every chosen expert's weights are streamed once, as released.

Five launches, no host in between: lists of rows by expert and turned activations; gate and up; SwiGLU and the second
quantisation; down; the sum over a token's picks. Of a whole expert site the router does the first, the shared expert's
second product runs with down, and for one token whoever comes last of gate and up does the third. A nibble becomes
E4M3 by shifts and masks, so both operands go to the matrix unit as FP8; a group of 32 columns has a column of the
product of its own, so that its scale is applied to a sum. k is cut by the weights' shape alone and parts are added in
order, so a token's bits do not depend on the others.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.batch_rows import Parts, Routed
from pelagos.kernels.triton import formats
from pelagos.kernels.triton.skinny_gemm import as_operand, fp8_tile, operand, wide_of

BLOCK = 128  # columns that share an activation scale
ROWS = 64  # outputs a program
LONG = 4096  # from here on k is cut in two
STAGES = 3  # of the pipeline, the best of 2 to 6 on an H200
COLUMNS = 1024  # of the elementwise kernels
FEW = 2  # picks a slot up to which a pass takes 4 tokens; beyond it takes 8, with fewer programs at a time
UNITS = 4  # tiles or parts of k that a program has one after another, at most, where a pass takes 8
MOST = 32  # tokens of a program of the shared expert: more of them cost the routed ones' programs registers
SHARED_PARTS = 2  # of the shared expert's k: its bytes are twice a routed expert's


@triton.jit
def turned(x):
    """Columns (ROWS, BYTES) in the order in which 16 consecutive bytes are one lane's share of a matrix operand."""
    if x.shape[1] % 64 == 0:
        x = tl.permute(x.reshape(x.shape[0], x.shape[1] // 64, 4, 4, 2, 2), (0, 1, 3, 4, 2, 5)).reshape(x.shape)
    return x


@triton.jit
def _source(place):
    """Which of 128 columns a turned row keeps at `place`: the even ones first, each half in the order of `_weights`."""
    return 2 * (place % 16 // 4 * 16 + place % 64 // 16 * 4 + place % 4) + place % 128 // 64


@triton.jit
def turn_block(codes, spread, token, cut, width, COLUMNS: tl.constexpr):
    """Turn COLUMNS codes of a token and spread them over four rows, one for each group of 32 of 128 columns."""
    place = cut * COLUMNS + tl.arange(0, COLUMNS)
    live = place < width
    code = tl.load(codes + token * width + place // 128 * 128 + _source(place), mask=live, other=0)
    for group in tl.static_range(4):
        tl.store(spread + (4 * token + group) * width + place, tl.where(place % 16 // 4 == group, code, 0), mask=live)


@triton.jit
def _plan_kernel(
    chosen, codes, table, slot_expert, slot_rows, spread, picks, slots, width, BY_PICK: tl.constexpr,
    PICKS: tl.constexpr, COLUMNS: tl.constexpr, CUT: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    formats.let_next_start(TARGET)
    formats.wait_for_inputs(TARGET)
    at = tl.program_id(0)
    if at < slots:
        place = tl.arange(0, PICKS)
        experts = tl.load(chosen + place, mask=place < picks, other=-1).to(tl.int32)
        own = tl.load(chosen + at).to(tl.int32) if BY_PICK else at
        match = (experts == own).to(tl.int32)
        rank = tl.cumsum(match, 0) - 1
        rows = tl.sum(match, 0)
        if BY_PICK:
            earlier = tl.sum(tl.where(place < at, match, 0), 0)
            rows = tl.where(earlier > 0, 0, rows)
        tl.store(slot_expert + at, own)
        tl.store(slot_rows + at, rows)
        tl.store(table + at * picks + rank, place, mask=match > 0)
    else:
        turn_block(codes, spread, (at - slots) // CUT, (at - slots) % CUT, width, COLUMNS)


@triton.jit
def _turned_row(lane):
    """Which of 64 weight rows is loaded as row `lane`, for `_weights`."""
    return lane // 8 % 4 * 16 + lane // 32 * 8 + lane % 8


@triton.jit
def _weights(byte, TARGET: tl.constexpr, ROWS: tl.constexpr):
    """A matrix operand (ROWS, 128) of 64 weight bytes a row, times 2^-6: a lane's share is 16 bytes, one group."""
    even, odd = formats.e2m1_to_e4m3(byte, TARGET)
    both = tl.permute(tl.join(even, odd).reshape(ROWS // 32, 4, 8, 4, 4, 4, 2), (1, 0, 2, 6, 4, 3, 5))
    return operand(both.reshape(ROWS, 128))


@triton.jit
def _gated(gate, up, limit):
    """silu of the gate, clamped from above, times the clamped up."""
    gate = tl.minimum(gate, limit)
    return gate / (1.0 + tl.exp(-gate)) * tl.minimum(tl.maximum(up, -limit), limit)


@triton.jit
def _hidden_block(
    partial, weights, hidden, hs, shared, shared_codes, shared_scales, limit, picks, pick, block,
    INNER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """SwiGLU, the routing weight and the quantisation of 128 hidden columns of a pick, turned and spread.

    Rows beyond the picks are the shared expert's: bfloat16 in between as released, FP8 codes for the next product.
    """
    lane = tl.arange(0, 128)
    column = block * 128 + lane
    if pick < picks:
        gate = tl.load(partial + pick * (2 * INNER) + column)
        up = tl.load(partial + pick * (2 * INNER) + INNER + column)
        for part in tl.static_range(1, PARTS):
            gate += tl.load(partial + (part * picks + pick) * (2 * INNER) + column)
            up += tl.load(partial + (part * picks + pick) * (2 * INNER) + INNER + column)
        value = _gated(gate, up, limit) * tl.load(weights + pick)
        exponent = formats.fp8_scale_exponent(tl.max(tl.abs(value), 0))
        code, byte = formats.e4m3_block(value, exponent), lane // 2
        place = block * 128 + lane % 2 * 64 + byte % 16 // 4 * 16 + byte // 16 * 4 + byte % 4
        for group in tl.static_range(4):
            tl.store(hidden + (4 * pick + group) * INNER + place, tl.where(byte // 16 == group, code, 0))
        tl.store(hs + pick * (INNER // 128) + block, exponent.to(tl.uint8))
    else:
        row = pick - picks
        gate = tl.load(shared + row * (2 * INNER) + column).to(tl.bfloat16).to(tl.float32)
        up = tl.load(shared + row * (2 * INNER) + INNER + column).to(tl.bfloat16).to(tl.float32)
        value = _gated(gate, up, limit).to(tl.bfloat16).to(tl.float32)
        exponent = formats.fp8_scale_exponent(tl.max(tl.abs(value), 0))
        tl.store(shared_codes + row * INNER + column, formats.e4m3_block(value, exponent))
        tl.store(shared_scales + row * (INNER // 128) + block, exponent.to(tl.uint8))


@triton.jit
def _product_kernel(
    x, xs, table, slot_expert, slot_rows, w, scale, homes, partial, picks, shared_codes, shared_scales, shared_w,
    shared_w_scales, shared_partial, tokens, weights, hidden, hs, shared, arrived, limit, HIDDEN: tl.constexpr,
    SHARED: tl.constexpr, DEPTH: tl.constexpr, OUTPUTS: tl.constexpr, PARTS: tl.constexpr, SINGLE: tl.constexpr,
    PLACED: tl.constexpr, FP8_PARTS: tl.constexpr, WIDE: tl.constexpr, UNITS: tl.constexpr, TALL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one expert for its tokens, over one part of k. SHARED picks have one token.

    A program has UNITS of them one after another without a pause: tiles of outputs if TALL, else the parts of k.

    A token is four of the COLUMNS columns of the product, one for each group of 32: scales are applied to sums.

    SINGLE: every pick is a slot of its own, `slot_expert` the picks. The first slots are the shared expert's, FP8_PARTS
    for every WIDE tokens. HIDDEN, of single tokens: whoever comes last of the gates and ups of 128 hidden columns makes
    these; the last slot is the shared expert's.
    """
    slot, part = tl.program_id(2) - (tokens + WIDE - 1) // WIDE * FP8_PARTS, tl.program_id(1)
    formats.let_next_start(TARGET)
    formats.wait_for_inputs(TARGET)
    if FP8_PARTS > 0 and slot < 0:
        if part == 0:
            share: tl.constexpr = DEPTH // max(FP8_PARTS, 1)
            cut = tl.program_id(2) % max(FP8_PARTS, 1)
            token = tl.program_id(2) // max(FP8_PARTS, 1) * WIDE + tl.arange(0, WIDE)
            for unit in range(UNITS):
                first = (tl.program_id(0) * UNITS + unit) * ROWS
                total = fp8_tile(
                    shared_codes, shared_scales, shared_w, shared_w_scales, first, cut * share,
                    token, token < tokens, DEPTH, DEPTH, share, ROWS, WIDE, TARGET,
                )  # fmt: skip
                place = (cut * tokens + token)[None, :] * OUTPUTS + (first + tl.arange(0, ROWS))[:, None]
                tl.store(shared_partial + place, total, mask=(token < tokens)[None, :])
    elif HIDDEN and slot >= picks:
        if (part == 0) & (tl.program_id(0) < OUTPUTS // 256):
            _hidden_block(partial, weights, hidden, hs, shared, shared_codes, shared_scales, limit, picks, slot,
                          tl.program_id(0), OUTPUTS // 2, PARTS)  # fmt: skip
    else:
        tokens_at: tl.constexpr = COLUMNS // 4
        at, column = tl.arange(0, tokens_at), tl.arange(0, COLUMNS)
        # Loaded together: each would cost a round trip before the weights can be asked for.
        expert = tl.load(slot_expert + slot).to(tl.int64)
        if SINGLE:
            rows = 1
            pick, wide_pick = tl.zeros((tokens_at,), tl.int32) + slot, tl.zeros((COLUMNS,), tl.int32) + slot
        else:
            rows = tl.load(slot_rows + slot)
            own = table + slot * picks
            pick = tl.load(own + at, mask=at < picks, other=0)
            wide_pick = tl.load(own + column // 4, mask=column // 4 < picks, other=0)
        stride: tl.constexpr = DEPTH // 2
        blocks: tl.constexpr = DEPTH // 128
        share: tl.constexpr = blocks // PARTS
        step: tl.constexpr = 2 - share % 2
        row = tl.program_id(0) * (ROWS * UNITS if TALL else ROWS)
        turned_row = row + _turned_row(tl.arange(0, ROWS))
        row += tl.arange(0, ROWS)
        if PLACED:  # bytes from the first block, the same for codes and scales
            block = tl.multiple_of(tl.load(homes + expert), 256)
            weight, words = w + block, scale + block
        else:
            weight, words = w + expert * (OUTPUTS * stride), scale + expert * (OUTPUTS * (stride // 16))
        weight += turned_row[:, None] * stride + part * (share * 64) + tl.arange(0, 64)[None, :]
        # A step is two blocks where their number is even, and scales of a step are one load.
        kind: tl.constexpr = tl.int64 if step == 2 else tl.int32
        near_kind: tl.constexpr = tl.uint16 if step == 2 else tl.uint8
        words = words.to(tl.pointer_type(kind), bitcast=True) + (row * blocks + part * share) // step
        shift = tl.arange(0, 2)[None, None, :] * 16
        steps: tl.constexpr = share // step
        first = 0
        while first < rows:  # not range(): the interpreter takes no tensor there
            live = first + column // 4 < rows
            token = tl.where(live, wide_pick, 0) // SHARED
            values = x + (4 * token + column % 4)[:, None] * DEPTH + part * (share * 128) + tl.arange(0, 128)[None, :]
            pick = tl.where(first + at < rows, pick, 0)
            factors = xs.to(tl.pointer_type(near_kind), bitcast=True) + (pick // SHARED * blocks + part * share) // step
            total = tl.zeros((ROWS, tokens_at, 2), tl.float32)
            place = partial + (part * picks + pick)[None, :] * OUTPUTS + row[:, None]
            stored = (first + at < rows)[None, :]
            # One step ahead: bytes are too narrow for the asynchronous copies that bring the rest.
            near, word = tl.load(factors).to(tl.int32), tl.load(words)
            for i in tl.range(0, UNITS * steps):
                k, ahead, unit, away = i, tl.minimum(i + 1, UNITS * steps - 1), 0, 0
                next_near, next_word = ahead, ahead
                if UNITS > 1:
                    unit = i // steps
                if TALL:
                    k, away, next_near = i % steps, unit * (ROWS * stride), ahead % steps
                    next_word = ahead // steps * (ROWS * blocks // step) + next_near
                then_near, then_word = tl.load(factors + next_near).to(tl.int32), tl.load(words + next_word)
                for half in tl.static_range(step):
                    tall = _weights(tl.load(weight + away + (k * step + half) * 64), TARGET, ROWS)
                    wide = operand(tl.load(values + (k * step + half) * 128, mask=live[:, None], other=0.0))
                    found = formats.dot(tall, tl.trans(wide), tl.zeros((ROWS, COLUMNS), tl.float32), TARGET)
                    # Groups in pairs, which a lane has beside each other.
                    even, odd = tl.split(found.reshape(ROWS, tokens_at, 2, 2))
                    bits = (word >> 32 * half).to(tl.int32)[:, None, None] >> shift
                    both = even * formats.power_of_two(bits & 0xFF) + odd * formats.power_of_two((bits >> 8) & 0xFF)
                    total += both * formats.power_of_two((near >> 8 * half) & 0xFF)[None, :, None]
                near, word = then_near, then_word
                if UNITS > 1 and i % steps == steps - 1:
                    behind = unit * (ROWS if TALL else picks * OUTPUTS)
                    tl.store(place + behind, tl.sum(total, 2) * 64.0, mask=stored)
                    total = tl.zeros((ROWS, tokens_at, 2), tl.float32)
            if UNITS == 1:
                tl.store(place, tl.sum(total, 2) * 64.0, mask=stored)
            first += tokens_at
            if not SINGLE:
                own += tokens_at
                pick = tl.load(own + at, mask=first + at < picks, other=0)
                wide_pick = tl.load(own + column // 4, mask=first + column // 4 < picks, other=0)
        if HIDDEN:
            inner: tl.constexpr = OUTPUTS // 2
            column = tl.program_id(0) * ROWS % inner // 128
            counter = arrived + slot * (inner // 128) + column
            tl.debug_barrier()
            if tl.atomic_add(counter, 1, sem="acq_rel") == 2 * (128 // ROWS) * PARTS - 1:
                tl.debug_barrier()
                _hidden_block(partial, weights, hidden, hs, shared, shared_codes, shared_scales, limit, picks, slot,
                              column, inner, PARTS)  # fmt: skip
                tl.store(counter, 0)


@triton.jit
def _hidden_kernel(
    partial, weights, hidden, hs, shared, shared_codes, shared_scales, limit, picks,
    INNER: tl.constexpr, PARTS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    formats.let_next_start(TARGET)
    formats.wait_for_inputs(TARGET)
    _hidden_block(partial, weights, hidden, hs, shared, shared_codes, shared_scales, limit, picks, tl.program_id(0),
                  tl.program_id(1), INNER, PARTS)  # fmt: skip


@triton.jit
def _combine_kernel(
    partial, shared_partial, out, picks, tokens, PICKED: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    FP8_PARTS: tl.constexpr, COLUMNS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    formats.let_next_start(TARGET)
    formats.wait_for_inputs(TARGET)
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < WIDTH
    total = tl.zeros((COLUMNS,), tl.float32)
    for i in tl.static_range(PICKED):
        own = tl.zeros((COLUMNS,), tl.float32)
        for part in tl.static_range(PARTS):
            own += tl.load(partial + (part * picks + token * PICKED + i) * WIDTH + column, mask=live, other=0.0)
        total += own
    if FP8_PARTS > 0:
        own = tl.zeros((COLUMNS,), tl.float32)
        for part in tl.static_range(FP8_PARTS):
            own += tl.load(shared_partial + (part * tokens + token) * WIDTH + column, mask=live, other=0.0)
        total += own.to(tl.bfloat16).to(tl.float32)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=live)


def cut(depth: int) -> dict[str, int]:
    """Return into how many parts k is cut, from the length of a weight's row alone."""
    return {"DEPTH": depth, "PARTS": 2 if depth >= LONG and depth % 512 == 0 else 1}


def list_rows(
    chosen: Tensor, experts: int, codes: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return rows by expert and turned activations (4T, D) if there are any, for chosen (T, K).

    Rows by expert are table (S, T * K) of picks (a token may repeat one), slot_expert (S,) and slot_rows (S,) int32.
    """
    (tokens, _), picks, made_for = chosen.shape, chosen.numel(), formats.target()
    slots, width = min(picks, experts), 0 if codes is None else codes.shape[1]
    columns, spread = triton.cdiv(width, COLUMNS), chosen.new_empty((4 * tokens, width), dtype=torch.uint8)
    table, (expert, rows) = chosen.new_empty((slots, picks)), chosen.new_empty((2, slots))
    _plan_kernel[(slots + tokens * columns,)](
        chosen, spread if codes is None else codes, table, expert, rows, spread, picks, slots, width,
        BY_PICK=picks <= experts, PICKS=max(16, triton.next_power_of_2(picks)), COLUMNS=COLUMNS,
        CUT=max(columns, 1), TARGET=made_for, **formats.launch(made_for),
    )  # fmt: skip
    return (table, expert, rows), spread


def forward(
    codes: Tensor, scales: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor,
    limit: float,
) -> Tensor:  # fmt: skip
    """Return (T, D) float32; operands as in `kernels.fp4_experts.mixture`."""
    lists, spread = list_rows(chosen, w13.shape[0], codes)
    out = codes.new_empty(codes.shape, dtype=torch.float32)
    site(scales, Routed(chosen, weights, out, spread, lists), w13, s13, w2, s2, None, limit, None, out)
    return out


def site(
    scales: Tensor, routed: Routed, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor,
    shared2: tuple[Tensor, Tensor] | None, limit: float, place: Tensor | None, out: Tensor | None,
    arrived: Tensor | None = None,
) -> Parts:  # fmt: skip
    """Put the sum into `out` (T, D) or leave its parts; operands as in `kernels.fp4_experts.site`."""
    chosen, spread, lists, xs = routed.chosen, routed.planes, routed.lists, scales
    assert spread is not None
    (tokens, picked), picks, width = chosen.shape, chosen.numel(), spread.shape[1]
    inner = w2.shape[2] * 2
    first, second = cut(width), cut(inner)
    single = lists is None
    lists = (chosen, chosen, chosen) if lists is None else lists
    slots = lists[1].numel()
    new, made_for = chosen.new_empty, formats.target()
    up = new((first["PARTS"], picks, 2 * inner), dtype=torch.float32)
    hidden, hs = new((4 * picks, inner), dtype=torch.uint8), new((picks, inner // BLOCK), dtype=torch.uint8)
    down = new((second["PARTS"], picks, width), dtype=torch.float32)
    fp8_parts = 0 if shared2 is None else SHARED_PARTS if inner % (128 * SHARED_PARTS) == 0 else 1
    codes, scales, weight, weight_scales, shared_down = (up,) * 5
    if shared2 is not None:
        weight, weight_scales = shared2
        codes = new((tokens, inner), dtype=torch.uint8)
        scales = new((tokens, inner // BLOCK), dtype=torch.uint8)
        shared_down = new((fp8_parts, tokens, width), dtype=torch.float32)
    fused = arrived is not None and single and picks * inner // 128 <= arrived.numel()
    lent = (as_operand(codes), scales, as_operand(weight), weight_scales, shared_down, tokens)
    # The codes are written by the first product where it makes the hidden columns, and read by the second.
    first_lent = (codes, *lent[1:], routed.weights, hidden, hs, routed.shared)
    first_lent += (up if arrived is None else arrived, limit)
    lent += (up, up, up, up, up, limit)
    few = picks <= FEW * slots
    shape = {"SINGLE": single, "ROWS": ROWS, "COLUMNS": 16 if few else 32, "TARGET": made_for}
    shape |= {"WIDE": min(MOST, wide_of(tokens)), "PLACED": place is not None}
    homes = chosen if place is None else place
    options = formats.launch(made_for, num_stages=STAGES)
    units = 1 if few else math.gcd(UNITS, first["PARTS"])
    _product_kernel[(2 * inner // ROWS, first["PARTS"] // units, slots + (fused and fp8_parts > 0))](
        as_operand(spread), xs, *lists, w13, s13, homes, up, picks, *first_lent, HIDDEN=fused, SHARED=picked,
        OUTPUTS=2 * inner, FP8_PARTS=0, UNITS=units, TALL=False, **first, **shape, **options,
    )  # fmt: skip
    if not fused:
        _hidden_kernel[(picks + (tokens if fp8_parts else 0), inner // BLOCK)](
            up, routed.weights, hidden, hs, routed.shared, codes, scales, limit, picks, INNER=inner,
            PARTS=first["PARTS"], TARGET=made_for, **formats.launch(made_for, num_warps=1),
        )  # fmt: skip
    units = 1 if few else math.gcd(UNITS, width // ROWS)
    _product_kernel[(width // ROWS // units, second["PARTS"], triton.cdiv(tokens, shape["WIDE"]) * fp8_parts + slots)](
        as_operand(hidden), hs, *lists, w2, s2, homes, down, picks, *lent, HIDDEN=False, SHARED=1, OUTPUTS=width,
        FP8_PARTS=fp8_parts, UNITS=units, TALL=units > 1, **second, **shape, **options,
    )  # fmt: skip
    if out is not None:
        _combine_kernel[(tokens, triton.cdiv(width, COLUMNS))](
            down, shared_down, out, picks, tokens, PICKED=picked, WIDTH=width, PARTS=second["PARTS"],
            FP8_PARTS=fp8_parts, COLUMNS=COLUMNS, TARGET=made_for, **formats.launch(made_for),
        )  # fmt: skip
    return Parts(shared_down, down.unflatten(1, (tokens, picked)))
