"""Function calls: a warm Python inside bubblewrap that gives every call namespaces and temporary files of its own.

Stateless: nothing of a call is there for the next one, so there are no file calls, no snapshots; the root is read-only.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from pelagos.errors import SandboxError
from pelagos.sandbox import linux, worker
from pelagos.sandbox.api import Child, Command, Spec
from pelagos.sandbox.container import ENVIRONMENT, INSIDE_UID, Container, capabilities_here

_BOOT = "import os, socket; c = socket.socket(fileno=0); exec(os.pread(socket.recv_fds(c, 9, 1)[1][0], 1 << 20, 0))"
_PROGRAM = """
import sys, types
package = sys.modules['pelagos'] = sys.modules['pelagos.sandbox'] = types.ModuleType('pelagos.sandbox')
for name, text in TEXTS.items():
    module = sys.modules[name] = types.ModuleType(name)
    setattr(package, name.rpartition('.')[2], module)
    exec(compile(text, name, 'exec'), module.__dict__)
module.serve(c, SETTINGS)
"""
READY = 2  # one-shot processes kept waiting; each is about 3 MB


class Call:
    """A call that runs; closing the leash ends it."""

    def __init__(self, status_fd: int, leash: int) -> None:
        self.status_fd, self._leash = status_fd, leash

    def kill(self) -> None:
        """End the call and everything it started."""
        os.close(self._leash)
        self._leash = -1

    def reap(self) -> None:
        """Close what the keeper held of the call."""
        os.close(self.status_fd)
        if self._leash >= 0:
            os.close(self._leash)


class Function(Container):
    """One warm interpreter and its ready processes; see `api.Substrate`."""

    root_bind = "--ro-bind"
    nested = True

    def __init__(self, box: Path, layers: Path, spec: Spec) -> None:
        super().__init__(box, layers, spec)
        self.capabilities = capabilities_here(self._group, files="none")

    def _first_process(self) -> list[str]:
        return ["/usr/bin/env", "python3", "-I", "-c", _BOOT]

    def _stdin(self) -> int:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        limits = self._spec.limits
        disk = int(limits.disk_mb * 1024 * 1024)
        address = None if self._group else int(limits.memory_mb * 1024 * 1024)
        settings = {
            "ready": READY, "uid": INSIDE_UID, "disk": disk, "filter": self._filter.hex(),
            "limits": {"processes": limits.processes + 1, "open_files": limits.open_files, "file_bytes": disk,
                       "address_bytes": address},
        }  # fmt: skip
        # The inside has no Pelagos: two modules travel as text, under the names they import each other by.
        texts = {m.__name__: Path(str(m.__file__)).read_text(encoding="utf-8") for m in (linux, worker)}
        program = linux.file_of(f"TEXTS, SETTINGS = {texts!r}, {settings!r}\n{_PROGRAM}".encode())
        socket.send_fds(control, [b"program"], [program])
        os.close(program)
        self._hold = control.detach()
        return theirs.detach()

    def spawn(self, command: Command, stdio: tuple[int, int, int]) -> Child:
        """Hand a call to a ready process; raises SandboxError where the warm interpreter is gone."""
        environment = ENVIRONMENT | dict(command.env)
        ask = {"argv": command.argv, "env": environment, "source": command.call, "arguments": command.arguments}
        status, status_w = os.pipe()
        leash_r, leash = os.pipe()
        text = linux.file_of(json.dumps(ask).encode())
        with socket.socket(fileno=os.dup(self._hold)) as control:
            try:
                facts = json.dumps({"cwd": command.cwd}).encode()
                socket.send_fds(control, [facts], [text, *stdio, status_w, leash_r])
            except OSError as error:
                os.close(status)
                os.close(leash)
                raise SandboxError(f"function {self._spec.id}: its warm interpreter ended ({error})") from None
            finally:
                for fd in (text, status_w, leash_r):
                    os.close(fd)
        return Call(status, leash)
