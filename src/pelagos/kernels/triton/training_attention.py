"""Attention in training: tiles of (query, head) rows walk their keys, tiles of keys walk their rows.

A mask of picks, if any, is read beside the keys. Every sum has one owner and one order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128  # (query, head) rows a program of the queries
KEYS = 64  # keys a step of it, or a program of the keys' gradients
STEP = 64  # rows a step of these
# Triton 3.6 puts no fence between loads of a pipelined loop and a product that reads them from shared memory.
STAGES = 1


@triton.jit
def _tile(base, place, live, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    return tl.load(base + place.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=live[:, None], other=0.0)


@triton.jit
def _sees(
    index, t, start, live, picked, sequence, length, count,
    WINDOW: tl.constexpr, RATIO: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """Which keys (N,) the queries at t (R,) see: rows of the window (RATIO 0) or entries, (R, N)."""
    live = live[:, None] & (index < count)[None, :]
    if RATIO > 0:
        sees = live & (index[None, :] * RATIO >= start[:, None]) & ((index[None, :] + 1) * RATIO <= t[:, None] + 1)
        if PICKED:
            at = (sequence * length + t)[:, None] * count + index[None, :]
            sees = sees & (tl.load(picked + at, mask=live, other=0) != 0)
        return sees
    back = t[:, None] - index[None, :]
    return live & (back >= 0) & (back < WINDOW) & (index[None, :] >= start[:, None])


@triton.jit
def _rows_of(starts, sequence, length, HEADS: tl.constexpr, PADDED: tl.constexpr, R: tl.constexpr):
    """A program's rows: position, head, place, which are there, sample's start; the first start, the last position."""
    row = tl.arange(0, R)
    first, head = tl.program_id(0) * (R // PADDED), row % PADDED
    t = first + row // PADDED
    live = (t < length) & (head < HEADS)
    start = tl.load(starts + sequence * length + t, mask=t < length, other=0)
    low = tl.load(starts + sequence * length + first)
    place = (sequence * length + t) * HEADS + head
    return t, head, place, live, start, low, tl.minimum(first + R // PADDED, length) - 1


@triton.jit
def _bounds(low, last, FAR: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr, QUERIES: tl.constexpr):
    """The first key that a program's QUERIES may see, and the one behind the last: of the window or, FAR, entries."""
    if FAR:
        return (low + RATIO - 1) // RATIO, (last + 1) // RATIO
    return tl.maximum(low, tl.program_id(0) * QUERIES - WINDOW + 1), last + 1


