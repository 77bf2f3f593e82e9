"""Sinkhorn: the reference against its meaning and float64; its kernels are those of the sites (test_mhc, test_site)."""

from __future__ import annotations

import pytest
import torch

from pelagos.kernels.ref.hyper_connection import sinkhorn as ref

EPS = 1e-6
COUNT = 150


def drawn(spread: float, n: int = 4, count: int = COUNT) -> torch.Tensor:
    return torch.randn(count, n, n, generator=torch.Generator().manual_seed(0)) * spread


@pytest.mark.parametrize(("spread", "off"), [(0.1, 1e-5), (2.0, 0.05), (8.0, 0.1)])
def test_reference_is_nearly_doubly_stochastic(spread, off):
    """Columns, normalised last, sum to 1 within eps a row; how near rows get in 20 rounds depends on the spread."""
    mixed = ref(drawn(spread).double(), 20, EPS)
    assert (mixed >= 0).all()
    columns = mixed.sum(-2)
    assert (columns <= 1).all()
    assert (columns > 1 - 2 * EPS).all()
    assert (mixed.sum(-1) - 1).abs().max() < off


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_reference_gradient(iters):
    logits = drawn(2.0, count=3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ref(x, iters, EPS), (logits,))


def test_iterations_count_the_softmax_as_the_first_row_normalisation():
    logits = drawn(1.0).double()
    once = logits.softmax(-1) + EPS
    once = once / (once.sum(-2, keepdim=True) + EPS)
    assert torch.equal(ref(logits, 1, EPS), once)
    twice = once / (once.sum(-1, keepdim=True) + EPS)
    assert torch.equal(ref(logits, 2, EPS), twice / (twice.sum(-2, keepdim=True) + EPS))
