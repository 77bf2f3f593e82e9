"""Texts from anywhere: formats, compression, URLs, duplicates, splits, and that a run can read the result."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import sys

import numpy as np
import pytest

from pelagos import cli
from pelagos.chat import Tokenizer
from pelagos.config import bundled_model_dir, nano
from pelagos.errors import DataError, MissingDependency
from pelagos.train.corpus import Duplicates
from pelagos.train.data import PackedBatches, ShardWriter, read_shard, write_meta
from pelagos.train.prepare import tokenise
from pelagos.train.recipe import TrainConfig
from pelagos.train.sources import Document, paths_of, read_documents
from pelagos.train.trainer import Trainer

NANO = bundled_model_dir("nano")


def passage(number: int) -> str:
    rng = np.random.default_rng(number)
    return " ".join(f"word{n}" for n in rng.integers(0, 5000, 80))


@pytest.fixture
def texts(tmp_path):
    rows = [{"text": passage(i), "source": f"doc {i}", "licence": "MIT"} for i in range(60)]
    rows += [{"text": passage(3), "source": "copy"}, {"text": passage(4) + " one more", "source": "nearly"}]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines[: len(lines) // 2].rsplit("\n", 1)[0])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines[len(lines[: len(lines) // 2].rsplit("\n", 1)[0]) + 1 :])
    (tmp_path / "plain").mkdir()
    for i in range(100, 140):
        (tmp_path / "plain" / f"{i}.py").write_text(f"# {passage(i)}\n")
    return tmp_path


def test_formats_are_read_alike(texts):
    found = [d for path in paths_of(str(texts / "*.jsonl*")) for d in read_documents("docs", path)]
    assert [d.source for d in found] == [*(f"doc {i}" for i in range(60)), "copy", "nearly"]
    assert found[0].text == passage(0)
    assert {d.licence for d in found} == {"MIT", "unknown"}
    files = paths_of(str(texts / "plain"))
    assert len(files) == 40
    (document,) = read_documents("code", files[0])
    assert (document.source, document.text) == ("100.py:1", f"# {passage(100)}\n")
    assert paths_of(f"file://{texts}/*.jsonl.gz")[0].startswith("file://")
    (url,) = paths_of(f"file://{texts}/*.jsonl.gz")
    local = read_documents("docs", str(texts / "b.jsonl.gz"))
    assert [d.text for d in read_documents("docs", url)] == [d.text for d in local]


def test_parquet(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    if importlib.util.find_spec("pyarrow") is not None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": ["one", "two"], "other": [1, 2]}), path)
        assert [d.text for d in read_documents("docs", str(path))] == ["one", "two"]
    path.write_bytes(b"PAR1 no")
    with pytest.raises((DataError, MissingDependency)):
        list(read_documents("docs", str(path)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match="pyarrow"):
        list(read_documents("docs", str(path)))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text', "line 2"), ("a.jsonl", b'{"words": "x"}\n', "line 1: expected an object"),
        ("a.jsonl", b'["x"]\n', "line 1"), ("a.txt", b"\xff\xfe\xfd", "expected UTF-8"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: .*{said}|{name}: {said}"):
        list(read_documents("docs", str(tmp_path / name)))
    with pytest.raises(DataError, match="no such file"):
        paths_of(str(tmp_path / "nothing*"))


def test_duplicates():
    documents = [Document("docs", str(i), "", passage(i)) for i in range(30)]
    again = [Document("docs", "x", "", passage(5) + "\n"), Document("docs", "y", "", passage(6) + " and a bit")]
    exact = Duplicates(near=False)
    assert exact.fresh(documents) == documents
    assert exact.fresh(again) == again[1:]
    near = Duplicates(near=True)
    assert near.fresh(documents) == documents
    assert near.fresh(again) == []
    assert (near.exact, near.near) == (1, 1)


def test_command_counts_and_its_shards_are_read(texts, tmp_path, capsys):
    out = tmp_path / "shards"
    given = ["--source", f"prose={texts}/*.jsonl*", "--source", f"code={texts}/plain", "--fim", "code"]
    assert cli.main(["data", str(out), *given, "--tokenizer", str(NANO), "--near-duplicates"]) == 0
    table = capsys.readouterr().out
    assert "duplicates dropped: 1 exact, 1 near" in table
    assert "prose" in table
    assert cli.main(["data", str(out), "--source", "prose"]) == 1
    assert "KIND=PATH" in capsys.readouterr().err
    shard = read_shard(out, "train", tokenizer=NANO / "tokenizer.json")
    assert shard.meta["kinds"] == ["prose", "code", "fim"]
    held = read_shard(out, "heldout")
    assert len(shard.kinds[shard.kinds < 2]) + len(held.kinds) == 60 + 40
    assert (shard.kinds == 2).any()
    first = shard.tokens[: shard.offsets[1]] & 0x7FFF
    assert Tokenizer.load(str(NANO)).decode([int(t) for t in first[1:-1]]) == passage(0)
    config = dataclasses.replace(nano(), num_hidden_layers=1, n_routed_experts=4)
    run = TrainConfig(steps=1, batch_rows=1, row_tokens=128, quantise_from=1, repeats={"code": 0})
    trainer = Trainer(config, run, data=out, out=tmp_path / "run", device="cpu", tokenizer=NANO)
    assert trainer.scored == ["prose", "code"]
    assert trainer.batches._repeats.tolist() == [float(kind == 0) for kind in shard.kinds]  # own kinds count once
    batch = PackedBatches(shard, batch_rows=2, row_tokens=256, repeats={"prose": 1, "fim": 1}, seed=0).next()
    assert batch.ids.shape == (2, 256)


def test_wide_tokens(tmp_path):
    """Vocabularies over 15 bits, such as the released one, take 32-bit tokens; the no-loss bit moves up with them."""
    (tmp_path / "tokenizer.json").write_text("{}")
    entries = {}
    for split in ("train", "heldout"):
        writer = ShardWriter(tmp_path, split, ["docs"], wide=True)
        prompt = np.array([128799, 5], writer.dtype) | writer.dtype.type(1 << 31)
        writer.add(np.concatenate([prompt, np.array([100000, 2], writer.dtype)]), "docs", 3)
        entries[split] = writer.close()
    write_meta(tmp_path, tmp_path / "tokenizer.json", entries, {}, kinds=["docs"], wide=True)
    shard = read_shard(tmp_path, "train")
    batch = PackedBatches(shard, batch_rows=1, row_tokens=128, repeats={"docs": 1}, seed=0).next()
    assert batch.ids[0, :4].tolist() == [128799, 5, 100000, 0]
    assert batch.targets[0, :4].tolist() == [-100, 100000, 2, -100]


def test_an_empty_split_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("only one document")
    with pytest.raises(DataError, match="no samples at all"):
        tokenise([("docs", str(tmp_path / "one.txt"))], tmp_path / "out", NANO)
