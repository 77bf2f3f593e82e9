"""The entries each row attends, of all its sequence has: contract, checks and dispatch.

On CUDA one or two Triton launches over FP4 keys in the pages; elsewhere `ref.indexer`, which defines the meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.batch_rows import Rows
from pelagos.kernels.cache_write import check_pools
from pelagos.kernels.dispatch import contract
from pelagos.kernels.layout import CacheLayout
from pelagos.kernels.ref import indexer as ref

COUNTS = 1  # int32 zeros a row that `counts` has to hold


def pick(
    index_q: Tensor, head_weights: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, counts: Tensor,
    most: int,
) -> Tensor:  # fmt: skip
    """Return the picked entries (T, index_topk) int32, ascending, then -1 where a row sees fewer.

    A row at position p sees entries below (p + 1) // ratio; picked are those of the largest score
    sum_h w_h relu(q_h . k), a tie to the lower index. index_q (T, heads, width) bfloat16 with values of FP4,
    head_weights (T, heads) float32; no row sees more than `most` entries. counts (>= T, COUNTS) int32 zeros is scratch,
    zero again afterwards. Neither `most` nor other rows change a pick. Where no row sees more than index_topk the call
    can be left out. Raises ConfigError for other shapes. Source: inference/model.py Indexer.
    """
    config, place = layout.config, layout.layers[layer]
    shape = (rows.positions.shape[0], config.index_n_heads, config.index_head_dim)
    if place.index is None or layout.mode != "released":
        raise ConfigError(f"indexer: layer {layer} (ratio {place.ratio}, mode {layout.mode!r}) has no FP4 index keys")
    contract("indexer", {
        "index_q": (index_q, shape, torch.bfloat16), "head_weights": (head_weights, shape[:2], torch.float32)
    })  # fmt: skip
    if counts.shape[0] < shape[0] or counts.shape[1:] != (COUNTS,) or counts.dtype != torch.int32:
        raise ConfigError(f"indexer: counts is {tuple(counts.shape)}, expected int32 (>= {shape[0]}, {COUNTS})")
    if not 0 < most <= rows.table.shape[1] * place.index.rows:
        raise ConfigError(
            f"indexer: most={most}, expected 1..{rows.table.shape[1] * place.index.rows}, what the page table holds"
        )
    check_pools(rows, layout, pages, pages.new_empty((0, layout.slot_bytes)))
    if not index_q.is_cuda:
        return ref.forward(index_q, head_weights, rows, layout, layer, pages, most)
    from pelagos.kernels.triton import indexer as kernel

    return kernel.forward(index_q, head_weights, rows, layout, layer, pages, counts, most)
