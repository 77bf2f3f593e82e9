"""The indexer in training: scores of entries and their gradients by tiles, its divergence by one program a query."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.triton.training_attention import STAGES, _rows_of, _tile

ROWS, KEYS, STEP = 128, 64, 64  # (query, head) rows and keys a step, rows a step of the keys' gradients


@triton.jit
def _scores_kernel(
    q, keys, gates, starts, scores, length, count, HEADS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
    RATIO: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(1).to(tl.int64)
    _, _, place, live, _, low, last = _rows_of(starts, sequence, length, HEADS, PADDED, R)
    own, gate = _tile(q, place, live, WIDTH), tl.load(gates + place, mask=live, other=0.0).to(tl.float32)
    query = tl.program_id(0) * (R // PADDED) + tl.arange(0, R // PADDED)
    for begin in range((low + RATIO - 1) // RATIO, (last + 1) // RATIO, N):
        index = begin + tl.arange(0, N)
        key = _tile(keys, sequence * count + index, index < count, WIDTH)
        logits = tl.maximum(tl.dot(own, tl.trans(key), input_precision="ieee"), 0.0) * gate[:, None]
        summed = tl.sum(tl.reshape(logits, (R // PADDED, PADDED, N)), 1)
        at = (sequence * length + query)[:, None] * count + index[None, :]
        tl.store(scores + at, summed, mask=(query < length)[:, None] & (index < count)[None, :])


@triton.jit
def _query_grad_kernel(
    q, keys, gates, starts, grad, grad_q, grad_gates, length, count, HEADS: tl.constexpr, PADDED: tl.constexpr,
    WIDTH: tl.constexpr, RATIO: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    sequence, column = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH)
    t, _, place, live, _, low, last = _rows_of(starts, sequence, length, HEADS, PADDED, R)
    own, gate = _tile(q, place, live, WIDTH), tl.load(gates + place, mask=live, other=0.0).to(tl.float32)
    total, opened = tl.zeros((R, WIDTH), tl.float32), tl.zeros((R,), tl.float32)
    for begin in range((low + RATIO - 1) // RATIO, (last + 1) // RATIO, N):
        index = begin + tl.arange(0, N)
        key = _tile(keys, sequence * count + index, index < count, WIDTH)
        logits = tl.dot(own, tl.trans(key), input_precision="ieee")
        at = (sequence * length + t)[:, None] * count + index[None, :]
        g = tl.load(grad + at, mask=live[:, None] & (index < count)[None, :], other=0.0)
        opened += tl.sum(g * tl.maximum(logits, 0.0), 1)
        change = tl.where(logits > 0, g * gate[:, None], 0.0)
        total = tl.dot(change.to(key.dtype), key, total, input_precision="ieee")
    tl.store(grad_q + place[:, None] * WIDTH + column[None, :], total.to(grad_q.dtype.element_ty), mask=live[:, None])
    tl.store(grad_gates + place, opened, mask=live)


@triton.jit
def _key_grad_kernel(
    q, keys, gates, ends, grad, grad_keys, length, count,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, RATIO: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    sequence, first, column = tl.program_id(1).to(tl.int64), tl.program_id(0) * N, tl.arange(0, WIDTH)
    index = first + tl.arange(0, N)
    key = _tile(keys, sequence * count + index, index < count, WIDTH)
    high = tl.load(ends + sequence * length + tl.minimum(first + N, count) * RATIO - RATIO)
    total = tl.zeros((N, WIDTH), tl.float32)
    for begin in range(((first + 1) * RATIO - 1) * HEADS, high * HEADS, STEP):
        row = begin + tl.arange(0, STEP)
        live, t, place = row < high * HEADS, row // HEADS, sequence * length * HEADS + row
        own, gate = _tile(q, place, live, WIDTH), tl.load(gates + place, mask=live, other=0.0).to(tl.float32)
        at = (sequence * length + t)[:, None] * count + index[None, :]
        g = tl.load(grad + at, mask=live[:, None] & (index < count)[None, :], other=0.0)
        change = tl.where(tl.dot(own, tl.trans(key), input_precision="ieee") > 0, g * gate[:, None], 0.0)
        total = tl.dot(tl.trans(change.to(own.dtype)), own, total, input_precision="ieee")
    at = (sequence * count + index)[:, None] * WIDTH + column[None, :]
    tl.store(grad_keys + at, total.to(grad_keys.dtype.element_ty), mask=(index < count)[:, None])


@triton.jit
def _divergence_kernel(scores, weights, seen, losses, grad, count, BLOCK: tl.constexpr):
    """A query's divergence and its gradient to the scores."""
    entry, base = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64) * count
    mask = (entry < count) & (tl.load(seen + base + entry, mask=entry < count, other=0) != 0)
    score = tl.load(scores + base + entry, mask=mask, other=float("-inf"))
    target = tl.load(weights + base + entry, mask=mask, other=0.0)
    target = target / tl.maximum(tl.sum(target, 0), 1e-20)
    top = tl.maximum(tl.max(score, 0), -1e30)
    chance = tl.where(mask, tl.exp(score - top), 0.0)
    total = tl.maximum(tl.sum(chance, 0), 1e-30)
    level = tl.where(mask, score - top - tl.log(total), 0.0)
    loss = tl.sum(target * (tl.log(tl.maximum(target, 1e-20)) - level), 0)
    tl.store(losses + tl.program_id(0), loss)
    tl.store(grad + base + entry, chance / total * tl.sum(target, 0) - target, mask=entry < count)


