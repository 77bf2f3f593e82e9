"""The command line: parse, call one library function, print. Data goes to stdout, progress to stderr.

Each command is `main(argv)` of the module `pelagos.cli.NAME`, imported only when it is asked for; it returns an exit
code or None. A PelagosError becomes one red line and exit code 1; anything else keeps its traceback.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from pelagos.cli.options import tell
from pelagos.errors import PelagosError

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
    name, *args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in (*COMMANDS, "--help", "-h"):
        print(f"pelagos: no such command {name!r}; `pelagos --help` lists them", file=sys.stderr)
        return 2
    try:
        try:
            if name in COMMANDS:
                return importlib.import_module(f"pelagos.cli.{name}").main(args) or 0
            lines = (f"  {command:<9} {about}" for command, about in COMMANDS.items())
            print("usage: pelagos COMMAND ...\n\nThe DeepSeek-V4 system in Python.\n", *lines, sep="\n")
            return 0
        finally:
            sys.stdout.flush()
    except PelagosError as error:
        tell(f"pelagos: {' '.join(str(error).split())}", "31")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
