"""Experts with FP4 weights for a prompt: rows grouped by expert, weights expanded in registers.

A counting sort lists the picks by expert without the host. A program multiplies 128 weight rows by 64 picks; every 128
columns end an activation scale, so their sum leaves the matrix unit and joins a float32 total. Hopper has a product of
its own, in FP8: a weight's group scale becomes part of its E4M3 code, exact within 15 binades of its tile's largest.
A pick's bits depend on its own activations and weights alone: columns of a product do not meet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from pelagos.kernels.prefill_experts import SPARE
from pelagos.kernels.triton import formats, hopper_experts
from pelagos.kernels.triton.fp4_experts import _gated
from pelagos.kernels.triton.router import _choose_kernel

TILE = 64  # picks of a program
PICKS = 256  # picks a program of the sort
COLUMNS, GROUPS = 1024, 8  # of the kernels beside the products
STAGES, WARPS = 3, 8


@triton.jit
def _count_kernel(chosen, counts, totals, picks, EXPERTS: tl.constexpr, PADDED: tl.constexpr, PICKS: tl.constexpr):
    place = tl.program_id(0) * PICKS + tl.arange(0, PICKS)
    own = tl.load(chosen + place, mask=place < picks, other=-1)
    expert = tl.arange(0, PADDED)
    count = tl.sum((own[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * EXPERTS + expert, count, mask=expert < EXPERTS)
    tl.atomic_add(totals + expert, count, mask=expert < EXPERTS)


@triton.jit
def _offset_kernel(
    counts, totals, tile_expert, tile_first, tile_end, blocks, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr,
    PADDED: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Turn an expert's counts into where each block's picks of it go; list its tiles."""
    own = tl.program_id(0)
    expert = tl.arange(0, PADDED)
    total = tl.load(totals + expert, mask=expert < EXPERTS, other=0)
    tiles = (total + TILE - 1) // TILE
    begin = tl.sum(tl.where(expert < own, (total + ALIGN - 1) // ALIGN * ALIGN, 0), 0)
    first_tile = tl.sum(tl.where(expert < own, tiles, 0), 0)
    end = begin + tl.sum(tl.where(expert == own, total, 0), 0)
    block = tl.arange(0, BLOCKS)
    count = tl.load(counts + block * EXPERTS + own, mask=block < blocks, other=0)
    tl.store(counts + block * EXPERTS + own, begin + tl.cumsum(count, 0) - count, mask=block < blocks)
    at = begin
    while at < end:
        tl.store(tile_expert + first_tile, own)
        tl.store(tile_first + first_tile, at)
        tl.store(tile_end + first_tile, end)
        first_tile += 1
        at += TILE


@triton.jit
def _place_kernel(chosen, counts, order, place_of, picks, EXPERTS: tl.constexpr, PICKS: tl.constexpr):
    lane = tl.arange(0, PICKS)
    pick = tl.program_id(0) * PICKS + lane
    live = pick < picks
    own = tl.load(chosen + pick, mask=live, other=-1)
    other = tl.load(chosen + tl.program_id(0) * PICKS + lane, mask=live, other=-1)
    earlier = (own[:, None] == other[None, :]) & (lane[None, :] < lane[:, None])
    begin = tl.load(counts + tl.program_id(0) * EXPERTS + own, mask=live, other=0)
    place = begin + tl.sum(earlier.to(tl.int32), 1)
    tl.store(order + place, pick, mask=live)
    tl.store(place_of + pick, place, mask=live)


@triton.jit
def _turned_row(lane):
    """Which of 128 weight rows is loaded as row `lane`, for `_turned`."""
    return lane // 64 * 8 + lane // 8 % 8 * 16 + lane % 8


@triton.jit
def _turned(even, odd):
    """A matrix operand (128, 128) of even and odd columns (128, 64), no value of which has to change its lane.

    For 8 warps: of a row 16 consecutive bytes are one lane's share, and rows come as `_turned_row` says.
    """
    both = tl.permute(tl.join(even, odd).reshape(2, 8, 8, 4, 4, 4, 2), (1, 0, 2, 6, 4, 3, 5))
    return both.reshape(128, 128)


@triton.jit
def _source(lane):
    """Which of 128 columns lies at place `lane` of a turned row: even columns before odd ones, each as `_turned`."""
    byte = lane % 64
    return 2 * (byte // 4 % 4 * 16 + byte // 16 * 4 + byte % 4) + lane // 64


@triton.jit
def _turn_kernel(codes, scales, place_of, turned, xs, room, PICKED: tl.constexpr, WIDTH: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    """Turn a token's columns; write its scales, as float32, where each of its picks goes."""
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row, live = token.to(tl.int64) * WIDTH, column < WIDTH
    code = tl.load(codes + row + column // 128 * 128 + _source(column % 128), mask=live)
    tl.store(turned + row + column, code, mask=live)
    block = tl.program_id(1) * (COLUMNS // 128) + tl.arange(0, COLUMNS // 128)
    live = block < WIDTH // 128
    factor = formats.power_of_two(tl.load(scales + token * (WIDTH // 128) + block, mask=live, other=127))
    for i in tl.static_range(PICKED):
        tl.store(xs + block * room + tl.load(place_of + token * PICKED + i), factor, mask=live)


@triton.jit
def _weights(byte, word, base, TARGET: tl.constexpr):
    """A matrix operand (128, 128), times 2^-6, of 64 weight bytes a row and their four scale bytes."""
    group = (word[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 0xFF
    factor = tl.broadcast_to(formats.expert_scale(group - base + 121)[:, :, None], (128, 4, 16)).reshape(128, 64)
    even, odd = formats.e2m1_pair(byte, factor, TARGET)
    return _turned(even, odd)


@triton.jit
def _product_kernel(
    x, xs, order, tile_expert, tile_first, tile_end, w, scale, base, homes, out, room, SHARED: tl.constexpr,
    DEPTH: tl.constexpr, OUTPUTS: tl.constexpr, PLACED: tl.constexpr, TILE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """128 rows of an expert's weight times TILE of its picks. SHARED picks have one row of x; 0: each its own.

    Columns are ordered so that a lane finds four of its scales next to each other, and its neighbours' beside them.
    """
    tile = tl.program_id(1)
    first, end = tl.load(tile_first + tile), tl.load(tile_end + tile)
    if first < end:
        expert = tl.load(tile_expert + tile).to(tl.int64)
        lane, column = tl.arange(0, 128), tl.arange(0, TILE)
        place = first + column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2
        live = place < end
        if SHARED > 0:  # noqa: SIM108
            source = tl.load(order + place, mask=live, other=0) // SHARED
        else:
            source = tl.where(live, place, first)
        row = tl.program_id(0) * 128 + lane
        blocks: tl.constexpr = DEPTH // 128
        values = x + source.to(tl.int64)[:, None] * DEPTH + tl.arange(0, 128)[None, :]
        factors = xs + tl.multiple_of(first, 8) + column
        turned = tl.program_id(0) * 128 + _turned_row(lane)
        if PLACED:  # bytes from the first block, the same for codes and scales
            home = tl.multiple_of(tl.load(homes + expert), 256)
            weight, words = w + home, scale + home // 4
        else:
            weight, words = w + expert * (OUTPUTS * (DEPTH // 2)), scale + expert * (OUTPUTS * blocks)
        weight += turned[:, None] * (DEPTH // 2) + tl.arange(0, 64)[None, :]
        words += turned * blocks
        low = tl.load(base + expert * (OUTPUTS // 128) + tl.program_id(0)).to(tl.int32)
        total = tl.zeros((128, TILE), tl.float32)
        for k in tl.range(0, blocks):
            factor = tl.load(factors + k * room).reshape(TILE // 16, 4, 2, 2)
            factor = tl.permute(factor, (0, 2, 1, 3)).reshape(TILE)
            rows = formats.e4m3_to_float(tl.load(values + k * 128)).to(tl.bfloat16)
            tall = _weights(tl.load(weight + k * 64), tl.load(words + k), low, TARGET)
            total += formats.dot(tall, tl.trans(rows), tl.zeros((128, TILE), tl.float32), TARGET) * factor[None, :]
        total *= formats.power_of_two(low + 6)
        to = out + place.to(tl.int64)[None, :] * OUTPUTS + row[:, None]
        tl.store(to, formats.to_bfloat16(total, TARGET), mask=live[None, :])


@triton.jit
def _hidden_kernel(
    up, place_of, weights, hidden, hs, limit, room, INNER: tl.constexpr, GROUPS: tl.constexpr, TARGET: tl.constexpr
):
    """SwiGLU, routing weight and quantisation of GROUPS times 128 hidden columns of a pick, its columns turned."""
    pick = tl.program_id(0)
    place = tl.load(place_of + pick).to(tl.int64)
    group, lane = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, 128)
    live = group < INNER // 128
    column = group[:, None] * 128 + _source(lane)[None, :]
    gate = tl.load(up + place * (2 * INNER) + column, mask=live[:, None], other=0.0).to(tl.float32)
    other = tl.load(up + place * (2 * INNER) + INNER + column, mask=live[:, None], other=0.0).to(tl.float32)
    value = formats.rounded(_gated(gate, other, limit) * tl.load(weights + pick), TARGET)
    exponent = formats.fp8_scale_exponent(tl.max(tl.abs(value), 1))
    code = formats.e4m3_block(value, exponent[:, None])
    tl.store(hidden + place * INNER + group[:, None] * 128 + lane[None, :], code, mask=live[:, None])
    tl.store(hs + group * room + place, formats.power_of_two(exponent), mask=live)


@triton.jit
def _combine_kernel(
    down, place_of, shared, out, PICKED: tl.constexpr, WIDTH: tl.constexpr, HAS_SHARED: tl.constexpr,
    COLUMNS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < WIDTH
    total = tl.zeros((COLUMNS,), tl.float32)
    for i in tl.static_range(PICKED):
        place = tl.load(place_of + token * PICKED + i).to(tl.int64)
        total += tl.load(down + place * WIDTH + column, mask=live, other=0.0).to(tl.float32)
    if HAS_SHARED:
        total += tl.load(shared + token * WIDTH + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, formats.to_bfloat16(total, TARGET), mask=live)


def choose(
    logits: Tensor, bias: Tensor | None, table: Tensor | None, ids: Tensor, experts: int, picks: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return chosen (T, K) int32 and weights (T, K) float32 as `kernels.prefill_experts.choose` does."""
    tokens, width = logits.shape
    padded = triton.next_power_of_2(width)
    logits = functional.pad(logits, (0, padded - width)) if padded > width else logits
    chosen = torch.empty((tokens, picks), dtype=torch.int32, device=logits.device)
    weights = torch.empty((tokens, picks), dtype=torch.float32, device=logits.device)
    _choose_kernel[(tokens,)](
        logits, logits if bias is None else bias, ids if table is None else table, ids, chosen, weights, tokens,
        experts, scaling, PARTS=1, EXPERTS=padded, PICKS=picks, BY_TABLE=table is not None, TARGET=formats.target(),
        num_warps=1,
    )  # fmt: skip
    return chosen, weights


def apart(
    codes: Tensor, scales: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor,
    bases: tuple[Tensor, Tensor], limit: float, place: Tensor | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    """Compute every pick by itself; operands and result as in `kernels.prefill_experts`."""
    (tokens, width), picked, experts, inner = codes.shape, chosen.shape[1], bases[0].shape[0], w2.shape[2] * 2
    picks, made_for = tokens * picked, formats.target()
    tile = hopper_experts.TILE if formats.hopper(codes.device) else TILE
    blocks, tiles = triton.cdiv(picks, PICKS), picks // tile + min(experts, picks)
    padded = max(16, triton.next_power_of_2(experts))

    def new(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=codes.device)

    room = picks + SPARE * min(experts, picks)
    room += -room % tile + tile  # whole tiles may be read from any place
    counts, order, place_of = new(blocks, experts), new(room), new(picks)
    lists = torch.zeros(3 * tiles + experts, dtype=torch.int32, device=codes.device)
    *table, totals = lists.split((tiles, tiles, tiles, experts))
    _count_kernel[(blocks,)](chosen, counts, totals, picks, EXPERTS=experts, PADDED=padded, PICKS=PICKS)
    _offset_kernel[(experts,)](
        counts, totals, *table, blocks, BLOCKS=max(16, triton.next_power_of_2(blocks)), EXPERTS=experts, PADDED=padded,
        TILE=tile, ALIGN=SPARE,
    )  # fmt: skip
    _place_kernel[(blocks,)](chosen, counts, order, place_of, picks, EXPERTS=experts, PICKS=PICKS)
    turned, xs = torch.empty_like(codes), new(width // 128, room, dtype=torch.float32)
    _turn_kernel[(tokens, triton.cdiv(width, COLUMNS))](
        codes, scales, place_of, turned, xs, room, PICKED=picked, WIDTH=width, COLUMNS=COLUMNS
    )
    up, down = (new(room, size, dtype=torch.bfloat16) for size in (2 * inner, width))
    hidden, hs = new(room, inner, dtype=torch.uint8), new(inner // 128, room, dtype=torch.float32)

    def product(x: Tensor, xs: Tensor, weight: Tensor, scale: Tensor, base: Tensor, out: Tensor, each: int) -> None:
        sizes = {"SHARED": each, "DEPTH": x.shape[1], "OUTPUTS": out.shape[1], "PLACED": place is not None}
        homes = chosen if place is None else place
        if tile != TILE:
            return hopper_experts.product(tiles, x, xs, order, *table, weight, scale, base, homes, out, room, **sizes)
        _product_kernel[(out.shape[1] // 128, tiles)](
            x, xs, order, *table, weight, scale.view(torch.int32), base, homes, out, room, **sizes, TILE=TILE,
            TARGET=made_for, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip

    product(turned, xs, w13, s13, bases[0], up, picked)
    _hidden_kernel[(picks, triton.cdiv(inner, 128 * GROUPS))](
        up, place_of, weights, hidden, hs, limit, room, INNER=inner, GROUPS=GROUPS, TARGET=made_for
    )
    product(hidden, hs, w2, s2, bases[1], down, 0)

    def added(rows: slice, shared: Tensor | None = None) -> Tensor:
        own, kind = place_of.view(tokens, picked)[rows], {"PICKED": picked, "WIDTH": width, "COLUMNS": COLUMNS}
        out, kind["HAS_SHARED"] = new(len(own), width, dtype=torch.bfloat16), shared is not None
        _combine_kernel[(len(own), triton.cdiv(width, COLUMNS))](down, own, shared, out, **kind, TARGET=made_for)
        return out

    return added
