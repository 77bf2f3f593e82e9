"""The command line: parse, call one library function, print. Data goes to stdout, progress to stderr.

Each command is the module `pelagos.cli.NAME`, imported only when it is asked for. It holds either a function NAME
for typer (or an `app`, a typer group), or `main(argv)` built on argparse; the latter kind runs without typer and
rich installed. A PelagosError becomes one red line and exit code 1; anything else keeps its traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from pelagos.errors import PelagosError

if TYPE_CHECKING:
    import typer

COMMANDS = {
    "chat": "Talk with a model in the terminal.",
    "generate": "Complete every line of a JSONL file.",
    "serve": "Serve a model over HTTP, with a page at /.",
    "keys": "Make, list and revoke the keys of a server.",
    "cost": "Price a model: parameters, FLOPs, KV bytes.",
    "data": "Build and inspect training data.",
    "train": "Train a model.",
    "eval": "Measure a model.",
    "bench": "Measure speed on this machine.",
    "sandbox": "Probe the sandbox's substrates; verify, export or replay a trajectory log.",
    "tasks": "List, run and grade the environments agents work in.",
    "agent": "Have a model do a task in a sandbox.",
    "cache": "List, verify or purge the prefix cache on disk.",
    "inspect": "Show what a checkpoint holds, or trace a text through it.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code; usage errors exit with 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        module = _module(args[0]) if args else None
        if module is not None and hasattr(module, "main"):
            return module.main(args[1:]) or 0
        typer_app([args[0]] if module else list(COMMANDS))(args, prog_name="pelagos")
        return 0
    except PelagosError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        return _fail(f"this command needs `pip install typer rich` ({error})")
    except KeyboardInterrupt:
        return 130


def _fail(message: str) -> int:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}pelagos: {' '.join(message.split())}{plain}", file=sys.stderr)
    return 1


def typer_app(names: Sequence[str]) -> typer.Typer:
    """Return a typer application of the commands in `names` that are here."""
    import typer

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

    @app.callback()
    def pelagos() -> None:
        """The DeepSeek-V4 system in Python: talk with it, serve it, train it, measure it."""

    for name in names:
        module = _module(name)
        if module is None:
            continue
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name, help=COMMANDS[name])
        elif hasattr(module, "main"):
            app.command(name, help=COMMANDS[name])(_listed_only)
        else:
            app.command(name)(getattr(module, name))
    return app


def _listed_only() -> None:
    """Stands in the list of commands for those that parse their own arguments."""


def _module(name: str) -> ModuleType | None:
    if name not in COMMANDS or importlib.util.find_spec(f"pelagos.cli.{name}") is None:
        return None
    return importlib.import_module(f"pelagos.cli.{name}")
