"""Damage is one clear error that names the tensor or the file; a failed write leaves the old checkpoint whole."""

import errno
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import pelagos
from pelagos.checkpoint import open_checkpoint, write_checkpoint
from pelagos.checkpoint.shard import read_header
from pelagos.config import tiny
from pelagos.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
Named = tuple[str, Tensor, str]


@pytest.fixture
def good(tmp_path: Path, tensors: list[Named]) -> Path:
    write_checkpoint(tmp_path / "good", tensors, tiny())
    return tmp_path / "good"


def read_all(path: Path) -> dict[str, Tensor]:
    return {name: values for name, values, _ in open_checkpoint(path).stream()}


def edit_index(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    raw = json.loads((path / INDEX).read_text())
    change(raw["weight_map"])
    (path / INDEX).write_text(json.dumps(raw))


def save_plain(path: Path, content: dict[str, Tensor]) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny().to_dict()))
    save_file(content, path / "model.safetensors")


def test_truncation_at_any_byte(good: Path) -> None:
    whole = (good / SHARD).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = {*range(12), header - 1, header, header + 1, len(whole) - 1} | set(
        random.Random(3).sample(range(len(whole)), 60)
    )
    for cut in sorted(cuts):
        (good / SHARD).write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=SHARD) as caught:
            open_checkpoint(good)
        if cut >= header:
            assert f"the file has {cut} bytes" in str(caught.value)
            assert "tensor '" in str(caught.value)
    (good / SHARD).write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=f"the file has {len(whole) + 1} bytes"):
        open_checkpoint(good)


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A checkpoint and the bytes of its shard, which a test may overwrite."""
    path = tmp_path_factory.mktemp("flip")
    write_checkpoint(path / "m", [("a.weight", torch.ones(32, 32), "fp8"), ("b", torch.ones(3), "f32")], tiny())
    return path, (path / "m" / SHARD).read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_changed_header_is_never_a_crash(flipped: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = flipped
    raw, file = bytearray(whole), path / "m" / SHARD
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(raw))
    try:
        said = f"{path} holds {sorted(read_all(path / 'm'))}"
    except CheckpointError as error:
        said = str(error)
    assert said == f"{path} holds ['a.weight', 'b']" or (str(path) in said and "holds" not in said)


@settings(max_examples=200, deadline=None)
@given(
    content=st.binary(max_size=200)
    | st.text(max_size=80).map(lambda t: len(t.encode()).to_bytes(8, "little") + t.encode())
)
def test_bytes_that_are_no_safetensors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("noise") / "x.safetensors"
    file.write_bytes(content)
    try:
        said = f"{file} holds {read_header(file)}"
    except CheckpointError as error:
        said = str(error)
    assert str(file) in said
    assert "holds" not in said or said.endswith("holds []")


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ('{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}', "dtype F64, expected one of F32"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', r"4 bytes, expected 8 for F32 \[2\]"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "header entry"),
        ('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "header entry"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "begins at byte"),
        (f'{{"a":{ENTRY},"b":{ENTRY}}}', "begins at"),
        (f'{{"a":{ENTRY},"a":{ENTRY}}}', "twice"),
        ("[]", "expected an object"),
        ("[" * 9000, "not valid JSON"),
    ],
)  # fmt: skip
def test_header_entries(tmp_path: Path, entry: str, said: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(entry).to_bytes(8, "little") + entry.encode() + b"\0" * 8)
    with pytest.raises(CheckpointError, match=said):
        read_header(file)


def test_git_lfs_pointer(good: Path) -> None:
    (good / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(good)


def test_missing_shard(tmp_path: Path, tensors: list[Named]) -> None:
    write_checkpoint(tmp_path / "m", tensors, tiny(), shard_bytes=1)
    gone = tmp_path / "m" / "model-00003-of-00010.safetensors"
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"{gone.name}: missing; .* puts 1 tensors there \('hc_head_scale'"):
        open_checkpoint(tmp_path / "m")
    (tmp_path / "m" / INDEX).unlink()
    with pytest.raises(CheckpointError, match=rf"{gone.name}: missing; .* says there are 10 files"):
        open_checkpoint(tmp_path / "m")


def test_index_and_files_disagree(good: Path) -> None:
    edit_index(good, lambda m: m.update({"layers.7.x": SHARD}))
    with pytest.raises(CheckpointError, match=rf"tensor 'layers.7.x': .*{SHARD}.* no such tensor \(1 absent"):
        open_checkpoint(good)
    edit_index(good, lambda m: (m.pop("layers.7.x"), m.pop("norm.weight"))[:0])
    with pytest.raises(CheckpointError, match=r"tensor 'norm.weight' in .*index.json says no file at all"):
        open_checkpoint(good)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "x.bin", 3])
def test_index_points_outside(good: Path, shard: object) -> None:
    edit_index(good, lambda m: m.update({"norm.weight": shard}))  # pyright: ignore
    with pytest.raises(CheckpointError, match=r"'norm.weight' is in .* expected a .safetensors file beside it"):
        open_checkpoint(good)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', "\udcff", "[" * 9000])
def test_broken_index(good: Path, text: str) -> None:
    (good / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(good)


def test_no_weights_and_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()))
    with pytest.raises(CheckpointError, match=r"no \*.safetensors and no model.safetensors.index.json"):
        open_checkpoint(tmp_path)


F8 = torch.ones(4, 32).to(torch.float8_e4m3fn)
I8 = torch.ones(4, 16, dtype=torch.int8)
E8 = torch.ones(4, 1).to(torch.float8_e8m0fnu)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a.weight": F8}, r"tensor 'a.weight' in .*model.safetensors: F8_E4M3 needs its scale 'a.scale'"),
        ({"a": F8}, "needs its scale"),
        ({"a.weight": F8, "a.scale": E8}, r"'a.scale' .*: F8_E8M0 \[4, 1\], expected F8_E8M0 or F32 \[1, 1\]"),
        ({"a.weight": F8, "a.scale": torch.ones(1, 1).half()}, r"F16 \[1, 1\], expected F8_E8M0 or F32"),
        ({"a.weight": I8, "a.scale": torch.ones(4, 2)}, r"F32 \[4, 2\], expected .* \[4, 1\] for I8 \[4, 16\]"),
        ({"a.weight": I8[:, :5].clone(), "a.scale": E8}, "multiple of 16 bytes a row"),
        ({"a.weight": I8[0].clone(), "a.scale": E8}, "expected a matrix"),
        ({"a.scale": E8}, "no FP8 or FP4 weight beside it"),
        ({"norm.weight": torch.ones(2), "model.norm.weight": torch.ones(2)}, "expected it once"),
        ({"mtp.0.norm.weight": torch.ones(2)}, "with 0 of mtp.0.e_proj.weight, mtp.0.main_proj.weight"),
        ({"model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 3, 4)}, r"expected \[experts, rows, columns\]"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, content: dict[str, Tensor], said: str) -> None:
    save_plain(tmp_path / "m", content)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": torch.tensor([1.0, float("nan")])}, "tensor 'a' in .*: 1 of 2 values are NaN"),
        (
            {
                "a.weight": torch.full((4, 4), 127, dtype=torch.uint8).view(torch.float8_e4m3fn),
                "a.scale": torch.ones(1, 1),
            },
            "16 of 16 values are NaN",
        ),
        (
            {"a.weight": I8, "a.scale": torch.full((4, 1), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)},
            "128 of 128 values are NaN",
        ),
        ({"layers.0.ffn.gate.tid2eid": torch.tensor([[0, 8]])}, r"expert ids 0..8, expected 0..7 \(n_routed_experts\)"),
        ({"layers.0.ffn.gate.tid2eid": torch.tensor([[-1]], dtype=torch.int32)}, "expert ids -1..-1"),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, content: dict[str, Tensor], said: str) -> None:
    save_plain(tmp_path / "m", content)
    checkpoint = open_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match=said):
        list(checkpoint.stream())


def test_a_file_that_changes_while_open(good: Path) -> None:
    checkpoint = open_checkpoint(good)
    (good / SHARD).write_bytes((good / SHARD).read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="changed while open"):
        list(checkpoint.stream())
    (good / SHARD).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(checkpoint.stream())


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ([("a", torch.ones(1), "f64")], "format 'f64', expected one of fp8"),
        ([("a", torch.ones(1), "f32")] * 2, "given twice"),
        ([("a", torch.tensor([float("inf")]), "f32")], "NaN or infinite"),
        ([("a", torch.tensor([1e5]), "f16")], "100000 is too large for f16"),
        ([("a", torch.ones(1), "i64")], "cannot hold"),
        ([("a", torch.ones(1, dtype=torch.int64), "f32")], "cannot hold"),
        ([("a.weight", torch.ones(4), "fp8")], "fp8 is for matrices"),
        ([("a", torch.ones(4, 4), "fp8")], "fp8 is for matrices"),
        ([("a.weight", torch.ones(4, 20), "fp4")], r"'a.weight' \[4, 20\]: FP4 needs a multiple of 32"),
        ([], "no tensors given"),
    ],
)
def test_refused_writes_leave_the_old_one(good: Path, named: list[Named], said: str) -> None:
    before = read_all(good)
    with pytest.raises(CheckpointError, match=said):
        write_checkpoint(good, named, tiny())
    assert_same(read_all(good), before)
    assert [p.name for p in good.parent.iterdir()] == ["good"]


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_other_files_stay_when_a_checkpoint_is_replaced(good: Path) -> None:
    (good / "tokenizer.json").write_text("{}")
    (good / "golden.safetensors").write_text("kept")
    (good / "encoding").mkdir()
    (good / "encoding" / "x.py").write_text("pass")
    write_checkpoint(good, [("a", torch.ones(1), "f32")], tiny())
    names = {str(p.relative_to(good)) for p in good.rglob("*")}
    assert names == {
        "config.json", INDEX, SHARD, "tokenizer.json", "golden.safetensors", "encoding", "encoding/x.py",
    }  # fmt: skip
    assert_same(read_all(good), {"a": torch.ones(1)})


def test_targets_that_cannot_be_replaced(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        write_checkpoint(tmp_path / "file", [("a", torch.ones(1), "f32")], tiny())
    with pytest.raises(CheckpointError, match="not written, nothing was replaced"):
        write_checkpoint(tmp_path / "file" / "below", [("a", torch.ones(1), "f32")], tiny())
    with pytest.raises(CheckpointError, match="shard_bytes=0"):
        write_checkpoint(tmp_path / "new", [("a", torch.ones(1), "f32")], tiny(), shard_bytes=0)
    monkeypatch.chdir(good)
    with pytest.raises(CheckpointError, match="holds the working directory"):
        write_checkpoint(".", [("a", torch.ones(1), "f32")], tiny())


class Crash(BaseException):
    """Stands for the process being gone."""


def break_at(step: int, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """Let the step-th of the calls that touch the disk raise; a crash also takes the clean-up away."""
    calls = iter(range(10**6))

    def guard(function: Callable[..., object]) -> Callable[..., object]:
        def guarded(*args: object, **kwargs: object) -> object:
            if next(calls) == step:
                raise error
            return function(*args, **kwargs)

        return guarded

    for owner, name in ((os, "fsync"), (os, "link"), (Path, "rename"), (Path, "mkdir"), (shutil, "copytree")):
        patch.setattr(owner, name, guard(getattr(owner, name)))
    if isinstance(error, Crash):
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)


@pytest.mark.parametrize("error", [Crash(), OSError(errno.ENOSPC, "No space left on device")], ids=["crash", "full"])
def test_a_write_that_dies_anywhere_is_all_or_nothing(good: Path, error: BaseException) -> None:
    (good / "tokenizer.json").write_text("{}")
    old, new = read_all(good), {"a": torch.ones(1), "b": torch.zeros(5)}
    step, is_new = 0, False
    while not is_new:
        said = ""
        with pytest.MonkeyPatch.context() as patch:
            break_at(step, error, patch)
            try:
                write_checkpoint(good, [(n, t, "f32") for n, t in new.items()], tiny(), shard_bytes=1)
            except (Crash, CheckpointError) as caught:
                said = str(caught)
        got = read_all(good)
        assert (good / "tokenizer.json").read_text() == "{}"
        is_new = got.keys() == new.keys()
        assert_same(got, new if is_new else old)
        assert is_new or isinstance(error, Crash) or "No space left" in said
        step += 1
    assert step > 5
    if not isinstance(error, Crash):
        assert [p.name for p in good.parent.iterdir()] == ["good"]


def test_without_an_atomic_exchange(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "other")
    write_checkpoint(good, [("a", torch.ones(1), "f32")], tiny())
    assert_same(read_all(good), {"a": torch.ones(1)})
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp" and Path(target) == good:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_checkpoint(good, [("b", torch.ones(1), "f32")], tiny())
    assert_same(read_all(good), {"a": torch.ones(1)})
    assert [p.name for p in good.parent.iterdir()] == ["good"]


# Forks a writer for each line it is given, which tells its number when it has written once, and waits for its end.
WRITER = """
import os, sys, torch
from pelagos.checkpoint import write_checkpoint
from pelagos.config import tiny
for _ in sys.stdin:
    if os.fork():
        os.wait()
        continue
    for i in range(10**6):
        tensors = [(f"t{k}", torch.full((5000,), float(i)), "f32") for k in range(8)]
        write_checkpoint(sys.argv[1], tensors, tiny(), shard_bytes=1)
        if i == 0: print(os.getpid(), flush=True)
