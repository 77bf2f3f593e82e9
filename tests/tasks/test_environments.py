"""Tasks: generated folders are sound, their own solutions pass, doing nothing fails, and grading happens elsewhere."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from pelagos import tasks
from pelagos.cli.tasks import main
from pelagos.errors import DataError
from pelagos.sandbox import Sandbox, Store
from pelagos.tasks.generate import templates


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks") / "all"
    tasks.write_all(root, count=200)
    return root


def test_two_hundred_tasks_from_many_templates(folder: Path, tmp_path: Path) -> None:
    every = list(tasks.load_all(folder))
    assert len(every) == 200
    assert len(templates()) >= 25
    assert {task.kind for task in every} == set(tasks.KINDS)
    digests = [hashlib.sha256((t.path / "solution/solve.sh").read_bytes()).hexdigest() for t in every]
    assert len(set(digests)) == 200
    again = tmp_path / "again"
    tasks.write_all(again, count=40)
    for path in sorted(p for p in again.rglob("*") if p.is_file() and not p.is_symlink()):
        assert path.read_bytes() == (folder / path.relative_to(again)).read_bytes()
    with pytest.raises(DataError, match="not empty"):
        tasks.write_all(folder)


def test_answers_are_not_in_the_environment(folder: Path) -> None:
    for task in tasks.load_all(folder):
        names = {path.name for path in (task.path / "environment").rglob("*")}
        assert not names & {"solve.sh", "check.py", "test.sh"}


SAMPLE = sorted({template.name for template in templates()})


@pytest.mark.parametrize("name", random.Random(9).sample(SAMPLE, 6))
def test_solution_passes_and_nothing_fails(name: str, folder: Path, store: Store) -> None:
    path = random.Random(name).choice(sorted(folder.glob(f"{name.replace('_', '-')}-[0-9]*")))
    task = tasks.load(path)
    solved, done = tasks.solve(task, store)
    assert done is not None
    assert (done.exit_code, solved.passed, solved.reward) == (0, True, 1.0), (done.stderr, solved.output)
    untouched, _ = tasks.solve(task, store, touch=False)
    assert (untouched.passed, untouched.reward) == (False, 0.0)


@pytest.mark.slow
def test_all_two_hundred_three_times(folder: Path, store: Store) -> None:
    for task in tasks.load_all(folder):
        assert [tasks.solve(task, store)[0].passed for _ in range(3)] == [True] * 3, task.name
        assert [tasks.solve(task, store, touch=False)[0].passed for _ in range(3)] == [False] * 3, task.name


def test_grading_trusts_nothing_the_agent_left(folder: Path, store: Store) -> None:
    """A home full of traps, a process that waits, tests of its own: none decides."""
    task = tasks.load(next(folder.glob("sort-numbers-*")))
    with Sandbox.create(image=tasks.image_of(task, store), store=store) as box:
        box.exec("mkdir -p /tmp/x ~/bin; printf 'exit 0\\n' > ~/bin/python3; chmod +x ~/bin/*; sleep 60 &")
        box.exec("echo 'import os; os._exit(0)' > json.py; cp json.py subprocess.py; cp json.py sitecustomize.py")
        box.exec("mkdir -p /tests /logs/verifier; echo 'exit 0' > /tests/test.sh; echo 1 > /logs/verifier/reward.txt")
        diff = box.pack_diff()
    assert tasks.grade(task, diff, store).passed is False
    assert not (task.path / "environment" / "json.py").exists()


def test_a_folder_of_your_own(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "mine"
    for name, text in {
        "instruction.md": "Say hello in `a`.", "environment/README": "x\n",
        "environment/Dockerfile": "FROM debian:12\n",
        "task.toml": '[metadata]\ncategory = "talk"\n[verifier]\ntimeout_sec = 9.5\n',
        "tests/test.sh": "grep -q hello /workspace/a && echo 0.25 > /logs/verifier/reward.txt",
        "solution/solve.sh": "echo hello > a",
    }.items():  # fmt: skip
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    task = tasks.load(path)
    assert (task.kind, task.verifier_timeout_s, task.agent_timeout_s) == ("talk", 9.5, 600.0)
    grade, _ = tasks.solve(task, store)
    assert (grade.passed, grade.reward) == (False, 0.25)
    for name, text, word in (
        ("task.toml", "[metadata", "task.toml"), ("task.toml", "agent = 3", "task.toml"),
        ("task.toml", "[agent]\ntimeout_sec = 'x'", "task.toml"),
        ("environment/Dockerfile", "FROM x\nRUN apt-get install y\n", "would have to be built"),
    ):  # fmt: skip
        (path / name).write_text(text)
        with pytest.raises(DataError, match=word):
            tasks.load(path)
        (path / name).write_text("FROM x\n" if "Docker" in name else "")
    (path / "instruction.md").unlink()
    with pytest.raises(DataError, match=r"no instruction\.md"):
        tasks.load(path)


def test_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    monkeypatch.setattr("pelagos.sandbox.layers.default_store", lambda: store)
    monkeypatch.setattr("pelagos.sandbox.sdk.default_store", lambda: store)
    folder = str(tmp_path / "t")
    assert main(["make", folder, "--count", "2"]) == 0
    assert main(["list", folder]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [lines[0], len(lines)] == [{"made": 2}, 3]
    assert main(["run", lines[1]["path"]]) == 0
    assert main(["run", lines[1]["path"], "--untouched"]) == 0
    empty = tmp_path / "empty.tar"
    empty.write_bytes(bytes(10240))
    assert main(["grade", lines[1]["path"], str(empty)]) == 1
    assert [json.loads(line)["passed"] for line in capsys.readouterr().out.splitlines()] == [True, False, False]
