"""Attention of a prompt's queries over decoded keys, up to the input of wo_a: contract, checks and dispatch.

On CUDA one Triton launch; elsewhere `ref.prefill_attention`, which defines the meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.dispatch import contract, select
from pelagos.kernels.layout import CacheLayout
from pelagos.kernels.prefill_cache import Keys, Prompt


def attend(
    q: Tensor, call: Prompt, keys: Keys, layout: CacheLayout, layer: int, sink: Tensor, picks: Tensor | None,
    turn: Tensor,
) -> Tensor:  # fmt: skip
    """Return what the rows attend, turned back: (T, H * C) bfloat16.

    q (T, H, C) bfloat16; keys are those `prefill_cache.cache_write` returned for the same call and layer. A row sees
    the last sliding_window positions and its entries: those in picks (T, K) int32 (ascending, then -1), or with None
    all. sink (H,) float32 joins the denominator; turn (T, 2, rope/2) float32 as in `cache_write`. A row's bits depend
    on its own sequence alone. Raises ConfigError for other shapes. Source: technical report 2.3.3; inference/kernel.py
    sparse_attn.
    """
    config, ratio, (tokens, heads, width) = layout.config, layout.layers[layer].ratio, q.shape
    needed = call.windows + (call.entries[ratio].total if ratio else 0)
    contract("prefill_attention", {
        "q": (q, (len(call.rows.positions), heads, config.head_dim), torch.bfloat16),
        "keys": (keys.main, (needed, width)), "sink": (sink, (heads,)),
        "picks": (picks, (tokens, 0 if picks is None else picks.shape[-1]), torch.int32),
        "turn": (turn, (tokens, 2, config.qk_rope_head_dim // 2)),
    })  # fmt: skip
    if width % 128 or (picks is not None and not ratio):
        raise ConfigError(f"prefill_attention: {width} columns, picks for a layer of ratio {ratio}: "
                          "expected a multiple of 128, picks only of entries")  # fmt: skip
    inputs = (q, call, keys.main, ratio, sink, picks, turn, config.sliding_window)
    return select("prefill_attention", q).attend(*inputs)
