"""Products, with the sums that the `released` mode takes when the carrier is float32.

The released run is met bit by bit only if no value on a border of the next quantisation falls to the other side,
so those sums are exact or in a fixed order: no BLAS, thread count or batch shape has a say. Other carriers and
the reference mode take the plain product. Source: inference/model.py linear, Attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

SUM_BLOCK = 256  # columns summed one after another before their sum joins the total


def linear(x: Tensor, weight: Tensor, *, quantized: bool = False) -> Tensor:
    """Return x (..., I) @ weight (O, I)^T in x's dtype.

    `quantized` says that the operands stand for FP8 or FP4 ones: a float32 product is then summed in float64.
    """
    if quantized and x.dtype == torch.float32:
        return functional.linear(x.double(), weight.double()).float()
    return functional.linear(x, weight.to(x.dtype))


def grouped_projection(x: Tensor, weight: Tensor, *, ordered: bool = False) -> Tensor:
    """Return each group's product, x (B, S, G, I) with weight (G, R, I) in x's dtype -> (B, S, G, R).

    `ordered` sums a float32 product column by column in blocks of 256. This is the order of the recorded run's
    BLAS, found by trial: one of the golden vectors' values lies so close to an e4m3 border, 1e-7 of its terms,
    that a float64 sum and other float32 orders round it the other way, and all later positions see it.
    """
    if not ordered or x.dtype != torch.float32:
        return torch.einsum("bsgi,gri->bsgr", x, weight)
    groups, rows, inner = weight.shape
    block = math.gcd(inner, SUM_BLOCK)
    table = weight.transpose(1, 2).reshape(groups * inner, rows)
    columns = torch.arange(groups * inner, dtype=torch.int32, device=x.device).view(1, -1, block)
    bags = columns.expand(x.shape[0] * x.shape[1], -1, -1).reshape(-1, block)
    # A weighted bag adds its table rows one after another (by fused multiply-add): a sequential sum in one call.
    sums = functional.embedding_bag(bags, table, per_sample_weights=x.reshape(-1, block), mode="sum")
    total, *rest = sums.view(*x.shape[:3], inner // block, rows).unbind(3)
    for part in rest:
        total = total + part
    return total
