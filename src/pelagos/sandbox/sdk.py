"""The client's face of a sandbox: `AsyncSandbox`, and `Sandbox` with the same methods for programs without a loop.

A client holds no state that matters: every request is one connection to the sandbox's keeper, named by a request id.
Where the keeper is gone a new one is started and asked again; the log makes that safe.
"""

import asyncio
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from pelagos.errors import SandboxError
from pelagos.sandbox import keeper, linux, log
from pelagos.sandbox.api import MOST, Capabilities, ExecResult, FileInfo, Limits, Spec
from pelagos.sandbox.layers import Image, Store, default_store, remove_tree

T = TypeVar("T")
P = ParamSpec("P")
Sink = Callable[[bytes], None]
CLOSE_S = 10.0
READ_BYTES = 1 << 16
SPEC_BYTES = keeper.ASK_BYTES - 4096  # of one message, with which it goes on to who makes it
_NURSING = threading.Lock()  # one nursery, however many threads ask first


def _loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs, None for a caller that just waits: `Sandbox`, which needs no loop."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def _sleep(seconds: float) -> None:
    await asyncio.sleep(seconds) if _loop() else time.sleep(seconds)


class _Link:
    """One connection to a keeper; it belongs to no event loop between two uses."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self._in = sock, bytearray()

    @classmethod
    async def to(cls, directory: Path) -> Self:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with keeper.short_name(directory) as short:
                sock.connect(f"{short}/{keeper.SOCKET}")  # a keeper takes it whatever it does at the moment
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def _in_loop(self) -> asyncio.AbstractEventLoop | None:
        loop = _loop()
        if self.sock.getblocking() == bool(loop):
            self.sock.setblocking(not loop)
        return loop

    async def send(self, data: bytes) -> None:
        loop = self._in_loop()
        await loop.sock_sendall(self.sock, data) if loop else self.sock.sendall(data)

    async def take(self, size: int | None = None) -> bytes:
        """Return `size` bytes or a line."""
        loop = self._in_loop()
        while (end := self._in.find(b"\n") + 1 if size is None else size) > len(self._in) or (size is None and not end):
            piece = await loop.sock_recv(self.sock, READ_BYTES) if loop else self.sock.recv(READ_BYTES)
            if not piece:
                raise ConnectionResetError("the keeper ended before it answered")
            self._in += piece
        data = bytes(self._in[:end])
        del self._in[:end]
        return data


def _hang_up(links: list[_Link]) -> None:
    while links:
        links.pop().sock.close()


class AsyncSandbox:
    """One sandbox; make it with `create`, come back to it with `open`, end it with `close` or `async with`."""

    def __init__(self, store: Store, spec: Spec, session: str) -> None:
        self.spec, self.store = spec, store
        self.id, self.directory = spec.id, store.box(spec.id)
        self.files = AsyncFiles(self)
        self.capabilities: Capabilities  # how strong each promise is here; known when `create` or `open` returns
        self._session, self._count, self._pid = session, 0, os.getpid()
        self._idle: list[_Link] = []  # connections nobody asks on
        weakref.finalize(self, _hang_up, self._idle)

    @classmethod
    async def create(
        cls, *, substrate: str = "container", image: Image | None = None, cpu: float = 1.0, memory_mb: int = 512,
        disk_mb: int = 1024, processes: int = 128, open_files: int = 1024, output_bytes: int = 1 << 20,
        ttl_s: float = 900.0, network: str | Sequence[str] = "none", id: str | None = None,
        require: Mapping[str, str] | None = None, store: Store | None = None,
    ) -> Self:  # fmt: skip
        """Start a sandbox; SandboxError names what the host lacks, or the first flag of `require` it has not."""
        for name, value, kind in (("substrate", substrate, str), ("image", image, Image | None),
                                  ("store", store, Store | None), ("require", require, Mapping | None)):  # fmt: skip
            if not isinstance(value, kind):
                raise SandboxError(f"{name}={value!r}: expected {getattr(kind, '__name__', kind)}")
        store = store or default_store()
        image = image or Image.host(store)
        listed = isinstance(network, Sequence) and not isinstance(network, str)
        names = tuple(network) if listed else ()
        parts = [re.fullmatch(r"[a-z0-9.-]+(?::(\d{1,5}))?", n) if isinstance(n, str) else None for n in names]
        if not (listed or network == "none") or not all(p and 0 < int(p[1] or 80) < 65536 for p in parts):
            said = "expected 'none' or names like example.org, .example.net, 10.0.0.1:8080"
            raise SandboxError(f"network={network!r}: {said}")
        limits = Limits(cpu=cpu, memory_mb=memory_mb, disk_mb=disk_mb, processes=processes, open_files=open_files,
                        output_bytes=output_bytes)  # fmt: skip
        spec = Spec(id=id or f"{substrate[:1]}-{secrets.token_hex(6)}", substrate=substrate, base=image.base,
                    layers=image.layers, limits=limits, ttl_s=ttl_s, require=dict(require or {}),
                    network=names)  # fmt: skip
        # A digest is a name, never a path: who names layers over the service must not reach what lies beside them.
        missing = [d for d in image.layers if not re.fullmatch("[0-9a-f]{64}", d) or not (store.layers / d).is_dir()]
        if missing:
            raise SandboxError(f"layer {missing[0][:12]} is not in {store.layers}; make the image with this store")
        if isinstance(ttl_s, bool) or not isinstance(ttl_s, (int, float)) or not 0 < ttl_s <= MOST:
            raise SandboxError(f"ttl_s={ttl_s!r:.40}: expected a number > 0, <= {MOST:.0e}")
        for digest in image.layers:
            os.utime(store.layers / digest)  # `Store.collect` leaves what was used lately
        box = cls(store, spec, "")
        try:
            box.directory.mkdir(mode=0o711)
        except FileExistsError:
            raise SandboxError(f"sandbox {spec.id!r} exists; open it, or choose another id") from None
        try:
            box.directory.chmod(0o711)
            try:
                flags = await box._start_keeper()
            except ConnectionError:  # a spare one that was killed this moment
                flags = await box._start_keeper() or (await box.info())["capabilities"]
            box.capabilities = Capabilities(**flags)
        except BaseException as error:
            remove_tree(box.directory)
            if isinstance(error, OSError):
                raise SandboxError(f"sandbox {spec.id}: cannot be made ({error}); is the disk full?") from None
            raise
        return box

    @classmethod
    async def open(cls, id: str, *, replay: bool = False, store: Store | None = None) -> Self:
        """Come back to a sandbox; with `replay`, requests are numbered from the first and get stored results."""
        store = store or default_store()
        path = store.box(id) / keeper.SPEC
        try:
            spec = Spec.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise SandboxError(f"{path}: {error.strerror}; is {id!r} a sandbox of this store?") from None
        box = cls(store, spec, "" if replay else f"{secrets.token_hex(4)}.")
        box.capabilities = Capabilities(**(await box.info())["capabilities"])
        return box

    async def exec(
        self, command: str | Sequence[str], *, timeout: float | None = 60.0, env: Mapping[str, str] | None = None,
        cwd: str = "/workspace", stdin: bytes = b"", on_stdout: Sink | None = None, on_stderr: Sink | None = None,
        request_id: str | None = None,
    ) -> ExecResult:  # fmt: skip
        """Run a command (text goes to `sh -c`) and return what came of it; a stored result calls no sink.

        Raises UnknownOutcome where this request began before and never ended, TrajectoryError where it was another.
        """
        args = {"argv": _words(command), "env": dict(env or {}), "cwd": cwd, "timeout": timeout}
        return _result(await self._ask("exec", args, stdin or None, request_id, on_stdout, on_stderr))

    async def terminal(
        self, command: str | Sequence[str] = ("bash",), *, name: str = "tty", rows: int = 24, columns: int = 80,
        timeout: float | None = 3600.0, env: Mapping[str, str] | None = None, cwd: str = "/workspace",
        on_output: Sink | None = None, request_id: str | None = None,
    ) -> ExecResult:  # fmt: skip
        """Run a command on a terminal of its own until it ends; `type` writes to it. What it says is in `stdout`."""
        args = {"argv": _words(command), "env": dict(env or {}), "cwd": cwd, "timeout": timeout, "name": name,
                "rows": rows, "columns": columns}  # fmt: skip
        return _result(await self._ask("terminal", args, None, request_id, on_output))

    async def type(
        self, data: bytes | str, *, name: str = "tty", size: tuple[int, int] | None = None,
        request_id: str | None = None,
    ) -> int:  # fmt: skip
        """Type into a terminal that is open, and give it another size; return how many bytes it took."""
        args = {"name": name, "size": list(size) if size else None}
        return (await self._ask("type", args, data, request_id))[0]["written"]

    async def call(self, source: str, *arguments: Any, timeout: float | None = 60.0, request_id: str | None = None
                   ) -> ExecResult:  # fmt: skip
        """Run `main(*arguments)` of Python source in a warm worker (substrate "function"); see the result's `value`."""
        args = {"source": source, "arguments": json.dumps(arguments), "timeout": timeout}
        return _result(await self._ask("call", args, None, request_id))

    async def snapshot(self, *, request_id: str | None = None) -> Image:
        """Keep the files as they are as an image of one more layer."""
        value, _, _ = await self._ask("snapshot", {}, None, request_id)
        return Image(value["base"], tuple(value["layers"]))

    async def pack_diff(self, *, request_id: str | None = None) -> bytes:
        """Return what differs from the image as a tar for `Image.with_tar`."""
        return (await self._ask("pack_diff", {}, None, request_id))[1]["diff"]

    async def pause(self, *, request_id: str | None = None) -> None:
        """Stop every process; the next request lets them go on."""
        await self._ask("pause", {}, None, request_id)

    async def resume(self, *, request_id: str | None = None) -> None:
        """Let a paused sandbox go on."""
        await self._ask("resume", {}, None, request_id)

    async def fork(self, n: int, *, request_id: str | None = None) -> list[Self]:
        """Return n new sandboxes that start from this one's files (not its processes)."""
        image = await self.snapshot(request_id=request_id)
        made = [type(self).create(image=image, store=self.store, **_options(self.spec)) for _ in range(n)]
        return list(await asyncio.gather(*made))

    async def resolve(self, request_id: str, how: str) -> None:
        """Decide a request of unknown outcome: "rerun" lets it run when asked again, "abandon" makes it an error."""
        await self._ask("resolve", {"request_id": request_id, "how": how}, None, "")

    async def info(self) -> dict[str, Any]:
        """Return usage, the log's head, requests of unknown outcome and the keeper's pid."""
        return (await self._ask("info", {}, None, ""))[0]

    async def close(self, *, keep: bool = False) -> None:
        """End the sandbox; files and log are deleted unless `keep`. Closing twice is no error."""
        _hang_up(self._idle)  # to a keeper that may have ended since, and another be there
        with contextlib.suppress(OSError):  # no keeper, nothing to tell
            await self._exchange({"op": "close", "args": {"keep": keep}, "request": ""}, None, {})
        _hang_up(self._idle)
        deadline = time.monotonic() + CLOSE_S
        while not _unlocked(self.directory / log.NAME):
            if time.monotonic() > deadline:
                raise SandboxError(f"sandbox {self.id}: its keeper did not end within {CLOSE_S:.0f} s")
            await _sleep(0.002)
        if not keep:
            remove_tree(self.directory)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(
        self, op: str, args: dict[str, Any], payload: bytes | str | None, request_id: str | None,
        on_stdout: Sink | None = None, on_stderr: Sink | None = None,
    ) -> tuple[dict[str, Any], dict[str, bytes], bool]:  # fmt: skip
        """Return (value, blobs, replayed) of a request, starting the keeper where there is none."""
        if self._pid != os.getpid():  # a fork of our process numbers its own requests, and asks on its own links
            self._pid, self._session = os.getpid(), f"{self._session}{os.getpid()}."
            _hang_up(self._idle)
        if request_id is None:
            self._count += 1
            request_id = f"{self._session}{self._count}"
        ask = {"op": op, "args": args, "request": request_id}
        payload = payload.encode() if isinstance(payload, str) else payload
        sinks = {"stdout": on_stdout, "stderr": on_stderr}
        attempts = 4
        while True:
            try:
                done, blobs = await self._exchange(ask, payload, sinks)
                break
            except OSError as error:
                if error.errno not in (None, errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE):
                    raise
                attempts -= 1
                if not attempts or not (self.directory / keeper.SPEC).exists():
                    raise SandboxError(f"sandbox {self.id}: closed, or its keeper does not stay ({error})") from None
                with contextlib.suppress(ConnectionError):  # that one was killed too
                    await self._start_keeper()
        if done["status"] == "ok":
            return done["value"], blobs, done.get("replayed", False)
        kind, message = done["value"].get("kind", "sandbox"), done["value"]["message"]
        raise keeper.KINDS[kind](message)

    async def _exchange(
        self, ask: dict[str, Any], payload: bytes | None, sinks: Mapping[str, Sink | None]
    ) -> tuple[dict[str, Any], dict[str, bytes]]:
        link = self._idle.pop() if self._idle else await _Link.to(self.directory)
        try:
            head = ask | {"size": None if payload is None else len(payload)}
            await link.send(json.dumps(head).encode() + b"\n" + (payload or b""))
            while True:
                frame = json.loads(await link.take())
                if "done" in frame:
                    sizes = frame["done"].pop("blobs")
                    blobs = {name: await link.take(size) for name, size in sizes.items()}
                    self._idle.append(link)
                    return frame["done"], blobs
                data = await link.take(frame["size"])
                if (sink := sinks.get(frame["event"])) is not None:
                    sink(data)
        except BaseException:
            link.sock.close()
            _hang_up(self._idle)  # where the keeper ended, all of them did
            raise

    def _hand_over(self, ready: int) -> None:
        asked = json.dumps([str(self.directory), dataclasses.asdict(self.spec)]).encode()
        if len(asked) > SPEC_BYTES:
            raise SandboxError(f"layers, network and require take {len(asked)} bytes, at most {SPEC_BYTES}; name fewer")
        with _NURSING:
            while True:
                try:
                    with socket.socket(fileno=os.dup(_nursery())) as sock:
                        socket.send_fds(sock, [asked], [ready])
                    return
                except ConnectionError:  # it was killed: start another
                    os.close(_nursery())
                    _nursery.cache_clear()

    async def _start_keeper(self) -> dict[str, str]:
        """Start a keeper and return its sandbox's flags, nothing where another keeper has the log."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._hand_over(theirs.fileno())
            try:
                told = json.loads(await _Link(ours).take())
            except ConnectionError:
                raise ConnectionResetError("its keeper ended without a word") from None
        if "error" in told:
            if "another process writes" in told["error"]:
                await _sleep(0.05)  # another client was quicker, or the old keeper is about to end
                return {}
            raise SandboxError(told["error"])
        return told


class AsyncFiles:
    """A sandbox's files, reached as the user inside reaches them."""

    def __init__(self, box: AsyncSandbox) -> None:
        self._box = box

    async def read(self, path: str, *, request_id: str | None = None) -> bytes:
        """Return a regular file's bytes (at most 64 MiB); raises SandboxError for anything else."""
        return (await self._box._ask("read", {"path": _absolute(path)}, None, request_id))[1]["data"]

    async def write(self, path: str, data: bytes | str, *, mode: int = 0o644, request_id: str | None = None) -> None:
        """Write a file, making its directories."""
        await self._box._ask("write", {"path": _absolute(path), "mode": mode}, data, request_id)

    async def list(self, path: str = "/workspace", *, request_id: str | None = None) -> list[FileInfo]:
        """Return a directory's entries by name."""
        entries = (await self._box._ask("list", {"path": _absolute(path)}, None, request_id))[1]["entries"]
        return [FileInfo(name=n, kind=k, size=s, mode=m) for n, k, s, m in json.loads(entries)]


