"""Routing weights, clamped SwiGLU and the mixture, against one token and expert at a time."""

import math

import pytest
import torch

from pelagos.kernels.ref import experts

TOKENS, PICKS, EXPERTS, DIM, HIDDEN, LIMIT = 9, 3, 5, 8, 6, 0.7


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    order = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(7)).argsort(1)
    order[:, 3] = order[:, 0]
    return {
        "x": normal(TOKENS, DIM),
        "chosen": torch.where(order[:, :PICKS] == 2, (order[:, :PICKS] + 1) % 2, order[:, :PICKS]),  # 2 is idle
        "weights": normal(TOKENS, PICKS, seed=2).abs(),
        "w13": normal(EXPERTS, 2 * HIDDEN, DIM, seed=3),
        "w2": normal(EXPERTS, DIM, HIDDEN, seed=4),
    }


def test_route() -> None:
    scores = torch.tensor([[1.0, 3.0, 0.5, 4.0], [0.0, 0.0, 0.0, 0.0]])
    weights = experts.route(scores, torch.tensor([[3, 0], [1, 2]]), 2.5)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5], [0.0, 0.0]]))


@pytest.mark.parametrize(
    ("gate", "up", "wanted"),
    [
        (1.0, 2.0, 2.0 / (1 + math.exp(-1.0))),
        (99.0, 1.0, 10.0 / (1 + math.exp(-10.0))),  # the gate has a ceiling
        (-20.0, 1.0, -20.0 / (1 + math.exp(20.0))),  # and no floor
        (1.0, 99.0, 10.0 / (1 + math.exp(-1.0))),
        (1.0, -99.0, -10.0 / (1 + math.exp(-1.0))),
    ],
)
def test_swiglu_clamps(gate: float, up: float, wanted: float) -> None:
    got = experts.swiglu(torch.tensor([gate]), torch.tensor([up]), 10.0)
    assert float(got) == pytest.approx(wanted, rel=1e-6)
    assert experts.swiglu(torch.ones(1).bfloat16(), torch.ones(1).bfloat16(), 1.0).dtype == torch.float32


def test_grouped_linear_with_empty_groups() -> None:
    x, weight, counts = normal(7, DIM), normal(4, HIDDEN, DIM, seed=2), [3, 0, 4, 0]
    got = experts.grouped_linear(x, weight, counts)
    wanted = torch.cat((x[:3] @ weight[0].T, x[3:] @ weight[2].T))
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(experts.grouped_linear(x, weight, counts, quantized=True), wanted)


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_padded_rows_do_not_count(multiple: int, inputs: dict[str, torch.Tensor]) -> None:
    whole = {**inputs, "limit": LIMIT, "quantize": None}
    wanted = experts.mixture(**whole)  # pyright: ignore[reportArgumentType]
    got = experts.mixture(**whole, multiple=multiple)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [experts.mixture, experts.mixture_few])
@pytest.mark.parametrize("coarse", [False, True])
def test_mixture(form: object, coarse: bool, inputs: dict[str, torch.Tensor]) -> None:
    """The activations are quantised before each product, and the routing weight enters before the second."""

    def quantize(x: torch.Tensor) -> torch.Tensor:
        return (x * 8).round() / 8

    got = form(**inputs, limit=LIMIT, quantize=quantize if coarse else None)  # pyright: ignore[reportCallIssue]
    assert got.dtype == torch.float32
    seen = quantize if coarse else torch.clone
    for token in range(TOKENS):
        total = torch.zeros(DIM, dtype=torch.float64)
        for expert, weight in zip(inputs["chosen"][token].tolist(), inputs["weights"][token], strict=True):
            both = inputs["w13"][expert].double() @ seen(inputs["x"][token]).double()
            gate, up = both[:HIDDEN].clamp_max(LIMIT), both[HIDDEN:].clamp(-LIMIT, LIMIT)
            hidden = gate * torch.sigmoid(gate) * up * weight.double()
            total += inputs["w2"][expert].double() @ seen(hidden)
        torch.testing.assert_close(got[token].double(), total, rtol=1e-5, atol=1e-5)
