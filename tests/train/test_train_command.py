"""`pelagos train` as a person meets it."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from tests.train.small import write_shards

from pelagos import cli
from pelagos.checkpoint import open_checkpoint
from pelagos.train.trainer import Trainer

QUICK = ("batch_rows=1", "row_tokens=128", "warmup_steps=1", "quantise_from=1", "eval_rows=1", "log_every=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def command(data, out, *more, settings=(), steps=2):
    sets = [part for setting in (*QUICK, *settings) for part in ("--set", setting)]
    fixed = ["--model", "tiny", "--data", str(data), "--out", str(out), "--steps", str(steps), "--device", "cpu"]
    return cli.main(["train", *fixed, *sets, *map(str, more)])


def test_train_export_and_again(data, tmp_path, capsys, monkeypatch):
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    (bundled / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
    (bundled / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr("pelagos.cli.train.bundled_model_dir", lambda name: bundled)
    assert command(data, tmp_path / "run", "--export", tmp_path / "model") == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["step"] == 2
    assert summary["tokens"] == 256
    assert set(summary["heldout"]) == {"docs", "code", "books", "chat"}
    assert err.splitlines()[0].startswith("training tiny: ")
    assert "parameters on cpu (CPU, " in err
    assert "float32 activations" in err
    assert open_checkpoint(tmp_path / "model").config.vocab_size == 128
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
    assert (tmp_path / "model" / "tokenizer_config.json").read_text() == "{}"
    assert command(data, tmp_path / "run", settings=["log_every=5"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == summary
    assert "resuming tiny: " in err
    assert command(data, tmp_path / "run", settings=["lr=0.5"]) == 1
    assert "setting lr was 0.003, now 0.5" in capsys.readouterr().err
    (bundled / "tokenizer.json").write_text("another")
    assert command(data, tmp_path / "new") == 1
    assert "another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_continues(data, tmp_path, capsys, monkeypatch, number):
    plain = Trainer._update

    def interrupted(self):
        if self.step == 1:
            os.kill(os.getpid(), number)
        return plain(self)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", interrupted)
        assert command(data, tmp_path, "--export", tmp_path / "model", steps=3) == 128 + number
    out, err = capsys.readouterr()
    assert out == ""
    assert f"stopped by {number.name} at step 2 of 3" in err
    assert "the same command continues" in err
    assert not (tmp_path / "model").exists()
    assert signal.getsignal(number) is before
    assert command(data, tmp_path, steps=3) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3


def test_a_second_interrupt_ends_at_once(data, tmp_path, capsys, monkeypatch):
    def twice(self):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # two at once may arrive as one

    monkeypatch.setattr(Trainer, "_update", twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as a terminal's, whatever ran before
    try:
        assert command(data, tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "once more to end now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["lr=fast"], "--set lr=fast: expected FIELD=VALUE with a value in JSON (0.5, true), got 'fast'"),
        (["recompute=True"], "got 'True'"),
        (["lr"], "got no '='"),
        (["lr="], "got ''"),
        (["learning_rate=1"], "unknown field 'learning_rate'"),
        (["quantize_from=1"], "did you mean quantise_from?"),
        (["steps=4"], "give it as --steps"),
        (["batch_rows=1.5"], "batch_rows=1.5: expected a whole number"),
        (['repeats={"poems": 1}'], "unknown kinds ['poems']"),
        (["row_tokens=100"], "multiple of 128"),
    ],
)
def test_bad_settings_are_one_line(data, tmp_path, capsys, settings, said):
    assert command(data, tmp_path / "run", settings=settings) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pelagos: ")
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "run").exists()


def test_bad_places_are_one_line(data, tmp_path, capsys):
    assert command(tmp_path / "nowhere", tmp_path / "run") == 1
    assert "run `pelagos data`" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command(data, tmp_path / "file") == 1
    assert "not usable as the run directory" in capsys.readouterr().err
    assert command(data, tmp_path / "run", "--export", tmp_path / "file") == 1
    assert "is a file" in capsys.readouterr().err
    assert command(data, tmp_path / "run", "--model", "huge") == 1
    assert "unknown preset 'huge'; known: " in capsys.readouterr().err


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for said in ("lr=0.003", 'repeats={"docs": 1', "recompute=false", "--export DIR", "fractions of --steps"):
        assert said in text
