"""The expert site of a decode step: routing, its products, routed and shared experts; kernels against reference."""

from __future__ import annotations

import pytest
import torch
from triton_cases import error, run

from pelagos import numerics
from pelagos.errors import ConfigError
from pelagos.kernels import fp4_experts
from pelagos.kernels.ref import fp4_experts as experts_ref
from pelagos.kernels.ref import router as ref
from pelagos.kernels.router import route

# (tokens, experts, picks, width, inner, by table)
CASES = (
    *((tokens, 64, 4, 256, 128, False) for tokens in (1, 2, 3, 15, 16, 17, 31, 33, 63, 64)),
    *((tokens, 20, 4, 256, 128, True) for tokens in (1, 2, 8)),
    (1, 20, 4, 128, 128, False), (5, 20, 4, 384, 256, False),
    (1, 256, 6, 4096, 2048, False), (2, 256, 6, 4096, 2048, True), (64, 256, 6, 4096, 2048, False),
    (1, 384, 6, 7168, 3072, False), (16, 384, 6, 7168, 3072, False),
)  # fmt: skip

TOLERANCE = 1e-5  # weights and the shared expert's float32 sums
SITE = 8e-3  # bfloat16 results, and hidden values that fall to the other side of an E4M3 rounding
# The interpreter cuts where a bfloat16 should be rounded, and the shared expert quantises behind it.
INTERPRETED = 5e-2

SCRIPT = """
import torch
torch.set_num_threads(1)
from pelagos.kernels import fp4_experts
from pelagos.kernels.ref import router as ref
from pelagos.kernels.triton import router as kernel
from test_router import INTERPRETED, options, weights_of
from triton_cases import error
arrived = torch.zeros(4096, dtype=torch.int32)
cases = ((1, 20, 4, 128, 128, True), (1, 64, 4, 256, 128, False), (5, 20, 4, 128, 256, False))
cases += ((17, 20, 4, 128, 128, True),)
for case in cases:
    inputs = ref.make_inputs(*case)
    got, want = kernel.forward(*inputs, arrived, **options(case)), ref.forward(*inputs, **options(case))
    assert torch.equal(got.chosen, want.chosen), case
    assert error(got.weights, want.weights) < 1e-6 and error(got.shared, want.shared) < 1e-6, case
    assert not arrived.any()
    both = [fp4_experts.site(*inputs[1:3], each, *weights_of(case), 10.0) for each in (got, want)]
    assert error(*both) < INTERPRETED, (case, error(*both))
    left = fp4_experts.site(*inputs[1:3], got, *weights_of(case), 10.0, left=True).whole()
    assert error(left, both[1]) < INTERPRETED, case
print("compared")
"""


def options(case: tuple[int, ...]) -> dict[str, float]:
    return {"experts": case[1], "picks": case[2], "scaling": 1.5}


def weights_of(case: tuple[int, ...], device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Random routed experts, and a shared one whose output weighs as much as one of them."""
    _, experts, picks, width, inner, _ = case
    routed = experts_ref.make_inputs(1, experts, picks, width, inner, device=device)[4:]
    shared = torch.randn(width, inner, generator=torch.Generator(device).manual_seed(3), device=device) * 5e-5
    codes, scales = numerics.encode_fp8(shared, numerics.FP8_BLOCK)
    return *routed, codes.view(torch.uint8), scales.view(torch.uint8)


def arrivals(device: str = "cpu") -> torch.Tensor:
    return torch.zeros(4096, dtype=torch.int32, device=device)


def test_reference_routes_as_the_model_does():
    x, *rest = inputs = ref.make_inputs(6, 20, 4, 128, 128, False)
    routed = route(*inputs, arrivals(), experts=20, picks=4, scaling=1.5)
    scores = torch.nn.functional.softplus(x.float() @ rest[2][:20].float().T).sqrt()
    assert torch.equal(routed.chosen.long(), (scores + rest[3]).topk(4).indices)
    assert torch.allclose(routed.weights.sum(1), torch.tensor(1.5))
    assert torch.allclose(
        routed.weights / 1.5, torch.nn.functional.normalize(scores.gather(1, routed.chosen.long()), 1)
    )


def test_ties_go_to_the_lower_expert():
    inputs = list(ref.make_inputs(2, 20, 4, 128, 128, False))
    inputs[3], inputs[4] = torch.zeros_like(inputs[3]), torch.zeros(20)
    assert route(*inputs, arrivals(), experts=20, picks=4, scaling=1.0).chosen.tolist() == [[0, 1, 2, 3]] * 2


def test_reference_site_adds_the_shared_expert():
    case = (5, 20, 4, 128, 128, True)
    inputs, weights = ref.make_inputs(*case), weights_of(case)
    routed = ref.forward(*inputs, **options(case))
    both = fp4_experts.site(*inputs[1:3], routed, *weights, 10.0)
    alone = fp4_experts.mixture(*inputs[1:3], routed.chosen, routed.weights, *weights[:4], 10.0)
    assert both.dtype == torch.bfloat16
    assert 1e-2 < error(alone, both) < 0.9


@pytest.mark.parametrize(("place", "message"), [(3, "gate"), (7, "shared13")])
def test_other_shapes_are_refused(place, message):
    inputs = list(ref.make_inputs(3, 20, 4, 128, 128, False))
    inputs[place] = inputs[place][:-1]
    with pytest.raises(ConfigError, match=message):
        route(*inputs, arrivals(), experts=20, picks=4, scaling=1.5)
    inputs = ref.make_inputs(3, 20, 4, 128, 128, False)
    with pytest.raises(ConfigError, match="either a bias or a table"):
        route(*inputs[:5], torch.zeros(9, 4), *inputs[6:], arrivals(), experts=20, picks=4, scaling=1.5)


def test_kernels_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_on_the_device(case):
    """The same experts, weights and sums within tolerance, the same bits again, and the bits of a token by itself."""
    inputs, arrived = ref.make_inputs(*case, device="cuda"), arrivals("cuda")
    got, want = route(*inputs, arrived, **options(case)), ref.forward(*inputs, **options(case))
    assert torch.equal(got.chosen, want.chosen)
    assert error(got.weights, want.weights) < TOLERANCE
    assert error(got.shared, want.shared) < 1e-3
    weights = weights_of(case, "cuda")
    site = fp4_experts.site(*inputs[1:3], got, *weights, 10.0)
    assert error(site, experts_ref.site(*inputs[1:3], want, *weights, 10.0)) < SITE
    for token in {0, case[0] // 2, case[0] - 1}:
        part = slice(token, token + 1)
        own = [each[part].contiguous() if at in (0, 1, 2, 6) else each for at, each in enumerate(inputs)]
        alone = route(*own, arrived, **options(case))
        assert torch.equal(alone.chosen, got.chosen[part])
        assert torch.equal(alone.weights, got.weights[part])
        assert torch.equal(fp4_experts.site(*own[1:3], alone, *weights, 10.0), site[part])
        left = fp4_experts.site(*own[1:3], alone, *weights, 10.0, left=True)
        assert torch.equal(left.whole(), site[part])
    assert not arrived.any()
