"""Queries of attention and indexer: the Triton kernel against the reference (see test_decode_attention.py for it)."""

from __future__ import annotations

import pytest
import torch
from triton_cases import run

from pelagos.errors import ConfigError
from pelagos.kernels import query
from pelagos.kernels.ref import query as ref
from pelagos.kernels.ref.norm_rope import rope_frequencies, rope_table

# (tokens, heads, width, index heads, index width): nano's shapes, Flash's and Pro's, without an indexer, odd counts.
CASES = (
    *((tokens, 8, 128, 8, 64) for tokens in (1, 2, 3, 5, 17, 64)), *((tokens, 8, 128, 0, 0) for tokens in (1, 7)),
    (1, 4, 512, 16, 128), (2, 3, 128, 5, 32), (1, 16, 512, 64, 128),
    *((tokens, 64, 512, 64, 128) for tokens in (1, 2, 5, 16, 33, 64, 128)), (1, 64, 512, 0, 0), (9, 64, 512, 0, 0),
    *((tokens, 128, 512, 64, 128) for tokens in (1, 4, 32)), (3, 128, 512, 0, 0),
)  # fmt: skip

SCRIPT = """
import torch
torch.set_num_threads(1)
from pelagos.kernels.ref import query as ref
from pelagos.kernels.triton import query as kernel
for case in ((2, 8, 128, 8, 64), (1, 3, 128, 0, 0), (2, 3, 128, 5, 32), (1, 5, 512, 9, 128)):
    inputs = (*ref.make_inputs(*case), *case[1:])
    for got, want in zip(kernel.forward(*inputs, eps=1e-6), ref.forward(*inputs, eps=1e-6), strict=True):
        assert (got is None and want is None) or torch.equal(got, want), case
print("compared")
"""


def test_angles_are_the_rotary_table_of_the_model():
    freqs = rope_frequencies(64, 160000.0, factor=16.0, original=65536)
    positions = torch.tensor([0, 1, 127, 1048575])
    cos, sin = rope_table(positions, freqs, 64)
    assert torch.equal(query.angles(positions, freqs), torch.stack((cos[:, 1::2], sin[:, 1::2]), 1))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(0, torch.zeros(2, 8), "bfloat16"), (1, torch.zeros(3, 2, 32), "turn is"), (5, 48, "expected bfloat16"),
     (1, torch.zeros(2, 2, 65), "turn is")],
)  # fmt: skip
def test_other_shapes_are_refused(place, value, message):
    inputs = [*ref.make_inputs(2, 8, 128, 8, 64), 8, 128, 8, 64]
    inputs[place] = value
    with pytest.raises(ConfigError, match=message):
        query.query(*inputs)


def test_kernel_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_on_the_device(case):
    """The reference's values but for rare neighbours, the same bits again, and those of a row by itself."""
    inputs = (*ref.make_inputs(*case, device="cuda"), *case[1:])
    got, want = query.query(*inputs), ref.forward(*inputs, eps=1e-6)
    for mine, theirs, again in zip(got, want, query.query(*inputs), strict=True):
        if mine is not None:
            assert float((mine != theirs).float().mean()) < 2e-3
            assert torch.allclose(mine.float(), theirs.float(), atol=1e-2, rtol=0.35)
            assert torch.equal(mine, again)
    at = case[0] // 2
    alone = query.query(inputs[0][at : at + 1], inputs[1][at : at + 1], *case[1:])
    assert all(a is None or torch.equal(a[0], b[at]) for a, b in zip(alone, got, strict=True))
