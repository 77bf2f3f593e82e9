"""Ablations and the dry run, in small: equal FLOPs, what each arm is, tables, refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch
from tests.train.small import run_config, small_config, trainer_of, write_shards

from pelagos import cli
from pelagos.config import flash
from pelagos.errors import CapacityError, ConfigError
from pelagos.model import FullSequence
from pelagos.train import ablate, dry_run
from pelagos.train.meter import training_flops

CHARTS = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def study(name, data, out, **changes):
    return ablate.ablate(name, small_config(), run_config(log_every=1, **changes), data=data, out=out, device="cpu")


QUICK = ("precision",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ablate.STUDIES])
def test_arms_spend_equal_flops(name, data, tmp_path):
    steps = 3 if name in QUICK else 6  # whose arms are as dear a token
    rows = study(name, data, tmp_path, steps=steps)
    arms = ablate.arms_of(name, small_config(), run_config())
    assert [row["arm"] for row in rows] == [arm.name for arm in arms]
    for row in rows:
        assert row["flops"] == pytest.approx(rows[0]["flops"], rel=0.12)  # whole steps of six
        assert set(row["heldout"]) == {"docs", "code", "books", "chat"}
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert report["rows"] == rows
    lines = (tmp_path / f"{name}.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    if CHARTS:
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    again = study(name, data, tmp_path, steps=steps)  # finished runs are read, not run
    assert [row["heldout"] for row in again] == [row["heldout"] for row in rows]


def test_what_the_arms_are(data, tmp_path):
    model, config = small_config(), run_config()
    by_name = {arm.name: arm for name in ablate.STUDIES for arm in ablate.arms_of(name, model, config)}
    dense = dataclasses.replace(model, **by_name["dense"].model)
    assert (dense.layer_ratios, dense.sliding_window) == ((0, 0, 0), 128)
    assert dataclasses.replace(model, **by_name["hca"].model).compress_ratios == (8, 8, 8, 0)
    cheaper = training_flops(dataclasses.replace(model, num_nextn_predict_layers=0), 128)
    assert cheaper < training_flops(model, 128)
    with pytest.raises(ConfigError, match="study 'loss': expected one of optimizer"):
        ablate.arms_of("loss", model, config)


def test_plain_residual_is_one(data, tmp_path):
    """One stream with open gates: a block adds what its sites give to what came in, and nothing of it is learnt."""
    trainer = trainer_of(data, tmp_path)
    trainer = type(trainer)(small_config(hc_mult=1), trainer.config, data=data, out=tmp_path, device="cpu")
    ablate._open_residual(trainer)
    block, model = trainer.model.layers[0], trainer.model
    streams = torch.randn(1, 40, 1, 64, generator=torch.Generator().manual_seed(0))
    step = model.step(torch.arange(40)[None])
    cache = FullSequence(model.config.sliding_window)
    with torch.no_grad():
        out = block(streams, step, cache, 0)
        x = streams[:, :, 0] + block.attn(block.attn_norm(streams[:, :, 0]), step, cache)
        x = x + block.ffn(block.ffn_norm(x), step.ids)
    torch.testing.assert_close(out[:, :, 0], x, rtol=1e-4, atol=1e-4)
    trainer._update()
    assert all(p.grad is None for n, p in model.named_parameters() if "hc_" in n)


def test_dry_run(data, tmp_path, capsys):
    rows = dry_run.measure(trainer_of(data, tmp_path, steps=12, row_tokens_from={"0.9": 256}))
    assert [(r["attention"], r["numbers"], r["row_tokens"]) for r in rows] == [
        ("dense", "bf16", 128), ("sparse", "bf16", 128), ("sparse", "released", 128), ("sparse", "released", 256),
    ]  # fmt: skip
    assert sum(r["steps"] for r in rows) == 12
    assert all(r["seconds"] > 0 for r in rows)
    text = dry_run.report(rows, 10**9, 10**10)
    assert "fits; 0.00 hours" in text
    assert "does not fit" in dry_run.report([rows[0] | {"seconds": None}], 10**9, 10**10)
    with pytest.raises(CapacityError, match=r"need 4\d{3}\.\d GB, cpu has"):
        dry_run.check_memory(flash(), "cpu")


def test_commands(data, tmp_path, capsys):
    fixed = ["--model", "tiny", "--data", str(data), "--device", "cpu", "--steps", "2"]
    sets = ["batch_rows=1", "row_tokens=128", "quantise_from=1", "eval_rows=1", "log_every=1", "warmup_steps=1"]
    fixed += [part for setting in sets for part in ("--set", setting)]
    assert cli.main(["train", *fixed, "--out", str(tmp_path / "dry"), "--dry-run"]) == 0
    assert "fits" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()
    assert cli.main(["train", *fixed, "--out", str(tmp_path / "run"), "--plot"]) == int(not CHARTS)
    assert (tmp_path / "run" / "curves.png").is_file() == CHARTS
    assert ("--plot needs matplotlib" in capsys.readouterr().err) == (not CHARTS)
    assert cli.main(["train", "ablate", "--study", "mtp", *fixed, "--out", str(tmp_path / "study")]) == 0
    assert capsys.readouterr().out.startswith("| arm | docs |")
    assert cli.main(["train", "ablate", "--study", "x", *fixed, "--out", str(tmp_path / "study")]) == 1
    assert "expected one of optimizer" in capsys.readouterr().err
