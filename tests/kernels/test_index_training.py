"""The indexer in training: the kernels against autograd of the reference."""

from __future__ import annotations

import pytest
import torch
from triton_cases import error, run

from pelagos.kernels import index_training as op
from pelagos.kernels.ref import training_attention as bounds_of

SCRIPT = """
import torch
torch.set_num_threads(1)
from test_index_training import picks_agree, worst
for case in (((20, 12), 4, 16, 4), ((40,), 3, 32, 4), ((290, 30), 8, 16, 4)):
    off = worst(*case)
    assert off < 1e-5, (case, off)
for entries, topk in ((7, 3), (40, 16), (40, 40)):
    assert picks_agree(entries, topk)
print("compared")
"""


def results(inputs, kernels: bool, visible: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    learnt = [t.detach().clone().requires_grad_() for t in inputs["learnt"]]
    bounds = (inputs["starts"], inputs["ends"])
    if kernels:
        from pelagos.kernels.triton import index_training as kernel

        scores = kernel.Scores.apply(*learnt, *bounds, inputs["ratio"])
        losses = kernel.Divergence.apply(scores, weights, visible)
    else:
        scores = op.index_scores(*(t.cpu() for t in learnt), *bounds, ratio=inputs["ratio"])
        losses = op.divergence(scores, weights.cpu(), visible.cpu())
    rising = torch.linspace(1, 2, losses.numel()).view(losses.shape).to(losses)
    grads = torch.autograd.grad((losses * rising).sum(), learnt)
    return [t.detach().cpu() for t in (scores.masked_fill(~visible.to(scores.device), 0), losses, *grads)]


def worst(lengths, heads, width, ratio, *, device="cpu", dtype=torch.float32, batch=2) -> float:
    given = bounds_of.make_inputs(lengths, heads, width, 8, ratio, 0, batch=batch)
    generator = torch.Generator().manual_seed(1)
    gates = torch.randn(batch, sum(lengths), heads, generator=generator)
    count = given["entries"].shape[1]
    entry, at = torch.arange(count), torch.arange(sum(lengths))
    visible = (entry * ratio >= given["starts"].unsqueeze(2)) & ((entry + 1) * ratio <= at[:, None] + 1)
    weights = torch.rand(visible.shape, generator=generator) * visible
    drawn = [t.to(dtype).to(device) for t in (given["q"], given["entries"], gates)]
    there = {"learnt": drawn, "starts": given["starts"].to(device), "ends": given["ends"].to(device), "ratio": ratio}
    got = results(there, True, visible.to(device), weights.to(device))
    want = results({**there, "learnt": [t.float() for t in drawn]}, False, visible, weights)
    return max(error(a, b) for a, b in zip(got, want, strict=True))


def picks_agree(entries: int, topk: int, *, device: str = "cpu", queries: int = 24) -> bool:
    """Whether the kernel picks what the reference does: many ties, signs, rows that see little or nothing."""
    generator = torch.Generator().manual_seed(entries)
    scores = (torch.randn(2, queries, entries, generator=generator) * 2).round() / 2
    visible = torch.arange(entries) < torch.randint(0, entries + 1, (2, queries, 1), generator=generator)
    if device == "cpu":
        from pelagos.kernels.triton import index_training as kernel

        got = kernel.pick(scores, visible.view(torch.uint8), topk)
    else:
        got = op.pick(scores.to(device), visible.to(device), topk).cpu()
    return torch.equal(got, op.pick(scores, visible, topk))


def test_kernels_in_the_interpreter():
    """Scores, divergence and three gradients; several samples a row, heads that are no power of two."""
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", [((1024, 512, 512), 8, 64, 4), ((8192,), 8, 64, 4)], ids=str)
def test_kernels_on_the_device(case):
    assert picks_agree(case[0][0] // 4, 128, device="cuda", queries=500)
    assert worst(*case, device="cuda", dtype=torch.bfloat16) < 2e-2
