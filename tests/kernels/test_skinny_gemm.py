"""FP8 products with few rows: the reference against numerics, the cut of k, the Triton kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_cases import error, run

from pelagos import numerics
from pelagos.errors import ConfigError
from pelagos.kernels import skinny_gemm
from pelagos.kernels.ref import skinny_gemm as ref

# (tokens, outputs of a group, depth, groups): the edges of a row tile, one tile and many, parts of k, grouped weights.
CASES = (
    *((tokens, 256, 512, 1) for tokens in (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64)),
    (1, 128, 128, 1), (3, 128, 2048, 1), (9, 384, 384, 1), (64, 640, 256, 1), (5, 128, 256, 4), (33, 256, 1024, 2),
    (1, 1536, 4096, 1), (16, 32768, 1024, 1), (31, 4096, 8192, 1), (64, 1024, 4096, 8), (32, 65536, 1536, 1),
)  # fmt: skip

TOLERANCE = 4e-3  # bfloat16 results, and what the FP8 matrix unit drops within 128 columns

SCRIPT = """
import torch
torch.set_num_threads(1)
from pelagos.kernels.ref import skinny_gemm as ref
from pelagos.kernels.batch_rows import Parts
from pelagos.kernels.triton import skinny_gemm as kernel
from triton_cases import error
arrived = torch.zeros(4096, dtype=torch.int32)
for case in ((1, 128, 128, 1), (3, 256, 512, 1), (17, 128, 256, 2), (33, 128, 384, 1), (2, 128, 2048, 1)):
    inputs = ref.make_inputs(*case)
    off = error(kernel.forward(*inputs, arrived, case[3])[0], ref.forward(*inputs, case[3]))
    # The interpreter cuts to bfloat16 instead of rounding.
    assert off < 6e-3, (case, off)
    x = ref.decoded(*inputs[:2], (1, 128)).bfloat16()
    off = error(kernel.forward(x, None, *inputs[2:], arrived, case[3])[0], ref.forward(x, None, *inputs[2:], case[3]))
    assert off < 6e-3, (case, off)
    for rows in ((x, None), ref.halves(x)):
        codes = kernel.forward(*rows, *inputs[2:], arrived, case[3], quantise=True)
        off = error(ref.decoded(*codes, (1, 128)), ref.forward(x, None, *inputs[2:], case[3]))
        assert off < 3e-2, (case, off)
    if case[3] == 1:
        left = Parts(kernel.forward(*inputs, arrived, left=True)[0]).whole()
        assert error(left, kernel.forward(*inputs, arrived)[0]) < 6e-3, case
        wide = torch.randn(192, case[2]).bfloat16()
        for operands in ((*inputs[:2], x, *inputs[2:]), (None, None, x, None, None)):
            off = error(kernel.merged(*operands, wide, arrived), ref.merged(*operands, wide))
            assert off < 1e-6, (case, off)
    assert not arrived.any()
x, wide = torch.randn(17, 256).bfloat16(), torch.randn(128, 256).bfloat16()
narrow = kernel.merged(None, None, x, None, None, wide, arrived)
kernel.HUGE = 128  # what a vocabulary has: larger tiles for many rows, of the same sums
assert torch.equal(kernel.merged(None, None, x, None, None, wide, arrived), narrow)
assert kernel.cut(128, 2048, 1)[1] > 1
for outputs, depth, groups in ((1536, 4096, 1), (32768, 1024, 1), (1024, 4096, 8), (4096, 8192, 1), (7168, 16384, 1)):
    tall, parts = kernel.cut(outputs, depth, groups)
    assert outputs % tall == 0 and depth // 128 % parts == 0 and groups * outputs // tall <= 4096, (tall, parts)
