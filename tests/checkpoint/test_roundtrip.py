"""What is written is what is read, in every format, by us and by the safetensors library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import pelagos
from pelagos.checkpoint import open_checkpoint, write_checkpoint
from pelagos.config import ModelConfig, tiny
from pelagos.errors import CheckpointError
from pelagos.numerics import FP8_BLOCK, fake_quant_fp4, fake_quant_fp8

GOLDEN = Path(__file__).parents[1] / "golden" / "released"
Named = tuple[str, Tensor, str]


def expected(values: Tensor, format: str) -> Tensor:
    """Return what a reader gets back for values written in a format."""
    if format in ("fp8", "fp4"):
        return fake_quant_fp8(values.float(), FP8_BLOCK) if format == "fp8" else fake_quant_fp4(values.float())
    return values.to({"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "i64": torch.int64}[format])


def save_plain(path: Path, files: dict[str, dict[str, Tensor]], config: ModelConfig | None = None) -> None:
    """Write files with the safetensors library and a config.json, without an index."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps((config or tiny()).to_dict()))
    for name, content in files.items():
        save_file(content, path / name)


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 2**30])
def test_every_format_comes_back(tmp_path: Path, tensors: list[Named], shard_bytes: int) -> None:
    write_checkpoint(tmp_path / "model", iter(tensors), tiny(), shard_bytes=shard_bytes)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.config.compress_ratios == tiny().compress_ratios
    assert {name: info.format for name, info in checkpoint.tensors.items()} == {n: f for n, _, f in tensors}
    got = {name: (values, format) for name, values, format in checkpoint.stream()}
    assert got.keys() == {name for name, _, _ in tensors}
    for name, values, format in tensors:
        assert got[name][1] == format
        torch.testing.assert_close(got[name][0], expected(values, format), rtol=0, atol=0)
        assert checkpoint.tensors[name].shape == tuple(values.shape)


