"""The whole recipe in small: what each step is, spikes and anticipated routes, low-rank adapters, fine-tuning."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.train.small import run_config, small_config, small_model, trainer_of, write_shards
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from pelagos import cli
from pelagos.errors import ConfigError, MissingDependency
from pelagos.load import load_model, save_model
from pelagos.model import FullSequence, Transformer
from pelagos.train import meter
from pelagos.train.guard import SpikeDetector, routed, routers
from pelagos.train.recipe import TrainConfig
from pelagos.train.state import newest, released
from pelagos.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def same(one, other):
    return all(torch.equal(a, other[name]) for name, a in one.items()) and one.keys() == other.keys()


def test_phases():
    config = TrainConfig(steps=100, sparse_from=0.5, quantise_from=0.8, indexer_steps=5, decay_from=0.6, lr=1.0)
    assert [config.dense(s) for s in (0, 49, 50)] == [True, True, False]
    assert [config.indexer_only(s) for s in (44, 45, 49, 50)] == [False, True, True, False]
    assert [config.quantised(s) for s in (79, 80)] == [False, True]
    assert config.weights_at(0).indexer == 0  # it waits for its warm-up
    assert [config.weights_at(s).main for s in (44, 47, 50)] == [1, 0, 1]
    assert [config.weights_at(s).indexer for s in (44, 47, 50)] == [0, 1, 1]
    assert config.lr_at(47) == config.indexer_lr
    assert TrainConfig(steps=100).weights_at(0).indexer == 1  # without a warm-up it learns all along


def test_batch_ramp_and_lengths():
    config = TrainConfig(
        steps=100, batch_rows=8, row_tokens=256, accumulate=2, ramp_from_frac=0.125, ramp_until=0.3,
        row_tokens_from={"0.5": 512, "0.9": 1024},
    )  # fmt: skip
    assert [sum(config.rows_at(s)) for s in (0, 9, 10, 20, 30, 49)] == [2, 2, 4, 8, 16, 16]
    assert config.rows_at(40) == [8, 8]
    assert [(config.lengths[config.length_stage(s)][1], config.rows_at(s)) for s in (49, 50, 89, 90)] == [
        (256, [8, 8]), (512, [4, 4]), (512, [4, 4]), (1024, [2, 2]),
    ]  # fmt: skip
    for wrong, said in (({"0.5": 300}, "multiple of 128"), ({"1.5": 256}, "fraction"), ({"0.5": 640}, "do not divide")):
        with pytest.raises(ConfigError, match=said):
            TrainConfig(steps=10, batch_rows=8, row_tokens=256, row_tokens_from=wrong)
    with pytest.raises(ConfigError, match="precision='fp16': expected one of bf16, fp8"):
        TrainConfig(steps=10, precision="fp16")


def test_a_run_through_every_phase_resumes_bitwise(data, tmp_path):
    """Ramp, two row lengths, indexer warm-up, FP8 products, quantised end; stopped at each step, continued, equal."""
    changes = {
        "steps": 5, "batch_rows": 2, "row_tokens_from": {"0.4": 256}, "ramp_from_frac": 0.5, "ramp_until": 0.2,
        "sparse_from": 0.6, "indexer_steps": 1, "quantise_from": 0.8, "precision": "fp8", "eval_every": 3,
        "recompute": True, "anticipate": 2, "anticipate_steps": 3,
    }  # fmt: skip
    whole = trainer_of(data, tmp_path / "whole", **changes)
    whole.ahead.until = 4  # routes two steps old in the first four
    assert whole.run()
    assert whole.tokens == 128 + 4 * 256
    parts = trainer_of(data, tmp_path / "parts", **changes)
    parts.ahead.until = 4
    for step in range(1, 6):
        parts.stop()
        assert parts.run() is (step > 5)
        assert parts.step == step
        parts = trainer_of(data, tmp_path / "parts", **changes)
        assert parts.resume()
    assert parts.run()
    assert same(parts.model.state_dict(), whole.model.state_dict())
    assert parts.scores == whole.scores
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert {"clamp_hits", "indexer", "grad_norm", "max_load"} <= rows[0].keys()
    assert rows[-1]["fp4_binades"] <= 14
    assert 0 < next(row for row in rows if "recall" in row)["recall"] <= 1.0


def test_only_the_indexer_moves_in_its_warm_up(data, tmp_path):
    trainer = trainer_of(data, tmp_path, sparse_from=0.5, indexer_steps=2, quantise_from=1)
    trainer._update()
    trainer.step += 1
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    bias = trainer.model.layers[1].ffn.gate.bias.clone()
    trainer._update()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n in before if ".indexer." in n}
    assert torch.equal(bias, trainer.model.layers[1].ffn.gate.bias)


def test_spike_rule():
    detector = SpikeDetector(50, 6.0)
    calm = [2 + 0.01 * (i % 5) for i in range(40)]
    assert [detector.spike(loss) for loss in calm] == [None] * 40
    assert "6 sigma of 40" in (detector.spike(3.0) or "")
    assert detector.spike(float("nan")) is not None
    assert detector.spike(1.0) is None  # falling is no spike
    assert len(detector.losses) == 41
    early = SpikeDetector(50, 6.0)
    assert early.spike(9.0) is None
    assert early.spike(900.0) is None


def test_a_spike_rolls_back_and_anticipates(data, tmp_path, monkeypatch, capsys):
    trainer = trainer_of(
        data, tmp_path, steps=34, batch_rows=1, save_every=25, anticipate=2, anticipate_steps=4, sparse_from=1,
        quantise_from=1,
    )  # fmt: skip
    plain, used = trainer._losses, []

    def spiked(batch, weights, *, dense, notes=None):
        terms = plain(batch, weights, dense=dense, notes=notes)
        if notes is None:
            used.append((trainer.step, routers(trainer.model)[1].routes is not None))
            if trainer.step == 27 and trainer.ahead.until == 0:
                terms.next_token = terms.next_token * 0 + 50
        return terms

    monkeypatch.setattr(trainer, "_losses", spiked)
    monkeypatch.setattr(trainer, "evaluate", lambda: {"docs": 1.0})
    assert trainer.run()
    steps = [step for step, _ in used]
    assert steps[:28] == list(range(28))
    assert steps[28:] == list(range(25, 34))  # back to the state of step 25, then on
    assert [step for step, fixed in used if fixed] == list(range(25, 32))  # until 28 + 4
    assert "step 28: loss 50.0000 is above" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"step": 25, "spike_at": 28, "anticipate_until": 32} in rows
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 35))


def test_routes_are_taken_and_weights_stay_the_routers_own():
    model = small_model()
    ids = torch.randint(128, (1, 64), generator=torch.Generator().manual_seed(0))
    notes = []
    model.run(model.step(ids), _cache(model), notes)
    own = [note["chosen"] for note in notes]
    turned = [(chosen + 1) % 8 for chosen in own]
    after: list[dict] = []
    with routed(model, [*turned, turned[-1]]):
        model.run(model.step(ids), _cache(model), after)
    assert all(torch.equal(note["chosen"], chosen) for note, chosen in zip(after, turned, strict=True))
    scores = after[1]["router_scores"].gather(1, turned[1])
    torch.testing.assert_close(after[1]["chosen_weights"], scores / scores.sum(-1, keepdim=True) * 1.5)
    assert all(gate.routes is None for gate in routers(model))


def _cache(model):
    return FullSequence(model.config.sliding_window)


def test_clamp_hits_are_counted():
    model = small_model(swiglu_limit=0.05)
    hits = meter.ClampHits(model)
    with torch.no_grad():
        model(torch.randint(128, (1, 64), generator=torch.Generator().manual_seed(0)))
    found = hits.read()
    assert all(found[name] > 0 for name in meter.CLAMPED)
    assert hits.read() == dict.fromkeys(meter.CLAMPED, 0)


def test_lora_trains_only_adapters_and_exports_one_weight(data, tmp_path):
    trainer = trainer_of(data, tmp_path / "run", lora_rank=2, quantise_from=1)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    assert trainer.run()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved
    assert moved <= {n for n in before if ".lora_" in n}
    merged = Transformer(small_config())
    tensors = {name: tensor for name, tensor, _ in released(trainer.model, trainer.ranks)}
    for name, tensor, _ in merged.released_tensors():
        tensor.detach().copy_(tensors.pop(name))
    assert not tensors
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids), trainer.model(ids))
    trainer.export(tmp_path / "model")
    assert load_model(tmp_path / "model").config.num_hidden_layers == 3
    again = trainer_of(data, tmp_path / "run", lora_rank=2, quantise_from=1)
    assert again.resume()
    assert same(again.model.state_dict(), trainer.model.state_dict())


def test_fine_tuning_starts_from_a_checkpoint(data, tmp_path):
    save_model(small_model(7), tmp_path / "start", exact=True)
    config = run_config(steps=1, lr=1e-6, quantise_from=1)
    trainer = Trainer(small_config(), config, data=data, out=tmp_path / "run", device="cpu", start=tmp_path / "start")
    assert same(trainer.model.state_dict(), small_model(7).state_dict())
    assert trainer.run()
    other = Trainer(small_config(), config, data=data, out=tmp_path / "run", device="cpu")
    with pytest.raises(Exception, match="checkpoint start was"):
        other.resume()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_killed_run_resumes_bitwise(data, tmp_path, capsys):
    """kill -9 after step 3 of 4, of which step 2's state is kept, then the same command again: the same weights."""
    settings = ["batch_rows=1", "row_tokens=128", "warmup_steps=2", "log_every=1", "save_every=2", "eval_rows=1"]
    sets = [part for setting in settings for part in ("--set", setting)]

    def command(out):
        fixed = ["--model", "tiny", "--data", str(data), "--out", str(out), "--steps", "4", "--device", "cpu", *sets]
        return ["train", *fixed]

    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    assert cli.main(command(tmp_path / "a")) == 0
    whole = capsys.readouterr().out
    program = (
        "import os, signal, sys; from pelagos import cli; from pelagos.train.trainer import Trainer; "
        "plain = Trainer._update; die = lambda: os.kill(os.getpid(), signal.SIGKILL); "
        "Trainer._update = lambda self: die() if self.step == 3 else plain(self); cli.main(sys.argv[1:])"
    )
    killed = subprocess.run([sys.executable, "-c", program, *command(tmp_path / "b")], env=environment, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert cli.main(command(tmp_path / "b")) == 0
    again = capsys.readouterr()
    assert "resuming" in again.err
    for run in "ab":
        dcp_to_torch_save(newest(tmp_path / run), tmp_path / f"{run}.pt")
    states = [torch.load(tmp_path / f"{run}.pt", weights_only=True) for run in "ab"]
    assert states[0]
    assert same(*states)
    assert whole == again.out


def test_tensorboard_events(data, tmp_path):
    """Records parse, checksums hold (CRC-32C of the standard's test string first), values are the log's."""
    crc = 0xE3069283
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert meter._masked_crc(b"123456789") == masked.to_bytes(4, "little")
    log = meter.Meter(tmp_path)
    log.write({"step": 300, "loss": 1.5, "clamp_hits": {"gate": 3}, "name": "x"}, "line")
    (file,) = (tmp_path / "tensorboard").iterdir()
    raw, events = file.read_bytes(), []
    while raw:
        size = int.from_bytes(raw[:8], "little")
        assert meter._masked_crc(raw[:8]) == raw[8:12]
        event, check = raw[12 : 12 + size], raw[12 + size : 16 + size]
        assert meter._masked_crc(event) == check
        events.append(event)
        raw = raw[16 + size :]
    assert len(events) == 2
    assert b"brain.Event:2" in events[0]
    assert b"loss\x15\x00\x00\xc0\x3f" in events[1]  # tag, then field 2 as a float: 1.5
    assert b"clamp_hits/gate" in events[1]
    assert b"\x10\xac\x02" in events[1]  # field 2, varint 300


def test_plot(tmp_path, monkeypatch):
    log = meter.Meter(tmp_path)
    for step in range(1, 5):
        log.write({"step": step, "loss": 3.0 / step, "mtp": 1.0, "grad_norm": 0.5, "tokens_per_s": 9.0}, "")
    log.write({"step": 4, "heldout": {"docs": 1.0}}, "")
    if importlib.util.find_spec("matplotlib") is not None:
        assert meter.plot(tmp_path).read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match="matplotlib"):
        meter.plot(tmp_path)


def test_flops_of_training():
    config = small_config()
    with_mtp, without = (meter.training_flops(small_config(num_nextn_predict_layers=n), 256) for n in (1, 0))
    assert with_mtp > without > 6 * 0.5 * sum(p.numel() for p in Transformer(config).layers[0].attn.parameters())
    assert meter.peak_flops(torch.device("cpu")) is None
