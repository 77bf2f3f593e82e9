"""A compressor of training: the kernels against autograd of the model's own."""

from __future__ import annotations

import pytest
import torch
from triton_cases import error, run

from pelagos.kernels import compressor
from pelagos.kernels.ref import compress

SCRIPT = """
import torch
torch.set_num_threads(1)
from test_compressor import worst
for case in ((22, 24, 4, 16, True), (40, 16, 8, 24, False), (260, 8, 128, 16, False)):
    off = worst(*case)
    assert off < 1e-5, (case, off)
print("compared")
"""


def plain(x, wkv, wgate, ape, opens, ratio, width, overlap):
    """As `model.attention.Compressor` before its norm."""
    count, place = opens.shape[1], torch.arange(x.shape[1], device=x.device) % ratio
    kv, score = x @ wkv.T, x @ wgate.T + ape[place]
    if not overlap:
        return compress.pool_windows(*(t[:, : count * ratio].unflatten(1, (count, ratio)) for t in (kv, score)))
    padded = (torch.nn.functional.pad(kv, (0, 0, ratio, 0)), torch.nn.functional.pad(score, (0, 0, ratio, 0)))
    layout = {"dim": width, "first": ratio, "count": count, "ratio": ratio}
    values, scores = (compress.overlap_slots(t, **layout) for t in padded)
    hidden = opens.unsqueeze(-1) & (torch.arange(2 * ratio, device=x.device) < ratio)
    return compress.pool_windows(values, scores.masked_fill(hidden.unsqueeze(-1), -torch.inf))


def worst(length, inputs, ratio, width, overlap, *, device="cpu", dtype=torch.float32) -> float:
    generator = torch.Generator().manual_seed(0)
    span, count = width * (1 + overlap), length // ratio
    shapes = ((2, length, inputs), (span, inputs), (span, inputs), (ratio, span))
    drawn = [
        torch.randn(shape, generator=generator) * (1 if i in (0, 3) else inputs**-0.5) for i, shape in enumerate(shapes)
    ]
    drawn[:3] = [t.to(dtype).float() for t in drawn[:3]]
    opens = torch.zeros(2, count, dtype=torch.bool)
    opens[:, 0] = opens[1, count // 2] = True
    up = torch.randn(2, count, width, generator=generator)
    found = []
    for kernels in (True, False):
        learnt = [t.to(device).requires_grad_() for t in drawn]
        x = learnt[0].to(dtype) if kernels else learnt[0]
        given = (x, *learnt[1:], opens.to(device))
        out = compressor.pool(*given, ratio=ratio, width=width) if kernels else plain(*given, ratio, width, overlap)
        found.append([out.detach(), *torch.autograd.grad(out, learnt, up.to(out))])
    return max(error(a, b) for a, b in zip(*found, strict=True))


def test_kernels_in_the_interpreter():
    """Entries and four gradients: overlapping windows of several samples, rows that close no window, long windows."""
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", [(2048, 512, 4, 128, True), (2048, 256, 4, 64, True), (2048, 512, 128, 128, False)])
def test_kernels_on_the_device(case):
    torch.backends.cuda.matmul.allow_tf32 = False
    assert worst(*case, device="cuda", dtype=torch.bfloat16) < 1e-2