@pytest.mark.parametrize("shard_bytes", [20_000, 2**30])
def test_index_sizes_and_alignment(tmp_path: Path, tensors: list[Named], shard_bytes: int) -> None:
    write_checkpoint(tmp_path / "model", tensors, tiny(), shard_bytes=shard_bytes)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    checkpoint = open_checkpoint(tmp_path / "model")
    assert index["metadata"]["total_size"] == sum(info.num_bytes for info in checkpoint.tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    largest_tensor = max(info.num_bytes for info in checkpoint.tensors.values())
    for file in files:
        size = (tmp_path / "model" / file).stat().st_size
        assert size <= shard_bytes or size <= largest_tensor + 512
    widths = {"F32": 4, "BF16": 2, "I64": 8}
    for info in checkpoint.tensors.values():
        assert info.stored.begin % widths.get(info.stored.dtype, 1) == 0


def test_safetensors_library_reads_what_we_write(tmp_path: Path, tensors: list[Named]) -> None:
    write_checkpoint(tmp_path / "model", tensors, tiny())
    with safe_open(tmp_path / "model" / "model-00001-of-00001.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        assert torch.equal(file.get_tensor("embed.weight"), tensors[0][1])
        assert file.get_slice("layers.0.attn.wq_b.scale").get_shape() == [2, 2]
        assert file.get_slice("layers.0.ffn.experts.0.w1.weight").get_shape() == [32, 32]
        assert file.get_slice("layers.0.ffn.experts.0.w1.scale").get_shape() == [32, 2]
    assert {dtypes[k] for k in dtypes if k.endswith(".scale")} == {"F8_E8M0"}
    assert dtypes["layers.0.attn.wq_a.weight"] == "F8_E4M3"
    assert dtypes["layers.0.ffn.experts.0.w1.weight"] == "I8"
    assert dtypes["layers.0.ffn.gate.tid2eid"] == "I64"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_in_any_format(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("any")
    given_tensors: list[Named] = []
    for i in range(data.draw(st.integers(1, 5))):
        format = data.draw(st.sampled_from(["fp8", "fp4", "bf16", "f16", "f32", "i64"]))
        if format in ("fp8", "fp4"):
            shape = (data.draw(st.integers(1, 140)), 32 * data.draw(st.integers(1, 9)))
        else:
            shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
        seed = data.draw(st.integers(0, 2**20))
        magnitude = 2.0 ** data.draw(st.integers(-8, 8))
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * magnitude
        given_tensors.append((f"layers.{i}.weight", values.long() if format == "i64" else values, format))
    write_checkpoint(path / "m", given_tensors, tiny(), shard_bytes=data.draw(st.integers(1, 10**6)))
    got = {name: values for name, values, _ in open_checkpoint(path / "m").stream()}
    for name, values, format in given_tensors:
        torch.testing.assert_close(got[name], expected(values, format), rtol=0, atol=0)


def test_writing_what_was_read_changes_nothing(tmp_path: Path, tensors: list[Named]) -> None:
    write_checkpoint(tmp_path / "a", tensors, tiny())
    write_checkpoint(tmp_path / "b", open_checkpoint(tmp_path / "a").stream(), tiny())
    first, second = (
        {name: values for name, values, _ in open_checkpoint(tmp_path / side).stream()} for side in ("a", "b")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_formats_come_from_dtypes(tmp_path: Path) -> None:
    codes = torch.randn(130, 64).to(torch.float8_e4m3fn)
    content = {
        "layers.0.ffn.experts.0.w1.weight": codes,
        "layers.0.ffn.experts.0.w1.scale": torch.tensor([[0.3], [5.0]]),  # a Base build: float32, no power of two
        "layers.0.ffn.experts.0.w2.weight": torch.randn(4, 4).half(),
        "layers.0.ffn.gate.tid2eid": torch.tensor([[7, 1]], dtype=torch.int32),
        "layers.0.hc_attn_scale": torch.ones(3),
        "layers.0.lonely.scale": torch.ones(3),
    }
    save_plain(tmp_path, {"model.safetensors": content})
    checkpoint = open_checkpoint(tmp_path)
    got = {name: (values, format) for name, values, format in checkpoint.stream()}
    assert checkpoint.draft is None
    assert {name: format for name, (_, format) in got.items()} == {
        "layers.0.ffn.experts.0.w1.weight": "fp8",
        "layers.0.ffn.experts.0.w2.weight": "f16",
        "layers.0.ffn.gate.tid2eid": "i64",
        "layers.0.hc_attn_scale": "f32",
        "layers.0.lonely.scale": "f32",
    }
    rows = torch.cat((torch.full((128, 1), 0.3), torch.full((2, 1), 5.0)))
    assert torch.equal(got["layers.0.ffn.experts.0.w1.weight"][0], codes.float() * rows)
    assert got["layers.0.ffn.gate.tid2eid"][0].dtype == torch.int64


def test_a_scale_may_lie_in_another_file(tmp_path: Path, tensors: list[Named]) -> None:
    write_checkpoint(tmp_path / "a", [tensors[4]], tiny())
    with safe_open(tmp_path / "a" / "model-00001-of-00001.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    files = {f"model-0000{i}-of-00002.safetensors": dict([item]) for i, item in enumerate(stored.items(), 1)}
    save_plain(tmp_path / "b", files)
    (name, values, format), *rest = open_checkpoint(tmp_path / "b").stream()
    assert (name, format, rest) == (tensors[4][0], "fp8", [])
    assert torch.equal(values, fake_quant_fp8(tensors[4][1], FP8_BLOCK))


@pytest.mark.parametrize(("projection", "kind"), [("e_proj", "mtp"), ("main_proj", "dspark")])
def test_draft_kind_by_names(tmp_path: Path, projection: str, kind: str) -> None:
    save_plain(tmp_path, {"model.safetensors": {f"mtp.0.{projection}.weight": torch.ones(2, 2)}})
    assert open_checkpoint(tmp_path).draft == kind


def test_stream_of_named_tensors(tmp_path: Path, tensors: list[Named]) -> None:
    write_checkpoint(tmp_path, tensors, tiny(), shard_bytes=1)
    checkpoint = open_checkpoint(tmp_path)
    assert [name for name, _, _ in checkpoint.stream(["norm.weight"])] == ["norm.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor 'nope'"):
        next(checkpoint.stream(["nope"]))


def test_config_json_says_how_it_is_stored(tmp_path: Path, tensors: list[Named]) -> None:
    def written(chosen: list[Named]) -> dict[str, object]:
        write_checkpoint(tmp_path / "m", chosen, tiny())
        return json.loads((tmp_path / "m" / "config.json").read_text())

    quantised = written(tensors[:-1])
    assert quantised["expert_dtype"] == "fp4"
    assert quantised["quantization_config"]["weight_block_size"] == [128, 128]  # pyright: ignore
    assert quantised["torch_dtype"] == "bfloat16"
    assert written([tensors[-1]])["expert_dtype"] == "fp8"
    plain = written([tensors[3]])
    assert plain["torch_dtype"] == "float32"
    assert "quantization_config" not in plain


def test_reading_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    mebibytes, count = 16, 8
    values = torch.ones(mebibytes * 2**18)
    named = ((f"layers.{i}.x", values, "f32") for i in range(count))
    write_checkpoint(tmp_path, named, tiny(), shard_bytes=2 * values.nbytes + 1000)
    script = (
        "import resource, sys, torch\n"
        "from pelagos.checkpoint import open_checkpoint\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "checkpoint = open_checkpoint(sys.argv[1]); before = peak(); total = 0.0\n"
        "for _, values, _ in checkpoint.stream(): total += float(values[0])\n"
        "print(total, peak() - before)"
    )
    source = os.environ | {"PYTHONPATH": str(Path(pelagos.__file__).parents[1])}
    command = [sys.executable, "-c", script, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=source)
    total, growth = map(float, out.stdout.split())
    assert total == count
    # One tensor, its NaN mask (a byte a value) and one more tensor while the loop variable still holds the last.
    assert growth < 3 * values.nbytes < count * values.nbytes


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is missing")
def test_golden_checkpoint() -> None:
    checkpoint = open_checkpoint(GOLDEN)
    index = json.loads((GOLDEN / "model.safetensors.index.json").read_text())
    assert sum(info.num_bytes for info in checkpoint.tensors.values()) == index["metadata"]["total_size"] == 7550630
    assert checkpoint.draft == "mtp"
    counts = dict.fromkeys(("fp8", "fp4", "bf16", "f32", "i64"), 0)
    for name, values, format in checkpoint.stream():
        counts[format] += 1
        assert tuple(values.shape) == checkpoint.tensors[name].shape
        assert values.dtype in (torch.float32, torch.bfloat16, torch.int64)
    assert counts == {"fp8": 52, "fp4": 144, "bf16": 56, "f32": 58, "i64": 2}
    assert checkpoint.tensors["layers.1.ffn.experts.7.w2.weight"].shape == (128, 128)
    assert checkpoint.tensors["layers.2.attn.compressor.ape"].shape == (128, 512)
