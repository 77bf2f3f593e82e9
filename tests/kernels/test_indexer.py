"""The indexer's choice: the reference against a sort, the Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_cases import run

from pelagos import numerics
from pelagos.errors import ConfigError
from pelagos.kernels import indexer
from pelagos.kernels.ref import decode_attention as calls
from pelagos.kernels.ref import indexer as ref

CASES = (
    *(("nano", 4, ((p, 1),), 0) for p in (0, 1, 127, 128, 129, 510, 511, 515, 516, 4000)),
    ("nano", 4, ((3, 1), (520, 3), (1023, 2)), 2), ("nano", 4, ((0, 4), (16380, 4)), 1), ("nano", 4, ((20000, 1),), 0),
    *(("flash", 4, ((p, 1),), 0) for p in (2047, 2051, 2052, 8191, 16387)),
    ("flash", 4, ((16383, 2), (70000, 1), (5, 1)), 4), ("flash", 4, ((262143, 3),), 0),
    ("flash", 4, ((1048575, 1),), 0), ("pro", 4, ((4098, 3),), 1), ("pro", 4, ((1048572, 4),), 0),
    ("flash", 4, tuple((3000 * i, 1) for i in range(33)), 31),
)  # fmt: skip

SCRIPT = """
import torch
torch.set_num_threads(1)
from pelagos.kernels.ref import indexer as ref
from pelagos.kernels.triton import indexer as kernel
from test_indexer import CASES, inputs_of
many = {"CHUNK": 256, "BOUNDS": 64}
for case, options in ((8, {}), (10, {}), (9, many), (10, {"CHUNK": 128, "BOUNDS": 16}), (13, {}), (9, {"FILLED": 3})):
    for name, value in {"CHUNK": 4096, "BOUNDS": 16384, "FILLED": 264, **options}.items():
        setattr(kernel, name, value)
    for tied in (False, True):
        inputs = inputs_of(CASES[case], tied=tied)
        got = kernel.forward(*inputs)
        assert torch.equal(got, ref.forward(*inputs[:6], inputs[7])), (case, options, tied)
        assert not inputs[6].any()
print("compared")
"""


def inputs_of(case: tuple, device: str = "cpu", *, tied: bool = False) -> tuple:
    """The arguments of `pick`; `tied` ones have many equal scores."""
    call = calls.make_call(*case, device=device, pages=3 if tied else 16)
    config, tokens = call.layout.config, len(call.rows.positions)
    options = {"generator": torch.Generator(device).manual_seed(1), "device": device}
    index_q = torch.randn(tokens, config.index_n_heads, config.index_head_dim, **options).bfloat16()
    weights = torch.randn(tokens, config.index_n_heads, **options) / 64
    counts = torch.zeros(tokens, indexer.COUNTS, dtype=torch.int32, device=device)
    return numerics.fake_quant_fp4(index_q), weights, call.rows, call.layout, 0, call.pages, counts, max(call.most, 1)


def wrong_picks(picks: torch.Tensor, inputs: tuple) -> int:
    """Picks below the k-th score by more than the rounding of a sum, or not those asked for in form."""
    index_q, weights, rows, layout, _, pages, _, most = inputs
    scores = ref.scores(index_q, weights, rows, layout, 0, pages, most)
    visible, topk = (rows.positions.long() + 1) // 4, layout.config.index_topk
    wrong = 0
    for row, seen, found in zip(scores, visible.tolist(), picks.long(), strict=True):
        real = found[found >= 0]
        wrong += (
            int(len(real) != min(seen, topk)) + int((real.diff() <= 0).sum()) + int((found[len(real) :] != -1).sum())
        )
        if seen > topk:
            best = row[:seen].sort(descending=True).values
            slack = 1e-5 * float(row[:seen].abs().max())
            wrong += int((row[real] < best[topk - 1] - slack).sum())
            wrong += int((row[:seen] > best[topk - 1] + slack).sum() > (row[real] > best[topk - 1] + slack).sum())
    return wrong


def test_choice_is_a_stable_sort():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scored = torch.randint(0, 9, (3, 40), generator=generator).float()
        visible = torch.tensor([40, 17, 3])
        hidden = torch.arange(40) >= visible.unsqueeze(1)
        got = ref.select(scored.masked_fill(hidden, -torch.inf), visible, 12)
        for row, seen, found in zip(scored, visible.tolist(), got.tolist(), strict=True):
            order = sorted(range(seen), key=lambda i: (-float(row[i]), i))[:12]
            assert found == sorted(order) + [-1] * (12 - len(order))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(0, torch.zeros(1, 8, 64), "bfloat16"), (1, torch.zeros(1, 9), "head_weights"), (7, 1 << 30, "most="),
     (6, torch.zeros(0, 1, dtype=torch.int32), "counts"), (4, 1, "no FP4 index keys")],
)  # fmt: skip
def test_other_shapes_are_refused(place, value, message):
    inputs = list(inputs_of(("nano", 4, ((600, 1),), 0)))
    inputs[place] = value
    if place == 4:
        inputs[3], inputs[4] = calls.make_call("nano", 0, ((600, 1),)).layout, 0
    with pytest.raises(ConfigError, match=message):
        indexer.pick(*inputs)


def test_kernels_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_on_the_device(case):
    """The best by the reference's scores; the same bits again, with ties, for a row by itself, in longer tables."""
    inputs = inputs_of(case, "cuda")
    got = indexer.pick(*inputs)
    assert wrong_picks(got, inputs) == 0
    assert torch.equal(got, indexer.pick(*inputs))
    tied = inputs_of(case, "cuda", tied=True)
    assert torch.equal(indexer.pick(*tied), indexer.pick(*tied))
    assert wrong_picks(indexer.pick(*tied), tied) == 0
    index_q, weights, rows, layout, layer, pages, counts, most = inputs
    for at in {0, len(got) // 2, len(got) - 1}:
        one = slice(at, at + 1)
        alone = rows._replace(**{name: getattr(rows, name)[one] for name in rows._fields if name != "table"})
        seen = max(1, (int(rows.positions[at]) + 1) // 4)
        for bound in {seen, most}:
            found = indexer.pick(index_q[one], weights[one], alone, layout, layer, pages, counts[one], bound)
            assert torch.equal(found[0], got[at])
    assert not counts.any()