"""


def test_killed_for_real(tmp_path: Path) -> None:
    moments = random.Random(5)
    target = tmp_path / "m"
    source = os.environ | {"PYTHONPATH": str(Path(pelagos.__file__).parents[1])}
    words, pipe = [sys.executable, "-c", WRITER, str(target)], subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=source) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for _ in range(2):
            print(file=child.stdin, flush=True)
            writer = int(child.stdout.readline())
            for _ in range(40):  # a reader beside the writer sees whole files or a clear error
                check_one_version(target, allow_change=True)
                time.sleep(moments.random() * 0.01)
            ended = os.pidfd_open(writer)
            os.kill(writer, signal.SIGKILL)
            assert select.select([ended], [], [], 60)[0]
            os.close(ended)
            check_one_version(target, allow_change=False)


def check_one_version(target: Path, *, allow_change: bool) -> None:
    try:
        got = read_all(target)
    except CheckpointError:
        assert allow_change
        return
    assert len(got) == 8
    if not allow_change:
        assert len({float(t.unique()) for t in got.values()}) == 1


def failing(named: list[Named]) -> Iterator[Named]:
    yield from named
    raise KeyboardInterrupt


def test_an_interrupted_source_leaves_the_old_one(good: Path, tensors: list[Named]) -> None:
    before = read_all(good)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(good, failing(tensors[:3]), tiny(), shard_bytes=1)
    assert_same(read_all(good), before)
    assert [p.name for p in good.parent.iterdir()] == ["good"]
