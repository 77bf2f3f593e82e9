"""Drafting with the MTP block, and choosing how deep: never a loss worth naming, most of the gain there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pelagos.engine.sampler import Sampler, SamplingParams
from pelagos.engine.speculation import AdaptiveDepth, Draft, DraftRequest, MTPDrafter, Outcome
from pelagos.kernels.layout import Output, Span

VOCAB, NARROW, WIDE = 32, 2, 3
PAGES = np.zeros(1, np.int32)
_HICCUP = 211  # every so many steps one takes three times as long


class Block:
    """A draft layer that shows what it was called with: logits point at a token made of the last id and streams."""

    def __init__(self, logits: Callable[[int, float], np.ndarray] | None = None) -> None:
        self.calls: list[list[Span]] = []
        self.streams: list[np.ndarray] = []
        self._logits = logits or (lambda token, stream: 9 * np.eye(VOCAB, dtype=np.float32)[(token + int(stream)) % 30])

    def draft(self, spans: Sequence[Span], streams: np.ndarray) -> Output:
        assert len(streams) == sum(len(span.tokens) for span in spans)
        self.calls.append(list(spans))
        self.streams.append(streams)
        last = np.cumsum([len(span.tokens) for span in spans]) - 1
        rows = [self._logits(int(span.tokens[-1]), streams[at, 0, 0]) for span, at in zip(spans, last, strict=True)]
        return Output(np.stack(rows).astype(np.float32), streams[last] + 1)


def rows(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None, None] * np.ones((1, NARROW, WIDE), np.float32)


def asked(key: str, depth: int, **params: object) -> DraftRequest:
    sampler = Sampler(SamplingParams(**{"temperature": 0, **params}), VOCAB)  # type: ignore[arg-type]
    return DraftRequest(key, ord(key), PAGES, sampler, depth)


def test_drafts_go_on_from_what_was_fed_depth_by_depth_for_all_at_once() -> None:
    block = Block()
    drafter = MTPDrafter(block.draft, window=4, max_depth=3)
    drafter.feed("a", 0, np.arange(1, 7), rows(0, 1, 2, 3, 4, 5))  # six positions, of which the window holds four
    drafter.feed("b", 7, np.array([8]), rows(1))
    drafts = drafter.draft([asked("a", 3), asked("b", 1), asked("c", 2), asked("b", 0)])
    # Of "a": 6 + stream 5, then 11 + 6, then 17 + 7; of "b": 8 + 1. Nothing was fed of "c".
    assert [draft.tokens for draft in drafts] == [(11, 17, 24), (9,), (), ()]
    assert all(0.9 < chance < 1 for draft in drafts for chance in draft.confidence)
    first, second, third = block.calls
    assert [(span.start, span.tokens.tolist(), span.slot, span.streams) for span in first] == [
        (2, [3, 4, 5, 6], ord("a"), 1), (7, [8], ord("b"), 1),
    ]  # fmt: skip
    assert [(span.start, span.tokens.tolist()) for span in second + third] == [(6, [11]), (7, [17])]
    assert block.streams[0][:, 0, 0].tolist() == [2, 3, 4, 5, 1]
    # What was fed is used up; what comes next follows it, and a gap begins anew.
    drafter.feed("a", 6, np.array([11, 12]), rows(6, 7))
    drafter.feed("b", 20, np.array([1]), rows(0))
    drafter.feed("b", 21, np.array([2]), rows(0))
    drafter.forget("a")
    assert [draft.tokens for draft in drafter.draft([asked("a", 1), asked("b", 1)])] == [(), (2,)]
    assert block.calls[-1][0].start == 20


def test_a_draft_ends_at_an_end_token_and_at_the_greatest_depth() -> None:
    drafter = MTPDrafter(Block().draft, window=4, max_depth=2)
    for ends, tokens in (({11}, (11,)), ({12}, (11, 17))):
        drafter.feed("a", 0, np.array([6]), rows(5))
        assert drafter.draft([asked("a", 9)._replace(ends=ends)])[0].tokens == tokens


def test_drafts_pick_with_the_requests_own_noise_and_leave_its_record_alone() -> None:
    logits = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)
    drafter = MTPDrafter(Block(lambda token, stream: logits[token]).draft, window=4, max_depth=3)
    params = {"temperature": 1.0, "seed": 3, "presence_penalty": 1.5, "repetition_penalty": 1.2}
    request = asked("a", 3, **params)
    request.sampler.accept(5)
    untouched = Sampler(request.sampler.params, VOCAB)
    untouched.accept(5)
    drafter.feed("a", 9, np.array([5]), rows(0))  # the last token is that of position 10
    drafted = drafter.draft([request])[0].tokens
    assert request.sampler.pick(logits[5], 11) == untouched.peek(logits[5], 11)
    token, want = 5, []
    for position in (11, 12, 13):
        token = untouched.pick(logits[token], position).token
        want.append(token)
    assert list(drafted) == want


def test_a_draft_ends_where_its_grammar_does() -> None:
    class Two:
        """A grammar of two tokens and nothing behind them."""

        def __init__(self, taken: int = 0) -> None:
            self.taken = taken

        def mask(self) -> np.ndarray:
            return np.full(VOCAB, self.taken < 2)

        def accept(self, token: int) -> None:
            self.taken += 1

        def rollback(self, count: int) -> None:
            self.taken -= count

        def fork(self) -> Two:
            return Two(self.taken)

    drafter = MTPDrafter(Block().draft, window=4, max_depth=4)
    request = asked("a", 4, grammar=Two())
    for _ in range(2):  # the second time shows that the first left its record alone
        drafter.feed("a", 0, np.array([6]), rows(5))
        assert len(drafter.draft([request])[0].tokens) == 2


class World:
    """Requests, a drafter and a machine that are nothing but chances and seconds."""

    def __init__(
        self,
        batch: int,
        step: Callable[[int], float],
        draft: Callable[[int, int], float],
        chances: Callable[[int], Sequence[float]],
        *,
        telling: bool = False,
        life: int = 0,
        seed: int = 0,
        noise: float = 0.05,
        telling_s: float = 0.0,
    ) -> None:
        self.step, self.draft, self.chances, self.telling, self.life = step, draft, chances, telling, life
        self.keys = [f"{index}" for index in range(batch)]
        self.rng = np.random.default_rng(seed)
        self.noise, self.rested, self.telling_s = noise, 0, telling_s
        self.behind = dict.fromkeys(self.keys, 0)  # positions that the draft layer has to catch up on

    def pace(self, policy: AdaptiveDepth | int, steps: int, *, beside: bool = False) -> float:
        """Tokens a second under a policy or at a fixed depth; `beside` prompts, whose own time is left out."""
        tokens = seconds = 0.0
        told, rest_s = True, None
        for time in range(steps):
            if self.life and time % self.life == self.life - 1:
                self._replace(time, policy)
            made, took, counts = self._draft(policy if told else 0, time)
            told = isinstance(policy, int) or not policy.rests(len(self.keys), rest_s)
            self.rested += not told
            outcomes = []
            for key, draft, count in zip(self.keys, made, counts, strict=True):
                agreed = next((at for at in range(count) if draft.tokens[at]), count)
                picked = [0] * (agreed + 1)  # the target always picks 0; a wrong draft is 1
                outcomes.append(Outcome(key, count, picked))
                tokens += 1 + sum(math.prod(draft.confidence[: at + 1]) for at in range(count))  # expected: no luck
                self.behind[key] = min(self.behind[key] + len(picked) - bool(draft.tokens), 127)
            spent = self.step(len(self.keys) + sum(counts)) * self._jitter() * (3 if time % _HICCUP == 9 else 1)
            spent += self.telling_s * (told and not isinstance(policy, int))
            rest_s = None if told or beside else spent
            if not isinstance(policy, int) and told:
                policy.observe(outcomes, None if beside else spent)
            seconds += spent + took
        return tokens / seconds

    def expected_pace(self, depth: int) -> float:
        """Tokens a second at a fixed depth in the long run, for chances that stay."""
        batch, more = len(self.keys), float(np.cumprod(self.chances(0)[:depth]).sum())
        step = self.step(batch * (1 + depth)) * (1 + 2 / _HICCUP)
        draft = self.draft(depth, batch * depth) + self.draft(0, round(batch * more)) if depth else 0.0
        return batch * (1 + more) / (step + draft)

    def _replace(self, time: int, policy: AdaptiveDepth | int) -> None:
        at = time // self.life % len(self.keys)
        if not isinstance(policy, int):
            policy.forget(self.keys[at])
        self.behind.pop(self.keys[at])
        self.keys[at] = f"{at}.{time}"
        self.behind[self.keys[at]] = 100

    def _draft(self, policy: AdaptiveDepth | int, time: int) -> tuple[list[Draft], float, list[int]]:
        depths = [policy] * len(self.keys) if isinstance(policy, int) else policy.depths(self.keys)
        made, catching = [], 0
        for key, depth in zip(self.keys, depths, strict=True):
            tokens, confidence = [], []
            for chance in self.chances(time)[:depth]:
                known = self.rng.beta(chance, 1 - chance) if self.telling else chance
                tokens.append(int(self.rng.random() >= known))
                confidence.append(float(known))
            made.append(Draft(tuple(tokens), tuple(confidence)))
            if depth:
                catching += self.behind[key]
                self.behind[key] = 0
        took = (self.draft(max(depths), sum(depths)) + self.draft(0, catching)) * self._jitter() if any(depths) else 0.0
        counts = [len(d.tokens) for d in made] if isinstance(policy, int) else policy.cut(self.keys, made, took)
        return made, took, counts

    def _jitter(self) -> float:
        return 1 + self.noise * self.rng.standard_normal()


def line(base: float, slope: float) -> Callable[[int], float]:
    return lambda tokens: base + slope * tokens


def always(*chances: float) -> Callable[[int], Sequence[float]]:
    return lambda time: chances


GOOD, FAIR, POOR = (0.8, 0.7, 0.6, 0.5), (0.5, 0.4, 0.3, 0.3), (0.05,) * 4
# batch, step seconds by tokens, draft seconds by calls and tokens, chances (all in ms)
WORLDS = {
    "one, winning": (1, line(0.8, 0.2), lambda c, n: 0.15 * c + 0.02 * n, always(*GOOD)),
    "one, deep": (1, line(0.95, 0.05), lambda c, n: 0.1 * c + 0.01 * n, always(0.9, 0.9, 0.85, 0.85)),
    "one, on a CPU": (1, line(0.3, 0.23), lambda c, n: 0.24 * c, always(0.78, 0.6, 0.6, 0.6)),
    "one, losing": (1, line(0.4, 0.6), lambda c, n: 0.2 * c + 0.05 * n, always(*FAIR)),
    "one, even": (1, line(0.75, 0.25), lambda c, n: 0.15 * c + 0.05 * n, always(*FAIR)),
    "one, useless": (1, line(0.8, 0.2), lambda c, n: 0.2 * c + 0.05 * n, always(*POOR)),
    "four, losing": (4, line(0.8, 0.3), lambda c, n: 0.2 * c + 0.04 * n, always(0.55, 0.4, 0.3, 0.3)),
    "eight, flat": (8, line(10, 0.01), lambda c, n: c + 0.001 * n, always(*GOOD)),
    "sixteen, winning": (16, line(3, 0.08), lambda c, n: 0.3 * c + 0.02 * n, always(*GOOD)),
    "sixteen, losing": (16, line(0.5, 0.3), lambda c, n: 0.2 * c + 0.04 * n, always(*FAIR)),
    "sixteen, tiles": (16, lambda n: 2.0 * math.ceil(n / 16), lambda c, n: 0.2 * c + 0.02 * n, always(*FAIR)),
}


@pytest.mark.parametrize("telling", [False, True])
@pytest.mark.parametrize("name", WORLDS)
def test_it_is_never_a_loss_and_near_the_best_fixed_depth(name: str, telling: bool) -> None:
    fixed = [World(*WORLDS[name]).expected_pace(depth) for depth in range(5)]
    ours = np.mean([World(*WORLDS[name], telling=telling, seed=s).pace(AdaptiveDepth(4), 1500) for s in (1, 2)])
    assert ours >= 0.985 * fixed[0]
    if max(fixed) > 1.05 * fixed[0]:  # a gain that can be told from noise
        assert ours >= 0.97 * max(fixed)


def test_a_slow_first_step_does_not_make_drafts_look_good() -> None:
    policy, world = AdaptiveDepth(4), World(*WORLDS["one, even"])
    policy.depths(["0"])
    policy.observe([Outcome("0", 0, [0])], 2.5)  # it takes 1.0
    assert world.pace(policy, 300) >= 0.97 * World(*WORLDS["one, even"]).pace(0, 300)


@pytest.mark.parametrize("first", [20, 2000])
def test_a_first_step_that_compiles_does_not_end_drafting(first: float) -> None:
    seen: set[int] = set()
    batch, usual, draft, chances = WORLDS["one, winning"]

    def step(count: int) -> float:
        compiles = count not in seen
        seen.add(count)
        return usual(count) + first * compiles

    world, policy = World(batch, step, draft, chances), AdaptiveDepth(4)
    world.pace(policy, 2500)
    assert world.pace(policy, 1500) >= 1.15 * World(batch, usual, draft, chances).pace(0, 1500)


def test_a_clock_that_stands_still_harms_nothing() -> None:
    policy = AdaptiveDepth(4)
    for _ in range(200):
        if not policy.rests(1, 0.0):
            depth = policy.depths(["a"])[0]
            policy.cut(["a"], [Draft((0,) * depth, (0.5,) * depth)], 0.0)
            policy.observe([Outcome("a", depth, [0] * (depth + 1))], 0.0)


def test_where_drafts_do_not_pay_it_mostly_rests_for_as_many_requests_whoever_they_are() -> None:
    world, policy = World(*WORLDS["sixteen, losing"]), AdaptiveDepth(4)
    world.pace(policy, 3000)
    assert 2400 < world.rested < 3000
    while not policy.rests(16, None):  # the short part of its cycle in which it watches
        policy.observe([Outcome(key, 0, [0]) for key in world.keys], 5.3)
        policy.cut(world.keys, [Draft()] * 16, 0.0) if any(policy.depths(world.keys)) else None
    assert policy.rests(16, None)
    assert not policy.rests(15, None)
    assert policy.rests(16, None)


def test_where_drafts_begin_to_pay_other_numbers_of_requests_look_again() -> None:
    policy = AdaptiveDepth(4)
    policy._rests[16] = 200
    assert policy.rests(16, None)
    World(*WORLDS["one, winning"]).pace(policy, 600)
    assert not policy.rests(16, None)


def test_plain_steps_learned_on_a_slow_day_do_not_make_drafts_look_good_for_long() -> None:
    policy, world = AdaptiveDepth(4), WORLDS["one, even"]
    for _ in range(40):
        policy.depths(["0"])
        policy.observe([Outcome("0", 0, [0])], 1.6)  # it takes 1.0
    assert World(*world).pace(policy, 1500) >= 0.97 * World(*world).pace(0, 1500)


class Shared(World):
    """Other work makes some steps in a row half as slow again, and drafts leave caches cold for the next ones."""

    slow, plain = False, 100

    def _jitter(self) -> float:
        self.slow = self.rng.random() < (0.85 if self.slow else 0.03)
        return (1.5 if self.slow else 1.0) * super()._jitter()

    def cold(self, tokens: int) -> float:
        self.plain = 0 if tokens > len(self.keys) else self.plain + 1
        return WORLDS["one, on a CPU"][1](tokens) * (1 + 0.3 * 0.85**self.plain * (self.plain > 0))


def test_steps_that_were_slow_for_other_reasons_do_not_make_drafts_look_good() -> None:
    ratios = []
    for seed in range(24):
        ours, plain = (Shared(*WORLDS["one, on a CPU"], seed=s) for s in (seed, 1000 + seed))
        ours.step = ours.cold
        ratios.append(ours.pace(AdaptiveDepth(4), 432) / plain.pace(0, 432))
    assert np.mean(ratios) >= 0.98


@pytest.mark.parametrize("name", ["one, losing", "one, useless", "four, losing", "sixteen, losing"])
def test_beside_prompts_losing_drafts_are_not_made_either(name: str) -> None:
    world, policy = World(*WORLDS[name]), AdaptiveDepth(4)
    world.pace(policy, 1500)
    assert world.pace(policy, 1000, beside=True) >= 0.975 * World(*WORLDS[name]).pace(0, 1000)
    assert world.pace(policy, 400) >= 0.975 * World(*WORLDS[name]).pace(0, 400)


def test_what_telling_it_takes_is_not_held_against_plain_steps() -> None:
    world, policy = World(*WORLDS["one, even"], telling_s=0.08), AdaptiveDepth(4)
    World(*WORLDS["one, losing"], telling_s=0.08).pace(policy, 400)
    assert world.pace(policy, 2500) >= 0.975 * world.pace(0, 2500)


@pytest.mark.parametrize("name", ["one, losing", "one, useless", "four, losing"])
def test_what_many_requests_earned_is_not_spent_by_a_few(name: str) -> None:
    ratios = []
    for seed in range(8):
        policy = AdaptiveDepth(4)
        World(*WORLDS["sixteen, winning"], seed=seed).pace(policy, 3000)
        ours, plain = (World(*WORLDS[name], seed=100 + seed) for _ in range(2))
        ratios.append(ours.pace(policy, 150) / plain.pace(0, 150))
    assert np.mean(ratios) >= 0.96


@pytest.mark.parametrize("name", ["one, even", "sixteen, winning", "sixteen, losing"])
def test_requests_that_come_and_go_are_no_loss(name: str) -> None:
    fixed = [World(*WORLDS[name], life=6).pace(depth, 1500) for depth in range(3)]
    policy = AdaptiveDepth(4)
    assert World(*WORLDS[name], life=6, seed=1).pace(policy, 1500) >= 0.975 * max(fixed)
    assert len(policy._own) <= 16  # nothing is kept of those that ended


def test_it_follows_when_the_text_gets_easier_or_harder() -> None:
    batch, step, draft, _ = WORLDS["one, winning"]
    for first, then in ((POOR, GOOD), (GOOD, POOR)):

        def chances(time: int, first: tuple[float, ...] = first, then: tuple[float, ...] = then) -> Sequence[float]:
            return first if time < 1500 else then

        fixed = [World(batch, step, draft, chances).pace(depth, 4000) for depth in range(5)]
        assert World(batch, step, draft, chances).pace(AdaptiveDepth(4), 4000) > 1.03 * max(fixed)


def test_confidence_saves_hopeless_drafts_from_verification() -> None:
    world = WORLDS["sixteen, winning"]
    blind = World(*world).pace(AdaptiveDepth(4), 1500)
    assert World(*world, telling=True).pace(AdaptiveDepth(4), 1500) > 1.015 * blind


def test_choices_are_a_function_of_what_was_told() -> None:
    paces = {World(*WORLDS["one, even"]).pace(AdaptiveDepth(4), 300) for _ in range(2)}
    assert len(paces) == 1


def test_the_first_step_is_plain_and_steps_with_other_work_are_not_timed() -> None:
    policy = AdaptiveDepth(2)
    for _ in range(50):
        assert policy.depths(["a"]) == [0]
        assert policy.cut(["a"], [Draft()], 0.0) == [0]
        policy.observe([Outcome("a", 0, [0])], None)
    policy.observe([Outcome("a", 0, [0])], 1e-3)
    assert policy.depths(["a", "b"]) == [0, 0]
    rested = 0
    while policy.rests(2, 1e-3):  # what plain steps of two take comes first
        rested += 1
    assert rested > 1
    assert [policy.depths(["a", "b"]), AdaptiveDepth(0).depths(["a"]), policy.depths([])] == [[1, 1], [0], []]
