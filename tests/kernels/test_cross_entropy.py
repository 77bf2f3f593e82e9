"""Cross-entropy some tokens at a time: the plain loss and its gradients."""

from __future__ import annotations

import pytest
import torch
from triton_cases import run

from pelagos.kernels.cross_entropy import IGNORE, cross_entropy
from pelagos.train.objective import token_loss


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SCRIPT = """
import torch
torch.set_num_threads(1)
from pelagos.kernels import cross_entropy
from pelagos.kernels.triton.cross_entropy import turn
from test_cross_entropy import drawn
for words in (11, 5000):
    targets = torch.tensor([3, -100, 0, 10])
    got, want = drawn(4, words), drawn(4, words)
    torch.testing.assert_close(turn(got, targets), cross_entropy.turn(want, targets), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
print("compared")
"""


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
def test_parts_give_the_loss(rows):
    hidden, head = drawn(7, 8).double(), drawn(11, 8, seed=1).double()
    targets = torch.tensor([3, IGNORE, 0, 10, IGNORE, 4, 5])
    pairs = []
    for loss in (token_loss, lambda *a: cross_entropy(*a, rows=rows)):
        h, w = hidden.float().requires_grad_(), head.float().requires_grad_()
        value = loss(h, w, targets)
        value.backward()
        pairs.append((value.detach(), h.grad, w.grad))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert cross_entropy(hidden.float(), head.float(), torch.full((7,), IGNORE)) == 0


def test_kernel_in_the_interpreter():
    """Losses and gradients in place, a word of a row beyond one step, a token that does not count."""
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
def test_cross_entropy_on_the_device():
    hidden, head = drawn(300, 64).cuda().bfloat16().requires_grad_(), drawn(20000, 64, seed=1).cuda().requires_grad_()
    targets = torch.arange(300, device="cuda") * 66
    targets[7] = IGNORE
    found = []
    for loss in (token_loss, lambda *a: cross_entropy(*a, rows=128)):
        value = loss(hidden, head, targets)
        found.append((value.detach(), *torch.autograd.grad(value, (hidden, head))))
    for got, want in zip(found[1], found[0], strict=True):
        assert float((got.float() - want.float()).norm() / want.float().norm()) < 1e-2
