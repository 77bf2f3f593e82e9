"""Routed experts of training on CUDA: the kernels between the products against the mixture of the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from triton_cases import error, run

from pelagos.kernels import grouped_experts
from pelagos.kernels.ref import experts as ref

SCRIPT = """
from test_grouped_experts import apart_worst, shared_worst, worst
for case in ((37, 3, 5, 48, 40, 1.5), (8, 2, 4, 32, 136, 10.0)):
    off = worst(*case)
    assert off < 1e-5, (case, off)
assert shared_worst() < 1e-5
assert apart_worst() < 1e-5
print("compared")
"""


def make_inputs(tokens: int, picks: int, experts: int, width: int, inner: int, device: str, dtype: torch.dtype):
    """Return x, chosen, weights, w13, w2 and a gradient; the last expert is never chosen."""
    generator = torch.Generator().manual_seed(0)
    x, up = torch.randn(2, tokens, width, generator=generator)
    chosen = torch.rand(tokens, experts - 1, generator=generator).argsort(1)[:, :picks]
    weights = torch.rand(tokens, picks, generator=generator)
    w13 = torch.randn(experts, 2 * inner, width, generator=generator) * width**-0.5
    w2 = torch.randn(experts, width, inner, generator=generator) * inner**-0.5
    return x.to(device, dtype), chosen.to(device), weights.to(device), w13.to(device), w2.to(device), up.to(device)


def results(mixture, inputs, limit: float) -> list[torch.Tensor]:
    x, chosen, weights, w13, w2, up = inputs
    learnt = [t.detach().clone().requires_grad_() for t in (x, weights, w13, w2)]
    hits = torch.zeros(3, dtype=torch.int64, device=x.device)
    out = mixture(learnt[0], chosen, *learnt[1:], limit, None, hits=hits)
    return [out.detach(), hits, *torch.autograd.grad(out, learnt, up)]


def worst(tokens, picks, experts, width, inner, limit, *, device="cpu", dtype=torch.float32) -> float:
    inputs = make_inputs(tokens, picks, experts, width, inner, device, dtype)
    got = results(grouped_experts.mixture, inputs, limit)
    exact = [t.to(dtype).float() if t.is_floating_point() else t for t in inputs]
    exact[2] = inputs[2]  # routing weights stay float32
    # What lies next to the clamp has to lie on the same side of it: a derivative jumps there.
    reference = functools.partial(ref.mixture, leave=lambda t: t + (t.to(dtype).float() - t).detach())
    want = results(reference, [t.cpu() for t in exact], limit)
    assert not got[4][-1].any()
    assert not got[5][-1].any()
    if dtype == torch.float32:
        assert torch.equal(got[1], want[1])
    return max(error(a.cpu(), b) for a, b in zip(got, want, strict=True) if b.is_floating_point())


def shared_worst(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """The shared expert's SwiGLU, values and gradients."""
    gate, up, grad = torch.randn(3, 50, 24, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    found = []
    for form in (grouped_experts.swiglu, ref.swiglu):
        pair = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        hits = torch.zeros(3, dtype=torch.int64, device=device)
        out = form(*pair, 1.0, hits)
        found.append([out.detach(), hits, *torch.autograd.grad(out, pair, grad.to(out.dtype))])
    return max(error(a, b) for a, b in zip(*found, strict=True))


def apart_worst(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Rows of three sources in one call: their values, and the gradients of the weights each source's own."""
    x, chosen, weights, w13, w2, up = make_inputs(60, 1, 5, 48, 40, device, dtype)
    source = torch.arange(60, device=device) // 20
    stacks = [w.unsqueeze(1).expand(-1, 3, -1, -1).detach().clone().requires_grad_() for w in (w13, w2)]
    out = grouped_experts.mixture(x, chosen * 3 + source[:, None], weights, *stacks, 1.5, None)
    found = [out.detach(), *torch.autograd.grad(out, stacks, up.to(out.dtype))]
    own = [results(grouped_experts.mixture, (x[at], chosen[at], weights[at], w13, w2, up[at].to(dtype)), 1.5)
           for at in (source == s for s in range(3))]  # fmt: skip
    want = [torch.cat([one[0] for one in own]), *(torch.stack([one[i] for one in own], 1) for i in (4, 5))]
    return max(error(a, b) for a, b in zip(found, want, strict=True))


def test_kernels_in_the_interpreter():
    """Sum, clamp counters and the gradients of tokens, routing weights and both stacks, an idle expert among them."""
    assert run(SCRIPT, interpret=True) == "compared\n"


def test_how_many_rows_come_compiles_nothing_anew():
    """With divided experts that is another number each time: multiples of 16, ones and others are one kernel."""
    script = """
import torch
from pelagos.kernels.triton import grouped_experts as made
print([[p.name for p in k.params if p.do_not_specialize]
       for k in (made._swiglu_kernel, made._swiglu_grad_kernel, made._sum_kernel)])
"""
    assert run(script, interpret=False) == "[['count'], ['count'], ['tokens']]\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", [(4096, 6, 32, 512, 256, 10.0), (1000, 4, 20, 256, 128, 1.0)], ids=str)
def test_grouped_experts_on_the_device(case):
    assert worst(*case, device="cuda", dtype=torch.bfloat16) < 2e-2
    assert shared_worst("cuda", torch.bfloat16) < 1e-2
    assert apart_worst("cuda", torch.bfloat16) < 1e-2
    inputs = make_inputs(*case[:-1], "cuda", torch.bfloat16)
    first, again = (results(grouped_experts.mixture, inputs, case[-1]) for _ in range(2))
    assert all(map(torch.equal, first, again))
