"""Pooling of token rows into compressed entries: a program a tile of entries, and of rows for the gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES, ROWS = 4, 8  # a tile


@triton.jit
def _pool_kernel(
    both, ape, opens, pooled, levels, length, count,
    DIM: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, BE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """both (B, S, 2, span): values and scores of rows; levels: log-sum-exps of an entry's scores a channel."""
    sequence, channel = tl.program_id(1).to(tl.int64), tl.arange(0, PADDED)
    entry = tl.program_id(0) * BE + tl.arange(0, BE)
    inside = (channel < DIM)[None, :] & (entry < count)[:, None]
    hides = tl.load(opens + sequence * count + entry, mask=entry < count, other=1) != 0
    top, total = tl.full((BE, PADDED), -1e30, tl.float32), tl.zeros((BE, PADDED), tl.float32)
    mixed = tl.zeros((BE, PADDED), tl.float32)
    for slot in range(0, RATIO * (1 + OVERLAP)):
        row = entry * RATIO + slot - RATIO * OVERLAP
        live, at = inside, channel
        if OVERLAP:
            live = inside & ((slot >= RATIO) | ~hides)[:, None]
            at = channel + tl.where(slot >= RATIO, DIM, 0)
        place = (sequence * length + row)[:, None] * (2 * DIM * (1 + OVERLAP)) + at[None, :]
        value = tl.load(both + place, mask=live, other=0.0)
        score = tl.load(both + place + DIM * (1 + OVERLAP), mask=live, other=0.0)
        score += tl.load(ape + (slot % RATIO) * (DIM * (1 + OVERLAP)) + at, mask=channel < DIM, other=0.0)[None, :]
        score = tl.where(live, score, float("-inf"))
        best = tl.maximum(top, score)
        chance, keep = tl.exp(score - best), tl.exp(top - best)
        total, mixed, top = total * keep + chance, mixed * keep + chance * value, best
    place = (sequence * count + entry)[:, None] * DIM + channel[None, :]
    tl.store(pooled + place, (mixed / total).to(pooled.dtype.element_ty), mask=inside)
    tl.store(levels + place, top + tl.log(total), mask=inside)


@triton.jit
def _pool_grad_kernel(
    both, ape, opens, pooled, levels, grad, grad_both, length, count,
    DIM: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, BR: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """A row's channels belong to one entry each: the first half to the next one, the rest to its own."""
    sequence, channel = tl.program_id(1).to(tl.int64), tl.arange(0, PADDED)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    there, span = (row < length)[:, None] & (channel < DIM)[None, :], DIM * (1 + OVERLAP)
    for half in tl.static_range(1 + OVERLAP):
        entry = row // RATIO + (OVERLAP - half)
        used = (row < length) & (entry < count)
        if OVERLAP and half == 0:
            used = used & (tl.load(opens + sequence * count + entry, mask=used, other=1) == 0)
        live = used[:, None] & (channel < DIM)[None, :]
        place = (sequence * length + row)[:, None] * (2 * span) + half * DIM + channel[None, :]
        at = (sequence * count + entry)[:, None] * DIM + channel[None, :]
        value, score = tl.load(both + place, mask=live, other=0.0), tl.load(both + place + span, mask=live, other=0.0)
        score += tl.load(ape + (row % RATIO)[:, None] * span + half * DIM + channel[None, :], mask=live, other=0.0)
        chance = tl.where(live, tl.exp(score - tl.load(levels + at, mask=live, other=0.0)), 0.0)
        change = chance * tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
        middle = tl.load(pooled + at, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_both + place, change.to(grad_both.dtype.element_ty), mask=there)
        tl.store(grad_both + place + span, (change * (value - middle)).to(grad_both.dtype.element_ty), mask=there)


def _shapes(ape: Tensor, ratio: int, width: int) -> dict[str, int]:
    return {"DIM": width, "RATIO": ratio, "OVERLAP": ape.shape[1] // width - 1, "PADDED": triton.next_power_of_2(width)}


class Pool(torch.autograd.Function):
    """`kernels.compressor.pool`; the backward joins and casts masters again: no micro-batch keeps a cast."""

    @staticmethod
    def forward(ctx: Any, x, wkv, wgate, ape, opens, ratio, width):
        flat, weight, count = x.reshape(-1, x.shape[-1]), torch.cat((wkv, wgate)).to(x.dtype), opens.shape[1]
        both = torch.mm(flat, weight.T, out_dtype=torch.float32) if x.is_cuda else flat @ weight.T
        pooled = x.new_empty((len(x), count, width))
        levels = torch.empty_like(pooled, dtype=torch.float32)
        shapes = _shapes(ape, ratio, width)
        tile = ENTRIES if shapes["OVERLAP"] else 1  # few windows are long ones
        _pool_kernel[(triton.cdiv(count, tile), len(x))](
            both, ape, opens.view(torch.uint8), pooled, levels, x.shape[1], count, BE=tile, **shapes
        )
        ctx.save_for_backward(flat, wkv, wgate, ape, opens, both, pooled, levels)
        ctx.ratio = ratio
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x, wkv, wgate, ape, opens, both, pooled, levels = ctx.saved_tensors
        (batch, count, width), length, span = pooled.shape, len(x) // len(pooled), ape.shape[1]
        change = torch.empty((batch, length, 2 * span), dtype=grad.dtype, device=grad.device)
        _pool_grad_kernel[(triton.cdiv(length, ROWS), batch)](
            both, ape, opens.view(torch.uint8), pooled, levels, grad.contiguous(), change, length, count,
            BR=ROWS, **_shapes(ape, ctx.ratio, width),
        )  # fmt: skip
        flat = change.view(len(x), -1)
        to_ape = change[:, : count * ctx.ratio, span:].float().unflatten(1, (-1, ctx.ratio)).sum((0, 1))
        to_x = (flat @ torch.cat((wkv, wgate)).to(x.dtype)).view(batch, length, -1) if ctx.needs_input_grad[0] else None
        return to_x, *(flat.T @ x).float().chunk(2), to_ape, None, None, None
