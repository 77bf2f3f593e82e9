"""What `kernels.query` computes: the model's norm, rope, rotation and FP4 on a bfloat16 carrier."""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos import numerics
from pelagos.kernels.ref.cache_write import turned
from pelagos.kernels.ref.norm_rope import rms_norm


def make_inputs(
    tokens: int, heads: int, width: int, index_heads: int, index_width: int, *, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return random (product, turn) as `kernels.query.query` takes them, positions up to a million."""
    generator = torch.Generator(device).manual_seed(seed)
    product = torch.randn(tokens, heads * width + index_heads * index_width, generator=generator, device=device)
    rope = min(64, index_width or 64)
    angle = torch.rand(tokens, rope // 2, generator=generator, device=device) * 1e6
    return product.bfloat16() * 2, torch.stack((angle.cos(), angle.sin()), 1)


def forward(
    product: Tensor, turn: Tensor, heads: int, width: int, index_heads: int, index_width: int, *, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Return (q, index_q); see `kernels.query.query`."""
    turn = turn.unsqueeze(1)
    main, index = product.split((heads * width, index_heads * index_width), 1)
    q = turned(rms_norm(main.unflatten(1, (heads, width)), None, eps), turn)
    if not index_heads:
        return q, None
    index_q = turned(index.unflatten(1, (index_heads, index_width)), turn)
    return q, numerics.fake_quant_fp4(numerics.hadamard(index_q))
