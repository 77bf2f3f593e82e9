"""The trajectory log of one sandbox: append-only, hash-chained, fsynced; what was asked, what came of it, in one order.

Format and promises: `docs/sandbox.md`. It refuses to open what does not verify, to run a request twice, and to give
one request id two meanings. It knows nothing of processes: the keeper, its only writer, asks before and tells after.
"""

import base64
import contextlib
import fcntl
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pelagos.errors import SandboxError, TrajectoryError, UnknownOutcome

FORMAT = 1
INLINE_BYTES = 4096  # a blob up to here goes into its record: a file of its own costs two more fsyncs
GENESIS = "0" * 64
NAME = "log.jsonl"


@dataclass(frozen=True, slots=True)
class Stored:
    """A request that was done before: how it ended ("ok", "error", "abandoned"), its value and its blobs."""

    status: str
    value: dict[str, Any]
    blobs: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Begun:
    """A request that may run now, once; hand it to `finish`."""

    request_id: str
    op: str
    args: dict[str, Any]
    args_sha: str
    intent: int | None  # its record, or None for an operation that changes nothing


@dataclass(slots=True)
class _Request:
    args_sha: str
    op: str
    intent: int | None
    running: bool = False
    result: tuple[int, str] | None = None  # offset of the result's line and the hash before it


