"""The keeper of one sandbox: takes requests on a socket, asks the log, drives the substrate, tells the log, answers.

It outlives its clients and ends on `close` or after `ttl_s` without a request. Keepers are forked from a nursery, since
starting Python costs more than starting a sandbox. A request is one connection: a JSON line and payload in, frames out.
"""

import contextlib
import dataclasses
import fcntl
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import termios
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pelagos.errors import PelagosError, SandboxError, TrajectoryError, UnknownOutcome
from pelagos.sandbox import cgroups, function, linux  # noqa: F401  `function` is loaded once for all keepers
from pelagos.sandbox.api import MOST, Command, Spec
from pelagos.sandbox.container import ASK_BYTES, Container, Home, Substrate, bubblewrap, take_notes
from pelagos.sandbox.inside import FILE_BYTES
from pelagos.sandbox.log import Begun, Stored, TrajectoryLog
from pelagos.sandbox.loop import Connection, Loop, Promise

SOCKET = "s"
LAYERS = "layers"  # beside the directory of sandboxes
SPEC = "spec.json"
WATCH_S = 0.2
REST_S = 0.02
REST_MOST_S = 16.0
KILL_S = 5.0  # what does not end when it is told to takes the sandbox with it
OURS = 3  # processes in a container's control group that are not its commands: forker, bubblewrap, the first inside
SPARES = 2  # keepers kept ready; each is about 3 MB
DRAIN_BYTES = 1 << 16
STATUS_BYTES = 8 << 20  # JSON of JSON of 1 MiB may be this long
# Change nothing that stays, as nothing stateless does: no intent, may be asked again.
PURE = frozenset(("read", "list"))
KINDS = {"unknown": UnknownOutcome, "trajectory": TrajectoryError, "sandbox": SandboxError}

# Where the class of each substrate is: what virtual machines need is loaded when one is asked for, keepers stay small.
SUBSTRATES = {
    "container": "container.Container",
    "function": "function.Function",
    "microvm": "vm.VirtualMachine",
    "fullvm": "vm.FullVM",
    "uml": "vm.UserMode",
    "docker": "docker.Docker",
}
Emit = Callable[[str, bytes], None]
Outcome = tuple[dict[str, Any], dict[str, bytes]]


def _make(box: Path, spec: Spec, home: Home | None) -> Substrate:
    """Return the substrate of a spec, not yet started, once it has every flag the spec requires."""
    if spec.substrate not in SUBSTRATES:
        raise SandboxError(f"substrate {spec.substrate!r}: expected one of {', '.join(SUBSTRATES)}")
    module, _, name = SUBSTRATES[spec.substrate].partition(".")
    kind = getattr(importlib.import_module(f"pelagos.sandbox.{module}"), name)
    substrate = kind(box, box.parents[1] / LAYERS, spec, home)
    if home is not None:  # where it is not only the copy inside
        substrate.capabilities.check(spec.require)
        substrate.begin()
    return substrate


def _rehearse() -> None:
    """Do once what the first request needs: a fork's memory becomes its own where it is touched, a page at a time."""
    spec = dataclasses.asdict(Spec(id="x", substrate="container", base="host"))
    place, facts = json.loads(json.dumps(["/a/b/c", spec]))
    made = _make(Path(place), Spec.from_dict(facts), None)
    made.capabilities.check({})
    if isinstance(made, Container):
        made.rehearse()
    json.dumps([place, dataclasses.asdict(made.capabilities)])
    Promise(Loop()).settle()
    one, two = linux.link()
    with one, two, contextlib.suppress(SandboxError):
        socket.send_fds(one, [b"x"], [one.fileno()])
        os.close(socket.recv_fds(two, ASK_BYTES, 1)[1][0])
        bubblewrap()


