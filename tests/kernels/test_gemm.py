"""Products whose sums have an order: against that order spelled out, and against themselves in other shapes."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pelagos.kernels.ref import gemm


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def added_in_turn(x: Tensor, weight: Tensor, block: int, fused: bool) -> Tensor:
    """Sum columns one after another within each block, with one rounding a column or two; then the blocks."""
    total = None
    for begin in range(0, x.shape[-1], block):
        sums = torch.zeros(*x.shape[:-1], weight.shape[0])
        for i in range(begin, min(begin + block, x.shape[-1])):
            product = x[..., i, None].double() * weight[:, i].double()
            sums = ((product if fused else product.float().double()) + sums.double()).float()
        total = sums if total is None else total + sums
    assert total is not None
    return total


def is_in_order(got: Tensor, x: Tensor, weight: Tensor, block: int) -> bool:
    return any(torch.equal(got, added_in_turn(x, weight, block, fused)) for fused in (True, False))


@pytest.mark.parametrize("inputs", [3, 192, 193, 512])
def test_ordered_linear(inputs: int) -> None:
    x, weight = normal(2, 3, inputs), normal(24, inputs, seed=2)
    got = gemm.ordered_linear(x, weight)
    assert is_in_order(got, x, weight, gemm.SUM_BLOCK)
    torch.testing.assert_close(got, functional.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_order_is_one_of_many() -> None:
    """Another block gives other last bits, so the test above can fail."""
    x, weight = normal(4, 512), normal(24, 512, seed=2)
    assert not is_in_order(gemm.ordered_linear(x, weight), x, weight, 256)


@pytest.mark.parametrize(("groups", "inputs"), [(1, 40), (2, 300), (3, 64)])
def test_grouped_projection(groups: int, inputs: int) -> None:
    x, weight = normal(2, 3, groups, inputs), normal(groups, 16, inputs, seed=2)
    plain, ordered = gemm.grouped_projection(x, weight), gemm.grouped_projection(x, weight, ordered=True)
    for group in range(groups):
        torch.testing.assert_close(plain[:, :, group], x[:, :, group] @ weight[group].T)
        assert is_in_order(ordered[:, :, group], x[:, :, group], weight[group], inputs)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", [gemm.ordered_linear, gemm.quantized_linear])
def test_a_row_does_not_see_its_neighbours(form: object, threads: int) -> None:
    x, weight = normal(37, 512), normal(24, 512, seed=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    whole = form(x, weight)  # pyright: ignore[reportCallIssue]
    parts = [form(x[i : i + 1], weight) for i in range(37)]  # pyright: ignore[reportCallIssue]
    torch.set_num_threads(before)
    assert torch.equal(torch.cat(parts), whole)


def test_quantized_linear_rounds_once() -> None:
    x, weight = normal(5, 300), normal(8, 300, seed=2)
    got = gemm.quantized_linear(x, weight)
    assert got.dtype == torch.float32
    for row in range(5):
        for out in range(8):
            exact = sum(a * b for a, b in zip(x[row].tolist(), weight[out].tolist(), strict=True))
            assert float(got[row, out]) == pytest.approx(exact, rel=2**-23, abs=1e-12)


@pytest.mark.parametrize("form", [gemm.linear, gemm.quantized_linear, gemm.ordered_linear])
def test_other_carriers_take_the_plain_product(form: object) -> None:
    x, weight = normal(5, 64).bfloat16(), normal(8, 64, seed=2)
    got = form(x, weight)  # pyright: ignore[reportCallIssue]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, functional.linear(x, weight.bfloat16()))
    grouped = gemm.grouped_projection(x.view(1, 5, 1, 64), weight.bfloat16().unsqueeze(0), ordered=True)
    torch.testing.assert_close(grouped[0, :, 0], got)


def test_gradient_of_the_ordered_sum() -> None:
    x, weight, grad = normal(2, 3, 2, 300), normal(2, 16, 300, seed=2), normal(2, 3, 2, 16, seed=3)
    found = []
    for ordered in (False, True):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = gemm.grouped_projection(*leaves, ordered=ordered)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    assert torch.equal(found[1][0], gemm.grouped_projection(x, weight, ordered=True))  # the same with a gradient
    for plain, ordered in zip(*found, strict=True):
        torch.testing.assert_close(ordered, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [torch.sigmoid, functional.softplus, torch.exp])
def test_steady_functions_do_not_see_the_shape(function: object) -> None:
    x = normal(6, 100)
    whole = gemm.elementwise(function, x)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(whole, function(x))  # pyright: ignore[reportCallIssue]
    for begin, end in ((0, 1), (3, 20), (17, 100), (64, 65)):
        part = gemm.elementwise(function, x[:, begin:end])  # pyright: ignore[reportArgumentType]
        assert part.shape == (6, end - begin)
        assert torch.equal(part, whole[:, begin:end])
