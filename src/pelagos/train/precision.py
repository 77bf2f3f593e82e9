"""Number formats in training: FP8 products and gradients, the quantised stage, FP4 that FP8 holds without loss.

Source: technical report 4, 5.2.1; V3's FP8 framework.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from pelagos import numerics
from pelagos.kernels.fp8_product import fp8_product
from pelagos.model import Transformer
from pelagos.model.attention import Attention
from pelagos.model.experts import Experts
from pelagos.model.layers import Linear


def fp8_gradient(x: Tensor) -> Tensor:
    """Return x as it is; its gradient passes through FP8 in 1x128 blocks, for the experts' products before it."""
    if x.requires_grad:
        x.register_hook(lambda grad: numerics.fake_quant_fp8(grad, numerics.ACT_BLOCK))
    return x


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
        elif isinstance(module, Attention):
            module.__dict__.pop("_store", None)
            if kind == "released":
                module.__dict__["_store"] = partial(_as_cached, module)


def _as_cached(attn: Attention, kv: Tensor) -> Tensor:
    """What a served cache holds of kv (..., C): FP8 and, of the rotated channels, BF16; gradients straight through."""
    nope, rope = kv[..., : attn.nope], kv[..., attn.nope :]
    rounded = rope + (rope.bfloat16().to(rope.dtype) - rope).detach()  # exact: what is cut off has few bits
    return torch.cat((numerics.fake_quant_fp8(nope, numerics.KV_BLOCK), rounded), -1)


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

    Their float32 masters are kept here, so that in the quantised stage the trained forward is the served one; they are
    in place within `with` this.
    """

    def __init__(self, model: Transformer) -> None:
        plain = ((name, tensor) for name, tensor, release in model.released_tensors() if release == "bf16")
        self._parameters = {name: tensor for name, tensor in plain if "parametrizations" not in name}
        self.masters = {name: tensor.detach().clone() for name, tensor in self._parameters.items()}
        self.__exit__()

    @torch.no_grad()
    def __enter__(self) -> None:
        for name, tensor in self._parameters.items():
            tensor.copy_(self.masters[name])

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for name, tensor in self._parameters.items():
            self.masters[name].copy_(tensor)
            tensor.copy_(tensor.bfloat16())
