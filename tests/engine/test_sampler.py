"""The sampler: greedy, seeded by position, distributed as asked, the same one by one and in verification."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelagos.engine.sampler import Sampler, SamplingParams, token_logprobs
from pelagos.errors import CheckpointError, RequestError

LOGITS = np.array([0.0, 2.0, 1.0, 3.0, -1.0], np.float32)


class Cycle:
    """A grammar that allows the listed sets of tokens in turn, over and over."""

    def __init__(self, *allowed: set[int], size: int = 5) -> None:
        self._allowed, self._size, self.taken = allowed, size, []

    def mask(self) -> np.ndarray | None:
        allowed = self._allowed[len(self.taken) % len(self._allowed)]
        return np.isin(np.arange(self._size), list(allowed)) if allowed else None

    def accept(self, token: int) -> None:
        allowed = self._allowed[len(self.taken) % len(self._allowed)]
        assert not allowed or token in allowed
        self.taken.append(token)

    def rollback(self, count: int) -> None:
        del self.taken[len(self.taken) - count :]

    def fork(self) -> Cycle:
        copy = Cycle(*self._allowed, size=self._size)
        copy.taken = list(self.taken)
        return copy


def picks(count: int, logits: np.ndarray = LOGITS, prompt: Any = (), **params: Any) -> list[int]:
    sampler = Sampler(SamplingParams(**params), logits.size, prompt)
    return [sampler.pick(logits, position).token for position in range(count)]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def assert_follows(tokens: list[int], probs: np.ndarray) -> None:
    """A chi-square test of the drawn tokens at about p = 1e-4 (Wilson and Hilferty's normal approximation)."""
    counts = np.bincount(tokens, minlength=probs.size)
    assert counts[probs == 0].sum() == 0
    common = probs * len(tokens) > 6
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(probs[common], probs[~common].sum()) * len(tokens)
    counts, expected = counts[expected > 3], expected[expected > 3]
    assert expected.size > 2
    chi = float(((counts - expected) ** 2 / expected).sum())
    freedom = expected.size - 1
    assert ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom)) < 3.72


def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie() -> None:
    assert picks(3, temperature=0) == [3, 3, 3]
    assert picks(1, np.array([0.0, 5.0, 5.0], np.float32), temperature=0) == [1]


def test_a_pick_depends_on_seed_and_position_not_on_what_was_drawn_before() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    alone = [Sampler(SamplingParams(seed=7), 50).pick(row, position) for position, row in enumerate(rows)]
    backwards = Sampler(SamplingParams(seed=7), 50)
    assert [backwards.pick(rows[position], position) for position in reversed(range(40))] == alone[::-1]
    other = Sampler(SamplingParams(seed=8), 50)
    assert [other.pick(row, position) for position, row in enumerate(rows)] != alone
    assert len(set(picks(60, np.zeros(50, np.float32), seed=1))) > 20
    assert picks(20) != picks(20)  # without a seed each request has its own


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = np.random.default_rng(3).normal(size=40).astype(np.float32)
    drawn = picks(20_000, logits, seed=11, temperature=temperature)
    assert_follows(drawn, softmax(logits / np.float32(temperature)))


def test_draws_of_one_position_follow_the_softmax_over_seeds() -> None:
    logits = np.random.default_rng(4).normal(size=12).astype(np.float32)
    drawn = [Sampler(SamplingParams(seed=seed), 12).pick(logits, 17).token for seed in range(6000)]
    assert_follows(drawn, softmax(logits))


def test_draws_of_neighbouring_positions_are_independent() -> None:
    drawn = picks(20_000, np.zeros(5, np.float32), seed=2)
    assert_follows([5 * a + b for a, b in itertools.pairwise(drawn)], np.full(25, 1 / 25))


