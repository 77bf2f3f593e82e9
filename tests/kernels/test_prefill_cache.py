"""What prompts leave in the cache: windows that are listed, chunk cuts, Triton kernels against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_cases import error, run

from pelagos.errors import ConfigError
from pelagos.kernels import prefill_cache
from pelagos.kernels.layout import Span
from pelagos.kernels.ref import decode_attention as calls
from pelagos.kernels.ref import prefill_cache as ref

SCRIPT = """
import torch
torch.set_num_threads(1)
from prefill_calls import make, pools_differ
from triton_cases import error
from pelagos.kernels.ref import prefill_cache as ref
from pelagos.kernels.triton import prefill_cache as kernel
for case, ratio in ((ref.CASES[2], 4), (ref.CASES[6], 4), (ref.CASES[9], 128), (ref.CASES[1], 0)):
    call, spans, prompt, inputs = make(*case, ratio)
    want = ref.cache_write(*inputs)
    own = make(*case, ratio)[3]
    got = kernel.cache_write(*own)
    for mine, theirs in zip(got, want):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            mine, theirs = (x.view(torch.float8_e4m3fn) if x.dtype == torch.uint8 else x for x in (mine, theirs))
            assert error(mine, theirs) < 2e-3, case
    assert pools_differ(own[5:7], inputs[5:7]) < 1e-3, case
print("compared")
"""


def spans_of(*parts: tuple[int, int]) -> list[Span]:
    return [
        Span(np.zeros(count, np.int64), first, slot, np.arange(50) + 50 * slot)
        for slot, (first, count) in enumerate(parts)
    ]


def test_prompt_lists_windows_that_are_not_there_already():
    call = calls.make_call("nano", 4, ((0, 1),))
    spans = spans_of((2, 7), (8, 4))
    spans[1] = spans[1]._replace(frozen=12)
    got = prefill_cache.prompt(spans, call.layout, "cpu")
    assert got.rows.positions.tolist() == [*range(2, 9), *range(8, 12)]
    assert got.window.tolist() == [0, 134]
    found = got.entries[4]
    assert found.ends.tolist() == [1, 5]
    assert (found.base.tolist(), found.counts.tolist(), found.total, found.most) == ([0, 2], [2, 3], 5, 3)
    assert got.blocks.tolist() == [[0, 7, 0], [7, 4, 1]]


def test_other_shapes_are_refused():
    from prefill_calls import make

    _, _, _, inputs = make("nano", ((0, 5),), 4)
    with pytest.raises(ConfigError, match="first"):
        prefill_cache.cache_write(inputs[0][:, 1:], *inputs[1:])
    with pytest.raises(ConfigError, match="wide"):
        prefill_cache.cache_write(inputs[0], None, *inputs[2:])
    with pytest.raises(ConfigError, match="entry_turn"):
        prefill_cache.cache_write(*inputs[:9], None)


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_cut_prompts_leave_the_same(ratio):
    """One call and three over the same tokens end with the same ring, tails, pages and keys."""
    from prefill_calls import make, part

    whole = make("nano", ((0, 300),), ratio)[3]
    cut = make("nano", ((0, 300),), ratio)[3]
    keys = prefill_cache.cache_write(*whole)
    for first, end in ((0, 130), (130, 131), (131, 300)):
        last = prefill_cache.cache_write(*part(cut, first, end))
    assert torch.equal(whole[5], cut[5])
    assert torch.equal(whole[6], cut[6])
    assert torch.equal(keys.main[-170:], last.main[-170:])


def test_kernels_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("case", ref.CASES, ids=str)
def test_kernels_on_the_device(case, ratio):
    """The bytes of the reference but for a few roundings, the same again, and those of a prompt cut in two."""
    from prefill_calls import make, part, pools_differ

    inputs, other, cut = (make(*case, ratio, device="cuda")[3] for _ in range(3))
    want = ref.cache_write(*inputs)
    got = prefill_cache.cache_write(*other)
    assert pools_differ(inputs[5:7], other[5:7]) < 2e-3
    for mine, theirs in zip(got, want, strict=True):
        if mine is not None:
            assert (
                error(
                    mine.view(torch.float8_e4m3fn) if mine.dtype == torch.uint8 else mine,
                    theirs.view(torch.float8_e4m3fn) if theirs.dtype == torch.uint8 else theirs,
                )
                < 5e-3
            )
    (_, count), *others = case[1]
    if not others and count > 1:
        for low, high in ((0, count // 2), (count // 2, count)):
            prefill_cache.cache_write(*part(cut, low, high))
        assert torch.equal(cut[5], other[5])
        assert torch.equal(cut[6], other[6])
