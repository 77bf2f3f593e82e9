"""Experts of a prompt: reference against the model's, exact codes, Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_cases import error, run

from pelagos.errors import ConfigError
from pelagos.kernels import prefill_experts
from pelagos.kernels.ref import fp4_experts as inputs_ref
from pelagos.kernels.ref import prefill_experts as ref

# (tokens, experts, picks, width, inner): the edges of tiles of picks, hot and idle experts, blocks of the sort.
CASES = (
    *((tokens, 8, 2, 128, 128) for tokens in (1, 2, 15, 31, 63, 64, 65, 127, 128, 129, 255, 257)),
    (3, 4, 4, 256, 128), (40, 256, 6, 128, 384), (64, 20, 4, 256, 128), (130, 1, 1, 128, 256), (9, 16, 6, 640, 384),
    (512, 256, 6, 256, 128), (1000, 32, 6, 512, 256), (1025, 8, 6, 1024, 128), (512, 64, 6, 4096, 2048),
    (4096, 256, 6, 512, 256),
)  # fmt: skip

LIMIT = 10.0
# What the FP8 matrix unit drops within 128 columns decides some roundings to bfloat16, and those some to E4M3.
TOLERANCE = 1.5e-2

SCRIPT = f"""
import torch
torch.set_num_threads(1)
from pelagos.kernels import prefill_experts
from pelagos.kernels.ref import fp4_experts as inputs_ref, prefill_experts as ref
from pelagos.kernels.triton import prefill_experts as kernel
from triton_cases import error
for case in ((1, 8, 2, 128, 128), (3, 4, 4, 256, 128), (65, 3, 2, 128, 256), (130, 1, 1, 128, 128)):
    inputs = inputs_ref.make_inputs(*case)
    bases = tuple(prefill_experts.base_bytes(inputs[i], inputs[i + 1]) for i in (4, 6))
    shared = torch.randn(case[0], case[3]).bfloat16() / 64 if case[0] % 2 else None
    added = kernel.apart(*inputs, bases, {LIMIT})
    got = added(slice(None), shared)
    off = error(got, ref.apart(*inputs, None, {LIMIT})(slice(None), shared))
    assert off < 1e-3, (case, off)
    for rows in (slice(0, case[0] // 3), slice(case[0] // 3, None)):
        assert torch.equal(added(rows, None if shared is None else shared[rows]), got[rows])
for experts, table in ((20, None), (20, torch.rand(9, 20).topk(4).indices), (48, None)):
    logits, bias, ids = torch.randn(5, 64), torch.randn(experts), torch.arange(5)
    some = (logits[:, :48] if experts > 32 else logits).contiguous()
    inputs = (some, None if table is not None else bias, table, ids, experts, 4, 1.5)
    for got, want in zip(kernel.choose(*inputs), ref.choose(*inputs)):
        assert error(got, want) < 1e-6
print("compared")
"""


def bases_of(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (prefill_experts.base_bytes(inputs[i], inputs[i + 1]) for i in (4, 6))
    return first, second


def test_reference_is_that_of_decoding_but_for_bfloat16():
    inputs = inputs_ref.make_inputs(6, 5, 2, 128, 128)
    shared = torch.randn(6, 128).bfloat16()
    got = prefill_experts.mixture(*inputs, bases_of(inputs), LIMIT, shared=shared)
    assert got.dtype == torch.bfloat16
    assert error(got, inputs_ref.forward(*inputs, LIMIT) + shared.float()) < 2e-2


@pytest.mark.parametrize(("place", "message"), [(1, "scales"), (3, "weights"), (5, "s13"), (6, "codes|w13|w2")])
def test_other_shapes_are_refused(place, message):
    inputs = list(inputs_ref.make_inputs(3, 4, 2, 128, 256))
    bases = bases_of(tuple(inputs))
    inputs[place] = inputs[place][..., :-1]
    with pytest.raises(ConfigError, match=message):
        prefill_experts.mixture(*inputs, bases, LIMIT)


def test_bases_hold_every_code_or_are_refused():
    weight = torch.full((1, 128, 64), 0x17, dtype=torch.uint8)
    scale = torch.full((1, 128, 4), 120, dtype=torch.uint8)
    scale[0, 5, 1] = 106
    assert prefill_experts.base_bytes(weight, scale).tolist() == [[114]]
    scale[0, 5, 1] = 105
    with pytest.raises(ConfigError, match="14 binades"):
        prefill_experts.base_bytes(weight, scale)
    weight[0, 5, 16:32] = 0x80  # zeros, of which one is negative
    assert prefill_experts.base_bytes(weight, scale).tolist() == [[114]]


def test_kernels_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_on_the_device(case):
    """Within the format's tolerance, the same bits again, and the bits of a token among fewer others."""
    inputs = inputs_ref.make_inputs(*case, device="cuda")
    bases = bases_of(inputs)
    got = prefill_experts.mixture(*inputs, bases, LIMIT)
    assert error(got, ref.apart(*inputs, None, LIMIT)(slice(None))) < TOLERANCE
    assert torch.equal(got, prefill_experts.mixture(*inputs, bases, LIMIT))
    for part in (slice(0, 1), slice(case[0] // 3, None)):
        some = (each[part].contiguous() for each in inputs[:4])
        assert torch.equal(prefill_experts.mixture(*some, *inputs[4:], bases, LIMIT), got[part])
        assert torch.equal(prefill_experts.apart(*inputs, bases, LIMIT)(part), got[part])


@pytest.mark.gpu
@pytest.mark.parametrize(("experts", "hashed"), [(256, False), (256, True), (384, False)])
def test_choice_on_the_device(experts, hashed):
    """The reference's experts and weights, and the bits of a row among others."""
    logits, bias = torch.randn(700, experts, device="cuda"), torch.randn(experts, device="cuda")
    table = torch.rand(50, experts, device="cuda").topk(6).indices if hashed else None
    rest, ids = (None if hashed else bias, table), torch.randint(0, 50, (700,), device="cuda")
    got = prefill_experts.choose(logits, *rest, ids, experts, 6, 1.5)
    want = ref.choose(logits, *rest, ids, experts, 6, 1.5)
    assert torch.equal(got[0], want[0])
    assert error(got[1], want[1]) < 1e-6
    alone = prefill_experts.choose(logits[9:11].contiguous(), *rest, ids[9:11], experts, 6, 1.5)
    assert all(torch.equal(a, b[9:11]) for a, b in zip(alone, got, strict=True))
