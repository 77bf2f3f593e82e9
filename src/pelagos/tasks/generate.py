"""Task folders from templates: the same seed gives the same bytes, and no two tasks have the same solution."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pelagos.errors import DataError
from pelagos.tasks import bug_templates, edit_templates, log_templates, shell_templates
from pelagos.tasks.draft import Draft

ATTEMPTS = 50
# Kind: the module whose public functions are its templates.
KINDS = {"file-edit": edit_templates, "log-mining": log_templates, "shell": shell_templates, "bug-fix": bug_templates}
_TEST = "cd /workspace && exec python3 -I -B /tests/check.py\n"
_PRELUDE = """import hashlib, json, os, subprocess, sys
from pathlib import Path
def read(name): return Path(name).read_text()
def run(code): return subprocess.run([sys.executable, '-B', '-c', code], capture_output=True, text=True, timeout=20)
"""


@dataclass(frozen=True, slots=True)
class Template:
    """One way to make tasks."""

    name: str
    kind: str
    make: Callable[[random.Random], Draft]


def templates() -> list[Template]:
    """Return every template, by kind and name."""
    return [
        Template(name, kind, cast(Callable[[random.Random], Draft], make))
        for kind, module in KINDS.items()
        for name, make in sorted(vars(module).items())
        if callable(make) and getattr(make, "__module__", "") == module.__name__ and not name.startswith("_")
    ]


def write_all(root: Path, *, count: int = 200, seed: int = 0) -> list[Path]:
    """Write `count` task folders, the templates in turn; DataError where `root` holds something or they run out."""
    if root.exists() and any(root.iterdir()):
        raise DataError(f"{root}: not empty; tasks are written into a new directory")
    made: list[Path] = []
    solutions: set[str] = set()
    every = templates()
    for number in range(count):
        template = every[number % len(every)]
        for attempt in range(ATTEMPTS):
            draft = template.make(random.Random(f"{seed}/{template.name}/{number}/{attempt}"))
            digest = hashlib.sha256(draft.solution.encode()).hexdigest()
            if digest not in solutions:
                break
        else:
            raise DataError(f"{template.name}: not {number // len(every) + 1} different solutions; ask for fewer")
        solutions.add(digest)
        made.append(root / f"{template.name.replace('_', '-')}-{number:04d}")
        _write(made[-1], template, draft)
    return made


def _write(path: Path, template: Template, draft: Draft) -> None:
    toml = (f'version = "1.0"\n[metadata]\ncategory = "{template.kind}"\ntags = ["{template.name}"]\n'
            "[agent]\ntimeout_sec = 600.0\n[verifier]\ntimeout_sec = 60.0\n"
            "[environment]\ncpus = 1\nmemory_mb = 256\n")  # fmt: skip
    texts = {"instruction.md": draft.instruction.strip() + "\n", "task.toml": toml, "tests/test.sh": _TEST,
             "tests/check.py": _PRELUDE + draft.check, "solution/solve.sh": "set -e\n" + draft.solution}  # fmt: skip
    (path / "environment").mkdir(parents=True)
    for name, content in {**texts, **{f"environment/{n}": c for n, c in draft.files.items()}}.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if content.startswith("-> ") and name.startswith("environment/"):
            target.symlink_to(content[3:])
        else:
            target.write_text(content, encoding="utf-8")
