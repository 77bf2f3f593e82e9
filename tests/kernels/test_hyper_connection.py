"""Mixing of the residual streams, against loops and examples made by hand. Sinkhorn has a file of its own."""

import math

import pytest
import torch

from pelagos.kernels.ref import hyper_connection as hc

N, DIM = 4, 5


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ordered", [False, True])
def test_mix_logits(ordered: bool) -> None:
    streams, fn = normal(3, N, DIM), normal(7, N * DIM, seed=2)
    got = hc.mix_logits(streams, fn, 0.5, ordered=ordered)
    for t in range(3):
        flat = streams[t].flatten().double()
        norm = math.sqrt(float(flat.square().mean()) + 0.5)
        for row in range(7):
            assert float(got[t, row]) == pytest.approx(float(fn[row].double() @ flat) / norm, abs=1e-5)


def test_split_mix() -> None:
    rows = (2 + N) * N
    mix, base, scale = normal(3, rows), normal(rows, seed=2), torch.tensor([0.5, 2.0, 3.0])
    pre, post, logits = hc.split_mix(mix, base, scale, eps=0.01, n=N)
    for t in range(3):
        for i in range(N):
            assert float(pre[t, i]) == pytest.approx(0.01 + 1 / (1 + math.exp(-float(mix[t, i] * 0.5 + base[i]))))
            at = N + i
            assert float(post[t, i]) == pytest.approx(2 / (1 + math.exp(-float(mix[t, at] * 2.0 + base[at]))))
            for k in range(N):
                at = 2 * N + i * N + k
                assert float(logits[t, i, k]) == pytest.approx(float(mix[t, at] * 3.0 + base[at]), abs=1e-6)


def test_collapse_is_a_weighted_sum() -> None:
    streams = torch.arange(4.0).view(1, N, 1).expand(1, N, DIM)
    got = hc.collapse(streams, torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert got.tolist() == [[3210.0] * DIM]
    assert hc.collapse(streams.bfloat16(), torch.ones(1, N)).dtype == torch.bfloat16


def test_comb_is_used_transposed() -> None:
    """comb[j, k] carries stream j to stream k: with a 1 at [0, 2] the new stream 2 holds the old stream 0."""
    streams = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    comb = torch.zeros(N, N)
    comb[0, 2] = 1.0
    comb[3, 1] = 0.5
    post = torch.tensor([1.0, 0.0, 2.0, 0.0])
    got = hc.hc_post(torch.tensor([7.0]), streams, post, comb)
    assert got.flatten().tolist() == [7.0, 20.0, 24.0, 0.0]


def test_hc_post_against_loops() -> None:
    y, streams, post, comb = (
        normal(2, 3, DIM),
        normal(2, 3, N, DIM, seed=2),
        normal(2, 3, N, seed=3),
        normal(2, 3, N, N),
    )
    got = hc.hc_post(y, streams, post, comb)
    for b in range(2):
        for t in range(3):
            for k in range(N):
                wanted = post[b, t, k] * y[b, t]
                for j in range(N):
                    wanted = wanted + comb[b, t, j, k] * streams[b, t, j]
                torch.testing.assert_close(got[b, t, k], wanted)


def test_hc_head_is_positive_weights() -> None:
    streams, fn, base = normal(3, N, DIM), normal(N, N * DIM, seed=2), normal(N, seed=3)
    got = hc.hc_head(streams, fn, base, torch.tensor([1.5]), eps=0.1, norm_eps=1e-6)
    mix = hc.mix_logits(streams, fn, 1e-6)
    for t in range(3):
        weights = [0.1 + 1 / (1 + math.exp(-float(mix[t, i] * 1.5 + base[i]))) for i in range(N)]
        wanted = sum(weight * streams[t, i] for i, weight in enumerate(weights))
        assert isinstance(wanted, torch.Tensor)
        torch.testing.assert_close(got[t], wanted)
