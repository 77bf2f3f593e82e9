"""One hyper-connection site: the reference against the model's functions, the Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_cases import error, run

from pelagos import numerics
from pelagos.errors import ConfigError
from pelagos.kernels.batch_rows import Parts
from pelagos.kernels.ref import hyper_connection as hc
from pelagos.kernels.ref import site as ref
from pelagos.kernels.ref.norm_rope import rms_norm
from pelagos.kernels.site import site

# (tokens, width): tiles of 16 and 64 tokens and their edges, one block of channels, widths that are no power of two.
CASES = (
    *((tokens, 256) for tokens in (1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129)),
    (1, 128), (5, 384), (70, 128), (20, 640), (1, 4096), (16, 4096), (129, 4096), (1, 7168), (130, 7168), (1025, 4096),
)  # fmt: skip

OPTIONS = {"iters": 20, "eps": 1e-6, "norm_eps": 1e-6}
# Streams, post, comb, normed and its FP8 copy. bfloat16 and E4M3 results may fall to the other side of a rounding.
ON_DEVICE = (1e-4, 2e-5, 1e-4, 4e-3, 8e-3)
# The interpreter cuts where a bfloat16 should be rounded, which is half a unit in the last place on average.
INTERPRETED = (6e-3, 4e-3, 4e-3, 1e-2, 4e-2)

SCRIPT = """
import torch
torch.set_num_threads(1)
from pelagos.kernels.batch_rows import Parts
from pelagos.kernels.ref import site as ref
from pelagos.kernels.triton import site as kernel
from test_site import INTERPRETED, OPTIONS, errors
for case in ((1, 256), (3, 256), (2, 640), (18, 512), (35, 128), (130, 128)):
    inputs = ref.make_inputs(*case)
    found = errors(kernel.forward(*inputs, **OPTIONS), ref.forward(*inputs, **OPTIONS))
    assert all(off < most for off, most in zip(found, INTERPRETED, strict=True)), (case, found)
    if case[0] < 128:
        left = Parts(torch.randn(3, *case) / 2, torch.randn(2, case[0], 4, case[1]) / 2)
        for y in (left, left._replace(routed=None)):
            found = errors(kernel.forward(y, *inputs[1:], **OPTIONS), ref.forward(y.whole(), *inputs[1:], **OPTIONS))
            assert all(off < 4 * most for off, most in zip(found, INTERPRETED, strict=True)), (case, "parts", found)
    first = (None, inputs[1], None, None, *inputs[4:])
    found = errors(kernel.forward(*first, **OPTIONS), ref.forward(*first, **OPTIONS))
    assert all(off < most for off, most in zip(found, INTERPRETED, strict=True)), (case, "first site", found)
print("compared")
"""


def values(result: tuple[torch.Tensor, ...]) -> torch.Tensor:
    codes, scales = result[4].view(torch.float8_e4m3fn), result[5].view(torch.float8_e8m0fnu)
    return numerics.decode_fp8(codes, scales, numerics.ACT_BLOCK)


def errors(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> list[float]:
    return [*(error(a, b) for a, b in zip(got[:4], want[:4], strict=True)), error(values(got), values(want))]


def test_reference_is_post_then_the_site_of_the_model():
    y, streams, post, comb, fn, base, scale, norm = ref.make_inputs(5, 128)
    got = site(y, streams, post, comb, fn, base, scale, norm, **OPTIONS)
    mixed = hc.hc_post(y, streams, post, comb)
    pre, new_post, logits = hc.split_mix(hc.mix_logits(mixed, fn, 1e-6), base, scale, eps=1e-6, n=4)
    assert torch.equal(got[0], mixed)
    assert torch.equal(got[1], new_post)
    assert torch.equal(got[2], hc.sinkhorn(logits, 20, 1e-6))
    assert torch.equal(got[3], rms_norm(hc.collapse(mixed, pre), norm, 1e-6))
    assert torch.equal(values(got), numerics.fake_quant_fp8(got[3], numerics.ACT_BLOCK).float())


def test_gram_matrix_gives_the_norm_of_the_collapsed_vector():
    """What the kernels rely on: pre^T G pre is the collapsed vector's square, but for its rounding to bfloat16."""
    streams = ref.make_inputs(9, 4096)[1].float()
    pre = torch.rand(9, 4, generator=torch.Generator().manual_seed(9))
    gram = streams @ streams.transpose(1, 2)
    square = (pre.unsqueeze(1) @ gram @ pre.unsqueeze(2)).flatten()
    rounded = hc.collapse(streams.bfloat16(), pre).float().square().sum(-1)
    assert (square / rounded - 1).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"streams": torch.zeros(3, 4, 128)}, "bfloat16"),
        ({"fn": torch.zeros(24, 4)}, r"\(24, 512\)"),
        ({"y": torch.zeros(2, 128).bfloat16()}, r"y is \(2, 128\)"),
        ({"old_comb": None}, "post and comb"),
    ],
)
def test_other_shapes_are_refused(wrong, message):
    names = ("y", "streams", "old_post", "old_comb", "fn", "base", "scale", "norm")
    inputs = dict(zip(names, ref.make_inputs(3, 128), strict=True))
    with pytest.raises(ConfigError, match=message):
        site(**(inputs | wrong))


def test_kernels_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_on_the_device(case):
    """Within the format's tolerance, the same bits again, and the bits of a token by itself."""
    inputs = ref.make_inputs(*case, device="cuda")
    got = site(*inputs, **OPTIONS)
    found = errors(got, ref.forward(*inputs, **OPTIONS))
    assert all(off < most for off, most in zip(found, ON_DEVICE, strict=True)), found
    assert all(map(torch.equal, got, site(*inputs, **OPTIONS)))
    tokens = case[0]
    if tokens <= 128:
        left = Parts(torch.randn(3, *case, device="cuda"), torch.randn(2, tokens, 4, case[1], device="cuda"))
        for y in (left, left._replace(routed=None)):
            assert all(map(torch.equal, site(y, *inputs[1:], **OPTIONS), site(y.whole(), *inputs[1:], **OPTIONS)))
    # Up to 128 tokens any may be alone; longer calls have arithmetic of their own, in which 129 are the fewest.
    part = slice(tokens // 2, tokens // 2 + 1) if tokens <= 128 else slice(0, 129)
    alone = site(*(each[part].contiguous() for each in inputs[:4]), *inputs[4:], **OPTIONS)
    assert all(torch.equal(a, b[part]) for a, b in zip(alone, got, strict=True))