def _done(work: Coroutine[Any, Any, T]) -> T:
    """Do the work of a method of the async face, which waits where no event loop runs and so is done in one step."""
    if _loop():
        work.close()
        raise RuntimeError("Sandbox waits, and an event loop runs here: use AsyncSandbox")
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waited for an event loop where there is none")


def _waiting(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Any, P], T]:
    """Turn a method of the async face into one that waits, with its signature and its words."""

    @functools.wraps(method)
    def run(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        return _done(method(self.wrapped, *args, **kwargs))

    return run


class Files:
    """`AsyncFiles`, waiting."""

    def __init__(self, files: AsyncFiles) -> None:
        self.wrapped = files

    read, write, list = (_waiting(AsyncFiles.read), _waiting(AsyncFiles.write), _waiting(AsyncFiles.list))


class Sandbox:
    """`AsyncSandbox` for programs without an event loop: the same methods, waiting."""

    def __init__(self, box: AsyncSandbox) -> None:
        self.wrapped = box
        self.id, self.spec, self.directory, self.capabilities = box.id, box.spec, box.directory, box.capabilities
        self.files = Files(box.files)

    exec, call = _waiting(AsyncSandbox.exec), _waiting(AsyncSandbox.call)
    terminal, type = _waiting(AsyncSandbox.terminal), _waiting(AsyncSandbox.type)
    snapshot, pack_diff = _waiting(AsyncSandbox.snapshot), _waiting(AsyncSandbox.pack_diff)
    pause, resume = _waiting(AsyncSandbox.pause), _waiting(AsyncSandbox.resume)
    info, resolve, close = _waiting(AsyncSandbox.info), _waiting(AsyncSandbox.resolve), _waiting(AsyncSandbox.close)

    @classmethod
    def create(cls, **options: Any) -> Self:
        """Start a sandbox; options as for `AsyncSandbox.create`."""
        return cls(_done(AsyncSandbox.create(**options)))

    @classmethod
    def open(cls, id: str, *, replay: bool = False, store: Store | None = None) -> Self:
        """Come back to a sandbox; see `AsyncSandbox.open`."""
        return cls(_done(AsyncSandbox.open(id, replay=replay, store=store)))

    def fork(self, n: int, *, request_id: str | None = None) -> list["Sandbox"]:
        """Return n new sandboxes that start from this one's files."""
        return [Sandbox(box) for box in asyncio.run(self.wrapped.fork(n, request_id=request_id))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def replay(directory: Path, *, store: Store | None = None) -> list[dict[str, Any]]:
    """Run a log's requests again in a new sandbox of the same spec and return those that come out differently."""
    store = store or default_store()
    records = list(log.read_records(directory))
    spec = Spec.from_dict(records[0]["spec"] | {"id": f"replay-{secrets.token_hex(6)}"})
    asked = {r["seq"]: r for r in records if r["kind"] == "intent"}
    different = []
    image = Image(spec.base, spec.layers)
    async with await AsyncSandbox.create(image=image, id=spec.id, store=store, **_options(spec)) as box:
        done = (r for r in records if r["kind"] == "result" and r["status"] != "abandoned")
        for record in (r for r in done if r["op"] not in ("terminal", "type")):  # people typed those while they ran
            args = asked.get(record["intent"], record)["args"]
            payload = log.read_blob(directory, args["data"]["$blob"]) if "data" in args else None
            plain = {name: value for name, value in args.items() if name != "data"}
            try:
                value, blobs, _ = await box._ask(record["op"], plain, payload, None)
                got: dict[str, Any] = {"status": "ok", "value": value}
            except SandboxError as error:
                got, blobs = {"status": "error", "value": {"message": str(error)}}, {}
            got["blobs"] = {name: hashlib.sha256(data).hexdigest() for name, data in blobs.items()}
            want = {k: record[k] for k in ("status", "value")}
            want["blobs"] = {k: b["sha"] for k, b in record["blobs"].items()}
            for side in (got, want):
                side["value"] = {k: v for k, v in side["value"].items() if k != "wall_ms"}
            if got != want:
                different.append({"seq": record["seq"], "request": record["request"], "recorded": want, "now": got})
    return different


def _result(answer: tuple[dict[str, Any], dict[str, bytes], bool]) -> ExecResult:
    value, blobs, replayed = answer
    return ExecResult(stdout=blobs["stdout"], stderr=blobs["stderr"], replayed=replayed, **value)


def _words(command: str | Sequence[str]) -> list[str]:
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    if not argv or any(not isinstance(word, str) or "\0" in word for word in argv):
        raise SandboxError(f"expected a command or its words, without NUL, got {command!r}")
    return argv


def _options(spec: Spec) -> dict[str, Any]:
    """What makes another sandbox like this, beside its image."""
    network: Any = spec.network or "none"
    return dataclasses.asdict(spec.limits) | {
        "substrate": spec.substrate, "ttl_s": spec.ttl_s, "require": spec.require, "network": network,
    }  # fmt: skip


def _absolute(path: str) -> str:
    return path if path.startswith("/") else f"/workspace/{path}"


def _unlocked(path: Path) -> bool:
    try:
        os.close(linux.lock(path))
    except (FileNotFoundError, BlockingIOError) as error:
        return isinstance(error, FileNotFoundError)
    return True


@functools.cache
def _nursery() -> int:
    """Start this process's nursery once and return the descriptor that keeps it; it ends when this process does."""
    ours, theirs = linux.link()
    house = str(Path(__file__).resolve().parents[2])
    program = f"import sys; sys.path.insert(0, {house!r}); from pelagos.sandbox.keeper import nursery; nursery()"
    with theirs:
        words = [sys.executable, "-I", "-S", "-c", program]
        child = subprocess.Popen(words, stdin=theirs.fileno(), start_new_session=True)
    child.returncode = 0  # nobody waits for it: it ends with this process
    return ours.detach()
