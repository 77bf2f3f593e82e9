"""Hyper-connections in training: the site before leaves and this one enters, forward and backward; contract, dispatch.

Joined like this the streams have one reader and one writer, so backward adds no gradients of streams: about ten passes
over them a site, both ways together. CUDA takes Triton, other devices `ref.mhc` under autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.ref import hyper_connection as hc

BLOCK = 64  # channels that the kernels take as a whole
Pending = tuple[Tensor, Tensor, Tensor]  # y (..., D), post (..., n), comb (..., n, n): a site that has not left yet


def site(
    pending: Pending | None, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iters: int, eps: float,
    norm_eps: float, ordered: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (streams, x, post, comb): `pending` enters streams (..., n, D), which collapse to this site's input x.

    fn ((2 + n) n, n D), base, scale (3,) float32; post (..., n) and comb (..., n, n) float32; `ordered` as in
    `ref.hyper_connection.mix_logits`. The first site has nothing pending. Differentiable. On CUDA n is 4 with bfloat16
    streams and D a multiple of 64, or 1 (by the reference), else ConfigError. Source: technical report 2.2, 5.1.
    """
    if not streams.is_cuda or streams.shape[-2] == 1:
        entered = streams if pending is None else hc.hc_post(pending[0], streams, *pending[1:])
        options = {"iters": iters, "eps": eps, "norm_eps": norm_eps, "ordered": ordered}
        return entered, *hc.enter(entered, fn, base, scale, **options)
    return _apply(pending, streams, fn, base, scale, iters, eps, norm_eps)


def leave(pending: Pending, streams: Tensor) -> Tensor:
    """Return streams (..., n, D) after `pending` entered them: X'_k = post_k y + sum_j comb[j, k] X_j."""
    if not streams.is_cuda or streams.shape[-2] == 1:
        return hc.hc_post(pending[0], streams, *pending[1:])
    return _apply(pending, streams, None, None, None, 0, 0.0, 0.0)[0]


def _apply(pending: Pending | None, streams: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lead, (count, width) = streams.shape[:-2], streams.shape[-2:]
    if count != 4 or width % BLOCK or streams.dtype != torch.bfloat16:
        raise ConfigError(
            f"mhc: streams are {streams.dtype} {tuple(streams.shape)}, expected bfloat16 (..., 4, D) with D a multiple "
            f"of {BLOCK} on {streams.device}; train other widths with --device cpu"
        )
    from pelagos.kernels.triton.mhc import Site

    shapes = ((width,), (4,), (4, 4))
    before = [None] * 3 if pending is None else [t.reshape(-1, *s) for t, s in zip(pending, shapes, strict=True)]
    found = Site.apply(*before, streams.reshape(-1, 4, width), *rest)
    out, x, post, comb = (t.view(*lead, *t.shape[1:]) if len(t) else t for t in found)
    return out, x, post, comb
