"""The policy of expert streaming: places stay consistent, what is needed stays, hot experts come to lie inside."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.stream_decode import draw_routes
from hypothesis import given, settings
from hypothesis import strategies as st

from pelagos.errors import CapacityError, ConfigError
from pelagos.model.streaming import ExpertCache

LAYERS, EXPERTS, PICKS = 4, 64, 6


def check(cache: ExpertCache) -> None:
    inside = np.flatnonzero(cache.place >= 0)
    assert sorted(cache.held[cache.held >= 0]) == inside.tolist()
    assert (cache.held[cache.place[inside]] == inside).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(8, 40))
def test_demanded_experts_are_there_and_stay(seed: int, places: int) -> None:
    rng = np.random.default_rng(seed)
    cache = ExpertCache(48, places, half_life=20)
    for _ in range(40):
        wanted = rng.choice(48, rng.integers(1, 6), replace=False)
        keep = np.flatnonzero(cache.place >= 0)[:2]
        before = cache.place.copy()
        given = cache.admit(wanted, keep)
        cache.note(wanted, 1)
        assert [expert for expert, _ in given] == [each for each in wanted if before[each] < 0]
        assert (cache.place[wanted] >= 0).all()
        assert (cache.place[keep] == before[keep]).all()
        check(cache)


def test_too_few_places_are_refused() -> None:
    cache = ExpertCache(10, 3)
    cache.admit(np.array([0, 1]))
    with pytest.raises(CapacityError, match="3 places for experts: 2 are needed"):
        cache.admit(np.array([2, 3]), [0, 1])
    with pytest.raises(ConfigError, match="11 places for 10"):
        ExpertCache(10, 11)


def swap(cache: ExpertCache) -> int:
    pairs = cache.exchange(2)
    for hot, cold in pairs:
        place = int(cache.place[cold])
        cache.leave(cold)
        cache.take(hot, place)
    return len(pairs)


def simulate(exponent: float, tokens: int, seed: int = 0) -> tuple[float, float, int]:
    """Serve a trace with a tenth outside, exchanging two a token; return late hits, the best possible, exchanges."""
    rng = np.random.default_rng(seed)
    routes = [draw_routes(rng, tokens, experts=EXPERTS, picks=PICKS, exponent=exponent) for _ in range(LAYERS)]
    flat = np.stack(routes, 1) + np.arange(LAYERS)[:, None] * EXPERTS  # (tokens, layers, picks)
    cache = ExpertCache(LAYERS * EXPERTS, LAYERS * EXPERTS * 9 // 10)
    for place, expert in enumerate(rng.permutation(LAYERS * EXPERTS)[: len(cache.held)]):
        cache.take(int(expert), place)
    moved, half = 0, tokens // 2
    for at, row in enumerate(flat):
        if at == half:
            cache.hits = cache.misses = 0
        cache.note(row.ravel(), 1)
        moved += swap(cache)
    check(cache)
    counts = np.sort(np.bincount(flat[half:].ravel(), minlength=LAYERS * EXPERTS))[::-1]
    return cache.hit_rate, counts[: len(cache.held)].sum() / counts.sum(), moved


def test_uniform_routing_is_left_alone() -> None:
    hits, _, moved = simulate(0.0, 4000)
    assert abs(hits - 0.898) < 0.01  # 230 of 256 places
    assert moved <= 2


def test_skewed_routing_is_learned() -> None:
    """Zipf with exponent 1 within each layer: nearly as good as knowing the counts beforehand."""
    hits, best, moved = simulate(1.0, 4000)
    assert best > 0.96
    assert hits > best - 0.01
    assert 4 < moved < 100


def test_a_change_of_taste_is_followed() -> None:
    cache = ExpertCache(8, 4, half_life=16)
    cache.admit(np.arange(4))
    for _ in range(100):
        cache.note(np.arange(4), 1)
    for _ in range(200):
        cache.note(np.arange(4, 8), 1)
        swap(cache)
    assert (cache.place[4:] >= 0).all()


def test_scores_do_not_overflow() -> None:
    cache = ExpertCache(4, 2, half_life=0.5)
    for _ in range(2000):
        cache.note(np.array([0, 1]), 1)
    cache.admit(np.array([0, 1]))
    assert cache.exchange() == []
    assert cache.hit_rate == 0


def test_routes_are_distinct_and_as_skewed_as_said() -> None:
    routes = draw_routes(np.random.default_rng(0), 2000, experts=EXPERTS, picks=PICKS, exponent=1.0)
    assert all(len(set(row)) == PICKS for row in routes.tolist())
    counts = np.sort(np.bincount(routes.ravel(), minlength=EXPERTS))
    assert counts[-1] / 2000 > 0.6
    assert counts[: EXPERTS // 2].sum() / counts.sum() < 0.2
