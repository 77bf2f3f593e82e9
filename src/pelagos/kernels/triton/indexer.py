"""Index scores over FP4 keys in the pages, and the exact choice of the best, in one launch or two.

The first multiplies tiles of 128 keys by all heads and leaves a row's scores as integers that compare alike, and the
largest of every few neighbours. Up to CHUNK scores a row's last program to arrive chooses; beyond, the second launch
has more programs for it. The k-th largest of those is a bound that at least k scores reach, so the second launch
looks only at scores not below it, few more than k: the last program of a row to arrive finds the k-th by bits and keeps
ties by index. Where too many reach the bound (many equal scores) the same search runs over all. A score depends on its
key alone and the choice is exact, so how the work is cut changes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.batch_rows import Rows
from pelagos.kernels.layout import CacheLayout
from pelagos.kernels.triton import formats
from pelagos.kernels.triton.fp4_experts import turned

KEYS = 128  # of a tile
WARPS = 8  # of a program of the first launch
PROGRAMS = 1056  # of the first launch: eight for each of 132 multiprocessors, where two fit at a time;
FILLED, SHARE = 264, 4  # beyond one round of them a program takes up to so many tiles, for it loads its queries once
CHUNK = 4096  # scores a program of the second launch looks at; up to as many the first launch chooses, too
BOUNDS = 4096  # groups of neighbours at most
LOWEST = tl.constexpr(-2147483648)


@triton.jit
def _source(column, BYTES: tl.constexpr):
    """Which byte `turned` brings to a column."""
    if BYTES % 64 == 0:
        column = column % 2 + column // 8 % 2 * 2 + column // 16 % 4 * 4 + column // 2 % 4 * 16 + column // 64 * 64
    return column


@triton.jit
def _reached(values, count, slack, STEP: tl.constexpr):
    """A bound that at least `count` of the values reach, and how many do.

    It is less than STEP below the largest there is, unless before that no more than count + slack reach a lower one.
    """
    total: tl.constexpr = values.shape[0]
    bound = tl.min(tl.where(values == LOWEST, 2147483647, values), 0)
    above = tl.maximum(tl.max(values, 0), LOWEST + 1) + 1  # values are those of floats, none the largest integer
    reach = tl.sum((values >= bound).to(tl.int32), 0)
    few = reach < count
    bound, above, reach = tl.where(few, LOWEST, bound), tl.where(few, LOWEST + 1, above), tl.where(few, total, reach)
    while ((above - bound).to(tl.uint32) > STEP) & (reach > count + slack):
        # Three bounds a step: what takes time is the sum over all warps, and one sum counts for all three.
        span = (above - bound).to(tl.uint32)
        middle = bound + (span >> 1).to(tl.int32)
        lower, higher = bound + (span >> 2).to(tl.int32), middle + (span >> 2).to(tl.int32)
        counts = (values >= lower).to(tl.int64) + ((values >= middle).to(tl.int64) << 20)
        counts = tl.sum(counts + ((values >= higher).to(tl.int64) << 40), 0)
        for i in tl.static_range(3):
            tried = lower if i == 0 else middle if i == 1 else higher
            more = ((counts >> (20 * i)) & 0xFFFFF).to(tl.int32)
            above = tl.where((more < count) & (bound < tried) & (tried < above), tried, above)
            bound, reach = tl.where(more >= count, tried, bound), tl.where(more >= count, more, reach)
    return bound, reach


@triton.jit
def _count(scores, seen, bound, TILE: tl.constexpr):
    """How many of a row's scores reach a bound."""
    reach, low = seen * 0, seen * 0
    while low < seen:
        index = low + tl.arange(0, TILE)
        values = tl.load(scores + index, mask=index < seen, other=LOWEST)
        reach += tl.sum(((values >= bound) & (index < seen)).to(tl.int32), 0)
        low += TILE
    return reach


@triton.jit
def _keep(values, index, live, bound, room, done, picks):
    """Store the indices, ascending, of values above the bound and of the first `room` at it; return what is left."""
    equal = live & (values == bound)
    chosen = (live & (values > bound)) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    place = done + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(picks + place, index, mask=chosen)
    return room - tl.sum(equal.to(tl.int32), 0), done + tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def _choose(values, index, live, TOPK: tl.constexpr, picks):
    """Store the indices of the TOPK largest values, which come in ascending order of index."""
    bound, reach = _reached(values, TOPK, 0, 1)
    if reach == TOPK:
        place = tl.cumsum((values >= bound).to(tl.int32), 0) - 1
        tl.store(picks + place, index, mask=values >= bound)
    else:  # some are equal
        room = TOPK - tl.sum((values > bound).to(tl.int32), 0)
        _keep(values, index, live, bound, room, 0, picks)


