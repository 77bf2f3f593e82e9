"""Index scores of a prompt's queries and their best: FP4 values as E4M3 operands, keys in chunks, an exact selection.

A tile of keys meets one query's heads at a time: heads are columns of the product, so their sum stays within a few
lanes. The scores of a chunk are selected from, together with the best so far, before the next chunk is scored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.layout import OVERLAP_RATIO
from pelagos.kernels.prefill_indexer import CHUNK
from pelagos.kernels.triton.formats import PTX, dot, e4m3_code, e4m3_to_float, power_of_two, round_to_e4m3, target

if TYPE_CHECKING:
    from pelagos.kernels.prefill_cache import Prompt

KEYS = 128  # a tile
STAGES, WARPS = 4, 4
_LEAST = tl.constexpr(-(1 << 31))


@triton.jit
def _query_kernel(q, head_weights, codes, weights, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """A row's queries as E4M3 codes, the largest in [128, 256), what they are divided by joining the head's weight."""
    head, lane = tl.program_id(0) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH)
    place = head.to(tl.int64)[:, None] * WIDTH + lane[None, :]
    x = tl.load(q + place).to(tl.float32)
    top = tl.maximum((tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) >> 23) - 7, 1)
    inverse = (254 - top << 23).to(tl.float32, bitcast=True)
    tl.store(codes + place, e4m3_code(round_to_e4m3(x * inverse[:, None])))
    tl.store(weights + head, tl.load(head_weights + head) * power_of_two(top))


@triton.jit
def _operand(value, TARGET: tl.constexpr):
    return value if TARGET == "ptx" else e4m3_to_float(value).to(tl.bfloat16)


@triton.jit
def _score_kernel(
    q, weights, keys, scales, blocks, base, seen, out, low, CHUNK: tl.constexpr,
    HEADS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """The scores (rows, KEYS) of a block of queries of one sequence."""
    block = tl.program_id(1)
    first, rows, owner = tl.load(blocks + 3 * block), tl.load(blocks + 3 * block + 1), tl.load(blocks + 3 * block + 2)
    most = tl.load(seen + first + rows - 1)
    begin = tl.program_id(0) * KEYS
    if low + begin < most:
        at = begin + tl.arange(0, KEYS)
        place = tl.load(base + owner) + tl.minimum(low + at, most - 1)
        lane, head = tl.arange(0, WIDTH), tl.arange(0, PADDED)
        source = head if PADDED == HEADS else tl.minimum(head, HEADS - 1)  # padding has no weight
        own = _operand(tl.load(keys + place.to(tl.int64)[:, None] * WIDTH + lane[None, :]), TARGET)
        scale = tl.load(scales + place)
        for i in tl.range(0, rows):
            row = (first + i).to(tl.int64)
            other = _operand(tl.load(q + (row * HEADS + source)[:, None] * WIDTH + lane[None, :]), TARGET)
            weight = tl.load(weights + row * HEADS + source)
            if PADDED > HEADS:
                weight = tl.where(head < HEADS, weight, 0.0)
            product = dot(own, tl.trans(other), tl.zeros((KEYS, PADDED), tl.float32), TARGET)
            score = tl.sum(tl.maximum(product, 0.0) * weight[None, :], 1) * scale
            tl.store(out + row * CHUNK + at, score)


@triton.jit
def _select_kernel(
    scores, seen, low, old_scores, old, best_scores, best, CHUNK: tl.constexpr, TOPK: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The best TOPK of a row's best so far and a chunk of scores, by index, then -1; a tie goes to the lower index."""
    row = tl.program_id(0).to(tl.int64)
    place, rank = tl.arange(0, CHUNK), tl.arange(0, TOPK)
    total = tl.load(seen + row)
    # Order-preserving integers; what is not there is the least.
    new = tl.load(scores + row * CHUNK + place)  # all of it, so that a lane's share is in one piece
    bits = tl.where(new == new, new + 0.0, -float("inf")).to(tl.int32, bitcast=True)
    bits = tl.where(low + place < total, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _LEAST)
    kept = tl.full((TOPK,), -1, tl.int32)
    kept_bits = tl.full((TOPK,), _LEAST, tl.int32)
    if not FIRST:
        kept = tl.load(old + row * TOPK + rank)
        kept_bits = tl.load(old_scores + row * TOPK + rank)
    least = tl.full((), _LEAST, tl.int32)
    if total > TOPK:
        # The largest integer that at least TOPK reach, from the highest bit in which what it lies between differs,
        # exactly TOPK ending the search.
        highest = tl.maximum(tl.max(bits, 0), tl.max(kept_bits, 0))
        lowest = tl.min(tl.where(low + place < total, bits, 0x7FFFFFFF) if FIRST else kept_bits, 0)
        bit = tl.full((), 31, tl.int32)
        while (bit >= 0) & (((lowest ^ highest) >> bit & 1) == 0):
            bit -= 1
        least = tl.where(bit == 31, _LEAST, lowest & -(tl.full((), 2, tl.int32) << bit))
        while bit >= 0:
            trial = least ^ (tl.full((), 1, tl.int32) << bit)
            reach = tl.sum((bits >= trial).to(tl.int32), 0) + tl.sum((kept_bits >= trial).to(tl.int32), 0)
            least = tl.where(reach >= TOPK, trial, least)
            bit = tl.where(reach == TOPK, -1, bit - 1)
    above, kept_above = bits > least, kept_bits > least
    tie, kept_tie = (bits == least) & (low + place < total), (kept_bits == least) & (kept >= 0)
    room = TOPK - tl.sum(above.to(tl.int32), 0) - tl.sum(kept_above.to(tl.int32), 0)
    kept_ties = tl.sum(kept_tie.to(tl.int32), 0)
    kept_chosen, chosen = kept_above | kept_tie, above | tie
    if kept_ties + tl.sum(tie.to(tl.int32), 0) > room:
        kept_chosen = kept_above | (kept_tie & (tl.cumsum(kept_tie.to(tl.int32), 0) <= room))
        chosen = above | (tie & (tl.cumsum(tie.to(tl.int32), 0) + kept_ties <= room))
    count = tl.sum(kept_chosen.to(tl.int32), 0)
    kept_at = tl.cumsum(kept_chosen.to(tl.int32), 0) - 1
    at = tl.cumsum(chosen.to(tl.int32), 0) - 1 + count
    tl.store(best + row * TOPK + kept_at, kept, mask=kept_chosen)
    tl.store(best + row * TOPK + at, low + place, mask=chosen)
    tl.store(best_scores + row * TOPK + kept_at, kept_bits, mask=kept_chosen)
    tl.store(best_scores + row * TOPK + at, bits, mask=chosen)
    rest = count + tl.sum(chosen.to(tl.int32), 0)
    tl.store(best + row * TOPK + rank, kept * 0 - 1, mask=rank >= rest)
    tl.store(best_scores + row * TOPK + rank, tl.full((TOPK,), _LEAST, tl.int32), mask=rank >= rest)


