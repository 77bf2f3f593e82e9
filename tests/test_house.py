"""The house rules that a parser can check: who imports whom, how long, what names, what letters."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "src" / "pelagos"
SOURCES = sorted(
    path for path in HOUSE.rglob("*") if path.suffix in (".py", ".js", ".css", ".html", ".cu", ".c") and path.is_file()
)
MODULES = [path for path in SOURCES if path.suffix == ".py"]

# From the ground up; a room imports from lower floors only. `load` joins model and checkpoint for the floors above.
FLOORS = (
    ("errors",),
    ("config", "numerics"),
    ("kernels", "parallel", "chat", "cost", "sandbox"),
    ("model", "checkpoint", "tasks"),
    ("load",),
    ("train", "engine"),
    ("serve", "agent"),
    ("posttrain", "evals"),
    ("cli",),
    ("__main__",),
)
LINE_CEILINGS = {
    "cli": 1226, "posttrain": 2000, "evals": 1369, "serve": 4808, "agent": 250, "train": 4237, "engine": 4949,
    "model": 3743, "checkpoint": 715, "tasks": 750, "kernels": 11210, "parallel": 117, "chat": 970, "cost": 750,
    "sandbox": 5637, "config": 370, "errors": 65, "numerics": 195,
}  # fmt: skip
HOUSE_CEILING = 41_584
FILE_CEILING = 800
# Rooms whose code never sees a device.
DEVICE_FREE = ("chat", "cost", "sandbox")
DEVICE_LIBRARIES = ("torch", "triton", "numpy")
# The files where the released tokens and the splits of the tokenizer are spelled.
NON_ASCII = {"chat/tokens.py", "chat/bpe.py"}


def room_of(path: Path) -> str:
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            return floor
    raise AssertionError(f"room {room!r} is on no floor: add it to the plan in design.md and here")


def imported(source: str) -> list[tuple[int, str]]:
    """(line, dotted module) of every import, TYPE_CHECKING and function-local ones too; relative ones as '.'."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append((node.lineno, "."))
            elif node.module == "pelagos":
                found += [(node.lineno, f"pelagos.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module or ""))
    return found


def wrong_edges(room: str, source: str) -> list[str]:
    """Imports of `source`, a module of `room`, that do not go down at least one floor (or stay in the room)."""
    wrong = []
    for line, module in imported(source):
        if module == ".":
            wrong.append(f"line {line}: relative import; write the full name")
        elif module.startswith("pelagos."):
            other = module.split(".")[1]
            if other != room and floor_of(other) >= floor_of(room):
                wrong.append(f"line {line}: {room} (floor {floor_of(room)}) imports {other} (floor {floor_of(other)})")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_imports_go_down(path: Path) -> None:
    if path == HOUSE / "__init__.py":
        return  # the front door: it names every public room, lazily (checked by test_front_door_is_light)
    assert wrong_edges(room_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source", "count"),
    [
        ("train", "from pelagos.engine import LLM", 1),
        ("model", "def f():\n    import pelagos.load", 1),
        ("chat", "from pelagos import cost, errors", 1),
        ("serve", "from . import app", 1),
        ("engine", "from pelagos.load import load_model\nfrom pelagos.engine.sampler import Sampler", 0),
    ],
)
def test_wrong_edges_are_seen(room: str, source: str, count: int) -> None:
    assert len(wrong_edges(room, source)) == count


def test_front_door_is_light() -> None:
    heavy = "import sys, pelagos; sys.exit(' '.join({'torch', 'numpy', 'tokenizers', 'httpx'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, cwd=ROOT / "src")
    assert (done.returncode, done.stderr) == (0, "")


def test_device_free_rooms_import_no_device_code() -> None:
    wrong = [
        f"{path.relative_to(HOUSE)}:{line}: {module}"
        for path in MODULES
        if room_of(path) in DEVICE_FREE
        for line, module in imported(path.read_text(encoding="utf-8"))
        if module.split(".")[0] in DEVICE_LIBRARIES
    ]
    assert wrong == []


def test_line_ceilings() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    tests = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {str(p): n for p, n in (lines | tests).items() if n > FILE_CEILING} == {}
    rooms: dict[str, int] = {}
    for path, count in lines.items():
        rooms[room_of(path)] = rooms.get(room_of(path), 0) + count
    over = {room: n for room, n in rooms.items() if n > LINE_CEILINGS.get(room, FILE_CEILING)}
    assert over == {}, "a room outgrew its ceiling in design.md: delete to add"
    assert sum(lines.values()) <= HOUSE_CEILING


def test_environment_is_read_in_config_only() -> None:
    reading = re.compile(r"\bos\.(environ|getenv|putenv)|from os import .*\b(environ|getenv)")
    found = [str(path) for path in MODULES if reading.search(path.read_text(encoding="utf-8"))]
    assert found == [str(HOUSE / "config.py")]


def test_names() -> None:
    bad_files = {"utils", "util", "common", "misc", "helpers", "helper"}
    assert [str(path) for path in SOURCES if bad_files & set(path.with_suffix("").parts[len(HOUSE.parts) :])] == []
    bad_class = re.compile(r"^_?Base[A-Z]|(Base|Impl|Manager|Utils|Helper)$")
    classes = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and bad_class.search(node.name)
    ]
    assert classes == []


def test_source_is_ascii_but_where_tokens_live() -> None:
    spelled = {
        str(path.relative_to(HOUSE)): sorted({c for c in path.read_text(encoding="utf-8") if not c.isascii()})
        for path in SOURCES
    }
    assert {name: letters for name, letters in spelled.items() if letters and name not in NON_ASCII} == {}
