"""Attention of prompts: the decode reference row by row, the Triton kernel, chunk cuts and neighbours."""

from __future__ import annotations

import pytest
import torch
from prefill_calls import make, part
from triton_cases import error, run

from pelagos.errors import ConfigError
from pelagos.kernels import prefill_attention, prefill_cache
from pelagos.kernels.ref import decode_attention as calls
from pelagos.kernels.ref import prefill_attention as ref
from pelagos.kernels.ref.prefill_cache import CASES

TOLERANCE = 6e-3  # bfloat16 weights and results

SCRIPT = """
import torch
torch.set_num_threads(1)
from prefill_calls import make
from triton_cases import error
from pelagos.kernels import prefill_cache
from pelagos.kernels.ref import decode_attention as calls, prefill_attention as ref
from pelagos.kernels.triton import prefill_attention as kernel
for parts, ratio, picked in ((((0, 3), (400, 2)), 4, True), (((509, 4),), 128, False), (((126, 3),), 0, False)):
    call, _, prompt, inputs = make("nano", parts, ratio)
    keys = prefill_cache.cache_write(*inputs)
    q, sink, picks, turn = calls.make_queries(call, picked=picked)
    own = (q, prompt, keys.main, ratio, sink, picks, turn, 128)
    off = error(kernel.attend(*own), ref.attend(*own))
    assert off < 5e-3, (parts, ratio, off)
print("compared")
"""


@pytest.mark.parametrize(("ratio", "picked"), [(0, False), (4, True), (4, False), (128, False)])
def test_reference_is_that_of_decode(ratio, picked):
    """The last row of a prompt attends what a decode row at its position does over the pools the prompt left."""
    call, _, prompt, inputs = make("nano", ((3, 40), (600, 30)), ratio)
    keys = prefill_cache.cache_write(*inputs)
    q, sink, picks, turn = calls.make_queries(call, picked=picked)
    out = prefill_attention.attend(q, prompt, keys, call.layout, 0, sink, picks, turn)
    want = calls.forward(q, prompt.rows, call.layout, 0, call.pages, call.slots, sink, picks, turn, call.most)
    for row in (39, 69):
        assert error(out[row], want[row].flatten()) < 1e-3


def test_other_shapes_are_refused():
    call, _, prompt, inputs = make("nano", ((3, 5),), 4)
    keys = prefill_cache.cache_write(*inputs)
    q, sink, picks, turn = calls.make_queries(call, picked=True)
    with pytest.raises(ConfigError, match="keys"):
        prefill_attention.attend(q, prompt, keys._replace(main=keys.main[1:]), call.layout, 0, sink, picks, turn)
    with pytest.raises(ConfigError, match="sink"):
        prefill_attention.attend(q, prompt, keys, call.layout, 0, sink[1:], picks, turn)


def test_kernel_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize(("ratio", "picked"), [(0, False), (4, True), (4, False), (128, False)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_on_the_device(case, ratio, picked):
    """Within bfloat16 of the reference, the same bits again, and those of a call cut in two."""
    call, _, prompt, inputs = make(*case, ratio, device="cuda")
    keys = prefill_cache.cache_write(*inputs)
    q, sink, picks, turn = calls.make_queries(call, picked=picked)
    own = (q, prompt, keys, call.layout, 0, sink, picks, turn)
    got = prefill_attention.attend(*own)
    assert error(got, ref.attend(q, prompt, keys.main, ratio, sink, picks, turn, 128)) < TOLERANCE
    assert torch.equal(got, prefill_attention.attend(*own))
    (_, count), *others = case[1]
    if not others and count > 1:
        again = make(*case, ratio, device="cuda")[3]
        for low, high in ((0, count // 3), (count // 3, count)):
            if low < high:
                cut = part(again, low, high)
                some = tuple(None if each is None else each[low:high] for each in (picks, turn))
                some_keys = prefill_cache.cache_write(*cut)
                rows = prefill_attention.attend(q[low:high], cut[2], some_keys, call.layout, 0, sink, *some)
                assert torch.equal(rows, got[low:high])
