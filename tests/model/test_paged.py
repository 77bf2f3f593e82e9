"""The ragged forward over paged pools against the plain forward, and its exactness: the same bits in any company."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import TINY, TRUE, drawn, ids_of
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from pelagos.config import ModelConfig
from pelagos.errors import ConfigError
from pelagos.kernels import ragged
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.ref.tiles import TILE
from pelagos.load import load_model
from pelagos.model import FullSequence, Transformer, layers
from pelagos.model.exactness import ROWS, broken_rule
from pelagos.model.paged import PagedForward

NANO = Path(__file__).resolve().parents[2] / "models" / "nano"
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "released"
MANY = dataclasses.replace(TINY, compress_ratios=(0, 4, 2, 4, 2, 0, 0), index_topk=45)  # entries in several tiles
REWIND = 4
Array = np.ndarray


class Served:
    """A model over pools of its own; sequences take pages and slots in a drawn order."""

    def __init__(self, model: Transformer, *, exact: bool = True, seed: int = 0, sequences: int = 8) -> None:
        self.layout = CacheLayout(model.config, model.mode, REWIND)
        self.rng = np.random.default_rng(seed)
        self.table = self.rng.permutation(8 * sequences).astype(np.int32).reshape(sequences, 8)
        self.slot = self.rng.permutation(sequences)
        self.pages = torch.zeros(8 * sequences, self.layout.page_bytes, dtype=torch.uint8)
        self.slots = torch.zeros(sequences, self.layout.slot_bytes, dtype=torch.uint8)
        self.paged = PagedForward(model, self.layout, self.pages, self.slots, exact=exact)

    def span(self, which: int, ids: Array, begin: int, end: int, frozen: int = 0) -> Span:
        """Return positions begin..end-1 of a sequence, all logits and streams wanted."""
        size = end - begin
        return Span(ids[begin:end], begin, int(self.slot[which]), self.table[which], frozen, size, size)

    def alone(self, ids: Array, cuts: list[int] | None = None) -> Array:
        """Return the logits of sequence 0, computed in chunks that end at `cuts`."""
        begins, ends = [0, *(cuts or [])], [*(cuts or []), len(ids)]
        return np.concatenate(
            [self.paged.forward([self.span(0, ids, *cut)]).logits for cut in zip(begins, ends, strict=True)]
        )

    def together(self, texts: list[Array]) -> list[Array]:
        """Return all logits of texts run side by side in drawn chunks, some wrong at first and taken back."""
        done, logits = (
            [0] * len(texts),
            [np.empty((len(ids), self.layout.config.vocab_size), np.float32) for ids in texts],
        )
        while any(at < len(ids) for at, ids in zip(done, texts, strict=True)):
            spans, chosen = [], []
            for which, ids in enumerate(texts):
                if done[which] < len(ids) and self.rng.random() < 0.8:
                    size = int(self.rng.choice([1, 1, 1, 2, 5, 30, 70]))
                    end = min(len(ids), done[which] + size)
                    wrong = size <= REWIND + 1 and end - done[which] > 1 and self.rng.random() < 0.5
                    text = np.concatenate((ids[: done[which] + 1], ids[::-1])) if wrong else ids
                    spans.append(self.span(which, text, done[which], end))
                    chosen.append((which, done[which] + 1 if wrong else end))
            at = 0
            found = self.paged.forward(spans).logits if spans else None
            for span, (which, end) in zip(spans, chosen, strict=True):
                assert found is not None
                logits[which][span.start : end] = found[at : at + end - span.start]
                done[which], at = end, at + len(span.tokens)
        return logits


def texts_of(config: ModelConfig, lengths: tuple[int, ...]) -> list[Array]:
    return [ids_of(config, 1, length, seed)[0].numpy() for seed, length in enumerate(lengths)]


def whole(model: Transformer, ids: Array) -> Array:
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None])[0].float().numpy()


@pytest.fixture(scope="module", params=["tiny", "tiny released", "tiny bfloat16", "true ratios", "many tiles"])
def case(request: pytest.FixtureRequest) -> tuple[Transformer, list[Array], list[Array]]:
    """A model, texts and the bits of their logits when each runs alone and whole."""
    config = {"true ratios": TRUE, "many tiles": MANY}.get(request.param, TINY)
    model = drawn(config, 0, "released" if request.param in ("tiny released", "tiny bfloat16") else "reference")
    if request.param == "tiny bfloat16":
        model = model.to(torch.bfloat16)
        model.carrier = torch.bfloat16
    texts = texts_of(config, (200, 131, 60, 17, 96))
    return model, texts, [Served(model, seed=9).alone(ids) for ids in texts]


@pytest.mark.parametrize(
    ("config", "length"), [(TINY, 150), (TRUE, 300), (MANY, 300)], ids=["tiny", "true ratios", "many tiles"]
)
@pytest.mark.parametrize("exact", [True, False])
def test_it_equals_the_forward(config: ModelConfig, length: int, exact: bool) -> None:
    model, (ids,) = drawn(config, 0), texts_of(config, (length,))
    expected = whole(model, ids)
    got = Served(model, exact=exact).alone(ids, [9, 10, length // 2, length - 2, length - 1])
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5)
    for logits, text in zip(Served(model, exact=exact, seed=3).together([ids, ids[:40]]), (ids, ids[:40]), strict=True):
        np.testing.assert_allclose(logits, expected[: len(text)], rtol=0, atol=3e-5)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_company_and_chunks_change_no_bit(case: tuple[Transformer, list[Array], list[Array]], seed: int) -> None:
    model, texts, alone = case
    for logits, expected in zip(Served(model, seed=seed).together(texts), alone, strict=True):
        assert np.array_equal(logits, expected)


def test_single_tokens_change_no_bit(case: tuple[Transformer, list[Array], list[Array]]) -> None:
    model, texts, alone = case
    assert np.array_equal(Served(model, seed=4).alone(texts[2], list(range(1, 60))), alone[2])


def test_recomputing_over_frozen_entries_restores_the_bits(case: tuple[Transformer, list[Array], list[Array]]) -> None:
    model, texts, alone = case
    served, ids = Served(model, seed=5), texts[0]
    served.alone(ids)
    frozen = served.layout.page_tokens
    before = served.pages.clone()
    served.slots.zero_()
    begin = max(0, frozen - served.layout.recompute_tokens)
    parts = [served.paged.forward([served.span(0, ids, a, b, frozen)]).logits for a, b in ((begin, 120), (120, 200))]
    logits = np.concatenate(parts)
    assert np.isfinite(logits).all()
    assert np.array_equal(logits[frozen - begin :], alone[0][frozen:])
    page = served.table[0, 0]
    assert torch.equal(served.pages[page], before[page])
    if begin > 0:
        assert not np.array_equal(logits[: frozen - begin], alone[0][begin:frozen])


def test_drafting(case: tuple[Transformer, list[Array], list[Array]]) -> None:
    model, texts, _ = case
    served, ids = Served(model, seed=6), texts[1]
    spans = [served.span(0, ids, 0, 130), served.span(1, texts[3], 0, 16)]
    streams = served.paged.forward(spans).streams
    assert streams.shape == (146, model.config.hc_mult, model.config.hidden_size)
    following = [
        span._replace(tokens=text[1 : len(span.tokens) + 1]) for span, text in zip(spans, (ids, texts[3]), strict=True)
    ]
    drafted = served.paged.draft(following, streams)
    if model.mode == "reference":
        with torch.no_grad():
            step, cache = model.step(torch.from_numpy(ids[None, :130])), FullSequence(model.config.sliding_window)
            wanted = model.logits(model.draft(model.run(step, cache), torch.from_numpy(ids[None, 1:131]), step, cache))
        np.testing.assert_allclose(drafted.logits[:130], wanted[0].numpy(), rtol=0, atol=2e-5)
    served.slots.zero_()
    alone = []
    for a, b in ((0, 1), (1, 64), (64, 65), (65, 130)):
        part = served.span(0, ids[1:], a, b)
        alone.append(served.paged.draft([part], streams[a:b]))
    assert np.array_equal(np.concatenate([each.logits for each in alone]), drafted.logits[:130])
    assert np.array_equal(np.concatenate([each.streams for each in alone]), drafted.streams[:130])


@pytest.mark.parametrize("mode", ["reference", "released"])
def test_nano_keeps_its_bits(mode: str) -> None:
    model = load_model(NANO, mode=mode)
    texts = texts_of(model.config, (300, 40, 9))
    alone = [Served(model, seed=9).alone(ids) for ids in texts]
    served = Served(model, seed=7)
    chunks = [(0, 130, 0, 20), (130, 300, 20, 24), *((0, 0, at, at + 1) for at in range(24, 30))]
    found: list[list[Array]] = [[], []]
    for a, b, c, d in chunks:
        spans = [served.span(0, texts[0], a, b)] * (b > a) + [served.span(1, texts[1], c, d)]
        logits = served.paged.forward(spans).logits
        found[0].append(logits[: b - a])
        found[1].append(logits[b - a :])
    assert np.array_equal(np.concatenate(found[0]), alone[0])
    assert np.array_equal(np.concatenate(found[1]), alone[1][:30])


def test_without_padding_the_bits_depend_on_company(case: tuple[Transformer, list[Array], list[Array]]) -> None:
    """The control of the tests above: they can fail. With `exact=False` single tokens take other products."""
    model, texts, _ = case
    if model.mode == "released":
        pytest.skip("released sums are exact or in an order of ours, whatever the shape")
    one, many = Served(model, exact=False), Served(model, exact=False, seed=1)
    single = one.alone(texts[2], list(range(1, 60)))
    assert not np.array_equal(many.together(texts[:4])[2], single)


def test_what_does_not_fit_is_refused() -> None:
    model = drawn(TINY, 0)
    layout = CacheLayout(TINY)
    pages, slots = torch.zeros(2, layout.page_bytes, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="slots: expected uint8"):
        PagedForward(model, layout, pages, slots)
    slots = torch.zeros(2, layout.slot_bytes, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="layout of mode 'reference' for a 'released'"):
        PagedForward(drawn(TINY, 0, "released"), layout, pages, slots)


def test_keys_scored_in_turns_give_the_same_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids,) = drawn(MANY, 0), texts_of(MANY, (300,))
    expected = Served(model).alone(ids)
    monkeypatch.setattr(ragged, "KEYS", TILE)
    monkeypatch.setattr(ragged, "TOKENS", 77)
    assert np.array_equal(Served(model).alone(ids), expected)


def test_released_bfloat16_is_as_near_the_recorded_run_as_the_forward() -> None:
    """Rounding at every step drives bfloat16 runs apart, so each is measured by what the float32 run recorded."""
    model, golden = load_model(GOLDEN, mode="released", dtype=torch.bfloat16), load_file(GOLDEN / "golden.safetensors")
    ids, recorded = golden["ids"][0].numpy(), golden["logits"].numpy()
    forward, paged = (np.abs(found - recorded) for found in (whole(model, ids), Served(model).alone(ids, [100, 101])))
    assert np.median(paged) < 1.1 * np.median(forward) < 0.1
    assert paged.mean() < 1.1 * forward.mean()


def test_a_product_that_sees_its_company_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = drawn(TINY, 0), layers.linear
    assert broken_rule(model, max(ROWS)) is None
    monkeypatch.setattr(layers, "linear", lambda x, weight: plain(x, weight) * (1 + 1e-6 * (x.shape[-2] < 20)))
    for rows in ROWS:
        assert f"the attention's inputs of a layer of ratio 0: {rows} tokens" in str(broken_rule(model, rows))
    with pytest.raises(ConfigError, match="exact=True: this host's library does not keep"):
        Served(model)
    assert Served(model, exact=False).paged.numeric_path.endswith("fast")


def test_the_first_number_of_rows_that_keeps_the_bits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, (ids,) = drawn(TINY, 0), layers.linear, texts_of(TINY, (60,))
    monkeypatch.setattr(layers, "linear", lambda x, weight: plain(x, weight) * (1 + 1e-6 * (x.shape[-2] < 10)))
    served = Served(model)
    assert served.paged.numeric_path.endswith("exact 16 rows")
    assert np.array_equal(served.alone(ids, list(range(1, 60))), Served(model).alone(ids))


@pytest.mark.parametrize("mode", ["reference", "released"])
def test_scratch_is_bounded(mode: str) -> None:
    served = Served(drawn(TRUE, 0, mode))
    texts = texts_of(TRUE, (900, 700, 700, 1))
    spans = [served.span(which, ids, 0, len(ids)) for which, ids in enumerate(texts)]
    for call in (spans[3:], spans):
        tokens = sum(len(span.tokens) for span in call)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            served.paged.forward([span._replace(logits=1, streams=0) for span in call])
        recorded: Any = seen.profiler
        taken = [each for each in recorded.kineto_results.events() if each.name() == "[memory]"]
        held = np.cumsum([each.nbytes() for each in sorted(taken, key=lambda each: each.start_ns())])
        assert 0 < held.max() < served.paged.scratch_bytes(tokens)
    assert served.paged.scratch_bytes(10**6) == served.paged.scratch_bytes(ragged.at_once(torch.device("cpu")))
    assert ragged.at_once(torch.device("cuda")) > ragged.at_once(torch.device("cpu"))
