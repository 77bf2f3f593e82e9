"""Experts with FP4 weights: reference against `mixture`, formats in kernels, Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_cases import error, run

from pelagos import numerics
from pelagos.errors import ConfigError
from pelagos.kernels import fp4_experts
from pelagos.kernels.ref import fp4_experts as ref
from pelagos.kernels.ref.experts import mixture

LIMIT = 10.0
TOLERANCE = 1e-4  # a hidden value that falls to the other side of an E4M3 rounding included

SCRIPT = f"""
import torch
torch.set_num_threads(1)
from pelagos.kernels.ref import fp4_experts as ref
from pelagos.kernels.triton import fp4_experts as kernel
from triton_cases import error
for case in ((1, 8, 2, 128, 128), (3, 4, 4, 256, 128), (17, 8, 2, 128, 256), (5, 1, 1, 128, 128), (9, 20, 4, 256, 128)):
    inputs = ref.make_inputs(*case)
    off = error(kernel.forward(*inputs, {LIMIT}), ref.forward(*inputs, {LIMIT}))
    assert off < 1e-6, (case, off)
print("compared")
"""
FORMATS = """
import torch, triton, triton.language as tl
from pelagos import numerics
from pelagos.kernels.triton import formats

@triton.jit
def kernel(bytes, groups, x, pair, wide, exponents, rounded):
    at = tl.arange(0, 256)
    even, odd = formats.e2m1_pair(tl.load(bytes + at), formats.expert_scale(tl.load(groups + at)), "any")
    tl.store(pair + 2 * at, even.to(tl.float32))
    tl.store(pair + 2 * at + 1, odd.to(tl.float32))
    tl.store(wide + at, formats.e4m3_to_float(tl.load(bytes + at)))
    value = tl.load(x + at)
    exponent = formats.fp8_scale_exponent(tl.abs(value))
    tl.store(exponents + at, exponent.to(tl.uint8))
    tl.store(rounded + at, formats.e4m3_code(formats.quantise_block(value, exponent)))

every = torch.arange(256, dtype=torch.uint8)
groups = 110 + every % 18
x = torch.randn(256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 4, 256)
x[0] = 0
pair, wide = torch.zeros(512), torch.zeros(256)
exponents, rounded = torch.zeros(2, 256, dtype=torch.uint8)
kernel[(1,)](every, groups, x, pair, wide, exponents, rounded)
packed = every.view(torch.int8).view(256, 1).expand(256, 16)
scales = groups.view(torch.float8_e8m0fnu).view(256, 1)
assert torch.equal(pair.view(256, 2), numerics.decode_fp4(packed, scales)[:, :2])
real = every.view(torch.float8_e4m3fn).float()
assert torch.equal(wide[~real.isnan()], real[~real.isnan()])
codes, scale = numerics.encode_fp8(x.view(256, 1), (1, 1))
assert torch.equal(scale.view(torch.uint8).flatten(), exponents)
assert torch.equal(codes.float().flatten(), rounded.view(torch.float8_e4m3fn).float())
print("equal")
"""


def test_reference_is_the_mixture_over_decoded_operands():
    codes, scales, chosen, weights, w13, s13, w2, s2 = inputs = ref.make_inputs(6, 5, 2, 128, 128)
    x = numerics.decode_fp8(codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), numerics.ACT_BLOCK)

    def quantize(values: torch.Tensor) -> torch.Tensor:
        return numerics.fake_quant_fp8(values, numerics.ACT_BLOCK)

    want = mixture(x, chosen.long(), weights, ref.decode(w13, s13), ref.decode(w2, s2), LIMIT, quantize)
    assert torch.equal(fp4_experts.mixture(*inputs, LIMIT), want)


@pytest.mark.parametrize(("place", "message"), [(1, "scales"), (3, "weights"), (5, "s13"), (6, "w13")])
def test_other_shapes_are_refused(place, message):
    inputs = list(ref.make_inputs(3, 4, 2, 128, 256))
    inputs[place] = inputs[place][..., :-1]
    with pytest.raises(ConfigError, match=message):
        fp4_experts.mixture(*inputs, LIMIT)


def test_scales_outside_the_exact_range_are_refused():
    fp4_experts.check_scales(torch.tensor([1, 128], dtype=torch.uint8))
    for byte in (0, 129):
        with pytest.raises(ConfigError, match=r"expected 1\.\.128"):
            fp4_experts.check_scales(torch.tensor([115, byte], dtype=torch.uint8))


def test_formats_in_the_interpreter(tmp_path):
    """Every byte of E2M1 pairs and E4M3, and scales and codes of values over twelve decades, equal numerics.py's."""
    path = tmp_path / "formats_script.py"  # triton reads the kernel's source from its file
    path.write_text(FORMATS, encoding="utf-8")
    assert run(f"import runpy; runpy.run_path({str(path)!r})", interpret=True) == "equal\n"


def test_kernels_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", ref.CASES, ids=str)
def test_kernels_on_the_device(case):
    """Within the format's tolerance, the same bits again, and the bits of a token by itself."""
    inputs = ref.make_inputs(*case, device="cuda")
    got = fp4_experts.mixture(*inputs, LIMIT)
    assert error(got, ref.forward(*inputs, LIMIT)) < TOLERANCE
    assert torch.equal(got, fp4_experts.mixture(*inputs, LIMIT))
    for token in {0, case[0] // 2, case[0] - 1}:
        alone = (each[token : token + 1].contiguous() for each in inputs[:4])
        assert torch.equal(fp4_experts.mixture(*alone, *inputs[4:], LIMIT)[0], got[token])
