"""Projections and norms that know how the checkpoint stores them.

In `released` mode a product with an FP8 or FP4 weight sees activations quantised in blocks of 128, as the
official GEMMs do. With `master` weights (training) the weight is quantised on the fly as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pelagos import numerics
from pelagos.kernels.norm_rope import rms_norm
from pelagos.kernels.ref.gemm import linear, ordered_linear, quantized_linear


def quantize_activations(x: Tensor) -> Tensor:
    """Simulate e4m3 activations in blocks of 128 along the last dimension, as before every FP8 or FP4 product."""
    return numerics.fake_quant_fp8(x, numerics.ACT_BLOCK)


def quantize_weight(weight: Tensor, stored: str) -> Tensor:
    """Simulate a weight's stored format (`fp8` or `fp4`, else as it is), with a straight-through gradient."""
    if stored == "fp8":
        return numerics.fake_quant_fp8(weight, numerics.FP8_BLOCK)
    return numerics.fake_quant_fp4(weight) if stored == "fp4" else weight


def in_product(weight: Tensor, stored: str, dtype: torch.dtype) -> Tensor:
    """Return a weight as a product takes it, straight through; micro-batches share a trained one's until it changes."""
    if not (weight.is_leaf and weight.requires_grad and torch.is_grad_enabled()):
        return quantize_weight(weight, stored).to(dtype)
    kept, key = vars(weight), (weight._version, weight.data_ptr(), stored, dtype)
    if kept.get("made_of") != key:
        kept["made"], kept["made_of"] = quantize_weight(weight.detach(), stored).to(dtype), key
    return numerics.straight_through(weight, kept["made"])


class Linear(nn.Module):
    """A bias-free projection (out, in). `release` is the format the release stores, `stored` the one found."""

    def __init__(self, inputs: int, outputs: int, release: str, *, simulate_input: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.release = self.stored = release
        self.simulate_input = simulate_input
        self.simulate = self.master = False
        self.product: Callable[[Tensor, Tensor], Tensor] | None = None  # training in FP8: x and master weight to x W^T

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight the product uses, in `dtype`."""
        return in_product(self.weight, self.stored if self.master else "", dtype)

    @property
    def quantizes_input(self) -> bool:
        """Whether this product sees simulated FP8 activations."""
        return self.simulate and self.simulate_input and self.stored in ("fp8", "fp4")

    def forward(self, x: Tensor) -> Tensor:
        if self.product is not None:
            return self.product(x, self.weight)
        weight = self.effective_weight(x.dtype)
        if self.quantizes_input:
            return quantized_linear(quantize_activations(x), weight)
        return ordered_linear(x, weight) if self.simulate else linear(x, weight)


class Lookup(torch.autograd.Function):
    """Rows of weight (V, D) for ids; the gradient of a row adds its tokens' in their order, torch's on CUDA in any."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ids, weight = ctx.saved_tensors
        own, order = ids.flatten().sort(stable=True)
        bounds = torch.searchsorted(own, torch.arange(len(weight) + 1, device=ids.device))
        rows = grad.flatten(0, -2)[order].float()
        return None, torch.segment_reduce(rows, "sum", offsets=bounds, initial=0, unsafe=True).to(weight.dtype)


class Embedding(nn.Embedding):
    """Token embeddings whose gradient has the same bits every time."""

    def forward(self, input: Tensor) -> Tensor:
        return Lookup.apply(input, self.weight) if input.is_cuda else super().forward(input)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight; statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
