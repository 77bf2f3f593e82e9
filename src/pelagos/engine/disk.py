"""The prefix cache on disk: finished pages and states of past prompts, back without prefill after a restart.

Owns the index in memory, the reader and writer threads, quotas and eviction; `disk_file` owns the bytes, and
docs/cache_format.md describes them. Nothing here waits for a disk on the caller's thread, and nothing damaged,
torn, of another model or of another user is ever returned: what is not certain is a miss.
Source: technical report 6.2 (full, periodic and zero storage of window state).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pelagos.errors import ConfigError

Bytes = bytes | bytearray | memoryview  # uint8 ndarrays pass as memoryview(array)


@dataclass(frozen=True, slots=True)
class StatePolicy:
    """Which positions of a prompt leave a state on disk: `full`, `periodic` (every `period` tokens), `zero` or `turns`.

    `full` is `periodic` at one page: window states one page apart hold the window row of every token once.
    """

    name: str
    period: int = 0

    def keeps(self, position: int, kind: str) -> bool:
        """Whether the state at `position` is stored; `kind` is interior, cut (a likely fork) or end (of the output)."""
        if self.name == "turns":
            return kind != "interior"
        return self.period > 0 and position > 0 and position % self.period == 0

    def positions(self, begin: int, end: int, cuts: Sequence[int] = ()) -> list[int]:
        """The positions in begin+1..end whose state is stored when `end` is an end and `cuts` are cuts, ascending."""
        if self.name == "turns":
            return sorted({p for p in (*cuts, end) if begin < p <= end})
        return list(range(begin - begin % self.period + self.period, end + 1, self.period)) if self.period else []


def parse_policy(text: str, page_tokens: int) -> StatePolicy:
    """Read `full`, `periodic(P)`, `zero` or `turns`; ConfigError otherwise or when P is no multiple of `page_tokens`."""
    found = re.fullmatch(r"\s*(?:(full|zero|turns)|periodic\(\s*(\d{1,12})\s*\))\s*", text)
    if found is None:
        raise ConfigError(f"disk_policy={text!r}: expected full, periodic(P), zero or turns, as in periodic(1024)")
    if found[1]:
        return StatePolicy(found[1], page_tokens if found[1] == "full" else 0)
    period = int(found[2])
    if period == 0 or period % page_tokens:
        raise ConfigError(f"disk_policy={text!r}: expected a period > 0 that is a multiple of {page_tokens} tokens")
    return StatePolicy("periodic", period)


class Ticket:
    """One asynchronous read. Look at `pages` and `state` once `done()`; until then the buffers belong to the readers.

    `pages`: the leading pages asked for that came back intact, memoryviews of page_bytes each (of `into`, if given).
    `state`: the payload of the state, or None when it was not asked for, is gone or is damaged.
    """

    pages: list[memoryview]
    state: bytes | bytearray | None

    def done(self) -> bool:
        """Whether the read has ended, well or not; never waits."""
        raise NotImplementedError

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the read has ended and return `done()`."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Give up what has not been read yet; `done()` follows soon, and only then may `into` be used again."""
        raise NotImplementedError


class DiskCache:
    """Pages and states of one model in one directory, shared with other processes and other models.

    Keys are the prefix cache's, 16 bytes each. Every method may be called from any thread and returns without I/O,
    but the constructor (reads the tables of all files), `flush` and `close`.
    """

    def __init__(
        self,
        root: Path,
        *,
        fingerprint: bytes,
        page_bytes: int,
        quota_bytes: int,
        user_quota_bytes: int | None = None,
        queue_bytes: int = 256 << 20,
    ) -> None:
        """Open or create the cache directory `root` (mode 0700) and index what it holds for `fingerprint`.

        fingerprint: all that must be equal for bytes to be exchangeable: model, mode, numeric path, layout version.
        quota_bytes bounds all files in `root`, whoever wrote them; user_quota_bytes those of one user.
        queue_bytes bounds what waits to be written. Raises CacheError when the directory belongs to another user,
        is open to others and not ours to close, or cannot be made; ConfigError for a size that is not > 0.
        """
        raise NotImplementedError

    def known_pages(self, user: str, keys: Sequence[bytes]) -> int:
        """How many leading pages of this chain are on disk, as far as the index knows; counts as a use of them."""
        raise NotImplementedError

    def known_states(self, user: str, node_key: bytes) -> list[tuple[int, bytes]]:
        """(remainder tokens, state key) of the states stored under a node of the page chain, longest first."""
        raise NotImplementedError

    def read(
        self,
        user: str,
        page_keys: Sequence[bytes],
        state_key: bytes | None = None,
        *,
        into: Sequence[memoryview] | None = None,
    ) -> Ticket:
        """Start reading leading pages of a chain and a state; what is not in the index is simply not delivered.

        `into`: one writable buffer of page_bytes for each page, filled in place (rows of a page pool); fresh memory
        otherwise.
        """
        raise NotImplementedError

    def write_pages(self, user: str, items: Sequence[tuple[bytes, Bytes]], *, first: int = 0) -> None:
        """Queue consecutive pages of one chain, (key, page_bytes bytes) each, `first` the index of the first of them.

        One call makes one file (of at most 64 MiB, else several): prefer one call a prompt to one a page. Pages on
        disk already are left out. Buffers other than `bytes` are copied before this returns; what the queue has no
        room for is dropped and counted.
        """
        raise NotImplementedError

    def write_state(
        self, user: str, node_key: bytes, remainder: int, key: bytes, position: int, payload: Bytes
    ) -> None:
        """Queue one state at `position`, `remainder` tokens behind the page chain's node; as `write_pages` otherwise."""
        raise NotImplementedError

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was queued is on disk or dropped; False when `timeout` seconds were not enough."""
        raise NotImplementedError

    def close(self, timeout: float | None = None) -> bool:
        """Flush, then end the threads; later writes are dropped and later reads deliver nothing."""
        raise NotImplementedError

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is there now.

        hits, misses: pages and states that reads asked for and got or did not get. written, written_bytes, dropped:
        pages and states. damaged, evicted: files. files, bytes: all in the directory. queued_bytes.
        errors, and error_ENOSPC and the like by kind.
        """
        raise NotImplementedError
