"""Function calls: a warm Python inside bubblewrap that gives every call namespaces and temporary files of its own.

Stateless: nothing of a call is there for the next one, so there are no file calls, no snapshots; the root is read-only.
"""

import contextlib
import json
import os
import select
import socket
from pathlib import Path

from pelagos.errors import SandboxError
from pelagos.sandbox import linux
from pelagos.sandbox.api import Command, Spec
from pelagos.sandbox.container import ENVIRONMENT, INSIDE_UID, START_S, Container, Home, Running, capabilities_here

_BOOT = "import os, socket; c = socket.socket(fileno=0); exec(os.pread(socket.recv_fds(c, 9, 1)[1][0], 1 << 20, 0))"
SLOT_S = 0.25
READY = 3  # slots, each with a process that waits; about 3 MB each


class Function(Container):
    """One warm interpreter and its ready processes."""

    root_bind = "--ro-bind"
    nested = True
    proxies = False

    def __init__(self, box: Path, layers: Path, spec: Spec, home: Home | None) -> None:
        super().__init__(box, layers, spec, home)
        self.capabilities, self._calls = capabilities_here(self._group, files="none"), 0
        self._control: socket.socket | None = None

    def _first_process(self) -> tuple[list[str], int]:
        self._control, theirs = linux.link()
        limits = self._spec.limits
        settings = {
            "ready": READY, "uid": INSIDE_UID, "disk": limits.disk_bytes, "filter": self._filter.hex(),
            "limits": limits.of_process(memory=not self._group, spare=1),
        }  # fmt: skip
        start = f"module.serve(c, {settings!r})"
        program = linux.file_of(f"{linux.modules_as_program('linux', 'worker')}{start}".encode())
        socket.send_fds(self._control, [b"program"], [program])
        os.close(program)
        return ["/usr/bin/env", "python3", "-I", "-S", "-c", _BOOT], theirs.detach()

    def spawn(self, command: Command, stdio: tuple[int, int, int]) -> Running:
        assert self._control is not None, "it has not begun"
        text = linux.file_of(json.dumps({
            "argv": command.argv, "env": ENVIRONMENT | dict(command.env), "source": command.call,
            "arguments": command.arguments, "cwd": command.cwd,
        }).encode())  # fmt: skip
        try:
            while True:
                # A free slot has a process ready in a moment; where each has a call, one more is made.
                if not select.select([self._control], [], [], SLOT_S if self._calls < READY else 0)[0]:
                    self._control.send(b"more")
                    if not select.select([self._control], [], [], START_S)[0]:
                        raise OSError(f"no process was ready in {START_S:.0f} s")
                fds = socket.recv_fds(self._control, 16, 1)[1]
                if not fds:
                    raise OSError("no answer")
                call = Running(socket.socket(fileno=fds[0]), self._ended)
                with contextlib.suppress(BrokenPipeError):  # that one was killed while it waited
                    socket.send_fds(call.link, [b"run"], [text, *stdio])
                    self._calls += 1
                    return call
        except OSError as error:
            said = f"function {self._spec.id}: no process is ready ({error}, {self.kills()} killed for memory)"
            raise SandboxError(f"{said}; ask again") from None
        finally:
            os.close(text)

    def stop(self) -> None:
        super().stop()
        if self._control:
            self._control.close()

    def _ended(self) -> None:
        self._calls -= 1