class _Stream:
    """One output pipe: keeps the first `most` bytes, reads on slowly and drops the rest."""

    def __init__(self, loop: Loop, name: str, most: int, emit: Emit) -> None:
        self.name, self.kept, self.truncated = name, bytearray(), False
        self._loop, self._most, self._emit, self._closing = loop, most, emit, False
        self._fd, self.write_fd = os.pipe()
        os.set_blocking(self._fd, False)

    def listen(self) -> None:
        """Let go of the write end, which the command has now, and take what comes."""
        os.close(self.write_fd)
        self.write_fd = -1
        self._loop.watch(self._fd, self._take)

    def turn_to(self, fd: int) -> None:
        """Read another descriptor from here on."""
        self._loop.watch(self._fd, None)
        os.close(self._fd)
        self._fd = fd
        os.set_blocking(fd, False)
        self._loop.watch(fd, self._take)

    def _take(self) -> bool:
        try:
            data = os.read(self._fd, DRAIN_BYTES)
        except BlockingIOError:
            return False
        except OSError:  # how a terminal ends
            data = b""
        new = data[: self._most - len(self.kept)]
        self.kept += new
        self.truncated |= len(new) < len(data)
        if new:
            self._emit(self.name, new)
        if not data or (self.truncated and not self._closing):
            self._loop.watch(self._fd, None)
        if data and self.truncated and not self._closing:
            # A flood is read at some 60 MB/s, so that it costs the host little and the command still ends.
            self._loop.later(0.001, self._again)
        return bool(data)

    def _again(self) -> None:
        if not self._closing:
            self._loop.watch(self._fd, self._take)

    def close(self) -> None:
        """Take what is in the pipe, wait for nobody, and close."""
        self._closing = True
        self._loop.watch(self._fd, None)
        if self.write_fd >= 0:
            os.close(self.write_fd)
        while self._take() and not self.truncated:
            pass
        os.close(self._fd)


