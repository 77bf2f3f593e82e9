"""The directory and the files of the prefix cache on disk, byte by byte as docs/cache_format.md describes them.

Owns the secret that hides user ids and binds files to users, the lock between processes, the header, the table and
the checksums, and publication by rename. It keeps no index and starts no thread; POSIX only (flock, preadv).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import stat
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from pelagos.errors import CacheError

Bytes = bytes | bytearray | memoryview  # what holds payloads; a uint8 array passes as memoryview(array)

MAGIC = b"PELAGOSC"
VERSION = 1
PAGES, STATE = 1, 2
KINDS = {PAGES: "pages", STATE: "state"}
HEADER = struct.Struct("<8sII16s16sQQ")  # magic, version, kind, fingerprint, user, count, length; a digest follows
RECORD = struct.Struct("<16s16sQII")  # key, node, position, remainder, crc32
DIGEST_BYTES = 16
_TABLE = HEADER.size + DIGEST_BYTES  # offset of the table
_SECRET_BYTES = 32
USER_OF_KEY = "{}\0{}"  # a user where a server asks for API keys: the name of the key, which has no NUL, and the id
_NAME = re.compile(r"([0-9a-f]{32})\.[0-9a-f]{16}\.(pages|state)(\d{1,4})")
_TAG = re.compile(r"[0-9a-f]{32}")
_TEMP = ".tmp"
_IOV_MAX = 512


class DamagedFile(CacheError):
    """A cache file whose bytes are not those that were published."""


class Record(NamedTuple):
    """One page or state: its key, its place, and the CRC-32 of its data."""

    key: bytes
    node: bytes  # the page-chain node under a state; zeros for pages
    position: int  # tokens before a state; index in its chain of a page
    remainder: int  # tokens between the node and a state
    crc: int = 0


class Table(NamedTuple):
    """What the header and the table of one file say; `length` bytes a record."""

    kind: int
    fingerprint: bytes
    length: int
    records: list[Record]

    @property
    def data(self) -> int:
        """Byte offset of the first record's data."""
        return _TABLE + RECORD.size * len(self.records)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.data + self.length * len(self.records)


class Listed(NamedTuple):
    """One cache file as its directory shows it; `used` is its last use, mtime in nanoseconds."""

    name: str
    fingerprint: bytes
    kind: int
    version: int
    size: int
    used: int


