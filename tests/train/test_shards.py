import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelagos.errors import ConfigError, DataError
from pelagos.train.data import ALIGN, IGNORE, KINDS, NO_LOSS, PackedBatches, Shard, ShardWriter, read_shard, write_meta

SRC = Path(__file__).resolve().parents[2] / "src"


def make_shard(lengths, kinds=None) -> Shard:
    """Samples whose tokens count up over the whole shard, every third one without loss."""
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    tokens = (np.arange(offsets[-1]) % NO_LOSS).astype(np.uint16)
    tokens[::3] |= NO_LOSS
    ids = np.array([KINDS.index(kind) for kind in (kinds or ["docs"] * len(lengths))], dtype=np.uint8)
    return Shard(tokens, offsets, ids, np.ones(len(lengths), dtype=np.int32), {"kinds": list(KINDS)})


def batches_of(shard, repeats=None, rows=2, size=256, seed=0):
    return PackedBatches(shard, batch_rows=rows, row_tokens=size, repeats=repeats or {"docs": 1}, seed=seed)


def pieces_of(batch):
    """(ids, positions, targets, first column) of every segment of a batch, after checking what must hold of it."""
    for ids, positions, segments, targets in zip(*batch, strict=True):
        padded = segments < 0
        assert (targets[padded] == IGNORE).all()
        assert not ids[padded].any()
        for number in range(segments.max() + 1):
            columns = np.flatnonzero(segments == number)
            assert (np.diff(columns) == 1).all()
            yield ids[columns], positions[columns], targets[columns], columns[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 900), min_size=1, max_size=40), st.integers(0, 5), st.sampled_from([128, 256, 640]))
def test_an_epoch_holds_every_token_once_with_its_next_token(lengths, epoch, size):
    shard = make_shard(lengths)
    tokens = np.asarray(shard.tokens)
    seen = []
    for batch in batches_of(shard, size=size).epoch(epoch):
        assert batch.ids.dtype == batch.positions.dtype == batch.targets.dtype == np.int64
        assert batch.segments.dtype == np.int32
        for ids, positions, targets, column in pieces_of(batch):
            assert column % ALIGN == 0
            assert (positions == np.arange(ids.size)).all()
            following = tokens[ids + 1].astype(np.int64)
            assert (targets == np.where(following & NO_LOSS, IGNORE, following)).all()
            seen.append(ids)
    ends = shard.offsets[1:] - 1
    assert (np.sort(np.concatenate(seen)) == np.setdiff1d(np.arange(tokens.size), ends)).all()


def test_long_samples_are_cut_elsewhere_each_epoch():
    batches = batches_of(make_shard([5000]))
    firsts = [sorted(int(ids[0]) for b in batches.epoch(e) for ids, *_ in pieces_of(b)) for e in range(8)]
    assert len({tuple(f) for f in firsts}) > 1
    assert all(first % ALIGN == 0 for epoch in firsts for first in epoch)


def test_a_sample_that_must_be_whole_is_left_out_of_rows_too_short():
    shard = make_shard([200, 258, 257, 900], ["docs", "chat", "chat", "docs"])
    shard = dataclasses.replace(shard, meta={**shard.meta, "whole": ["chat"]})
    seen = {size: [len(ids) for b in batches_of(shard, {"docs": 1, "chat": 1}, size=size).epoch()
                   for ids, *_ in pieces_of(b)] for size in (256, 384)}  # fmt: skip
    assert sum(seen[256]) == 199 + 256 + 899
    assert sum(seen[384]) == 199 + 256 + 257 + 899


