"""The keeper of one sandbox: takes requests on a socket, asks the log, drives the substrate, tells the log, answers.

It outlives its clients and ends on `close` or after `ttl_s` without a request. Keepers are forked from a nursery, since
starting Python costs more than starting a sandbox. A request is one connection: a JSON line and payload in, frames out.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import signal
import socket
import stat
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pelagos.errors import PelagosError, SandboxError, TrajectoryError, UnknownOutcome
from pelagos.sandbox import linux
from pelagos.sandbox.api import Command, Spec, Substrate
from pelagos.sandbox.container import Container
from pelagos.sandbox.function import Function
from pelagos.sandbox.layers import Store, pack
from pelagos.sandbox.log import Begun, Stored, TrajectoryLog

SOCKET = "s"
SPEC = "spec.json"
FILE_BYTES = 64 << 20  # one file through the control channel; more travels as an image
WATCH_S = 0.2
DRAIN_BYTES = 1 << 16
PURE = frozenset(
    ("read", "list")
)  # change nothing that stays, as nothing stateless does: no intent, may be asked again
KINDS = {"unknown": UnknownOutcome, "trajectory": TrajectoryError, "sandbox": SandboxError}

# The substrates that exist; each takes (the sandbox's directory, the directory of layers, spec).
SUBSTRATES: dict[str, Callable[[Path, Path, Spec], Substrate]] = {"container": Container, "function": Function}

Emit = Callable[[str, bytes], None]
Outcome = tuple[dict[str, Any], dict[str, bytes]]


def _make(box: Path, layers: Path, spec: Spec) -> Substrate:
    """Return the substrate of a spec, not yet started, once it has every flag the spec requires."""
    if spec.substrate not in SUBSTRATES:
        raise SandboxError(f"substrate {spec.substrate!r}: expected one of {', '.join(SUBSTRATES)}")
    substrate = SUBSTRATES[spec.substrate](box, layers, spec)
    try:
        substrate.capabilities.check(spec.require)
    except SandboxError:
        substrate.stop()
        raise
    return substrate


class Keeper:
    """One sandbox's state machine; runs in a process of its own."""

    def __init__(self, box: Path, store: Store, spec: Spec) -> None:
        self._box, self._store, self._spec = box, store, spec
        exists = (box / "log.jsonl").exists()
        self._log = TrajectoryLog.open(box) if exists else TrajectoryLog.create(box, {"spec": dataclasses.asdict(spec)})
        if self._log.header["spec"] != json.loads(json.dumps(dataclasses.asdict(spec))):
            raise SandboxError(f"{box}: the log's spec differs from {SPEC}; this directory was tampered with")
        if exists:
            self._log.event("start")
        self._substrate: Substrate = _make(box, store.layers, spec)
        self._running: dict[str, tuple[str, dict[str, Any], asyncio.Future[dict[str, Any]]]] = {}
        self._active, self._last, self._paused = 0, time.monotonic(), False
        self._over_disk, self._most_disk = False, 0
        self._still = asyncio.Lock()  # what needs the files to stand still: one at a time
        self._done = asyncio.Event()

    async def serve(self, ready: int) -> None:
        """Start the sandbox, say so on `ready`, and answer until closed or idle."""
        path = self._box / SOCKET
        try:
            self._substrate.start()
            path.unlink(missing_ok=True)
            with short_name(self._box) as short:
                server = await asyncio.start_unix_server(self._answer, f"{short}/{SOCKET}", limit=1 << 24)
            path.chmod(0o600)
        except BaseException:
            self._substrate.stop()
            raise
        os.write(ready, json.dumps(dataclasses.asdict(self._substrate.capabilities)).encode())
        os.close(ready)
        watch = asyncio.create_task(self._watch())
        try:
            await self._done.wait()
        finally:
            watch.cancel()
            server.close()
            path.unlink(missing_ok=True)
            self._substrate.stop()
            self._log.close()

    async def _watch(self) -> None:
        """Mind the disk and the idle time."""
        limit = self._spec.limits.disk_mb * 1024 * 1024
        pause = WATCH_S
        while True:
            busy = self._active > 0
            await asyncio.sleep(pause if busy else min(1.0, self._spec.ttl_s / 4))
            began = time.monotonic()
            if not self._active and began - self._last > self._spec.ttl_s:
                self._done.set()
            if self._substrate.capabilities.files == "none" or not self._substrate.alive():
                continue
            try:
                used = int(await self._task(lambda out: _tell_disk(self._substrate.upper_fd, out), as_owner=True))
            except SandboxError:
                continue  # it ended meanwhile
            # What lay there when the sandbox came back over its limit may stay, so that it can be deleted.
            if used > max(limit, self._most_disk):
                self._over_disk, self._most_disk = True, used
                self._substrate.stop()
            pause = max(WATCH_S, 10 * (time.monotonic() - began))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._active += 1
        try:
            ask = json.loads(await reader.readline())
            payload = await reader.readexactly(ask["size"]) if ask.get("size") is not None else None

            def emit(name: str, data: bytes) -> None:
                if not writer.is_closing():
                    writer.write(json.dumps({"event": name, "size": len(data)}).encode() + b"\n" + data)

            done = await self._request(ask, payload, emit)
            blobs = done.pop("blobs")
            done["blobs"] = {name: len(data) for name, data in blobs.items()}
            writer.write(json.dumps({"done": done}).encode() + b"\n" + b"".join(blobs.values()))
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away; what it asked for goes on and is logged
        finally:
            self._active -= 1
            self._last = time.monotonic()
            with contextlib.suppress(ConnectionError):
                writer.close()

    async def _request(self, ask: dict[str, Any], payload: bytes | None, emit: Emit) -> dict[str, Any]:
        """Return `{"status", "value", "blobs", "replayed"}`; errors are statuses too."""
        op, args, request = ask["op"], ask["args"], ask["request"]
        try:
            if op in ("close", "info", "resolve"):
                return {"status": "ok", "value": self._control(op, args), "blobs": {}}
            if payload is not None:
                args = args | {"data": payload}
            if (known := self._running.get(request)) and known[:2] == (op, args):
                return dict(await asyncio.shield(known[2]))
            self._revive()
            stateless = self._substrate.capabilities.files == "none"
            begun = self._log.begin(request, op, args, pure=stateless or op in PURE)
            if isinstance(begun, Stored):
                return {"status": begun.status, "value": begun.value, "blobs": begun.blobs, "replayed": True}
            future: asyncio.Future[dict[str, Any]] = asyncio.ensure_future(self._run(begun, op, args, emit))
            self._running[request] = (op, args, future)
            return dict(await asyncio.shield(future))
        except PelagosError as error:
            kind = next(k for k, c in {**KINDS, "sandbox": PelagosError}.items() if isinstance(error, c))
            return {"status": "refused", "value": {"kind": kind, "message": str(error)}, "blobs": {}}

    def _revive(self) -> None:
        """Start the sandbox again where it ended; a request that cannot have one is refused before it is logged."""
        if not self._substrate.alive():
            self._substrate.stop()
            self._over_disk = False
            self._substrate = _make(self._box, self._store.layers, self._spec)
            self._substrate.start()
            self._log.event("start")

    async def _run(self, begun: Begun, op: str, args: dict[str, Any], emit: Emit) -> dict[str, Any]:
        try:
            try:
                if self._paused and op not in ("pause", "resume"):
                    self._substrate.pause(False)
                    self._paused = False
                    self._log.event("resume")
                value, blobs = await getattr(self, f"_op_{op}")(emit=emit, **args)
                status = "ok"
            except PelagosError as error:
                status, value, blobs = "error", {"message": str(error)}, {}
            except Exception as error:
                # The request began, so it must end in the log; what went wrong is ours and is told as such.
                traceback.print_exc()
                status, value, blobs = "error", {"message": f"{type(error).__name__}: {error}"}, {}
            self._log.finish(begun, status, value, blobs)
            return {"status": status, "value": value, "blobs": blobs}
        finally:
            self._running.pop(begun.request_id, None)

    def _control(self, op: str, args: dict[str, Any]) -> dict[str, Any]:
        if op == "close":
            self._done.set()
            return {}
        if op == "resolve":
            self._log.resolve(args["request_id"], args["how"])
            return {}
        return {
            "usage": self._substrate.usage(), "head": self._log.head, "unknown": self._log.unknown(),
            "active": self._active - 1, "pid": os.getpid(),
            "capabilities": dataclasses.asdict(self._substrate.capabilities),
        }  # fmt: skip

    async def _op_exec(self, *, emit: Emit, argv: list[str], env: dict[str, str], cwd: str, timeout: float | None,
                       data: bytes = b"") -> Outcome:  # fmt: skip
        return await self._command(Command(argv=tuple(argv), env=env, cwd=cwd), timeout, data, emit)

    async def _op_call(self, *, emit: Emit, source: str, arguments: str, timeout: float | None) -> Outcome:
        if self._spec.substrate != "function":
            raise SandboxError(f"{self._spec.substrate}: no warm worker to call; use exec, or substrate='function'")
        return await self._command(Command(call=source, arguments=arguments), timeout, b"", emit)

    async def _command(self, command: Command, timeout: float | None, data: bytes, emit: Emit) -> Outcome:
        kills = self._substrate.usage().get("oom_kills", 0)
        streams = [_Stream(name, self._spec.limits.output_bytes, emit) for name in ("stdout", "stderr")]
        began = time.perf_counter()
        with tempfile.TemporaryFile() as stdin:
            stdin.write(data)
            stdin.seek(0)
            child = self._substrate.spawn(command, (stdin.fileno(), streams[0].write_fd, streams[1].write_fd))
        try:
            for stream in streams:
                stream.listen()
            report = asyncio.ensure_future(until_end(child.status_fd, close=False))
            timed_out = not (await asyncio.wait([report], timeout=timeout))[0]
            if timed_out:
                child.kill()
                if self._paused:
                    await self._op_resume(emit=emit)  # what is frozen does not die
            line = await report
            wall_ms = round((time.perf_counter() - began) * 1e3, 3)
        finally:
            for stream in streams:
                stream.close()
            child.reap()
        killed_by = None
        if self._over_disk:
            killed_by = "disk"
        elif self._substrate.alive() and self._substrate.usage().get("oom_kills", 0) > kills:
            killed_by = "memory"
        told, returned = json.loads(line or b"{}"), None
        with contextlib.suppress(ValueError):  # the inside wrote this text, so it may be anything
            returned = json.loads(told.get("value") or "null")
        value = {
            "exit_code": told.get("exit_code", -signal.SIGKILL), "truncated": any(s.truncated for s in streams),
            "wall_ms": wall_ms, "timed_out": timed_out, "killed_by": killed_by,
            "value": returned,
        }  # fmt: skip
        return value, {stream.name: bytes(stream.kept) for stream in streams}

    async def _op_read(self, *, emit: Emit, path: str) -> Outcome:
        def task(out: int) -> None:
            fd = _open_regular(path, os.O_RDONLY)
            if os.fstat(fd).st_size > FILE_BYTES:
                raise OSError(f"{path}: more than {FILE_BYTES} bytes; use pack_diff")
            while piece := os.read(fd, 1 << 20):
                _write_all(out, piece)

        return {}, {"data": await self._task(task)}

    async def _op_write(self, *, emit: Emit, path: str, data: bytes, mode: int) -> Outcome:
        def task(out: int) -> None:
            os.umask(0o022)
            os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
            fd = _open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
            _write_all(fd, data)
            os.fchmod(fd, mode)

        if len(data) > FILE_BYTES:
            raise SandboxError(f"{path}: {len(data)} bytes, at most {FILE_BYTES} in one write; use an image")
        await self._task(task)
        return {"size": len(data)}, {}

    async def _op_list(self, *, emit: Emit, path: str) -> Outcome:
        def task(out: int) -> None:
            found = []
            for entry in sorted(os.scandir(path), key=lambda e: e.name):
                facts = entry.stat(follow_symlinks=False)
                kind = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
                found.append([entry.name, kind.get(stat.S_IFMT(facts.st_mode), "other"), facts.st_size,
                              stat.S_IMODE(facts.st_mode)])  # fmt: skip
            _write_all(out, json.dumps(found).encode())

        return {}, {"entries": await self._task(task)}

    async def _op_snapshot(self, *, emit: Emit) -> Outcome:
        with tempfile.TemporaryFile(dir=self._store.root) as file:
            await self._pack_into(file)
            digest = self._store.add_canonical(file)
        return {"layer": digest, "base": self._spec.base, "layers": [*self._spec.layers, digest]}, {}

    async def _op_pack_diff(self, *, emit: Emit) -> Outcome:
        with tempfile.TemporaryFile(dir=self._store.root) as file:
            await self._pack_into(file)
            file.seek(0)
            return {}, {"diff": file.read()}

    async def _pack_into(self, file: Any) -> None:
        """Pack the upper directory while everything inside stands still."""
        most = int(self._spec.limits.disk_mb * 1024 * 1024)

        def task(out: int) -> None:
            with os.fdopen(out, "wb", closefd=False) as pipe:
                pack(self._substrate.upper_fd, pipe, most=most)

        async with self._still:
            self._substrate.pause(True)
            try:
                file.write(await self._task(task, as_owner=True))
            finally:
                self._substrate.pause(False)

    async def _op_pause(self, *, emit: Emit, on: bool = True) -> Outcome:
        self._substrate.pause(on)
        self._paused = on
        return {}, {}

    async def _op_resume(self, *, emit: Emit) -> Outcome:
        return await self._op_pause(emit=emit, on=False)

    async def _task(self, task: Callable[[int], Any], *, as_owner: bool = False) -> bytes:
        """Run a task among the sandbox's files and return what it wrote; SandboxError with its complaint."""
        if self._substrate.capabilities.files == "none":
            raise SandboxError(f"{self._spec.substrate}: stateless, it has no files to reach (files=none)")
        out, out_w = os.pipe()
        pid = self._substrate.inside(task, out_w, as_owner=as_owner)
        os.close(out_w)
        data = await until_end(out)
        if os.waitpid(pid, 0)[1] != 0:
            at = data.rfind(b'{"error": ')
            raise SandboxError(json.loads(data[at:])["error"] if at >= 0 else "killed while it read the files")
        return data


