"""The warm interpreter of a function sandbox: keeps isolated one-shot processes ready and hands each call to one.

Runs inside bubblewrap as the text of `linux.py` and this file, standard library only. Each call has its own user, pid,
mount, ipc and network namespace, fresh /tmp, /workspace and /dev/shm, no capability and the seccomp filter.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any

from pelagos.sandbox import linux

VALUE_BYTES = 1 << 20
PACKET = 1 << 17


def serve(control: socket.socket, settings: dict[str, Any]) -> None:
    """Answer calls from `control` until it closes; one packet a call, its text in the first descriptor."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the waiters report to the keeper; nobody waits for them
    ready = [_prepare(control, settings) for _ in range(settings["ready"])]
    os.write(1, b"ready\n")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    while True:
        data, fds, _, _ = socket.recv_fds(control, PACKET, 8)
        if not data:
            return
        worker = ready.pop(0)
        with contextlib.suppress(OSError):  # a dead worker's call ends without a status, which says so
            socket.send_fds(worker, [data], fds)
        worker.close()
        for fd in fds:
            os.close(fd)
        ready.append(_prepare(control, settings))


def _prepare(control: socket.socket, settings: dict[str, Any]) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def work() -> None:
        linux.close_all_but([theirs.fileno()])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _wait(theirs, settings)

    linux.fork(work, traceback.print_exception)
    theirs.close()
    return ours


def _wait(requests: socket.socket, settings: dict[str, Any]) -> None:
    """Outside the call's namespaces: pass the call on, end it when told, report how it ended."""
    linux.unshare("user", "pid", "mnt", "ipc", "net", "uts")
    linux.map_user(settings["uid"], settings["uid"], settings["uid"])
    inner, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def work() -> None:
        linux.close_all_but([theirs.fileno()])
        _first(theirs, settings)

    first = linux.fork(work, traceback.print_exception)
    theirs.close()
    data, fds, _, _ = socket.recv_fds(requests, PACKET, 8)
    if not data:
        return
    text, stdin, stdout, stderr, status, leash = fds
    value = os.memfd_create("value")
    socket.send_fds(inner, [data], [text, stdin, stdout, stderr, value])
    for fd in (text, stdin, stdout, stderr):
        os.close(fd)
    watch = os.pidfd_open(first)
    if leash in select.select([watch, leash], [], [])[0]:
        os.kill(first, signal.SIGKILL)  # and with it everything in its pid namespace
    code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    inner.setblocking(False)
    with contextlib.suppress(OSError, ValueError):  # it was killed itself and told nothing
        code = int(inner.recv(16))
    report = {"exit_code": code, "value": os.pread(value, VALUE_BYTES + 1, 0).decode("utf-8", "replace")}
    with contextlib.suppress(BrokenPipeError), os.fdopen(status, "w", encoding="ascii") as file:
        file.write(json.dumps(report) + "\n")


def _first(requests: socket.socket, settings: dict[str, Any]) -> None:
    """The first process of the call's pid namespace: make the mounts, wait for the call, reap, tell its code."""
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    for place in ("/tmp", "/workspace", "/dev/shm"):
        linux.mount("tmpfs", place, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, f"size={settings['disk']},mode=1777")
    linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)  # what runs next has this uid: it may not look into us
    data, fds, _, _ = socket.recv_fds(requests, PACKET, 8)
    if not data:
        return

    def work() -> None:
        code = 1
        try:
            code = _run(json.loads(data), fds, settings)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)

    target = linux.fork(work, traceback.print_exception)
    for fd in fds:
        os.close(fd)
    while True:
        pid, status = os.wait()
        if pid == target:
            requests.send(b"%d" % os.waitstatus_to_exitcode(status))
            return


def _run(ask: dict[str, Any], fds: list[int], settings: dict[str, Any]) -> int:
    text, stdin, stdout, stderr, value = fds
    source = os.pread(text, os.fstat(text).st_size, 0).decode("utf-8")
    os.setsid()
    for number, fd in enumerate((stdin, stdout, stderr)):
        os.dup2(fd, number)
    value = os.dup2(value, 3, inheritable=False)
    linux.close_all_but([value])
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
    linux.limit(**settings["limits"])
    linux.drop_capabilities()
    linux.load_seccomp(bytes.fromhex(settings["filter"]))
    os.umask(0o022)
    os.chdir(ask["cwd"])
    command = json.loads(source)
    if command["argv"]:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        try:
            os.execvpe(command["argv"][0], command["argv"], command["env"])
        except OSError as error:
            print(f"sandbox: cannot run {command['argv'][0]!r}: {error}", file=sys.stderr)
            return 127
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "rw"[n > 0], encoding="utf-8") for n in range(3))
    space: dict[str, Any] = {"__name__": "call"}
    exec(compile(command["source"], "<call>", "exec"), space)
    answer = json.dumps(space["main"](*json.loads(command["arguments"]))).encode()
    if len(answer) > VALUE_BYTES:
        raise ValueError(f"main returned {len(answer)} bytes of JSON, at most {VALUE_BYTES}; write a file or print")
    os.write(value, answer)
    return 0
