"""The doctor starts what it speaks of, and the commands on a log tell the truth by their exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pelagos.cli.sandbox import main
from pelagos.sandbox import doctor


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ROUNDS", 1)


@pytest.mark.usefixtures("quick")
def test_doctor_really_starts_each_substrate(capsys: pytest.CaptureFixture[str], store: Any) -> None:
    names = {"container", "function"}  # the tests of virtual machines start those
    assert main(["doctor", "--json", *names]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["substrates"]) == names
    for found in report["substrates"].values():
        assert found["works"] is True
        assert 0 < found["exec_ms"] < found["create_ms"] + 2000
        assert found["network"] == "none"
    assert "bwrap" not in report["missing"]
    assert all(name in doctor.table(report) for name in names)


@pytest.mark.usefixtures("quick")
def test_doctor_names_the_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is on the path: keepers are started by absolute names, so they come up and find no bubblewrap."""
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    assert main(["doctor", "nothing"]) == 1
    out = capsys.readouterr().out
    assert "missing: bwrap; install bubblewrap" in out
    assert "FAILS: substrate 'nothing'" in out


def test_log_commands(make: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    box = make()
    box.files.write("a.txt", "hello")
    box.exec("cat a.txt")
    directory = str(box.directory)
    assert main(["verify", directory]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"records": 5, "head": box.info()["head"]}
    assert main(["verify", directory, "--head", "0" * 63 + "1"]) == 1
    assert "cut or replaced" in capsys.readouterr().err
    assert main(["provenance", directory, "--path", "a.txt"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["op"] for line in lines] == ["write", "exec"]
    assert main(["provenance", directory, "--blob", lines[0]["blobs"]["args.0"]]) == 0
    assert [json.loads(line)["op"] for line in capsys.readouterr().out.splitlines()] == ["write", "exec"]
    assert main(["export", directory, str(tmp_path / "out.tar")]) == 0
    assert told["head"] in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["export", directory, str(tmp_path / "no" / "out.tar")]) == 1
    with pytest.raises(SystemExit, match="2"):
        main([])
