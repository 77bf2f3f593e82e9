"""What a decode step keeps of a token, one launch: a program a row and kind of thing kept.

Kinds are the query latent, the window row, the main compressor and the index compressor. A window that ends with a row
pools its slots by an online softmax over tiles in order: tokens of this call from `projected`, older from the tail.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.batch_rows import Rows
from pelagos.kernels.layout import CacheLayout, Section, Tail
from pelagos.kernels.ref.cache_write import CacheWeights, widths
from pelagos.kernels.triton import formats
from pelagos.kernels.triton.query import fp4, normed, rotated, rotation, turned

SLOTS = 8  # pooled at once
WARPS = 4  # as the merged product has, which may do the same: sums depend on it


@triton.jit
def _store_main(x, part, scale, ROPE: tl.constexpr, SCALES: tl.constexpr):
    """Encode x (1, WIDTH) of bfloat16 values at byte pointers: FP8 in blocks of 64, BF16 rope (64 channels), scales."""
    groups: tl.constexpr = x.shape[1] // 64
    x = x.reshape(groups, 64)
    group, lane = tl.arange(0, groups), tl.arange(0, 64)
    exponent = formats.fp8_scale_exponent(tl.max(tl.abs(x), 1))
    nope = group < groups - 1
    place = group[:, None] * 64 + lane[None, :]
    tl.store(part + place, formats.e4m3_block(x, exponent[:, None]), mask=nope[:, None] & (place >= 0))
    rope = (part + (groups - 1) * 64).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    tl.store(rope + (place - (groups - 1) * 64), x.to(tl.bfloat16), mask=(~nope)[:, None] & (place >= 0))
    tl.store(scale + group, exponent.to(tl.uint8), mask=nope)
    spare = tl.arange(0, SCALES)
    tl.store(scale + spare, (spare * 0).to(tl.uint8), mask=spare >= groups - 1)


@triton.jit
def _store_index(x, part, scale):
    """Encode x (1, WIDTH) as FP4, two a byte, and a scale byte for every 32 channels."""
    width: tl.constexpr = x.shape[1]
    code, _, byte = fp4(x.reshape(width // 32, 32))
    even, odd = tl.split(code.reshape(width // 2, 2))
    tl.store(part + tl.arange(0, width // 2), (even | (odd << 4)).to(tl.uint8))
    tl.store(scale + tl.arange(0, width // 32), byte.to(tl.uint8))


@triton.jit
def _append(
    source, stride, row, ape, kv_ring, score_ring, position, SPAN: tl.constexpr, RATIO: tl.constexpr, RING: tl.constexpr
):
    """Put a row's kv and biased gate, SPAN columns each from `source`, into the rings (float32)."""
    lane = tl.arange(0, SPAN)
    own = source + row.to(tl.int64) * stride + lane
    place = position % RING * SPAN + lane
    tl.store(kv_ring + place, tl.load(own))
    tl.store(score_ring + place, tl.load(own + SPAN) + tl.load(ape + position % RATIO * SPAN + lane))


