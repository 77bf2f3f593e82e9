"""Real agent programs fix a bug through the server; the model is a script, everything else is real.

Programs are looked for on PATH only, run in an empty home with the configuration their page in docs/clients shows, and
may speak to loopback alone: `unshare -rn sh -c 'ip link set lo up && pytest -m clients tests/clients'` proves it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from tests.clients.program import DOC_KEY, DOC_URL, HERE, MODEL, block, serving

from pelagos.serve.keys import KeyFile
from pelagos.serve.scripted import PAGE_TOKENS, scripted_llm

BROKEN = 'def add(a, b):\n    return a - b  # 你好 & "<b>"\n'
FIXED = 'def add(a, b):\n    """1 < 2 && "x\\n" > \'y\' 你好"""\n    return a + b  # 你好 & "<b>"\n'
CHECK = "from calc import add\n\nassert add(2, 3) == 5\n"
THOUGHT = "Both files first, then one edit."
END = "The sum in calc.py is right now."
SECONDS = 120  # none takes 30 on a quiet machine


@dataclass(frozen=True)
class Program:
    """A program, the page and script that bear its name, and what of its page goes where."""

    name: str
    command: str
    files: tuple[str, ...] = ()  # titles of blocks that are files: a path below the home (~/) or the project
    keeps_prefix: bool = True
    thinking_in: str = "history"  # where thinking shows: the next request of the program, or its output


PROGRAMS = (
    Program("claude-code", "claude", thinking_in="output"),
    Program("codex", "codex", ("~/.codex/config.toml", "~/.codex/models.json"), thinking_in="output"),
    Program("opencode", "opencode", ("~/.config/opencode/opencode.json",), thinking_in="output"),
    Program("openclaw", "openclaw", ("~/.openclaw/openclaw.json",), keeps_prefix=False),
    Program("codebuddy", "codebuddy", ("~/.codebuddy/models.json",)),
)


@pytest.mark.clients
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_program_fixes_the_bug(program: Program, tmp_path: Path) -> None:
    if shutil.which(program.command) is None:
        pytest.skip(f"{program.command} is not on PATH; docs/clients/{program.name}.md says how to install it")
    home, project, temporary = (tmp_path / name for name in ("home", "project", "tmp"))
    for directory in (home, project, temporary):
        directory.mkdir()
    (project / "calc.py").write_text(BROKEN, encoding="utf-8")
    (project / "check.py").write_text(CHECK, encoding="utf-8")
    keys = KeyFile(tmp_path / "keys.json")
    secret = keys.add("agent")

    def shown(title: str) -> str:
        return block(program.name, title).replace(DOC_URL, url).replace(DOC_KEY, secret)

    with serving(scripted_llm(MODEL, HERE / f"{program.name}.json"), keys=keys) as (url, recorded):
        for title in program.files:
            path = home / title.removeprefix("~/") if title.startswith("~/") else project / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(shown(f"`{title}`"), encoding="utf-8")
        commands = shown("Environment") + shown("without a terminal")
        # Codex makes no helpers in a home below the directory of temporary files, so that is another one.
        env = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(temporary), "LANG": "C.UTF-8"}
        done = subprocess.run(
            ["bash", "-ec", commands], cwd=project, env=env,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    output = done.stdout.decode() + done.stderr.decode()
    told = f"{output}\n{[(one.method, one.path, one.status) for one in recorded.exchanges]}"

    assert done.returncode == 0, told
    assert (project / "calc.py").read_text(encoding="utf-8") == FIXED, told
    assert END in done.stdout.decode(), told
    turns = [one for one in recorded.generations if b"calc.py" in one.request and b'"tools"' in one.request]
    assert len(turns) == 3, told
    assert all(one.status == 200 for one in recorded.generations), told
    assert turns[0].cached_tokens == 0 < turns[1].cached_tokens < turns[2].cached_tokens, told
    if program.keeps_prefix:  # what the model wrote is found too, however the program spells it when it sends it back
        pages = [(one.cached_tokens, one.tokens - 1) for one in turns]
        assert all(after[0] >= before[1] // PAGE_TOKENS * PAGE_TOKENS for before, after in pairwise(pages)), pages
    for text in (output, *(one.text for one in recorded.exchanges)):
        assert "｜DSML｜" not in text
        assert "</think>" not in text
    assert THOUGHT in (output if program.thinking_in == "output" else turns[1].request.decode()), told
