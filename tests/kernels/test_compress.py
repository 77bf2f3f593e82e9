"""Pooling into entries and the choice among them, against loops."""

import math

import pytest
import torch

from pelagos.kernels.ref import compress


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_pool_is_a_softmax_per_channel() -> None:
    kv, score = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=2)
    score[0, 1, :2] = -torch.inf  # slots before the sequence
    pooled = compress.pool_windows(kv, score)
    for b in range(2):
        for n in range(3):
            for d in range(5):
                shares = [math.exp(float(score[b, n, slot, d])) for slot in range(4)]
                wanted = sum(share * float(kv[b, n, slot, d]) for slot, share in enumerate(shares)) / sum(shares)
                assert float(pooled[b, n, d]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("first", "count"), [(4, 3), (6, 2), (8, 1)])
def test_overlap_takes_first_half_of_the_previous_window(first: int, count: int) -> None:
    ratio, dim = 4, 3
    rows = normal(2, 17, 2 * dim)
    slots = compress.overlap_slots(rows, dim=dim, first=first, count=count, ratio=ratio)
    assert slots.shape == (2, count, 2 * ratio, dim)
    for n in range(count):
        for slot in range(ratio):
            begin = first + n * ratio
            assert torch.equal(slots[:, n, slot], rows[:, begin - ratio + slot, :dim])
            assert torch.equal(slots[:, n, ratio + slot], rows[:, begin + slot, dim:])


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("start", [0, 3, 127, 128, 260])
def test_an_entry_is_visible_once_its_window_is_whole(ratio: int, start: int) -> None:
    entries = (start + 20) // ratio
    seen = compress.visible_entries(start, 20, ratio, entries, torch.device("cpu"))
    assert seen.shape == (20, entries)
    for t in range(20):
        for s in range(entries):
            assert bool(seen[t, s]) == (s * ratio + ratio - 1 <= start + t)  # its last token is not after the query


def test_index_scores() -> None:
    q, keys, weights = normal(2, 3, 4, 8), normal(2, 5, 8, seed=2), normal(2, 3, 4, seed=3)
    scores = compress.index_scores(q, keys, weights)
    assert scores.dtype == torch.float32
    for b in range(2):
        for t in range(3):
            for s in range(5):
                wanted = sum(float(weights[b, t, h]) * max(0.0, float(q[b, t, h] @ keys[b, s])) for h in range(4))
                assert float(scores[b, t, s]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("topk", [1, 3, 7, 20])
def test_index_topk(topk: int) -> None:
    scores = normal(2, 30, 7)
    visible = compress.visible_entries(0, 30, 4, 7, torch.device("cpu"))
    picks = compress.index_topk(scores, visible.unsqueeze(0), topk)
    assert picks.shape == (2, 30, min(topk, 7))
    for b in range(2):
        for t in range(30):
            seen = sorted((s for s in range(7) if visible[t, s]), key=lambda s: -float(scores[b, t, s]))
            wanted = sorted(seen[:topk])
            assert picks[b, t].tolist() == wanted + [-1] * (min(topk, 7) - len(wanted))
