"""Number formats in training: FP8 products with FP8 gradients, the quantised stage, FP4 that FP8 holds without loss.

`fp8_product` is E4M3 times E4M3 under UE8M0 scales in forward and both gradients: activations and gradients in 1x128
blocks along the summed dimension, weights in 128x128. A CUDA device of Hopper or later multiplies the codes by
`scaled_mm`; elsewhere the same values meet in the carrier. Source: technical report 4, 5.2.1; V3's framework.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pelagos import numerics
from pelagos.kernels.ref.gemm import quantized_linear
from pelagos.model import Transformer
from pelagos.model.experts import Experts
from pelagos.model.layers import Linear

KINDS = ("bf16", "fp8", "released")
BLOCK = numerics.ACT_BLOCK[1]


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, numerics.FP8_BLOCK)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        to_x = _multiply(grad, weight.T, numerics.FP8_BLOCK)  # a 128x128 block keeps its codes when transposed
        rows = -grad.shape[0] % BLOCK
        turned = [functional.pad(t, (0, 0, 0, rows)).T.contiguous() for t in (grad, x)]
        return to_x, _multiply(turned[0], turned[1], numerics.ACT_BLOCK).to(weight.dtype)


def fp8_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (..., I) times weight (O, I) transposed in x's dtype, every operand of every product in FP8.

    The gradient of the float32 master `weight` is that of its FP8 value (straight through).
    """
    return _Fp8Product.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def _multiply(x: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    """x (T, K) in 1x128 blocks times weight (O, K) in `block`s, transposed: (T, O) in x's dtype."""
    if x.is_cuda and x.dtype == torch.bfloat16 and not (weight.shape[0] % BLOCK or x.shape[1] % BLOCK):
        return _scaled_mm(x, weight, block)
    rounded = numerics.fake_quant_fp8(weight.detach(), block).to(x.dtype)
    return quantized_linear(numerics.fake_quant_fp8(x.detach(), numerics.ACT_BLOCK), rounded)


def _scaled_mm(x: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    recipes = functional.ScalingType
    codes, scale = numerics.encode_fp8(x, numerics.ACT_BLOCK)
    other, other_scale = numerics.encode_fp8(weight, block)
    square = block == numerics.FP8_BLOCK
    # Scales of 1x128 blocks are wanted column by column, those of square blocks padded to four along the sum.
    first = scale.float().T.contiguous().T
    second = other_scale.float()
    second = functional.pad(second, (0, -second.shape[1] % 4)) if square else second.T.contiguous().T
    return functional.scaled_mm(
        codes, other.T, first, recipes.BlockWise1x128, second,
        recipes.BlockWise128x128 if square else recipes.BlockWise1x128, output_dtype=x.dtype,
    )  # fmt: skip


class _Fp8Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return numerics.fake_quant_fp8(grad, numerics.ACT_BLOCK)


def fp8_gradient(x: Tensor) -> Tensor:
    """Return x as it is; its gradient passes through FP8 in 1x128 blocks, for the experts' products before it."""
    return _Fp8Gradient.apply(x)


def set_precision(model: Transformer, kind: str, *, fp8: bool = False) -> None:
    """Choose how a model in training computes: `bf16` (its carrier), `fp8` products, or quantised as `released`.

    In `released` weights are masters quantised on the fly, straight through; `fp8` gives it FP8 gradients too.
    """
    model.set_mode("released" if kind == "released" else "reference", master_weights=kind == "released")
    products = kind == "fp8" or (kind == "released" and fp8)
    for module in model.modules():
        if isinstance(module, Linear):
            module.product = fp8_product if products and module.release == "fp8" and module.simulate_input else None
        elif isinstance(module, Experts):
            module.simulate = module.master = kind != "bf16"
            module.stored = "fp8" if kind == "fp8" else module.release
            module.leave = fp8_gradient if products else None


def fp4_binades(model: Transformer) -> int:
    """Return the widest span of FP4 group scales, in powers of two, in any 128x128 block of a routed expert.

    Up to `numerics.LOSSLESS_BINADES` the weights pass from FP4 to FP8 without loss (report 5.2.1).
    """
    widest = 0
    for experts in (m for m in model.modules() if isinstance(m, Experts) and m.release == "fp4"):
        for weight in (*experts.w13.detach().chunk(2, 1), experts.w2.detach()):
            amax = weight.float().unflatten(-1, (-1, numerics.FP4_GROUP)).abs().amax(-1)  # (E, O, I/32)
            floor = torch.full((), numerics.FP4_AMAX_FLOOR, device=amax.device)
            scale = numerics.ceil_power_of_two(torch.maximum(amax, floor) / numerics.E2M1_MAX).log2()
            lines, groups = numerics.FP8_BLOCK[0], numerics.FP8_BLOCK[1] // numerics.FP4_GROUP
            padding = (0, -scale.shape[2] % groups, 0, -scale.shape[1] % lines)
            blocks = [
                functional.pad(scale, padding, value=value).unflatten(2, (-1, groups)).unflatten(1, (-1, lines))
                for value in (-torch.inf, torch.inf)
            ]
            widest = max(widest, round(float((blocks[0].amax((2, 4)) - blocks[1].amin((2, 4))).max())))
    return widest


class Stored:
    """Parameters the release stores in BF16 (norms, embedding, head, router, compressors), rounded while in use.

    Their float32 masters are kept here, so that in the quantised stage the trained forward is the served one.
    """

    def __init__(self, model: Transformer) -> None:
        self._parameters = {
            n: t for n, t, release in model.released_tensors() if release == "bf16" and "parametrizations" not in n
        }
        self.masters = {name: tensor.detach().clone() for name, tensor in self._parameters.items()}
        self._round()

    @torch.no_grad()
    def unround(self) -> None:
        """Put the masters in place, for the optimizer."""
        for name, tensor in self._parameters.items():
            tensor.copy_(self.masters[name])

    @torch.no_grad()
    def keep(self) -> None:
        """Take what the optimizer made as the new masters, and round."""
        for name, tensor in self._parameters.items():
            self.masters[name].copy_(tensor)
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for tensor in self._parameters.values():
            tensor.copy_(tensor.bfloat16())
