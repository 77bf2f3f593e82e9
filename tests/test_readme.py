"""The README's commands, code, links and figures are true.

Its Python and its `pelagos` and `curl` lines run for real on the bundled model. Its `make` lines run the real Makefile
over stand-ins for Python, pip and the installed programs, which record how they are called: nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import kernel_goals, readme

ROOT = Path(__file__).resolve().parents[1]
TEXT = readme.README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S)
LINES = [line.split(" # ")[0].strip() for block in BLOCKS for line in block.splitlines()]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "error"}
PELAGOS = ".venv/bin/pelagos "
NANO = readme.ROOT / "models" / "nano"
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")

# Every program of the stand-in environment is this script: it records its arguments and makes what the real one would.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
case "$*" in
*"-m venv"*)
    mkdir -p .venv/bin
    for name in python pelagos ruff pyright; do cp "$0" .venv/bin/$name; done ;;
esac
case "$*" in *"$FAIL_ON"*) exit 3 ;; esac
"""


def test_every_command_is_covered() -> None:
    assert {line.split()[0] for line in LINES} == {"make", ".venv/bin/pelagos", "curl"}
    assert [line for line in LINES if line.startswith("make")] == ["make run", "make test"]


def test_figures_are_those_of_the_results() -> None:
    _, written, _ = readme.split(TEXT, readme.MARKS)
    assert written == readme.table(), "run `python -m benchmarks.readme`"
    assert readme.split("".join(readme.MARKS), readme.MARKS) == ("", "", "")


def test_the_kernels_table_is_up_to_date() -> None:
    _, written, _ = readme.split(kernel_goals.PAGE.read_text(encoding="utf-8"), kernel_goals.MARKS)
    assert written == kernel_goals.table(), "run `python -m benchmarks.kernel_goals`"


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_map_names_every_room() -> None:
    rooms = {path.name + "/" for path in (ROOT / "src/pelagos").iterdir() if path.is_dir() and path.name[0] != "_"}
    rooms |= {path.name for path in (ROOT / "src/pelagos").glob("[!_]*.py")}
    named = {name for row in re.findall(r"^\| \d \| (.*?) \|", TEXT, re.M) for name in re.findall(r"`([^`]+)`", row)}
    assert named == rooms


def test_changelog_justifies_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    told = re.findall(r"^- ([\w-]+): ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert sorted(told) == sorted(re.split(r"[<>= ;]", each)[0] for each in wanted)
    pins = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-test.txt").read_text()
    assert [name for name in told if not re.search(rf"^{name}==[\d.]+( ;|$)", pins, re.M)] == []


def run(command: list[str], cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, input=stdin, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done


def test_python_runs(tmp_path: Path) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    assert len(code.strip().splitlines()) <= 12
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.stderr == ""
    assert "Show the disk usage of a directory.<｜Assistant｜>" in done.stdout
    assert re.search(r"^torch\.Size\(\[1, \d+, 4096\]\)$", done.stdout, re.M)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith(PELAGOS) and " serve " not in line])
def test_commands_run(line: str, tmp_path: Path) -> None:
    lines = re.findall(r'`(\{"(?:prompt|messages)".*?\})`', TEXT)
    assert len(lines) == 2
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    stdin = "Hello\n" if " chat " in line else ""
    done = run([sys.executable, "-m", "pelagos", *shlex.split(line.removeprefix(PELAGOS))], tmp_path, stdin)
    assert (done.stdout.strip() != "", done.stderr) == (True, "")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server on the bundled model, started by the README's line on a free port."""
    [line] = [line for line in LINES if line.startswith(PELAGOS + "serve ")]
    args = shlex.split(line.removeprefix(PELAGOS).replace("8000", "0"))
    command = [sys.executable, "-m", "pelagos", *args]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        killer = threading.Timer(300, server.kill)
        killer.start()
        try:
            yield re.findall(r"http://\S+$", server.stderr.readline().strip())[0]
        finally:
            killer.cancel()
            server.terminate()


@needs_curl
@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("curl ")])
def test_requests_are_answered(line: str, url: str, tmp_path: Path) -> None:
    asked = line.replace("http://127.0.0.1:8000", url)
    assert asked != line
    done = run([*shlex.split(asked), "--silent", "--fail"], tmp_path)
    assert '"nano"' in done.stdout


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files `make` reads, beside a stand-in for Python."""
    for name in ("Makefile", "requirements.txt", "requirements-test.txt", "pyproject.toml", ".ci/run"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "stand-in" / "python"
    python.parent.mkdir()
    python.write_text(STAND_IN, encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAIL_ON", "nothing of that")
    for name in ("MODEL", "HOST", "PORT", "WORKERS", "MAKEFLAGS", "MAKELEVEL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def calls(house: Path, *command: str, code: int = 0) -> list[str]:
    """What one command line calls, in order."""
    log = house / "log"
    log.write_text("")
    done = subprocess.run(command, cwd=house, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return log.read_text().splitlines()


SERVE = "pelagos serve --model nano --host 127.0.0.1 --port 8000"


@needs_make
def test_make_run(house: Path) -> None:
    venv, wheels, ours, serve = calls(house, "make", "run")
    assert venv.startswith("python -m venv ")
    assert re.search(r"pip .*install .*--only-binary :all: .*-r requirements\.txt$", wheels)
    assert re.search(r"pip .*install .*--no-deps .*-e \.$", ours)
    assert serve == SERVE
    assert calls(house, "make", "run") == [SERVE]
    assert calls(house, "make", "run", "MODEL=a/b", "PORT=8001") == [
        SERVE.replace("nano", "a/b").replace("8000", "8001")
    ]
    with (house / "requirements.txt").open("a") as pins:
        pins.write("more==1.0\n")
    assert len(calls(house, "make", "run")) == 3  # a changed pin installs again, in the same environment


@needs_make
@pytest.mark.parametrize("command", [("make", "test"), (".ci/run",)])
def test_make_test(house: Path, command: tuple[str, ...]) -> None:
    _, wheels, _, *checks = calls(house, *command)
    assert wheels.endswith("-r requirements-test.txt")
    assert [check.split()[:2] for check in checks] == [
        ["ruff", "check"],
        ["ruff", "format"],
        ["pyright", "--pythonpath"],
        ["python", "-m"],
    ]
    assert checks[-1] == "python -m pytest --numprocesses 2 --dist worksteal"
    assert calls(house, "make", "run") == [SERVE]  # what tests need includes what the server needs


@needs_make
def test_a_failed_step_fails_and_is_done_again(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL_ON", "-r requirements")
    calls(house, "make", "run", code=2)
    monkeypatch.setenv("FAIL_ON", "pytest")
    assert "-r requirements-test.txt" in calls(house, ".ci/run", code=2)[0]


@needs_make
def test_no_python_is_one_clear_line(house: Path) -> None:
    done = subprocess.run(["make", "run", "PYTHON="], cwd=house, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no Python >= 3.11 found" in done.stderr
