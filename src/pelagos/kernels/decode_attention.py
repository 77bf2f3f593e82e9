"""Attention of decode and verify rows over the cache as stored, up to the input of wo_a: contract, checks and dispatch.

On CUDA one or two Triton launches; elsewhere `ref.decode_attention`, which defines the meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.batch_rows import Halves, Rows
from pelagos.kernels.cache_write import check_pools
from pelagos.kernels.dispatch import contract, select
from pelagos.kernels.layout import CacheLayout

WIDTHS = (128, 512)  # of a head


def attend(
    q: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, slots: Tensor, sink: Tensor,
    picks: Tensor | None, turn: Tensor, most: int, *, whole: bool = True, arrived: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor | Halves:  # fmt: skip
    """Return what the rows attend, turned back: (T, H * C) bfloat16, as the release hands it to wo_a.

    q (T, H, C) bfloat16; a row at position p sees the last sliding_window positions of its ring and the entries below
    (p + 1) // ratio: those in picks (T, K) int32 (ascending, then -1), or with None all of them, at most `most`. sink
    (H,) float32 joins the denominator; turn (T, 2, rope/2) float32 holds cos and sin at the rows' positions. A row's
    bits depend on its own sequence alone: not on the other rows, `most`, pages or slot, nor on whether `picks` names
    all that it sees. Cached values are below 65,504, as float16 has it. Unless `whole`, the result is in halves on
    CUDA; there `arrived` (4096,) int32 zeros, left so, spares it a launch, and with `norm_eps` q is what wq_b gives,
    not
    yet normed and turned, rows as far apart as they may be. Raises ConfigError for other shapes. Source: technical
    report 2.3.3; inference/kernel.py sparse_attn.
    """
    config, place = layout.config, layout.layers[layer]
    tokens, heads, width = q.shape
    if width not in WIDTHS or config.qk_rope_head_dim != 64 or layout.mode != "released":
        raise ConfigError(
            f"decode_attention: width {width}, rope {config.qk_rope_head_dim}, layout of mode {layout.mode!r}: "
            f"expected one of {WIDTHS}, 64 and released"
        )
    contract("decode_attention", {
        "q": (q[:1], (min(tokens, 1), heads, config.head_dim), torch.bfloat16), "sink": (sink, (heads,)),
        "turn": (turn, (tokens, 2, 32)), "positions": (rows.positions, (tokens,)),
        "picks": (picks, (tokens, 0 if picks is None else picks.shape[-1]), torch.int32),
    })  # fmt: skip
    if place.main is not None and not 0 <= most <= rows.table.shape[1] * place.main.rows:
        raise ConfigError(
            f"decode_attention: most={most}, expected 0..{rows.table.shape[1] * place.main.rows}, what the table holds"
        )
    check_pools(rows, layout, pages, slots)
    inputs = (q, rows, layout, layer, pages, slots, sink, picks, turn, most, whole, arrived, norm_eps)
    return select("decode_attention", q).forward(*inputs)
