"""The entries each row of a prompt attends, of all its sequence has: contract, checks and dispatch.

On CUDA a launch for the queries and two for every chunk of keys; elsewhere `ref.prefill_indexer`, which defines the
meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.dispatch import contract, select
from pelagos.kernels.layout import OVERLAP_RATIO
from pelagos.kernels.prefill_cache import Keys, Prompt

CHUNK = 4096  # keys scored before a selection: 128 MiB of scores for 8192 queries


def pick(index_q: Tensor, head_weights: Tensor, call: Prompt, keys: Keys, topk: int) -> Tensor:
    """Return the picked entries (T, topk) int32, ascending, then -1 where a row sees fewer.

    Picked are those of the largest score sum_h w_h relu(q_h . k), a tie to the lower index. index_q (T, heads, width)
    bfloat16 with values of FP4, head_weights (T, heads) float32; keys are those that `prefill_cache.cache_write`
    returned for the same call. A row's picks depend on its own sequence alone. Raises ConfigError for other shapes.
    Source: inference/model.py Indexer.
    """
    found, (tokens, heads, width) = call.entries[OVERLAP_RATIO], index_q.shape
    if keys.codes is None or keys.scales is None:
        raise ConfigError("prefill_indexer: this layer has no index keys")
    contract("prefill_indexer", {
        "index_q": (index_q, (len(found.seen), heads, width), torch.bfloat16),
        "head_weights": (head_weights, (tokens, heads), torch.float32),
        "keys.codes": (keys.codes, (found.total, width), torch.uint8),
        "keys.scales": (keys.scales, (found.total,), torch.float32),
    })  # fmt: skip
    if topk & (topk - 1) or width % 32 or heads % 8:
        raise ConfigError(
            f"prefill_indexer: topk={topk}, {heads} heads of {width}: expected a power of two, multiples of 8 and 32"
        )
    return select("prefill_indexer", index_q).pick(index_q, head_weights, call, keys.codes, keys.scales, topk)
