"""Samples that teach recall: what is asked was told before, only answers carry loss, and shards hold both kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.recall import Tasks, make

from pelagos.config import bundled_model_dir
from pelagos.train.data import NO_LOSS, ShardWriter, read_shard, write_meta

NANO = bundled_model_dir("nano")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    entries = {}
    for split in ("train", "heldout"):
        writer = ShardWriter(directory, split)
        for kind in ("docs", "chat", "code"):
            writer.add(rng.integers(300, 4000, 700).astype(np.uint16), kind, 2000)
        entries[split] = writer.close()
    write_meta(directory, NANO / "tokenizer.json", entries, {})
    return directory


def pairs_in(sample: np.ndarray, equals: int) -> list[tuple[int, int, bool]]:
    """(key, value, whether the value is an answer) of every pair, in order."""
    plain = sample & (NO_LOSS - 1)
    at = [i for i in range(1, len(plain) - 2) if plain[i] == equals and sample[i - 1] >= NO_LOSS]
    return [(int(plain[i - 1]), int(plain[i + 1]), bool(sample[i + 1] < NO_LOSS)) for i in at]


@pytest.mark.parametrize("kind", ["mqar", "needle"])
def test_every_question_has_its_answer_before_it(shards: Path, kind: str) -> None:
    tasks = Tasks(NANO, read_shard(shards, "train"), 3)
    sample = tasks.mqar(64) if kind == "mqar" else tasks.needle(5, 4000)
    count = 64 if kind == "mqar" else 5
    found = pairs_in(sample, int(tasks.equals[0]))
    told = {key: value for key, value, answer in found if not answer}
    asked = [(key, value) for key, value, answer in found if answer]
    assert len(asked) == count
    assert {key for key, _ in asked} <= told.keys()
    assert all(told[key] == value for key, value in asked)
    assert (sample < NO_LOSS).sum() == count
    if kind == "needle":
        assert 4000 < len(sample) < 4000 + 2 * count * 16


def test_shards_hold_the_text_and_both_kinds(shards: Path, tmp_path: Path) -> None:
    make(tmp_path / "out", shards, NANO, mqar=20, needles=6, longest=1024, seed=0)
    shard, text = read_shard(tmp_path / "out", "train", tokenizer=NANO / "tokenizer.json"), read_shard(shards, "train")
    counts = {kind: entry["samples"] for kind, entry in shard.meta["splits"]["train"]["kinds"].items()}
    assert {kind: n for kind, n in counts.items() if n} == {"docs": 1, "code": 1, "chat": 1, "mqar": 20, "needle": 6}
    assert np.array_equal(shard.tokens[: shard.offsets[3]], text.tokens)
    lengths = np.diff(shard.offsets)[shard.of_kind("needle")]
    assert 256 < lengths.min() < lengths.max()
    assert lengths.max() <= 1024
