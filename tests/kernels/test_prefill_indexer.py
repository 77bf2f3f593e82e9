"""Picks of prompts: the reference against that of decode, exact selection with ties, Triton against the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from triton_cases import run

from pelagos import numerics
from pelagos.config import preset
from pelagos.errors import ConfigError
from pelagos.kernels import prefill_cache, prefill_indexer
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.ref import prefill_indexer as ref
from pelagos.kernels.ref.prefill_cache import index_operand

# (heads, width, topk, spans of (first position, tokens)): tiles of keys and queries, top-k not filled, sequences.
CASES = (
    *((16, 64, 16, ((first, tokens),)) for first, tokens in (
        (0, 1), (0, 63), (0, 65), (3, 1), (61, 4), (64, 64), (509, 70), (2000, 3), (5000, 33))),
    (16, 32, 64, ((0, 130), (700, 5))), (64, 128, 16, ((300, 9), (0, 20), (1022, 66))), (16, 128, 128, ((0, 700),)),
    (64, 128, 512, ((0, 512),)), (64, 128, 512, ((2040, 16),)), (64, 128, 512, ((0, 4096),)),
    (64, 128, 512, ((30000, 512),)), (64, 128, 512, ((40000, 65), (8000, 127))), (64, 128, 1024, ((4000, 512),)),
    (64, 128, 512, ((262144, 64),)), (8, 64, 128, ((3000, 100),)), (64, 128, 1024, ((131072, 100),)),
)  # fmt: skip

SCRIPT = """
import torch
torch.set_num_threads(1)
from test_prefill_indexer import CASES, make
from pelagos.kernels.ref import prefill_indexer as ref
from pelagos.kernels.triton import prefill_indexer as kernel
for case in (CASES[1], CASES[6], CASES[9], (8, 64, 16, ((700, 2),))):
    inputs = make(*case)
    assert torch.equal(kernel.pick(*inputs), ref.pick(*inputs)), case
kernel.CHUNK = 128
for ties in (False, True):
    inputs = make(16, 64, 16, ((1500, 3), (60, 2)), ties=ties)
    got, want = kernel.pick(*inputs), ref.pick(*inputs)
    assert torch.equal(got, want), (ties, got, want)
print("compared")
"""


def make(heads, width, topk, parts, *, ties=False, device="cpu", seed=0):
    """Random inputs of `ref.pick`; with ties all heads and keys hold few distinct values."""
    config = dataclasses.replace(preset("nano"), num_hidden_layers=1, compress_ratios=(4,), num_nextn_predict_layers=0)
    spans = [Span(np.zeros(n, np.int64), first, i, np.zeros(1, np.int32)) for i, (first, n) in enumerate(parts)]
    call = prefill_cache.prompt(spans, CacheLayout(config, "released"), device)
    options = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    tokens, total = len(call.rows.positions), call.entries[4].total
    q, keys = (numerics.fake_quant_fp4(torch.randn(*size, width, **options)) for size in ((tokens, heads), (total,)))
    weights = torch.randn(tokens, heads, **options)
    if ties:
        q, keys, weights = q.sign(), keys.sign() * (keys.abs() > 1), weights.sign()
        keys[:, 4:] = 0
    return q.bfloat16(), weights, call, *index_operand(keys), topk


def test_ties_go_to_the_lower_index():
    q, weights, call, codes, scales, topk = make(16, 64, 16, ((400, 2),))
    codes = codes[:1].expand_as(codes).contiguous()
    got = prefill_indexer.pick(q, weights.abs(), call, prefill_cache.Keys(codes, codes, scales.fill_(1)), topk)
    assert got.tolist() == [list(range(16))] * 2


def test_other_shapes_are_refused():
    q, weights, call, codes, scales, topk = make(16, 64, 16, ((40, 2),))
    with pytest.raises(ConfigError, match="head_weights"):
        prefill_indexer.pick(q, weights[1:], call, prefill_cache.Keys(codes, codes, scales), topk)
    with pytest.raises(ConfigError, match="no index keys"):
        prefill_indexer.pick(q, weights, call, prefill_cache.Keys(codes, None, None), topk)
    with pytest.raises(ConfigError, match="topk=15"):
        prefill_indexer.pick(q, weights, call, prefill_cache.Keys(codes, codes, scales), 15)


def test_kernels_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_on_the_device(case):
    """All picks but those whose score is as near to the last one's as the matrix unit rounds; the same again; cuts."""
    inputs = make(*case, device="cuda")
    q, weights, call, codes, scales, topk = inputs
    keys = prefill_cache.Keys(codes, codes, scales)
    got = prefill_indexer.pick(q, weights, call, keys, topk)
    assert torch.equal(got, prefill_indexer.pick(q, weights, call, keys, topk))
    rows = torch.arange(len(q), device="cuda")[:: max(1, len(q) // 64)]
    scored, seen = ref.scores(q, weights, call, codes, scales, rows), call.entries[4].seen[rows]
    for score, own, count in zip(scored, got[rows], seen.tolist(), strict=True):
        real = own[own >= 0].long()
        assert len(real) == min(count, topk)
        assert bool((real.diff() > 0).all())
        if count > topk:
            last = score.topk(topk).values[-1]
            rest = torch.ones_like(score, dtype=torch.bool).scatter(0, real, False)
            off = max(float(last - score[real].min()), float(score[rest].max() - last))
            assert off <= 2e-3 * float(score[:count].abs().max())
    (first, count), *others = case[3]
    if not others and count > 2:
        some = make(heads := case[0], case[1], topk, ((first + count // 2, count - count // 2),), device="cuda")
        assert heads == some[0].shape[1]
        cut = prefill_indexer.pick(q[count // 2 :], weights[count // 2 :], some[2], keys, topk)
        assert torch.equal(cut, got[count // 2 :])
