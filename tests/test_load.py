"""Model to checkpoint to model: same values, one clear error for anything else, a notice for a draft left out."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pelagos.checkpoint import open_checkpoint, write_checkpoint
from pelagos.config import tiny
from pelagos.errors import CheckpointError, ConfigError
from pelagos.load import load_model, save_model
from pelagos.model import Transformer
from pelagos.numerics import FP8_BLOCK, fake_quant_fp4, fake_quant_fp8

IDS = torch.arange(40).unsqueeze(0) * 3 % 128
SHARD = "model-00001-of-00001.safetensors"


def random_model(**changes: object) -> Transformer:
    config = dataclasses.replace(tiny(), **changes)  # pyright: ignore[reportArgumentType]
    model = Transformer(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, tensor, format in model.released_tensors():
            if format == "i64":
                tensor.copy_(torch.randint(config.n_routed_experts, tensor.shape, generator=generator))
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / max(tensor.shape[-1], 4) ** 0.5)
    return model.eval()


def named(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor, _ in model.released_tensors()}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model()


@pytest.fixture
def saved(tmp_path: Path, model: Transformer) -> Path:
    save_model(model, tmp_path / "m", exact=True)
    return tmp_path / "m"


@torch.no_grad()
def test_exact_round_trip(saved: Path, model: Transformer) -> None:
    loaded = load_model(saved)
    assert not loaded.training
    assert loaded.config.num_nextn_predict_layers == 1
    assert loaded.config.compress_ratios == model.config.compress_ratios
    wanted = named(model)
    assert [name for name, _, _ in loaded.released_tensors()] == list(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in named(loaded).items())
    assert torch.equal(loaded(IDS), model(IDS))


@torch.no_grad()
def test_released_round_trip_is_the_fake_quantised_model(tmp_path: Path, model: Transformer) -> None:
    save_model(model, tmp_path / "m", shard_bytes=100_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 5
    loaded = named(load_model(tmp_path / "m", mode="released"))
    quantise: dict[str, Callable[[Tensor], Tensor]] = {
        "fp8": lambda t: fake_quant_fp8(t, FP8_BLOCK),
        "fp4": fake_quant_fp4,
        "bf16": lambda t: t.bfloat16().float(),
        "f32": lambda t: t,
        "i64": lambda t: t,
    }
    formats: set[str] = set()
    for name, tensor, format in model.released_tensors():
        formats.add(format)
        assert torch.equal(loaded[name], quantise[format](tensor.detach())), name
    assert formats == quantise.keys()
    first = load_model(tmp_path / "m", mode="released")
    save_model(first, tmp_path / "again")
    second = load_model(tmp_path / "again", mode="released")
    assert torch.equal(first(IDS), second(IDS))


@torch.no_grad()
def test_stored_format_decides_about_activations(tmp_path: Path, model: Transformer) -> None:
    """Released mode simulates FP8 activations before FP8 and FP4 weights only, whatever config.json promises."""
    save_model(model, tmp_path / "q")
    quantised = load_model(tmp_path / "q", mode="released")
    save_model(quantised, tmp_path / "x", exact=True)
    exact = load_model(tmp_path / "x", mode="released")
    assert all(torch.equal(tensor, named(exact)[name]) for name, tensor in named(quantised).items())
    assert not torch.equal(quantised(IDS), exact(IDS))


@torch.no_grad()
def test_dtype_and_mode(saved: Path, model: Transformer) -> None:
    half = load_model(saved, dtype=torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in named(half).values() if t.is_floating_point())
    assert torch.equal(half.layers[0].ffn.gate.tid2eid, model.layers[0].ffn.gate.tid2eid)  # pyright: ignore
    with pytest.raises(ConfigError, match=r"dtype=torch.int8: expected float32"):
        load_model(saved, dtype=torch.int8)
    with pytest.raises(ConfigError, match="mode='fast'"):
        load_model(saved, mode="fast")
    with pytest.raises(ConfigError, match="device 'cpu:x' is not usable here"):
        load_model(saved, device="cpu:x")


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a one-file checkpoint with the safetensors library, without an index."""
    content = load_file(path / SHARD)
    change(content)
    (path / "model.safetensors.index.json").unlink()
    (path / SHARD).unlink()
    save_file(content, path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("norm.weight"), r"expected the \d+ tensors of config.json; 1 missing: norm.weight \[64\]$"),
        (lambda t: t.update({"x": torch.ones(2)}), r"; 1 extra: x \[2\] in model.safetensors$"),
        (
            lambda t: [t.pop(n) for n in list(t) if ".experts.0." in n] and t.update({"x": torch.ones(1)}),
            r"21 missing: layers.0.ffn.experts.0.w1.weight \[32, 64\], .* and 16 more; 1 extra: x",
        ),
        (
            lambda t: t.update({"embed.weight": torch.ones(127, 64)}),
            r"tensor 'embed.weight' in .*model.safetensors: f32 values of shape \[127, 64\], expected \[128, 64\]",
        ),
        (
            lambda t: t.update({"layers.0.ffn.gate.tid2eid": torch.ones(128, 2)}),
            "tensor 'layers.0.ffn.gate.tid2eid' in .*: dtype F32, expected I64 or I32",
        ),
        (
            lambda t: t.update({"norm.weight": torch.ones(64, dtype=torch.int64)}),
            "tensor 'norm.weight' in .*: dtype I64, expected a float format",
        ),
    ],
)
def test_wrong_tensors_are_named(saved: Path, change: Callable[[dict[str, Tensor]], object], said: str) -> None:
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=said):
        load_model(saved)


