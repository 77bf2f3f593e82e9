"""Products with many rows and what quantises between them: references, the interpreter, the library's product."""

from __future__ import annotations

import pytest
import torch
from triton_cases import error, run

from pelagos import numerics
from pelagos.errors import ConfigError
from pelagos.kernels import prefill_products
from pelagos.kernels.ref import prefill_products as ref
from pelagos.kernels.ref import skinny_gemm as inputs_ref

# (tokens, outputs of a group, depth, groups): edges of the library's tiles and of a call's rows, grouped weights.
CASES = (
    *((tokens, 256, 512, 1) for tokens in (1, 2, 3, 65, 127, 128, 129, 511, 512, 513, 1000)),
    (4096, 1024, 1024, 1), (8192, 1536, 4096, 1), (100, 128, 512, 8), (700, 1024, 4096, 8), (512, 4096, 8192, 1),
    (1025, 32768, 1024, 1), (513, 4096, 4096, 1), (640, 4096, 2048, 1), (2047, 384, 512, 2), (300, 512, 256, 1),
    (77, 256, 128, 2),
)  # fmt: skip

TOLERANCE = 4e-3  # bfloat16 results, and what the FP8 matrix unit drops within 128 columns

SCRIPT = """
import torch
torch.set_num_threads(1)
from pelagos.kernels.ref import prefill_products as ref
from pelagos.kernels.triton import prefill_products as kernel
generator = torch.Generator().manual_seed(0)
for rows, width in ((1, 128), (5, 384), (3, 1536)):
    x = (torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator) * 9).bfloat16()
    norm = 1 + torch.randn(width, generator=generator) / 4
    for got, want in zip(kernel.quantise(x, None, 0.0), ref.quantise(x, None, 0.0)):
        assert torch.equal(got, want), (rows, width)
    codes, scales = kernel.quantise(x[:, :width], norm, 1e-6)
    want = ref.quantise(x, norm, 1e-6)
    assert (codes.int() - want[0].int()).ne(0).float().mean() < 0.02 and torch.equal(scales, want[1])
    if width % 256 == 0:
        codes, scales = kernel.quantise(x, None, 0.0, 3.0)
        want = ref.quantise(x, None, 0.0, 3.0)
        assert (codes.int() - want[0].int()).ne(0).float().mean() < 0.02 and torch.equal(scales, want[1])
factors = kernel.scale_factors(torch.arange(100, 136, dtype=torch.uint8).view(9, 4), 12)
assert torch.equal(factors[:, :9], torch.exp2(torch.arange(-27, 9).view(9, 4).float()).T)
assert bool((factors[:, 9:] == 1).all())
print("compared")
"""


def inputs_of(*case: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    codes, scales, weight, weight_scales = inputs_ref.make_inputs(*case, device=device)
    return codes, scales, weight, prefill_products.factors(weight_scales)


def test_reference_is_that_of_few_rows():
    codes, scales, weight, weight_scales = inputs_ref.make_inputs(30, 128, 256, 2)
    got = prefill_products.product(codes, scales, weight, prefill_products.factors(weight_scales), groups=2)
    assert torch.equal(got, inputs_ref.forward(codes, scales, weight, weight_scales, 2))


def test_quantise_norms_first():
    x, norm = torch.randn(4, 256).bfloat16(), torch.rand(256) + 1
    codes, scales = prefill_products.quantise(x, norm, eps=1e-6)
    back = numerics.decode_fp8(codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), numerics.ACT_BLOCK)
    want = x.double() / x.double().square().mean(1, keepdim=True).sqrt() * norm
    assert error(back, want) < 4e-2


def test_other_shapes_are_refused():
    inputs = inputs_of(3, 128, 256, 1)
    for place, message in ((1, "scales"), (2, "columns"), (3, "weight_factors")):
        wrong = [each[..., :-1] if at == place else each for at, each in enumerate(inputs)]
        with pytest.raises(ConfigError, match=message):
            prefill_products.product(*wrong)
    with pytest.raises(ConfigError, match="bfloat16"):
        prefill_products.quantise(torch.zeros(2, 128))
    with pytest.raises(ConfigError, match="multiple of 256"):
        prefill_products.swiglu(torch.zeros(2, 128).bfloat16(), 1.0)


def test_kernels_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_on_the_device(case):
    """Within the format's tolerance, the same bits again, and those of its rows in calls of other sizes."""
    inputs = inputs_of(*case, device="cuda")
    got = prefill_products.product(*inputs, groups=case[3])
    assert error(got, ref.product(*inputs, case[3])) < TOLERANCE
    assert torch.equal(got, prefill_products.product(*inputs, groups=case[3]))
    for part in (slice(0, 1), slice(0, 512), slice(case[0] // 3, None)):
        some = (each[part].contiguous() for each in inputs[:2])
        assert torch.equal(prefill_products.product(*some, *inputs[2:], groups=case[3]), got[part])


@pytest.mark.gpu
@pytest.mark.parametrize("case", [(700, 1024, 4096, 8), (33, 128, 512, 2), (513, 256, 128, 1)], ids=str)
def test_bfloat16_rows_on_the_device(case):
    """Unquantised rows (wo_a): within bfloat16, and the bits of rows in calls of other sizes; float32 results alike."""
    _, _, weight, weight_factors = inputs_of(*case, device="cuda")
    x = torch.randn(case[0], case[2] * case[3], device="cuda").bfloat16()
    got, wide = prefill_products.product(x, None, weight, weight_factors, groups=case[3]), torch.randn_like(x[:64])
    assert error(got, ref.product(x, None, weight, weight_factors, case[3])) < TOLERANCE
    full = prefill_products.wide_product(x, wide)
    assert error(full, x.float() @ wide.float().T) < 1e-5
    for part in (slice(0, 1), slice(case[0] // 3, None)):
        assert torch.equal(prefill_products.product(x[part], None, weight, weight_factors, groups=case[3]), got[part])
        assert torch.equal(prefill_products.wide_product(x[part], wide), full[part])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 129, 513])
def test_quantised_on_the_device(rows):
    """The reference's codes but where a norm's or exponential's last bit decides a rounding."""
    x = torch.randn(rows, 2048, device="cuda").bfloat16() * 4
    norm = 1 + torch.rand(2048, device="cuda")
    got, want = prefill_products.quantise(x), ref.quantise(x, None, 0.0)
    assert torch.equal(*(each[0].view(torch.float8_e4m3fn).float() for each in (got, want)))  # a zero may lose its sign
    assert torch.equal(got[1], want[1])
    for got, want in ((prefill_products.quantise(x, norm, eps=1e-6), ref.quantise(x, norm, 1e-6)),
                      (prefill_products.swiglu(x, 10.0), ref.quantise(x, None, 0.0, 10.0))):  # fmt: skip
        assert float((got[0] != want[0]).float().mean()) < 0.01
        assert float((got[1] != want[1]).float().mean()) < 0.01