@pytest.mark.parametrize("params", [{"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9}])
def test_cut_draws_follow_the_softmax_of_the_head(params: dict[str, Any]) -> None:
    logits = np.random.default_rng(5).normal(scale=1.5, size=60).astype(np.float32)
    probs = kept_probs(logits, **params)
    assert 3 < (probs > 0).sum() < 60
    assert_follows(picks(8_000, logits, seed=12, **params), probs)


def kept_probs(logits: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """The definitions, token by token."""
    probs = softmax(logits)
    order = sorted(range(logits.size), key=lambda token: (-logits[token], token))[: top_k or None]
    whole, before, kept = sum(probs[token] for token in order), 0.0, []
    for token in order:
        if before < top_p * whole and probs[token] >= min_p * probs.max():
            kept.append(token)
        before += probs[token]
    only = np.zeros_like(probs)
    only[kept] = probs[kept]
    return only / only.sum()


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {3, 1}), ({"top_p": 0.6}, {3}), ({"top_p": 0.8}, {3, 1}), ({"top_p": 1e-9}, {3}),
        ({"min_p": 1.0}, {3}), ({"min_p": 0.3}, {3, 1}), ({"temperature": 1e-300}, {3}),
        ({"top_k": 2, "top_p": 0.7}, {3}),  # of the two left the first has 0.73
    ],
)  # fmt: skip
def test_cuts_keep_the_head(params: dict[str, Any], allowed: set[int]) -> None:
    assert set(picks(300, seed=0, **params)) == allowed


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=40), st.integers(0, 9), st.floats(1e-6, 1), st.floats(0, 1),
    st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_every_pick_is_a_kept_token_with_its_own_logprob(
    values: list[int], top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = np.array(values, np.float32)  # many ties
    sampler = Sampler(SamplingParams(seed=seed, top_k=top_k, top_p=top_p, min_p=min_p), logits.size)
    pick = sampler.pick(logits, 5)
    assert kept_probs(logits, top_k, top_p * (1 + 1e-9), min_p * (1 - 1e-9))[pick.token] > 0
    assert pick.logprob == pytest.approx(math.log(softmax(logits)[pick.token]))


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.floats(0.05, 2), st.floats(0.01, 8))
def test_only_the_noise_that_could_win_is_computed_and_that_changes_nothing(
    seed: int, temperature: float, scale: float
) -> None:
    logits = np.random.default_rng(seed).normal(scale=scale, size=3000).astype(np.float32)
    top_p = 1 - 1e-12  # keeps all, by another way
    assert picks(8, logits, seed=seed, temperature=temperature) == picks(
        8, logits, seed=seed, temperature=temperature, top_p=top_p
    )
    shifted = picks(8, logits + np.float32(512), seed=seed, temperature=0)
    assert shifted == [int((logits + np.float32(512)).argmax())] * 8


def test_top_logprobs_are_the_likeliest_in_order() -> None:
    logits = np.array([1.0, 3.0, 3.0, 0.0, 2.0], np.float32)
    pick = Sampler(SamplingParams(temperature=0, logprobs=3, logit_bias={3: 100}), 5).pick(logits, 0)
    assert pick.token == 3
    assert [token for token, _ in pick.top] == [1, 2, 4]
    logprobs = np.log(softmax(logits))
    assert [logprob for _, logprob in pick.top] == pytest.approx([logprobs[t] for t in (1, 2, 4)])
    assert pick.logprob == token_logprobs(logits[None], [3])[0]  # of the model, before the bias
    assert len(Sampler(SamplingParams(logprobs=20), 5).pick(logits, 0).top) == 5
    assert Sampler(SamplingParams(logprobs=True), 5).pick(logits, 0).top == ()


def test_openai_penalties_count_generated_tokens() -> None:
    logits = np.array([3.0, 2.5, 2.1, 0.0], np.float32)
    # 3, then 2.5; then 2.1 against 3 - 1 = 2 and 1.5; then all stand at 2, 1.5 and 1.1 for good.
    assert picks(5, logits, prompt=[0, 0], temperature=0, presence_penalty=1.0) == [0, 1, 2, 0, 0]
    assert picks(5, logits, temperature=0, frequency_penalty=0.3) == [0, 0, 1, 0, 1]
    assert picks(3, logits, temperature=0, frequency_penalty=-2.0) == [0, 0, 0]


def test_repetition_penalty_counts_the_prompt_and_divides_or_multiplies_by_sign() -> None:
    logits = np.array([2.0, 1.5, -1.0, -1.1], np.float32)
    assert picks(2, logits, prompt=[0], temperature=0, repetition_penalty=2.0) == [1, 0]
    assert picks(1, logits[2:], prompt=[0], temperature=0, repetition_penalty=1.2) == [1]
    assert picks(1, logits[2:], prompt=[1], temperature=0, repetition_penalty=0.5) == [1]


def test_rollback_undoes_accept() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.7, repetition_penalty=1.3, logit_bias={2: 1.0})
    rows = np.random.default_rng(1).normal(size=(30, 6)).astype(np.float32)
    there, back = Sampler(params, 6, [4]), Sampler(params, 6, [4])
    for position, row in enumerate(rows):
        for token in (1, position % 6, 1):
            back.accept(token)
        back.rollback(3)
        assert back.pick(row, position) == there.pick(row, position)


