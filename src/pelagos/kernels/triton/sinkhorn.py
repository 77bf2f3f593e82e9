"""Sinkhorn forward and backward: a block of matrices stays in registers through all iterations.

Backward undoes each division M' = M / s with the stored s: M = M' s and dM = (dM' - sum(dM' M')) / s.
Against float64 that is as close as autograd in float32 for logits of std up to 8 (2e-7), 4 times further at std 50.
"""
# Inside a kernel Triton turns Python numbers into constexpr and blocks into tensors; its annotations say neither.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


@triton.jit
def _forward_kernel(logits, mixed, normalisers, count, eps, ITERS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, col = tl.arange(0, N), tl.arange(0, N)
    place = at[:, None, None] * (N * N) + row[None, :, None] * N + col[None, None, :]
    live = (at < count)[:, None, None] & (row[None, :, None] >= 0) & (col[None, None, :] >= 0)
    m = tl.load(logits + place, mask=live, other=0.0)
    m = tl.exp(m - tl.max(m, 2)[:, :, None])
    m = m / tl.sum(m, 2)[:, :, None] + eps
    stat = normalisers + at[:, None] * N + col[None, :]
    keep = (at < count)[:, None] & (col[None, :] >= 0)
    s = tl.sum(m, 1) + eps
    tl.store(stat, s, mask=keep)
    m = m / s[:, None, :]
    for i in range(ITERS - 1):
        s = tl.sum(m, 2) + eps
        tl.store(stat + (2 * i + 1) * count * N, s, mask=keep)
        m = m / s[:, :, None]
        s = tl.sum(m, 1) + eps
        tl.store(stat + (2 * i + 2) * count * N, s, mask=keep)
        m = m / s[:, None, :]
    tl.store(mixed + place, m, mask=live)


@triton.jit
def _backward_kernel(
    grad, mixed, normalisers, out, count, eps, ITERS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, col = tl.arange(0, N), tl.arange(0, N)
    place = at[:, None, None] * (N * N) + row[None, :, None] * N + col[None, None, :]
    live = (at < count)[:, None, None] & (row[None, :, None] >= 0) & (col[None, None, :] >= 0)
    m = tl.load(mixed + place, mask=live, other=0.0)
    g = tl.load(grad + place, mask=live, other=0.0)
    stat = normalisers + at[:, None] * N + col[None, :]
    keep = (at < count)[:, None] & (col[None, :] >= 0)
    for j in range(ITERS - 1):
        i = ITERS - 2 - j
        s = tl.load(stat + (2 * i + 2) * count * N, mask=keep, other=1.0)
        g = (g - tl.sum(g * m, 1)[:, None, :]) / s[:, None, :]
        m = m * s[:, None, :]
        s = tl.load(stat + (2 * i + 1) * count * N, mask=keep, other=1.0)
        g = (g - tl.sum(g * m, 2)[:, :, None]) / s[:, :, None]
        m = m * s[:, :, None]
    s = tl.load(stat, mask=keep, other=1.0)
    g = (g - tl.sum(g * m, 1)[:, None, :]) / s[:, None, :]
    p = m * s[:, None, :] - eps  # the softmax
    g = p * (g - tl.sum(g * p, 2)[:, :, None])
    tl.store(out + place, g, mask=live)


def forward(logits: Tensor, iters: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mixed (..., n, n) and the normalisers (2 * iters - 1, T, n) of contiguous float32 logits (..., n, n)."""
    n = logits.shape[-1]
    count = logits.numel() // (n * n)
    mixed = torch.empty_like(logits)
    normalisers = logits.new_empty((2 * iters - 1, count, n))
    _forward_kernel[(triton.cdiv(count, BLOCK),)](logits, mixed, normalisers, count, eps, iters, n, BLOCK)
    return mixed, normalisers


def backward(grad: Tensor, mixed: Tensor, normalisers: Tensor, eps: float) -> Tensor:
    """Return the gradient of the logits from the gradient of `mixed`, both (..., n, n) float32 contiguous."""
    n = mixed.shape[-1]
    count = mixed.numel() // (n * n)
    out = torch.empty_like(mixed)
    iters = (normalisers.shape[0] + 1) // 2
    _backward_kernel[(triton.cdiv(count, BLOCK),)](grad, mixed, normalisers, out, count, eps, iters, n, BLOCK)
    return out