@triton.jit
def _pooled(
    source, stride, row, ape, kv_ring, score_ring, position, first, WIDTH: tl.constexpr, SPAN: tl.constexpr,
    RATIO: tl.constexpr, RING: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr = 3,
):  # fmt: skip
    """(1, WIDTH): the window that ends at `position`, slots weighted by a softmax a channel."""
    count: tl.constexpr = RATIO * (SPAN // WIDTH)
    lane = tl.arange(0, WIDTH)[None, :]
    top = tl.full((1, WIDTH), -1e30, tl.float32)
    total, out = tl.zeros((1, WIDTH), tl.float32), tl.zeros((1, WIDTH), tl.float32)
    for low in tl.range(0, count, SLOTS, num_stages=STAGES if count > SLOTS else 1):
        slot = low + tl.arange(0, SLOTS)
        at = position - (count - 1) + slot
        new, real = at >= first, (at >= 0)[:, None]
        # The previous window gives its first channels, the current one its last.
        column = slot // RATIO * WIDTH if SPAN > WIDTH else slot * 0
        fresh = source + (row + at - position).to(tl.int64) * stride + column
        ring = tl.maximum(at, 0) % RING * SPAN + column
        value = tl.load(tl.multiple_of(tl.where(new, fresh, kv_ring + ring), 8)[:, None] + lane, mask=real, other=0.0)
        score = tl.load(tl.multiple_of(tl.where(new, fresh + SPAN, score_ring + ring), 8)[:, None] + lane,
                        mask=real, other=0.0)  # fmt: skip
        bias = (ape + tl.maximum(at, 0) % RATIO * SPAN + column)[:, None] + lane
        score = tl.where(real, score + tl.load(bias, mask=new[:, None], other=0.0), -1e30)
        most = tl.maximum(top, tl.max(score, 0)[None, :])
        keep, share = tl.exp(top - most), tl.where(real, tl.exp(score - most), 0.0)
        total = total * keep + tl.sum(share, 0)[None, :]
        out = out * keep + tl.sum(share * value, 0)[None, :]
        top = most
    return out / total


@triton.jit
def keep(
    kind, row, projected, stride, positions, places, firsts, owners, table, frozens, table_stride, q_norm, kv_norm,
    turn, codes, scales, window, window_scale, slot_bytes, ape, norm, kv_ring, score_ring, main, main_scale, index_ape,
    index_norm, index_kv_ring, index_score_ring, index, index_scale, page_bytes, entry_turn, head_weights, head_factor,
    factor, eps, LATENT: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr,
    RING: tl.constexpr, SCALES: tl.constexpr, RATIO: tl.constexpr, SPAN: tl.constexpr, TAIL: tl.constexpr,
    PAGE: tl.constexpr, SLOTS: tl.constexpr, INDEX: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
    ROUNDS: tl.constexpr, TARGET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write what a row leaves of one kind."""
    position = tl.load(positions + row)
    slot = tl.load(places + row).to(tl.int64) * slot_bytes
    own = projected + row.to(tl.int64) * stride
    if kind == 0:
        lane = tl.arange(0, PADDED)
        x = formats.rounded(tl.load(own + lane, mask=lane < LATENT, other=0.0), TARGET).reshape(1, PADDED)
        weight = tl.load(q_norm + lane, mask=lane < LATENT, other=0.0).to(tl.float32)
        x = normed(x, weight, eps, LATENT, TARGET).reshape(PADDED // 128, 128)
        exponent = formats.fp8_scale_exponent(tl.max(tl.abs(x), 1))
        group = tl.arange(0, PADDED // 128)
        place = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        tl.store(codes + row * LATENT + place, formats.e4m3_block(x, exponent[:, None]), mask=place < LATENT)
        tl.store(scales + row * (LATENT // 128) + group, exponent.to(tl.uint8), mask=group < LATENT // 128)
        if INDEX > 0:
            head = tl.arange(0, HEADS_PADDED)
            x = tl.load(own + (LATENT + WIDTH + 2 * SPAN + 4 * INDEX) + head, mask=head < HEADS, other=0.0)
            x = formats.rounded(formats.rounded(x, TARGET) * head_factor, TARGET)
            tl.store(head_weights + row * HEADS + head, x, mask=head < HEADS)
    elif position >= 0:
        lane = tl.arange(0, WIDTH)
        if kind == 1:
            x = formats.rounded(tl.load(own + LATENT + lane), TARGET).reshape(1, WIDTH)
            x = normed(x, tl.load(kv_norm + lane).to(tl.float32), eps, WIDTH, TARGET)
            at = position % RING
            _store_main(turned(x, turn + row * ROPE, ROPE, TARGET), window + slot + at * (WIDTH + 64),
                        window + slot + window_scale + at * SCALES, ROPE, SCALES)  # fmt: skip
        elif RATIO > 0:
            first = tl.load(firsts + row)
            entry = position // RATIO
            writes = (position % RATIO == RATIO - 1) & (position >= tl.load(frozens + row))
            page = tl.load(table + tl.load(owners + row) * table_stride + entry // (PAGE // RATIO))
            page = page.to(tl.int64) * page_bytes
            inner = entry % (PAGE // RATIO)
            slot = slot // 4
            if kind == 2:
                source = projected + (LATENT + WIDTH)
                _append(source, stride, row, ape, kv_ring + slot, score_ring + slot, position, SPAN, RATIO, TAIL)
                if writes:
                    x = _pooled(source, stride, row, ape, kv_ring + slot, score_ring + slot, position, first,
                                WIDTH, SPAN, RATIO, TAIL, SLOTS, STAGES)  # fmt: skip
                    x = normed(formats.rounded(x, TARGET), tl.load(norm + lane).to(tl.float32), eps, WIDTH, TARGET)
                    _store_main(turned(x, entry_turn + row * ROPE, ROPE, TARGET), main + page + inner * (WIDTH + 64),
                                main + page + main_scale + inner * SCALES, ROPE, SCALES)  # fmt: skip
            elif INDEX > 0:
                source = projected + (LATENT + WIDTH + 2 * SPAN)
                _append(source, stride, row, index_ape, index_kv_ring + slot, index_score_ring + slot, position,
                        2 * INDEX, RATIO, TAIL)  # fmt: skip
                if writes:
                    x = _pooled(source, stride, row, index_ape, index_kv_ring + slot, index_score_ring + slot, position,
                                first, INDEX, 2 * INDEX, RATIO, TAIL, SLOTS, STAGES)  # fmt: skip
                    weight = tl.load(index_norm + tl.arange(0, INDEX)).to(tl.float32)
                    x = normed(formats.rounded(x, TARGET), weight, eps, INDEX, TARGET)
                    x = rotated(turned(x, entry_turn + row * ROPE, ROPE, TARGET), ROUNDS, factor, TARGET)
                    scale = index + page + index_scale + inner * (INDEX // 32)
                    _store_index(x, index + page + inner * (INDEX // 2), scale)


@triton.jit(do_not_specialize=["table_stride"])
def _kernel(
    projected, stride, positions, places, firsts, owners, table, frozens, table_stride, q_norm, kv_norm, turn, codes,
    scales, window, window_scale, slot_bytes, ape, norm, kv_ring, score_ring, main, main_scale, index_ape, index_norm,
    index_kv_ring, index_score_ring, index, index_scale, page_bytes, entry_turn, head_weights, head_factor, factor, eps,
    LATENT: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr, RING: tl.constexpr,
    SCALES: tl.constexpr, RATIO: tl.constexpr, SPAN: tl.constexpr, TAIL: tl.constexpr, PAGE: tl.constexpr,
    SLOTS: tl.constexpr, INDEX: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, ROUNDS: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    formats.let_next_start(TARGET)
    formats.wait_for_inputs(TARGET)
    keep(
        tl.program_id(0), tl.program_id(1), projected, stride, positions, places, firsts, owners, table, frozens,
        table_stride, q_norm, kv_norm, turn, codes, scales, window, window_scale, slot_bytes, ape, norm, kv_ring,
        score_ring, main, main_scale, index_ape, index_norm, index_kv_ring, index_score_ring, index, index_scale,
        page_bytes, entry_turn, head_weights, head_factor, factor, eps, LATENT, PADDED, WIDTH, ROPE, RING, SCALES,
        RATIO, SPAN, TAIL, PAGE, SLOTS, INDEX, HEADS, HEADS_PADDED, ROUNDS, TARGET, 3,
    )  # fmt: skip


def _bytes(pool: Tensor, section: Section | None) -> tuple[Tensor, int]:
    """Return a section's bytes from its row 0 in unit 0 on, and where its scales begin."""
    return (pool, 0) if section is None else (pool.view(-1)[section.offset :], section.part(1) - section.offset)


def _rings(slots: Tensor, tail: Tail | None) -> tuple[Tensor, Tensor]:
    """Return the float32 rows of a tail's kv and scores in slot 0."""
    found = slots.view(-1).view(torch.float32)
    return (found, found) if tail is None else (found[tail.kv.offset // 4 :], found[tail.score.offset // 4 :])


def operands(
    projected: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, slots: Tensor,
    weights: CacheWeights, turn: Tensor, entry_turn: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[Tensor | float, ...], dict[str, int]]:  # fmt: skip
    """Return the results to be written, and the operands and constants of `keep`."""
    config, place = layout.config, layout.layers[layer]
    tokens, latent, width, index = len(rows.positions), config.q_lora_rank, config.head_dim, 0
    new, none, heads = projected.new_empty, turn, config.index_n_heads
    codes, scales = (new((tokens, latent // size), dtype=torch.uint8) for size in (1, 128))
    head_weights, main, span = none, (pages, 0), 0
    index_part, tail = main, 1
    if place.main is not None and place.main_tail is not None:
        main = pages.view(-1)[place.main.offset :], place.main.part(1) - place.main.offset
        span, tail = place.main_tail.kv.width, place.main_tail.kv.rows
    if place.index is not None:
        index_part = pages.view(-1)[place.index.offset :], place.index.part(1) - place.index.offset
        index, head_weights = config.index_head_dim, new((tokens, heads))
    extra = [none if each is None else each for each in weights[2:]]
    values = (
        projected, projected.stride(0), rows.positions, rows.slots, rows.first, rows.owner, rows.table, rows.frozen,
        rows.table.shape[1], weights.q_norm, weights.kv_norm, turn, codes, scales,
        slots.view(-1)[place.window.offset :], place.window.part(1) - place.window.offset, layout.slot_bytes,
        *extra[:2], *_rings(slots, place.main_tail), *main, *extra[2:], *_rings(slots, place.index_tail), *index_part,
        layout.page_bytes, none if entry_turn is None else entry_turn, head_weights,
        config.index_head_dim**-0.5 * heads**-0.5, rotation(max(index, 1))["factor"], config.rms_norm_eps,
    )  # fmt: skip
    constants = {
        "LATENT": latent, "PADDED": triton.next_power_of_2(latent), "WIDTH": width, "ROPE": config.qk_rope_head_dim,
        "RING": place.window.rows, "SCALES": place.window.parts[1], "RATIO": place.ratio, "SPAN": span, "TAIL": tail,
        "PAGE": layout.page_tokens, "SLOTS": SLOTS, "INDEX": index, "HEADS": heads,
        "HEADS_PADDED": triton.next_power_of_2(heads), "ROUNDS": rotation(max(index, 1))["ROUNDS"],
    }  # fmt: skip
    return (codes, scales, None if place.index is None else head_weights), values, constants


def forward(
    projected: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, slots: Tensor,
    weights: CacheWeights, turn: Tensor, entry_turn: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Write what rows leave and return (codes, scales, head_weights) as `kernels.cache_write.cache_write` does."""
    results, values, constants = operands(projected, rows, layout, layer, pages, slots, weights, turn, entry_turn)
    made_for, kinds = formats.target(), len(widths(layout.config, layout.layers[layer].ratio)) // 2 + 1
    _kernel[(kinds, len(rows.positions))](
        *values, **constants, TARGET=made_for, **formats.launch(made_for, num_warps=WARPS, enable_fp_fusion=False)
    )
    return results
