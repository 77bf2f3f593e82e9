"""FP8 products in training: every operand of all three is FP8; on a device scaled_mm gives what the carrier gives."""

from __future__ import annotations

import pytest
import torch
from triton_cases import error

from pelagos.kernels.fp8_product import fp8_product
from pelagos.numerics import fake_quant_fp8


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


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 256, 384), (1000, 512, 256), (4096, 768, 2048)], ids=str)
def test_device_multiplies_the_codes(shape):
    tokens, inputs, outputs = shape
    given = (drawn(tokens, inputs), drawn(outputs, inputs, seed=1), drawn(tokens, outputs, seed=2))
    found = []
    for device in ("cuda", "cpu"):
        x, weight, grad = (t.bfloat16().to(device) for t in given)
        x, weight = x.requires_grad_(), weight.float().requires_grad_()
        out = fp8_product(x, weight)
        out.backward(grad)
        found.append([t.detach().cpu() for t in (out, x.grad, weight.grad)])
    for got, want in zip(*found, strict=True):
        assert error(got, want) < 5e-3
