"""Attention in training: a program a query forward and for its gradient, a program a tile of keys for theirs.

Keys of a window or of a range of entries meet consecutive queries, so their gradients walk tiles of (query, head)
rows; a picked entry walks the sorted list of those who picked it. Every sum has one owner and one order.
"""
# Inside a kernel Triton turns Python numbers into constexpr and blocks into tensors; its annotations say neither.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.training_attention import lists_of

KEYS = 64  # keys a step of a query
TILE = 16  # keys a program of the keys' gradients
ROWS = 64  # (query, head) rows a step of these


@triton.jit
def _logits(q, keys, index, live, WIDTH: tl.constexpr, SCALE: tl.constexpr):
    """Keys (N, C) at `index` and scaled logits (HP, N), -inf where not live."""
    column = tl.arange(0, WIDTH)
    key = tl.load(keys + index.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=live[:, None], other=0.0)
    logits = tl.dot(q, tl.trans(key), input_precision="ieee") * SCALE
    return key, tl.where(live[None, :], logits, float("-inf"))


@triton.jit
def _place(picks, query, begin, first, stop, limit, N: tl.constexpr, PICKS: tl.constexpr):
    """Entries of step `begin` of a query's loop up to `limit`, and which of them are there."""
    at = begin + tl.arange(0, N)
    if PICKS > 0:
        index = tl.load(picks + query.to(tl.int64) * PICKS + at, mask=at < PICKS, other=-1)
        return tl.maximum(index, 0), (index >= first) & (index < stop)
    return first + at, first + at < limit


