"""Attention in training over packed rows: window, picked or all visible entries, sink; contract and dispatch.

Nothing grows with queries x keys but the picks and the weights the indexer learns from. CUDA takes Triton, whose
backward sums the gradient of each key over its queries in order, without atomics; other devices take
`ref.training_attention`.
"""

from __future__ import annotations

from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.ref import training_attention as ref


def attend(
    q: Tensor, rows: Tensor, entries: Tensor | None, sink: Tensor, picked: Tensor | None, starts: Tensor, ends: Tensor,
    *, window: int, ratio: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return attended values (B, S, H, C) and the entries' weights summed over heads, (B, S, M) float32.

    q (B, S, H, C), rows (B, S, C) one KV row a token, entries (B, M, C) one every `ratio` tokens or None; keys are
    values. Token t sees rows (t - window, t] and entries whose tokens are all of its sample and not after t; of these
    only those `picked` (B, S, M) bool, if given. starts, ends (B, S) int32 bound each token's sample. sink
    (H,) joins the denominator. The weights carry no gradient. Raises ConfigError on CUDA for a C that is no power of
    two in 16..256. Source: technical report 2.3, 3.3.
    """
    if not q.is_cuda:
        return ref.attend(q, rows, entries, sink, picked, starts, ends, window=window, ratio=ratio)
    width = q.shape[-1]
    if width & (width - 1) or not 16 <= width <= 256:
        raise ConfigError(f"training attention: head_dim={width} on {q.device}, expected a power of two in 16..256")
    from pelagos.kernels.triton.training_attention import Attend

    return Attend.apply(q, rows, entries, sink, picked, starts, ends, window, ratio)
