"""The kernel calls that everything else leans on."""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pelagos.sandbox import guest, linux, mux


def child(work: Callable[[], object], complain: Callable[[BaseException], object] = lambda error: None) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(linux.fork(work, complain), 0)[1])


def fails(*_: Any) -> None:
    raise RuntimeError("in the child")


def test_a_forked_child_never_comes_back() -> None:
    """A child whose complaint fails too would go on with its parent's code, and its parent's rights."""
    here = os.getpid()
    assert [child(lambda: None), child(fails), child(fails, fails), child(lambda: os._exit(7))] == [0, 1, 1, 7]
    assert os.getpid() == here


def test_close_all_but() -> None:
    read, write = os.pipe()
    keep = os.dup2(write, 700)

    def work() -> None:
        linux.close_all_but([keep, 1, read, read])
        os.fstat(read)
        os.write(keep, b"".join(b"%d " % n for n in range(3, 800) if is_open(n)))

    def is_open(fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:
            return False
        return True

    assert child(work) == 0
    assert [int(n) for n in os.read(read, 1000).split()] == sorted([read, keep])
    for fd in (read, write, keep):
        os.close(fd)


def test_no_import_after_it_is_forbidden() -> None:
    def work() -> None:
        linux.forbid_imports()
        try:
            import this  # noqa: F401
        except (ImportError, ImportWarning):  # the warning is an error in this suite
            os._exit(42)

    assert child(work) == 42


def test_the_filter_is_well_formed() -> None:
    program = linux.seccomp_program()
    steps = list(struct.iter_unpack("=HBBI", program))
    returns = {k for code, _, _, k in steps if code == 0x06}
    assert returns == {0x7FFF0000, 0x80000000, 0x50001, 0x50026, 0x50061}
    for place, (code, true, false, _) in enumerate(steps):
        if code & 0x07 == 0x05:
            assert place + 1 + max(true, false) < len(steps)
    assert steps[-1][0] == 0x06


@pytest.mark.parametrize(
    ("call", "code"), [("unshare('user')", 1), ("mount('x', '/tmp', 'tmpfs')", 1), ("prctl(999)", 22)]
)
def test_filtered_calls_fail_with_their_number(call: str, code: int) -> None:
    def work() -> None:
        linux.unshare("user")
        linux.drop_capabilities()
        linux.load_seccomp(linux.seccomp_program())
        with pytest.raises(OSError, match=call.partition("(")[0]) as caught:
            eval(call, vars(linux))
        os._exit(100 + (caught.value.errno or 0))

    assert child(work) == 100 + code


def test_a_guest_survives_a_command_that_ends_as_it_is_killed() -> None:
    (control, asks), (port, agent), (link, theirs) = linux.link(), socket.socketpair(), linux.link()
    ended, every, outcome = b'{"exit_code":0}', sys.getswitchinterval(), []

    def serve() -> None:
        mux.Mux(control, port).serve()
        outcome.append("asked to end")

    with control, asks, port, agent, link:
        null = os.open(os.devnull, os.O_RDWR)
        socket.send_fds(asks, [b"run"], [linux.file_of(b"{}"), null, null, null, theirs.detach()])
        served = threading.Thread(target=serve)
        served.start()
        assert agent.recv(4096)
        sys.setswitchinterval(60.0)  # both are there when it looks
        try:
            agent.sendall(guest.HEAD.pack(1, b"X", len(ended)) + ended)
            link.shutdown(socket.SHUT_WR)
        finally:
            sys.setswitchinterval(every)
        assert link.recv(4096) == ended + b"\n"
        asks.shutdown(socket.SHUT_WR)
        served.join(10)
    assert outcome == ["asked to end"]
