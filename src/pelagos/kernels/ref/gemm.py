"""Products, and what makes them and functions steady in `released` mode when the carrier is float32.

The released run is met only if no value on a border of the next quantisation falls to the other side, so there
sums are exact (float64, rounded once) or in an order of ours: no BLAS, thread count or shape has a say. Other
carriers and the reference mode take the plain product. Source: inference/model.py linear, Attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

VECTOR_ELEMENTS = 64  # float32 elements that a CPU kernel takes at once, unrolling included
SUM_COLUMNS = 8
THREAD_ELEMENTS = 32768  # torch's grain: elements for which one more thread joins
SUM_BLOCK = 192  # columns that the recorded run's BLAS adds one after another before their sum joins the total


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (..., I) @ weight (O, I)^T in x's dtype."""
    return functional.linear(x, weight.to(x.dtype))


def quantized_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `linear` of operands that stand for FP8 or FP4 ones: a float32 product is summed in float64."""
    if x.dtype != torch.float32:
        return linear(x, weight)
    return functional.linear(x.double(), weight.double()).float()


def ordered_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `linear`, a float32 product summed column by column in blocks of 192."""
    if x.dtype != torch.float32:
        return linear(x, weight)
    return _in_order(x.unsqueeze(-2), weight.float().unsqueeze(0), SUM_BLOCK).squeeze(-2)


def grouped_projection(x: Tensor, weight: Tensor, *, ordered: bool = False) -> Tensor:
    """Return each group's product, x (B, S, G, I) with weight (G, R, I) in x's dtype -> (B, S, G, R).

    `ordered` sums a float32 product column by column. In the golden vectors one value of it lies 1e-7 of its
    terms from an e4m3 border, and a float64 sum rounds it away from the recorded run; later positions all see it.
    """
    if not ordered or x.dtype != torch.float32:
        groups = torch.bmm(x.flatten(0, 1).transpose(0, 1), weight.transpose(1, 2))
        return groups.transpose(0, 1).unflatten(0, x.shape[:2])
    return _in_order(x, weight, weight.shape[2])


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return function(x), an element's last bit the same in any shape.

    Torch on a CPU takes what is left over after whole vectors by another path, so here no thread has anything left
    over: it gives each of the threads it takes, one per 32,768 elements, an equal share.
    """
    if x.is_cuda:
        return function(x)
    threads = min(torch.get_num_threads(), -(-x.numel() // THREAD_ELEMENTS))
    missing = -x.numel() % (VECTOR_ELEMENTS * max(1, threads))
    if missing == 0 and x.is_contiguous():
        return function(x)
    return function(functional.pad(x.flatten(), (0, missing)))[: x.numel()].view(x.shape)


def ordered_sum(x: Tensor, dim: int) -> Tensor:
    """Return the sum of x over `dim`, one slice added after another: an order that no shape and no device changes.

    More than eight slices are added in columns first, eight of them where they divide the slices.
    """
    slices = x.shape[dim]
    if slices > SUM_COLUMNS and slices % SUM_COLUMNS == 0:
        dim %= x.dim()
        x = ordered_sum(x.unflatten(dim, (-1, SUM_COLUMNS)), dim)
    total, *rest = x.unbind(dim)
    for part in rest:
        total = total + part
    return total


def _in_order(x: Tensor, weight: Tensor, block: int) -> Tensor:
    """Multiply x (..., G, I) by weight (G, R, I) in float32: (..., G, R), columns added in turn within each block.

    A weighted bag adds its table rows one after another (by fused multiply-add): a sequential sum in one call.
    """
    groups, rows, inner = weight.shape
    table = weight.transpose(1, 2).reshape(groups * inner, rows).contiguous()
    place = torch.arange(x.numel(), device=x.device)
    starts = place[::inner, None] + place[:inner:block]
    bags = (place % (groups * inner), table, starts.flatten())
    sums = functional.embedding_bag(*bags, mode="sum", per_sample_weights=x.flatten())
    return ordered_sum(sums.view(*x.shape[:-1], -1, rows), -2)
