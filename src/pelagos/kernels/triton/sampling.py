"""The next token of each row in four launches: three over pieces of rows, one that ends each row.

Noise is made in float64 and only for what can win. Where top-k or top-p cut, the last launch lists the ids that may
stay, each as one integer that orders them by logit and then by id, and a search two bits at a time finds the last kept.
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
def _settings(draws, row):
    """A row's temperature, top_p and min_p, top_k and key."""
    draws += row * 5
    temperature = tl.load(draws).to(tl.float64, bitcast=True)
    top_p, min_p = tl.load(draws + 1).to(tl.float64, bitcast=True), tl.load(draws + 2).to(tl.float64, bitcast=True)
    return temperature, top_p, min_p, tl.load(draws + 3), tl.load(draws + 4)


@triton.jit
def _highest(tops, row, PARTS: tl.constexpr):
    """The largest of what a row's pieces have."""
    return tl.max(tl.load(tops + row * PARTS + tl.arange(0, PARTS)), 0)


@triton.jit
def _first(tops, firsts, row, highest, PARTS: tl.constexpr):
    """The first id of those pieces that have the largest."""
    part = row * PARTS + tl.arange(0, PARTS)
    return tl.min(tl.where(tl.load(tops + part) == highest, tl.load(firsts + part), 2147483647), 0)


@triton.jit
def _floor(min_p):
    """The logarithm of min_p."""
    floor = tl.full([], float("-inf"), tl.float64)
    if min_p > 0:
        floor = tl.log(min_p)
    return floor


@triton.jit
def _share(x, highest, temperature):
    """exp((x - highest) / temperature), float32."""
    return tl.exp((x - highest) * (1.0 / temperature).to(tl.float32))


@triton.jit(do_not_specialize=["vocab", "stride"])
def _peak_kernel(logits, tops, firsts, vocab, stride, TILE: tl.constexpr, PARTS: tl.constexpr):
    """Largest logit of each piece, infinite where one is not a number, and its first id."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = part * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * stride + ids, mask=ids < vocab, other=float("-inf"))
    x = tl.where(x != x, float("inf"), x)
    top = tl.max(x, 0)
    tl.store(tops + row * PARTS + part, top)
    tl.store(firsts + row * PARTS + part, tl.min(tl.where(x == top, ids, 2147483647), 0))


@triton.jit(do_not_specialize=["vocab", "stride"])
def _mass_kernel(
    logits, draws, tops, totals, masses, mosts, vocab, stride, TILE: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Of each piece: the sums of exp(logit) and of exp(logit / temperature), and the largest bits of noise."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, top_p, min_p, _, key = _settings(draws, row)
    highest = _highest(tops, row, PARTS)
    ids = part * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * stride + ids, mask=ids < vocab, other=float("-inf"))
    tl.store(totals + row * PARTS + part, tl.sum(tl.exp(x - highest).to(tl.float64), 0))
    if temperature > 0:
        if top_p < 1:
            tl.store(masses + row * PARTS + part, tl.sum(_share(x, highest, temperature).to(tl.float64), 0))
        kept = (ids < vocab) & ((x.to(tl.float64) - highest.to(tl.float64)) / temperature >= _floor(min_p))
        tl.store(mosts + row * PARTS + part, tl.max(tl.where(kept, _bits(key, ids), 0), 0))


@triton.jit(do_not_specialize=["vocab", "stride"])
def _draw_kernel(
    logits, draws, tops, firsts, mosts, bests, winners, vocab, stride, TILE: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """The winner of each piece of a row that is drawn from whole."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, top_p, min_p, top_k, key = _settings(draws, row)
    if (temperature > 0) & (top_p >= 1) & ((top_k <= 0) | (top_k >= vocab)):
        highest = _highest(tops, row, PARTS)
        most = tl.max(tl.load(mosts + row * PARTS + tl.arange(0, PARTS)), 0)
        near = _near(key, _first(tops, firsts, row, highest, PARTS), most)
        ids = part * TILE + tl.arange(0, TILE)
        x = tl.load(logits + row * stride + ids, mask=ids < vocab, other=float("-inf"))
        scaled = (x.to(tl.float64) - highest.to(tl.float64)) / temperature
        kept = (ids < vocab) & (scaled >= _floor(min_p)) & (scaled >= near)
        best, winner = tl.full([], float("-inf"), tl.float64), tl.full([], 2147483647, tl.int32)
        if tl.max(kept.to(tl.int32), 0) > 0:
            drawn = tl.where(kept, scaled + _gumbel(_bits(key, ids)), float("-inf"))
            best = tl.max(drawn, 0)
            winner = tl.min(tl.where(drawn == best, ids, 2147483647), 0)
        tl.store(bests + row * PARTS + part, best)
        tl.store(winners + row * PARTS + part, winner)


