"""The warm interpreter of a function sandbox: slots, each of which makes one isolated process after another for calls.

Runs inside bubblewrap as the text of `linux.py` and this file, standard library only. A slot has its own user and
network namespace, each call its own pid, mount and ipc namespace, fresh /tmp, /workspace and /dev/shm, no capability
and the seccomp filter. The keeper talks to the process of a call itself, since every hop costs a wake-up.
"""

import contextlib
import gc
import json
import os
import select
import signal
import site
import socket
import sys
import time
from typing import Any

from pelagos.sandbox import linux

VALUE_BYTES = 1 << 20
PACKET_BYTES = 1 << 16
GAP_S = 0.002  # a slot lets the end of a call pass before it takes the processor for the next


def serve(control: socket.socket, settings: dict[str, Any]) -> None:
    """Keep `ready` slots, and make one for a single call for every packet on `control`, until it closes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    os.write(1, b"ready\n")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    site.main()  # which the interpreter was told to leave for later
    for _ in range(settings["ready"]):
        linux.fork(lambda: _slot(control, settings, once=False), _complain)
    while control.recv(16):
        linux.fork(lambda: _slot(control, settings, once=True), _complain)


def _complain(error: BaseException) -> None:
    sys.__excepthook__(type(error), error, error.__traceback__)


def _slot(control: socket.socket, settings: dict[str, Any], *, once: bool) -> None:
    """Make a process, send the keeper its socket, end it when the keeper lets go of that; and again."""
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    linux.unshare("user", "net", "uts")
    linux.map_user(settings["uid"], settings["uid"], settings["uid"])
    gc.freeze()
    while True:
        keeper, link = linux.link()
        first = linux.fork_into(("pid", "mnt", "ipc"), lambda: _first(link, settings), _complain)  # noqa: B023
        try:
            socket.send_fds(control, [b"ready"], [keeper.fileno()])
        except OSError:
            return
        keeper.close()
        pidfd, poll = os.pidfd_open(first), select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(link, select.POLLRDHUP)  # the keeper is done with it, or ends it; it never reads here
        poll.poll()
        os.kill(first, signal.SIGKILL)  # and with it everything in its pid namespace
        os.waitpid(first, 0)
        os.close(pidfd)
        with link, contextlib.suppress(OSError):  # nobody waits for this unless the call was killed
            link.send(b'{"exit_code":%d}\n' % -signal.SIGKILL)
        if once:
            return
        time.sleep(GAP_S)


def _first(link: socket.socket, settings: dict[str, Any]) -> None:
    """The first process of a call's pid namespace: make the mounts, fork what will be the call, reap, tell its code."""
    linux.close_all_but([link.fileno()])
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    for place in ("/tmp", "/workspace", "/dev/shm"):
        linux.mount("tmpfs", place, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, f"size={settings['disk']},mode=1777")
    linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV)
    linux.write("/proc/self/oom_score_adj", b"1000")  # killed for memory before the interpreter
    linux.prctl(linux.PR_SET_DUMPABLE, 0)  # what runs next has this uid: it may not look into us
    target = linux.fork(lambda: _run(link, settings), _complain)
    while True:
        pid, status = os.wait()
        if pid == target:
            with contextlib.suppress(OSError):  # it told by itself
                link.send(b'{"exit_code":%d}\n' % os.waitstatus_to_exitcode(status))
            return


def _run(link: socket.socket, settings: dict[str, Any]) -> None:
    """Take on every restriction, wait for the call, be it, and tell how it ended: what it says is about itself."""
    os.setsid()
    linux.limit(**settings["limits"])
    linux.drop_capabilities()
    linux.load_seccomp(bytes.fromhex(settings["filter"]))
    os.umask(0o022)
    # Do once what a call does: this memory becomes its own where it is touched first, a page at a time.
    _value("def main(*words): return words", "[1]")
    for number in range(3):
        os.fdopen(os.dup(number), "rw"[number > 0], encoding="utf-8").close()
    data, fds, _, _ = socket.recv_fds(link, 16, 4)
    if not data:
        return
    text, *stdio = fds
    for number, fd in enumerate(stdio):
        os.dup2(fd, number)
    command = json.loads(os.pread(text, os.fstat(text).st_size, 0))
    linux.close_all_but([link.fileno()])
    code, answer = 1, "null"
    try:
        os.chdir(command["cwd"])
        if command["argv"]:
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
                signal.signal(number, signal.SIG_DFL)
            code = 127
            os.execvpe(command["argv"][0], command["argv"], command["env"])
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "rw"[n > 0], encoding="utf-8") for n in range(3))
        answer = _value(command["source"], command["arguments"])
        if len(answer) > VALUE_BYTES:
            size, answer = len(answer), "null"
            raise ValueError(f"main returned {size} bytes of JSON, at most {VALUE_BYTES}; write a file or print")
        code = 0
    except SystemExit as end:
        code = (end.code if isinstance(end.code, int) else int(end.code is not None)) & 0xFF
    except BaseException as error:
        if code == 127:
            print(f"sandbox: cannot run {command['argv'][0]!r} in {command['cwd']}: {error}", file=sys.stderr)
        else:
            _complain(error)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    report = json.dumps({"exit_code": code, "value": answer}).encode() + b"\n"
    for start in range(0, len(report), PACKET_BYTES):
        link.send(report[start : start + PACKET_BYTES])
    os._exit(code)


def _value(source: str, arguments: str) -> str:
    space: dict[str, Any] = {"__name__": "call"}
    exec(compile(source, "<call>", "exec"), space)
    return json.dumps(space["main"](*json.loads(arguments)))