class TrajectoryLog:
    """One writer's view of a log directory; `create` or `open` it, `close` it."""

    def __init__(self, directory: Path, fd: int, header: dict[str, Any]) -> None:
        self.directory, self.header = directory, header
        self._fd, self._size, self._seq, self._head = fd, 0, 0, GENESIS
        self._requests: dict[str, _Request] = {}
        self._failed: str | None = None
        self._entered = False  # whether the directory entry is known to be on disk

    @classmethod
    def create(cls, directory: Path, header: Mapping[str, Any]) -> Self:
        """Start a log in `directory`, which must not hold one; it is on disk when the first intent is."""
        directory.mkdir(parents=True, exist_ok=True)
        path, draft = directory / NAME, directory / f"{NAME}.new"
        if path.exists():
            raise TrajectoryError(f"{path}: there is a log already; open it, or choose another sandbox id")
        record = {"seq": 0, "kind": "header", "format": FORMAT, "time": round(time.time(), 3), **header}
        with draft.open("wb") as file:
            file.write(_line(GENESIS, _body(record))[0])
        os.replace(draft, path)
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Verify a log, cut a torn tail, take the writer's lock; TrajectoryError for damage or a second writer."""
        path = directory / NAME
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise TrajectoryError(f"{path}: {error.strerror}; is this a sandbox directory?") from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrajectoryError(f"{path}: another process writes this log; one keeper at a time") from None
            log: Self | None = None
            for previous, head, record, offset, end in _verified(path):
                if log is None:
                    log = cls(directory, fd, record)
                log._index(offset, previous, record)
                log._size, log._seq, log._head = end, record["seq"], head
            if log is None:
                raise TrajectoryError(f"{path}: no header; the log is damaged")
            if log._size < os.fstat(fd).st_size:
                os.ftruncate(fd, log._size)
                os.fsync(fd)
            return log
        except BaseException:
            os.close(fd)
            raise

    @property
    def head(self) -> str:
        """The hash that stands for everything logged so far; keep it elsewhere to notice a log cut short."""
        return self._head

    @property
    def failed(self) -> bool:
        """Whether a record could not be written, so that only opening again tells what is there."""
        return self._failed is not None

    def begin(self, request_id: str, op: str, args: Mapping[str, Any], *, pure: bool = False) -> Stored | Begun:
        """Ask to run a request: its stored result, or leave to run it, its intent on disk unless it is `pure`.

        Raises TrajectoryError where the id was used for something else, UnknownOutcome where an intent has no result.
        """
        plain, blobs = _take_blobs(args)
        args_sha = hashlib.sha256(_body({"op": op, "args": plain})).hexdigest()
        known = self._requests.get(request_id)
        if known is not None:
            if known.args_sha != args_sha:
                raise TrajectoryError(
                    f"request {request_id!r} diverges: the log has {known.op} with arguments {known.args_sha[:12]}, "
                    f"got {op} with {args_sha[:12]}; the program that is resumed is not the one that ran"
                )
            if known.result is not None:
                return self._stored(*known.result)
            if known.running:
                raise SandboxError(f"request {request_id!r} is running; wait for its result")
            if known.intent is not None:
                raise UnknownOutcome(
                    f"request {request_id!r} ({op}, record {known.intent}) began and has no result: it may have run. "
                    f"Look, then resolve({request_id!r}, 'rerun') or resolve({request_id!r}, 'abandon')"
                )
        intent = None
        kept = {name: self._keep(data, sync=not pure) for name, data in blobs.items()}
        stored_args = plain | {name: {"$blob": blob} for name, blob in kept.items()}
        if not pure:
            asked = {"request": request_id, "op": op, "args": stored_args, "args_sha": args_sha}
            intent = self._append("intent", asked)
        self._requests[request_id] = _Request(args_sha, op, intent, running=True)
        return Begun(request_id, op, stored_args, args_sha, intent)

    def finish(self, begun: Begun, status: str, value: Mapping[str, Any], blobs: Mapping[str, bytes]) -> None:
        """Record what came of a request; on return it is on disk (a pure one: in the file)."""
        known = self._requests[begun.request_id]
        pure = begun.intent is None
        record: dict[str, Any] = {"request": begun.request_id, "op": begun.op, "intent": begun.intent, "status": status}
        if pure:
            record |= {"args": begun.args, "args_sha": begun.args_sha}
        record |= {"value": dict(value), "blobs": {k: self._keep(v, sync=not pure) for k, v in blobs.items()}}
        place = (self._size, self._head)
        self._append("result", record, sync=not pure)
        known.result, known.running = place, False

    def event(self, name: str, **facts: Any) -> None:
        """Record something that is no request and that nothing depends on; it is on disk when the next intent is."""
        self._append("event", {"event": name, **facts}, sync=False)

    def resolve(self, request_id: str, how: str) -> None:
        """Decide an UNKNOWN request: "rerun" lets it run when asked again, "abandon" makes it an error for good.

        The same decision again changes nothing: who made it may have been killed before it was told.
        """
        known = self._requests.get(request_id)
        if how not in ("rerun", "abandon"):
            raise SandboxError(f"resolve({request_id!r}, {how!r}): expected 'rerun' or 'abandon'")
        if known and not known.running:
            decided = "rerun" if known.intent is None and known.result is None else ""
            if known.result is not None and self._stored(*known.result).status == "abandoned":
                decided = "abandon"
            if how == decided:
                return
        if known is None or known.result is not None or known.running or known.intent is None:
            raise SandboxError(f"request {request_id!r} is not of unknown outcome; nothing to resolve")
        if how == "rerun":
            self._append("event", {"event": "resolve", "request": request_id, "how": how})
            known.intent = None
            return
        place = (self._size, self._head)
        message = "abandoned: it began and its outcome was never known"
        record = {"request": request_id, "op": known.op, "intent": known.intent, "status": "abandoned"}
        self._append("result", record | {"value": {"message": message}, "blobs": {}})
        known.result = place

    def unknown(self) -> list[str]:
        """Request ids that began, have no result and do not run."""
        return [k for k, r in self._requests.items() if r.intent is not None and r.result is None and not r.running]

    def close(self) -> None:
        """Sync and let go of the log."""
        if self._fd >= 0:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _index(self, offset: int, previous: str, record: dict[str, Any]) -> None:
        if record["kind"] == "intent":
            self._requests[record["request"]] = _Request(record["args_sha"], record["op"], record["seq"])
        elif record["kind"] == "result":
            if record["intent"] is None:
                self._requests[record["request"]] = _Request(record["args_sha"], record["op"], None)
            self._requests[record["request"]].result = (offset, previous)
        elif record["kind"] == "event" and record["event"] == "resolve":
            self._requests[record["request"]].intent = None

    def _append(self, kind: str, facts: Mapping[str, Any], *, sync: bool = True) -> int:
        if self._failed is not None or self._fd < 0:
            raise TrajectoryError(f"{self.directory / NAME}: closed to writing ({self._failed or 'closed'})")
        seq = self._seq + 1
        line, head = _line(self._head, _body({"seq": seq, "kind": kind, "time": round(time.time(), 3), **facts}))
        with self._writing():
            if os.write(self._fd, line) != len(line):
                raise OSError(28, "the disk took part of a record")
            if sync:
                os.fdatasync(self._fd)
                if not self._entered:
                    _sync_directory(self.directory)
                    self._entered = True
        self._size, self._seq, self._head = self._size + len(line), seq, head
        return seq

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        # After a failed write or fsync the kernel may have dropped pages: only opening again tells what is there.
        try:
            yield
        except OSError as error:
            self._failed = str(error)
            raise TrajectoryError(f"{self.directory / NAME}: cannot append ({error}); free space, open again") from None

    def _keep(self, data: bytes, *, sync: bool) -> dict[str, Any]:
        blob: dict[str, Any] = {"sha": hashlib.sha256(data).hexdigest(), "size": len(data)}
        if len(data) <= INLINE_BYTES:
            try:
                return blob | {"text": data.decode("utf-8")}
            except UnicodeDecodeError:
                return blob | {"base64": base64.b64encode(data).decode("ascii")}
        path = self.directory / "blobs" / blob["sha"]
        if not path.exists():
            with self._writing():
                if not path.parent.exists():
                    path.parent.mkdir()
                    _sync_directory(self.directory)
                draft = path.with_suffix(".new")
                with draft.open("wb") as file:
                    file.write(data)
                    file.flush()
                    if sync:
                        os.fsync(file.fileno())
                os.replace(draft, path)
                if sync:
                    _sync_directory(path.parent)
        return blob

    def _stored(self, offset: int, previous: str) -> Stored:
        with (self.directory / NAME).open("rb") as file:
            file.seek(offset)
            record = _checked(self.directory / NAME, offset, previous, file.readline())[1]
        blobs = {name: read_blob(self.directory, blob) for name, blob in record["blobs"].items()}
        return Stored(record["status"], record["value"], blobs)


