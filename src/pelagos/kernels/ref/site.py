"""What `kernels.site` computes, by the functions of the model: hc_post, the site's input, its norm, quantisation."""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos import numerics
from pelagos.kernels.ref import hyper_connection as hc
from pelagos.kernels.ref.norm_rope import rms_norm


def make_inputs(tokens: int, width: int, *, seed: int = 0, device: str = "cpu") -> tuple[Tensor, ...]:
    """Return random (y, streams, post, comb, fn, base, scale, norm) as `kernels.site.site` takes them."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    y = torch.randn(tokens, width, **options).bfloat16()
    streams = torch.randn(tokens, 4, width, **options).bfloat16() * 2
    post = 2 * torch.rand(tokens, 4, **options)
    comb = hc.sinkhorn(torch.randn(tokens, 4, 4, **options), 20, 1e-6)
    fn = torch.randn(24, 4 * width, **options) * (4 * width) ** -0.5
    base, scale = torch.randn(24, **options), torch.rand(3, **options) * 2
    norm = (1 + 0.1 * torch.randn(width, **options)).bfloat16()
    return y, streams, post, comb, fn, base, scale, norm


def forward(
    y: Tensor | None, streams: Tensor, old_post: Tensor | None, old_comb: Tensor | None, fn: Tensor, base: Tensor,
    scale: Tensor, norm: Tensor, *, iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (streams, post, comb, normed, codes, scales); see `kernels.site.site`."""
    if y is not None:
        assert old_post is not None
        assert old_comb is not None
        streams = hc.hc_post(y, streams, old_post, old_comb)
    x, post, comb = hc.enter(streams, fn, base, scale, iters=iters, eps=eps, norm_eps=norm_eps)
    normed = rms_norm(x, norm, norm_eps)
    codes, scales = numerics.encode_fp8(normed, numerics.ACT_BLOCK)
    return streams, post, comb, normed, codes.view(torch.uint8), scales.view(torch.uint8)
