"""One task folder: `instruction.md`, `task.toml`, `environment/`, `tests/test.sh`, `solution/solve.sh` (as Harbor).

The agent's sandbox holds the environment alone. Grading takes what the agent changed, puts it and the tests into a new
sandbox the agent never saw, and runs them there. Dockerfiles that build are refused: nothing here builds.
"""

import dataclasses
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pelagos.errors import DataError
from pelagos.sandbox import ExecResult, Image, Sandbox, Store

REWARD = "/logs/verifier/reward.txt"  # what tests may write instead of ending with 0 or 1
_IMAGE_WORDS = ("FROM", "WORKDIR", "COPY", "#")  # of a Dockerfile: what changes nothing here


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One folder and what its `task.toml` says."""

    name: str
    path: Path
    instruction: str
    kind: str = "other"
    agent_timeout_s: float = 600.0
    verifier_timeout_s: float = 120.0
    memory_mb: int = 512
    cpu: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return what a listing shows."""
        return dataclasses.asdict(self) | {"path": str(self.path)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """What came of grading: `reward` is 1.0 for a pass unless the tests wrote a number of their own."""

    task: str
    passed: bool
    reward: float
    output: str


def load(path: Path) -> Task:
    """Read a task folder; raises DataError naming the file that is missing or wrong."""
    for name in ("instruction.md", "task.toml", "environment", "tests/test.sh"):
        if not (path / name).exists():
            raise DataError(f"{path}: no {name}; a task folder has instruction.md, task.toml, environment/ and tests/")
    try:
        facts = tomllib.loads((path / "task.toml").read_text(encoding="utf-8"))
        tables = ("metadata", "agent", "verifier", "environment")
        told: dict[str, dict[str, Any]] = {name: facts.get(name, {}) for name in tables}
        dockerfile = path / "environment" / "Dockerfile"
        lines = dockerfile.read_text(encoding="utf-8").splitlines() if dockerfile.exists() else []
        if bad := [line for line in lines if line.strip() and not line.startswith(_IMAGE_WORDS)]:
            said = "would have to be built; put the files it makes into environment/"
            raise DataError(f"{dockerfile}: {bad[0]!r} {said}")
        return Task(
            name=path.name, path=path, instruction=(path / "instruction.md").read_text(encoding="utf-8"),
            kind=str(told["metadata"].get("category", "other")),
            agent_timeout_s=float(told["agent"].get("timeout_sec", 600.0)),
            verifier_timeout_s=float(told["verifier"].get("timeout_sec", 120.0)),
            memory_mb=int(told["environment"].get("memory_mb", 512)), cpu=float(told["environment"].get("cpus", 1.0)),
        )  # fmt: skip
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path / 'task.toml'}: {error}") from None


def load_all(root: Path) -> Iterator[Task]:
    """Read every task folder under `root`, sorted by name."""
    found = sorted(path.parent for path in root.glob("*/task.toml"))
    if not found:
        raise DataError(f"{root}: no task folders; `pelagos tasks make {root}` writes some")
    yield from map(load, found)


def image_of(task: Task, store: Store | None = None) -> Image:
    """Return what the agent of a task starts from: the host's programs, and `environment/` as /workspace."""
    return Image.host(store).with_directory(task.path / "environment", at="/workspace", store=store)


def grade(task: Task, diff: bytes, store: Store | None = None, **options: Any) -> Grade:
    """Run the tests of a task in a new sandbox over what the agent's sandbox packed; its processes are gone by then."""
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(diff)
        file.flush()
        image = image_of(task, store).with_tar(file.name, store=store)
    image = image.with_directory(task.path / "tests", at="/tests", store=store)
    options = {"memory_mb": task.memory_mb, "cpu": task.cpu, "ttl_s": task.verifier_timeout_s + 60} | options
    with Sandbox.create(image=image, store=store, **options) as box:
        box.files.write(REWARD, b"")
        # What the agent left in its home or path must not decide what the tests mean.
        words = ["env", "-i", "PATH=/usr/bin:/bin", "HOME=/nonexistent", "LANG=C.UTF-8", "sh", "/tests/test.sh"]
        done = box.exec(words, timeout=task.verifier_timeout_s)
        told = box.files.read(REWARD).strip()
    try:
        reward = float(told) if told else float(done.exit_code == 0)
    except ValueError:
        reward = 0.0
    output = (done.stdout + done.stderr).decode("utf-8", "replace")[-4000:]
    return Grade(task=task.name, passed=reward >= 1.0 and not done.timed_out, reward=reward, output=output)


def solve(
    task: Task, store: Store | None = None, *, touch: bool = True, **options: Any
) -> tuple[Grade, ExecResult | None]:
    """Do a task by its own solution (or, without `touch`, not at all) and grade it; DataError where it has none."""
    script = task.path / "solution" / "solve.sh"
    if not script.exists():
        raise DataError(f"{task.path}: no solution/solve.sh to run")
    limits = {"memory_mb": task.memory_mb, "cpu": task.cpu, "ttl_s": task.agent_timeout_s + 60} | options
    with Sandbox.create(image=image_of(task, store), store=store, **limits) as box:
        done = box.exec(["sh", "-s"], stdin=script.read_bytes(), timeout=task.agent_timeout_s) if touch else None
        diff = box.pack_diff()
    return grade(task, diff, store, **options), done
