"""A compressor in training on CUDA: both projections as one product, pooling and its gradient; contract.

What it means: `model.attention.Compressor` with its rows and pool; there is nothing to dispatch, the model asks for it.
"""

from __future__ import annotations

from torch import Tensor


def pool(x: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, opens: Tensor, *, ratio: int, width: int) -> Tensor:
    """Return the pooled entries (B, N, width) of bfloat16 x (B, S, I), before norm and rotation.

    wkv, wgate (span, I), ape (ratio, span) float32; with a span of 2 width windows overlap unless the entry `opens`
    (B, N) a sample. Products take BFloat16 and give float32. Differentiable.
    """
    from pelagos.kernels.triton.compressor import Pool

    return Pool.apply(x, wkv, wgate, ape, opens, ratio, width)
