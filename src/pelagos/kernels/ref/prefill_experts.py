"""What `kernels.prefill_experts` computes: `experts.mixture` with a BF16 carrier whose products sum in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pelagos import numerics
from pelagos.kernels.ref.experts import route, swiglu
from pelagos.kernels.ref.fp4_experts import decode, placed
from pelagos.kernels.ref.gemm import ordered_sum


def choose(
    logits: Tensor, bias: Tensor | None, table: Tensor | None, ids: Tensor, experts: int, picks: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the chosen experts and their weights; see `kernels.prefill_experts.choose`."""
    scores = functional.softplus(logits[:, :experts]).sqrt()
    if table is not None:
        chosen = table[ids]
    else:
        assert bias is not None
        chosen = (scores + bias).topk(picks, -1).indices
    return chosen.int(), route(scores, chosen, scaling)


def apart(
    codes: Tensor, scales: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor,
    bases: tuple[Tensor, Tensor] | None, limit: float, place: Tensor | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    """Compute picks expert by expert; see `kernels.prefill_experts.apart`. Nothing here needs `bases`."""
    if place is not None:
        w13, s13, w2, s2 = (placed(each, place) for each in (w13, s13, w2, s2))
    x = numerics.decode_fp8(codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), numerics.ACT_BLOCK)
    parts = x.new_zeros((*chosen.shape, x.shape[1]))
    for expert in chosen.unique().tolist():
        token, pick = (chosen == expert).nonzero(as_tuple=True)
        up = (x[token] @ decode(w13[expert], s13[expert]).T).bfloat16()
        gate, other = up.chunk(2, -1)
        hidden = swiglu(gate, other, limit) * weights[token, pick][:, None]
        hidden = numerics.fake_quant_fp8(hidden.bfloat16().float(), numerics.ACT_BLOCK)
        parts[token, pick] = (hidden @ decode(w2[expert], s2[expert]).T).bfloat16().float()

    def added(rows: slice, shared: Tensor | None = None) -> Tensor:
        total = ordered_sum(parts[rows], 1)
        return (total if shared is None else total + shared.float()).bfloat16()

    return added
