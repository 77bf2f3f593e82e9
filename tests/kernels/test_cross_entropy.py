"""Cross-entropy over chunks of the vocabulary: the plain loss and its gradients, and finite differences."""

from __future__ import annotations

import pytest
import torch

from pelagos.kernels.cross_entropy import IGNORE, cross_entropy
from pelagos.train.objective import token_loss


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 5, 11, 64])
def test_chunks_give_the_loss(chunk):
    hidden, head = drawn(7, 8).double(), drawn(11, 8, seed=1).double()
    targets = torch.tensor([3, IGNORE, 0, 10, IGNORE, 4, 5])
    pairs = []
    for loss in (token_loss, lambda *a: cross_entropy(*a, chunk=chunk)):
        h, w = hidden.float().requires_grad_(), head.float().requires_grad_()
        value = loss(h, w, targets)
        value.backward()
        pairs.append((value.detach(), h.grad, w.grad))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert cross_entropy(hidden.float(), head.float(), torch.full((7,), IGNORE)) == 0
