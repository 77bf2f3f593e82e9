"""The next token of each row: one program a row, which goes over its logits a few times in the L2 cache.

Where top-k or top-p cut, ids that may stay are listed once, each as one integer that orders them by logit and then by
id, and a search bit by bit finds the last one kept. Noise is made in float64 and only for what can win.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.ref.sampling import GOLDEN, MIX1, MIX2

TILE = 4096
_GOLDEN, _MIX1, _MIX2 = tl.constexpr(GOLDEN), tl.constexpr(MIX1), tl.constexpr(MIX2)


@triton.jit
def _order(x):
    """An int64 of 32 bits that grows with x (float32); both zeros alike."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def _value(order):
    bits = (order - 2147483648).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _bits(key, ids):
    """The top 52 bits of SplitMix64's outputs."""
    word = key + (ids.to(tl.int64) + 1) * _GOLDEN
    word = (word ^ ((word >> 30) & 0x3FFFFFFFF)) * _MIX1
    word = (word ^ ((word >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return ((word ^ ((word >> 31) & 0x1FFFFFFFF)) >> 12) & 0xFFFFFFFFFFFFF


@triton.jit
def _gumbel(bits):
    return -tl.log(-tl.log((bits.to(tl.float64) + 0.5) * 2.220446049250313e-16))


@triton.jit
def _listed(found, at, count, peak, temperature, TILE: tl.constexpr):
    """A tile of the list: keys (-1 beyond its end) and logits over the temperature, below the largest."""
    place = at + tl.arange(0, TILE)
    key = tl.load(found + place, mask=place < count, other=-1)
    return key, (_value(key >> 20).to(tl.float64) - peak) / temperature


@triton.jit
def _weight(found, count, least, peak, temperature, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """How many keys of the list are at least `least`, or their mass."""
    total = tl.zeros([TILE], tl.float64)
    for at in range(0, count, TILE):
        key, scaled = _listed(found, at, count, peak, temperature, TILE)
        each = tl.exp(scaled.to(tl.float32)).to(tl.float64) if WEIGHED else 1.0
        total += tl.where((key >= least) & (key >= 0), each, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _last(found, count, need, peak, temperature, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """The largest key with which those from the top on weigh `need` or more."""
    last = tl.full([], 0, tl.int64)
    for step in range(52):
        trial = last | (tl.full([], 1, tl.int64) << (51 - step))
        if _weight(found, count, trial, peak, temperature, WEIGHED, TILE) >= need:
            last = trial
    return last


@triton.jit(do_not_specialize=["vocab", "stride"])
def _pick_kernel(logits, draws, out, listed, vocab, stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits, draws, found, lane = logits + row * stride, draws + row * 5, listed + row * vocab, tl.arange(0, TILE)
    temperature = tl.load(draws).to(tl.float64, bitcast=True)
    top_p, min_p = tl.load(draws + 1).to(tl.float64, bitcast=True), tl.load(draws + 2).to(tl.float64, bitcast=True)
    top_k, key = tl.load(draws + 3), tl.load(draws + 4)
    top, first = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.int32)
    broken = tl.zeros([TILE], tl.int32)
    for at in range(0, vocab, TILE):
        x = tl.load(logits + at + lane, mask=at + lane < vocab, other=float("-inf"))
        broken |= (x != x).to(tl.int32)
        first = tl.where(x > top, at + lane, first)
        top = tl.where(x > top, x, top)
    highest = tl.max(top, 0)
    token = tl.min(tl.where(top == highest, first, vocab), 0)
    peak = highest.to(tl.float64)
    total, mass = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
    for at in range(0, vocab, TILE):
        x = tl.load(logits + at + lane, mask=at + lane < vocab, other=float("-inf"))
        total += tl.exp(x - highest).to(tl.float64)
        if (temperature > 0) & (top_p < 1):
            mass += tl.exp(((x.to(tl.float64) - peak) / temperature).to(tl.float32)).to(tl.float64)
    normaliser = peak + tl.log(tl.sum(total, 0))
    if temperature > 0:
        cut = (top_k > 0) & (top_k < vocab)
        listing = cut | (top_p < 1)
        count, last = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
        if listing:
            bound, lowest = tl.full([], 0, tl.int64), tl.full([], float("-inf"), tl.float64)
            if cut:
                if top_k <= TILE:  # so many of the tile's maxima are at least their top_k-th
                    order = _order(top)
                    for step in range(32):
                        trial = bound | (tl.full([], 1, tl.int64) << (31 - step))
                        if tl.sum((order >= trial).to(tl.int64), 0) >= top_k:
                            bound = trial
            else:  # what lies below weighs less than half of what may be left out
                lowest = tl.log((1 - top_p) * tl.sum(mass, 0) / (2 * vocab).to(tl.float64))
            for at in range(0, vocab, TILE):
                x = tl.load(logits + at + lane, mask=at + lane < vocab, other=float("-inf"))
                order = _order(x)
                stays = (at + lane < vocab) & (order >= bound)
                stays = stays & ((x.to(tl.float64) - peak) / temperature >= lowest)
                place = count + tl.cumsum(stays.to(tl.int32), 0) - 1
                tl.store(found + place, (order << 20) | (1048575 - at - lane), mask=stays)
                count += tl.sum(stays.to(tl.int32), 0)
            tl.debug_barrier()
            if cut:
                last = _last(found, count, top_k.to(tl.float64), peak, temperature, False, TILE)
            if top_p < 1:
                whole = tl.sum(mass, 0)
                if cut:
                    whole = _weight(found, count, last, peak, temperature, True, TILE)
                last = tl.maximum(last, _last(found, count, top_p * whole, peak, temperature, True, TILE))
        floor = tl.full([], float("-inf"), tl.float64)
        if min_p > 0:
            floor = tl.log(min_p)
        if not listing:
            count += vocab
        # Noise grows with its bits, so the largest bits bound it: what cannot beat the likeliest id needs none.
        most = tl.zeros([TILE], tl.int64)
        for at in range(0, count, TILE):
            ids, scaled, kept = _kept(logits, found, at, count, last, listing, floor, peak, temperature, TILE)
            most = tl.maximum(most, tl.where(kept, _bits(key, ids), 0))
        near = _gumbel(_bits(key, token)) - _gumbel(tl.max(most, 0)) - 1e-9
        best, winner = tl.full([TILE], float("-inf"), tl.float64), tl.zeros([TILE], tl.int32)
        for at in range(0, count, TILE):
            ids, scaled, kept = _kept(logits, found, at, count, last, listing, floor, peak, temperature, TILE)
            kept = kept & (scaled >= near)
            if tl.max(kept.to(tl.int32), 0) > 0:
                drawn = tl.where(kept, scaled + _gumbel(_bits(key, ids)), float("-inf"))
                winner = tl.where(drawn > best, ids, winner)
                best = tl.where(drawn > best, drawn, best)
        token = tl.min(tl.where(best == tl.max(best, 0), winner, vocab), 0)
    if (tl.max(broken, 0) > 0) | (highest == float("inf")) | (highest == float("-inf")):
        tl.store(out + row * 2, -1.0)
        tl.store(out + row * 2 + 1, float("nan"))
    else:
        tl.store(out + row * 2, token.to(tl.float64))
        tl.store(out + row * 2 + 1, tl.load(logits + token).to(tl.float64) - normaliser)


@triton.jit
def _kept(logits, found, at, count, last, listing, floor, peak, temperature, TILE: tl.constexpr):
    """A tile of ids, listed or all, their logits over the temperature below the largest, and whether they stay."""
    ids = at + tl.arange(0, TILE)
    kept = ids < count
    if listing:
        key = tl.load(found + ids, mask=kept, other=-1)
        kept = kept & (key >= last)
        ids = (1048575 - (key & 1048575)).to(tl.int32)
        x = _value(key >> 20)
    else:
        x = tl.load(logits + ids, mask=kept, other=float("-inf"))
    scaled = (x.to(tl.float64) - peak) / temperature
    return ids, scaled, kept & (scaled >= floor)


def forward(logits: Tensor, draws: Tensor) -> Tensor:
    """See `kernels.sampling.pick`."""
    rows, vocab = logits.shape
    out = torch.empty((rows, 2), dtype=torch.float64, device=logits.device)
    listed = torch.empty((rows, vocab), dtype=torch.int64, device=logits.device)
    _pick_kernel[(rows,)](logits, draws, out, listed, vocab, logits.stride(0), TILE=TILE, num_warps=16)
    return out
