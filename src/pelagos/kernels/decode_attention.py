"""Attention of decode and verify rows over the cache as stored, up to the input of wo_a: contract, checks and dispatch.

On CUDA one or two Triton launches; elsewhere `ref.decode_attention`, which defines the meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.batch_rows import Halves, Rows
from pelagos.kernels.cache_write import check_pools
from pelagos.kernels.layout import CacheLayout
from pelagos.kernels.ref import decode_attention as ref

WIDTHS = (128, 512)  # of a head


def attend(
    q: Tensor, rows: Rows, layout: CacheLayout, layer: int, pages: Tensor, slots: Tensor, sink: Tensor,
    picks: Tensor | None, turn: Tensor, most: int, *, whole: bool = True,
) -> Tensor | Halves:  # fmt: skip
    """Return what the rows attend, turned back: (T, H * C) bfloat16, as the release hands it to wo_a.

    q (T, H, C) bfloat16; a row at position p sees the last sliding_window positions of its ring and the entries below
    (p + 1) // ratio: those in picks (T, K) int32 (ascending, then -1), or with None all of them, at most `most`. sink
    (H,) float32 joins the denominator; turn (T, 2, rope/2) float32 holds cos and sin at the rows' positions. A row's
    bits depend on its own sequence alone: not on the other rows, `most`, pages or slot, nor on whether `picks` names
    all that it sees. Cached values are below 65,504, as float16 has it. Unless `whole`, the result is in halves on
    CUDA. Raises ConfigError for other shapes. Source: technical report 2.3.3; inference/kernel.py sparse_attn.
    """
    config, place = layout.config, layout.layers[layer]
    tokens, heads, width = q.shape
    if q.dtype != torch.bfloat16 or width != config.head_dim or not q.is_contiguous() or layout.mode != "released":
        raise ConfigError(
            f"decode_attention: q is {q.dtype} {tuple(q.shape)}, layout of mode {layout.mode!r}: "
            f"expected contiguous bfloat16 (T, H, {config.head_dim}) and released"
        )
    if width not in WIDTHS or config.qk_rope_head_dim != 64:
        raise ConfigError(
            f"decode_attention: width {width} and rope {config.qk_rope_head_dim}: expected one of {WIDTHS} and 64"
        )
    expected = {"sink": (sink, (heads,)), "turn": (turn, (tokens, 2, 32)), "positions": (rows.positions, (tokens,))}
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ConfigError(f"decode_attention: {name} is {tuple(tensor.shape)}, expected contiguous {shape}")
    if picks is not None and (picks.dim() != 2 or picks.shape[0] != tokens or picks.dtype != torch.int32):
        raise ConfigError(
            f"decode_attention: picks is {picks.dtype} {tuple(picks.shape)}, expected int32 ({tokens}, K)"
        )
    if place.main is not None and not 0 <= most <= rows.table.shape[1] * place.main.rows:
        raise ConfigError(
            f"decode_attention: most={most}, expected 0..{rows.table.shape[1] * place.main.rows}, what the table holds"
        )
    check_pools(rows, layout, pages, slots)
    inputs = (q, rows, layout, layer, pages, slots, sink, picks, turn, most)
    if not q.is_cuda:
        return ref.forward(*inputs)
    from pelagos.kernels.triton import decode_attention as kernel

    return kernel.forward(*inputs, whole)
