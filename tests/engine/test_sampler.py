"""The sampler: greedy, seeded, bounded by top_k and top_p, and strict about its parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pelagos.engine.sampler import Sampler, SamplingParams
from pelagos.errors import CheckpointError, RequestError

LOGITS = torch.tensor([0.0, 2.0, 1.0, 3.0, -1.0])


def picks(count: int, logits: torch.Tensor = LOGITS, **params: Any) -> list[int]:
    sampler = Sampler(SamplingParams(**params))
    return [sampler.pick(logits)[0] for _ in range(count)]


def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie() -> None:
    assert picks(3, temperature=0) == [3, 3, 3]
    assert picks(1, torch.tensor([0.0, 5.0, 5.0]), temperature=0) == [1]


def test_a_seed_fixes_the_picks_whatever_else_draws() -> None:
    alone = picks(20, seed=7)
    ours, other = Sampler(SamplingParams(seed=7)), Sampler(SamplingParams(seed=8))
    beside = []
    for _ in range(20):
        torch.rand(3)
        other.pick(LOGITS)
        beside.append(ours.pick(LOGITS)[0])
    assert beside == alone
    assert picks(20, seed=9) != alone


def test_frequencies_follow_the_probabilities() -> None:
    counts = torch.bincount(torch.tensor(picks(4000, seed=1, temperature=0.5)), minlength=5) / 4000
    assert torch.allclose(counts, torch.softmax(LOGITS / 0.5, -1), atol=0.03)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [({"top_k": 2}, {3, 1}), ({"top_p": 0.6}, {3}), ({"top_p": 0.8}, {3, 1}), ({"top_p": 1e-9}, {3})],
)
def test_top_k_and_top_p_keep_the_head(params: dict[str, Any], allowed: set[int]) -> None:
    assert set(picks(300, seed=0, **params)) == allowed


def test_top_p_is_taken_of_what_top_k_left() -> None:
    # The two left have probabilities 0.73 and 0.27: the first alone reaches 0.7.
    assert set(picks(100, seed=0, top_k=2, top_p=0.7)) == {3}


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=8), st.integers(0, 2**63 - 1), st.floats(1e-6, 1))
def test_every_pick_is_a_kept_token_with_its_own_logprob(values: list[float], seed: int, top_p: float) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    token, logprob = Sampler(SamplingParams(seed=seed, top_p=top_p)).pick(logits)
    probs = torch.softmax(logits, -1)
    assert logprob == pytest.approx(math.log(probs[token]) if probs[token] > 0 else logprob)
    # The mass of strictly likelier tokens is what had to be short of top_p for this one to stay.
    assert float(probs[probs > probs[token]].sum()) <= top_p + 1e-9


def test_nan_logits_are_refused() -> None:
    for temperature in (0, 1):
        with pytest.raises(CheckpointError, match="NaN"):
            Sampler(SamplingParams(temperature=temperature)).pick(torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", True), ("max_tokens", 1.5), ("max_tokens", "9"), ("temperature", -0.1),
        ("temperature", 2.1), ("temperature", math.nan), ("temperature", "1"), ("temperature", True), ("top_p", 0),
        ("top_p", 1.01), ("top_k", -1), ("top_k", 1.0), ("seed", -1), ("seed", 2**63), ("seed", "x"), ("stop", [""]),
        ("stop", ["a"] * 17), ("stop", [1]), ("stop", 5), ("logprobs", 2),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name}="):
        SamplingParams(**{name: value})


def test_stop_takes_one_string_or_several() -> None:
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
