"""Small tensors between the processes of several GPUs, one launch an exchange, inside a captured graph.

A word of 32 bits travels with the number of its exchange as one store of 64 into the other device's memory, where a
program waits until the number is there: no barrier before or after, for whoever takes part in an exchange has read what
the one before last brought. Of four places that take turns at least two exchanges between go both ways.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.triton.formats import launch, let_next_start, target, to_bfloat16, wait_for_inputs

BLOCK = 512  # words a program
PLACES = 4
PATIENCE = 1 << 28  # looks, of about half a microsecond: then the other is lost, and the result is NaN


@triton.jit
def _halves(word):
    """float32 of the two bfloat16 values of a word."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["index", "rank", "source"])
def _exchange_kernel(
    x, out, boxes, number, index, rank, source, total, width, send_rank, send_row, out_rank, room,
    RANKS: tl.constexpr, SUM: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
    PATIENCE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Rank r's words at x + p * send_rank go to rank p, rows of `width` words send_row apart; ONE: only `source` sends.

    out has the rows of rank r at r * out_rank, or their SUM as pairs of bfloat16 in the order of ranks.
    """
    wait_for_inputs(TARGET)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    place = at // width * send_row + at % width
    flag = tl.load(number) + index
    box = (flag & (PLACES - 1)) * RANKS
    for peer in tl.static_range(RANKS):
        if (peer != rank) & ((not ONE) | (rank == source)):
            word = tl.load(x + peer * send_rank + place, mask=live, other=0)
            both = (flag.to(tl.int64) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)
            to = tl.load(boxes + peer).to(tl.pointer_type(tl.int64))
            tl.store(to + (box + rank).to(tl.int64) * room + at, both, mask=live)
    tl.debug_barrier()
    let_next_start(TARGET)
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(RANKS):
        if (not ONE) | (peer == source):
            if peer == rank:
                word = tl.load(x + peer * send_rank + place, mask=live, other=0)
            else:
                own = tl.load(boxes + rank).to(tl.pointer_type(tl.int64)) + (box + peer).to(tl.int64) * room + at
                found = tl.load(own, mask=live, other=0, volatile=True)
                looks = 0
                while (tl.max(((found >> 32).to(tl.int32) != flag).to(tl.int32) * live.to(tl.int32)) > 0) & (
                    looks < PATIENCE
                ):
                    found = tl.load(own, mask=live, other=0, volatile=True)
                    looks += 1
                word = tl.where((found >> 32).to(tl.int32) == flag, found.to(tl.int32), 0x7FC07FC0)
            if SUM:
                first, second = _halves(word)
                low += first
                high += second
            else:
                tl.store(out + peer * out_rank + at, word, mask=live)
    if SUM:
        low_bits = to_bfloat16(low, TARGET).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high_bits = to_bfloat16(high, TARGET).to(tl.int16, bitcast=True).to(tl.int32) << 16
        tl.store(out + at, low_bits | high_bits, mask=live)


def exchange(
    x: Tensor, out: Tensor, boxes: Tensor, number: Tensor, index: int, rank: int, room: int, *, total: int, width: int,
    send_rank: int, send_row: int, out_rank: int = 0, add: bool = False, source: int | None = None,
) -> None:  # fmt: skip
    """Launch exchange `index` after `number` (1,) int32; sizes and strides in words of x and out, int32 views.

    boxes (R,) int64 are addresses of every rank's (PLACES, R, room) words of 64 bits.
    """
    made_for = target()
    _exchange_kernel[(triton.cdiv(total, BLOCK),)](
        x, out, boxes, number, index, rank, -1 if source is None else source, total, width, send_rank, send_row,
        out_rank, room, RANKS=boxes.numel(), SUM=add, ONE=source is not None, BLOCK=BLOCK, PLACES=PLACES,
        PATIENCE=PATIENCE, TARGET=made_for, **launch(made_for, num_warps=4),
    )  # fmt: skip
