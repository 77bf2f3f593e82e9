"""Which experts a token goes to, and all else of the expert site that reads its input: contract, checks and dispatch.

On CUDA one Triton launch for one token and three for more: the router's product, the shared expert's first one and
the activations as the routed experts read them come out of the same; elsewhere `ref.router`, which defines the meaning.
"""

from __future__ import annotations

from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.batch_rows import Mixing, Routed
from pelagos.kernels.ref import router as ref
from pelagos.kernels.skinny_gemm import BLOCK, COUNTERS, MAX_ROWS, TALL


def route(
    x: Tensor, codes: Tensor, scales: Tensor, gate: Tensor, bias: Tensor | None, table: Tensor | None, ids: Tensor,
    shared13: Tensor, shared13_scales: Tensor, arrived: Tensor, *, experts: int, picks: int, scaling: float,
    left: Mixing | None = None,
) -> Routed:  # fmt: skip
    """Route T tokens.

    x (T, D) bfloat16, codes (T, D) E4M3 and scales (T, D/128) UE8M0 its quantised copy; gate (E', D) bfloat16, rows
    beyond `experts` are padding; bias (E,) float32 for the choice alone, or table (V, K) int64 of the experts of each
    token id, then ids (T,) int32; shared13 (2F, D) E4M3, w1 over w3, with its scales (2F/128, D/128). `arrived` (4096,)
    int32 zeros. A tie goes to the lower expert. What a site has
    `left` is finished beside. Raises ConfigError for other shapes. Source: inference/model.py Gate.
    """
    rows, depth = x.shape
    tiles = -(-rows // MAX_ROWS) * shared13.shape[0] // TALL
    if not rows or tiles >= COUNTERS or depth % BLOCK or gate.shape[0] % TALL or not picks <= experts <= gate.shape[0]:
        raise ConfigError(
            f"router: x {tuple(x.shape)}, gate {tuple(gate.shape)}, {picks} of {experts} experts: expected "
            f"rows with fewer than {COUNTERS} tiles, columns in multiples of {BLOCK} and a gate padded to {TALL} rows"
        )
    if (bias is None) == (table is None):
        raise ConfigError("router: expected either a bias or a table of experts by token id")
    if tuple(shared13.shape[1:]) != (depth,) or shared13.shape[0] % (2 * BLOCK):
        raise ConfigError(
            f"router: shared13 is {tuple(shared13.shape)}, expected (2F, {depth}), F a multiple of {BLOCK}"
        )
    inputs = (x, codes, scales, gate, bias, table, ids, shared13, shared13_scales)
    options = {"experts": experts, "picks": picks, "scaling": scaling}
    if not x.is_cuda:
        return ref.forward(*inputs, **options)
    from pelagos.kernels.triton import router as kernel

    return kernel.forward(*inputs, arrived, **options, left=left)
