"""RMSNorm and rotary embedding, against formulas one number at a time."""

import cmath
import math

import pytest
import torch
from triton_cases import run

from pelagos.kernels.ref.norm_rope import apply_rope, rms_norm, rope_frequencies, rope_table

RELEASED = {"factor": 16.0, "original": 65536, "beta_fast": 32.0, "beta_slow": 1.0}


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm(weighted: bool) -> None:
    x, weight = normal(3, 8), normal(8, seed=2)
    got = rms_norm(x, weight if weighted else None, 0.1)
    for row in range(3):
        rms = math.sqrt(sum(float(v) ** 2 for v in x[row]) / 8 + 0.1)
        for i in range(8):
            factor = float(weight[i]) if weighted else 1.0
            assert float(got[row, i]) == pytest.approx(float(x[row, i]) / rms * factor, rel=1e-5)


def test_rms_norm_rounds_once() -> None:
    x, weight = normal(4, 64).bfloat16(), normal(64, seed=2).bfloat16()
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rms_norm(x.float(), weight.float(), 1e-6).bfloat16())


def test_plain_frequencies() -> None:
    freqs = rope_frequencies(64, 10000.0)
    assert freqs.tolist() == pytest.approx([10000 ** (-2 * i / 64) for i in range(32)], rel=1e-5)


def test_yarn_of_the_released_sizes() -> None:
    """64 channels, theta 160000, 65536 positions: fast ones below 15 stay, slow ones from 25 are divided by 16."""

    def turns(beta: float) -> float:
        return 64 * math.log(65536 / (beta * 2 * math.pi)) / (2 * math.log(160000.0))

    assert (math.floor(turns(32)), math.ceil(turns(1))) == (15, 25)
    plain = [160000.0 ** (-2 * i / 64) for i in range(32)]
    got = rope_frequencies(64, 160000.0, **RELEASED).tolist()  # pyright: ignore[reportArgumentType]
    for i in range(32):
        ramp = min(max((i - 15) / 10, 0.0), 1.0)
        assert got[i] == pytest.approx(plain[i] / 16 * ramp + plain[i] * (1 - ramp), rel=1e-5)
    assert got[15] == pytest.approx(plain[15], rel=1e-5)
    assert got[20] == pytest.approx(plain[20] * (0.5 + 0.5 / 16), rel=1e-5)
    assert got[25] == pytest.approx(plain[25] / 16, rel=1e-5)


def test_table_turns_the_last_channels() -> None:
    freqs = rope_frequencies(4, 100.0)
    cos, sin = rope_table(torch.tensor([[0, 3, 7]]), freqs, 10)
    assert cos.shape == sin.shape == (1, 3, 10)
    for at, position in enumerate((0, 3, 7)):
        assert cos[0, at, :6].tolist() == [1.0] * 6
        assert sin[0, at, :6].tolist() == [0.0] * 6
        for pair in range(2):
            angle = position * 100.0 ** (-2 * pair / 4)
            assert cos[0, at, 6 + 2 * pair : 8 + 2 * pair].tolist() == pytest.approx([math.cos(angle)] * 2, abs=1e-6)
            signed = [-math.sin(angle), math.sin(angle)]
            assert sin[0, at, 6 + 2 * pair : 8 + 2 * pair].tolist() == pytest.approx(signed, abs=1e-6)


@pytest.mark.parametrize("inverse", [False, True])
def test_rope_turns_adjacent_pairs(inverse: bool) -> None:
    x, freqs = normal(5, 12), rope_frequencies(8, 50.0)
    got = apply_rope(x, rope_table(torch.arange(5), freqs, 12), inverse=inverse)
    assert torch.equal(got[:, :4], x[:, :4])
    for t in range(5):
        for pair in range(4):
            at = 4 + 2 * pair
            turn = cmath.exp(1j * t * 50.0 ** (-2 * pair / 8) * (-1 if inverse else 1))
            wanted = complex(float(x[t, at]), float(x[t, at + 1])) * turn
            assert got[t, at : at + 2].tolist() == pytest.approx([wanted.real, wanted.imag], abs=1e-5)


def test_inverse_undoes_and_distance_is_all_that_counts() -> None:
    freqs = rope_frequencies(8, 10000.0, **RELEASED)  # pyright: ignore[reportArgumentType]
    table = rope_table(torch.tensor([5, 1005, 11, 1011]), freqs, 8)
    x = normal(4, 8)
    torch.testing.assert_close(apply_rope(apply_rope(x, table), table, inverse=True), x, rtol=0, atol=1e-5)
    q, k = normal(1, 8, seed=2).expand(4, 8), normal(1, 8, seed=3).expand(4, 8)
    q, k = apply_rope(q, table), apply_rope(k, table)
    assert float(q[0] @ k[2]) == pytest.approx(float(q[1] @ k[3]), abs=1e-3)
    assert apply_rope(x.bfloat16(), table).dtype == torch.bfloat16


SCRIPT = """
import torch
torch.set_num_threads(1)
from test_norm_rope import through
for shape, heads in (((7, 5, 48), False), ((3, 11, 4, 32), True), ((2, 300, 64), False)):
    for got, want in zip(through(shape, heads, True), through(shape, heads, False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
print("compared")
"""


def through(shape: tuple[int, ...], heads: bool, kernels: bool, device: str = "cpu") -> list[torch.Tensor]:
    """A norm, with a weight where there are no heads, then a turn and back, values and gradients."""
    x, up = normal(*shape).to(device).requires_grad_(), normal(*shape, seed=3).to(device)
    weight = None if heads else normal(shape[-1], seed=2).to(device).requires_grad_()
    table = rope_table(torch.arange(shape[0] * shape[1]).view(shape[:2]), rope_frequencies(16, 50.0), 64)
    table = tuple(t[..., -shape[-1] :].to(device) for t in table)
    table = tuple(t.unsqueeze(2) for t in table) if heads else table
    plain = (rms_norm, lambda x, cos, sin, inverse: apply_rope(x, (cos, sin), inverse=inverse))
    if kernels:
        from pelagos.kernels.triton.norm_rope import Norm, Rope

    norm, turn = (Norm.apply, Rope.apply) if kernels else plain
    normed = norm(x, weight, 1e-6)
    out = [normed] + ([turn(normed, *table, inverse) for inverse in (False, True)] if shape[-1] != 48 else [])
    return [t.detach() for t in out] + list(torch.autograd.grad(sum(out), [x] if heads else [x, weight], up))


def test_kernels_in_the_interpreter() -> None:
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 2048, 8, 64), (3, 700, 64), (4, 2048, 48)], ids=str)
def test_kernels_on_the_device(shape: tuple[int, ...]) -> None:
    found = [through(shape, len(shape) == 4, kernels, "cuda") for kernels in (True, False)]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