def test_config_of_another_model(saved: Path) -> None:
    raw = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(raw | {"hidden_size": 32}))
    with pytest.raises(CheckpointError, match=r"'hc_head_fn' in .* \[4, 256\], expected \[4, 128\] by config.json"):
        load_model(saved)
    (saved / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config.json: missing key"):
        load_model(saved)


def test_int32_hash_tables(saved: Path, model: Transformer) -> None:
    rewrite(saved, lambda t: t.update({n: t[n].int() for n in t if n.endswith("tid2eid")}))
    wanted, loaded = named(model), named(load_model(saved))
    for name in ("layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.tid2eid"):
        assert loaded[name].dtype == torch.int64
        assert torch.equal(loaded[name], wanted[name])


def dspark_checkpoint(path: Path, model: Transformer) -> None:
    """Write a GA-like build: the backbone, three draft stages, two more ratio slots, the DSpark keys."""
    tensors = [item for item in model.released_tensors() if not item[0].startswith("mtp.")]
    tensors += [(f"mtp.{i}.norm.weight", torch.ones(64), "bf16") for i in range(3)]
    tensors.append(("mtp.0.main_proj.weight", torch.ones(64, 192), "fp8"))
    config = dataclasses.replace(
        model.config, compress_ratios=(*model.config.compress_ratios, 0, 0), extra={"dspark_block_size": 5}
    )
    write_checkpoint(path, tensors, config)


@torch.no_grad()
def test_ga_build_loads_its_backbone(tmp_path: Path, model: Transformer, caplog: pytest.LogCaptureFixture) -> None:
    dspark_checkpoint(tmp_path / "m", model)
    assert open_checkpoint(tmp_path / "m").draft == "dspark"
    loaded = load_model(tmp_path / "m")
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'm'}: backbone loaded, DSpark draft left out (3 stages mtp.*, 4 tensors, 12674 bytes)"
    ]
    assert loaded.config.num_nextn_predict_layers == 0
    assert loaded.config.generation == "0731"
    save_model(model, tmp_path / "preview")
    with_draft = load_model(tmp_path / "preview")
    assert len(caplog.records) == 1
    assert torch.equal(loaded(IDS), with_draft(IDS))


def test_the_notice_reaches_stderr(
    tmp_path: Path, model: Transformer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dspark_checkpoint(tmp_path / "m", model)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a program that has not set up logging
    load_model(tmp_path / "m")
    out, err = capsys.readouterr()
    assert "DSpark draft left out" in err
    assert out == ""


def test_a_checkpoint_without_the_announced_draft(
    tmp_path: Path, model: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = [item for item in model.released_tensors() if not item[0].startswith("mtp.")]
    write_checkpoint(tmp_path / "m", backbone, model.config)
    assert load_model(tmp_path / "m").config.num_nextn_predict_layers == 0
    assert "announces an MTP draft, the files hold none" in caplog.text


@torch.no_grad()
def test_fp8_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The Base builds store experts in FP8; expert_dtype follows the file."""
    model = random_model(expert_dtype="fp8", num_nextn_predict_layers=0)
    save_model(model, tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.tensors["layers.0.ffn.experts.0.w1.weight"].format == "fp8"
    assert checkpoint.config.expert_dtype == "fp8"
    loaded = named(load_model(tmp_path / "m"))
    weight = named(model)["layers.0.ffn.experts.0.w1.weight"]
    assert torch.equal(loaded["layers.0.ffn.experts.0.w1.weight"], fake_quant_fp8(weight, FP8_BLOCK))
    assert not caplog.records
