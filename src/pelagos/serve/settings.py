"""What can be set of a server: one frozen dataclass, from a TOML file and from flags; flags win.

The file has the tables `[server]`, `[engine]` and `[limits]`; every key is also a flag of `pelagos serve`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pelagos.errors import ConfigError
from pelagos.serve.ask import Card

LOG_LEVELS = ("debug", "info", "warning", "error")


def _set(table: str, default: Any, about: str) -> Any:
    return dataclasses.field(default=default, metadata={"table": table, "help": about})


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The settings of one server; None means what the help of the setting says."""

    host: str = _set("server", "127.0.0.1", "address to listen on")
    port: int = _set("server", 8000, "port to listen on; 0 takes a free one")
    name: str | None = _set("server", None, "name of the model towards clients (default: the last part of its path)")
    keys_file: Path | None = _set("server", None, "file of `pelagos keys` (default: ~/.config/pelagos/keys.json)")  # noqa: RUF009
    allow_open: bool = _set("server", False, "listen beyond this machine although there are no keys")
    allowed_hosts: tuple[str, ...] = _set("server", (), "names a Host header may have beside the loopback ones")
    cors_origins: tuple[str, ...] = _set("server", (), "origins whose pages may call; * is any")
    strict: bool = _set("server", False, "refuse what the official API refuses")
    log_level: str = _set("server", "info", "debug, info, warning or error")
    drain_s: float = _set("server", 30.0, "seconds running answers have to finish once the server is told to end")
    model: str = _set("engine", "nano", "bundled name, checkpoint directory or cached hub id")
    engine: str = _set("engine", "local", "local, or scripted:FILE.json, which only plays answers")
    mode: str = _set("engine", "reference", "number mode: reference or released")
    device: str | None = _set("engine", None, "device of the weights, such as cpu or cuda")
    generation: str | None = _set("engine", None, "prompts: preview or 0731 (default: the model's)")
    max_requests: int = _set("engine", 16, "requests computed side by side; the rest wait")
    chunk_tokens: int = _set("engine", 512, "tokens one step computes at most")
    kv_bytes: int | None = _set("engine", None, "memory of the caches (default: by what is free)")
    host_kv_bytes: int | None = _set("engine", None, "host memory behind them (default: on a GPU, half as much)")
    expert_bytes: int | None = _set("engine", None, "memory of routed experts; the others are streamed (default: all)")
    prefix_cache: bool = _set("engine", True, "keep prefixes of earlier requests")
    disk_dir: Path | None = _set("engine", None, "directory in which prefixes outlive the server")  # noqa: RUF009
    disk_policy: str = _set("engine", "turns", "what is kept there: full, periodic(P), zero or turns")
    disk_bytes: int = _set("engine", 8 << 30, "bytes there at most")
    speculation: bool = _set("engine", True, "draft tokens where that pays")
    exact: bool | None = _set("engine", None, "logits that do not depend on the batch (default: where the host can)")
    native: bool | None = _set("engine", None, "the compiled CPU helper (default: where it can run)")
    preemption: str = _set("engine", "swap", "how a request makes room: swap (into host_kv_bytes, if any) or recompute")
    max_tokens: int | None = _set("limits", None, "answer length where a request names none (default: the protocol's)")
    context_length: int | None = _set("limits", None, "tokens of prompt and answer at most (default: the model's)")
    max_queued: int = _set("limits", 512, "requests that may wait beside those computed; more are refused with 429")
    body_bytes: int = _set("limits", 32 << 20, "bytes of a request body at most")
    head_s: float = _set("limits", 20.0, "seconds a client has to send a request's head")
    body_s: float = _set("limits", 60.0, "seconds a client has to send a request's body")
    idle_s: float = _set("limits", 75.0, "seconds a connection may idle between requests")
    write_s: float = _set("limits", 60.0, "seconds a client may take nothing of what waits for it")
    keep_alive_s: float = _set("limits", 5.0, "seconds of silence after which a sign of life is sent")
    queue_s: float = _set("limits", 600.0, "seconds until the first token, after which a request is given up")
    deadline_s: float | None = _set("limits", None, "seconds an answer may take in all (default: no bound)")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, (is_right, _, expected) = getattr(self, field.name), _KINDS[_kind(field)]
            if not is_right(value) and not (value is None and "None" in str(field.type)):
                raise ConfigError(f"{field.name}={value!r}: expected {expected}")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"log_level={self.log_level!r}: expected one of {', '.join(LOG_LEVELS)}")
        if self.engine != "local" and not self.engine.startswith("scripted:"):
            raise ConfigError(f"engine={self.engine!r}: expected local or scripted:FILE.json")
        if self.port > 65535:
            raise ConfigError(f"port={self.port}: expected a port to 65535")

    @property
    def card(self) -> Card:
        """What the server says of itself before the model is there."""
        name = self.name or Path(self.model).resolve().name
        length = self.context_length or 1 << 20  # the model's own bound is known once it is loaded
        return Card(model=name, max_tokens=self.max_tokens, strict=self.strict, context_length=length)

    @property
    def engine_options(self) -> dict[str, Any]:
        """The `[engine]` table but the model and the kind of engine: keyword arguments of `LLM`."""
        ours = [f.name for f in dataclasses.fields(self) if f.metadata["table"] == "engine"]
        return {name: getattr(self, name) for name in ours if name not in ("model", "engine")}


