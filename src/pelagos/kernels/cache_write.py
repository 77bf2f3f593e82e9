"""All that a decode step keeps of its tokens, in one call: contract, checks and dispatch.

From one merged product: the quantised query latent, window rows into the rings, compressor rows into the tails, and for
windows that end in the call their entry and index key into the pages. On CUDA one Triton launch; elsewhere
`ref.cache_write`, which defines the meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.batch_rows import Rows
from pelagos.kernels.dispatch import contract, select
from pelagos.kernels.layout import CacheLayout
from pelagos.kernels.ref.cache_write import CacheWeights, widths

__all__ = ["BLOCK", "CacheWeights", "cache_write", "check_pools", "widths"]
BLOCK = 128


def cache_write(
    projected: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, slots: Tensor,
    weights: CacheWeights, turn: Tensor, entry_turn: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Write what the rows leave in pages and slots; return (codes, scales, head_weights).

    projected (T, >= sum of `widths`) float32 are the products of the normed input; turn (T, 2, rope/2) float32 holds
    cos and sin at the rows' positions (`query.angles`) with this layer's frequencies, entry_turn at the first position
    of the window that ends with the row (position - ratio + 1). codes (T, q_lora) E4M3 and scales (T, q_lora/128)
    UE8M0 as uint8 are the normed latent; head_weights (T, index heads) float32, scaled, with an indexer, else None. A
    sequence brings at most rewind + 1 rows. Raises ConfigError for other shapes. Source: inference/model.py Attention,
    Compressor, Indexer.
    """
    config, place = layout.config, layout.layers[layer]
    tokens, needed = rows.positions.shape[0], sum(widths(config, place.ratio))
    half, quantised = config.qk_rope_head_dim // 2, config.q_lora_rank
    if layout.mode != "released" or projected.dtype != torch.float32 or quantised % BLOCK:
        raise ConfigError(
            f"cache_write: layout of mode {layout.mode!r}, projected {projected.dtype}, q_lora_rank {quantised}: "
            f"expected released, float32 and a multiple of {BLOCK}"
        )
    if (
        projected.shape[0] != tokens
        or projected.shape[1] < needed
        or projected.stride(1) != 1
        or projected.stride(0) % 2
    ):
        got = f"{tuple(projected.shape)} with strides {projected.stride()}"
        raise ConfigError(
            f"cache_write: projected is {got}, expected rows ({tokens}, >= {needed}), an even number apart"
        )
    contract("cache_write", {"turn": (turn, (tokens, 2, half)), "entry_turn": (entry_turn, (tokens, 2, half))})
    if place.ratio and entry_turn is None:
        raise ConfigError("cache_write: entry_turn is None, expected one for a layer with a compressor")
    if (place.ratio and weights.ape is None) or (place.index is not None and weights.index_ape is None):
        raise ConfigError(f"cache_write: weights of layer {layer} (ratio {place.ratio}) lack those of its compressors")
    check_pools(rows, layout, pages, slots)
    inputs = (projected, rows, layout, layer, pages, slots, weights, turn, entry_turn)
    return select("cache_write", projected).forward(*inputs)


def check_pools(rows: Rows, layout: CacheLayout, pages: Tensor, slots: Tensor) -> None:
    """Raise ConfigError unless pools are contiguous bytes of this layout and rows are int32 of one length."""
    for name, pool, size in (("pages", pages, layout.page_bytes), ("slots", slots, layout.slot_bytes)):
        if pool.dim() != 2 or pool.shape[1] != size or pool.dtype != torch.uint8 or not pool.is_contiguous():
            raise ConfigError(f"{name}: {pool.dtype} {tuple(pool.shape)}, expected contiguous uint8 (number, {size})")
    for name, each in zip(rows._fields, rows, strict=True):
        if each.dtype != torch.int32 or not each.is_contiguous() or (name != "table" and each.dim() != 1):
            raise ConfigError(f"rows.{name}: {each.dtype} {tuple(each.shape)}, expected contiguous int32")
