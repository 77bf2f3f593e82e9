"""FP8, FP4 and UE8M0: exact codes, decode(encode(x)) == fake_quant(x), the lossless recast and its condition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pelagos import numerics as nm

BLOCKS = [(128, 128), (1, 128), (1, 64)]


def sample(shape: tuple[int, ...], seed: int, spread: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.exp2(spread * torch.randn(shape, generator=g))


def test_ceil_power_of_two_is_exact_at_and_beside_every_power() -> None:
    powers = torch.exp2(torch.arange(-120, 120).float())
    assert torch.equal(nm.ceil_power_of_two(powers), powers)
    assert torch.equal(nm.ceil_power_of_two(torch.nextafter(powers, torch.tensor(torch.inf))), powers * 2)
    assert torch.equal(nm.ceil_power_of_two(torch.nextafter(powers, torch.tensor(0.0))), powers)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 200), cols=st.integers(1, 300), spread=st.floats(0, 6))
@settings(max_examples=40, deadline=None)
def test_fp8_decode_encode_equals_fake_quant(block, seed, rows, cols, spread) -> None:
    x = sample((rows, cols), seed, spread)
    codes, scale = nm.encode_fp8(x, block)
    decoded = nm.decode_fp8(codes, scale, block)
    assert torch.equal(decoded, nm.fake_quant_fp8(x, block))
    assert torch.equal(nm.fake_quant_fp8(decoded, block), decoded), "quantising twice must change nothing"
    assert decoded.isfinite().all()


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 60), groups=st.integers(1, 8), spread=st.floats(0, 6))
@settings(max_examples=60, deadline=None)
def test_fp4_decode_encode_equals_fake_quant(seed, rows, groups, spread) -> None:
    x = sample((rows, groups * 32), seed, spread)
    packed, scale = nm.encode_fp4(x)
    decoded = nm.decode_fp4(packed, scale)
    assert torch.equal(decoded, nm.fake_quant_fp4(x))
    assert torch.equal(nm.fake_quant_fp4(decoded), decoded)


def test_fp4_rounds_to_nearest_with_ties_to_even() -> None:
    x = torch.zeros(32)
    x[:12] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, -5.0, 0.2500001, 4.9999])
    expected = torch.tensor([6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -1.0, -4.0, 0.5, 4.0])
    assert torch.equal(nm.fake_quant_fp4(x)[:12], expected)


def test_fp4_packs_the_even_column_low() -> None:
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1] = 6.0, -0.5
    packed, scale = nm.encode_fp4(x)
    assert packed.view(torch.uint8)[0, 0].item() == 0x97
    assert scale.float().item() == 1.0


def test_every_e4m3_code_survives_encoding() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = codes.float()[codes.float().isfinite()]
    row = torch.cat((values, torch.zeros(256 - len(values)))).view(2, 128)
    assert torch.equal(nm.fake_quant_fp8(row, (1, 256 // 2)), row)


@given(seed=st.integers(0, 10**6), span=st.integers(0, 14))
@settings(max_examples=40, deadline=None)
def test_fp4_passes_through_fp8_without_loss_within_its_condition(seed, span) -> None:
    x = sample((150, 256), seed, 0.0)
    packed, scale = nm.encode_fp4(x)
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-span, 1, scale.shape, generator=g).float()).to(torch.float8_e8m0fnu)
    values = nm.decode_fp4(packed, scale)
    assert torch.equal(nm.fake_quant_fp8(values, nm.FP8_BLOCK), values)


def test_a_wider_span_loses_values() -> None:
    values = torch.ones(128, 128) * 6
    for binades, kept in ((nm.LOSSLESS_BINADES, True), (nm.LOSSLESS_BINADES + 1, False)):
        values[3, 32:64] = 0.5 * 2.0**-binades
        assert torch.equal(nm.fake_quant_fp8(values, nm.FP8_BLOCK), values) is kept


def test_straight_through_gradient_is_the_identity() -> None:
    x = sample((4, 128), 0, 2.0).requires_grad_()
    weight = sample((4, 128), 1, 0.0)
    (nm.fake_quant_fp8(x, (1, 128)) * weight + nm.fake_quant_fp4(x) * weight).sum().backward()
    assert torch.equal(x.grad, 2 * weight)


def test_hadamard_is_orthonormal_and_in_sylvester_order() -> None:
    eye = torch.eye(64)
    h = nm.hadamard(eye)
    assert torch.allclose(h @ h.T, eye, atol=1e-6)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    sylvester = two
    for _ in range(5):
        sylvester = torch.kron(two, sylvester)
    assert torch.equal(h, sylvester * 64**-0.5)
