"""`pelagos inspect`: the listing adds up to the cost model's plan, the trace prints what the model's trace says."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.small_tokens import TEXTS, config_for

from pelagos import cli, cost
from pelagos.chat import Tokenizer, train_tokenizer
from pelagos.chat.tokens import SPECIAL_TOKENS
from pelagos.checkpoint import open_checkpoint, write_checkpoint
from pelagos.load import load_model, save_model
from pelagos.model import Transformer
from pelagos.model.trace import trace

LONG = "Hello, world! The quick brown fox jumps over the lazy dog. " * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    full = train_tokenizer(TEXTS, len(SPECIAL_TOKENS) + 256 + 60)
    torch.manual_seed(0)
    made = Transformer(config_for(Tokenizer(full), index_head_dim=32))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2)
    save_model(made, path)
    full.save(str(path / "tokenizer.json"))
    return path


def show(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert cli.main(["inspect", *map(str, args)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def listing(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    return json.loads(show(capsys, path, "--json"))


def test_listing_adds_up_to_the_plan(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*args: object, **options: object) -> None:
        raise AssertionError("a listing reads headers; it builds no model")

    monkeypatch.setattr(Transformer, "__init__", build)
    found, config = listing(capsys, model), open_checkpoint(model).config
    groups = cost.inventory(config, draft=True)
    assert (found["draft"], found["differences"]) == ("mtp", [])
    assert found["parameters"] == sum(group.parameters for group in groups)
    assert found["tensors"] == sum(group.count for group in groups)
    assert found["bytes"] == cost.weights_bytes(config)
    planned = cost.parameters_by_part(config, draft=True)
    assert {part: sums["parameters"] for part, sums in found["parts"].items()} == planned
    plan = [(layer["name"], layer["kind"], layer["ratio"], layer["routing"]) for layer in found["layers"]]
    assert plan == [
        ("layers.0", "window", 0, "hash"),
        ("layers.1", "csa", 4, "hash"),
        ("layers.2", "hca", 8, "learned"),
        ("layers.3", "csa", 4, "learned"),
        ("layers.4", "hca", 8, "learned"),
        ("layers.5", "window", 0, "learned"),
        ("mtp.0", "window", 0, "learned"),
    ]
    for layer in found["layers"]:
        mine = [group for group in groups if group.name.startswith(layer["name"] + ".")]
        assert layer["parameters"] == sum(group.parameters for group in mine)
        assert layer["bytes"] == sum(size for group in mine for _, size in group.stored().values())
        assert layer["formats"]["fp4"]["tensors"] == 3 * config.n_routed_experts
    for sums in (found["parts"], {layer["name"]: layer for layer in found["layers"]}):
        for each in sums.values():
            assert each["bytes"] == sum(part["bytes"] for part in each["formats"].values())


def test_listing_for_people(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = show(capsys, "--model", model)
    assert shown.startswith(f"{model}: 6 layers, mtp draft\n")
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line and line[0] != " "}
    sums = listing(capsys, model)
    assert rows["layers.3"][1:4] == ["csa", "4", "learned"]
    for name, each in (("all", sums), ("layers.3", sums["layers"][3]), ("fp8", sums["formats"]["fp8"])):
        figures = [f"{each[key]:,}" for key in ("tensors", "parameters", "bytes")]
        assert [cell for cell in rows[name] if cell in figures] == figures
    assert shown.endswith("holds what config.json plans\n")


def test_listing_of_a_checkpoint_unlike_its_config(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_checkpoint(model)
    tensors = [(name, values.float(), "f32") for name, values, stored in checkpoint.stream() if stored != "i64"]
    left_out = [each for each in tensors if "experts.3.w2" not in each[0] and not each[0].startswith("mtp.")]
    wrong = [(name, values[:-1] if name == "norm.weight" else values, stored) for name, values, stored in left_out]
    write_checkpoint(tmp_path / "odd", [*wrong, ("layers.0.extra", torch.zeros(3), "f32")], checkpoint.config)
    found = listing(capsys, tmp_path / "odd")
    assert (found["draft"], set(found["formats"])) == (None, {"f32"})
    assert sorted(found["differences"]) == sorted(
        [
            "layers.0.extra: [3], expected no such tensor",
            "norm.weight: [63], expected [64]",
            "layers.0.ffn.gate.tid2eid: 0 tensors, expected 1",
            "layers.1.ffn.gate.tid2eid: 0 tensors, expected 1",
            *(f"layers.{i}.ffn.experts.*.w2.weight: 7 tensors, expected 8" for i in range(6)),
        ]
    )
    assert found["parts"]["unplanned"]["parameters"] == 3
    shown = show(capsys, tmp_path / "odd").splitlines()
    assert "differs from config.json in 10 places:" in shown
    assert shown[-1] == "  and 2 more"


@pytest.mark.parametrize("mode", ["reference", "released"])
def test_trace_prints_the_models_trace(model: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, loaded = Tokenizer.load(model), load_model(model, mode=mode)
    expected = trace(loaded, [loaded.config.bos_token_id, *tokenizer.encode(LONG)])
    found = json.loads(show(capsys, model, "--trace", LONG, "--mode", mode, "--json"))
    assert found == json.loads(json.dumps(dataclasses.asdict(expected)))
    lines = show(capsys, model, "--trace", LONG, "--mode", mode).splitlines()
    assert lines[0].startswith(f"{len(expected.ids)} tokens; traced: position {len(expected.ids) - 1}, ")
    for layer in expected.layers:
        at = lines.index(f"layer {layer.layer}: {layer.kind}, ratio {layer.ratio}, {layer.routing} routing")
        told = "\n".join(lines[at : at + 9]).split("\n\n")[0]
        assert f"positions {layer.window[0]}..{layer.window[1]}" in told
        for expert, weight in zip(layer.experts, layer.expert_weights, strict=True):
            assert f"{expert} x{weight:.3f}" in told
        assert f"spectral norm {layer.attn_mixing.spectral_norm:.4f}" in told
        assert (f"{layer.visible} visible" in told) == (layer.kind != "window")
        if layer.picks is not None:
            assert len(layer.picks) == 4 < layer.visible
            written = told.split("4 picked: ")[1].split("\n")[0]
            assert numbers(written) == layer.picks


def numbers(written: str) -> list[int]:
    """Read `0-3 7` back."""
    runs = [tuple(map(int, run.split("-"))) for run in written.split()]
    return [number for run in runs for number in range(run[0], run[-1] + 1)]


def test_trace_reads_stdin(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    piped = show(capsys, model, "--trace", "-", "--json")
    assert piped == show(capsys, model, "--trace", "Hello", "--json")


def test_errors_are_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in ((str(tmp_path / "none"),), (str(model), "--trace", "")):
        assert cli.main(["inspect", *args]) == 1
        shown = capsys.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1)
        assert shown.err.startswith("pelagos: ")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", str(model), "--trace", "x", "--mode", "odd"])
    assert "--mode: invalid choice: 'odd'" in capsys.readouterr().err