def read_records(directory: Path) -> Iterator[dict[str, Any]]:
    """Verify a log while reading it, without the writer's lock; a torn tail is left alone."""
    return (record for _, _, record, *_ in _verified(directory / NAME))


def read_blob(directory: Path, blob: Mapping[str, Any]) -> bytes:
    """Return a blob a record names, checked against its hash."""
    if "text" in blob:
        data = blob["text"].encode("utf-8")
    elif "base64" in blob:
        data = base64.b64decode(blob["base64"])
    else:
        path = directory / "blobs" / blob["sha"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TrajectoryError(f"{path}: {error.strerror}; the log names this blob") from None
    if hashlib.sha256(data).hexdigest() != blob["sha"]:
        raise TrajectoryError(f"{directory}: blob {blob['sha'][:12]} does not match its hash; restore it from a copy")
    return data


def verify(directory: Path, *, head: str | None = None) -> tuple[int, str]:
    """Check every record and blob; return (records, head). TrajectoryError where `head` is not in the chain."""
    count, last, seen = 0, GENESIS, head is None
    for _, last, record, *_ in _verified(directory / NAME):
        count, seen = count + 1, seen or last == head
        for blob in [*record.get("blobs", {}).values(), *_named_blobs(record.get("args", {}))]:
            read_blob(directory, blob)
    if not seen:
        raise TrajectoryError(f"{directory / NAME}: head {head} is not in the chain; the log was cut or replaced")
    return count, last


def export(directory: Path, target: Path) -> str:
    """Write a verified log and its blobs as one tar, the same bytes for the same log; return the head."""
    _, head = verify(directory)
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in [directory / NAME, *sorted((directory / "blobs").glob("*"))]:
            if path.suffix == ".new":
                continue
            data = path.read_bytes()
            data = data[: data.rfind(b"\n") + 1] if path.name == NAME else data
            info = tarfile.TarInfo(str(path.relative_to(directory)))
            info.size, info.mode = len(data), 0o444
            tar.addfile(info, io.BytesIO(data))
    return head


def provenance(directory: Path, *, blob: str | None = None, path: str | None = None) -> list[dict[str, Any]]:
    """Say where things came from: one line of facts a request, or only those that made `blob` or name `path`."""
    asked: dict[int, dict[str, Any]] = {}
    found = []
    for record in read_records(directory):
        if record["kind"] == "intent":
            asked[record["seq"]] = record
        if record["kind"] != "result":
            continue
        question = asked.pop(record["intent"], record)
        shas = {name: b["sha"] for name, b in record["blobs"].items()}
        shas |= {f"args.{i}": b["sha"] for i, b in enumerate(_named_blobs(question.get("args", {})))}
        if blob is not None and blob not in shas.values():
            continue
        if path is not None and path not in json.dumps(question.get("args", {})):
            continue
        facts = {k: record[k] for k in ("seq", "request", "op", "status", "time")}
        found.append(facts | {"args": question.get("args", {}), "value": record["value"], "blobs": shas})
    return found


def _named_blobs(args: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [v["$blob"] for v in args.values() if isinstance(v, dict) and "$blob" in v]


def _take_blobs(args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Split arguments into JSON, where a blob is its hash, and the blobs."""
    blobs = {name: value for name, value in args.items() if isinstance(value, bytes)}
    plain = {name: value for name, value in args.items() if name not in blobs}
    return plain | {name: {"$sha": hashlib.sha256(data).hexdigest()} for name, data in blobs.items()}, blobs


def _body(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _line(previous: str, body: bytes) -> tuple[bytes, str]:
    head = hashlib.sha256(previous.encode("ascii") + body).hexdigest()
    return b"%s %s\n" % (head.encode("ascii"), body), head


def _checked(path: Path, offset: int, previous: str, line: bytes) -> tuple[str, dict[str, Any]]:
    head, _, body = line[:-1].partition(b" ")
    if not line.endswith(b"\n") or _line(previous, body)[0] != line:
        raise TrajectoryError(f"{path}: the record at byte {offset} does not verify; the log is damaged from there on")
    return head.decode("ascii"), json.loads(body)


def _verified(path: Path) -> Iterator[tuple[str, str, dict[str, Any], int, int]]:
    """(hash before, hash, record, offset, end) of each acknowledged record; a tail without newline ends it quietly."""
    offset, previous, seq = 0, GENESIS, 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                # A record whose newline was changed is damage, not a torn tail: it was acknowledged.
                if _line(previous, line[:-1].partition(b" ")[2])[0][:-1] == line[:-1]:
                    raise TrajectoryError(f"{path}: the record at byte {offset} lost its newline; the log is damaged")
                return
            head, record = _checked(path, offset, previous, line)
            if record["seq"] != seq or (seq == 0 and record.get("format") != FORMAT):
                raise TrajectoryError(
                    f"{path}: record {record['seq']} of format {record.get('format')} at byte {offset}, "
                    f"expected record {seq} of format {FORMAT}"
                )
            yield previous, head, record, offset, offset + len(line)
            offset, previous, seq = offset + len(line), head, seq + 1


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
