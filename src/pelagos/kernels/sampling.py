"""The next token of each row from its logits, where the logits are: contract, checks and dispatch.

On CUDA four Triton launches; elsewhere `ref.sampling`, which defines the meaning.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.dispatch import contract, select
from pelagos.kernels.layout import Draw

FIELDS = 5  # 64-bit words of a draw
MAX_VOCAB = 1 << 20


def packed(draws: Sequence[Draw]) -> np.ndarray:
    """Return draws as (T, FIELDS) int64: the bits of temperature, top_p and min_p as float64, then top_k and key."""
    words, columns = np.empty((len(draws), FIELDS), np.int64), [*zip(*draws, strict=True)]
    if columns:
        words[:, :3] = np.array(columns[:3], np.float64).view(np.int64).T
        words[:, 3:] = np.array(columns[3:], np.uint64).view(np.int64).T
    return words


def pick(logits: Tensor, draws: Tensor) -> Tensor:
    """Return (T, 2) float64: the picked ids, -1 where logits hold NaN or infinity, and the model's log-probabilities.

    logits (T, V) float32, draws (T, FIELDS) int64 as `packed`. What is kept and drawn is what
    `engine.sampler.Sampler` keeps and draws but for rounding; a row's pick depends on nothing but the row and its draw.
    Raises ConfigError for other shapes.
    """
    rows, vocab = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or not 0 < vocab <= MAX_VOCAB:
        raise ConfigError(
            f"sampling: logits are {logits.dtype} {tuple(logits.shape)}, expected float32 (T, at most {MAX_VOCAB})"
        )
    contract("sampling", {"draws": (draws, (rows, FIELDS), torch.int64)})
    return select("sampling", logits).forward(logits, draws)
