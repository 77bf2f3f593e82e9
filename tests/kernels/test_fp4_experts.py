"""Experts with FP4 weights: reference against `mixture`, formats in kernels, Triton kernels against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_cases import error, run

from pelagos import numerics
from pelagos.errors import ConfigError
from pelagos.kernels import fp4_experts
from pelagos.kernels.ref import fp4_experts as ref
from pelagos.kernels.ref.experts import mixture, swiglu

# (tokens, experts, picks, width, inner): the edges of a tile of rows, hot and idle experts, both ways of listing.
CASES = (
    *((tokens, 8, 2, 128, 128) for tokens in (1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 127, 128, 129)),
    (1, 256, 6, 256, 128), (7, 256, 6, 256, 256), (40, 256, 6, 128, 384), (64, 256, 6, 256, 128),
    (3, 4, 4, 512, 128), (16, 1, 1, 128, 256), (130, 2, 1, 128, 128), (9, 16, 6, 640, 384),
    (1, 256, 6, 4096, 2048), (8, 256, 6, 4096, 2048),
)  # fmt: skip

LIMIT = 10.0
# The matrix unit keeps some 14 bits of a sum of FP8 products: a product's sums are within 2^-12 of their norm. Errors
# of a share e of the norm bring 90 to 105 e of the hidden values over an E4M3 border (random gates and ups: 16 e for
# each of two factors, more for those near zero). At e = 2^-12 their norm is off by 0.0044, and the second product's.
SUMS, MOVED, WHOLE = 2**-12, 256, 2**-7

SCRIPT = f"""
import torch
torch.set_num_threads(1)
from pelagos.kernels.ref import fp4_experts as ref
from pelagos.kernels.triton import fp4_experts as kernel
from test_fp4_experts import check_parts
from triton_cases import error
for case in ((1, 8, 2, 128, 128), (3, 4, 4, 256, 128), (17, 8, 2, 128, 256), (5, 1, 1, 128, 128), (9, 20, 4, 256, 128)):
    inputs = ref.make_inputs(*case)
    off = error(kernel.forward(*inputs, {LIMIT}), ref.forward(*inputs, {LIMIT}))
    assert off < 1e-6, (case, off)
    check_parts(inputs, 1e-6, 0)
kernel.LONG = 512  # k in two parts, which a program of many picks has one after another, as it has tiles of outputs
inputs = ref.make_inputs(6, 2, 2, 512, 128)
assert kernel.cut(512)["PARTS"] == 2
check_parts(inputs, 1e-6, 0)
print("compared")
"""
REPEATS = f"""
import torch
from test_fp4_experts import REPEATED, repeated
from pelagos.kernels.ref import fp4_experts as ref
from pelagos.kernels.triton import fp4_experts as kernel
from triton_cases import error
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # what nobody has written is not a number
for case in REPEATED:
    inputs = repeated(case)
    off = error(kernel.forward(*inputs, {LIMIT}), ref.forward(*inputs, {LIMIT}))
    assert off < 1e-6, (case, off)
print("compared")
"""
REPEATED = ((3, 4, 4, 128, 128), (2, 8, 3, 128, 128), (9, 4, 2, 128, 128))  # rows of experts, of picks, several passes


def repeated(case: tuple[int, int, int, int, int], device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Inputs in which tokens choose an expert more than once, as a table of a hash layer may."""
    inputs = ref.make_inputs(*case, device=device)
    inputs[2][:, 1:] = inputs[2][:1, :1]
    inputs[2][1] = inputs[2][0]
    return inputs


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


