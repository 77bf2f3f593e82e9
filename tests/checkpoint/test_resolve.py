"""A bundled name, a directory, or a hub id already in the local cache; anything else says what was tried."""

import json
from pathlib import Path

import pytest

from pelagos.checkpoint import read, resolve_model
from pelagos.config import tiny
from pelagos.errors import CheckpointError


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(read, "bundled_model_dir", lambda name: tmp_path / "models" / name)
    monkeypatch.chdir(tmp_path)
    add(tmp_path / "models" / "nano")
    return tmp_path


def add(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(tiny().to_dict()))
    return path


def test_bundled_name_comes_before_a_directory(places: Path) -> None:
    add(places / "nano")
    assert resolve_model("nano") == places / "models" / "nano"
    assert resolve_model("./nano").resolve() == places / "nano"


def test_directories(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = add(places / "org" / "name")
    assert resolve_model(here) == here
    assert resolve_model(str(here)) == here
    assert resolve_model("org/name").resolve() == here
    monkeypatch.setenv("HOME", str(places))
    assert resolve_model("~/org/name") == here


def test_hub_id(places: Path) -> None:
    repository = places / "hub" / "models--deepseek-ai--DeepSeek-V4-Flash"
    snapshot = add(repository / "snapshots" / "60d8d70")
    with pytest.raises(CheckpointError, match="no refs/main"):
        resolve_model("deepseek-ai/DeepSeek-V4-Flash")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("60d8d70\n")
    assert resolve_model("deepseek-ai/DeepSeek-V4-Flash") == snapshot
    for revision in ("gone", "../60d8d70", ""):
        (repository / "refs" / "main").write_text(revision)
        with pytest.raises(CheckpointError, match="has no snapshot"):
            resolve_model("deepseek-ai/DeepSeek-V4-Flash")


def test_nothing_found_lists_what_was_tried(places: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_model("nanno")
    said = str(caught.value)
    assert str(places / "models" / "nanno") in said
    assert "directory nanno" in said
    assert said.endswith("Bundled models: nano")
    with pytest.raises(CheckpointError, match=r"models--a--b \(not downloaded\)"):
        resolve_model("a/b")
    (places / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty \(has no config.json\)"):
        resolve_model(places / "empty")
    (places / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(places / "file")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/../b", "x\0y", "a" * 5000, "~nobody-here/x"])
def test_odd_names_are_errors_not_crashes(name: str) -> None:
    with pytest.raises(CheckpointError, match="not found"):
        resolve_model(name)