@triton.jit
def _near(key, token, most):
    """What an id's logit over the temperature must reach, below the largest, to beat the likeliest id.

    Noise grows with its bits, so the largest bits bound it: what cannot win needs none.
    """
    return _gumbel(_bits(key, token)) - _gumbel(most) - 1e-9


@triton.jit
def _each(found, at, count, highest, temperature, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """A tile of the list: keys (-1 beyond its end) and what they weigh."""
    place = at + tl.arange(0, TILE)
    key = tl.load(found + place, mask=place < count, other=-1)
    share = _share(_value(key >> 20), highest, temperature) if WEIGHED else tl.full([TILE], 1.0, tl.float32)
    return key, tl.where(key >= 0, share, 0.0).to(tl.float64)


@triton.jit
def _weight(found, count, least, highest, temperature, TILE: tl.constexpr):
    """The mass of the list's keys from `least` on."""
    total = tl.zeros([TILE], tl.float64)
    for at in range(0, count, TILE):
        key, each = _each(found, at, count, highest, temperature, True, TILE)
        total += tl.where(key >= least, each, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _last(found, count, need, highest, temperature, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """The largest key with which those from the top on weigh `need` or more."""
    last = tl.full([], 0, tl.int64)
    for step in range(26):
        unit = tl.full([], 1, tl.int64) << (50 - 2 * step)
        one, two, three = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
        for at in range(0, count, TILE):
            key, each = _each(found, at, count, highest, temperature, WEIGHED, TILE)
            one += tl.where(key >= last + unit, each, 0.0)
            two += tl.where(key >= last + 2 * unit, each, 0.0)
            three += tl.where(key >= last + 3 * unit, each, 0.0)
        reached = (tl.sum(one, 0) >= need).to(tl.int64) + (tl.sum(two, 0) >= need).to(tl.int64)
        last += unit * (reached + (tl.sum(three, 0) >= need).to(tl.int64))
    return last


@triton.jit
def _bound(logits, top_k, vocab, TILE: tl.constexpr):
    """A bound that the top_k-th largest reaches: so many of a tile's maxima are at least their top_k-th."""
    bound, top = tl.full([], 0, tl.int64), tl.full([TILE], float("-inf"), tl.float32)
    if top_k <= TILE:
        for at in range(0, vocab, TILE):
            ids = at + tl.arange(0, TILE)
            top = tl.maximum(top, tl.load(logits + ids, mask=ids < vocab, other=float("-inf")))
        order = _order(top)
        for step in range(32):
            trial = bound | (tl.full([], 1, tl.int64) << (31 - step))
            if tl.sum((order >= trial).to(tl.int64), 0) >= top_k:
                bound = trial
    return bound


@triton.jit(do_not_specialize=["vocab", "stride"])
def _pick_kernel(
    logits, draws, tops, firsts, totals, masses, bests, winners, out, listed, vocab, stride,
    TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature, top_p, min_p, top_k, key = _settings(draws, row)
    logits, found, part = logits + row * stride, listed + row * vocab, row * PARTS + tl.arange(0, PARTS)
    highest = _highest(tops, row, PARTS)
    peak, token = highest.to(tl.float64), _first(tops, firsts, row, highest, PARTS)
    if (temperature > 0) & (highest < float("inf")) & (highest > float("-inf")):
        cut = (top_k > 0) & (top_k < vocab)
        if cut | (top_p < 1):
            bound, lowest = tl.full([], 0, tl.int64), tl.full([], float("-inf"), tl.float32)
            if cut:
                bound = _bound(logits, top_k, vocab, TILE)
            else:  # what lies below weighs less than half of what may be left out
                mass = tl.sum(tl.load(masses + part), 0)
                lowest = (temperature * tl.log((1 - top_p) * mass / (2 * vocab).to(tl.float64))).to(tl.float32)
            count, last = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
            for at in range(0, vocab, TILE):
                ids = at + tl.arange(0, TILE)
                x = tl.load(logits + ids, mask=ids < vocab, other=float("-inf"))
                order = _order(x)
                stays = (ids < vocab) & (order >= bound) & (x - highest >= lowest)
                place = count + tl.cumsum(stays.to(tl.int32), 0) - 1
                tl.store(found + place, (order << 20) | (1048575 - ids), mask=stays)
                count += tl.sum(stays.to(tl.int32), 0)
            tl.debug_barrier()
            if cut:
                last = _last(found, count, top_k.to(tl.float64), highest, temperature, False, TILE)
            if top_p < 1:
                if cut:
                    whole = _weight(found, count, last, highest, temperature, TILE)
                else:
                    whole = tl.sum(tl.load(masses + part), 0)
                last = tl.maximum(last, _last(found, count, top_p * whole, highest, temperature, True, TILE))
            floor, most = _floor(min_p), tl.zeros([TILE], tl.int64)
            for at in range(0, count, TILE):
                ids, scaled, kept = _kept(found, at, count, last, floor, peak, temperature, TILE)
                most = tl.maximum(most, tl.where(kept, _bits(key, ids), 0))
            near = _near(key, token, tl.max(most, 0))
            best, winner = tl.full([TILE], float("-inf"), tl.float64), tl.full([TILE], 2147483647, tl.int32)
            for at in range(0, count, TILE):
                ids, scaled, kept = _kept(found, at, count, last, floor, peak, temperature, TILE)
                kept = kept & (scaled >= near)
                if tl.max(kept.to(tl.int32), 0) > 0:
                    drawn = tl.where(kept, scaled + _gumbel(_bits(key, ids)), float("-inf"))
                    ahead = (drawn > best) | ((drawn == best) & (ids < winner))
                    winner, best = tl.where(ahead, ids, winner), tl.maximum(best, drawn)
            token = tl.min(tl.where(best == tl.max(best, 0), winner, 2147483647), 0)
        else:
            token = _first(bests, winners, row, _highest(bests, row, PARTS), PARTS)
    if (highest == float("inf")) | (highest == float("-inf")):
        tl.store(out + row * 2, -1.0)
        tl.store(out + row * 2 + 1, float("nan"))
    else:
        tl.store(out + row * 2, token.to(tl.float64))
        normaliser = peak + tl.log(tl.sum(tl.load(totals + part), 0))
        tl.store(out + row * 2 + 1, tl.load(logits + token).to(tl.float64) - normaliser)


@triton.jit
def _kept(found, at, count, last, floor, peak, temperature, TILE: tl.constexpr):
    """A tile of the listed ids, their logits over the temperature below the largest, and whether they stay."""
    place = at + tl.arange(0, TILE)
    key = tl.load(found + place, mask=place < count, other=-1)
    scaled = (_value(key >> 20).to(tl.float64) - peak) / temperature
    return (1048575 - (key & 1048575)).to(tl.int32), scaled, (key >= last) & (key >= 0) & (scaled >= floor)


def forward(logits: Tensor, draws: Tensor) -> Tensor:
    """See `kernels.sampling.pick`."""
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, TILE)
    padded = triton.next_power_of_2(parts)
    floats = torch.empty((3, rows, padded), dtype=torch.float64, device=logits.device)
    totals, masses, bests = floats
    mosts = torch.empty((rows, padded), dtype=torch.int64, device=logits.device)
    firsts, winners = torch.empty((2, rows, padded), dtype=torch.int32, device=logits.device)
    tops = torch.empty((rows, padded), dtype=torch.float32, device=logits.device)
    out = torch.empty((rows, 2), dtype=torch.float64, device=logits.device)
    listed = torch.empty((rows, vocab), dtype=torch.int64, device=logits.device)
    size = {"vocab": vocab, "stride": logits.stride(0), "TILE": TILE, "PARTS": padded}
    grid = (rows, padded)
    _peak_kernel[grid](logits, tops, firsts, **size)
    _mass_kernel[grid](logits, draws, tops, totals, masses, mosts, **size)
    _draw_kernel[grid](logits, draws, tops, firsts, mosts, bests, winners, **size)
    _pick_kernel[(rows,)](
        logits, draws, tops, firsts, totals, masses, bests, winners, out, listed, **size, num_warps=16
    )
    return out
