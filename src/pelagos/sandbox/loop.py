"""A keeper's event loop: promises, tasks, timers and descriptors over poll(2), and connections over sockets.

Not asyncio, because a keeper forks for every command and what a fork costs is what is loaded: 0.9 ms with this, 2.6 ms
with that. It has no threads and no cancelling; a loop that stops forgets what still waits.
"""

import collections
import contextlib
import heapq
import itertools
import os
import select
import socket
import time
import traceback
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Self

READ_BYTES = 1 << 18


class Promise:
    """Something that will be settled once, with a value or an error; await it as often as you like."""

    def __init__(self, loop: "Loop") -> None:
        self.settled, self._loop = False, loop
        self._value: Any = None
        self._error: BaseException | None = None
        self._then: list[Callable[[], object]] = []

    def settle(self, value: Any = None, error: BaseException | None = None) -> None:
        """Give the value or the error, unless there is one already."""
        if not self.settled:
            self.settled, self._value, self._error = True, value, error
            self._loop.ready.extend(self._then)

    def then(self, act: Callable[[], object]) -> None:
        """Call `act` from the loop once this is settled."""
        if self.settled:
            self._loop.ready.append(act)
        else:
            self._then.append(act)

    def result(self) -> Any:
        """Return the value or raise the error."""
        if self._error is not None:
            raise self._error
        return self._value

    def __await__(self) -> Generator[Self, None, Any]:
        if not self.settled:
            yield self
        return self.result()


class Loop:
    """One thread's promises, timers and descriptors."""

    def __init__(self) -> None:
        self.ready: collections.deque[Callable[[], object]] = collections.deque()
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._poll = select.poll()
        self._acts: dict[int, dict[int, Callable[[], object]]] = {}

    def start(self, work: Coroutine[Any, Any, Any]) -> Promise:
        """Run a coroutine beside the others; the promise is its outcome, an error that nobody waits for is printed."""
        promise = Promise(self)

        def step() -> None:
            try:
                waits = work.send(None)
            except StopIteration as end:
                promise.settle(end.value)
            except BaseException as error:
                promise.settle(error=error)
                if not promise._then:
                    traceback.print_exception(error)
            else:
                waits.then(step)

        self.ready.append(step)
        return promise

    def later(self, seconds: float, act: Callable[[], object]) -> None:
        """Call `act` in so many seconds."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), act))

    def sleep(self, seconds: float) -> Promise:
        """Return a promise that is settled in so many seconds."""
        promise = Promise(self)
        self.later(seconds, promise.settle)
        return promise

    def watch(self, fd: int, act: Callable[[], object] | None, event: int = select.POLLIN) -> None:
        """Call `act` whenever `fd` can be read (or written, POLLOUT); None ends that. End it before closing `fd`."""
        acts = self._acts.setdefault(fd, {})
        acts.pop(event, None)
        if act is not None:
            acts[event] = act
        if acts:
            self._poll.register(fd, sum(acts))
        else:
            del self._acts[fd]
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run until this coroutine ends and return what it returned, or raise what it raised."""
        done = self.start(work)
        while not done.settled:
            while self.ready and not done.settled:
                self.ready.popleft()()
            if done.settled:
                break
            wait = min(max(0.0, self._timers[0][0] - time.monotonic()), 1e6) * 1e3 if self._timers else None
            for fd, events in self._poll.poll(wait):
                for event, act in list(self._acts.get(fd, {}).items()):
                    if events & (event | select.POLLHUP | select.POLLERR):
                        act()
            while self._timers and self._timers[0][0] <= time.monotonic():
                self.ready.append(heapq.heappop(self._timers)[2])
        return done.result()

    async def read(self, fd: int) -> bytes:
        """Return what can be read of a descriptor that does not block, once there is something; nothing at its end."""
        while True:
            there = Promise(self)
            self.watch(fd, there.settle)
            await there
            self.watch(fd, None)
            try:
                return os.read(fd, READ_BYTES)
            except BlockingIOError:
                continue
            except OSError:  # how a terminal ends, and a socket whose other end was killed
                return b""

    async def until_end(self, fd: int, *, line: bool = False, most: int = 1 << 62) -> bytes:
        """Read a descriptor to its end (or its first newline, or beyond `most` bytes) and leave it open."""
        data = bytearray()
        os.set_blocking(fd, False)
        while piece := await self.read(fd):
            data += piece
            if len(data) > most or (line and piece.endswith(b"\n")):
                break
        return bytes(data)


class Connection:
    """One end of a stream socket: lines and counted bytes in, bytes out without waiting; ConnectionError at its end."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.closed, self._loop, self._sock = False, loop, sock
        self._in, self._out, self._ended = bytearray(), bytearray(), False

    async def line(self) -> bytes:
        """Return the next line."""
        while (at := self._in.find(b"\n")) < 0:
            await self._more()
        return await self.exactly(at + 1)

    async def exactly(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        while len(self._in) < size:
            await self._more()
        data = bytes(self._in[:size])
        del self._in[:size]
        return data

    async def _more(self) -> None:
        if self._ended or not (data := await self._loop.read(self._sock.fileno())):
            raise ConnectionResetError("the other end closed")
        self._in += data

    def write(self, data: bytes) -> None:
        """Send now what the socket takes and the rest when it takes more; nothing once it is closed."""
        if not self.closed:
            self._out += data
            self._give()

    def close(self) -> None:
        """Close, once what was written is sent or cannot be."""
        self._ended = True
        if not self.closed and not self._out:
            self.closed = True
            self._loop.watch(self._sock.fileno(), None)
            self._loop.watch(self._sock.fileno(), None, select.POLLOUT)
            self._sock.close()

    def _give(self) -> None:
        try:
            while self._out:
                del self._out[: self._sock.send(self._out[:READ_BYTES])]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()  # the other end is gone
            self._ended = True
        self._loop.watch(self._sock.fileno(), self._give if self._out else None, select.POLLOUT)
        if self._ended and not self._out:
            self.close()
