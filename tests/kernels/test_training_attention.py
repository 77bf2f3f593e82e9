"""Attention in training: the reference against the model's attention, the Triton kernels against its autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_cases import error, run

from pelagos.errors import ConfigError
from pelagos.kernels import training_attention as op
from pelagos.kernels.ref import training_attention as ref
from pelagos.kernels.ref.attention import sparse_attention, window_mask

LEARNT = ("q", "rows", "entries", "sink")

SCRIPT = """
import torch
torch.set_num_threads(1)
from pelagos.kernels.ref import training_attention as ref
from test_training_attention import through, worst
for case in ref.CASES[: ref.SMALL]:
    inputs = ref.make_inputs(*case, dtype=torch.float32, batch=1 if case[5] == 0 else 2)
    off = worst(through(inputs, kernels=True), through(inputs, kernels=False))
    assert off[0] < 2e-5, (case, off)
print("compared")
"""

WHOLE = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, ROOT)
from tests.model.test_transformers_parity import randomise
from tests.train.small import packed, small_config
from pelagos.kernels import grouped_experts, mhc
from pelagos.kernels.triton.mhc import Site
from pelagos.kernels.triton.norm_rope import Norm, Rope
from pelagos.kernels.triton.training_attention import Attend
from pelagos.model import Transformer, attention as model_attention, experts, layers
from pelagos.train import forward
from pelagos.train.objective import LossWeights, losses

def site(pending, streams, fn=None, base=None, scale=None, *, iters=0, eps=0.0, norm_eps=0.0, ordered=False):
    lead, (count, width) = streams.shape[:-2], streams.shape[-2:]
    shapes = ((width,), (4,), (4, 4))
    before = [None] * 3 if pending is None else [t.reshape(-1, *s) for t, s in zip(pending, shapes)]
    found = Site.apply(*before, streams.reshape(-1, 4, width), fn, base, scale, iters, eps, norm_eps)
    return [t.view(*lead, *t.shape[1:]) if len(t) else t for t in found]

def attend(q, rows, entries, sink, picked, starts, ends, *, window, ratio):
    return Attend.apply(q, rows, entries, sink, picked, starts, ends, window, ratio)

def rotated(x, table, *, inverse=False):
    return Rope.apply(x, *table, inverse)

def mixture(x, chosen, weights, w13, w2, limit, quantize, multiple=0, hits=None, leave=None):
    return grouped_experts.mixture(x, chosen, weights, w13, w2, limit, quantize, hits, leave)

places = ((mhc, "site"), (mhc, "leave"), (forward, "_attend"), (layers, "rms_norm"), (model_attention, "rms_norm"),
    (model_attention, "apply_rope"), (experts.ops, "mixture"))
model, plain = Transformer(small_config()), [getattr(*place) for place in places]
through = [
    site, lambda pending, streams: site(pending, streams)[0],
    lambda block, *given: forward.attention(block.attn, *given, attend),
    Norm.apply, Norm.apply, rotated, mixture,
]
randomise(model, 5)
for dense in (True, False):
    found = []
    for kernels in (False, True):
        model.zero_grad()
        for place, function in zip(places, through if kernels else plain):
            setattr(*place, function)
        losses(model, *packed([[100]], 128), LossWeights(), dense=dense).total.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    worst = max((float((found[1][n] - g).norm() / (g.norm() + 1e-5)), n) for n, g in found[0].items())
    assert worst[0] < 1e-4, (dense, worst)
print("compared")
"""

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pelagos.kernels.triton import cross_entropy, grouped_experts, index_training, mhc, norm_rope
from pelagos.kernels.triton import training_attention as attention

BF16, F32, I32 = "*bf16", "*fp32", "*i32"
TYPES = dict.fromkeys("q rows entries keys out grad grad_q grad_keys grad_entries y streams x grad_x grad_out grad_y "
    "grad_streams both hidden grad_both by_mix gates logits".split(), BF16)
TYPES |= dict.fromkeys("sink lse weights delta grad_sink post comb mix square base scale pre divisors grad_pre "
    "grad_post grad_comb grad_mix grad_square parts weight grad_weight roots cos sin scores losses "
    "grad_gates".split(), F32)