def pick(index_q: Tensor, head_weights: Tensor, call: Prompt, codes: Tensor, scales: Tensor, topk: int) -> Tensor:
    """Return picks (T, topk) int32 as `kernels.prefill_indexer.pick` does."""
    found, (tokens, heads, width), made_for = call.entries[OVERLAP_RATIO], index_q.shape, target()
    q = torch.empty(index_q.shape, dtype=torch.uint8, device=index_q.device)
    weights = torch.empty_like(head_weights)
    each = heads & -heads
    _query_kernel[(tokens * heads // each,)](index_q, head_weights, q, weights, HEADS=each, WIDTH=width)
    chunk = min(CHUNK, max(KEYS, triton.next_power_of_2(found.most)))
    out = torch.empty((tokens, chunk), dtype=torch.float32, device=index_q.device)
    best = torch.empty((4, tokens, topk), dtype=torch.int32, device=index_q.device)
    kind = torch.float8_e4m3fn if made_for == PTX else torch.uint8
    for turn, low in enumerate(range(0, max(1, found.most), chunk)):
        old, new = (best[:2], best[2:]) if turn % 2 else (best[2:], best[:2])
        _score_kernel[(triton.cdiv(min(chunk, max(1, found.most - low)), KEYS), len(call.blocks))](
            q.view(kind), weights, codes.view(kind), scales, call.blocks, found.base, found.seen, out, low, CHUNK=chunk,
            HEADS=heads, PADDED=max(16, triton.next_power_of_2(heads)), WIDTH=width, KEYS=KEYS, TARGET=made_for,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        _select_kernel[(tokens,)](
            out, found.seen, low, *old, *new, CHUNK=chunk, TOPK=topk, FIRST=low == 0,
            num_warps=4 if chunk <= 2048 else 8,
        )  # fmt: skip
    return new[1]
