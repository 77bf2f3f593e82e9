"""What `kernels.router` computes: sqrtsoftplus scores, choice, weights, the shared expert's first product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pelagos import numerics
from pelagos.kernels.batch_rows import Routed
from pelagos.kernels.ref.experts import route
from pelagos.kernels.ref.gemm import elementwise
from pelagos.kernels.ref.skinny_gemm import decoded
from pelagos.kernels.ref.tiles import best


def make_inputs(
    tokens: int, experts: int, picks: int, width: int, inner: int, hashed: bool, *, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor | None, ...]:
    """Return random inputs, from x to shared13_scales, as `kernels.router.route` takes them."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    x = torch.randn(tokens, width, **options).bfloat16()
    codes, scales = numerics.encode_fp8(x, numerics.ACT_BLOCK)
    gate = torch.zeros(experts + -experts % 64, width, dtype=torch.bfloat16, device=device)
    gate[:experts] = torch.randn(experts, width, **options) * width**-0.5
    bias = None if hashed else torch.randn(experts, **options) * 0.1
    table = torch.rand(100, experts, **options).topk(picks).indices if hashed else None
    ids = torch.randint(0, 100, (tokens,), dtype=torch.int32, **options)
    shared = torch.randn(2 * inner, width, **options) * width**-0.5
    shared13, shared_scales = numerics.encode_fp8(shared, numerics.FP8_BLOCK)
    return (x, codes.view(torch.uint8), scales.view(torch.uint8), gate, bias, table, ids,
            shared13.view(torch.uint8), shared_scales.view(torch.uint8))  # fmt: skip


def forward(
    x: Tensor, codes: Tensor, scales: Tensor, gate: Tensor, bias: Tensor | None, table: Tensor | None, ids: Tensor,
    shared13: Tensor, shared13_scales: Tensor, *, experts: int, picks: int, scaling: float,
) -> Routed:  # fmt: skip
    """Return chosen, weights and the shared expert's gate and up; see `kernels.router.route`."""
    scores = elementwise(functional.softplus, x.float() @ gate[:experts].float().T).sqrt()
    if table is not None:
        chosen = table[ids.long()]
    else:
        assert bias is not None
        chosen = best(scores + bias, picks)
        order = (scores + bias).gather(1, chosen).argsort(dim=1, descending=True, stable=True)
        chosen = chosen.gather(1, order)
    shared = decoded(codes, scales, numerics.ACT_BLOCK) @ decoded(shared13, shared13_scales, numerics.FP8_BLOCK).T
    return Routed(chosen.int(), route(scores, chosen, scaling), shared)