class Keeper:
    """One sandbox's state machine; runs in a process of its own."""

    def __init__(self, loop: Loop, box: Path, spec: Spec, home: Home, warm: Substrate | None) -> None:
        self._loop, self._box, self._root, self._spec = loop, box, box.parents[1], spec
        if (box / "log.jsonl").exists():
            take_notes(box)
            self._log = TrajectoryLog.open(box)  # before anything else of this sandbox: there is one keeper at a time
            if self._log.header["spec"] != json.loads(json.dumps(dataclasses.asdict(spec))):
                raise SandboxError(f"{box}: the log's spec differs from {SPEC}; this directory was tampered with")
            self._log.event("start")
            cgroups.sweep()  # of the keeper before this one, if it was killed: what it ran must not go on beside us
            self._substrate: Substrate = warm or _make(box, spec, home)
        else:
            self._substrate = warm or _make(box, spec, home)  # which starts while the rest is made
            take_notes(box)
            (box / SPEC).write_text(json.dumps(dataclasses.asdict(spec)), encoding="utf-8")
            self._log = TrajectoryLog.create(box, {"spec": dataclasses.asdict(spec)})
        self._terminals: dict[str, int] = {}
        self._running: dict[str, tuple[str, dict[str, Any], Promise]] = {}
        self._active, self._last, self._paused, self._discards = 0, time.monotonic(), False, False
        self._over_disk, self._most_disk, self._kills = False, 0, 0
        self._still, self._done = Promise(loop), Promise(loop)  # nobody needs the files to stand still; it ends
        self._still.settle()

    async def serve(self, ready: socket.socket) -> None:
        """Start the sandbox, say so on `ready`, and answer until closed or idle."""
        path = self._box / SOCKET
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        flags = json.dumps(dataclasses.asdict(self._substrate.capabilities)).encode() + b"\n"
        try:
            path.unlink(missing_ok=True)
            with short_name(self._box) as short:
                server.bind(f"{short}/{SOCKET}")
            path.chmod(0o600)
            server.listen(64)
            self._substrate.start()  # last: all that was before is done while it starts
        except BaseException:
            self._substrate.stop()
            raise
        with ready, contextlib.suppress(OSError):  # whoever asked was killed; the next one finds a sandbox
            ready.sendall(flags)
        self._substrate.settle()
        self._loop.watch(server.fileno(), lambda: self._loop.start(self._answer(server)))
        watch = self._loop.start(self._watch())
        watch.then(self._done.settle)
        try:
            await self._done
            if watch.settled:
                watch.result()
        finally:
            self._loop.watch(server.fileno(), None)
            server.close()
            path.unlink(missing_ok=True)
            self._substrate.stop()
            self._substrate.let_go()
            if self._discards:
                self._substrate.discard()
            else:
                self._log.close()  # else it goes with this process, of which who waits for that finds nothing left

    async def _watch(self) -> None:
        limit = self._spec.limits.disk_bytes
        pause, rest, last = WATCH_S, 1.0, -1
        while True:
            busy = self._active > 0
            rest = 1.0 if busy else rest
            await self._loop.sleep(pause if busy else min(rest, self._spec.ttl_s / 4))
            began = time.monotonic()
            if not self._active and began - self._last > self._spec.ttl_s:
                return
            flags = self._substrate.capabilities
            if flags.files == "none" or flags.disk_limit == "hard" or not self._substrate.alive():
                continue
            if not busy and self._substrate.usage().get("processes", OURS + 1) <= OURS:
                continue  # nobody inside could write
            try:
                used = int(await self._task("disk"))
            except SandboxError:
                continue  # it ended meanwhile
            # What lay there when the sandbox came back over its limit may stay, so that it can be deleted.
            if used > max(limit, self._most_disk):
                self._over_disk, self._most_disk = True, used
                self._substrate.stop()
            pause = max(WATCH_S, 10 * (time.monotonic() - began))
            # Who sleeps is looked at ever less: a look costs a fork, and there may be hundreds.
            rest, last = (min(2 * rest, REST_MOST_S), used) if used == last else (1.0, used)

    async def _answer(self, server: socket.socket) -> None:
        try:
            link = Connection(self._loop, server.accept()[0])
        except OSError:
            return  # gone before it was met
        try:
            while True:
                ask = json.loads(await link.line())
                self._active += 1
                try:
                    payload = await link.exactly(ask["size"]) if ask.get("size") is not None else None

                    def emit(name: str, data: bytes) -> None:
                        link.write(json.dumps({"event": name, "size": len(data)}).encode() + b"\n" + data)

                    done = await self._request(ask, payload, emit)
                    blobs = done.pop("blobs")
                    done["blobs"] = {name: len(data) for name, data in blobs.items()}
                    link.write(json.dumps({"done": done}).encode() + b"\n" + b"".join(blobs.values()))
                finally:
                    self._active -= 1
                    self._last = time.monotonic()
                    if self._log.failed:  # the next request starts a keeper that opens the log again
                        self._loop.later(0.05, self._done.settle)
        except (ConnectionError, ValueError):
            pass  # the client went away, or is none; what it asked for goes on and is logged
        finally:
            link.close()

    async def _request(self, ask: dict[str, Any], payload: bytes | None, emit: Emit) -> dict[str, Any]:
        """Return `{"status", "value", "blobs", "replayed"}`; errors are statuses too."""
        op, args, request = ask["op"], ask["args"], ask["request"]
        try:
            if op in ("close", "info", "resolve"):
                return {"status": "ok", "value": self._control(op, args), "blobs": {}}
            if payload is not None:
                args = args | {"data": payload}
            most = args.get("timeout")
            if most is not None and not (isinstance(most, (int, float)) and 0 <= most < MOST):
                raise SandboxError(f"{op}: timeout={most!r:.40}: expected seconds from 0 to {MOST:.0e}, or None")
            if (known := self._running.get(request)) and known[:2] == (op, args):
                return dict(await known[2])
            self._revive()
            stateless = self._substrate.capabilities.files == "none"
            begun = self._log.begin(request, op, args, pure=stateless or op in PURE)
            if isinstance(begun, Stored):
                return {"status": begun.status, "value": begun.value, "blobs": begun.blobs, "replayed": True}
            # A task of its own, which a client that goes away does not take with it.
            running = self._loop.start(self._run(begun, op, args, emit))
            self._running[request] = (op, args, running)
            return dict(await running)
        except PelagosError as error:
            kind = next(k for k, c in {**KINDS, "sandbox": PelagosError}.items() if isinstance(error, c))
            return {"status": "refused", "value": {"kind": kind, "message": str(error)}, "blobs": {}}
        except Exception as error:
            traceback.print_exc()
            said = f"{op} was asked in a way that nobody expected ({type(error).__name__}: {error}); see keeper.err"
            return {"status": "refused", "value": {"kind": "sandbox", "message": said}, "blobs": {}}

    def _revive(self) -> None:
        """Start the sandbox again where it ended; a request that cannot have one is refused before it is logged."""
        if not self._substrate.alive():
            self._substrate.stop()
            self._over_disk, self._kills = False, 0
            self._substrate = _make(self._box, self._spec, Home(_make, _rehearse))
            self._substrate.start()
            self._substrate.settle()
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
            if not args["keep"]:
                self._discards = True
                (self._box / SPEC).unlink(missing_ok=True)  # so that whoever else waits for an answer starts no other
            self._done.settle()
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

    async def _op_terminal(self, *, emit: Emit, argv: list[str], env: dict[str, str], cwd: str, timeout: float | None,
                           name: str, rows: int, columns: int) -> Outcome:  # fmt: skip
        if self._substrate.capabilities.terminal != "yes" or name in self._terminals:
            raise SandboxError(f"{self._spec.substrate}: no terminal {name!r} (terminal=none, or it is open already)")
        command = Command(argv=tuple(argv), env={"TERM": "xterm", **env}, cwd=cwd, tty=(rows, columns))
        try:
            return await self._command(command, timeout, b"", emit, terminal=name)
        finally:
            self._terminals.pop(name, None)

    async def _op_type(self, *, emit: Emit, name: str, data: bytes, size: list[int] | None = None) -> Outcome:
        if name not in self._terminals:
            raise SandboxError(f"there is no terminal {name!r} open")
        try:
            if size:
                fcntl.ioctl(self._terminals[name], termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
            written = os.write(self._terminals[name], data) if data else 0
        except (OSError, struct.error) as error:
            raise SandboxError(f"terminal {name!r} takes no input ({error})") from None
        return {"written": written}, {}

    async def _op_call(self, *, emit: Emit, source: str, arguments: str, timeout: float | None) -> Outcome:
        if self._spec.substrate != "function":
            raise SandboxError(f"{self._spec.substrate}: no warm worker to call; use exec, or substrate='function'")
        return await self._command(Command(call=source, arguments=arguments), timeout, b"", emit)

    async def _command(
        self, command: Command, timeout: float | None, data: bytes, emit: Emit, terminal: str | None = None
    ) -> Outcome:
        streams = [_Stream(self._loop, name, self._spec.limits.output_bytes, emit) for name in ("stdout", "stderr")]
        began = time.perf_counter()
        wants, stdin = socket.socketpair() if terminal else (None, linux.file_of(data))
        first = stdin if isinstance(stdin, int) else stdin.fileno()
        timed_out = False
        try:
            child = self._substrate.spawn(command, (first, streams[0].write_fd, streams[1].write_fd))
        finally:
            os.close(first) if isinstance(stdin, int) else stdin.close()

        def expire() -> None:
            nonlocal timed_out
            if not report.settled:
                timed_out = True
                self._loop.later(KILL_S, lambda: report.settled or self._substrate.stop())
                with contextlib.suppress(OSError):  # it ended this moment
                    child.kill()
                if self._paused:
                    self._loop.start(self._op_resume(emit=emit))  # what is frozen does not die

        pending = [expire]  # the timer stays, what this holds goes with the command
        try:
            for stream in streams:
                stream.listen()
            if terminal and wants:
                self._loop.watch(wants.fileno(), functools.partial(self._take_terminal, terminal, wants, streams[0]))
            report = self._loop.start(self._loop.until_end(child.status_fd, line=True, most=STATUS_BYTES))
            if timeout is not None:
                self._loop.later(timeout, lambda: pending and pending.pop()())
            line = await report
            wall_ms = round((time.perf_counter() - began) * 1e3, 3)
        finally:
            for stream in streams:
                stream.close()
            pending.clear()
            child.reap()
            if wants and wants.fileno() >= 0:
                self._loop.watch(wants.fileno(), None)
                wants.close()
        code, returned = -int(signal.SIGKILL), None
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # a call may write anything here
            told = json.loads(line)
            code = max(-255, min(255, int(told["exit_code"])))
            returned = json.loads(told.get("value") or "null")
        killed_by = "disk" if self._over_disk else None
        if code and not self._over_disk and self._substrate.alive():
            kills, self._kills = self._kills, self._substrate.kills()
            killed_by = "memory" if self._kills > kills else None
        value = {
            "exit_code": code, "truncated": any(s.truncated for s in streams),
            "wall_ms": wall_ms, "timed_out": timed_out, "killed_by": killed_by,
            "value": returned,
        }  # fmt: skip
        return value, {stream.name: bytes(stream.kept) for stream in streams}

    def _take_terminal(self, name: str, wants: socket.socket, stream: _Stream) -> None:
        """Read from the terminal that a command made for itself, instead of from its pipe."""
        _, fds, _, _ = socket.recv_fds(wants, 16, 1)
        self._loop.watch(wants.fileno(), None)
        wants.close()
        if fds:
            stream.turn_to(fds[0])
            self._terminals[name] = fds[0]

    async def _op_read(self, *, emit: Emit, path: str) -> Outcome:
        return {}, {"data": await self._task("read", path=path)}

    async def _op_write(self, *, emit: Emit, path: str, data: bytes, mode: int) -> Outcome:
        if len(data) > FILE_BYTES:
            raise SandboxError(f"{path}: {len(data)} bytes, at most {FILE_BYTES} in one write; use an image")
        await self._task("write", path=path, data=data, mode=mode)
        return {"size": len(data)}, {}

    async def _op_list(self, *, emit: Emit, path: str) -> Outcome:
        return {}, {"entries": await self._task("list", path=path)}

    async def _op_snapshot(self, *, emit: Emit) -> Outcome:
        from pelagos.sandbox.layers import Store

        with os.fdopen(os.open(self._root, os.O_TMPFILE | os.O_RDWR, 0o600), "w+b") as file:
            file.write(await self._pack())
            digest = Store(self._root).add_canonical(file)
        return {"layer": digest, "base": self._spec.base, "layers": [*self._spec.layers, digest]}, {}

    async def _op_pack_diff(self, *, emit: Emit) -> Outcome:
        return {}, {"diff": await self._pack()}

    async def _pack(self) -> bytes:
        """Pack the upper directory while everything inside stands still."""
        import tarfile  # noqa: F401  the fork that packs may not read Python's files any more

        before, self._still = self._still, Promise(self._loop)
        try:
            await before
            self._substrate.pause(True)
            try:
                return await self._task("pack", most=self._spec.limits.disk_bytes)
            finally:
                self._substrate.pause(self._paused)
        finally:
            self._still.settle()

    async def _op_pause(self, *, emit: Emit, on: bool = True) -> Outcome:
        self._substrate.pause(on)
        self._paused = on
        return {}, {}

    async def _op_resume(self, *, emit: Emit) -> Outcome:
        return await self._op_pause(emit=emit, on=False)

    async def _task(self, name: str, **arguments: Any) -> bytes:
        """Do a task of `inside.py` among the sandbox's files and return its answer; SandboxError with its complaint."""
        if self._substrate.capabilities.files == "none":
            raise SandboxError(f"{self._spec.substrate}: stateless, it has no files to reach (files=none)")
        out, ended = self._substrate.inside(name, arguments)
        try:
            most = 2 * (FILE_BYTES + self._spec.limits.disk_bytes)  # a guest may send for ever
            data = await self._loop.until_end(out, most=most)
        finally:
            os.close(out)
            well = ended()
        if not well:
            at = data.rfind(b'{"error": ')
            raise SandboxError(json.loads(data[at:])["error"] if at >= 0 else "killed while it read the files")
        return data


@contextlib.contextmanager
def short_name(directory: Path) -> Any:
    """A short name for a directory: a socket's path has 107 bytes at most."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def nursery() -> None:
    """Keep keepers ready and give one each (directory, pipe) that comes on descriptor 0, until the client is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    linux.fork(lambda: (os.close(0), cgroups.sweep()), traceback.print_exception)
    linux.modules_as_program("linux", "worker")  # once for all keepers
    gc.collect()
    gc.freeze()
    spares: dict[str, list[socket.socket]] = {"": []}  # by what they are warm for
    wanted = ""
    with socket.socket(fileno=0) as sock:
        while True:
            # A spare is made when nobody asks: making one takes the processor that a sandbox just asked for starts on.
            while len(spares[""]) < SPARES or not spares.setdefault(wanted, []):
                if spares[""] and select.select([sock], [], [], REST_S)[0]:
                    break
                key = "" if len(spares[""]) < SPARES else wanted
                ours, theirs = linux.link()
                linux.fork(lambda: _keep(theirs, key), traceback.print_exception)  # noqa: B023
                theirs.close()
                spares[key].append(ours)
            data, fds, _, _ = socket.recv_fds(sock, ASK_BYTES, 1)
            if not data:
                return
            if (key := _warm_for(data)) and key != wanted:
                for spare in spares.pop(wanted, []) if wanted else []:
                    spare.close()
                wanted = key
            while (pool := spares.get(key) or spares[""]) and (spare := pool.pop(0)):
                with spare, contextlib.suppress(OSError):  # one that was killed is passed over
                    socket.send_fds(spare, [data], fds)
                    break
            os.close(fds[0])


def _warm_for(asked: bytes) -> str:
    """Return what a spare's interpreter would have to be for to serve this sandbox; "" where it has none."""
    if b'"substrate": "function"' not in asked:
        return ""
    box, spec = json.loads(asked)
    facts = {name: value for name, value in spec.items() if name not in ("id", "ttl_s")}
    return json.dumps([str(Path(box).parents[1]), facts]) if spec["substrate"] == "function" else ""


def _keep(asks: socket.socket, key: str) -> None:
    """Be a keeper: first a spare one, perhaps with a warm interpreter, then of the sandbox that comes on `asks`."""
    linux.close_all_but([asks.fileno()])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):  # nothing of the client's may be held open: it may wait for the end of its output
        os.dup2(null, number)
    home, warm = Home(_make, _rehearse), None
    _rehearse()
    place = Path()
    try:
        if key:
            root, facts = json.loads(key)
            place = Path(root, "warm", str(os.getpid()))
            place.mkdir(parents=True)
            place.chmod(0o711)
            warm = _make(place, Spec.from_dict(facts | {"id": "warm", "ttl_s": 1.0}), home)
        data, fds, _, _ = socket.recv_fds(asks, ASK_BYTES, 1)
        if data:
            box, facts = json.loads(data)
            _keep_one(Path(box), Spec.from_dict(facts), socket.socket(fileno=fds[0]), home, warm)
    finally:
        home.close()
        if key:
            from pelagos.sandbox.layers import remove_tree

            remove_tree(place)


def _keep_one(box: Path, spec: Spec, ready: socket.socket, home: Home, warm: Substrate | None) -> None:
    os.umask(0o077)
    try:
        loop = Loop()
        loop.run(Keeper(loop, box, spec, home, warm).serve(ready))
    except BaseException as error:
        if not isinstance(error, PelagosError):
            traceback.print_exc()
        if isinstance(error, ConnectionError):
            return  # what waited in the spare was killed: whoever asked hears no word, and asks another
        with contextlib.suppress(OSError):  # the client is gone, or this comes after `ready` was told
            said = f"{error}" if isinstance(error, PelagosError) else f"sandbox {spec.id} cannot start: {error!r}"
            ready.sendall(json.dumps({"error": said}).encode() + b"\n")