def test_bias_and_grammar_decide_what_may_come() -> None:
    assert picks(2, temperature=0, logit_bias={4: 100, 3: -100}) == [4, 4]
    grammar = Cycle({0, 4}, {2}, set())
    assert picks(6, temperature=0, grammar=grammar) == [0, 2, 3, 0, 2, 3]
    assert picks(6, temperature=0, grammar=grammar)[0] == 0  # each request took a copy
    assert set(picks(400, seed=1, grammar=Cycle({0, 2}), top_k=3)) == {0, 2}
    assert picks(1, temperature=0, grammar=Cycle({1, 2}, size=3)) == [1]  # a mask shorter than the vocabulary
    with pytest.raises(RequestError, match="allows no token after 0"):
        picks(1, grammar=Cycle({9}))


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8},
    "cut": {"top_k": 8, "top_p": 0.9, "min_p": 0.02, "logprobs": 4},
    "penalised": {"presence_penalty": 0.9, "frequency_penalty": 0.5, "repetition_penalty": 1.4, "logit_bias": {3: 2}},
    "grammar": {"grammar": Cycle({0, 1, 2}, {3, 4, 5, 6}, set(), {7, 8}, size=12), "temperature": 1.3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_verification_equals_picking_one_at_a_time(kind: str) -> None:
    rng = np.random.default_rng(6)
    params = SamplingParams(seed=5, **KINDS[kind])
    rows = rng.normal(scale=2, size=(400, 12)).astype(np.float32)  # the logits of each position, whatever came before
    single = Sampler(params, 12, [1, 2])
    want = [single.pick(row, position) for position, row in enumerate(rows)]
    sampler, got, lengths = Sampler(params, 12, [1, 2]), [], set()
    while len(got) < 390:
        at, count = len(got), int(rng.integers(0, 6))
        right = [pick.token for pick in want[at : at + count]]
        drafts = [token if rng.random() < 0.7 else int(rng.integers(12)) for token in right]
        new = sampler.verify(rows[at : at + count + 1], drafts, at)
        assert len(new) == 1 + next((i for i in range(count) if drafts[i] != right[i]), count)
        lengths.add(len(new))
        got += new
    assert got == want[: len(got)]
    assert lengths == {1, 2, 3, 4, 5, 6}


def test_verification_stops_at_an_end() -> None:
    rows = np.eye(4, 6, dtype=np.float32) * 9
    sampler = Sampler(SamplingParams(temperature=0), 6)
    assert [pick.token for pick in sampler.verify(rows, [0, 1, 2], 0, ends={1})] == [0, 1]
    assert [pick.token for pick in sampler.verify(rows, [0, 1, 2], 0)] == [0, 1, 2, 3]


def test_broken_logits_are_refused() -> None:
    for temperature, bad in itertools.product((0, 1), (math.nan, math.inf, -math.nan)):
        with pytest.raises(CheckpointError, match="NaN or inf"):
            Sampler(SamplingParams(temperature=temperature), 2).pick(np.array([0, bad], np.float32), 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", True), ("max_tokens", 1.5), ("max_tokens", "9"), ("temperature", -0.1),
        ("temperature", 2.1), ("temperature", math.nan), ("temperature", "1"), ("temperature", True), ("top_p", 0),
        ("top_p", 1.01), ("top_k", -1), ("top_k", 1.0), ("seed", -1), ("seed", 2**63), ("seed", "x"), ("stop", [""]),
        ("stop", ["a"] * 17), ("stop", [1]), ("stop", 5), ("logprobs", 21), ("logprobs", -1), ("logprobs", 1.0),
        ("min_p", 1.1), ("min_p", -0.1), ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("repetition_penalty", 1e-310),
        ("repetition_penalty", 0), ("repetition_penalty", math.inf), ("logit_bias", {1: 101}), ("logit_bias", [1]),
        ("logit_bias", {"1": 1}), ("logit_bias", {-1: 1}), ("stop_token_ids", [-1]), ("stop_token_ids", 3),
        ("ignore_eos", 1), ("prompt_logprobs", 1), ("grammar", object()),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name}="):
        SamplingParams(**{name: value})


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match=r"logit_bias\[5\]: expected token ids below 5"):
        Sampler(SamplingParams(logit_bias={5: 1}), 5)


def test_stop_takes_one_string_or_several() -> None:
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[7]).ends(1) == {1, 7}
    assert SamplingParams(stop_token_ids=[7], ignore_eos=True).ends(1) == {7}
