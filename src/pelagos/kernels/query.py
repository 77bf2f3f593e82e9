"""Queries of attention and indexer from one merged product: contract, checks and dispatch.

On CUDA one Triton launch; elsewhere `ref.query`, which defines the meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.dispatch import select


def angles(positions: Tensor, freqs: Tensor) -> Tensor:
    """Return cos and sin (..., 2, rope/2) float32 at positions (...) for frequencies (rope/2,), as `rope_table` does.

    A step makes them once for all layers that share frequencies.
    """
    angle = positions.unsqueeze(-1).float() * freqs
    return torch.stack((angle.cos(), angle.sin()), -2)


def query(
    product: Tensor, turn: Tensor, heads: int, width: int, index_heads: int = 0, index_width: int = 0,
    *, eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return q (T, heads, width) bfloat16, normed and rotated, and the index queries (T, index_heads, index_width).

    product (T, heads * width + index_heads * index_width) bfloat16: columns of wq_b, then of the indexer's wq_b; turn
    (T, 2, rope/2) float32 holds cos and sin at the rows' positions (`angles`). Index queries are rotated, turned by
    Hadamard and rounded to FP4: bfloat16 holds those values exactly; None without index heads. Raises ConfigError for
    other shapes. Source: inference/model.py Attention, Indexer.
    """
    tokens, columns = product.shape
    if columns != heads * width + index_heads * index_width or product.dtype != torch.bfloat16:
        raise ConfigError(
            f"query: product is {product.dtype} {tuple(product.shape)}, expected bfloat16 "
            f"(T, {heads} * {width} + {index_heads} * {index_width})"
        )
    if turn.dim() != 3 or tuple(turn.shape[:2]) != (tokens, 2) or 2 * turn.shape[2] > width:
        raise ConfigError(f"query: turn is {tuple(turn.shape)}, expected ({tokens}, 2, at most {width // 2})")
    if not (product.is_contiguous() and turn.is_contiguous()) or index_width & (index_width - 1) or index_width % 32:
        raise ConfigError(f"query: operands have to be contiguous, index_width={index_width} 0 or 32, 64, 128, ...")
    return select("query", product).forward(product, turn, heads, width, index_heads, index_width, eps=eps)
