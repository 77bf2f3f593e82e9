"""Experts with FP4 weights for a few tokens: every chosen expert's weights are streamed once, as released.

Five launches, no host in between: lists of rows by expert and unpacked activations; gate and up; SwiGLU and the
second quantisation; down; the sum over a token's picks. Of a whole expert site the router does the first, and the
shared expert's second product runs with down. Rows come in tiles of 16, k is cut by the weights' shape alone
and parts are added in order, so a token's bits do not depend on the others. Activations lie in two planes, even columns
before odd ones, as the nibbles of a weight byte do: no lane has to move.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.batch_rows import Parts, Routed
from pelagos.kernels.triton import formats
from pelagos.kernels.triton.skinny_gemm import as_operand, fp8_tile, wide_of

BLOCK = 128  # columns that share an activation scale
ROWS = 64  # outputs a program
LONG = 4096  # from here on k is cut in two
STAGES = 3  # of the pipeline, the best of 2 to 6 on an H200
COLUMNS = 1024  # of the elementwise kernels
MOST = 64  # tokens of a program of the shared expert
SHARED_PARTS = 2  # of the shared expert's k: its bytes are twice a routed expert's


@triton.jit
def _place(byte):
    """Where a plane keeps the column of weight byte `byte`: `turned` moves columns alike."""
    return byte // 64 * 64 + byte % 16 // 4 * 16 + byte % 4 // 2 * 8 + byte % 64 // 16 * 2 + byte % 2


@triton.jit
def turned(x):
    """Columns (ROWS, BYTES) in the order in which 16 consecutive bytes are one lane's share of a matrix operand."""
    if x.shape[1] % 64 == 0:
        x = tl.permute(x.reshape(x.shape[0], x.shape[1] // 64, 4, 4, 2, 2), (0, 1, 3, 4, 2, 5)).reshape(x.shape)
    return x


@triton.jit
def plane_block(pairs, scales, planes, token, cut, width, COLUMNS: tl.constexpr):
    """Unpack COLUMNS activation codes of a token, read in pairs, into its two bfloat16 planes."""
    block = cut * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    live = block < width // 2
    pair = tl.load(pairs + token * (width // 2) + block, mask=live, other=0).to(tl.int32)
    scale = formats.power_of_two(tl.load(scales + token * (width // 128) + block // 64, mask=live, other=127))
    even = formats.e4m3_to_float(pair & 0xFF) * scale
    odd = formats.e4m3_to_float((pair >> 8) & 0xFF) * scale
    tl.store(planes + token * width + _place(block), even.to(tl.bfloat16), mask=live)
    tl.store(planes + token * width + width // 2 + _place(block), odd.to(tl.bfloat16), mask=live)


@triton.jit
def _plan_kernel(
    chosen, codes, scales, table, slot_expert, slot_rows, planes,
    picks, slots, width, BY_PICK: tl.constexpr, PICKS: tl.constexpr, CAPACITY, COLUMNS: tl.constexpr, CUT: tl.constexpr,
    TARGET: tl.constexpr,
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
        tl.store(table + at * CAPACITY + rank, place, mask=(match > 0) & (rank < CAPACITY))
    else:
        plane_block(codes, scales, planes, (at - slots) // CUT, (at - slots) % CUT, width, COLUMNS)


@triton.jit
def _weight_pair(weight, scale, row, begin, stride, TARGET: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Even and odd columns (ROWS, BYTES) bfloat16 of weight rows `row`, bytes from `begin`."""
    groups: tl.constexpr = BYTES // 16
    byte = tl.load(weight + row[:, None] * stride + begin + tl.arange(0, BYTES)[None, :])
    group = tl.load(scale + row[:, None] * (stride // 16) + begin // 16 + tl.arange(0, groups)[None, :])
    factor = tl.broadcast_to(formats.expert_scale(group)[:, :, None], (ROWS, groups, 16)).reshape(ROWS, BYTES)
    even, odd = formats.e2m1_pair(byte, factor, TARGET)
    return turned(even), turned(odd)


@triton.jit
def _gated(gate, up, limit):
    """silu of the gate, clamped from above, times the clamped up."""
    gate = tl.minimum(gate, limit)
    return gate / (1.0 + tl.exp(-gate)) * tl.minimum(tl.maximum(up, -limit), limit)


@triton.jit
def _hidden_block(
    partial, weights, hidden, shared, shared_codes, shared_scales, limit, picks, pick, block,
    INNER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """SwiGLU, the routing weight and the quantisation of 128 hidden columns of a pick; planes for the next product.

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
        value = formats.quantise_block(value, exponent) * formats.power_of_two(exponent)
        place = lane % 2 * (INNER // 2) + block * 64 + _place(lane // 2)
        tl.store(hidden + pick * INNER + place, value.to(tl.bfloat16))
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
    x, table, slot_expert, slot_rows, w, scale, homes, partial, CAPACITY, picks,
    shared_codes, shared_scales, shared_w, shared_w_scales, shared_partial, tokens,
    weights, hidden, shared, arrived, limit, HIDDEN: tl.constexpr,
    SHARED: tl.constexpr, DEPTH: tl.constexpr, OUTPUTS: tl.constexpr, PARTS: tl.constexpr,
    SINGLE: tl.constexpr, PLACED: tl.constexpr, FP8_PARTS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BYTES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one expert for its tokens, over one part of k. SHARED picks have one row of x.

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
            first = tl.program_id(0) * ROWS
            total = fp8_tile(
                shared_codes, shared_scales, shared_w, shared_w_scales, first, cut * share,
                token, token < tokens, DEPTH, DEPTH, share, ROWS, WIDE, TARGET,
            )  # fmt: skip
            place = (cut * tokens + token)[None, :] * OUTPUTS + (first + tl.arange(0, ROWS))[:, None]
            tl.store(shared_partial + place, total, mask=(token < tokens)[None, :])
    elif HIDDEN and slot >= picks:
        if (part == 0) & (tl.program_id(0) < OUTPUTS // 256):
            _hidden_block(partial, weights, hidden, shared, shared_codes, shared_scales, limit, picks, slot,
                          tl.program_id(0), OUTPUTS // 2, PARTS)  # fmt: skip
    else:
        at = tl.arange(0, 16)
        # Loaded together: each would cost a round trip before the weights can be asked for.
        expert = tl.load(slot_expert + slot).to(tl.int64)
        if SINGLE:
            rows = 1
            pick = tl.zeros((16,), tl.int32) + slot
        else:
            rows = tl.load(slot_rows + slot)
            pick = tl.load(table + slot * CAPACITY + at, mask=at < CAPACITY, other=0)
        stride: tl.constexpr = DEPTH // 2
        share: tl.constexpr = stride // PARTS
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        if PLACED:  # bytes from the first block, the same for codes and scales
            block = tl.multiple_of(tl.load(homes + expert), 256)
            weight, scales = w + block, scale + block
        else:
            weight, scales = w + expert * (OUTPUTS * stride), scale + expert * (OUTPUTS * (stride // 16))
        weight, scales = weight + part * share, scales + part * (share // 16)
        first = 0
        while first < rows:  # not range(): the interpreter takes no tensor there
            live = first + at < rows
            pick = tl.where(live, pick, 0)
            source = x + (pick // SHARED)[None, :] * DEPTH + part * share + tl.arange(0, BYTES)[:, None]
            total = tl.zeros((ROWS, 16), tl.float32)
            for begin in tl.range(0, share, BYTES):
                even = tl.load(source + begin, mask=live[None, :], other=0.0)
                odd = tl.load(source + begin + stride, mask=live[None, :], other=0.0)
                w_even, w_odd = _weight_pair(weight, scales, row, begin, stride, TARGET, ROWS, BYTES)
                total = formats.dot(w_even, even, total, TARGET)
                total = formats.settled(formats.dot(w_odd, odd, total, TARGET), TARGET)
            tl.store(partial + (part * picks + pick)[None, :] * OUTPUTS + row[:, None], total, mask=live[None, :])
            first += 16
            if not SINGLE:
                pick = tl.load(table + slot * CAPACITY + first + at, mask=first + at < CAPACITY, other=0)
        if HIDDEN:
            inner: tl.constexpr = OUTPUTS // 2
            column = tl.program_id(0) * ROWS % inner // 128
            counter = arrived + slot * (inner // 128) + column
            tl.debug_barrier()
            if tl.atomic_add(counter, 1, sem="acq_rel") == 2 * (128 // ROWS) * PARTS - 1:
                tl.debug_barrier()
                _hidden_block(partial, weights, hidden, shared, shared_codes, shared_scales, limit, picks, slot, column,
                              inner, PARTS)  # fmt: skip
                tl.store(counter, 0)


@triton.jit
def _hidden_kernel(
    partial, weights, hidden, shared, shared_codes, shared_scales, limit, picks,
    INNER: tl.constexpr, PARTS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    formats.let_next_start(TARGET)
    formats.wait_for_inputs(TARGET)
    _hidden_block(partial, weights, hidden, shared, shared_codes, shared_scales, limit, picks, tl.program_id(0),
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
    """Return into how many parts k is cut and how many bytes of a weight row make a step, from its length alone."""
    parts = 2 if depth >= LONG and depth % 512 == 0 else 1
    return {"DEPTH": depth, "PARTS": parts, "BYTES": 128 if depth // 2 // parts % 128 == 0 else 64}


def list_rows(
    chosen: Tensor, experts: int, codes: Tensor | None = None, scales: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return rows by expert and planes (T, D) of activations if there are any, for chosen (T, K).

    Rows by expert are table (S, T) of picks, slot_expert (S,) and slot_rows (S,) int32.
    """
    (tokens, _), picks, made_for = chosen.shape, chosen.numel(), formats.target()
    slots, width = min(picks, experts), 0 if codes is None else codes.shape[1]
    columns, planes = triton.cdiv(width, COLUMNS), chosen.new_empty((tokens, width), dtype=torch.bfloat16)
    table, (expert, rows) = chosen.new_empty((slots, tokens)), chosen.new_empty((2, slots))
    pairs, scales = (chosen, chosen) if codes is None or scales is None else (codes.view(torch.int16), scales)
    _plan_kernel[(slots + tokens * columns,)](
        chosen, pairs, scales, table, expert, rows, planes, picks, slots, width, BY_PICK=picks <= experts,
        PICKS=max(16, triton.next_power_of_2(picks)), CAPACITY=tokens, COLUMNS=COLUMNS, CUT=max(columns, 1),
        TARGET=made_for, **formats.launch(made_for),
    )  # fmt: skip
    return (table, expert, rows), planes


def forward(
    codes: Tensor, scales: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor,
    limit: float,
) -> Tensor:  # fmt: skip
    """Return (T, D) float32; operands as in `kernels.fp4_experts.mixture`."""
    lists, planes = list_rows(chosen, w13.shape[0], codes, scales)
    out = codes.new_empty(codes.shape, dtype=torch.float32)
    site(Routed(chosen, weights, out, planes, lists), w13, s13, w2, s2, None, limit, None, out)
    return out


def site(
    routed: Routed, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared2: tuple[Tensor, Tensor] | None,
    limit: float, place: Tensor | None, out: Tensor | None, arrived: Tensor | None = None,
) -> Parts:  # fmt: skip
    """Put the sum into `out` (T, D) or leave its parts; operands as in `kernels.fp4_experts.site`."""
    chosen, planes, lists = routed.chosen, routed.planes, routed.lists
    assert planes is not None
    (tokens, width), picked, picks = planes.shape, chosen.shape[1], chosen.numel()
    inner = w2.shape[2] * 2
    first, second = cut(width), cut(inner)
    single = lists is None
    lists = (chosen, chosen, chosen) if lists is None else lists
    slots = lists[1].numel()
    new, made_for = planes.new_empty, formats.target()
    up = new((first["PARTS"], picks, 2 * inner), dtype=torch.float32)
    hidden = new((picks, inner))
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
    first_lent = (codes, *lent[1:], routed.weights, hidden, routed.shared, up if arrived is None else arrived, limit)
    lent += (up, up, up, up, limit)
    shape = {"SINGLE": single, "ROWS": ROWS, "WIDE": min(MOST, wide_of(tokens)), "TARGET": made_for}
    shape["PLACED"], homes = place is not None, chosen if place is None else place
    options = formats.launch(made_for, num_stages=STAGES)
    _product_kernel[(2 * inner // ROWS, first["PARTS"], slots + (fused and fp8_parts > 0))](
        planes, *lists, w13, s13, homes, up, tokens, picks, *first_lent,
        HIDDEN=fused, SHARED=picked, OUTPUTS=2 * inner, FP8_PARTS=0, **first, **shape, **options,
    )  # fmt: skip
    if not fused:
        _hidden_kernel[(picks + (tokens if fp8_parts else 0), inner // BLOCK)](
            up, routed.weights, hidden, routed.shared, codes, scales, limit, picks, INNER=inner, PARTS=first["PARTS"],
            TARGET=made_for, **formats.launch(made_for, num_warps=1),
        )  # fmt: skip
    _product_kernel[(width // ROWS, second["PARTS"], triton.cdiv(tokens, shape["WIDE"]) * fp8_parts + slots)](
        hidden, *lists, w2, s2, homes, down, tokens, picks, *lent,
        HIDDEN=False, SHARED=1, OUTPUTS=width, FP8_PARTS=fp8_parts, **second, **shape, **options,
    )  # fmt: skip
    if out is not None:
        _combine_kernel[(tokens, triton.cdiv(width, COLUMNS))](
            down, shared_down, out, picks, tokens, PICKED=picked, WIDTH=width, PARTS=second["PARTS"],
            FP8_PARTS=fp8_parts, COLUMNS=COLUMNS, TARGET=made_for, **formats.launch(made_for),
        )  # fmt: skip
    return Parts(shared_down, down.unflatten(1, (tokens, picked)))
