"""The host's half of a guest that has our agent in it (`guest.py`): commands go in as frames, what comes of them out.

`Guest` is a substrate whose first program inside is that agent, at the far end of a socket; `Mux` carries the frames.
"""

import contextlib
import json
import os
import select
import signal
import socket
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from pelagos.errors import SandboxError
from pelagos.sandbox import guest, inside, linux
from pelagos.sandbox.api import Command
from pelagos.sandbox.container import ENVIRONMENT, Running, Substrate, until_ready

BOOT_S = 60.0


class Guest(Substrate):
    """One guest; the process of its `Home` brings it up and carries frames, and `_ended` can be read when it ends."""

    window, boot_s = 1 << 62, BOOT_S  # see `Mux`; how long it may take to come up
    _filters = False  # whether commands run under our seccomp filter, because the kernel is the host's
    _ended = -1

    @abstractmethod
    def _bring_up(self, ask: dict[str, Any], control: socket.socket, *fds: int) -> "Mux":
        """In the process of `Home`: start what `ask` says and return what speaks to its agent, which is ready."""

    def _take_down(self) -> str:
        """In the process of `Home`: end what was brought up, however far that went; return what it complained of."""
        return ""

    def _hand_up(self, ask: dict[str, Any], *fds: int) -> str:
        """Have the process of `Home` bring the guest up; return "" or why it did not come."""
        self.home.meet(self._box, self._spec)
        ready, ready_w = os.pipe()
        self._ended, ended_w = os.pipe()
        socket.send_fds(self.home.control, [json.dumps(ask).encode()], [ready_w, ended_w, *fds])
        linux.close(ready_w, ended_w, *fds)
        said = until_ready(ready, self.boot_s)
        os.close(ready)
        return "" if said == b"ready\n" else said.decode("utf-8", "replace")[-2000:]

    def run_inside(self, control: socket.socket) -> None:
        told, fds, _, _ = socket.recv_fds(control, 1 << 16, 3)
        if not told:
            return
        ready, ended, *rest = fds
        mux, said = None, "ready\n"
        try:
            mux = self._bring_up(json.loads(told), control, *rest)
        except (OSError, SandboxError) as error:
            said = f"{error}; {self._take_down()}"
        os.write(ready, said.encode())
        os.close(ready)
        try:
            if mux:
                mux.serve()
        except (OSError, SandboxError):
            pass  # it ended, as whoever holds `ended` sees
        finally:
            self._take_down()
            os.close(ended)

    def _limits(self) -> dict[str, int | None]:
        return self._spec.limits.of_process(memory=False)

    def spawn(self, command: Command, stdio: tuple[int, int, int]) -> Running:
        ask = {"argv": command.argv, "env": ENVIRONMENT | dict(command.env), "cwd": command.cwd}
        ask |= {"limits": self._limits(), "filter": self._filters, "most": self._spec.limits.output_bytes + 1}
        return self.hand_over(ask, stdio)

    def inside(self, task: str, arguments: dict[str, Any]) -> tuple[int, Callable[[], bool]]:
        out, out_w = os.pipe()
        data = linux.file_of(arguments.get("data", b""))
        null = os.open(os.devnull, os.O_WRONLY)
        plain = {name: value for name, value in arguments.items() if name != "data"}
        try:
            running = self.hand_over({"task": task, "arguments": plain, "most": 1 << 40}, (data, out_w, null))
        finally:
            linux.close(out_w, data, null)

        def ended() -> bool:
            try:
                return os.read(running.status_fd, 4096).startswith(b'{"exit_code":0}')
            finally:
                running.reap()

        return out, ended

    def alive(self) -> bool:
        return self._ended >= 0 and not select.select([self._ended], [], [], 0)[0]

    def pause(self, on: bool) -> None:
        out, ended = self.inside("stop", {"signal": signal.SIGSTOP if on else signal.SIGCONT})
        until_ready(out, 10)  # it says nothing: to its end
        os.close(out)
        ended()

    def stop(self) -> None:
        if self._home:
            self._home.close()
        if self._ended >= 0:
            os.close(self._ended)
            self._ended = -1


class Mux:
    """Between the keeper, which hands over descriptors, and the guest, which speaks frames."""

    def __init__(self, control: socket.socket, port: socket.socket, window: int = 1 << 62) -> None:
        self._control, self._port, self._in, self._out = control, port, bytearray(), bytearray()
        self._window = window  # bytes that may be on their way before the agent says that it has read some
        self._asked: dict[int, tuple[int, int, int]] = {}  # command: stdout, stderr, link
        self._count = 0

    def ask(self, head: dict[str, Any], data: bytes, *, answered: bool = True) -> None:
        """Send a request of our own and wait for its end."""
        self._send(0, b"B", json.dumps(head).encode() + b"\n" + data)
        if answered:
            self.until_up(b"X", BOOT_S)

    def until_up(self, kind: bytes, seconds: float) -> None:
        """Wait for a frame; raises SandboxError where none comes."""
        deadline = time.monotonic() + seconds
        while True:
            if not select.select([self._port], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise SandboxError(f"the guest said nothing within {seconds:.0f} s")
            if any(got == kind for _, got, _ in self._frames()):
                return

    def serve(self) -> None:
        """Pass on until either side ends."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._port, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._control.fileno():
                    data, fds, _, _ = socket.recv_fds(self._control, 16, 5)
                    if not data:
                        return
                    poll.register(self._begin(*fds), select.POLLRDHUP)
                elif fd == self._port.fileno():
                    for number, kind, data in self._frames():
                        self._answer(poll, number, kind, data)
                elif numbers := [n for n, asked in self._asked.items() if asked[2] == fd]:  # else it ended just now
                    poll.unregister(fd)  # it was let go of
                    self._send(numbers[0], b"K", b"")

    def _begin(self, text: int, stdin: int, stdout: int, stderr: int, link: int) -> int:
        self._count += 1
        with open(text, "rb") as head, open(stdin, "rb") as data:
            self._send(self._count, b"B", head.read() + b"\n" + data.read())
        self._asked[self._count] = (stdout, stderr, link)
        return link

    def _answer(self, poll: select.poll, number: int, kind: bytes, data: bytes) -> None:
        if number not in self._asked:
            return
        stdout, stderr, link = self._asked[number]
        with contextlib.suppress(OSError):  # the keeper wants to know no more
            inside.write_all({b"O": stdout, b"E": stderr}.get(kind, link), data + (b"\n" if kind == b"X" else b""))
        if kind == b"X":
            with contextlib.suppress(KeyError):
                poll.unregister(link)
            linux.close(*self._asked.pop(number))

    def _send(self, number: int, kind: bytes, data: bytes) -> None:
        self._out += guest.HEAD.pack(number, kind, len(data)) + data
        self._give()

    def _give(self) -> None:
        size = min(len(self._out), self._window)
        self._port.sendall(self._out[:size])
        del self._out[:size]
        self._window -= size

    def _frames(self) -> list[tuple[int, bytes, bytes]]:
        """Return the frames that are whole now; SandboxError at the end, OSError when the guest talks nonsense."""
        if not (piece := self._port.recv(1 << 18)):
            raise SandboxError("it ended")
        self._in += piece
        frames = list(guest.take_frames(self._in, guest.PIECE_BYTES * 2))
        self._window += sum(int(data) for _, kind, data in frames if kind == b"A")
        self._give()
        return frames
