"""A whole run in small: stages, resume, stops, and that what is exported is what was trained."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from tests.train.small import packed, run_config, small_config, trainer_of, write_shards

from pelagos.checkpoint import open_checkpoint
from pelagos.config import nano, tiny
from pelagos.errors import CheckpointError, ConfigError, DataError, TrainingError
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.load import load_model
from pelagos.model.paged import PagedForward
from pelagos.numerics import FP8_BLOCK, fake_quant_fp4, fake_quant_fp8
from pelagos.train.objective import prepare
from pelagos.train.recipe import TrainConfig
from pelagos.train.state import newest
from pelagos.train.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of six steps through all three stages."""
    trainer = trainer_of(data, tmp_path_factory.mktemp("whole"))
    assert trainer.run()
    return trainer


def log_of(trainer):
    return [json.loads(line) for line in (trainer.out / "log.jsonl").read_text().splitlines()]


def same(one, other):
    return all(torch.equal(a, other[name]) for name, a in one.items()) and one.keys() == other.keys()


def test_schedule():
    config = TrainConfig(steps=1000, lr=1.0, lr_final_frac=0.1, warmup_steps=10, decay_from=0.5)
    assert [config.lr_at(s) for s in (0, 4, 9, 10, 500)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    assert config.lr_at(750) == pytest.approx(0.55)
    assert config.lr_at(1000) == config.lr_at(2000) == pytest.approx(0.1)
    assert all(config.lr_at(s) >= config.lr_at(s + 1) for s in range(500, 999))
    assert config.weights_at(499).mtp == 0.3
    assert config.weights_at(500).mtp == 0.1


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"steps": 0}, "steps=0"), ({"lr": True}, "lr=True"), ({"lr": float("nan")}, "finite"), ({"lr": "1"}, "lr='1'"),
        ({"batch_rows": 2.0}, "whole number"), ({"recompute": 1}, "true or false"), ({"decay_from": 1.5}, "fraction"),
        ({"repeats": {"docs": "much"}}, "repeats"), ({"repeats": [1]}, "repeats"), ({"seed": -1}, "seed"),
        ({"patience": 0}, "patience"), ({"eval_rows": 0}, "eval_rows"),
    ],
)  # fmt: skip
def test_settings_are_checked(setting, said):
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**({"steps": 1} | setting))


def test_stages_follow_each_other(data, tmp_path, monkeypatch):
    trainer = trainer_of(data, tmp_path)
    seen = []
    plain = trainer._losses

    def watched(batch, weights, *, dense):
        seen.append((trainer.step, dense, trainer.model.mode, weights.mtp))
        return plain(batch, weights, dense=dense)

    monkeypatch.setattr(trainer, "_losses", watched)
    monkeypatch.setattr(trainer, "evaluate", lambda: {"docs": 1.0})
    trainer.run()
    reference, released = (0.3, "reference"), (0.1, "released")
    assert [s[1] for s in seen] == [True, True, True, False, False, False]  # 0.34 of 6 steps: sparse from step 3
    assert [s[2] for s in seen] == [reference[1]] * 5 + [released[1]]
    assert [s[3] for s in seen] == [reference[0]] * 3 + [released[0]] * 3


@pytest.mark.parametrize("cut", [1, 5])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(data, tmp_path, finished, cut, monkeypatch):
    first = trainer_of(data, tmp_path, save_every=cut)
    monkeypatch.setattr(first, "_report", lambda *_: first.step == cut + 1 and pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception):
        first.run()  # dies a step after its last save
    second = trainer_of(data, tmp_path, save_every=77, log_every=2)  # settings that may change
    assert second.resume()
    assert second.step == cut
    assert second.batches.state != trainer_of(data, tmp_path / "new").batches.state
    assert second.run()
    assert same(second.model.state_dict(), finished.model.state_dict())
    assert second.scores == finished.scores
    assert second.tokens == finished.tokens == 6 * 2 * 128