def test_packing_leaves_little_padding():
    lengths = np.random.default_rng(0).integers(2, 1500, 3000)
    batches = batches_of(make_shard(lengths), size=2048)
    blocks = (-(-(lengths - 1) // ALIGN)).sum()
    assert len(batches.plan(0).row_starts) - 1 <= 1.01 * blocks * ALIGN / 2048 + 1
    used = sum(int((b.segments >= 0).sum()) for b in batches.epoch(0))
    total = sum(b.ids.size for b in batches.epoch(0))
    assert batches.padding_frac(0) == pytest.approx(1 - used / total)


@pytest.mark.parametrize(("repeats", "expected"), [(1.0, [1, 1, 1, 1]), (2.0, [2] * 4), (0.5, None), (1.25, None)])
def test_repeats_count_samples_over_epochs(repeats, expected):
    shard = make_shard([10] * 40 + [20] * 40, ["docs"] * 40 + ["chat"] * 40)
    batches = batches_of(shard, {"docs": repeats})
    counts = np.array(
        [
            np.bincount([np.searchsorted(shard.offsets, p, "right") - 1 for p in batches.plan(e).sources], minlength=80)
            for e in range(4)
        ]
    )
    assert not counts[:, 40:].any()
    assert (counts[:, :40].sum(0) == 4 * repeats).all()
    assert expected is None or (counts[:, :40] == np.array(expected)[:, None]).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 30), st.integers(1, 5), st.integers(0, 3))
def test_restored_batches_continue_the_same(steps, rows, seed):
    shard = make_shard([300, 40, 700, 5, 128, 129, 130, 900])
    whole, resumed = batches_of(shard, rows=rows, seed=seed), batches_of(shard, rows=rows, seed=seed)
    for _ in range(steps):
        assert whole.next().ids.shape == (rows, 256)
    resumed.restore(json.loads(json.dumps(whole.state)))
    for _ in range(4):
        for a, b in zip(whole.next(), resumed.next(), strict=True):
            assert (a == b).all()


def test_seeds_and_epochs_differ():
    shard = make_shard([100] * 60)
    sources = {
        tuple(batches_of(shard, seed=seed).plan(epoch).sources.tolist()) for seed in range(3) for epoch in range(3)
    }
    assert len(sources) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 100}, "multiple of 128"),
        ({"rows": 0}, ">= 1 rows"),
        ({"repeats": {"poems": 1}}, "poems"),
        ({"repeats": {"code": 1}}, "selects no sample"),
        ({"repeats": {"docs": -1}}, ">= 0"),
    ],
)
def test_wrong_mixtures_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        batches_of(make_shard([10]), **arguments)


def test_wrong_state_is_refused():
    with pytest.raises(ConfigError, match="rows"):
        batches_of(make_shard([10])).restore({"epoch": 0, "cursor": 5})


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    writer = ShardWriter(tmp_path, "train")
    writer.add(np.arange(5, dtype=np.uint16), "docs", 17)
    writer.add(np.arange(9, dtype=np.uint16), "chat", 0)
    write_meta(tmp_path, tmp_path / "tokenizer.json", {"train": writer.close()}, {"licences": {}})
    return tmp_path


def test_shards_round_trip(directory):
    shard = read_shard(directory, "train", tokenizer=directory / "tokenizer.json")
    assert shard.tokens.tolist() == [*range(5), *range(9)]
    assert shard.offsets.tolist() == [0, 5, 14]
    assert shard.bytes_of("docs") == 17
    assert shard.meta["splits"]["train"]["kinds"]["chat"] == {"samples": 1, "tokens": 9, "bytes": 0}


@pytest.mark.parametrize("name", ["train.tokens", "train.index.npz"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_files_are_refused(directory, name, damage):
    path = directory / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data) if damage == "flip" else bytes(data[:-1]))
    if damage == "gone":
        path.unlink()
    with pytest.raises(DataError, match=name):
        read_shard(directory, "train")


def test_other_tokenizers_versions_and_splits_are_refused(directory):
    other = directory / "other.json"
    other.write_text("{ }")
    with pytest.raises(DataError, match="another tokenizer"):
        read_shard(directory, "train", tokenizer=other)
    with pytest.raises(DataError, match="heldout"):
        read_shard(directory, "heldout")
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps(meta | {"version": 99}))
    with pytest.raises(DataError, match="format 99"):
        read_shard(directory, "train")
    (directory / "meta.json").write_text("[]")
    with pytest.raises(DataError, match="no token shards"):
        read_shard(directory, "train")


def test_samples_of_one_token_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least 2"):
        ShardWriter(tmp_path, "train").add(np.zeros(1, dtype=np.uint16), "docs", 1)


def test_reading_needs_only_numpy():
    code = "import sys, pelagos.train.data; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True)
    assert "numpy" in loaded.stdout.split(), loaded.stderr
    assert not {"torch", "tokenizers", "deepseek_recipe", "starlette"} & set(loaded.stdout.split())
