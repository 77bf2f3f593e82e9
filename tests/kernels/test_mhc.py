"""Hyper-connections in training: the reference against the model's functions, the Triton kernels against autograd."""

from __future__ import annotations

import pytest
import torch
from triton_cases import error, run

from pelagos.errors import ConfigError
from pelagos.kernels import mhc
from pelagos.kernels.ref import hyper_connection as hc
from pelagos.kernels.ref import mhc as ref

NAMES = ("y", "post", "comb", "streams", "fn", "base", "scale")
RESULTS = ("streams", "x", "post", "comb")

SCRIPT = """
import torch
torch.set_num_threads(1)
from pelagos.kernels.ref import mhc as ref
from test_mhc import through_kernels, through_reference, worst
for case in ref.CASES[: ref.SMALL]:
    for pending, mixing in ((True, True), (False, True), (True, False)):
        inputs = ref.make_inputs(*case, dtype=torch.float32)
        got = through_kernels(inputs, pending, mixing)
        want = through_reference(inputs, pending, mixing)
        assert got.keys() == want.keys()
        off = worst(got, want)
        assert off[0] < 2e-5, (case, pending, mixing, off)
print("compared")
"""


def weights_of(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scalar(results: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """One number that depends on every result, each by weights of its own, which BFloat16 holds: so it does grads."""
    parts = [(weights_of(t.shape, i).bfloat16().to(t.device) * t.float()).sum() for i, t in enumerate(results)]
    return torch.stack(parts).sum()


def leaves(inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    y, streams, post, comb, fn, base, scale = (t.detach().clone().requires_grad_() for t in inputs)
    return dict(zip(NAMES, (y, post, comb, streams, fn, base, scale), strict=True))


def collected(named: dict[str, torch.Tensor], results: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    scalar(results).backward()
    found = {f"grad {name}": t.grad for name, t in named.items() if t.grad is not None}
    return found | dict(zip(RESULTS, (t.detach() for t in results), strict=False))


def through_reference(inputs, pending=True, mixing=True, stored: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Under plain autograd in the inputs' dtype; with `stored` the streams have its values and gradients do not."""
    t = leaves(inputs)
    entered = hc.hc_post(t["y"], t["streams"], t["post"], t["comb"]) if pending else t["streams"] * 1
    if stored:
        entered = entered + (entered.to(stored).to(entered.dtype) - entered).detach()
    entering = hc.enter(entered, t["fn"], t["base"], t["scale"], **ref.OPTIONS) if mixing else ()
    return collected(t, (entered, *entering))


def through_kernels(inputs, pending=True, mixing=True) -> dict[str, torch.Tensor]:
    t = leaves(inputs)
    before = (t["y"], t["post"], t["comb"]) if pending else (None, None, None)
    after = (t["fn"], t["base"], t["scale"]) if mixing else (None, None, None)
    options = ref.OPTIONS if mixing else {"iters": 0, "eps": 0.0, "norm_eps": 0.0}
    from pelagos.kernels.triton.mhc import Site

    results = Site.apply(*before, t["streams"], *after, *options.values())
    return collected(t, results if mixing else results[:1])


def worst(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> tuple[float, str]:
    return max((error(got[name], want[name]), name) for name in want)


def test_reference_is_the_models_site():
    y, streams, post, comb, fn, base, scale = ref.make_inputs(5, 64)
    out, x, new_post, new_comb = mhc.site((y, post, comb), streams, fn, base, scale, **ref.OPTIONS)
    mixed = hc.hc_post(y, streams, post, comb)
    pre, wanted_post, logits = hc.split_mix(hc.mix_logits(mixed, fn, 1e-6), base, scale, eps=1e-6, n=4)
    wanted = (mixed, hc.collapse(mixed, pre), wanted_post, hc.sinkhorn(logits, 20, 1e-6))
    assert all(map(torch.equal, (out, x, new_post, new_comb), wanted))
    assert torch.equal(mhc.leave((y, post, comb), streams), mixed)


def test_peer_bug_mhc_transpose():
    """X'_k sums comb[j, k] X_j over the first index; two trainers shipped the other one. Its gradient: the second."""
    y, streams, post, comb, *_ = (t.float() for t in ref.make_inputs(3, 64))
    streams.requires_grad_()
    out = mhc.leave((y, post, comb), streams)
    by_hand = torch.zeros_like(out)
    for k in range(4):
        by_hand[:, k] = post[:, k, None] * y + sum(comb[:, j, k, None] * streams[:, j] for j in range(4))
    torch.testing.assert_close(out, by_hand, rtol=1e-6, atol=1e-6)
    transposed = mhc.leave((y, post, comb.transpose(1, 2)), streams)
    assert error(transposed.detach(), by_hand.detach()) > 0.1
    grad = weights_of(out.shape, 0)
    out.backward(grad)
    wanted = torch.stack([sum(comb[:, j, k, None] * grad[:, k] for k in range(4)) for j in range(4)], 1)
    torch.testing.assert_close(streams.grad, wanted, rtol=1e-5, atol=1e-6)


def test_gradient_of_the_reference():
    """Against finite differences in float64: the site alone, then behind another."""
    inputs = [t.double().requires_grad_() for t in ref.make_inputs(2, 64)]

    def whole(y, streams, post, comb, fn, base, scale):
        entered = post.unsqueeze(-1) * y.unsqueeze(-2) + torch.einsum("tjk,tjd->tkd", comb, streams)
        flat = entered.flatten(-2)
        mix = flat @ fn.T * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
        pre, new_post, logits = hc.split_mix(mix, base, scale, eps=1e-6, n=4)
        return (pre.unsqueeze(-1) * entered).sum(-2), new_post, hc.sinkhorn(logits, 3, 1e-6)

    assert torch.autograd.gradcheck(whole, inputs, fast_mode=True)
    plain = through_reference(tuple(t.detach().float() for t in inputs))
    assert set(plain) == {f"grad {n}" for n in NAMES} | set(RESULTS)


@pytest.mark.parametrize("wrong", [{"streams": (3, 4, 60)}, {"streams": (3, 3, 64)}])
def test_other_shapes_are_refused_on_a_device(wrong, monkeypatch):
    y, _, post, comb, fn, base, scale = ref.make_inputs(3, 64)
    streams = torch.zeros(wrong["streams"], dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"multiple of 64"):
        mhc._apply((y, post, comb), streams, fn, base, scale, 20, 1e-6, 1e-6)


def test_kernels_in_the_interpreter():
    """Values and all seven gradients, as first, middle and last site, against autograd in float32."""
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", ref.CASES, ids=str)
def test_kernels_on_the_device(case):
    inputs = ref.make_inputs(*case, device="cuda")
    got = through_kernels(inputs)
    # In BFloat16 autograd rounds gradients of streams at each use, 3e-3 in `comb`'s: more than the kernels do.
    want = through_reference(tuple(t.double() for t in inputs), stored=torch.bfloat16)
    off = {name: error(got[name], value) for name, value in want.items()}
    least = {name: 1e-2 if got[name].dtype == torch.bfloat16 else 2e-3 for name in want}
    assert all(off[name] < least[name] for name in want), off
    again = through_kernels(inputs)
    assert all(torch.equal(got[name], again[name]) for name in got)
