"""What a step keeps: the Triton kernel against the reference (for which see test_decode_attention.py), byte by byte."""

from __future__ import annotations

import pytest
import torch
from triton_cases import run

from pelagos.errors import ConfigError
from pelagos.kernels import cache_write
from pelagos.kernels.layout import CacheLayout
from pelagos.kernels.ref import cache_write as cache_ref
from pelagos.kernels.ref import decode_attention as ref

# Sums in another order and a reciprocal root that is off by a unit move one code in so many to its neighbour.
CODES = 2e-4

SCRIPT = """
import torch
torch.set_num_threads(1)
from pelagos.kernels.ref import cache_write as cache_ref
from pelagos.kernels.ref import decode_attention as ref
from pelagos.kernels.triton import cache_write as kernel
from test_cache_write import both, differing
for case in (3, 8, 14, 18, 19, 20):
    got, want = both(ref.CASES[case], kernel.forward, cache_ref.forward)
    assert all(off == 0 for off in differing(got, want)), (case, differing(got, want))
print("compared")
"""


def both(case, *forwards, device="cpu") -> list[tuple]:
    """The pools and results of each forward on copies of the same pools."""
    call, results = ref.make_call(*case, device=device), []
    call.rows.frozen[-1] = 1 << 20
    projected, weights, turn, entry_turn = ref.make_projected(call)
    for forward in forwards:
        pools = call.pages.clone(), call.slots.clone()
        found = forward(projected, call.rows, call.layout, 0, *pools, weights, turn, entry_turn)
        live = call.rows.positions >= 0
        results.append((*pools, *(each[live] for each in found if each is not None)))
    return results


def differing(got: tuple, want: tuple) -> list[int]:
    return [int((a != b).sum()) for a, b in zip(got, want, strict=True)]


def one_by_one(projected, rows, layout, layer, pages, slots, weights, turn, entry_turn) -> tuple:
    """The same rows, each in a call of its own."""
    found = []
    for at in range(len(rows.positions)):
        one = slice(at, at + 1)
        alone = rows._replace(**{name: getattr(rows, name)[one] for name in rows._fields if name != "table"})
        alone = alone._replace(first=alone.positions)
        entry = None if entry_turn is None else entry_turn[one]
        found.append(
            cache_write.cache_write(projected[one], alone, layout, layer, pages, slots, weights, turn[one], entry)
        )
    return tuple(None if part[0] is None else torch.cat(part) for part in zip(*found, strict=True))


@pytest.mark.parametrize("case", [case for case in ref.CASES[:21] if len(case[2]) > 1], ids=str)
def test_rows_of_a_call_leave_what_they_leave_one_by_one(case):
    together, apart = both(case, cache_write.cache_write, one_by_one)
    assert differing(together, apart) == [0] * len(together)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"projected": torch.zeros(1, 8)}, r"expected rows \(1, >= "), ({"turn": torch.zeros(1, 2, 8)}, "turn is"),
        ({"entry_turn": None}, "entry_turn is None"), ({"pages": torch.zeros(2, 8)}, "pages"),
        ({"weights": cache_write.CacheWeights(torch.ones(128), torch.ones(128))}, "lack those of its compressors"),
        ({"layout": "reference"}, "mode 'reference'"),
    ],
)  # fmt: skip
def test_other_shapes_are_refused(wrong, message):
    call = ref.make_call("nano", 4, ((130, 1),))
    names = ("projected", "rows", "layout", "layer", "pages", "slots", "weights", "turn", "entry_turn")
    projected, weights, turn, entry_turn = ref.make_projected(call)
    inputs = (projected, call.rows, call.layout, 0, call.pages, call.slots, weights, turn, entry_turn)
    if "layout" in wrong:
        wrong = {"layout": CacheLayout(call.layout.config, "reference", 0)}
    with pytest.raises(ConfigError, match=message):
        cache_write.cache_write(**(dict(zip(names, inputs, strict=True)) | wrong))


def test_kernel_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", ref.CASES, ids=str)
def test_kernel_on_the_device(case):
    """The reference's bytes but for rare neighbours; the same again; the same one row a call."""
    got, want, again, apart = both(
        case, cache_write.cache_write, cache_ref.forward, cache_write.cache_write, one_by_one, device="cuda"
    )
    assert differing(got, again) == [0] * len(got)
    assert differing(got, apart) == [0] * len(got)
    written = len(got[2]) * sum(cache_write.widths(ref.make_call(*case[:2], ((0, 1),)).layout.config, case[1]))
    assert sum(differing(got, want)) <= max(2, CODES * 8 * written), differing(got, want)
