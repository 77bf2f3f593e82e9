"""Tiled attention and the choice among tiles, against the operators that see all keys at once."""

import pytest
import torch

from pelagos.kernels.ref.attention import sparse_attention, window_mask
from pelagos.kernels.ref.compress import index_scores
from pelagos.kernels.ref.gemm import ordered_sum
from pelagos.kernels.ref.tiles import TILE, TiledAttention, best, tile_scores


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("wide", [False, True])
def test_tiled_attention_equals_one_softmax(wide: bool) -> None:
    q, rows, entries, sink = normal(1, 16, 4, 8), normal(1, 32, 8, seed=2), normal(1, 3 * TILE, 8, seed=3), normal(4)
    near = window_mask(40, 16, 16, None, q.device)
    far = torch.rand(1, 16, 3 * TILE, generator=torch.Generator().manual_seed(4)) < 0.5
    wanted, _ = sparse_attention(q, rows, near, entries, far, sink, window=16)
    tiles = TiledAttention(q, sink, wide=wide)
    tiles.add(rows, near)
    for begin in range(0, 3 * TILE, TILE):
        tiles.add(entries[:, begin : begin + TILE], far[..., begin : begin + TILE])
    torch.testing.assert_close(tiles.result(), wanted, rtol=1e-5, atol=1e-6)


def test_a_hidden_tile_changes_no_bit() -> None:
    q, keys, sink = normal(2, 1, 4, 8), normal(2, TILE, 8, seed=2), normal(4)
    shown, hidden = torch.ones(2, 1, TILE, dtype=torch.bool), torch.zeros(2, 1, TILE, dtype=torch.bool)
    results = []
    for masks in ((shown,), (hidden, shown), (shown, hidden, hidden)):
        tiles = TiledAttention(q, sink)
        for mask in masks:
            tiles.add(keys, mask)
        results.append(tiles.result())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_picked_keys_give_what_shared_keys_give() -> None:
    q, keys, sink = normal(1, 8, 4, 8), normal(1, TILE, 8, seed=2), normal(4)
    mask = torch.rand(1, 8, TILE, generator=torch.Generator().manual_seed(4)) < 0.5
    shared, picked = TiledAttention(q, sink), TiledAttention(q, sink)
    shared.add(keys, mask)
    picked.add(keys.unsqueeze(1).expand(-1, 8, -1, -1).contiguous(), mask)
    torch.testing.assert_close(picked.result(), shared.result())


def test_tile_scores() -> None:
    q, keys, weights = normal(2, 5, 16, 8), normal(2, 2 * TILE, 8, seed=2), normal(2, 5, 16, seed=3)
    torch.testing.assert_close(tile_scores(q, keys, weights), index_scores(q, keys, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 7, 40])
def test_best_takes_the_lower_of_a_tie(count: int) -> None:
    scores = normal(6, 40).mul(2).round()
    scores[0] = 0.0
    scores[1, 5:] = -torch.inf
    scores[2, 3] = torch.nan
    got = best(scores, count)
    for row, picked in zip(scores.nan_to_num(nan=-torch.inf).tolist(), got.tolist(), strict=True):
        assert picked == sorted(sorted(range(40), key=lambda place: (-row[place], place))[:count])


@pytest.mark.parametrize("slices", [1, 4, 8, 12, 16, 128])
def test_ordered_sum(slices: int) -> None:
    x = normal(3, slices, 5)
    torch.testing.assert_close(ordered_sum(x, 1), x.sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(ordered_sum(x, -2)[1:2, :3], ordered_sum(x[1:2, :, :3], 1))
