"""Projections, norms and embeddings of their own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pelagos.model.layers import Lookup


@pytest.mark.parametrize("shape", [(4, 300), (2, 7), (1,)], ids=str)
@pytest.mark.parametrize("words", [1, 50, 2000])
def test_a_rows_gradient_adds_its_tokens_in_order(shape, words):
    """As torch does on a CPU, bit by bit: rows met often, once and never."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words, shape, generator=generator)
    up = torch.randn(*shape, 16, generator=generator)
    tables = [torch.randn(2000, 16, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    found = [Lookup.apply(ids, tables[0]), functional.embedding(ids, tables[1])]
    for each in found:
        each.backward(up)
    assert torch.equal(*found)
    assert torch.equal(tables[0].grad, tables[1].grad)