@triton.jit
def _pick_kernel(scores, visible, picked, count, topk, BLOCK: tl.constexpr):
    """The `topk` largest of a query's visible scores: their least one by halving its bits, ties to the lower entry."""
    entry, base = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64) * count
    seen = (entry < count) & (tl.load(visible + base + entry, mask=entry < count, other=0) != 0)
    score = tl.load(scores + base + entry, mask=seen, other=float("nan"))
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)  # both zeros are one
    order = tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)
    order = tl.where(score == score, order, 0)
    least, bit = tl.full((), 0, tl.uint32), tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        tried = least | bit
        least = tl.where(tl.sum((order >= tried).to(tl.int32), 0) >= topk, tried, least)
        bit = bit >> 1
    above, tie = order > least, order == least
    room = topk - tl.sum(above.to(tl.int32), 0)
    chosen = seen & (above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= room)))
    tl.store(picked + base + entry, chosen.to(tl.uint8), mask=entry < count)


class Scores(torch.autograd.Function):
    """`kernels.index_training.index_scores`: of the entries before each query in its sample, zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, q, keys, gates, starts, ends, ratio):
        q, keys, gates, starts, ends = (t.contiguous() for t in (q, keys, gates, starts, ends))
        ctx.save_for_backward(q, keys, gates, starts, ends)
        (batch, length, heads, width), count = q.shape, keys.shape[1]
        padded = triton.next_power_of_2(heads)
        ctx.shapes = {"HEADS": heads, "WIDTH": width, "RATIO": ratio, "N": KEYS, "num_stages": STAGES}
        ctx.rows = {"PADDED": padded, "R": max(padded, ROWS)}
        ctx.grid = (triton.cdiv(length, ctx.rows["R"] // padded), batch)
        out = q.new_zeros((batch, length, count), dtype=torch.float32)
        _scores_kernel[ctx.grid](q, keys, gates, starts, out, length, count, **ctx.rows, **ctx.shapes)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        q, keys, gates, starts, ends = ctx.saved_tensors
        (batch, length), count, grad = q.shape[:2], keys.shape[1], grad.contiguous()
        to_q, to_keys, to_gates = torch.empty_like(q), torch.empty_like(keys), torch.empty_like(gates)
        _query_grad_kernel[ctx.grid](
            q, keys, gates, starts, grad, to_q, to_gates, length, count, **ctx.rows, **ctx.shapes
        )
        _key_grad_kernel[(triton.cdiv(count, KEYS), batch)](
            q, keys, gates, ends, grad, to_keys, length, count, STEP=STEP, **ctx.shapes
        )
        return to_q, to_keys, to_gates, None, None, None


class Divergence(torch.autograd.Function):
    """`kernels.index_training.divergence`, its gradient to the scores (B, S, M) made at once."""

    @staticmethod
    def forward(ctx: Any, scores, weights, seen):
        losses, grad, count = scores.new_empty(scores.shape[:2]), torch.empty_like(scores), scores.shape[2]
        _divergence_kernel[(losses.numel(),)](
            scores, weights, seen.contiguous().view(torch.uint8), losses, grad, count, **_whole(count)
        )
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return ctx.saved_tensors[0] * grad.unsqueeze(-1), None, None


def _whole(count: int) -> dict[str, int]:
    """How a program takes all entries of a query."""
    block = triton.next_power_of_2(count)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}


def pick(scores: Tensor, visible: Tensor, topk: int) -> Tensor:
    """Return which entries (B, S, M) bool are picked."""
    picked, count = torch.empty_like(visible, dtype=torch.uint8), scores.shape[2]
    _pick_kernel[(scores.numel() // count,)](scores, visible, picked, count, topk, **_whole(count))
    return picked.view(torch.bool)
