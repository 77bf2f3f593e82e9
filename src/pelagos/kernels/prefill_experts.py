"""The routed experts with weights as released, for prompts: contract, checks and dispatch.

On CUDA nine launches without a host synchronisation; elsewhere `ref.prefill_experts`, which defines the meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.dispatch import contract, select

BLOCK = 128
SPARE = 8  # places at which an expert's picks begin
BINADES = 14  # of group scales that E4M3 holds beside the codes' own


def mixture(*operands: Any, shared: Tensor | None = None, place: Tensor | None = None) -> Tensor:
    """Return the sum of all rows (T, D) bfloat16, plus `shared`; operands and errors as `apart` has them."""
    contract("prefill_experts", {"shared": (shared, tuple(operands[0].shape))})
    return apart(*operands, place=place)(slice(None), shared)


def apart(
    codes: Tensor, scales: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor,
    bases: tuple[Tensor, Tensor], limit: float, *, place: Tensor | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    """Compute what chosen experts add; return what sums it, called with a slice of rows and `shared` of those, or None.

    Operands as `fp4_experts.mixture` takes them; `bases` are `base_bytes` of (w13, s13) and (w2, s2); with `place`
    weights are blocks, as `fp4_experts.site` takes them. As released with a BF16 carrier: every product's result and
    the weighted hidden vector are rounded to bfloat16, the sum is float32. Raises ConfigError for other shapes. Source:
    inference/model.py Expert, MoE.
    """
    (tokens, width), (count, outputs, inner) = codes.shape, w2.shape
    inner, experts = 2 * inner, count if place is None else len(place)
    contract("prefill_experts", {
        "codes": (codes, (tokens, outputs)), "scales": (scales, (tokens, width // BLOCK)),
        "chosen": (chosen, tuple(chosen.shape), torch.int32), "weights": (weights, (tokens, chosen.shape[1])),
        "w13": (w13, (count, 2 * inner, width // 2)), "s13": (s13, (count, 2 * inner, width // 32)),
        "w2": (w2, (count, width, inner // 2)), "s2": (s2, (count, width, inner // 32)),
        "bases[0]": (bases[0], (experts, 2 * inner // BLOCK)), "bases[1]": (bases[1], (experts, width // BLOCK)),
    })  # fmt: skip
    if width % BLOCK or inner % BLOCK:
        raise ConfigError(f"prefill_experts: widths {width} and {inner}: expected multiples of {BLOCK}")
    return select("prefill_experts", codes).apart(codes, scales, chosen, weights, w13, s13, w2, s2, bases, limit, place)


def choose(
    logits: Tensor, bias: Tensor | None, table: Tensor | None, ids: Tensor, experts: int, picks: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the experts chosen (T, K) int32 and their weights (T, K) float32.

    logits (T, >= experts) float32; bias (E,) float32 for the choice alone, or table (V, K) int64 of the experts of each
    token id in ids (T,). Scores are sqrt(softplus(logit)), weights the chosen ones' share times `scaling`. Source:
    inference/model.py Gate.
    """
    return select("prefill_experts", logits).choose(logits, bias, table, ids, experts, picks, scaling)


def base_bytes(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the UE8M0 bytes (E, O/128) that group scales are relative to: 2^-6 of the largest of 128 rows.

    weight (E, O, I/2) and scale (E, O, I/32) uint8. To be called once when weights are loaded: it waits for the device.
    Raises ConfigError where a group with values lies more than 14 binades below the largest of its rows.
    """
    base = scale.view(len(scale), -1, BLOCK * scale.shape[2]).amax(-1)
    for expert, (codes, bytes_, top) in enumerate(zip(weight, scale, base, strict=True)):
        low = bytes_.view(len(top), -1).short() < top.short()[:, None] - BINADES
        if bool(low.any()) and bool((codes.view(len(top), -1, 16)[low] & 0x77).any()):
            raise ConfigError(
                f"prefill_experts: group scales of expert {expert} span more than {BINADES} binades within 128 rows: "
                "E4M3 cannot hold them; use fp4_experts in batches of at most 128 tokens"
            )
    return base.clamp_min(7) - 6