TYPES |= dict.fromkeys("starts ends hits".split(), I32)
TYPES |= dict(eps="fp32", norm_eps="fp32", limit="fp32", picked="*u8", seen="*u8", places="*i64", targets="*i64")
BOTH = dict(HEADS=8, PADDED=8, WIDTH=128, WINDOW=128, R=128, N=64, SCALE=0.1)
KEYS = dict(HEADS=8, WIDTH=128, WINDOW=128, N=64, STEP=64, SCALE=0.1)
WALK = dict(WIDTH=512, BT=4, BD=256)
INDEX = dict(HEADS=8, WIDTH=64, RATIO=4, N=64)
KINDS = [dict(RATIO=ratio, PICKED=picked) for ratio, picked in ((0, False), (128, False), (4, True))]
KERNELS = [
    (kernel, BOTH | kind) for kernel in (attention._forward_kernel, attention._query_grad_kernel) for kind in KINDS
] + [(attention._key_grad_kernel, KEYS | kind) for kind in KINDS] + [
    (grouped_experts._swiglu_kernel, dict(WIDTH=384, BR=16, BC=128)),
    (grouped_experts._swiglu_grad_kernel, dict(WIDTH=384, BR=16, BC=128)),
    (grouped_experts._sum_kernel, dict(WIDTH=768, PICKS=6, BT=8, BC=256)),
    (norm_rope._norm_kernel, dict(WIDTH=768, PADDED=1024, BR=2)),
    (norm_rope._norm_grad_kernel, dict(WIDTH=768, PADDED=1024, BR=2)),
    (norm_rope._rope_kernel, dict(SIGN=-1.0, HEADS=8, WIDTH=128, BR=16)),
    (mhc._enter_kernel, dict(PENDING=True, **WALK)), (mhc._enter_kernel, dict(PENDING=False, **WALK)),
    (mhc._gates_kernel, dict(WIDTH=512, ITERS=20, BT=128)),
    (mhc._collapse_kernel, WALK), (mhc._pre_grad_kernel, WALK),
    (mhc._gates_grad_kernel, dict(WIDTH=512, ITERS=20, BT=128)),
    (mhc._streams_grad_kernel, dict(PENDING=True, MIX=True, **WALK)),
    (mhc._streams_grad_kernel, dict(PENDING=True, MIX=False, **WALK)),
    (index_training._scores_kernel, INDEX | dict(R=128, PADDED=8)),
    (index_training._query_grad_kernel, INDEX | dict(R=128, PADDED=8)),
    (index_training._key_grad_kernel, INDEX | dict(STEP=64)),
    (index_training._divergence_kernel, dict(BLOCK=512)),
    (cross_entropy._turn_kernel, dict(BLOCK=4096)),
]
for kernel, constants in KERNELS:
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*"}
    many = "PICKED" in constants and "R" in constants
    options = {"num_stages": attention.STAGES, "num_warps": 8 if many else 4}
    source = ASTSource(kernel, signature, places, attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    if "wgmma.mma_async" in ptx:  # no copy to shared memory without a fence, no product in flight behind its iteration
        waits = re.findall(r"wgmma.wait_group.sync.aligned (\\d+)", ptx)
        fences = ptx.count("fence.proxy.async")
        safe = "cp.async" not in ptx and set(waits) == {"0"} and len(waits) == fences
        assert safe, (kernel.fn.__name__, waits, fences)
print("compiled", len(KERNELS))
"""


def through(inputs: dict, *, kernels: bool) -> dict[str, torch.Tensor]:
    """Values and gradients by the kernels or under autograd of the reference."""
    given = dict(inputs)
    for name in LEARNT:
        if given[name] is not None:
            given[name] = given[name].detach().clone().requires_grad_()
    if kernels:
        names = (*LEARNT, "picked", "starts", "ends", "window", "ratio")
        from pelagos.kernels.triton.training_attention import Attend

        out, weights = Attend.apply(*(given[name] for name in names))
    else:
        out, weights = ref.attend(**given)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    found = {f"grad {name}": given[name].grad for name in LEARNT if given[name] is not None}
    return found | {"out": out.detach()} | ({} if weights is None else {"weights": weights})


def worst(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert got.keys() == want.keys()
    return max((error(got[name], want[name]), name) for name in want)


@pytest.mark.parametrize("case", ref.CASES[: ref.SMALL], ids=str)
def test_reference_is_the_models_attention(case):
    """One mask of window, sample and entries here, tiles around the diagonal there."""
    inputs = ref.make_inputs(*case, dtype=torch.float32)
    starts, window, ratio, picked = inputs["starts"], inputs["window"], inputs["ratio"], inputs["picked"]
    length = starts.shape[1]
    padded = torch.nn.functional.pad(inputs["rows"], (0, 0, window, 0))
    entry_mask = None
    if ratio:
        place, at = torch.arange(length // ratio), torch.arange(length)
        entry_mask = (starts[:, ::ratio][:, None, : length // ratio] == starts[:, :, None]) & (
            (place + 1) * ratio <= at[:, None] + 1
        )
        if picked is not None:
            assert (picked & ~entry_mask).sum() == 0
            entry_mask = picked
    masks = (window_mask(0, length, window, starts, starts.device), inputs["entries"], entry_mask)
    out, weights = sparse_attention(inputs["q"], padded, *masks, inputs["sink"], window=window)
    got, summed = ref.attend(**inputs)
    torch.testing.assert_close(got, out, rtol=1e-5, atol=1e-5)
    if weights is not None:
        torch.testing.assert_close(summed, weights.sum(2), rtol=1e-5, atol=1e-5)


def test_gradient_of_the_reference():
    inputs = ref.make_inputs((12, 8), 2, 16, 5, 4, 2, dtype=torch.float64, batch=1)
    learnt = [inputs[name].double().requires_grad_() for name in LEARNT]

    def plain(q, rows, entries, sink):  # the reference's formula without its casts to float32
        at = torch.arange(20)
        near = (at[:, None] - at >= 0) & (at[:, None] - at < 5) & (at >= inputs["starts"].unsqueeze(2))
        logits = torch.einsum("bshc,bkc->bshk", q, torch.cat((rows, entries), 1)) / 4
        logits = logits.masked_fill(~torch.cat((near, inputs["picked"]), 2).unsqueeze(2), -torch.inf)
        chances = torch.cat((logits, sink[:, None].expand(1, 20, 2, 1)), -1).softmax(-1)[..., :-1]
        return torch.einsum("bshk,bkc->bshc", chances, torch.cat((rows, entries), 1))

    assert torch.autograd.gradcheck(plain, learnt, fast_mode=True)
    single = {**inputs, **{name: inputs[name].float() for name in LEARNT}}
    torch.testing.assert_close(ref.attend(**single)[0].double(), plain(*learnt).detach(), rtol=1e-5, atol=1e-5)


def test_widths_are_checked_on_a_device(monkeypatch):
    q = torch.zeros(1, 2, 2, 24)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(ConfigError, match="head_dim=24"):
        op.attend(q, q[:, :, 0], None, q[0, 0, :, 0], None, q, q, window=2, ratio=0)


def test_kernels_in_the_interpreter():
    """Values, entries' weights and four gradients: window alone, ranges of entries, picks; several samples a row."""
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.slow
def test_training_kernels_compile_for_hopper(tmp_path):
    (tmp_path / "script.py").write_text(COMPILE)
    script = f"import runpy; runpy.run_path({str(tmp_path / 'script.py')!r})"
    assert run(script, interpret=False) == "compiled 28\n"


@pytest.mark.slow
def test_a_whole_step_through_the_kernels():
    """Every parameter's gradient of a packed step, dense and sparse: interpreted kernels against the reference."""
    root = str(Path(__file__).resolve().parents[2])
    assert run(WHOLE.replace("ROOT", repr(root)), interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", ref.CASES[ref.SMALL :], ids=str)
def test_kernels_on_the_device(case):
    inputs = ref.make_inputs(*case, device="cuda", batch=1)
    got = through(inputs, kernels=True)
    exact = {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    off = worst(got, through(exact, kernels=False))
    assert off[0] < 2e-2, off
    again = through(inputs, kernels=True)
    assert all(torch.equal(got[name], again[name]) for name in got)
