"""One hyper-connection site in one call: contract, checks and dispatch.

The previous site's output enters the streams, the streams collapse to this site's input, which is normed and quantised
for the products behind it. On CUDA one or two Triton launches; elsewhere `ref.site`, which defines the meaning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.batch_rows import Parts
from pelagos.kernels.ref import site as ref

BLOCK = 128


def site(
    y: Tensor | Parts | None, streams: Tensor, old_post: Tensor | None, old_comb: Tensor | None, fn: Tensor,
    base: Tensor, scale: Tensor, norm: Tensor, *, iters: int = 20, eps: float = 1e-6, norm_eps: float = 1e-6,
    leave: bool = False, arrived: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Return (streams, post, comb, normed, codes, scales) of one site.

    y (T, D) bfloat16 is the previous site's output, in parts or whole, None at the first; streams (T, 4, D) bfloat16;
    old_post (T, 4) and old_comb (T, 4, 4) float32 are the previous site's. fn (24, 4D), base (24,), scale (3,) float32,
    norm (D,). Results: streams (T, 4, D), post (T, 4), comb (T, 4, 4), normed (T, D) bfloat16 and its E4M3 codes (T, D)
    and UE8M0 scales (T, D/128) as uint8. With `leave` there is one more: None, or `Mixing`, by which the next launch
    has to write post and comb; `arrived` (4096,) int32 zeros, left so, then spares a few tokens a launch. Raises
    ConfigError for other shapes. Source: technical report 2.2; inference/model.py Block.hc_pre, hc_post.
    """
    tokens, count, width = streams.shape
    if count != 4 or width % BLOCK or streams.dtype != torch.bfloat16 or not streams.is_contiguous():
        raise ConfigError(
            f"site: streams are {streams.dtype} {tuple(streams.shape)}, "
            f"expected contiguous bfloat16 (T, 4, D) with D a multiple of {BLOCK}"
        )
    if tuple(fn.shape) != (24, 4 * width):
        raise ConfigError(f"site: fn is {tuple(fn.shape)}, expected {(24, 4 * width)}")
    whole = y.last if isinstance(y, Parts) else y
    if whole is not None and (whole.shape[-2:] != (tokens, width) or old_post is None or old_comb is None):
        got = f"{tuple(whole.shape)}, expected {(tokens, width)}"
        raise ConfigError(f"site: y is {got} with the post and comb it comes by")
    inputs = (y, streams, old_post, old_comb, fn, base, scale, norm)
    if not streams.is_cuda:
        y = y.whole() if isinstance(y, Parts) else y
        results = ref.forward(y, *inputs[1:], iters=iters, eps=eps, norm_eps=norm_eps)
        return (*results, None) if leave else results
    from pelagos.kernels.triton import site as kernel

    return kernel.forward(*inputs, iters=iters, eps=eps, norm_eps=norm_eps, leave=leave, arrived=arrived)
