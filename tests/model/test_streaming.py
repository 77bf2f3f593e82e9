"""Experts read from the checkpoint when chosen: the same bits under any budget, by the native forward and by torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from pelagos import LLM
from pelagos.engine.runner import Pools, fingerprint, make_forward
from pelagos.engine.sampler import SamplingParams
from pelagos.errors import CapacityError, CheckpointError, ConfigError
from pelagos.kernels.layout import CacheLayout, Output, Span
from pelagos.load import load_model
from pelagos.model import Transformer
from pelagos.model.streaming import ExpertStore, store_of

BF16, F32 = 3 * 256 * 128 * 2, 3 * 256 * 128 * 4  # an expert of nano in the two forms


def store(model: Transformer) -> ExpertStore:
    found = store_of(model)
    assert found is not None
    return found


def outputs(model: Transformer, native: bool) -> list[Output]:
    """A prompt over two blocks of the native forward, tokens of two sequences, and a draft."""
    layout = CacheLayout(model.config, model.mode, 4)
    forward = make_forward(model, Pools(layout, pages=8, slots=2), exact=True, native=native)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 4096, count) for count in ((300 if native else 140), 5)]
    pages = np.arange(4, dtype=np.int32)
    spans = [Span(ids[i], 0, i, pages + 4 * i, logits=len(ids[i]), streams=2) for i in range(2)]
    found = [forward.forward(spans)]
    generated = [Span(ids[1][:1], len(ids[i]), i, pages + 4 * i, logits=1, decode=True) for i in range(2)]
    found.append(forward.forward(generated))
    drafted = [Span(ids[1][:2], len(ids[0]) - 2, 0, pages, logits=2)]
    return [*found, forward.draft(drafted, found[0].streams[:2])]


def assert_equal(got: list[Output], want: list[Output]) -> None:
    for each, other in zip(got, want, strict=True):
        assert np.array_equal(each.logits, other.logits)
        assert np.array_equal(each.streams, other.streams)


@pytest.mark.parametrize(("mode", "native"), [("reference", True), ("reference", False), ("released", False)])
def test_bits_do_not_depend_on_the_budget(mode: str, native: bool) -> None:
    whole = load_model("nano", mode=mode)
    want = outputs(whole, native)
    each = BF16 if native else F32
    for places in (20, 47, 180) if native else (20, 180):  # torch takes seconds for each
        model = load_model("nano", mode=mode, expert_bytes=places * each + 1)
        assert sum(p.numel() for p in model.parameters()) < 0.4 * sum(p.numel() for p in whole.parameters())
        assert_equal(outputs(model, native), want)
        report = store(model).report()
        assert (report["places"], report["experts"]) == (places, 180)
        assert (report["hit_rate"] > 0.5) == (places == 180)
        assert report["tokens"] == (307 if native else 147)
    assert fingerprint(model) == fingerprint(whole)


def test_a_budget_below_one_layer_is_refused() -> None:
    with pytest.raises(CapacityError, match="holds 19 experts of 196,608 bytes: a layer has 20"):
        LLM("nano", expert_bytes=20 * BF16 - 1)
    with pytest.raises(ConfigError, match="for float32 on a CPU"):
        load_model("nano", dtype=torch.bfloat16, expert_bytes=1 << 24)


@pytest.mark.parametrize("native", [True, False])
def test_a_failed_read_is_told_and_leaves_no_trace(native: bool) -> None:
    model = load_model("nano", expert_bytes=60 * (BF16 if native else F32))
    layout = CacheLayout(model.config, "reference")
    forward = make_forward(model, Pools(layout, pages=1, slots=1), exact=True, native=native)
    span = Span(np.array([5, 6, 7]), 0, 0, np.zeros(1, np.int32), logits=3)
    read, calls = store(model)._read, 0

    def failing(names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise CheckpointError("gone")
        return read(names)

    store(model)._read = failing
    with pytest.raises(CheckpointError, match="gone"):
        forward.forward([span])
    other = load_model("nano")
    want = make_forward(other, Pools(layout, pages=1, slots=1), exact=True, native=native).forward([span])
    assert np.array_equal(forward.forward([span]).logits, want.logits)


def test_an_engine_generates_alike() -> None:
    """Drafts, several requests: the same tokens and log-probabilities with a fifth of the experts in memory."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=True)
    prompts = [[0, 377, 953, 1806, 29, 305, 766, 443], [7, 300, 12] * 10]
    results = []
    for budget in (None, 36 * BF16):
        llm = LLM("nano", expert_bytes=budget)
        results.append([(each.token_ids, each.logprobs) for each in llm.generate(prompts, params)])
        llm.close()
    assert results[0] == results[1]
