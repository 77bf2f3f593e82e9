"""FP8 gradients through a model, the quantised stage's rounding, FP4 in FP8."""

from __future__ import annotations

import pytest
import torch
from tests.train.small import packed, small_model

from pelagos import numerics
from pelagos.model.experts import Experts
from pelagos.model.layers import Linear
from pelagos.train.objective import LossWeights, losses
from pelagos.train.precision import Stored, fp4_binades, set_precision


@pytest.mark.parametrize("kind", ["fp8", "released"])
def test_gradients_of_a_quantised_step_are_near_the_plain_ones(kind):
    """Straight through: each tensor's gradient points where the plain one does, none is lost."""
    found = []
    for which in ("bf16", kind):
        model = small_model(1)
        set_precision(model, which, fp8=True)
        losses(model, *packed([[128, 100]], 256), LossWeights(indexer=0.1), dense=True).total.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    weights = [n for n in found[0] if n.endswith(("w13", "w2", "wq_a.weight", "wo_b.weight", "wkv.weight"))]
    for name in weights:
        cosine = torch.cosine_similarity(found[0][name].flatten(), found[1][name].flatten(), 0)
        assert cosine > 0.8, (name, cosine)


def test_fp8_loss_stays_near_bf16s():
    model = small_model(1)
    batch = packed([[128, 100]], 256)
    values = {}
    for kind in ("bf16", "fp8"):
        set_precision(model, kind)
        with torch.no_grad():
            values[kind] = float(losses(model, *batch, LossWeights(), dense=True).next_token)
    assert values["fp8"] != values["bf16"]
    assert values["fp8"] == pytest.approx(values["bf16"], rel=0.005)


def test_fp8_gradients_leave_the_quantised_forward_alone():
    """Trainer = server: whether gradients are FP8 or not, the forward of the quantised stage keeps its bits."""
    out = []
    for fp8 in (False, True):
        model = small_model(1)
        set_precision(model, "released", fp8=fp8)
        with torch.no_grad():
            out.append(model(torch.arange(100)[None]))
    assert torch.equal(*out)


def test_fp4_weights_pass_through_fp8_without_loss():
    model = small_model(1)
    assert 0 <= fp4_binades(model) <= numerics.LOSSLESS_BINADES
    weight = model.layers[0].ffn.experts.w2.detach()[0]
    stored = numerics.fake_quant_fp4(weight)
    assert torch.equal(numerics.fake_quant_fp8(stored, numerics.FP8_BLOCK), stored)
    with torch.no_grad():
        weight[0] *= 2.0**-20
    assert fp4_binades(model) > numerics.LOSSLESS_BINADES
    stored = numerics.fake_quant_fp4(weight)
    assert not torch.equal(numerics.fake_quant_fp8(stored, numerics.FP8_BLOCK), stored)


def test_stored_rounds_and_keeps_masters():
    model = small_model(1)
    norm = model.get_parameter("norm.weight")
    with torch.no_grad():
        norm.add_(1e-4)
    stored = Stored(model)
    assert torch.equal(norm, norm.bfloat16().float())
    for _ in range(20):  # moves far below a bfloat16 step add up in the master
        with stored, torch.no_grad():
            norm.add_(1e-3)
    assert float(norm.detach().mean()) == pytest.approx(1.0201, abs=4e-3)
    assert float(stored.masters["norm.weight"].mean()) == pytest.approx(1.0201, abs=1e-5)
    assert {n.split(".")[-1] for n in stored.masters} == {"weight"}


@pytest.mark.parametrize("kind", ["bf16", "fp8", "released"])
def test_micro_batches_under_way_keep_one_cast_of_a_weight(kind):
    """Autograd holds the same storage for two forwards, in BF16; after an update it is made anew."""
    model, graphs = small_model(1), []
    model.carrier = torch.bfloat16
    set_precision(model, kind)
    held: list[dict[int, torch.Tensor]] = [{}, {}]
    for seen in held:

        def keep(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            graphs.append(losses(model, *packed([[128, 100]], 256), LossWeights(), dense=True).total)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shared = sum(held[0][place].untyped_storage().nbytes() for place in (held[0].keys() & held[1].keys()) - own)
    # Compressors take float32 as it is, an indexer's inputs want no gradient, the head is the loss's own.
    modules = [m for n, m in model.named_modules() if not {"compressor", "indexer", "head"} & set(n.split("."))]
    linear = [m for m in modules if isinstance(m, Linear) and m.product is None]  # FP8 products quantise for each way
    experts = [m for m in modules if isinstance(m, Experts) and m.master]
    weights = [m.weight for m in linear] + [w for m in experts for w in (m.w13, m.w2)]
    assert shared >= 2 * sum(weight.numel() for weight in weights) > 0
    sum(graphs).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        fresh = [m.effective_weight(torch.bfloat16) for m in linear]
    assert all(torch.equal(m.effective_weight(torch.bfloat16), weight) for m, weight in zip(linear, fresh, strict=True))
