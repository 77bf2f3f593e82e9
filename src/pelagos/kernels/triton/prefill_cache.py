"""What a prompt's tokens leave in the cache, and the rows they attend, decoded from where they are stored.

Old window rows are read and new entries pooled before rings are written; then everything visible is decoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.layout import CacheLayout
from pelagos.kernels.ref.cache_write import CacheWeights
from pelagos.kernels.triton import formats
from pelagos.kernels.triton.cache_write import SLOTS, _append, _bytes, _pooled, _rings, _store_index, _store_main
from pelagos.kernels.triton.query import normed, rotated, rotation, turned

if TYPE_CHECKING:
    from pelagos.kernels.prefill_cache import Prompt

ROWS, KEYS = 8, 32  # decoded by a program


@triton.jit
def _entry_kernel(
    ends, source, stride, index_source, positions, places, firsts, owners, table, table_stride, slot_bytes, page_bytes,
    entry_turn, ape, norm, kv_ring, score_ring, main, main_scale, index_ape, index_norm, index_kv_ring,
    index_score_ring, index, index_scale, factor, eps, WIDTH: tl.constexpr, ROPE: tl.constexpr, SCALES: tl.constexpr,
    RATIO: tl.constexpr, SPAN: tl.constexpr, TAIL: tl.constexpr, PAGE: tl.constexpr, SLOTS: tl.constexpr,
    INDEX: tl.constexpr, ROUNDS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """The entry, or index key, of a window that ends with a row."""
    row = tl.load(ends + tl.program_id(0))
    position, first = tl.load(positions + row), tl.load(firsts + row)
    slot = tl.load(places + row).to(tl.int64) * slot_bytes // 4
    entry = position // RATIO
    page = tl.load(table + tl.load(owners + row) * table_stride + entry // (PAGE // RATIO)).to(tl.int64) * page_bytes
    inner = entry % (PAGE // RATIO)
    if tl.program_id(1) == 0:
        x = _pooled(source, stride, row, ape, kv_ring + slot, score_ring + slot, position, first, WIDTH, SPAN, RATIO,
                   TAIL, SLOTS)  # fmt: skip
        x = normed(formats.rounded(x, TARGET), tl.load(norm + tl.arange(0, WIDTH)).to(tl.float32), eps, WIDTH, TARGET)
        _store_main(turned(x, entry_turn + row * ROPE, ROPE, TARGET), main + page + inner * (WIDTH + 64),
                   main + page + main_scale + inner * SCALES, ROPE, SCALES)  # fmt: skip
    elif INDEX > 0:
        key = _pooled(index_source, stride, row, index_ape, index_kv_ring + slot, index_score_ring + slot, position,
                      first, INDEX, 2 * INDEX, RATIO, TAIL, SLOTS)  # fmt: skip
        weight = tl.load(index_norm + tl.arange(0, INDEX)).to(tl.float32)
        key = normed(formats.rounded(key, TARGET), weight, eps, INDEX, TARGET)
        key = rotated(turned(key, entry_turn + row * ROPE, ROPE, TARGET), ROUNDS, factor, TARGET)
        _store_index(key, index + page + inner * (INDEX // 2), index + page + index_scale + inner * (INDEX // 32))


@triton.jit
def _row_kernel(
    first, kv_norm, turn, source, stride, index_source, positions, places, owners, ends, starts, windows, keys,
    slot_bytes, window, window_scale, ape, kv_ring, score_ring, index_ape, index_kv_ring, index_score_ring, eps,
    LATENT: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr, SIZE: tl.constexpr, RING: tl.constexpr,
    SCALES: tl.constexpr, RATIO: tl.constexpr, SPAN: tl.constexpr, TAIL: tl.constexpr, INDEX: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """A token's window row, decoded and in the ring, and its compressor rows in the tails, if they are to stay."""
    row = tl.program_id(0)
    position, end = tl.load(positions + row), tl.load(ends + row)
    slot = tl.load(places + row).to(tl.int64) * slot_bytes
    owner = tl.load(owners + row)
    if tl.program_id(1) == 0:
        lane = tl.arange(0, WIDTH)
        x = tl.load(first + row.to(tl.int64) * (LATENT + WIDTH) + LATENT + lane).to(tl.float32).reshape(1, WIDTH)
        x = normed(x, tl.load(kv_norm + lane).to(tl.float32), eps, WIDTH, TARGET)
        x = turned(x, turn + row * ROPE, ROPE, TARGET)
        if position >= end - RING:
            at = position % RING
            _store_main(x, window + slot + at * (WIDTH + 64), window + slot + window_scale + at * SCALES, ROPE, SCALES)
        x = x.reshape(WIDTH // 64, 64)
        nope = (tl.arange(0, WIDTH // 64) < WIDTH // 64 - 1)[:, None]
        exponent = formats.fp8_scale_exponent(tl.max(tl.abs(x), 1))[:, None]
        stored = formats.quantise_block(x, exponent) * formats.power_of_two(exponent)
        own = tl.load(windows + owner) + SIZE - 1 + position - tl.load(starts + owner)
        x = tl.where(nope, stored, x).reshape(WIDTH)
        tl.store(keys + own.to(tl.int64) * WIDTH + lane, x.to(tl.bfloat16))
    elif RATIO > 0:  # noqa: SIM102 - without a compressor the rest is not even compiled
        if position >= end - TAIL:
            slot = slot // 4
            _append(source, stride, row, ape, kv_ring + slot, score_ring + slot, position, SPAN, RATIO, TAIL)
            if INDEX > 0:
                _append(index_source, stride, row, index_ape, index_kv_ring + slot, index_score_ring + slot, position,
                        2 * INDEX, RATIO, TAIL)  # fmt: skip


@triton.jit
def _decode_kernel(
    pool, scale, unit_bytes, units, unit_stride, base, count, starts, keys,
    WIDTH: tl.constexpr, SCALES: tl.constexpr, EACH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Main rows as bfloat16: entries of a sequence's pages, EACH a page, or with SIZE its ring's rows before a span."""
    owner = tl.program_id(0)
    index = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    if SIZE > 0:
        position = tl.load(starts + owner) - (SIZE - 1) + index
        live = (index < SIZE - 1) & (position >= 0)
        unit, inner = tl.load(units + owner) + index * 0, position % EACH
    else:
        live = index < tl.load(count + owner)
        unit, inner = tl.load(units + owner * unit_stride + index // EACH, mask=live, other=0), index % EACH
    lane = tl.arange(0, WIDTH)
    nope = (lane < WIDTH - 64)[None, :]
    own = pool + unit.to(tl.int64) * unit_bytes
    code = tl.load((own + inner * (WIDTH + 64))[:, None] + lane[None, :], mask=live[:, None] & nope, other=0)
    rope = (own + inner * (WIDTH + 64) + WIDTH - 64).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    tail = tl.load(rope[:, None] + (lane - (WIDTH - 64))[None, :], mask=live[:, None] & (nope == 0), other=0.0)
    exponent = (own + scale + inner * SCALES)[:, None] + (lane // 64)[None, :]
    byte = tl.load(exponent, mask=live[:, None] & nope, other=127)
    value = tl.where(nope, formats.e4m3_to_float(code) * formats.power_of_two(byte), tail.to(tl.float32)).to(
        tl.bfloat16
    )
    place = (tl.load(base + owner) + index).to(tl.int64)
    value = tl.where(live[:, None], value, 0.0)  # before the sequence
    tl.store(keys + place[:, None] * WIDTH + lane[None, :], value, mask=(live | (index < SIZE - 1))[:, None])


@triton.jit
def _index_kernel(
    pool, scale, page_bytes, table, table_stride, base, count, codes, scales,
    WIDTH: tl.constexpr, EACH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """FP4 keys of a sequence's pages as E4M3 codes of value / scale, the largest in [128, 256)."""
    owner = tl.program_id(0)
    index = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    live = index < tl.load(count + owner)
    page = tl.load(table + owner * table_stride + index // EACH, mask=live, other=0)
    own, inner = pool + page.to(tl.int64) * page_bytes, index % EACH
    lane = tl.arange(0, WIDTH)
    pair = tl.load((own + inner * (WIDTH // 2))[:, None] + (lane // 2)[None, :], mask=live[:, None], other=0)
    exponent = (own + scale + inner * (WIDTH // 32))[:, None] + (lane // 32)[None, :]
    byte = tl.load(exponent, mask=live[:, None], other=127)
    nibble = (pair.to(tl.int32) >> (lane % 2 * 4)[None, :]) & 0xF
    value = (((nibble & 8) << 28) | ((nibble & 7) << 22)).to(tl.float32, bitcast=True)  # times 2^-126
    top = (
        tl.max(tl.abs(value) * 8.507059173023462e37 * formats.power_of_two(byte), 1).to(tl.int32, bitcast=True) >> 23
    ) - 7
    top = tl.maximum(top, 1)
    shift = tl.minimum(tl.maximum(byte.to(tl.int32) - top[:, None] + 127, 1), 254)
    code = formats.e4m3_code(formats.round_to_e4m3(value * 8.507059173023462e37 * formats.power_of_two(shift)))
    place = (tl.load(base + owner) + index).to(tl.int64)
    tl.store(codes + place[:, None] * WIDTH + lane[None, :], code, mask=live[:, None])
    tl.store(scales + place, formats.power_of_two(top), mask=live)


def cache_write(
    first: Tensor, wide: Tensor | None, call: Prompt, layout: CacheLayout, layer: int, pages: Tensor, slots: Tensor,
    weights: CacheWeights, turn: Tensor, entry_turn: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return main keys, index codes and their scales as `kernels.prefill_cache.cache_write` does."""
    config, place, rows, made_for = layout.config, layout.layers[layer], call.rows, formats.target()
    width, rope, latent, size = config.head_dim, config.qk_rope_head_dim, config.q_lora_rank, config.sliding_window
    tokens, spans, tail, table = len(first), len(call.start), place.main_tail, rows.table
    found = call.entries[place.ratio] if place.ratio else None
    keys = first.new_empty((call.windows + (found.total if found else 0), width))
    index = config.index_head_dim if place.index is not None else 0
    none = turn if wide is None else wide
    span, ring = (0, 1) if tail is None else (tail.kv.width, tail.kv.rows)
    source, index_source = none, none.view(-1)[2 * span :]
    extra = [none if each is None else each for each in weights[2:]]
    main_rings, index_rings = _rings(slots, tail), _rings(slots, place.index_tail)
    window = _bytes(slots, place.window)
    sizes = {"WIDTH": width, "SCALES": place.window.parts[1]}
    _decode_kernel[(spans, triton.cdiv(size - 1, ROWS))](
        *window, layout.slot_bytes, call.slot, 1, call.window, call.start, call.start, keys,
        EACH=place.window.rows, SIZE=size, ROWS=ROWS, **sizes,
    )  # fmt: skip
    common = {"RATIO": place.ratio, "SPAN": span, "TAIL": ring, "INDEX": index, "ROPE": rope, "TARGET": made_for,
              "num_warps": 4, **sizes}  # fmt: skip
    places = (rows.positions, rows.slots)
    if found is not None and len(found.ends):
        _entry_kernel[(len(found.ends), 1 + (index > 0))](
            found.ends, source, source.stride(0), index_source, *places, rows.first, rows.owner, table, table.shape[1],
            layout.slot_bytes, layout.page_bytes, entry_turn, *extra[:2], *main_rings, *_bytes(pages, place.main),
            *extra[2:], *index_rings, *_bytes(pages, place.index), eps=config.rms_norm_eps,
            PAGE=layout.page_tokens, SLOTS=SLOTS, enable_fp_fusion=False, **rotation(max(index, 1)), **common,
        )  # fmt: skip
    _row_kernel[(tokens, 1 + (place.ratio > 0))](
        first, weights.kv_norm, turn, source, source.stride(0), index_source, *places, rows.owner, call.end, call.start,
        call.window, keys, layout.slot_bytes, *window, extra[0], *main_rings, extra[2], *index_rings,
        config.rms_norm_eps, LATENT=latent, SIZE=size, RING=place.window.rows, enable_fp_fusion=False, **common,
    )  # fmt: skip
    if found is None or place.main is None or found.total == 0:
        return keys, *((None, None) if not index else (keys.new_empty((0, index), dtype=torch.uint8), none[:0, 0]))
    _decode_kernel[(spans, triton.cdiv(found.most, ROWS))](
        *_bytes(pages, place.main), layout.page_bytes, table, table.shape[1], found.base, found.counts, call.start,
        keys[call.windows :], EACH=place.main.rows, SIZE=0, ROWS=ROWS, **sizes,
    )  # fmt: skip
    if place.index is None:
        return keys, None, None
    codes = torch.empty((found.total, index), dtype=torch.uint8, device=first.device)
    scales = torch.empty(found.total, dtype=torch.float32, device=first.device)
    _index_kernel[(spans, triton.cdiv(found.most, KEYS))](
        *_bytes(pages, place.index), layout.page_bytes, table, table.shape[1], found.base, found.counts, codes, scales,
        WIDTH=index, EACH=place.index.rows, KEYS=KEYS,
    )  # fmt: skip
    return keys, codes, scales