class Kept:
    """A kernel that keeps what it was last launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.operands = kernel, ()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*operands: Any, **options: Any) -> None:
            self.operands = operands
            self.kernel[grid](*operands, **options)

        return launch


def in_order(hidden: torch.Tensor, picks: int) -> torch.Tensor:
    """Return hidden codes (picks, F) uint8 of what the second product reads: turned, four rows a pick."""
    lane = torch.arange(128, device=hidden.device)
    byte = lane // 2
    place = lane % 2 * 64 + byte % 16 // 4 * 16 + byte // 16 * 4 + byte % 4
    spread = hidden.view(picks, 4, -1, 128)
    assert int((spread != 0).sum(1).max()) <= 1
    return spread[:, byte // 16, :, place].permute(1, 2, 0).reshape(picks, -1)


def check_parts(inputs: tuple[torch.Tensor, ...], sums: float, more: int) -> torch.Tensor:
    """Hold each product's sums and the hidden values between them against the reference's; return the kernels' result.

    The share of hidden values that differ is what the first sums' error explains, and `more` of them; each by a step of
    the format, or by a quarter of what is a step for the largest of its block.
    """
    from pelagos.kernels.triton import fp4_experts as kernel

    codes, scales, chosen, weights, w13, s13, w2, s2 = inputs
    real = kernel._hidden_kernel
    kernel._hidden_kernel = kept = Kept(real)
    try:
        got = fp4_experts.mixture(*inputs, LIMIT) if codes.is_cuda else kernel.forward(*inputs, LIMIT)
    finally:
        kernel._hidden_kernel = real
    up, _, hidden, hidden_scales = kept.operands[:4]
    own, picks = in_order(hidden, chosen.numel()), chosen.flatten().long()
    x = numerics.decode_fp8(codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), numerics.ACT_BLOCK)
    x = x.repeat_interleave(chosen.shape[1], 0)
    want = torch.stack([ref.decode(w13[e], s13[e]) @ row for e, row in zip(picks, x, strict=True)])
    off = error(up.sum(0), want)
    assert off < sums
    value = swiglu(*want.chunk(2, 1), LIMIT) * weights.view(-1, 1)
    wanted = numerics.fake_quant_fp8(value, numerics.ACT_BLOCK).view(-1, 128)
    hidden_scales = hidden_scales.view(torch.float8_e8m0fnu)
    rows = numerics.decode_fp8(own.view(torch.float8_e4m3fn), hidden_scales, numerics.ACT_BLOCK)
    apart = (rows.view(-1, 128) - wanted).abs()
    step = torch.maximum(rows.view(-1, 128).abs(), wanted.abs()) / 8
    assert bool((apart <= torch.maximum(step, wanted.abs().amax(1, keepdim=True) / 64)).all())
    assert int((apart != 0).sum()) <= MOVED * off * apart.numel() + more
    want = torch.stack([ref.decode(w2[e], s2[e]) @ row for e, row in zip(picks, rows, strict=True)])
    assert error(got, want.view(*chosen.shape, -1).sum(1)) < sums
    return got


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


def test_an_expert_may_be_chosen_twice_by_a_token():
    """More picks of an expert than tokens are all computed; once those beyond were left out, their memory unwritten."""
    assert run(REPEATS, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*REPEATED, (64, 256, 6, 256, 128)], ids=str)
def test_an_expert_may_be_chosen_twice_on_the_device(case):
    inputs = repeated(case, "cuda")
    assert error(fp4_experts.mixture(*inputs, LIMIT), ref.forward(*inputs, LIMIT)) < WHOLE


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_on_the_device(case):
    """Each product within its unit's precision, the same bits again, and the bits of a token by itself."""
    inputs = ref.make_inputs(*case, device="cuda")
    got = check_parts(inputs, SUMS, 4)
    assert error(got, ref.forward(*inputs, LIMIT)) < WHOLE
    assert torch.equal(got, fp4_experts.mixture(*inputs, LIMIT))
    for token in {0, case[0] // 2, case[0] - 1}:
        alone = (each[token : token + 1].contiguous() for each in inputs[:4])
        assert torch.equal(fp4_experts.mixture(*alone, *inputs[4:], LIMIT)[0], got[token])
