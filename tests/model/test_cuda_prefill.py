"""A prompt's pass over the layers: the same bits however it is cut and whatever comes with it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pelagos.config import preset
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.load import load_model
from pelagos.model.cuda_prefill import Prefill, prompt_bytes
from pelagos.model.cuda_weights import Weights


def prefill_of(weights: Weights, positions: int) -> Prefill:
    layout = CacheLayout(weights.config, "released", 4)
    sizes = (2 * layout.pages_for(positions), layout.page_bytes), (2, layout.slot_bytes)
    pages, slots = (torch.zeros(size, dtype=torch.uint8, device=weights.device) for size in sizes)
    return Prefill(weights, layout, pages, slots)


def span(prefill: Prefill, ids: np.ndarray, start: int, slot: int, logits: int) -> Span:
    each = len(prefill.pages) // 2
    return Span(ids, start, slot, np.arange(slot * each, (slot + 1) * each, dtype=np.int32), logits=logits)


def test_cuts_and_neighbours_on_the_cpu() -> None:
    """The references give a cut prompt among others its logits, but for what a library's order of adding moves."""
    model = load_model("nano", mode="released")
    weights = Weights(model.config, torch.device("cpu")).fill((n, t) for n, t, _ in model.released_tensors())
    ids, whole, cut = np.random.default_rng(0).integers(0, 4096, 140), *(prefill_of(weights, 256) for _ in range(2))
    want, streams = whole.run([span(whole, ids, 0, 0, 140)._replace(streams=3)])
    assert (want.shape, streams.shape) == ((140, 4096), (3, 4, 256))
    first, _ = cut.run([span(cut, ids[:70], 0, 0, 70), span(cut, ids[::-1].copy(), 0, 1, 0)])
    second, _ = cut.run([span(cut, ids[70:], 70, 0, 70)])
    assert float((torch.cat((first, second)) - want).norm() / want.norm()) < 0.12


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["nano", "flash"])
def test_chunks_change_no_bit_on_the_device(shape: str) -> None:
    """8,192 tokens at once, in chunks of 4,096 and of 512, and in pieces of any length: the same logits and streams."""
    config = preset(shape)
    config = dataclasses.replace(config, num_hidden_layers=6, compress_ratios=config.compress_ratios[:6],
                                 num_nextn_predict_layers=0)  # fmt: skip
    weights = Weights(config, torch.device("cuda")).fill_random()
    prefill = prefill_of(weights, 8192)
    ids, results = np.random.default_rng(0).integers(0, config.vocab_size, 8192), []
    for lengths in ([8192], [4096] * 2, [512] * 16, [1000, 3000, 7, 130, 4055]):
        prefill.pages.zero_()
        prefill.slots.zero_()
        ends = np.cumsum(lengths)
        for end, length in zip(ends, lengths, strict=True):
            part = span(prefill, ids[end - length : end], int(end - length), 0, min(8, length))
            found = prefill.run([part._replace(streams=1)])
        results.append(found)
    for logits, streams in results[1:]:
        count = min(len(logits), len(results[0][0]))
        assert torch.equal(logits[-count:], results[0][0][-count:])
        assert torch.equal(streams, results[0][1])


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "tokens", "positions"), [
    ("nano", 512, 4096), ("nano", 4096, 4096), ("nano", 4096, 262144), ("flash", 512, 8192), ("flash", 8192, 8192),
    ("flash", 8192, 131072),
])  # fmt: skip
def test_a_call_takes_the_bytes_planned(shape: str, tokens: int, positions: int) -> None:
    """Within 2 % of weights, pools and scratch together."""
    config = preset(shape)
    count = min(8, config.num_hidden_layers)
    config = dataclasses.replace(config, num_hidden_layers=count, compress_ratios=config.compress_ratios[:count],
                                 num_nextn_predict_layers=0)  # fmt: skip
    weights = Weights(config, torch.device("cuda")).fill_random()
    prefill = prefill_of(weights, positions)
    part = span(prefill, np.zeros(tokens, np.int64), positions - tokens, 0, 1)
    prefill.run([part])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prefill.run([part])
    took, planned = torch.cuda.max_memory_allocated() - before, prompt_bytes(prefill.layout, tokens, positions)
    assert abs(planned - took) < 0.02 * (weights.bytes + prefill.pages.nbytes + prefill.slots.nbytes + took)