class _Stream:
    """One output pipe: keeps the first `most` bytes, reads on slowly and drops the rest."""

    def __init__(self, name: str, most: int, emit: Emit) -> None:
        self.name, self.kept, self.truncated = name, bytearray(), False
        self._most, self._emit, self._closing = most, emit, False
        self._fd, self.write_fd = os.pipe()
        os.set_blocking(self._fd, False)
        self._loop, self._again = asyncio.get_running_loop(), None

    def listen(self) -> None:
        """Let go of the write end, which the command has now, and take what comes."""
        os.close(self.write_fd)
        self.write_fd = -1
        self._loop.add_reader(self._fd, self._take)

    def _take(self) -> bool:
        try:
            data = os.read(self._fd, DRAIN_BYTES)
        except BlockingIOError:
            return False
        new = data[: self._most - len(self.kept)]
        self.kept += new
        self.truncated |= len(new) < len(data)
        if new:
            self._emit(self.name, new)
        if not data or (self.truncated and not self._closing):
            self._loop.remove_reader(self._fd)
        if data and self.truncated and not self._closing:
            # A flood is read at some 60 MB/s, so that it costs the host little and the command still ends.
            self._again = self._loop.call_later(0.001, self._loop.add_reader, self._fd, self._take)
        return bool(data)

    def close(self) -> None:
        """Take what is in the pipe, wait for nobody, and close."""
        self._closing = True
        self._loop.remove_reader(self._fd)
        if self._again is not None:
            self._again.cancel()
        if self.write_fd >= 0:
            os.close(self.write_fd)
        while self._take() and not self.truncated:
            pass
        os.close(self._fd)


