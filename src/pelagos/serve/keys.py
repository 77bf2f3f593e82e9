"""API keys: a file of names and hashes that `pelagos keys` writes and a server reads again whenever it changes.

A key is 256 random bits, so its plain BLAKE2b hash cannot be turned back; the key itself is shown once, kept nowhere.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pelagos.errors import ConfigError

VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """Who may use the server, and how much: requests at a time and a minute (None: no bound of its own)."""

    name: str
    digest: str
    created: str
    concurrency: int | None = None
    per_minute: int | None = None

    @property
    def about(self) -> dict[str, str | int | None]:
        """All but the hash."""
        return {name: getattr(self, name) for name in ("name", "created", "concurrency", "per_minute")}

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"key name {self.name!r}: expected up to 64 letters, digits, dots, dashes or underscores")
        for name in ("concurrency", "per_minute"):
            if (value := getattr(self, name)) is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r} of key {self.name}: expected a whole number > 0")


class KeyFile:
    """The keys in one file."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` None takes `pelagos/keys.json` in the user's `.config`."""
        self.path = path or Path.home() / ".config" / "pelagos" / "keys.json"
        self._seen: tuple[int, ...] | None = None
        self._keys: tuple[Key, ...] = ()
        self._were_there = False

    def is_needed(self) -> bool:
        """Whether a request needs a key: there are keys, were some, or cannot be read (which is logged)."""
        try:
            self._were_there |= bool(self.read())
        except (ConfigError, OSError) as error:
            self._were_there, self._keys, self._seen = True, (), None
            _log.error("%s", error)
        return self._were_there

    def read(self) -> tuple[Key, ...]:
        """Return the keys, read again if the file has changed; none without a file. Raises ConfigError if damaged."""
        try:
            state = self.path.stat()
        except FileNotFoundError:
            self._seen, self._keys = None, ()
            return ()
        seen = (state.st_mtime_ns, state.st_size, state.st_ino)
        if seen != self._seen:
            self._keys, self._seen = self._parse(), seen
        return self._keys

    def find(self, secret: str) -> Key | None:
        """Return whose key `secret` is, by what `is_needed` last read; all are compared, so time tells nothing."""
        digest = _digest(secret)
        found = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        return found[0] if found else None

    def add(self, name: str, *, concurrency: int | None = None, per_minute: int | None = None) -> str:
        """Make and store a key; returns the secret, which is kept nowhere. Raises ConfigError for a taken name."""
        secret = f"pk-{secrets.token_urlsafe(32)}"
        key = Key(name, _digest(secret), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), concurrency, per_minute)
        with self._locked() as keys:
            if any(each.name == name for each in keys):
                raise ConfigError(f"{self.path}: a key named {name!r} exists; revoke it first or take another name")
            self._write([*keys, key])
        return secret

    def revoke(self, name: str) -> None:
        """Remove a key; a server that runs refuses it from its next request on. Raises ConfigError if there is none."""
        with self._locked() as keys:
            left = [key for key in keys if key.name != name]
            if len(left) == len(keys):
                known = ", ".join(key.name for key in keys) or "none"
                raise ConfigError(f"{self.path}: no key named {name!r}; it has {known}")
            self._write(left)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[tuple[Key, ...]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield self.read()
        finally:
            os.close(directory)

    def _parse(self) -> tuple[Key, ...]:
        try:
            raw: Any = json.loads(self.path.read_bytes())
            if raw["version"] != VERSION:
                raise ConfigError(f"version {raw['version']!r}, expected {VERSION}")
            return tuple(Key(**each) for each in raw["keys"])
        except (ValueError, TypeError, KeyError, ConfigError) as error:
            raise ConfigError(f"{self.path}: not a file of keys ({error}); repair it or make keys anew") from None

    def _write(self, keys: list[Key]) -> None:
        """Replace the file as a whole; only its owner may read it."""
        text = json.dumps({"version": VERSION, "keys": [dataclasses.asdict(key) for key in keys]}, indent=1)
        place = {"dir": self.path.parent, "delete": False}  # made with mode 0600
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", **place) as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path)


def _digest(secret: str) -> str:
    return hashlib.blake2b(secret.encode("utf-8", "surrogatepass"), digest_size=32, person=b"pelagos key").hexdigest()
