"""Routed experts on CUDA, forward and backward: tokens sorted by expert once, grouped products, Triton between them.

A token's gradient is the sum of its rows' in order, as its output is: nothing is added by atomics. What it is held
against: `ref.experts.mixture`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pelagos import numerics
from pelagos.kernels.ref.experts import Quantizer


def mixture(
    x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float, quantize: Quantizer | None,
    hits: Tensor | None = None, leave: Quantizer | None = None,
) -> Tensor:  # fmt: skip
    """Return the routed experts' sum (T, D) float32 of bfloat16 x (T, D); arguments as `ref.experts.mixture` has them.

    Gradients of what leaves a product pass through FP8 if there is a `leave`.
    """
    fp8 = leave is not None
    return Mixture.apply(quantize(x) if quantize else x, chosen, weights, w13, w2, limit, quantize, hits, fp8)


def swiglu(gate: Tensor, up: Tensor, limit: float, hits: Tensor | None) -> Tensor:
    """Return `ref.experts.swiglu` of gate and up (T, F) in their dtype, differentiable."""
    return Swiglu.apply(torch.cat((gate, up), -1), limit, hits)


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (R, I), an expert's rows end at `ends` (E,), by its weight (E, I, O); x (I, R) by weight (R, O): (E, I, O)."""
    return functional.grouped_mm(x, weight, offs=ends)


class Swiglu(torch.autograd.Function):
    """`swiglu` of both (T, 2F)."""

    @staticmethod
    def forward(ctx: Any, both, limit, hits):
        from pelagos.kernels.triton import grouped_experts as kernel

        ones = both.new_ones(len(both), dtype=torch.float32)
        ctx.save_for_backward(both, ones)
        ctx.limit = limit
        return kernel.swiglu(both, ones, limit, hits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        from pelagos.kernels.triton import grouped_experts as kernel

        both, ones = ctx.saved_tensors
        return kernel.swiglu_backward(both, ones, grad.contiguous(), ctx.limit)[0], None, None


class Mixture(torch.autograd.Function):
    """`mixture` behind the quantisation of x."""

    @staticmethod
    def forward(ctx: Any, x, chosen, weights, w13, w2, limit, quantize, hits, fp8):
        from pelagos.kernels.triton import grouped_experts as kernel

        experts = torch.arange(len(w13), device=x.device)
        flat, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(flat, experts, right=True, out_int32=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=x.device)
        places, wide, narrow = places.view(chosen.shape), w13.to(x.dtype), w2.to(x.dtype)
        rows, scale = x[order // chosen.shape[1]], weights.flatten()[order]
        both = _product(rows, wide.transpose(1, 2), ends)
        hidden = kernel.swiglu(both, scale, limit, hits)
        hidden = quantize(hidden) if quantize else hidden
        out = _product(hidden, narrow.transpose(1, 2), ends)
        ctx.save_for_backward(rows, order, places, ends, scale, both, hidden, wide, narrow)
        ctx.limit, ctx.fp8, ctx.masters = limit, fp8, (w13.dtype, w2.dtype)
        return kernel.sum_rows(out, places, torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        from pelagos.kernels.triton import grouped_experts as kernel

        rows, order, places, ends, scale, both, hidden, wide, narrow = ctx.saved_tensors
        to_out = grad.to(rows.dtype)[order // places.shape[1]]
        to_out = numerics.fake_quant_fp8(to_out, numerics.ACT_BLOCK) if ctx.fp8 else to_out
        to_hidden = _product(to_out, narrow, ends)
        to_both, to_scale = kernel.swiglu_backward(both, scale, to_hidden, ctx.limit)
        to_both = numerics.fake_quant_fp8(to_both, numerics.ACT_BLOCK) if ctx.fp8 else to_both
        to_wide, to_narrow = _product(to_both.T, rows, ends), _product(to_out.T, hidden, ends)
        to_x = kernel.sum_rows(_product(to_both, wide, ends), places, rows.dtype)
        masters = to_wide.to(ctx.masters[0]), to_narrow.to(ctx.masters[1])
        return to_x, None, to_scale[places], *masters, *[None] * 4
