"""The captured step over experts in blocks, on a CPU by the references: the bits of stacked experts, whatever moves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pelagos import LLM
from pelagos.config import preset
from pelagos.engine import EngineOptions, build_engine
from pelagos.engine.sampler import SamplingParams
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.model.cuda_forward import CudaForward
from pelagos.model.cuda_weights import Weights
from pelagos.model.streaming import ExpertBlocks

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(
    preset("nano"), num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1, vocab_size=512
)


def test_bits_do_not_depend_on_where_experts_are(monkeypatch) -> None:
    monkeypatch.setattr("pelagos.model.cuda_weights._RANDOM_BLOCK", 1 << 22)
    layout = CacheLayout(CONFIG, "released", 4)
    whole = Weights(CONFIG, CPU).fill_random()
    blocks = ExpertBlocks(CONFIG, CPU, 56 * ExpertBlocks(CONFIG, CPU, 1 << 30).block_bytes)
    streamed = Weights(CONFIG, CPU, blocks)
    assert set(streamed.places) == set(whole.places)
    for name, place in streamed.places.items():
        for into, values in ((place.values, whole.places[name].values), (place.scales, whole.places[name].scales)):
            if into is not None and values is not None:
                into.copy_(values)
    assert streamed.bytes == whole.bytes
    steps = []
    for weights in (whole, streamed):
        pools = (torch.zeros((4, layout.page_bytes), dtype=torch.uint8),
                 torch.zeros((2, layout.slot_bytes), dtype=torch.uint8))  # fmt: skip
        steps.append(CudaForward(weights, layout, *pools, positions=256))
    assert (steps[0].two_kinds, steps[1].two_kinds) == (True, True)
    rng, table = np.random.default_rng(0), np.arange(2, dtype=np.int32)
    results = []
    for step in steps:
        rng = np.random.default_rng(0)
        found = [step.forward([Span(rng.integers(0, 512, 9), 0, 0, table, logits=2, streams=1)])]
        for at in range(9, 60):
            # Few ids: some experts of the layer routed by ids become hot.
            found.append(step.forward([Span(rng.integers(0, 4, 1), at, 0, table, decode=True)]))
        found.append(step.draft([Span(np.array([5]), 8, 0, table, decode=True)], found[0].streams))
        results.append(found)
    for got, want in zip(results[1], results[0], strict=True):
        assert np.array_equal(got.logits, want.logits)
        assert np.array_equal(got.streams, want.streams)
    report = blocks.report()
    assert report["exchanges"] > 0
    assert report["tokens"] == 51  # prompts are not counted: they route nearly everywhere
    assert 0.5 < report["hit_rate"] < 1
    answers = []
    for weights in (whole, streamed):  # an engine over weights whose experts are no longer where they began
        engine = build_engine(weights, None, EngineOptions(
            chunk_tokens=64, max_requests=1, kv_bytes=1 << 22, prefix_cache=False, preemption="recompute",
            speculation=False,
        ))  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=True)
        answers.append([(each.token_id, each.logprob) for each in engine.submit(list(range(3, 150)), params)])
        engine.close()
    assert answers[0] == answers[1]
    assert len(answers[0]) == 4


@pytest.mark.gpu
def test_an_engine_with_experts_outside_gives_the_same_bits() -> None:
    """Prompts and generated tokens of nano, drafts on, with a third of the experts on the device."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=True)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 4096, count).tolist() for count in (700, 40, 300)]
    results = []
    for budget in (None, 5 << 20):
        llm = LLM("nano", mode="released", device="cuda", expert_bytes=budget)
        results.append([(each.token_ids, each.logprobs) for each in llm.generate(prompts, params)])
        report = llm.expert_stats()
        llm.close()
    assert results[0] == results[1]
    assert 0.1 < report["places"] / report["experts"] < 0.9
    assert 0 < report["hit_rate"] < 1
