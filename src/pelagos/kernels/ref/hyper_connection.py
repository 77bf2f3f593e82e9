"""Manifold-constrained hyper-connections: mix four residual streams before and after a site.

Everything between the flattened streams and the cast is float32. Source: technical report 2.2,
inference/model.py Block.hc_pre / hc_post / hc_head.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pelagos.kernels.ref.gemm import elementwise, linear, ordered_linear, ordered_sum

FEW_MATRICES = 8  # scaled faster one by one


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Make each (n, n) matrix of logits (..., n, n) float32 nearly doubly stochastic.

    Softmax over rows counts as the first row normalisation; the last operation normalises columns.
    """
    first = logits.softmax(-1)
    if not first.requires_grad and not first.is_cuda:
        return _sinkhorn_on_cpu(first, iters, eps)
    mix = first + eps
    mix = mix / (mix.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + eps)
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
    return mix


def _sinkhorn_on_cpu(first: Tensor, iters: int, eps: float) -> Tensor:
    """Go on from the softmax, tokens last: numpy starts an operation in a third of torch's time, and there are many."""
    n = first.shape[-1]
    start = first.reshape(-1, n, n).numpy().transpose(1, 2, 0)
    # A last row and column of eps, so that every sum ends with it.
    padded = np.full((n + 1, n + 1, start.shape[2]), eps, start.dtype)
    mix, sums = padded[:n, :n], np.empty((n, start.shape[2]), start.dtype)
    np.add(start, start.dtype.type(eps), out=mix)
    columns, rows = (0, padded[:, :n], sums[None]), (1, padded[:n], sums[:, None])
    for half in range(1, 2 * iters):
        axis, terms, divisor = columns if half % 2 else rows
        np.add.reduce(terms, axis, out=sums)
        np.divide(mix, divisor, out=mix)
    return torch.from_numpy(np.ascontiguousarray(mix.transpose(2, 0, 1))).view(first.shape)


def sinkhorn4(logits: np.ndarray, iters: int, eps: float) -> np.ndarray:
    """`sinkhorn` of (B, 4, 4) matrices, transposed, as divisors of the softmax's rows and columns in float64.

    Few go one by one through scalars, many elementwise together: the same sums in the same order, so the same bits.
    """
    k = np.exp((logits - np.maximum.reduce(logits, 2, keepdims=True)).astype(np.float64))
    k = k / np.add.reduce(k, 2, keepdims=True) + eps
    if len(k) <= FEW_MATRICES:
        divisors = np.array([_divisors(matrix, iters, eps) for matrix in k.tolist()])
        return np.ascontiguousarray((k / (divisors[:, :4, None] * divisors[:, None, 4:])).swapaxes(1, 2), np.float32)
    by_row, by_column = (np.ascontiguousarray(k.transpose(order)) for order in ((1, 2, 0), (2, 1, 0)))
    rows, columns = np.ones((4, len(k))), np.ones((4, len(k)))
    terms = np.empty_like(by_row)
    near, far, first, second = terms[:2], terms[2:], terms[0], terms[1]
    for half in range(1, 2 * iters):
        matrix, other, own = (by_row, rows, columns) if half % 2 else (by_column, columns, rows)
        np.divide(matrix, other[:, None], out=terms)
        np.add(near, far, out=near)
        np.add(first, second, out=first)
        np.multiply(own, eps, out=own)
        np.add(first, own, out=own)
    return np.ascontiguousarray((by_column / (rows * columns[:, None])).transpose(2, 0, 1), np.float32)


def _divisors(matrix: list[list[float]], iters: int, eps: float) -> tuple[float, ...]:
    """Return what the four rows of a matrix and then its columns are divided by."""
    (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3) = matrix
    p = q = r = s = w = x = y = z = 1.0
    for half in range(iters):
        if half:
            p = ((a0 / w + a2 / y) + (a1 / x + a3 / z)) + p * eps
            q = ((b0 / w + b2 / y) + (b1 / x + b3 / z)) + q * eps
            r = ((c0 / w + c2 / y) + (c1 / x + c3 / z)) + r * eps
            s = ((d0 / w + d2 / y) + (d1 / x + d3 / z)) + s * eps
        w = ((a0 / p + c0 / r) + (b0 / q + d0 / s)) + w * eps
        x = ((a1 / p + c1 / r) + (b1 / q + d1 / s)) + x * eps
        y = ((a2 / p + c2 / r) + (b2 / q + d2 / s)) + y * eps
        z = ((a3 / p + c3 / r) + (b3 / q + d3 / s)) + z * eps
    return p, q, r, s, w, x, y, z


def mix_logits(streams: Tensor, fn: Tensor, norm_eps: float, *, ordered: bool = False) -> Tensor:
    """Return fn (R, n*d) applied to the RMS-normalised flattened streams (..., n, d): (..., R) float32.

    `ordered` chooses `gemm.ordered_linear`.
    """
    flat = streams.flatten(-2).float()
    product = ordered_linear if ordered else linear
    return product(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def split_mix(mix: Tensor, base: Tensor, scale: Tensor, *, eps: float, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a site's (..., (2+n)*n) mix logits into pre (..., n), post (..., n) and comb logits (..., n, n), float32.

    base ((2+n)*n,), scale (3,). pre carries the eps, post the factor 2.
    """
    gates = torch.cat((mix[..., :n] * scale[0] + base[:n], mix[..., n : 2 * n] * scale[1] + base[n : 2 * n]), -1)
    pre, post = elementwise(torch.sigmoid, gates).chunk(2, -1)
    return pre + eps, 2 * post, (mix[..., 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """Return sum_i pre_i X_i: streams (..., n, d), pre (..., n) float32 -> (..., d) in the streams' dtype."""
    return ordered_sum(pre.unsqueeze(-1) * streams.float(), -2).to(streams.dtype)


def enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iters: int, eps: float, norm_eps: float,
    ordered: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return a site's input (..., d) and the post (..., n) and comb (..., n, n) by which its output comes back."""
    mix = mix_logits(streams, fn, norm_eps, ordered=ordered)
    pre, post, logits = split_mix(mix, base, scale, eps=eps, n=streams.shape[-2])
    return collapse(streams, pre), post, sinkhorn(logits, iters, eps)


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Return X'_k = post_k y + sum_j comb[j, k] X_j: the sum runs over the FIRST index of comb.

    y (..., d), streams (..., n, d) -> (..., n, d) in the streams' dtype; arithmetic in float32.
    """
    wide = streams.float()
    mixed = ordered_sum(comb.unsqueeze(-1) * wide.unsqueeze(-2), -3)  # (..., n, d)
    return (post.unsqueeze(-1) * y.float().unsqueeze(-2) + mixed).to(streams.dtype)


def hc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, eps: float, norm_eps: float) -> Tensor:
    """Collapse streams (..., n, d) before the final norm: fn (n, n*d), base (n,), scale (1,) -> (..., d)."""
    gates = elementwise(torch.sigmoid, mix_logits(streams, fn, norm_eps) * scale + base)
    return collapse(streams, gates + eps)