def test_a_stop_saves_and_continues_bitwise(data, tmp_path, finished, capsys):
    first = trainer_of(data, tmp_path)
    first.stop()
    assert not first.run()
    assert first.step == 1
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "loss": 1.0}\n{"step": 3, "los')  # what a killed process left behind
    second = trainer_of(data, tmp_path)
    assert second.resume()
    assert [row["step"] for row in log_of(second)] == [1]
    assert second.run()
    assert same(second.model.state_dict(), finished.model.state_dict())
    third = trainer_of(data, tmp_path)
    assert third.resume()
    assert third.model.mode == "released"  # a finished run's numbers are those of its last stage
    assert third.run()
    assert third.scores == third.evaluate() == finished.scores


def test_the_log_says_what_happened(finished):
    rows = log_of(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert set(rows[0]) >= {"loss", "mtp", "grad_norm", "max_load", "lr", "tokens_per_s", "tokens"}
    assert rows[-1]["heldout"] == finished.scores
    assert set(finished.scores) == {"docs", "code", "books", "chat"}


def test_held_out_units(finished, data):
    """Bits per byte of text: nats a token times tokens a byte; here every token is worth three bytes."""
    nats = finished.scores["chat"]
    assert nats == pytest.approx(math.log(128), rel=0.1)
    heldout = finished.heldout
    lengths = (heldout.offsets[1:] - heldout.offsets[:-1])[heldout.kinds == 0]
    share = (lengths - 1).sum() / (3 * lengths.sum())
    assert finished._tokens_per_byte("docs") == pytest.approx(share)
    assert finished.scores["docs"] == pytest.approx(math.log2(128) * share, rel=0.1)


def test_progress_line(data, tmp_path, capsys):
    trainer = trainer_of(data, tmp_path, steps=2)
    print_of = trainer.describe()
    assert "cpu" in print_of
    assert "float32 activations, float32 master weights" in print_of
    trainer.run()
    lines = capsys.readouterr().err.splitlines()
    for said in ("step 1/2 loss 4.", "grad norm", "max expert load", "tok/s", "ETA 0:00:0"):
        assert said in lines[0]
    assert "held-out docs" in lines[-1]
    assert "bits/byte" in lines[-1]


def test_patience_ends_the_run(data, tmp_path, monkeypatch, capsys):
    values = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    trainer = trainer_of(data, tmp_path, steps=20, eval_every=1, patience=2, quantise_from=1, sparse_from=1)
    monkeypatch.setattr(trainer, "evaluate", lambda: {"docs": next(values)})
    assert trainer.run()
    assert (trainer.step, trainer.best, trainer.stale) == (4, 2.0, 2)
    assert "no better for 2 of 2 checks" in capsys.readouterr().err
    again = trainer_of(data, tmp_path, steps=20, eval_every=1, patience=2, quantise_from=1, sparse_from=1)
    assert again.resume()
    assert again.run()
    assert again.step == 4  # stopped means stopped, until the patience is raised


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(data, tmp_path, monkeypatch):
    trainer = trainer_of(data, tmp_path, save_every=2, log_every=50)
    plain = trainer._losses

    def poisoned(batch, weights, *, dense):
        terms = plain(batch, weights, dense=dense)
        return dataclasses.replace(terms, total=terms.total * math.nan) if trainer.step == 2 else terms

    monkeypatch.setattr(trainer, "_losses", poisoned)
    with pytest.raises(
        TrainingError, match=r"step 3: .*not finite.*state-00000002 keeps the last good state.*lower lr"
    ):
        trainer.run()
    after = trainer_of(data, tmp_path, save_every=2, log_every=50)
    assert after.resume()
    assert after.step == 2
    assert all(p.isfinite().all() for p in after.model.parameters())
    trainer = trainer_of(data, tmp_path / "other")
    monkeypatch.setattr(trainer, "_losses", lambda *a, **k: poisoned(*a, **k))
    trainer.model.get_parameter("norm.weight").data.fill_(math.inf)
    with pytest.raises(TrainingError, match=r"step 1: .*no state was saved yet"):
        trainer.run()


def test_resuming_another_run_is_refused(data, tmp_path, finished):
    path = shutil.copytree(newest(finished.out), tmp_path / "state-00000006")
    with pytest.raises(CheckpointError, match=r"setting steps was 6, now 7.*fractions"):
        trainer_of(data, tmp_path, steps=7).resume()
    with pytest.raises(CheckpointError, match=r"setting lr was 0.003, now 0.001"):
        trainer_of(data, tmp_path, lr=0.001).resume()
    other = Trainer(small_config(index_topk=8), run_config(), data=data, out=tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match=r"model index_topk was 4, now 8"):
        other.resume()
    more = write_shards(tmp_path / "more", samples=30)
    with pytest.raises(CheckpointError, match=r"shard train\.tokens was"):
        trainer_of(more, tmp_path).resume()
    for name in ("__0_0.distcp", ".metadata", "run.pt"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:5000] if name != "run.pt" else whole[:500])
        with pytest.raises(CheckpointError, match="not a readable run state"):
            trainer_of(data, tmp_path).resume()
        (path / name).write_bytes(whole)
    torch.save({"format": 2}, path / "run.pt")
    with pytest.raises(CheckpointError, match="format 4"):
        trainer_of(data, tmp_path).resume()
    (tmp_path / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="older format"):
        trainer_of(data, tmp_path).resume()


def test_what_cannot_work_is_refused_at_the_start(data, tmp_path):
    with pytest.raises(DataError, match="no token shards"):
        trainer_of(tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(DataError, match=r"holds token 128, the model's vocab_size is 128"):
        trainer_of(write_shards(tmp_path / "large", largest=128), tmp_path / "run")
    with pytest.raises(DataError, match="no sample to score"):
        trainer_of(write_shards(tmp_path / "fim", kinds=("fim",)), tmp_path / "run", repeats={"fim": 1})
    with pytest.raises(ConfigError, match="index_head_dim=16"):
        Trainer(
            dataclasses.replace(tiny(), index_head_dim=16), run_config(), data=data, out=tmp_path / "run", device="cpu"
        )
    with pytest.raises(ConfigError, match="device 'cpux' is not usable"):
        Trainer(small_config(), run_config(), data=data, out=tmp_path / "run", device="cpux")
    foreign = tmp_path / "tokenizer"
    foreign.mkdir()
    (foreign / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="another tokenizer"):
        trainer_of(data, tmp_path / "run", tokenizer=foreign)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not usable as the run directory"):
        trainer_of(data, tmp_path / "file")


def test_a_state_that_cannot_be_written_leaves_the_old_one(data, tmp_path, finished, monkeypatch):
    before = {path: path.read_bytes() for path in newest(finished.out).iterdir()}
    save = torch.save

    def full_disk(tensor, file, *rest, **options):
        if isinstance(tensor, torch.Tensor):
            file.write(b"half")
            raise RuntimeError("No space left on device")
        save(tensor, file, *rest, **options)

    monkeypatch.setattr(torch, "save", full_disk)
    monkeypatch.setattr(finished, "step", 7)
    with pytest.raises(CheckpointError, match=r"state of step 7 not written.*No space left"):
        finished.save()
    assert {path: path.read_bytes() for path in finished.out.glob("state-*/*")} == before


def test_overfitting_through_all_stages(data, tmp_path):
    """Loss falls on one batch, with quantised weights too: the straight-through gradient reaches the masters."""
    trainer = trainer_of(
        data, tmp_path, steps=16, batch_rows=1, lr=0.01, decay_from=1, sparse_from=0.3, quantise_from=0.6, log_every=100
    )
    batch = trainer.batches.next()
    trainer.batches.next = lambda rows: batch
    losses, weights = [], []
    for _ in range(16):
        terms, _ = trainer._update()
        trainer.step += 1
        losses.append(float(terms.next_token))
        weights.append(trainer.model.layers[1].ffn.experts.w2.detach().clone())
    assert trainer.model.mode == "released"
    assert losses[9] < 0.7 * losses[0]
    assert losses[-1] < 0.8 * losses[10]
    moved, codes = weights[-1] - weights[10], [fake_quant_fp4(w) for w in (weights[10], weights[-1])]
    assert moved.ne(0).float().mean() > 0.99
    assert 0 < codes[0].ne(codes[1]).float().mean() < 1  # small moves stay in the masters until they cross a border


def training_logits(trainer, batch):
    """The forward as training runs it: packed, with notes, sparse."""
    prepared = prepare(trainer.model, *batch, dense=False)
    with torch.no_grad():
        streams = trainer.forward.run(prepared.step, prepared.cache, [])
        return trainer.model.logits(trainer.forward.collapse(trainer.model, streams))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_trainer_is_server(data, tmp_path, seed):
    """Bitwise: the engine's forward over pages, on the exported checkpoint, gives the logits of the training forward.

    What the release stores in BF16 the quantised stage rounds as well, its masters kept beside: weights, and the
    rotated channels of what is cached; and it attends by the engine's own tiles.
    """
    trainer = trainer_of(data, tmp_path / "run", steps=3, sparse_from=0.3, quantise_from=0.6, seed=seed)
    assert trainer.run()
    batch = packed([[128], [90]], 128)
    trained = training_logits(trainer, batch)
    trainer.export(tmp_path / "model")
    server = load_model(tmp_path / "model", mode="released")
    layout = CacheLayout(server.config, "released", 4)
    pages, slots = (torch.zeros(2, size, dtype=torch.uint8) for size in (layout.page_bytes, layout.slot_bytes))
    forward = PagedForward(server, layout, pages, slots, exact=True)
    for row, length in enumerate((128, 90)):
        served = []
        for begin, end in ((0, 37), (37, 38), (38, length)):  # chunks of a prompt, and a token by itself
            table = np.array([row], dtype=np.int32)
            span = Span(batch[0][row, begin:end].numpy(), begin, row, table, 0, end - begin, 0)
            served.append(torch.from_numpy(forward.forward([span]).logits))
        assert torch.equal(torch.cat(served), trained[row, :length])


@pytest.mark.slow
def test_nano_trains_on_as_it_is_served(data, tmp_path):
    """The released nano as it stands: the bits of its quantised training forward are those of the engine's forward."""
    config = run_config(sparse_from=0, quantise_from=0)
    trainer = Trainer(nano(), config, data=data, out=tmp_path, device="cpu", start="nano")
    batch = packed([[700], [90, 300]], 768)
    trained, server = training_logits(trainer, batch), load_model("nano", mode="released")
    layout = CacheLayout(server.config, "released")
    table = np.arange(layout.pages_for(768), dtype=np.int32)
    for row, first, length in ((0, 0, 700), (1, 0, 90), (1, 128, 300)):
        sizes = ((len(table), layout.page_bytes), (1, layout.slot_bytes))
        forward = PagedForward(server, layout, *(torch.zeros(s, dtype=torch.uint8) for s in sizes), exact=True)
        served = []
        for begin, end in ((0, 60), (60, 61), (61, length)):
            span = Span(batch[0][row, first + begin : first + end].numpy(), begin, 0, table, 0, end - begin, 0)
            served.append(torch.from_numpy(forward.forward([span]).logits))
        assert torch.equal(torch.cat(served), trained[row, first : first + length])


def test_export_holds_the_masters_rounded_once(finished, tmp_path):
    finished.export(tmp_path / "model")
    stored = {name: (values, kind) for name, values, kind in open_checkpoint(tmp_path / "model").stream()}
    formats = set()
    for name, tensor, release in finished.model.released_tensors():
        values, kind = stored[name]
        assert kind == release
        formats.add(kind)
        expected = tensor.detach()
        if kind == "fp4":
            expected = fake_quant_fp4(expected)
        elif kind == "fp8":
            expected = fake_quant_fp8(expected, FP8_BLOCK)
        elif kind == "bf16":
            expected = expected.bfloat16().float()
        assert torch.equal(values.to(expected.dtype), expected), name
    assert formats == {"fp4", "fp8", "bf16", "f32", "i64"}


def test_export_brings_the_tokenizer_and_never_half(data, tmp_path, monkeypatch):
    trainer = trainer_of(data, tmp_path / "run", tokenizer=data)
    target = tmp_path / "model"
    real = trainer.model.get_parameter("norm.weight").data
    good = real.clone()
    real.fill_(math.inf)
    with pytest.raises(CheckpointError):
        trainer.export(target)
    assert not (target / "config.json").exists()
    real.copy_(good)
    trainer.export(target)
    assert (target / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
    assert load_model(target).config.compress_ratios == trainer.model.config.compress_ratios
    trainer.export(target)  # the same tokenizer may stay
    (target / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="export to another directory"):
        trainer.export(target)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        trainer.check_export(tmp_path / "file")


def test_accumulation_averages_gradients(data, tmp_path):
    trainer = trainer_of(data, tmp_path / "two", clip_norm=1e9, batch_rows=1, accumulate=2)
    apart = trainer_of(data, tmp_path / "one", batch_rows=1)
    names, parameters = zip(*apart.model.named_parameters(), strict=True)
    sums = dict.fromkeys(names, torch.zeros(()))
    for _ in range(2):
        total = apart._losses(apart.batches.next(), apart.config.weights_at(0), dense=True).total
        for name, gradient in zip(names, torch.autograd.grad(total / 2, parameters), strict=True):
            sums[name] = sums[name] + gradient
    trainer._update()
    assert trainer.tokens == 256
    assert trainer.batches.state == apart.batches.state
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, sums[name], rtol=1e-4, atol=1e-6, msg=name)
