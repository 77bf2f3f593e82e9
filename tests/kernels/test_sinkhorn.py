"""Sinkhorn: the reference against its meaning and float64, the Triton kernels against the reference."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pelagos.kernels.ref.hyper_connection import sinkhorn as ref
from pelagos.kernels.sinkhorn import sinkhorn

SRC = Path(__file__).resolve().parents[2] / "src"
EPS = 1e-6
COUNT = 150  # more than a block of matrices, and no multiple of it
SPREADS = (0.1, 2.0, 8.0)

# The interpreter has to be chosen before triton is imported, so the kernels run in a process of their own.
INTERPRETED = f"""
import json, torch
torch.set_num_threads(1)
from pelagos.kernels.ref.hyper_connection import sinkhorn as ref
from pelagos.kernels.triton import sinkhorn as kernel
rows = []
for spread, n, iters in [(s, 4, 20) for s in {SPREADS}] + [(2.0, 2, 3), (2.0, 4, 1)]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn({COUNT}, n, n, generator=generator) * spread
    grad = torch.randn({COUNT}, n, n, generator=generator)
    mixed, normalisers = kernel.forward(logits, iters, {EPS})
    out = kernel.backward(grad, mixed, normalisers, {EPS})
    plain, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    ref(plain, iters, {EPS}).backward(grad)
    truth = ref(exact, iters, {EPS})
    truth.backward(grad.double())
    norm = exact.grad.norm()
    rows.append(dict(
        spread=spread, n=n, iters=iters, forward=float((mixed - truth).abs().max()),
        backward=float((out - exact.grad).norm() / norm), autograd=float((plain.grad - exact.grad).norm() / norm),
    ))
print(json.dumps(rows))
"""


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


def test_dispatch_takes_the_reference_off_cuda():
    logits = drawn(2.0).view(3, 50, 4, 4)
    assert torch.equal(sinkhorn(logits, 20, EPS), ref(logits, 20, EPS))


def test_kernels_in_the_interpreter():
    """Undoing the divisions in the backward costs no accuracy: as close to float64 as float32 autograd is."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 5
    for row in rows:
        assert row["forward"] < 5e-7, row
        assert row["backward"] < max(1.5 * row["autograd"], 3e-7), row


@pytest.mark.gpu
@pytest.mark.parametrize("spread", SPREADS)
def test_kernels_on_the_device(spread):
    logits, grad = drawn(spread, count=1000).cuda(), drawn(1.0, count=1000).cuda()
    logits.requires_grad_()
    mixed = sinkhorn(logits.view(10, 100, 4, 4), 20, EPS)
    mixed.backward(grad.view(10, 100, 4, 4))
    exact = logits.detach().double().requires_grad_()
    truth = ref(exact, 20, EPS)
    truth.backward(grad.double())
    assert (mixed.view(-1, 4, 4) - truth).abs().max() < 5e-7
    assert logits.grad is not None
    assert exact.grad is not None
    assert (logits.grad - exact.grad).norm() < 1e-6 * exact.grad.norm()
