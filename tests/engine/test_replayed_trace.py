"""The replayed trace: what people do in it, the bound on hits, and how near the cache comes."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.trace import Request, Text, draw_trace, idle_times, measure, most_kept, read_text, shape_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pelagos.config import preset
from pelagos.kernels.layout import CacheLayout

LAYOUT = CacheLayout(preset("nano"))


@pytest.fixture(scope="module")
def trace() -> list[Request]:
    text = Text(np.random.default_rng(0).integers(0, 5000, 500_000))
    drawn = draw_trace(text, people=14, hours=4, seed=3)
    assert text.times_used == 1, "no passage comes twice"
    return drawn


def test_a_seed_fixes_a_trace(trace: list[Request]) -> None:
    again = draw_trace(Text(np.random.default_rng(0).integers(0, 5000, 500_000)), people=14, hours=4, seed=3)
    assert [r.start for r in again] == [r.start for r in trace]
    assert all(np.array_equal(a.prompt, b.prompt) for a, b in zip(again, trace, strict=True))


def test_people_go_on_edit_fork_and_interleave(trace: list[Request]) -> None:
    prompts = [r.prompt.tobytes() for r in trace]
    forks = sum(a.start == b.start and a.prompt is b.prompt for a, b in itertools.pairwise(trace))
    assert forks > 3
    assert len(prompts) - len(set(prompts)) > forks, "some ask again later"
    followed = [
        any(p.startswith(r.prompt[: r.mark].tobytes()) for p in prompts if len(p) > 4 * len(r.prompt)) for r in trace
    ]
    assert 0.6 < np.mean(followed) < 0.95
    overlaps = sum(b.start < a.end and a.user_id != b.user_id for a, b in itertools.pairwise(trace))
    assert overlaps > 5
    assert len({r.user_id for r in trace}) > 3


def test_hits_near_what_can_be_attained(trace: list[Request]) -> None:
    seen = measure(trace, LAYOUT, percent=25)
    little, everything = seen["25%"], seen["all"]
    assert little["hit"] <= little["attainable"] <= everything["attainable"] == everything["hit"]
    assert little["evicted_pages"] > 100
    assert little["hit_of_attainable"] >= 0.95  # a pool of a few hundred pages; the whole trace is held to 0.97
    assert everything["cached"] >= 0.99 * everything["hit"]
    assert everything["resumed_from_pages"] == everything["evicted_states"] == 0


def test_the_bound_grows_with_the_pool(trace: list[Request]) -> None:
    shape = shape_of(trace, LAYOUT)
    bounds = []
    for pages in (0, 50, 100, 400, 10_000):
        found, times, room = idle_times(trace, shape, pages=pages)
        bounds.append(found + most_kept(times, room))
    assert bounds == sorted(bounds)
    immediate = sum(start == end for start, end in times)
    assert bounds[0] == found + immediate < bounds[2] < bounds[-1] == found + len(times)


@settings(deadline=None)
@given(st.data())
def test_the_greedy_bound_is_the_best_of_all_choices(data: st.DataObject) -> None:
    room = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=7))
    point = st.integers(0, len(room) - 1)
    times = [(min(pair), max(pair)) for pair in data.draw(st.lists(st.tuples(point, point), max_size=8))]

    def fits(chosen: tuple[tuple[int, int], ...]) -> bool:
        return all(sum(start <= at < end for start, end in chosen) <= most for at, most in enumerate(room))

    best = max(n for n in range(len(times) + 1) if any(map(fits, itertools.combinations(times, n))))
    assert most_kept(times, room) == best


def test_text_comes_from_all_files_of_a_folder(tmp_path: Path) -> None:
    for name, word in (("a", "one"), ("b", "two")):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": f"{word} {i} " * 30}) + "\n" for i in range(4))
    text = read_text(tmp_path, "nano", 10_000, seed=0)
    first = text.take(300)
    assert first.min() >= 8, "below are the stand-ins of the protocol's tokens"
    assert not np.array_equal(first, text.take(300))
    text.take(600)
    while text.times_used == 1:
        text.take(600)
    assert len(text.take(300)) == 300
