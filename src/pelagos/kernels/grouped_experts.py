"""Routed experts on CUDA, forward and backward: tokens sorted by expert once, grouped products, Triton between them.

A token's gradient is the sum of its rows' in order, as its output is: nothing is added by atomics. What it is held
against: `ref.experts.mixture`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.kernels.ref.experts import Quantizer
from pelagos.kernels.ref.gemm import ordered_sum


def mixture(
    x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float, quantize: Quantizer | None,
    hits: Tensor | None = None, leave: Quantizer | None = None,
) -> Tensor:  # fmt: skip
    """Return the routed experts' sum (T, D) float32 of bfloat16 x (T, D); arguments as `ref.experts.mixture` has them.

    Gradients of what leaves a product pass through FP8 if there is a `leave`.
    """
    from pelagos.kernels.triton.grouped_experts import Mixture

    prepared = quantize(x) if quantize else x
    return Mixture.apply(prepared, chosen, weights, w13, w2, limit, quantize, hits, leave is not None)


def sum_rows(rows: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums (T, D) in `dtype` of rows (R, D) at places (T, K), in order of K."""
    if not rows.is_cuda:
        return ordered_sum(rows[places].to(dtype), 1)
    from pelagos.kernels.triton.grouped_experts import sum_rows as launch

    return launch(rows.contiguous(), places, dtype)


def swiglu(gate: Tensor, up: Tensor, limit: float, hits: Tensor | None) -> Tensor:
    """Return `ref.experts.swiglu` of gate and up (T, F) in their dtype, differentiable."""
    from pelagos.kernels.triton.grouped_experts import Swiglu

    return Swiglu.apply(torch.cat((gate, up), -1), limit, hits)
