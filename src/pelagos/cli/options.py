"""What commands share: the options that several have, token counts as people write them, and words on stderr."""

import argparse
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from pelagos.errors import ConfigError

_MAX_TOKENS = 2**50
_SHARED: dict[str, dict[str, Any]] = {
    "model": {"default": "nano", "help": "bundled name, checkpoint directory or cached hub id (default: nano)"},
    "mode": {"default": "reference", "choices": ("reference", "released"), "help": "number mode"},
    "device": {"help": "device of the weights, such as cpu or cuda"},
    "json": {"action": "store_true", "help": "print one JSON object on stdout"},
    "out": {"type": Path, "metavar": "FILE", "help": "file for the JSON lines (default: stdout)"},
    "temperature": {"type": float, "default": 1.0, "metavar": "T", "help": "0 always takes the likeliest token"},
    "top-p": {"type": float, "default": 1.0, "metavar": "P", "help": "share of the probability to sample from"},
    "seed": {"type": int, "metavar": "N", "help": "makes what is written repeatable"},
}
SAMPLING = ("temperature", "top-p", "seed")


def shared(parser: argparse.ArgumentParser, *names: str) -> None:
    """Give a command options that other commands have too, by their names without dashes before them."""
    for name in names:
        parser.add_argument(f"--{name}", **_SHARED[name])


def parse_tokens(text: str, name: str) -> int:
    """Read a token count such as `4096`, `128K` or `1M` (binary suffixes); raises ConfigError naming `name`."""
    match = re.fullmatch(r"(\d{1,16})(\.\d{1,6})?([KM]?)", text.strip().upper().replace("_", ""), re.ASCII)
    scale = {"": 1, "K": 2**10, "M": 2**20}
    value = float(match[1] + (match[2] or "")) * scale[match[3]] if match else 0.5
    if value != int(value) or value > _MAX_TOKENS:
        raise ConfigError(f"{name}={text!r}: expected a whole number, such as 4096, 128K or 1M")
    return int(value)


def counts(parser: argparse.ArgumentParser, name: str, about: str, default: str | None = None) -> None:
    """Give a command an option of token counts, separated by commas, as a list of whole numbers."""
    read = partial(parse_tokens, name=name)
    parser.add_argument(f"--{name}", type=lambda text: [read(each) for each in text.split(",")], default=default,
                        metavar="N,N", help=about + (f" (default: {default})" if default else ""))  # fmt: skip


def opened(parser: argparse.ArgumentParser, out: Path | None) -> AbstractContextManager[TextIO]:
    """Return where --out says that lines go, which is stdout without it."""
    try:
        return nullcontext(sys.stdout) if out is None else out.open("w", encoding="utf-8")
    except OSError as error:
        parser.error(f"--out {out}: {error.strerror}")


def tell(text: str, style: str = "2", end: str = "\n") -> None:
    """Write on stderr: in a terminal in an ANSI style, such as 2 (dim) or 31 (red)."""
    shown = f"\033[{style}m{text}\033[0m" if sys.stderr.isatty() else text
    print(shown, end=end, file=sys.stderr, flush=True)