@triton.jit
def _choose_slowly(own, seen, TOPK: tl.constexpr, TILE: tl.constexpr, out):
    """Store the indices of the TOPK largest of a row's scores, however many are equal."""
    lane = tl.arange(0, TILE)
    above = _count(own, seen, 0, TILE)
    bound = tl.where(above >= TOPK, 0, LOWEST)
    above = tl.where(above >= TOPK, 0, above)
    for i in range(31):
        higher = bound + (1 << (30 - i))
        reach = _count(own, seen, higher, TILE)
        bound = tl.where(reach >= TOPK, higher, bound)
        above = tl.where(reach >= TOPK, above, reach)
    room, done, low = TOPK - above, seen * 0, seen * 0
    while low < seen:
        inside = low + lane < seen
        part_values = tl.load(own + low + lane, mask=inside, other=LOWEST)
        room, done = _keep(part_values, low + lane, inside, bound, room, done, out)
        low += TILE


@triton.jit
def _highest(own, bounds, seen, TOPK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """(GROUPS,) the largest of neighbours: as in `bounds`, or of fewer where those are hardly more than TOPK."""
    group = tl.arange(0, GROUPS)
    if 2 * seen >= 3 * TOPK * GROUP:
        highest = tl.load(bounds + group, mask=group * GROUP < seen, other=LOWEST)
    else:
        each = (seen + GROUPS - 1) // GROUPS
        highest = tl.full((GROUPS,), LOWEST, tl.int32)
        inner = seen * 0
        while inner < each:
            member = group * each + inner
            highest = tl.maximum(highest, tl.load(own + member, mask=member < seen, other=LOWEST))
            inner += 1
    return highest


@triton.jit(do_not_specialize=["table_stride", "longest", "groups"])
def _score_kernel(
    index_q, head_weights, positions, owners, table, pages, scores, bounds, arrived, picks, table_stride, page_bytes,
    scale_at, longest, groups, RATIO: tl.constexpr, TOPK: tl.constexpr, PER_PAGE: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, MOST: tl.constexpr,
    PICK: tl.constexpr, TILE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Scores of a row's tiles of keys, dealt out in turn, and the largest of every GROUP. PICK: the last one picks."""
    formats.let_next_start(TARGET)
    row = tl.program_id(1)
    seen = tl.minimum((tl.load(positions + row) + 1) // RATIO, longest)
    pages_of = table + tl.load(owners + row).to(tl.int64) * table_stride
    formats.wait_for_inputs(TARGET)
    first, programs, tiles = tl.program_id(0), tl.num_programs(0), (seen + KEYS - 1) // KEYS
    if (seen > TOPK) & (first < tiles):
        half: tl.constexpr = WIDTH // 2
        head, byte = tl.arange(0, PADDED), tl.arange(0, half)
        real = head < HEADS
        words = index_q.to(tl.pointer_type(tl.int32), bitcast=True) + (row * HEADS + head)[None, :] * half
        words = tl.load(words + _source(byte, half)[:, None], mask=real[None, :], other=0)
        q_even, q_odd = formats.bits_to_bfloat16(words & 0xFFFF), formats.bits_to_bfloat16((words >> 16) & 0xFFFF)
        weight = tl.load(head_weights + row * HEADS + head, mask=real, other=0.0)[None, :]
        steps = (tiles - first + programs - 1) // programs
        if TARGET == "interpreter":  # which takes no tensor for a range; tiles past the end store nothing
            steps = MOST
        for step in tl.range(0, steps):
            low = (first + step * programs) * KEYS
            key = low + tl.arange(0, KEYS)
            live = key < seen
            page = tl.load(pages_of + key // PER_PAGE, mask=live, other=0).to(tl.int64) * page_bytes
            part = tl.multiple_of(pages + page + key % PER_PAGE * half, 8)
            scale = pages + page + scale_at + key % PER_PAGE * (WIDTH // 32)
            scale = tl.multiple_of(scale, 4 if WIDTH >= 128 else 2)
            code = tl.load(part[:, None] + byte[None, :], mask=live[:, None], other=0)
            power = tl.load(scale[:, None] + tl.arange(0, WIDTH // 32)[None, :], mask=live[:, None], other=1)
            power = power.to(tl.int32)
            top = tl.maximum(tl.max(power, 1), 1)
            factor = formats.expert_scale(tl.maximum(power - top[:, None] + 127, 1))
            factor = tl.broadcast_to(factor[:, :, None], (KEYS, WIDTH // 32, 16)).reshape(KEYS, half)
            even, odd = formats.e2m1_pair(code, factor, TARGET)
            logits = formats.dot(turned(even), q_even, tl.zeros((KEYS, PADDED), tl.float32), TARGET)
            logits = formats.dot(turned(odd), q_odd, logits, TARGET)
            # Zeros have one sign; NaN is the least.
            score = tl.sum(tl.maximum(logits, 0.0) * weight, 1) * formats.power_of_two(top) + 0.0
            bits = score.to(tl.int32, bitcast=True)
            order = tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)
            order = tl.where(live, order, LOWEST)
            tl.store(scores + row.to(tl.int64) * longest + key, order, mask=live)
            group = low // GROUP + tl.arange(0, KEYS // GROUP)
            tl.store(bounds + row * groups + group, tl.max(order.reshape(KEYS // GROUP, GROUP), 1),
                     mask=(group < groups) & (group * GROUP < seen))  # fmt: skip
        if PICK:
            tl.debug_barrier()
            if tl.atomic_add(arrived + row, 1, sem="acq_rel") == tl.minimum(tiles, programs) - 1:
                tl.debug_barrier()
                tl.store(arrived + row, 0)
                lane = tl.arange(0, TILE)
                own = tl.load(scores + row.to(tl.int64) * longest + lane, mask=lane < seen, other=LOWEST)
                _choose(own, lane, lane < seen, TOPK, picks + row * TOPK)
    elif PICK and (seen <= TOPK) & (tl.program_id(0) == 0):
        lane = tl.arange(0, TILE)
        tl.store(picks + row * TOPK + lane, tl.where(lane < seen, lane, -1), mask=lane < TOPK)


@triton.jit(do_not_specialize=["longest", "groups", "chunks"])
def _select_kernel(
    scores, bounds, positions, found, sizes, arrived, picks, longest, groups, chunks,
    RATIO: tl.constexpr, TOPK: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """The picks of a row; CHUNKS > 1 programs sieve CHUNK scores each, the last one to arrive chooses."""
    formats.let_next_start(TARGET)
    chunk, row = tl.program_id(0), tl.program_id(1)
    seen = tl.minimum((tl.load(positions + row) + 1) // RATIO, longest)
    formats.wait_for_inputs(TARGET)
    own, out = scores + row.to(tl.int64) * longest, picks + row * TOPK
    lane = tl.arange(0, TILE)
    if seen <= TOPK:
        if chunk == 0:
            tl.store(out + lane, tl.where(lane < seen, lane, -1), mask=lane < TOPK)
    elif CHUNKS == 1:
        _choose(tl.load(own + lane, mask=lane < seen, other=LOWEST), lane, lane < seen, TOPK, out)
    elif chunk * CHUNK < seen:
        highest = _highest(own, bounds + row * groups, seen, TOPK, GROUP, GROUPS)
        least, _ = _reached(highest, TOPK, TOPK // 4, 256)
        near = chunk * CHUNK + tl.arange(0, CHUNK)
        chosen = (tl.load(own + near, mask=near < seen, other=LOWEST) >= least) & (near < seen)
        count = chosen.to(tl.int32)
        tl.store(found + row.to(tl.int64) * longest + chunk * CHUNK + tl.cumsum(count, 0) - 1, near, mask=chosen)
        tl.store(sizes + row * chunks + chunk, tl.sum(count, 0))
        tl.debug_barrier()
        before = tl.atomic_add(arrived + row, 1, sem="acq_rel")
        if before == (seen + CHUNK - 1) // CHUNK - 1:
            tl.debug_barrier()
            tl.store(arrived + row, 0)
            part = tl.arange(0, CHUNKS)
            size = tl.load(sizes + row * chunks + part, mask=part * CHUNK < seen, other=0)
            total = tl.sum(size, 0)
            if total <= TILE:
                # The chunk of each candidate: the last that begins at or before its place.
                starts = tl.cumsum(size, 0) - size
                tl.debug_barrier()
                tl.store(sizes + row * chunks + part, starts, mask=part < chunks)
                tl.debug_barrier()
                at = lane * 0
                for i in tl.static_range(ROUNDS):
                    other = at + (CHUNKS >> (i + 1))
                    start = tl.load(sizes + row * chunks + other, mask=other * CHUNK < seen, other=total + TILE)
                    at = tl.where(start <= lane, other, at)
                begin = at * CHUNK + lane - tl.load(sizes + row * chunks + at)
                index = tl.load(found + row.to(tl.int64) * longest + begin, mask=lane < total, other=0)
                _choose(tl.load(own + index, mask=lane < total, other=LOWEST), index, lane < total, TOPK, out)
            else:
                _choose_slowly(own, seen, TOPK, TILE, out)


def score(
    index_q: Tensor, head_weights: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, most: int,
    arrived: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return scores (T, most) int32 in the order of the floats, written where visible, and the largest of every few.

    With `arrived`, int32 zeros left so, the picks (T, topk) of at most CHUNK scores come instead of the latter.
    """
    (tokens, heads, width), place = index_q.shape, layout.layers[layer]
    section, new, made_for = place.index, rows.table.new_empty, formats.target()
    assert section is not None
    group = triton.next_power_of_2(triton.cdiv(most, BOUNDS))
    groups, tiles = triton.cdiv(most, group), triton.cdiv(most, KEYS)
    each = max(triton.cdiv(tokens * tiles, PROGRAMS), min(SHARE, triton.cdiv(tokens * tiles, FILLED)))
    scores, bounds, topk = new((tokens, most)), new((tokens, groups)), layout.config.index_topk
    tile, picks = triton.next_power_of_2(max(topk, min(most, CHUNK))), new((tokens, topk))
    least = {"maxnreg": 128} if made_for == formats.PTX and arrived is not None else {}  # two programs fit
    _score_kernel[(triton.cdiv(tiles, each), tokens)](
        index_q, head_weights, rows.positions, rows.owner, rows.table, pages.view(-1)[section.offset :], scores, bounds,
        bounds if arrived is None else arrived, picks, rows.table.shape[1], layout.page_bytes,
        section.part(1) - section.offset, most, groups, RATIO=place.ratio, TOPK=topk, PER_PAGE=section.rows,
        WIDTH=width, HEADS=heads, PADDED=max(16, triton.next_power_of_2(heads)), KEYS=KEYS, GROUP=group,
        MOST=each if made_for == formats.INTERPRETER else 0, PICK=arrived is not None, TILE=tile,
        TARGET=made_for, **formats.launch(made_for, num_warps=WARPS, **least),
    )  # fmt: skip
    return scores, bounds if arrived is None else picks


def choose(scores: Tensor, bounds: Tensor, positions: Tensor, ratio: int, topk: int, arrived: Tensor) -> Tensor:
    """Return picks (T, topk) int32 from what `score` returns; `arrived` is int32 zeros, left as it was."""
    (tokens, most), groups, new, made_for = scores.shape, bounds.shape[1], scores.new_empty, formats.target()
    chunks, picks = triton.cdiv(most, CHUNK), new((tokens, topk))
    found, sizes = (new((tokens, most)), new((tokens, chunks))) if chunks > 1 else (scores, bounds)
    _select_kernel[(chunks, tokens)](
        scores, bounds, positions, found, sizes, arrived, picks, most, groups, chunks,
        RATIO=ratio, TOPK=topk, GROUP=triton.next_power_of_2(triton.cdiv(most, groups)), CHUNK=CHUNK,
        GROUPS=triton.next_power_of_2(groups), CHUNKS=triton.next_power_of_2(chunks), ROUNDS=(chunks - 1).bit_length(),
        TILE=triton.next_power_of_2(max(topk, most) if chunks == 1 else 4 * topk), TARGET=made_for,
        **formats.launch(made_for, num_warps=8 if chunks == 1 else 16),
    )  # fmt: skip
    return picks


def forward(
    index_q: Tensor, head_weights: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, arrived: Tensor,
    most: int,
) -> Tensor:  # fmt: skip
    """Return picks (T, topk) int32 as `kernels.indexer.pick` does."""
    if most <= CHUNK:
        return score(index_q, head_weights, rows, layout, layer, pages, most, arrived)[1]
    found = score(index_q, head_weights, rows, layout, layer, pages, most)
    return choose(*found, rows.positions, layout.layers[layer].ratio, layout.config.index_topk, arrived)