def _texts(flag: str) -> tuple[str, ...]:
    return tuple(each.strip() for each in flag.split(",") if each.strip())


# By annotation: whether a value is right, how a flag is read, and what is expected.
_KINDS: dict[str, tuple[Callable[[Any], bool], Callable[[str], Any], str]] = {
    "str": (lambda value: type(value) is str, str, "a text"),
    "int": (lambda value: type(value) is int and 0 <= value < 1 << 62, int, "a whole number >= 0"),
    "float": (lambda value: type(value) in (int, float) and 0 < value < 1e9, float, "a number > 0"),
    "bool": (lambda value: type(value) is bool, bool, "true or false"),
    "Path": (lambda value: isinstance(value, Path), Path, "a path"),
    "tuple[str, ...]": (
        lambda value: type(value) is tuple and all(type(each) is str for each in value), _texts, "a list of texts",
    ),
}  # fmt: skip


def _kind(field: dataclasses.Field[Any]) -> str:
    return str(field.type).removesuffix(" | None")


def read_settings(argv: Sequence[str]) -> Settings:
    """Return the settings of a command line, over those of its `--config` file; wrong flags end the process.

    Raises ConfigError for a file that cannot be read, a key that does not exist, or a value of the wrong kind.
    """
    parser = argparse.ArgumentParser(prog="pelagos serve", description="Serve a model over HTTP, with a page at /.")
    parser.add_argument("--config", type=Path, help="TOML file of the same settings in [server], [engine] and [limits]")
    for field in dataclasses.fields(Settings):
        default = "" if field.default in (None, ()) else f" (default: {field.default})"
        how: dict[str, Any] = {"type": _KINDS[_kind(field)][1], "metavar": "X"}
        if _kind(field) == "bool":
            how = {"action": argparse.BooleanOptionalAction}
        flag, about = f"--{field.name.replace('_', '-')}", field.metadata["help"] + default
        parser.add_argument(flag, default=argparse.SUPPRESS, help=about, **how)
    flags = vars(parser.parse_args(argv))
    file = flags.pop("config")
    return Settings(**(({} if file is None else read_config(file)) | flags))


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML file by name; ConfigError names a key that does not exist and the nearest."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as TOML ({error})") from None
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    homes = {name: field.metadata["table"] for name, field in fields.items()}
    settings: dict[str, Any] = {}
    for table, keys in tables.items():
        for key, value in keys.items() if isinstance(keys, dict) else ((table, keys),):
            if homes.get(key) != table:
                near = key if key in homes else next(iter(difflib.get_close_matches(key, homes, 1, 0.5)), None)
                hint = f"; did you mean {near} in [{homes[near]}]?" if near else ""
                raise ConfigError(f"{path}: [{table}] has no setting {key!r}{hint}")
            if isinstance(value, str) and _kind(fields[key]) == "Path":
                value = path.parent / Path(value).expanduser()
            settings[key] = tuple(value) if isinstance(value, list) else value
    return settings
