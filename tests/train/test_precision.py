"""FP8 products and their gradients, the quantised stage's rounding, FP4 in FP8, the chunked loss."""

from __future__ import annotations

import pytest
import torch
from tests.train.small import packed, small_model

from pelagos import numerics
from pelagos.errors import CheckpointError
from pelagos.numerics import fake_quant_fp8
from pelagos.train.data import IGNORE
from pelagos.train.objective import LossWeights, chunked_token_loss, losses, token_loss
from pelagos.train.precision import Stored, fp4_binades, fp8_product, set_precision


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 100, 128, 300])
def test_every_product_is_of_fp8_operands(tokens):
    x, weight = drawn(tokens, 160).requires_grad_(), drawn(96, 160, seed=1).requires_grad_()
    grad = drawn(tokens, 96, seed=2)
    out = fp8_product(x, weight)
    out.backward(grad)
    plain_x, plain_w = x.detach(), weight.detach()
    x8, w8 = fake_quant_fp8(plain_x, (1, 128)), fake_quant_fp8(plain_w, (128, 128))
    torch.testing.assert_close(out, x8 @ w8.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, fake_quant_fp8(grad, (1, 128)) @ w8, rtol=1e-5, atol=1e-4)
    turned = [fake_quant_fp8(t.T.contiguous(), (1, 128)) for t in (grad, plain_x)]  # blocks along the summed tokens
    torch.testing.assert_close(weight.grad, turned[0] @ turned[1].T, rtol=1e-5, atol=1e-4)
    for got, exact in ((out, plain_x @ plain_w.T), (x.grad, grad @ plain_w), (weight.grad, grad.T @ plain_x)):
        off = float((got - exact).detach().norm() / exact.norm())
        assert 0.001 < off < 0.06  # E4M3 keeps three bits; equal would mean it was not quantised


def test_blocks_of_a_weight_keep_their_codes_when_transposed():
    weight = drawn(200, 300)
    assert torch.equal(fake_quant_fp8(weight, (128, 128)).T, fake_quant_fp8(weight.T.contiguous(), (128, 128)))


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
    packed4, scale = numerics.encode_fp4(weight)
    codes, block = numerics.fp4_to_fp8(packed4, scale)
    assert torch.equal(numerics.decode_fp8(codes, block, numerics.FP8_BLOCK), numerics.fake_quant_fp4(weight))
    with torch.no_grad():
        weight[0] *= 2.0**-20
    assert fp4_binades(model) > numerics.LOSSLESS_BINADES
    with pytest.raises(CheckpointError, match="binades"):
        numerics.fp4_to_fp8(*numerics.encode_fp4(weight))


def test_stored_rounds_and_keeps_masters():
    model = small_model(1)
    norm = model.get_parameter("norm.weight")
    with torch.no_grad():
        norm.add_(1e-4)
    stored = Stored(model)
    assert torch.equal(norm, norm.bfloat16().float())
    for _ in range(20):  # moves far below a bfloat16 step add up in the master
        stored.unround()
        with torch.no_grad():
            norm.add_(1e-3)
        stored.keep()
    assert float(norm.detach().mean()) == pytest.approx(1.0201, abs=4e-3)
    assert float(stored.masters["norm.weight"].mean()) == pytest.approx(1.0201, abs=1e-5)
    assert {n.split(".")[-1] for n in stored.masters} == {"weight"}


@pytest.mark.parametrize("chunk", [1, 5, 11, 64])
def test_chunked_loss_is_the_loss(chunk):
    hidden, head = drawn(7, 8).double(), drawn(11, 8, seed=1).double()
    targets = torch.tensor([3, IGNORE, 0, 10, IGNORE, 4, 5])
    pairs = []
    for loss in (token_loss, lambda *a: chunked_token_loss(*a, chunk=chunk)):
        h, w = hidden.float().requires_grad_(), head.float().requires_grad_()
        value = loss(h, w, targets)
        value.backward()
        pairs.append((value.detach(), h.grad, w.grad))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert chunked_token_loss(hidden.float(), head.float(), torch.full((7,), IGNORE)) == 0