@triton.jit
def _forward_kernel(
    q, rows, entries, sink, picks, starts, out, lse, weights, length, count,
    HEADS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr,
    PICKS: tl.constexpr, N: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    sequence, t = query // length, query % length
    head, column = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    real = head < HEADS
    place = query.to(tl.int64) * HEADS * WIDTH + head[:, None] * WIDTH + column[None, :]
    own = tl.load(q + place, mask=real[:, None], other=0.0)
    top = tl.load(sink + head, mask=real, other=0.0).to(tl.float32)
    total, mixed = tl.full((PADDED,), 1.0, tl.float32), tl.zeros((PADDED, WIDTH), tl.float32)
    start = tl.load(starts + query)
    for begin in range(tl.maximum(start, t - WINDOW + 1), t + 1, N):
        index = begin + tl.arange(0, N)
        key, logits = _logits(own, rows + sequence.to(tl.int64) * length * WIDTH, index, index <= t, WIDTH, SCALE)
        best = tl.maximum(top, tl.max(logits, 1))
        chance, keep = tl.exp(logits - best[:, None]), tl.exp(top - best)
        total = total * keep + tl.sum(chance, 1)
        mixed = tl.dot(chance.to(key.dtype), key, mixed * keep[:, None], input_precision="ieee")
        top = best
    if RATIO > 0:
        first, stop = (start + RATIO - 1) // RATIO, (t + 1) // RATIO
        base = entries + sequence.to(tl.int64) * count * WIDTH
        steps = PICKS if PICKS > 0 else tl.maximum(stop - first, 0)
        for begin in range(0, steps, N):
            index, live = _place(picks, query, begin, first, stop, stop, N, PICKS)
            key, logits = _logits(own, base, index, live, WIDTH, SCALE)
            best = tl.maximum(top, tl.max(logits, 1))
            chance, keep = tl.exp(logits - best[:, None]), tl.exp(top - best)
            total = total * keep + tl.sum(chance, 1)
            mixed = tl.dot(chance.to(key.dtype), key, mixed * keep[:, None], input_precision="ieee")
            top = best
    tl.store(out + place, (mixed / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
    level = top + tl.log(total)
    tl.store(lse + query * HEADS + head, level, mask=real)
    if RATIO > 0:
        for begin in range(0, steps, N):
            index, live = _place(picks, query, begin, first, stop, stop, N, PICKS)
            key, logits = _logits(own, base, index, live, WIDTH, SCALE)
            summed = tl.sum(tl.where(real[:, None], tl.exp(logits - level[:, None]), 0.0), 0)
            if PICKS > 0:
                at = begin + tl.arange(0, N)
                tl.store(weights + query.to(tl.int64) * PICKS + at, summed, mask=at < PICKS)
            else:
                tl.store(weights + query.to(tl.int64) * count + index, summed, mask=live)


@triton.jit
def _query_grad_kernel(
    q, rows, entries, sink, picks, starts, out, lse, grad, grad_q, grad_sink, delta, length, count,
    HEADS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr,
    PICKS: tl.constexpr, N: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    sequence, t = query // length, query % length
    head, column = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    real = head < HEADS
    place = query.to(tl.int64) * HEADS * WIDTH + head[:, None] * WIDTH + column[None, :]
    own, up = tl.load(q + place, mask=real[:, None], other=0.0), tl.load(grad + place, mask=real[:, None], other=0.0)
    level = tl.load(lse + query * HEADS + head, mask=real, other=0.0)
    mean = tl.sum(up.to(tl.float32) * tl.load(out + place, mask=real[:, None], other=0.0).to(tl.float32), 1)
    tl.store(delta + query * HEADS + head, mean, mask=real)
    spill = tl.exp(tl.load(sink + head, mask=real, other=0.0).to(tl.float32) - level)
    tl.store(grad_sink + query * HEADS + head, -spill * mean, mask=real)
    total, start = tl.zeros((PADDED, WIDTH), tl.float32), tl.load(starts + query)
    for begin in range(tl.maximum(start, t - WINDOW + 1), t + 1, N):
        index = begin + tl.arange(0, N)
        key, logits = _logits(own, rows + sequence.to(tl.int64) * length * WIDTH, index, index <= t, WIDTH, SCALE)
        change = tl.dot(up, tl.trans(key), input_precision="ieee") - mean[:, None]
        change = tl.exp(logits - level[:, None]) * change * SCALE
        total = tl.dot(change.to(key.dtype), key, total, input_precision="ieee")
    if RATIO > 0:
        first, stop = (start + RATIO - 1) // RATIO, (t + 1) // RATIO
        steps = PICKS if PICKS > 0 else tl.maximum(stop - first, 0)
        for begin in range(0, steps, N):
            index, live = _place(picks, query, begin, first, stop, stop, N, PICKS)
            key, logits = _logits(own, entries + sequence.to(tl.int64) * count * WIDTH, index, live, WIDTH, SCALE)
            change = tl.dot(up, tl.trans(key), input_precision="ieee") - mean[:, None]
            change = tl.exp(logits - level[:, None]) * change * SCALE
            total = tl.dot(change.to(key.dtype), key, total, input_precision="ieee")
    tl.store(grad_q + place, total.to(grad_q.dtype.element_ty), mask=real[:, None])


@triton.jit
def _key_grad_kernel(
    q, keys, starts, ends, lse, delta, grad, grad_keys, length, count,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Gradient of TILE keys: rows of a window (RATIO 0) or entries seen as a range."""
    sequence, column = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH)
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = index < count
    place = (sequence * count + index)[:, None] * WIDTH + column[None, :]
    key = tl.load(keys + place, mask=there[:, None], other=0.0)
    first = tl.program_id(0) * TILE
    if RATIO > 0:
        low = (first + 1) * RATIO - 1
        high = tl.load(ends + sequence * length + tl.minimum(first + TILE, count) * RATIO - RATIO)
    else:
        low, high = first, tl.minimum(first + TILE + WINDOW - 1, length)
    total = tl.zeros((TILE, WIDTH), tl.float32)
    for begin in range(low * HEADS, high * HEADS, ROWS):
        row = begin + tl.arange(0, ROWS)
        live = row < high * HEADS
        t = row // HEADS
        start = tl.load(starts + sequence * length + t, mask=live, other=0)
        if RATIO > 0:
            sees = (index[None, :] * RATIO >= start[:, None]) & ((index[None, :] + 1) * RATIO <= t[:, None] + 1)
        else:
            back = t[:, None] - index[None, :]
            sees = (back >= 0) & (back < WINDOW) & (index[None, :] >= start[:, None])
        sees = sees & live[:, None] & there[None, :]
        at = (sequence * length * HEADS + row)[:, None] * WIDTH + column[None, :]
        own, up = tl.load(q + at, mask=live[:, None], other=0.0), tl.load(grad + at, mask=live[:, None], other=0.0)
        level = tl.load(lse + sequence * length * HEADS + row, mask=live, other=0.0)
        mean = tl.load(delta + sequence * length * HEADS + row, mask=live, other=0.0)
        logits = tl.dot(own, tl.trans(key), input_precision="ieee") * SCALE
        chance = tl.where(sees, tl.exp(logits - level[:, None]), 0.0)
        change = chance * (tl.dot(up, tl.trans(key), input_precision="ieee") - mean[:, None]) * SCALE
        total = tl.dot(tl.trans(change.to(own.dtype)), own, total, input_precision="ieee")
        total = tl.dot(tl.trans(chance.to(up.dtype)), up, total, input_precision="ieee")
    tl.store(grad_keys + place, total.to(grad_keys.dtype.element_ty), mask=there[:, None])


@triton.jit
def _picked_grad_kernel(
    q, entries, queries, begins, lse, delta, grad, grad_entries,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Gradient of one entry from the list of queries that picked it."""
    entry, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    key = tl.load(entries + entry * WIDTH + column).to(tl.float32)
    low, high = tl.load(begins + entry), tl.load(begins + entry + 1)
    total = tl.zeros((WIDTH,), tl.float32)
    for begin in range(low * HEADS, high * HEADS, ROWS):
        slot = begin + tl.arange(0, ROWS)
        live = slot < high * HEADS
        row = tl.load(queries + slot // HEADS, mask=live, other=0).to(tl.int64) * HEADS + slot % HEADS
        at = row[:, None] * WIDTH + column[None, :]
        own = tl.load(q + at, mask=live[:, None], other=0.0).to(tl.float32)
        up = tl.load(grad + at, mask=live[:, None], other=0.0).to(tl.float32)
        level, mean = tl.load(lse + row, mask=live, other=0.0), tl.load(delta + row, mask=live, other=0.0)
        chance = tl.where(live, tl.exp(tl.sum(own * key[None, :], 1) * SCALE - level), 0.0)
        change = chance * (tl.sum(up * key[None, :], 1) - mean) * SCALE
        total += tl.sum(change[:, None] * own + chance[:, None] * up, 0)
    tl.store(grad_entries + entry * WIDTH + column, total.to(grad_entries.dtype.element_ty))


def _shapes(q: Tensor, picks: Tensor | None, window: int, ratio: int) -> dict[str, int | float]:
    heads, width = q.shape[2:]
    return {
        "HEADS": heads, "PADDED": max(16, triton.next_power_of_2(heads)), "WIDTH": width, "WINDOW": window,
        "RATIO": ratio, "PICKS": 0 if picks is None else picks.shape[2], "N": KEYS, "SCALE": width**-0.5,
    }  # fmt: skip


def forward(inputs: list[Tensor | None], window: int, ratio: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (out, log-sum-exps (B, S, H), weights); inputs as `kernels.training_attention.attend` orders them."""
    q, rows, entries, sink, picks, starts, _ = inputs
    batch, length, heads, _ = q.shape
    out, lse = torch.empty_like(q), q.new_empty((batch, length, heads), dtype=torch.float32)
    count = 0 if entries is None else entries.shape[1]
    weights = None
    if entries is not None:
        weights = q.new_zeros((batch, length, count if picks is None else picks.shape[2]), dtype=torch.float32)
    _forward_kernel[(batch * length,)](
        q, rows, entries, sink, picks, starts, out, lse, weights, length, count,
        **_shapes(q, picks, window, ratio if count else 0),
    )  # fmt: skip
    return out, lse, weights


def backward(grad: Tensor, saved: tuple, window: int, ratio: int) -> tuple[Tensor | None, ...]:
    """Return the gradients of (q, rows, entries, sink)."""
    q, rows, entries, sink, picks, starts, ends, out, lse = saved
    batch, length, heads, width = q.shape
    count = 0 if entries is None else entries.shape[1]
    shapes = _shapes(q, picks, window, ratio if count else 0)
    grad_q, delta, spill = torch.empty_like(q), torch.empty_like(lse), torch.empty_like(lse)
    _query_grad_kernel[(batch * length,)](
        q, rows, entries, sink, picks, starts, out, lse, grad, grad_q, spill, delta, length, count, **shapes
    )
    grad_sink = spill.sum((0, 1)).to(sink.dtype)
    grad_rows, grad_entries = torch.empty_like(rows), None if entries is None else torch.empty_like(entries)
    tiles = {"HEADS": heads, "WIDTH": width, "WINDOW": window, "TILE": TILE, "ROWS": ROWS, "SCALE": width**-0.5}
    common = (starts, ends, lse, delta, grad)
    _key_grad_kernel[(triton.cdiv(length, TILE), batch)](q, rows, *common, grad_rows, length, length, RATIO=0, **tiles)
    if count and picks is None:
        grid = (triton.cdiv(count, TILE), batch)
        _key_grad_kernel[grid](q, entries, *common, grad_entries, length, count, RATIO=ratio, **tiles)
    elif count:
        queries, begins = lists_of(picks, count)
        _picked_grad_kernel[(batch * count,)](
            q, entries, queries, begins, lse, delta, grad, grad_entries,
            HEADS=heads, WIDTH=width, ROWS=32, SCALE=width**-0.5,
        )  # fmt: skip
    return grad_q, grad_rows, grad_entries, grad_sink