class CacheDirectory:
    """A private directory of cache files: one folder a user, named by a keyed hash of the user id."""

    def __init__(self, root: Path, *, create: bool = True) -> None:
        """Open `root`, making it (0700) and its secret (0600) when `create`.

        Raises CacheError when it is missing or no cache, another user's, or open to others and in other use.
        """
        self.root = root
        self._turn = -1  # the lock's counter when this process held it last
        self.was_alone = False  # `is_alone` just before the lock was taken last
        try:
            self._make_private(create)
            self._lock_fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._secret = self._read_secret() or self._new_secret()
            except BaseException:
                os.close(self._lock_fd)
                raise
        except OSError as error:
            raise CacheError(f"{root}: no cache directory can be had here ({error.strerror}); give another") from error

    def close(self) -> None:
        """Let go of the lock file; nothing else may be called after it."""
        os.close(self._lock_fd)

    def _make_private(self, create: bool) -> None:
        if create:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = os.stat(self.root)
        if info.st_uid != os.geteuid():
            raise CacheError(
                f"{self.root}: owned by uid {info.st_uid}, expected uid {os.geteuid()} that runs this; "
                "a cache holds prompts: give a directory of your own"
            )
        if not create and not (self.root / "secret").exists():
            raise CacheError(f"{self.root}: holds no prefix cache; give the directory that the server was given")
        if info.st_mode & 0o077:
            if os.listdir(self.root) and not (self.root / "secret").exists():
                raise CacheError(
                    f"{self.root}: mode {stat.S_IMODE(info.st_mode):04o} lets others in and it is not empty, expected "
                    "0700; a cache holds prompts: `chmod 700` it or give another directory"
                )
            os.chmod(self.root, 0o700)

    def _read_secret(self) -> bytes | None:
        try:
            with open(self.root / "secret", "rb", opener=_no_link) as file:
                raw = file.read(_SECRET_BYTES + DIGEST_BYTES + 1)
        except FileNotFoundError:
            return None
        return raw[:_SECRET_BYTES] if raw[_SECRET_BYTES:] == _digest(raw[:_SECRET_BYTES]) else None

    def _new_secret(self) -> bytes:
        with self.locked(10.0) as held:
            if not held:
                raise CacheError(f"{self.root}: another process holds its lock; try again when that one goes on")
            secret = self._read_secret()
            if secret is None:  # missing, or damaged: then the files made with it are damaged too
                (self.root / f"secret{_TEMP}").unlink(missing_ok=True)
                secret = secrets.token_bytes(_SECRET_BYTES)
                _publish(self.root, "secret", [secret + _digest(secret)])
        return secret

    @contextlib.contextmanager
    def locked(self, timeout: float) -> Iterator[bool]:
        """Hold the directory's lock, which every process writes, evicts and sweeps under; False when not to be had.

        The system releases it when its holder dies. Every holder counts its counter up, before it changes anything.
        """
        deadline = time.monotonic() + timeout
        held = False
        while not held:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.005)
        try:
            if held:
                self.was_alone = self.is_alone()
                turn = (self._read_turn() + 1) % (1 << 64)
                os.pwrite(self._lock_fd, turn.to_bytes(8, "little"), 0)
                self._turn = turn
            yield held
        finally:
            if held:
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def _read_turn(self) -> int:
        return int.from_bytes(os.pread(self._lock_fd, 8, 0), "little")

    def is_alone(self) -> bool:
        """Whether no other process has held the lock since this one did, so that nothing can have been added."""
        return self._read_turn() == self._turn

    def tag(self, user: str) -> str:
        """The name of a user's folder: a hash keyed by the directory's secret."""
        name = user.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(name, key=self._secret, digest_size=16, person=b"user").hexdigest()

    def _key(self, tag: str) -> bytes:
        return hashlib.blake2b(bytes.fromhex(tag), key=self._secret, digest_size=32, person=b"header").digest()

    def tags(self) -> list[str]:
        """The user folders there are; links and other things are passed over."""
        with os.scandir(self.root) as found:
            return sorted(e.name for e in found if _TAG.fullmatch(e.name) and e.is_dir(follow_symlinks=False))

    def list_files(self, tag: str, *, sweep: bool = False) -> list[Listed]:
        """The cache files of a user; none where there is no such folder.

        sweep: remove torn temporary files, which nobody can be writing while the caller holds the lock.
        Links, other people's files and names that are no cache file's are passed over.
        """
        listed: list[Listed] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / tag) as found:
            for entry in found:
                if sweep and entry.name.endswith(_TEMP):
                    os.unlink(entry.path)
                parts = _NAME.fullmatch(entry.name)
                if parts is None or not entry.is_file(follow_symlinks=False):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    info = entry.stat(follow_symlinks=False)
                    if info.st_uid != os.geteuid():
                        continue
                    kind = PAGES if parts[2] == KINDS[PAGES] else STATE
                    used = min(info.st_mtime_ns, time.time_ns())  # a clock set back must not keep it for ever
                    listed.append(Listed(entry.name, bytes.fromhex(parts[1]), kind, int(parts[3]), info.st_size, used))
        return listed

    def publish(
        self, tag: str, kind: int, fingerprint: bytes, records: Sequence[Record], payloads: Sequence[Bytes]
    ) -> tuple[Listed, Table]:
        """Write one file of records of equal length and return what is there now; whole and durable, or OSError.

        After an error no trace of it is left. The caller holds the lock. `crc` of the records is filled in here.
        """
        summed = [each._replace(crc=zlib.crc32(data)) for each, data in zip(records, payloads, strict=True)]
        table = b"".join(RECORD.pack(*record) for record in summed)
        head = HEADER.pack(MAGIC, VERSION, kind, fingerprint, bytes.fromhex(tag), len(summed), len(payloads[0]))
        (self.root / tag).mkdir(mode=0o700, exist_ok=True)
        name = f"{fingerprint.hex()}.{secrets.token_hex(8)}.{KINDS[kind]}{VERSION}"
        _publish(self.root / tag, name, [head + _digest(head + table, self._key(tag)) + table, *payloads])
        contents = Table(kind, fingerprint, len(payloads[0]), summed)
        return Listed(name, fingerprint, kind, VERSION, contents.size, time.time_ns()), contents

    def read(self, tag: str, name: str, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill buffers in order from a cache file, as far as it goes; never through a link."""
        left = list(buffers)
        with self._open(tag, name) as file:
            if hasattr(os, "posix_fadvise"):  # all of it at once: a tenth faster than the system's reading ahead
                os.posix_fadvise(file.fileno(), offset, sum(map(len, left)), os.POSIX_FADV_WILLNEED)
            while left and (got := os.preadv(file.fileno(), left[:_IOV_MAX], offset)):
                offset += got
                while left and got >= len(left[0]):
                    got -= len(left.pop(0))
                if got:
                    left[0] = left[0][got:]

    def _open(self, tag: str, name: str) -> FileIO:
        return open(self.root / tag / name, "rb", buffering=0, opener=_no_link)

    def read_table(self, tag: str, listed: Listed, *, whole: bool = False) -> Table:
        """Read and check header and table of a file, and its data when `whole`.

        Raises DamagedFile when any bit of them or the file's size is off, CacheError when its name says that it is
        of another format version.
        """
        if listed.version != VERSION:
            raise CacheError(f"{listed.name}: format {listed.version}, this build reads {VERSION}; purge it")
        with self._open(tag, listed.name) as file:
            size = os.fstat(file.fileno()).st_size
            raw = os.pread(file.fileno(), _TABLE, 0)
            if len(raw) < _TABLE:
                raise DamagedFile(f"{listed.name}: {size} bytes, expected at least {_TABLE}")
            magic, version, kind, fingerprint, user, count, length = HEADER.unpack_from(raw)
            if size != _TABLE + count * (RECORD.size + length) or not count:
                raise DamagedFile(f"{listed.name}: {size} bytes, not what its header says: one of them is damaged")
            head, table = raw[: HEADER.size], os.pread(file.fileno(), count * RECORD.size, _TABLE)
            if raw[HEADER.size :] != _digest(head + table, self._key(tag)):
                raise DamagedFile(f"{listed.name}: its header or table is damaged, or it is another user's")
            found = magic, version, kind, fingerprint, user.hex()
            if found != (MAGIC, VERSION, listed.kind, listed.fingerprint, tag):
                raise DamagedFile(f"{listed.name}: its header names another kind, model or user than its place does")
            contents = Table(kind, fingerprint, length, [Record(*fields) for fields in RECORD.iter_unpack(table)])
            for index, record in enumerate(contents.records if whole else ()):
                if zlib.crc32(os.pread(file.fileno(), length, contents.data + index * length)) != record.crc:
                    raise DamagedFile(f"{listed.name}: record {index} of {count} fails its checksum")
        return contents

    def remove_user(self, tag: str) -> int:
        """Remove a user's folder and return the number of cache files that were in it; the caller holds the lock."""
        listed = self.list_files(tag, sweep=True)
        for each in listed:
            (self.root / tag / each.name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something that is not ours may be in it
            os.rmdir(self.root / tag)
        return len(listed)


def _publish(folder: Path, name: str, parts: Sequence[Bytes]) -> None:
    temp, place = name + _TEMP, os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=place)
        try:
            for part in parts:
                left = memoryview(part)
                while left:
                    left = left[os.write(fd, left) :]
            os.fsync(fd)
            os.rename(temp, name, src_dir_fd=place, dst_dir_fd=place)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temp, dir_fd=place)
            raise
        finally:
            os.close(fd)
        os.fsync(place)
    finally:
        os.close(place)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _digest(data: bytes, key: bytes = b"") -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=key).digest()
