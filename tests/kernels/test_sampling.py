"""Tokens picked where the logits are: the reference against the engine's sampler, the kernel against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_cases import run

from pelagos.engine.sampler import Sampler, SamplingParams
from pelagos.errors import ConfigError
from pelagos.kernels import sampling
from pelagos.kernels.layout import Draw
from pelagos.kernels.ref import sampling as ref

# (tokens, vocabulary, spread of the logits, temperature, top_k, top_p, min_p)
CASES = (
    *((tokens, 4096, 3.0, 1.0, 0, 1.0, 0.0) for tokens in (1, 2, 17, 64)),
    *((3, vocab, 4.0, 0.0, 0, 1.0, 0.0) for vocab in (1, 127, 128, 129, 129280)),
    (4, 129, 1.0, 1.0, 0, 1.0, 0.0), (4, 4097, 2.0, 0.7, 40, 1.0, 0.0), (4, 4096, 2.0, 1.3, 0, 0.9, 0.0),
    (4, 5000, 2.0, 1.0, 50, 0.8, 0.05), (4, 4096, 0.0, 1.0, 7, 1.0, 0.0), (4, 4096, 0.0, 1.0, 0, 0.5, 0.0),
    (3, 4096, 3.0, 1e-3, 4095, 0.99, 0.0), (2, 4096, 3.0, 2.0, 1, 1.0, 0.0), (2, 4096, 3.0, 1.0, 0, 1e-6, 0.0),
    (2, 4096, 1.0, 1.0, 0, 1.0, 1.0), (8, 129280, 3.0, 1.0, 0, 1.0, 0.0), (8, 129280, 3.0, 0.8, 20, 0.95, 0.01),
    (4, 129280, 3.0, 1.0, 0, 0.95, 0.0), (2, 129280, 0.5, 1.0, 5000, 1.0, 0.0),
)  # fmt: skip

SCRIPT = """
import torch
torch.set_num_threads(1)
from pelagos.kernels.ref import sampling as ref
from pelagos.kernels.triton import sampling as kernel
from test_sampling import CASES
kernel.TILE = 512
for case in [case for case in CASES if case[1] < 5001 and case[0] < 9]:
    logits, draws = ref.make_inputs(*case)
    got, want = kernel.forward(logits, draws), ref.forward(logits, draws)
    assert torch.equal(got[:, 0], want[:, 0]) and torch.allclose(got, want, atol=1e-5), (case, got, want)
logits, draws = ref.make_inputs(3, 300, 1.0, 1.0, 9, 0.9, 0.0)
logits[0, 5], logits[1, 7] = float("nan"), float("inf")
assert kernel.forward(logits, draws)[:, 0].tolist()[:2] == [-1.0, -1.0]
print("compared")
"""
COMPILE = """
from triton_cases import compile_all
from pelagos.kernels.triton import sampling
kernels = sampling._peak_kernel, sampling._mass_kernel, sampling._draw_kernel, sampling._pick_kernel
own = dict(stride="i64"), dict(stride="i64"), dict(stride="i64"), dict(stride="i64", num_warps=16)
compile_all({target}, [(kernel, dict(TILE=4096, PARTS=32), each) for kernel, each in zip(kernels, own)],
            dict.fromkeys(("totals", "masses", "bests", "out"), "*fp64") | dict.fromkeys(("logits", "tops"), "*fp32")
            | dict.fromkeys(("draws", "mosts", "listed"), "*i64") | dict.fromkeys(("firsts", "winners"), "*i32"))
"""
TARGETS = [("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64), ("hip", "gfx950", 64)]
SETTINGS = st.fixed_dictionaries({
    "temperature": st.sampled_from([0.0, 1e-3, 0.6, 1.0, 2.0]), "top_k": st.sampled_from([0, 1, 3, 40, 500, 2**64]),
    "top_p": st.sampled_from([1.0, 0.95, 0.5, 1e-3]), "min_p": st.sampled_from([0.0, 0.1, 1.0]),
    "seed": st.integers(0, 2**63 - 1),
})  # fmt: skip


@given(SETTINGS, st.integers(0, 10_000), st.sampled_from([0.0, 1.0, 6.0]))
def test_the_reference_picks_what_the_sampler_picks(settings, position, spread):
    logits = torch.randn(2, 400, generator=torch.Generator().manual_seed(position)) * spread
    logits = logits.bfloat16().float()  # equal ones among them
    sampler = Sampler(SamplingParams(**settings), 400)
    draws = sampler.draws(position, 2)
    assert draws is not None
    got = sampling.pick(logits, torch.from_numpy(sampling.packed(draws)))
    for at in range(2):
        want = sampler.peek(logits[at].numpy(), position + at)
        assert int(got[at, 0]) == want.token
        assert abs(float(got[at, 1]) - want.logprob) < 1e-12


def test_what_needs_whole_rows_is_not_drawn_there():
    needs = {"presence_penalty": 1.0}, {"repetition_penalty": 1.1}, {"logit_bias": {3: 1.0}}, {"logprobs": 2}
    assert [Sampler(SamplingParams(**each), 10).draws(0, 1) for each in needs] == [None] * 4
    assert Sampler(SamplingParams(logprobs=True), 10).draws(0, 1) is not None


def test_broken_logits_are_told():
    logits = torch.zeros(2, 8)
    logits[0, 3], logits[1, 0] = float("nan"), float("inf")
    assert sampling.pick(logits, torch.from_numpy(sampling.packed([Draw()] * 2)))[:, 0].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("logits", "draws"),
    [(torch.zeros(2, 8).double(), torch.zeros(2, 5).long()), (torch.zeros(2, 8), torch.zeros(3, 5).long()),
     (torch.zeros(2, 8), torch.zeros(2, 4).long()), (torch.zeros(2, 8), torch.zeros(2, 5))],
)  # fmt: skip
def test_other_shapes_are_refused(logits, draws):
    with pytest.raises(ConfigError, match="expected"):
        sampling.pick(logits, draws)


def test_kernel_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[0]}-{target[1]}")
def test_kernel_compiles(target):
    assert run(COMPILE.format(target=target), interpret=False) == "compiled 4\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_on_the_device(case):
    """The reference's tokens, its log-probabilities to 1e-5, the same bits again and for a row by itself."""
    logits, draws = ref.make_inputs(*case, device="cuda")
    got, want = sampling.pick(logits, draws), ref.forward(logits, draws)
    assert torch.equal(got[:, 0], want[:, 0])
    assert float((got[:, 1] - want[:, 1]).abs().max()) < 1e-5
    assert np.array_equal(got.cpu(), sampling.pick(logits, draws).cpu())
    assert torch.equal(sampling.pick(logits[-1:], draws[-1:])[0], got[-1])
