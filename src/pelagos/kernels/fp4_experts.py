"""The experts with weights as released, for decoding: contract, checks and dispatch.

On CUDA Triton launches (four, and one where the router has not listed rows) without a host synchronisation; elsewhere
`ref.fp4_experts`, which defines the meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.batch_rows import Parts, Routed
from pelagos.kernels.dispatch import contract, select
from pelagos.kernels.ref import fp4_experts as ref

BLOCK = 128  # both widths are multiples of it: an activation scale belongs to so many columns
MAX_SCALE_BYTE = 128  # UE8M0 bytes of weights up to 2.0: see `check_scales`


def mixture(
    codes: Tensor, scales: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor,
    limit: float,
) -> Tensor:  # fmt: skip
    """Return the chosen experts' weighted sum (T, D) float32.

    codes (T, D) E4M3 and scales (T, D/128) UE8M0 are the quantised activations; chosen (T, K) int32, weights (T, K)
    float32; w13 (E, 2F, D/2) and w2 (E, D, F/2) packed E2M1 with s13 (E, 2F, D/32) and s2 (E, D, F/32) UE8M0. One-byte
    operands are uint8. Clamped SwiGLU, routing weight and E4M3 quantisation of the hidden vector as released
    (`ref.experts.mixture`). Raises ConfigError for shapes that do not fit. Source: inference/model.py Expert, MoE.
    """
    tokens, width = codes.shape
    inner = w2.shape[2] * 2
    contract("fp4_experts", {
        "scales": (scales, (tokens, width // BLOCK)), "weights": (weights, (tokens, chosen.shape[1])),
        "w13": (w13, (len(w2), 2 * inner, width // 2)), "s13": (s13, (len(w2), 2 * inner, width // 32)),
        "w2": (w2, (len(w2), width, inner // 2)), "s2": (s2, (len(w2), width, inner // 32)),
    })  # fmt: skip
    if width % BLOCK or inner % BLOCK:
        raise ConfigError(f"fp4_experts: widths {width} and {inner}: expected multiples of {BLOCK}")
    return select("fp4_experts", codes).forward(codes, scales, chosen, weights, w13, s13, w2, s2, limit)


def site(
    codes: Tensor, scales: Tensor, routed: Routed, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared2: Tensor,
    shared2_scales: Tensor, limit: float, place: Tensor | None = None, left: bool = False,
    arrived: Tensor | None = None,
) -> Tensor | Parts:  # fmt: skip
    """Return routed and shared experts' sum (T, D) bfloat16 for tokens that `router.route` has routed.

    shared2 (D, F) E4M3 with shared2_scales (D/128, F/128); the rest as `mixture`. The routed experts' sum is float32,
    in the order of the picks; the shared expert's bfloat16 output joins it last. With `place` (E,) int64 the routed
    weights are (1, ...) and an expert's lie so many bytes, a multiple of 256, behind them. With `left` it stays in
    parts on CUDA, for a site to add up. `arrived` (4096,) int32 zeros spares a launch of one token. Raises ConfigError
    for other shapes.
    """
    width, inner = codes.shape[1], w2.shape[2] * 2
    contract("fp4_experts", {
        "shared": (routed.shared, (codes.shape[0], 2 * inner)), "shared2": (shared2, (width, inner)),
        "shared2_scales": (shared2_scales, (width // BLOCK, inner // BLOCK)),
    })  # fmt: skip
    if routed.planes is None:
        if place is not None:
            w13, s13, w2, s2 = (ref.placed(each, place) for each in (w13, s13, w2, s2))
        return ref.site(codes, scales, routed, w13, s13, w2, s2, shared2, shared2_scales, limit)
    from pelagos.kernels.triton import fp4_experts as kernel

    out = None if left else torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    parts = kernel.site(scales, routed, w13, s13, w2, s2, (shared2, shared2_scales), limit, place, out, arrived)
    return parts if out is None else out


def check_scales(scale: Tensor) -> None:
    """Raise ConfigError unless all UE8M0 bytes of a weight are 1..128, the range in which the kernels are exact.

    To be called once when weights are loaded: it waits for the device.
    """
    low, high = int(scale.view(torch.uint8).min()), int(scale.view(torch.uint8).max())
    if low < 1 or high > MAX_SCALE_BYTE:
        raise ConfigError(f"fp4_experts: scale bytes {low}..{high}: expected 1..{MAX_SCALE_BYTE} (weights below 12)")
