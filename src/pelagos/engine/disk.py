"""The prefix cache on disk: finished pages and states of past prompts, back without prefill after a restart.

Owns the index in memory, the reader and writer threads, quotas and eviction; `disk_file` owns the bytes, and
docs/cache_format.md describes them. Nothing here waits for a disk on the caller's thread, and nothing damaged,
torn, of another model or of another user is ever returned: what is not certain is a miss.
Source: technical report 6.2 (full, periodic and zero storage of window state).
"""

from __future__ import annotations

import collections
import errno
import hashlib
import heapq
import os
import re
import threading
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pelagos.engine.disk_file import PAGES, STATE, VERSION, Bytes, CacheDirectory, DamagedFile, Listed, Record, Table
from pelagos.errors import CacheError, ConfigError

KEY_BYTES = 16
QUEUE_BYTES = 256 << 20  # the most that waits to be written
_RUN_BYTES = 64 << 20  # the most page data in one file: what one eviction takes
_PART_BYTES = 8 << 20  # what one reader takes at a time
_PART_RECORDS = 512
_MAX_READERS = 8  # some check what they have read while the others keep the disk busy
_TICK_S = 1.0  # how often last uses are written down and other processes' files looked for
_LOCK_S = 10.0
_PAUSE_S = (1.0, 60.0)  # after a failed write, doubling from the first to the second


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
    """Read `full`, `periodic(P)` (alone: 8 pages), `zero` or `turns`; ConfigError otherwise or for P between pages."""
    found = re.fullmatch(r"\s*(?:(full|zero|turns)|periodic(?:\(\s*(\d{1,12})\s*\))?)\s*", str(text))
    if found is None:
        raise ConfigError(f"disk_policy={text!r}: expected full, periodic(P), zero or turns, as in periodic(1024)")
    if found[1]:
        return StatePolicy(found[1], page_tokens if found[1] == "full" else 0)
    period = int(found[2] or 8 * page_tokens)
    if period == 0 or period % page_tokens:
        raise ConfigError(f"disk_policy={text!r}: expected a period > 0 that is a multiple of {page_tokens} tokens")
    return StatePolicy("periodic", period)


@dataclass(slots=True, eq=False)
class _File:
    """One file in the directory; those of other models and other format versions have no keys."""

    tag: str
    name: str
    kind: int
    size: int
    used: int  # nanoseconds; ahead of its mtime until the next tick
    data: int = 0  # byte offset of the first record
    length: int = 0  # bytes of each
    keys: tuple[bytes, ...] = ()
    crcs: array[int] = field(default_factory=lambda: array("I"))
    node: bytes = b""  # of a state


@dataclass(slots=True)
class _User:
    files: dict[str, _File] = field(default_factory=dict)
    spots: dict[bytes, tuple[_File, int]] = field(default_factory=dict)  # key -> file, index in its table
    nodes: dict[bytes, dict[bytes, int]] = field(default_factory=dict)  # node -> state key -> remainder
    size: int = 0


class _Job(NamedTuple):
    tag: str
    kind: int
    records: list[Record]
    payloads: list[bytes]

    @property
    def size(self) -> int:
        return sum(map(len, self.payloads))


@dataclass(slots=True, eq=False)
class _Part:
    """Consecutive records of one file that one reader reads for a ticket, and how many came back intact."""

    file: _File
    first: int
    buffers: list[memoryview]
    intact: int = 0


