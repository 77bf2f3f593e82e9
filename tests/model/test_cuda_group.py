"""Two ranks give what one gives, whoever holds which sequence: over gloo, and on two GPUs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests import two_ranks

from pelagos.config import preset
from pelagos.errors import ConfigError
from pelagos.kernels.layout import Span
from pelagos.kernels.ragged import turns
from pelagos.model.cuda_group import cut_width


def start(*arguments: str, ranks: int = 2) -> None:
    said = two_ranks.run(Path(__file__).with_name("group_worker.py"), *arguments, ranks=ranks)
    assert all(f"rank {rank} of {ranks}:" in said for rank in range(ranks))


def test_two_ranks_are_one() -> None:
    start()


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_halves_of_experts_are_experts_on_the_device(seed: int) -> None:
    """One process that adds up two halves of every expert, random hash tables choosing some twice for a token."""
    start("cuda", "halves", str(seed), ranks=0)


@pytest.mark.gpu
@pytest.mark.multi_gpu
def test_two_gpus_are_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    start("cuda")


def test_turns_of_spans_are_their_rows() -> None:
    spans = [Span(np.arange(5), 10, 0, np.zeros(1, np.int32), logits=3, streams=1),
             Span(np.arange(4), 0, 2, np.zeros(1, np.int32), logits=0)]  # fmt: skip
    for share in range(1, 10):
        ranks = list(turns(spans, share))
        assert [sum(len(each.tokens) for each in own) for own in ranks[:-1]] == [share] * (len(ranks) - 1)
        every = [each for own in ranks for each in own]
        assert np.array_equal(np.concatenate([each.tokens for each in every]), [0, 1, 2, 3, 4, 0, 1, 2, 3])
        assert (sum(each.logits for each in every), sum(each.streams for each in every)) == (3, 1)
        starts = [each.start + len(each.tokens) for each in every if each.slot == 0]
        assert [each.start for each in every if each.slot == 0] == [10, *starts[:-1]]
    assert [each.logits for each in next(turns(spans, 4))] == [2]


def test_widths_that_cannot_be_cut_are_refused() -> None:
    assert cut_width(preset("flash"), 16).moe_intermediate_size == 128
    with pytest.raises(ConfigError, match="3072 in 16 parts"):
        cut_width(preset("pro"), 16)