async def until_end(fd: int, *, close: bool = True) -> bytes:
    """Read a pipe to its end without a thread."""
    loop, ended, data = asyncio.get_running_loop(), asyncio.Event(), bytearray()
    os.set_blocking(fd, False)

    def take() -> None:
        with contextlib.suppress(BlockingIOError):
            piece = os.read(fd, 1 << 20)
            data.extend(piece)
            if not piece:
                loop.remove_reader(fd)
                ended.set()

    loop.add_reader(fd, take)
    try:
        await ended.wait()
        return bytes(data)
    finally:
        loop.remove_reader(fd)
        if close:
            os.close(fd)


def _open_regular(path: str, flags: int, mode: int = 0) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, mode)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(f"{path}: not a regular file")
    return fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _tell_disk(directory: int, out: int) -> None:
    """Write the bytes on disk under a descriptor's directory, each file once however many names it has."""
    total, seen = 0, set()
    for _, _, files, fd in os.fwalk(".", dir_fd=directory, onerror=None):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                facts = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if facts.st_nlink == 1 or facts.st_ino not in seen:
                    seen.add(facts.st_ino)
                    total += facts.st_blocks * 512 + 256
    os.write(out, b"%d" % total)


@contextlib.contextmanager
def short_name(directory: Path) -> Any:
    """A short name for a directory: a socket's path has 107 bytes at most."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def nursery() -> None:
    """Fork a keeper for each (directory, pipe) that comes on descriptor 0, until the client is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    with socket.socket(fileno=0) as sock:
        while True:
            data, fds, _, _ = socket.recv_fds(sock, 65536, 1)
            if not data:
                return
            linux.fork(lambda: (sock.close(), _keep(Path(os.fsdecode(data)), fds[0])), traceback.print_exception)  # noqa: B023
            os.close(fds[0])


def _keep(box: Path, ready: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    notes = os.open(box / "keeper.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, fd in enumerate((null, null, notes)):
        os.dup2(fd, number)
    os.umask(0o077)

    async def run() -> None:
        spec = Spec.from_dict(json.loads((box / SPEC).read_text(encoding="utf-8")))
        await Keeper(box, Store(box.parents[1]), spec).serve(ready)

    try:
        asyncio.run(run())
    except BaseException as error:
        if not isinstance(error, PelagosError):
            traceback.print_exc()
        with contextlib.suppress(OSError):  # the client is gone, or this comes after `ready` was told
            os.write(ready, json.dumps({"error": f"{error}" or type(error).__name__}).encode())