@dataclass(slots=True, eq=False)
class Ticket:
    """One asynchronous read. Look at `pages` and `state` once `done()`: until then the buffers are the readers'."""

    _parts: list[_Part] = field(default_factory=list)
    _parts_left: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)
    _cancelled: bool = False

    @property
    def pages(self) -> list[memoryview]:
        """The leading pages asked for that came back intact, of page_bytes each (of `into`, if given)."""
        found: list[memoryview] = []
        for part in (part for part in self._parts if part.file.kind == PAGES):
            found += part.buffers[: part.intact]
            if part.intact < len(part.buffers):
                break
        return found

    @property
    def state(self) -> memoryview | None:
        """The payload of the state, or None when it was not asked for, is gone or is damaged."""
        last = self._parts[-1] if self._parts else None
        return last.buffers[0] if last and last.file.kind == STATE and last.intact else None

    def done(self) -> bool:
        """Whether the read has ended, well or not; never waits."""
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the read has ended and return `done()`."""
        return self._ended.wait(timeout)

    def cancel(self) -> None:
        """Give up what has not been read yet; `done()` follows soon, and only then may `into` be used again."""
        self._cancelled = True


class DiskCache:
    """Pages and states of one model in one directory, shared with other processes and other models.

    Keys are the prefix cache's, 16 bytes each. Every method may be called from any thread and returns without I/O,
    but the constructor (reads the tables of all files), `flush` and `close`.
    """

    def __init__(
        self, root: Path, *, fingerprint: bytes, page_bytes: int, quota_bytes: int, user_quota_bytes: int | None = None,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:  # fmt: skip
        """Open or create the cache directory `root` (mode 0700) and index what it holds for `fingerprint`.

        fingerprint: all that must be equal for bytes to be exchangeable: model, mode, numeric path, layout version.
        quota_bytes bounds all files in `root`, whoever wrote them; user_quota_bytes those of one user.
        queue_bytes bounds what waits to be written. Raises CacheError when the directory belongs to another user,
        is open to others and in other use, or cannot be made; ConfigError for a size that is not > 0.
        """
        user_quota_bytes = quota_bytes if user_quota_bytes is None else user_quota_bytes
        sizes = {"page_bytes": page_bytes, "disk quota": quota_bytes, "disk quota of a user": user_quota_bytes}
        for name, value in (sizes | {"disk queue": queue_bytes}).items():
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ConfigError(f"{name} {value!r}: expected a whole number of bytes > 0")
        self._page_bytes, self._quota, self._user_quota = page_bytes, quota_bytes, user_quota_bytes
        self._queue_room = queue_bytes
        identity = b"".join(len(part).to_bytes(8, "little") + part for part in (fingerprint, b"%d" % page_bytes))
        self._fingerprint = hashlib.blake2b(identity, digest_size=16, person=b"model").digest()
        self._directory = CacheDirectory(root)
        self._wake = threading.Condition()  # guards everything below
        self._users: dict[str, _User] = {}
        self._bytes = 0
        self._queue: collections.deque[_Job] = collections.deque()
        self._queued_bytes = 0  # of the job being written too
        self._touched: set[_File] = set()
        self._unsure: set[str] = set()  # users of whom something was not found: another process may have written it
        self._paused_until, self._pause_s = 0.0, _PAUSE_S[0]
        self._closing = self._closed = False
        names = "hits misses written written_bytes dropped damaged evicted errors"
        self._counts: collections.Counter[str] = collections.Counter(dict.fromkeys(names.split(), 0))
        with self._directory.locked(_TICK_S) as held:
            self._refresh(sweep=held)
            for tag in ("", *self._users) if held else ():
                self._make_room(tag, 0)
        readers = max(1, min(_MAX_READERS, (os.cpu_count() or 1) // 2))  # the other half is for the model
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="pelagos-disk-reader")
        self._writer = threading.Thread(target=self._work, name="pelagos-disk-writer", daemon=True)
        self._writer.start()

    def known_pages(self, user: str, keys: Sequence[bytes]) -> int:
        """How many leading pages of this chain are on disk, as far as the index knows; counts as a use of them."""
        with self._wake:
            found = self._find(self._directory.tag(user), keys)
            self._touch(file for file, _ in found)
            return len(found)

    def known_states(self, user: str, node_key: bytes) -> list[tuple[int, bytes]]:
        """(remainder tokens, state key) of the states stored under a node of the page chain, longest first."""
        with self._wake:
            place = self._users.get(self._directory.tag(user))
            states = place.nodes.get(node_key, {}) if place else {}
            return sorted(((remainder, key) for key, remainder in states.items()), reverse=True)

    def read(
        self, user: str, page_keys: Sequence[bytes], state_key: bytes | None = None, *,
        into: Sequence[memoryview] | None = None,
    ) -> Ticket:  # fmt: skip
        """Start reading leading pages of a chain and a state; what is not in the index is simply not delivered.

        `into`: one writable buffer of page_bytes for each page, filled in place (rows of a page pool); otherwise fresh
        memory, which takes the system longer to get than to fill.
        """
        if into is not None:
            into = [memoryview(each).cast("B") for each in into]
            if len(into) != len(page_keys) or any(len(each) != self._page_bytes or each.readonly for each in into):
                raise CacheError(f"read into {len(into)} buffers: expected {len(page_keys)} x {self._page_bytes} bytes")
        ticket = Ticket()
        most = max(1, min(_PART_RECORDS, _PART_BYTES // self._page_bytes))
        with self._wake:
            tag = self._directory.tag(user)
            place, parts = self._users.get(tag, _User()), ticket._parts
            for at, (file, index) in enumerate([] if self._closing else self._find(tag, page_keys)):
                part = parts[-1] if parts else None
                follows = part is not None and part.file is file and part.first + len(part.buffers) == index
                if part is None or not follows or len(part.buffers) == most:
                    parts.append(part := _Part(file, index, []))
                part.buffers.append(into[at] if into else memoryview(bytearray(file.length)))
            if state_key in place.spots and not self._closing:
                file, index = place.spots[state_key]
                parts.append(_Part(file, index, [memoryview(bytearray(file.length))]))
            self._touch(part.file for part in parts)
            asked = len(page_keys) + (state_key is not None)
            self._counts["misses"] += asked - sum(len(part.buffers) for part in parts)
            ticket._parts_left = len(parts)
            for part in parts:
                self._readers.submit(self._read_part, ticket, part)
        if not parts:
            ticket._ended.set()
        return ticket

    def write_pages(self, user: str, items: Sequence[tuple[bytes, Bytes]], *, first: int = 0) -> None:
        """Queue consecutive pages of one chain, (key, page_bytes bytes) each, `first` the index of the first of them.

        One call makes one file (of at most 64 MiB, else several): prefer one call a prompt to one a page. Pages on
        disk already are left out and count as used. Buffers other than `bytes` are copied before this returns; what
        the queue has no room for is dropped and counted.
        """
        records = [Record(key, bytes(KEY_BYTES), first + i, 0) for i, (key, _) in enumerate(items)]
        self._enqueue(user, PAGES, records, [data for _, data in items])

    def drop(self, count: int) -> None:
        """Count pages as dropped that could not be brought here."""
        with self._wake:
            self._counts["dropped"] += count

    def write_state(self, user: str, node_key: bytes, remainder: int, key: bytes, position: int, data: Bytes) -> None:
        """Queue one state at `position`, `remainder` tokens behind a node of the page chain; else as `write_pages`."""
        self._enqueue(user, STATE, [Record(key, node_key, position, remainder)], [data])

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was queued is on disk or dropped; False when `timeout` seconds were not enough."""
        with self._wake:
            return self._wake.wait_for(lambda: not self._queued_bytes, timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Flush, then end the threads; later writes are dropped and later reads deliver nothing. Returns as `flush`."""
        with self._wake:
            if self._closing:
                return not self._queued_bytes
            self._closing = True
            self._wake.notify_all()
        flushed = self.flush(timeout)
        with self._wake:
            for job in self._queue:
                self._counts["dropped"] += len(job.records)
                self._queued_bytes -= job.size
            self._queue.clear()
            self._closed = True
            self._wake.notify_all()
        self._readers.shutdown(wait=False)
        if flushed:
            self._writer.join()
            self._directory.close()
        return flushed

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is there now.

        hits, misses: pages and states that reads asked for and got or did not get. written, written_bytes, dropped:
        pages and states. damaged, evicted: files. files, bytes: all in the directory. queued_bytes.
        errors, and error_ENOSPC and the like by kind.
        """
        with self._wake:
            files = sum(len(place.files) for place in self._users.values())
            return dict(self._counts) | {"files": files, "bytes": self._bytes, "queued_bytes": self._queued_bytes}

    def _find(self, tag: str, keys: Sequence[bytes]) -> list[tuple[_File, int]]:
        place = self._users.get(tag, _User())
        found = []
        for key in keys:
            spot = place.spots.get(key)
            if spot is None:
                self._unsure.add(tag)
                break
            found.append(spot)
        return found

    def _touch(self, files: Iterable[_File]) -> None:
        """Note a use now, of each later file a little earlier: the end of a chain must go before its beginning."""
        now = time.time_ns()
        for age, file in enumerate(dict.fromkeys(files)):
            file.used = now - age
            self._touched.add(file)

    def _enqueue(self, user: str, kind: int, records: Sequence[Record], payloads: Sequence[Bytes]) -> None:
        sizes = {memoryview(data).nbytes for data in payloads}
        if 0 in sizes or (kind == PAGES and sizes - {self._page_bytes}):
            raise CacheError(f"write of {max(sizes)} bytes: expected page_bytes={self._page_bytes}, or a state's > 0")
        for wrong in (key for record in records for key in record[:2] if len(key) != KEY_BYTES):
            raise CacheError(f"cache key of {len(wrong)} bytes: expected {KEY_BYTES}")
        tag = self._directory.tag(user)
        with self._wake:
            place = self._users.get(tag, _User())
            known = place.spots
            self._touch(known[record.key][0] for record in records if record.key in known)
            new = [each for each in zip(records, payloads, strict=True) if each[0].key not in known]
            length = max(sizes, default=1)
            open_ = not self._closing and time.monotonic() >= self._paused_until
            kept = new[: (self._queue_room - self._queued_bytes) // length if open_ else 0]
            self._counts["dropped"] += len(new) - len(kept)
            self._queued_bytes += length * len(kept)
        run = max(1, _RUN_BYTES // length)
        for at in range(0, len(kept), run):
            part = kept[at : at + run]
            job = _Job(tag, kind, [each for each, _ in part], [bytes(data) for _, data in part])
            with self._wake:
                self._queue.append(job)
                self._wake.notify_all()

    # A reader's thread.

    def _read_part(self, ticket: Ticket, part: _Part) -> None:
        file = part.file
        try:
            if not (ticket._cancelled or self._closed):
                self._directory.read(file.tag, file.name, part.buffers, file.data + part.first * file.length)
                for buffer, crc in zip(part.buffers, file.crcs[part.first :], strict=False):
                    if zlib.crc32(buffer) != crc:
                        self._condemn(file)
                        break
                    part.intact += 1
        except FileNotFoundError:  # evicted by another process: a miss
            self._forget(file)
        except OSError as error:
            self._unindex(file)
            self._count_error(error)
        finally:
            with self._wake:
                ticket._parts_left -= 1
                if not ticket._parts_left:
                    hits = len(ticket.pages) + (ticket.state is not None)
                    self._counts["hits"] += hits
                    self._counts["misses"] += sum(len(each.buffers) for each in ticket._parts) - hits
                    ticket._ended.set()

    def _condemn(self, file: _File) -> None:
        if self._forget(file):  # by the first reader that finds it so
            with self._wake:
                self._counts["damaged"] += 1
            self._path(file).unlink(missing_ok=True)

    # The writer's thread: the only one that lists, writes and evicts.

    def _work(self) -> None:
        next_tick = time.monotonic() + _TICK_S
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closed, max(0, next_tick - time.monotonic()))
                job = self._queue.popleft() if self._queue else None
                if job is None and self._closed:
                    break
            if job is not None:
                written = False
                if time.monotonic() >= self._paused_until:
                    try:
                        written = self._write(job)
                        self._pause_s = _PAUSE_S[0]
                    except OSError as error:
                        self._count_error(error)
                        self._refresh_user(job.tag, sweep=False)  # it may have failed after the file had its name
                        self._paused_until = time.monotonic() + self._pause_s
                        self._pause_s = min(2 * self._pause_s, _PAUSE_S[1])
                with self._wake:
                    self._counts["dropped"] += 0 if written else len(job.records)
                    self._queued_bytes -= job.size
                    self._wake.notify_all()
            if time.monotonic() >= next_tick:
                self._tick()
                next_tick = time.monotonic() + _TICK_S
        self._tick()

    def _tick(self) -> None:
        with self._wake:
            touched, self._touched = self._touched, set()
            unsure, self._unsure = self._unsure, set()
        for file in touched:
            try:
                os.utime(self._path(file), ns=(file.used, file.used), follow_symlinks=False)
            except FileNotFoundError:
                self._forget(file)
            except OSError as error:
                self._count_error(error)
        if unsure and not self._directory.is_alone():
            for tag in unsure:
                self._refresh_user(tag, sweep=False)

    def _write(self, job: _Job) -> bool:
        with self._directory.locked(_LOCK_S) as held:
            if not held:
                raise OSError(errno.EBUSY, "another process holds the lock")
            if not self._directory.was_alone:
                self._refresh(sweep=True)
            place = self._users.get(job.tag, _User())
            new = [each for each in zip(job.records, job.payloads, strict=True) if each[0].key not in place.spots]
            if not new:
                return True
            records, payloads = (list(each) for each in zip(*new, strict=True))
            if not self._make_room(job.tag, Table(job.kind, b"", len(payloads[0]), records).size):
                return False
            listed, table = self._directory.publish(job.tag, job.kind, self._fingerprint, records, payloads)
            with self._wake:
                self._add(job.tag, listed, table)
                self._counts["written"] += len(records)
                self._counts["written_bytes"] += sum(map(len, payloads))
        return True

    def _make_room(self, tag: str, size: int) -> bool:
        """Evict the least recently used files until `size` more bytes of a user fit both quotas; holds the lock."""
        place = self._users.get(tag, _User())
        if size > min(self._quota, self._user_quota):
            return False
        return self._evict([place], lambda: place.size + size <= self._user_quota) and self._evict(
            list(self._users.values()), lambda: self._bytes + size <= self._quota
        )

    def _evict(self, places: list[_User], fits: Callable[[], bool]) -> bool:
        if fits():
            return True
        with self._wake:
            oldest = [(file.used, file.name, file) for place in places for file in place.files.values()]
        heapq.heapify(oldest)
        while oldest and not fits():
            used, name, file = heapq.heappop(oldest)
            try:
                latest = os.lstat(self._path(file)).st_mtime_ns  # others use files too
                if used < max(file.used, latest) <= time.time_ns():
                    heapq.heappush(oldest, (max(file.used, latest), name, file))
                    continue
                self._path(file).unlink()
                with self._wake:
                    self._counts["evicted"] += 1
            except FileNotFoundError:  # by another process
                pass
            except OSError as error:
                self._count_error(error)
                continue
            self._forget(file)
        return fits()

    def _path(self, file: _File) -> Path:
        return self._directory.root / file.tag / file.name

    def _refresh(self, *, sweep: bool) -> None:
        """Look for what other processes wrote and removed; sweep torn files away when the lock is held."""
        for tag in {*self._directory.tags(), *self._users}:
            self._refresh_user(tag, sweep=sweep)

    def _refresh_user(self, tag: str, *, sweep: bool) -> None:
        try:
            listed = self._directory.list_files(tag, sweep=sweep)
        except OSError as error:
            self._count_error(error)
            return
        known = self._users.get(tag, _User()).files
        names = {each.name for each in listed}
        for file in [file for file in list(known.values()) if file.name not in names]:
            self._forget(file)
        for each in listed:
            if each.name not in known:
                self._admit(tag, each)
        with self._wake:
            if tag in self._users and not self._users[tag].files:
                del self._users[tag]
        if sweep and not listed:
            self._directory.remove_user(tag)

    def _admit(self, tag: str, listed: Listed) -> None:
        table = None
        try:
            try:
                if (listed.fingerprint, listed.version) == (self._fingerprint, VERSION):
                    table = self._directory.read_table(tag, listed)
            except DamagedFile:
                with self._wake:
                    self._counts["damaged"] += 1
                return (self._directory.root / tag / listed.name).unlink(missing_ok=True)
        except FileNotFoundError:
            return
        except OSError as error:  # one that is damaged and stays is counted once, and its bytes like all others
            self._count_error(error)
        with self._wake:
            self._add(tag, listed, table)

    # The index; callers hold `_wake`, or these take it.

    def _add(self, tag: str, listed: Listed, table: Table | None) -> None:
        file = _File(tag, listed.name, listed.kind, listed.size, listed.used)
        place = self._users.setdefault(tag, _User())
        place.files[file.name] = file
        place.size += file.size
        self._bytes += file.size
        if table is None:
            return
        file.data, file.length = table.data, table.length
        file.keys = tuple(record.key for record in table.records)
        file.crcs.extend(record.crc for record in table.records)
        for index, record in enumerate(table.records):
            place.spots.setdefault(record.key, (file, index))
            if file.kind == STATE:
                file.node = record.node
                place.nodes.setdefault(record.node, {})[record.key] = record.remainder

    def _forget(self, file: _File) -> bool:
        with self._wake:
            place = self._users.get(file.tag)
            if place is None or place.files.pop(file.name, None) is not file:
                return False
            place.size -= file.size
            self._bytes -= file.size
            self._touched.discard(file)
            self._unindex(file)
            return True

    def _unindex(self, file: _File) -> None:
        """Make a file one that is only counted."""
        with self._wake:
            place = self._users.get(file.tag, _User())
            for key in file.keys:
                if key in place.spots and place.spots[key][0] is file:
                    del place.spots[key]
                    if file.kind == STATE:
                        del place.nodes[file.node][key]
            if file.kind == STATE and not place.nodes.get(file.node, True):
                del place.nodes[file.node]

    def _count_error(self, error: OSError) -> None:
        with self._wake:
            self._counts["errors"] += 1
            self._counts[f"error_{errno.errorcode.get(error.errno or 0, 'unknown')}"] += 1