@triton.jit
def _forward_kernel(
    q, rows, entries, sink, picked, starts, out, lse, weights, length, count,
    HEADS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr,
    PICKED: tl.constexpr, R: tl.constexpr, N: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    sequence, column = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH)
    t, head, place, live, start, low, last = _rows_of(starts, sequence, length, HEADS, PADDED, R)
    own = _tile(q, place, live, WIDTH)
    top = tl.load(sink + head, mask=live, other=0.0).to(tl.float32)
    total, mixed = tl.full((R,), 1.0, tl.float32), tl.zeros((R, WIDTH), tl.float32)
    for far in tl.static_range(1 + (RATIO > 0)):
        first, end = _bounds(low, last, far, WINDOW, RATIO, R // PADDED)
        keys, many = (entries, count) if far else (rows, length)
        for begin in range(first, end, N):
            index = begin + tl.arange(0, N)
            key = _tile(keys, sequence * many + index, index < many, WIDTH)
            sees = _sees(index, t, start, live, picked, sequence, length, many, WINDOW, RATIO * far, PICKED)
            logits = tl.where(sees, tl.dot(own, tl.trans(key), input_precision="ieee") * SCALE, float("-inf"))
            best = tl.maximum(top, tl.max(logits, 1))
            chance, keep = tl.exp(logits - best[:, None]), tl.exp(top - best)
            total = total * keep + tl.sum(chance, 1)
            mixed = tl.dot(chance.to(key.dtype), key, mixed * keep[:, None], input_precision="ieee")
            top = best
    at = place[:, None] * WIDTH + column[None, :]
    tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=live[:, None])
    level = top + tl.log(total)
    tl.store(lse + place, level, mask=live)
    if RATIO > 0:
        query = tl.program_id(0) * (R // PADDED) + tl.arange(0, R // PADDED)
        for begin in range((low + RATIO - 1) // RATIO, (last + 1) // RATIO, N):
            index = begin + tl.arange(0, N)
            key = _tile(entries, sequence * count + index, index < count, WIDTH)
            sees = _sees(index, t, start, live, picked, sequence, length, count, WINDOW, RATIO, PICKED)
            logits = tl.dot(own, tl.trans(key), input_precision="ieee") * SCALE
            chance = tl.where(sees, tl.exp(logits - level[:, None]), 0.0)
            summed = tl.sum(tl.reshape(chance, (R // PADDED, PADDED, N)), 1)
            cell = (sequence * length + query)[:, None] * count + index[None, :]
            tl.store(weights + cell, summed, mask=(query < length)[:, None] & (index < count)[None, :])


@triton.jit
def _query_grad_kernel(
    q, rows, entries, sink, picked, starts, out, lse, grad, grad_q, grad_sink, delta, length, count,
    HEADS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr,
    PICKED: tl.constexpr, R: tl.constexpr, N: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    sequence, column = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH)
    t, head, place, live, start, low, last = _rows_of(starts, sequence, length, HEADS, PADDED, R)
    own, up = _tile(q, place, live, WIDTH), _tile(grad, place, live, WIDTH)
    level = tl.load(lse + place, mask=live, other=0.0)
    mean = tl.sum(up.to(tl.float32) * _tile(out, place, live, WIDTH).to(tl.float32), 1)
    tl.store(delta + place, mean, mask=live)
    spill = tl.exp(tl.load(sink + head, mask=live, other=0.0).to(tl.float32) - level)
    tl.store(grad_sink + place, -spill * mean, mask=live)
    total = tl.zeros((R, WIDTH), tl.float32)
    for far in tl.static_range(1 + (RATIO > 0)):
        first, end = _bounds(low, last, far, WINDOW, RATIO, R // PADDED)
        keys, many = (entries, count) if far else (rows, length)
        for begin in range(first, end, N):
            index = begin + tl.arange(0, N)
            key = _tile(keys, sequence * many + index, index < many, WIDTH)
            sees = _sees(index, t, start, live, picked, sequence, length, many, WINDOW, RATIO * far, PICKED)
            logits = tl.dot(own, tl.trans(key), input_precision="ieee") * SCALE
            change = tl.dot(up, tl.trans(key), input_precision="ieee") - mean[:, None]
            change = tl.where(sees, tl.exp(logits - level[:, None]), 0.0) * change * SCALE
            total = tl.dot(change.to(key.dtype), key, total, input_precision="ieee")
    at = place[:, None] * WIDTH + column[None, :]
    tl.store(grad_q + at, total.to(grad_q.dtype.element_ty), mask=live[:, None])


@triton.jit
def _key_grad_kernel(
    q, keys, picked, starts, ends, lse, delta, grad, grad_keys, length, count,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr, PICKED: tl.constexpr,
    N: tl.constexpr, STEP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Gradient of N keys: rows of a window (RATIO 0) or entries."""
    sequence, first, column = tl.program_id(1).to(tl.int64), tl.program_id(0) * N, tl.arange(0, WIDTH)
    index = first + tl.arange(0, N)
    key = _tile(keys, sequence * count + index, index < count, WIDTH)
    if RATIO > 0:
        low = (first + 1) * RATIO - 1
        high = tl.load(ends + sequence * length + tl.minimum(first + N, count) * RATIO - RATIO)
    else:
        low, high = first, tl.minimum(first + N + WINDOW - 1, length)
    total = tl.zeros((N, WIDTH), tl.float32)
    for begin in range(low * HEADS, high * HEADS, STEP):
        row = begin + tl.arange(0, STEP)
        live, t, place = row < high * HEADS, row // HEADS, sequence * length * HEADS + row
        start = tl.load(starts + sequence * length + t, mask=live, other=0)
        sees = _sees(index, t, start, live, picked, sequence, length, count, WINDOW, RATIO, PICKED)
        own, up = _tile(q, place, live, WIDTH), _tile(grad, place, live, WIDTH)
        level, mean = tl.load(lse + place, mask=live, other=0.0), tl.load(delta + place, mask=live, other=0.0)
        logits = tl.dot(own, tl.trans(key), input_precision="ieee") * SCALE
        chance = tl.where(sees, tl.exp(logits - level[:, None]), 0.0)
        change = chance * (tl.dot(up, tl.trans(key), input_precision="ieee") - mean[:, None]) * SCALE
        total = tl.dot(tl.trans(change.to(own.dtype)), own, total, input_precision="ieee")
        total = tl.dot(tl.trans(chance.to(up.dtype)), up, total, input_precision="ieee")
    at = (sequence * count + index)[:, None] * WIDTH + column[None, :]
    tl.store(grad_keys + at, total.to(grad_keys.dtype.element_ty), mask=(index < count)[:, None])


class Attend(torch.autograd.Function):
    """`kernels.training_attention.attend`."""

    @staticmethod
    def forward(ctx: Any, q, rows, entries, sink, picked, starts, ends, window, ratio):
        picked = None if picked is None else picked.view(torch.uint8)
        inputs = [None if t is None else t.contiguous() for t in (q, rows, entries, sink, picked, starts, ends)]
        q, rows, entries, sink, picked, starts, ends = inputs
        (batch, length, heads, width), count = q.shape, 0 if entries is None else entries.shape[1]
        ctx.shapes = {"HEADS": heads, "WIDTH": width, "WINDOW": window, "RATIO": ratio if count else 0,
                      "PICKED": picked is not None, "N": KEYS, "SCALE": width**-0.5, "num_stages": STAGES}  # fmt: skip
        padded = triton.next_power_of_2(heads)
        ctx.rows = {"PADDED": padded, "R": max(padded, ROWS), "num_warps": 8}
        ctx.grid = (triton.cdiv(length, ctx.rows["R"] // padded), batch)
        out, lse = torch.empty_like(q), q.new_empty((batch, length, heads), dtype=torch.float32)
        weights = None if entries is None else q.new_zeros((batch, length, count), dtype=torch.float32)
        _forward_kernel[ctx.grid](
            q, rows, entries, sink, picked, starts, out, lse, weights, length, count, **ctx.rows, **ctx.shapes
        )
        ctx.save_for_backward(*inputs, out, lse)
        if weights is not None:
            ctx.mark_non_differentiable(weights)
        return out, weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None):
        q, rows, entries, sink, picked, starts, ends, out, lse = ctx.saved_tensors
        (batch, length), count, grad = q.shape[:2], 0 if entries is None else entries.shape[1], grad.contiguous()
        to_q, delta, spill = torch.empty_like(q), torch.empty_like(lse), torch.empty_like(lse)
        _query_grad_kernel[ctx.grid](
            q, rows, entries, sink, picked, starts, out, lse, grad, to_q, spill, delta, length, count, **ctx.rows,
            **ctx.shapes,
        )  # fmt: skip
        to_rows, to_entries = torch.empty_like(rows), None if entries is None else torch.empty_like(entries)
        for keys, to_keys, own in (
            (rows, to_rows, {"RATIO": 0, "PICKED": False}), (entries, to_entries, {})
        ):  # fmt: skip
            if keys is not None and (many := keys.shape[1]):
                _key_grad_kernel[(triton.cdiv(many, KEYS), batch)](
                    q, keys, picked if keys is entries else None, starts, ends, lse, delta, grad, to_keys, length, many,
                    STEP=STEP, **(ctx.shapes | own),
                )  # fmt: skip
        return to_q, to_rows, to_entries, spill.sum((0, 1)).to(sink.dtype), *[None] * 5