print("compared")
"""


def inputs_of(*case: int) -> tuple[torch.Tensor, ...]:
    return (*ref.make_inputs(*case), torch.zeros(skinny_gemm.COUNTERS, dtype=torch.int32))


def test_reference_is_the_product_of_decoded_operands():
    codes, scales, weight, weight_scales, arrived = inputs_of(3, 128, 256, 2)
    x = numerics.decode_fp8(codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), numerics.ACT_BLOCK)
    decoded = (weight.view(torch.float8_e4m3fn), weight_scales.view(torch.float8_e8m0fnu), numerics.FP8_BLOCK)
    w = numerics.decode_fp8(*decoded).double().view(2, 128, 256)
    want = torch.einsum("tgi,goi->tgo", x.double().view(3, 2, 256), w).flatten(1)
    got = skinny_gemm.product(codes, scales, weight, weight_scales, arrived, groups=2)
    assert got.dtype == torch.bfloat16
    assert error(got, want) < 3e-3


@pytest.mark.parametrize(
    ("case", "place", "message"),
    [((65, 128, 128, 1), None, "65 rows"), ((3, 128, 256, 1), 1, "scales"), ((3, 128, 256, 1), 3, "weight_scales"),
     ((3, 128, 256, 1), 2, "columns of x")],
)  # fmt: skip
def test_other_shapes_are_refused(case, place, message):
    inputs = list(inputs_of(*case))
    if place is not None:
        inputs[place] = inputs[place][..., :-1]
    with pytest.raises(ConfigError, match=message):
        skinny_gemm.product(*inputs)


def test_kernel_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


def test_halves_are_the_rows():
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1] *= 1e-6
    x[2, :128] = 0
    halves = ref.halves(x)
    assert halves.codes.shape == (10, 256)
    assert error(halves.whole(), x) < 1e-6
    inputs = inputs_of(5, 128, 256, 1)[2:]
    for got, want in zip(*(skinny_gemm.quantised_product(*each, *inputs) for each in (halves, (x, None))), strict=True):
        assert torch.equal(got, want)


def test_merged_products_need_their_codes():
    codes, scales, weight, weight_scales, arrived = inputs_of(3, 128, 256, 1)
    x = ref.decoded(codes, scales, numerics.ACT_BLOCK).bfloat16()
    wide = torch.randn(64, 256).bfloat16()
    got = skinny_gemm.merged(codes, scales, x, weight, weight_scales, wide, arrived)
    assert torch.equal(got[:, 128:], x.float() @ wide.float().T)
    assert error(got[:, :128], skinny_gemm.product(codes, scales, weight, weight_scales, arrived)) < 3e-3
    with pytest.raises(ConfigError, match="codes"):
        skinny_gemm.merged(None, None, x, weight, weight_scales, wide, arrived)
    with pytest.raises(ConfigError, match="multiples"):
        skinny_gemm.merged(None, None, x, None, None, wide[:10], arrived)
    with pytest.raises(ConfigError, match="bfloat16 without"):
        skinny_gemm.product(codes, None, weight, weight_scales, arrived)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_on_the_device(case):
    """Within the format's tolerance, the same bits again, and the bits of a row by itself."""
    inputs = ref.make_inputs(*case, device="cuda")
    arrived, groups = torch.zeros(skinny_gemm.COUNTERS, dtype=torch.int32, device="cuda"), case[3]
    got = skinny_gemm.product(*inputs, arrived, groups=groups)
    assert error(got, ref.forward(*inputs, groups)) < TOLERANCE
    assert torch.equal(got, skinny_gemm.product(*inputs, arrived, groups=groups))
    for row in {0, case[0] // 2, case[0] - 1}:
        alone = (each[row : row + 1] for each in inputs[:2])
        assert torch.equal(skinny_gemm.product(*alone, *inputs[2:], arrived, groups=groups)[0], got[row])
    x = ref.decoded(*inputs[:2], numerics.ACT_BLOCK).bfloat16()
    plain = skinny_gemm.product(x, None, *inputs[2:], arrived, groups=groups)
    assert error(plain, ref.forward(x, None, *inputs[2:], groups)) < TOLERANCE
    codes = skinny_gemm.quantised_product(x, None, *inputs[2:], arrived, groups=groups)
    want = numerics.decode_fp8(*numerics.encode_fp8(plain, numerics.ACT_BLOCK), numerics.ACT_BLOCK)
    assert error(ref.decoded(*codes, numerics.ACT_BLOCK), want) < 2e-2  # codes that fell to the other side
    assert torch.equal(skinny_gemm.product(x[:1], None, *inputs[2:], arrived, groups=groups)[0], plain[0])
    fine = torch.randn(x.shape, device="cuda").bfloat16()
    halves = ref.halves(fine)
    assert error(halves.whole(), fine) < 1e-6
    found = skinny_gemm.quantised_product(*halves, *inputs[2:], arrived, groups=groups)
    want = ref.forward(fine, None, *inputs[2:], groups)
    want = numerics.decode_fp8(*numerics.encode_fp8(want, numerics.ACT_BLOCK), numerics.ACT_BLOCK)
    assert error(ref.decoded(*found, numerics.ACT_BLOCK), want) < 2e-2
    for row in {0, case[0] - 1}:
        alone = (each[2 * row : 2 * row + 2] for each in halves)
        alone = skinny_gemm.quantised_product(*alone, *inputs[2:], arrived, groups=groups)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, found, strict=True))
    if groups == 1:
        assert torch.equal(skinny_gemm.left_product(*inputs, arrived).whole(), got)
        wide = torch.randn(192, case[2], device="cuda").bfloat16()
        merged = skinny_gemm.merged(*inputs[:2], x, *inputs[2:], wide, arrived)
        assert error(merged, ref.merged(*inputs[:2], x, *inputs[2:], wide)) < 1e-3
        last = (each[-1:].contiguous() for each in (*inputs[:2], x))
        assert torch.equal(skinny_gemm.merged(*last, *inputs[2:], wide, arrived)[0], merged[-1])
        head = skinny_gemm.merged(None, None, x, None, None, wide, arrived)
        assert error(head, ref.merged(None, None, x, None, None, wide)) < 1e-5
    assert not arrived.any()
