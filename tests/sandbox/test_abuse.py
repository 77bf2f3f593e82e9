"""Attempts to get out of a container, to use more than it was given, and to reach what watches it: none may succeed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pelagos.sandbox import Sandbox, Store
from pelagos.sandbox import log as logs

HERE = Path(__file__).resolve().parent  # of the host, and of no sandbox

# Each prints ESCAPED if it works, and runs as the inside's user with nothing but /bin/sh and the host's programs.
SHELL_ATTEMPTS = {
    "write /usr": "echo x > /usr/x",
    "replace bash": "cp /bin/true /usr/bin/bash",
    "link over bash": "ln -sf /bin/true /bin/bash",
    "remount /usr": "mount -o remount,rw /usr",
    "mount tmpfs": "mount -t tmpfs x /mnt",
    "mount proc": "mount -t proc x /tmp",
    "new user namespace": "unshare -U true",
    "new user namespace as root": "unshare -Ur true",
    "enter init": "nsenter -t 1 -m true",
    "chroot": "chroot / true",
    "setuid su": "su -c true root </dev/null",
    "sudo": "sudo -n true",
    "raw disk": "cat /dev/vda",
    "make a device": "mknod /tmp/null c 1 3",
    "make a disk": "mknod /tmp/disk b 254 0",
    "kernel memory": "cat /dev/mem /proc/kcore",
    "kernel log": "dmesg",
    "sysctl": "echo 1 > /proc/sys/kernel/sysrq",
    "sysrq": "echo b > /proc/sysrq-trigger",
    "core pattern": "echo '|/tmp/x' > /proc/sys/kernel/core_pattern",
    "cgroup file system": "ls /sys/fs/cgroup/memory",
    "sysfs": "ls /sys/kernel",
    "host root's home": "ls ~root/.ssh ~root/.cache",
    "shadow": "cat /etc/shadow",
    "host etc": "cat /etc/machine-id /etc/fstab",
    "host tmp": "ls /tmp | grep .",
    "docker socket": "ls /run/docker.sock /var/run/docker.sock",
    "dbus socket": "ls /run/dbus",
    "ping": "ping -c1 -W1 127.0.0.1",
    "an interface": "grep -vE 'lo:|Inter|face' /proc/self/net/dev",
    "a route": "grep -q ':' /proc/self/net/route",
    "kill all": "kill -9 1 && sleep 0.1 && kill -0 1 && test ! -e /proc/1",
    "first process's root": f"ls /proc/1/root{HERE} || ls /proc/1/cwd/../../../..{HERE}",
    "dot dot": f"ls ../../../../../..{HERE}",
    "change the date": "date -s 2000-01-01",
    "hostname": "hostname evil",
    "load a module": "modprobe loop",
    "swap": "head -c 40960 /dev/zero > sw && mkswap sw && swapon sw",
    "nice": "nice -n -10 sh -c 'test $(nice) -lt 0'",
    "more files": "ulimit -Hn 1000000",
    "more processes": "ulimit -u 100000",
    "chown to root": "touch f && chown 0 f",
    "setuid program": "cp /bin/sh s && chmod u+s s && ./s -p -c 'test $(id -u) = 0'",
    "file capability": "cp /bin/true c && setcap cap_sys_admin+ep c",
    "immutable": "touch i && chattr +i i",
    "write dev": "touch /dev/x",
    "tty": "echo x > /dev/tty",
    "write proc": "echo x > /proc/self/../1/comm",
    "oom shield": "echo -500 > /proc/self/oom_score_adj",
    "host processes": "test $(ls -d /proc/[0-9]* | wc -l) -gt 6",
    "debugger": "strace -o /dev/null true",
    "layer of ours": "grep -E 'pytest|layers|boxes' /proc/self/mountinfo /proc/self/cgroup",
}
# Why each fails: what it is told, and "" where it runs and finds nothing or changes nothing.
REASONS = {
    "Read-only file system": "write /usr; replace bash; link over bash; write dev",
    "must be superuser|must be root": "remount /usr; mount tmpfs; mount proc; hostname",
    "Operation not permitted": "new user namespace; new user namespace as root; enter init; chroot; make a device; "
    "make a disk; kernel log; change the date; swap; more files; file capability; immutable; debugger",
    "Permission denied": "core pattern; nice",
    "denied|nonexistent": "sysctl; sysrq",
    "No such file|not found": "sudo; raw disk; kernel memory; cgroup file system; sysfs; host root's home; shadow; "
    "host etc; docker socket; dbus socket; ping; first process's root; dot dot; load a module",
    "No such device": "tty",
    "I/O error|denied": "write proc; oom shield",
    "Invalid argument": "chown to root",
    "Critical error|Authentication failure|must be suid|cannot set groups|not found": "setuid su",
    "Illegal option|error setting limit": "more processes",
    "^$": "host tmp; an interface; a route; kill all; setuid program; host processes; layer of ours",
}
WHY = {name: reason for reason, names in REASONS.items() for name in names.split("; ")}
PYTHON_ATTEMPTS = {
    "vsock": "socket.socket(40, socket.SOCK_STREAM)",
    "packet": "socket.socket(17, socket.SOCK_RAW)",
    "raw ip": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "bluetooth": "socket.socket(31, socket.SOCK_RAW)",
    "alg": "socket.socket(38, socket.SOCK_SEQPACKET)",
    "the internet": "socket.create_connection(('192.0.2.1', 80), 1)",
    "the host's loopback": "socket.create_connection(('127.0.0.1', {port}), 1)",
    "the host's abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0pelagos-test-{port}')",
    "ptrace": "call(101, 16, 1, 0, 0)",
    "read another's memory": "call(310, 1, 0, 0, 0, 0, 0)",
    "bpf": "call(321, 0, 0, 0)",
    "userfaultfd": "call(323, 0)",
    "io_uring": "call(425, 8, 0)",
    "keyring": "call(250, 0, -3, 1)",
    "perf": "call(298, 0, 0, -1, -1, 0)",
    "open by handle": "call(304, -100, 0, 0)",
    "clone with namespaces": "call(56, 0x10000011, 0, 0, 0, 0)",
    "clone3": "call(435, 0, 88)",
    "unshare": "call(272, 0x10000000)",
    "setns": "call(308, os.open('/proc/self/ns/user', 0), 0)",
    "fsopen": "call(430, b'tmpfs', 0)",
    "pivot": "call(155, b'/', b'/')",
    "32-bit numbers": "call(0x40000000 + 39)",
    "type into the terminal": "fcntl.ioctl(0, 0x5412, b'x')",
    "swap extents": "fcntl.ioctl(os.open('/workspace', 0), 0xC028660F, bytes(64))",
    "memory of the first": "open('/proc/1/mem', 'r+b').read(1)",
    "setuid": "os.setuid(0)",
    "setgroups": "os.setgroups([0])",
    "chroot": "os.chroot('/tmp')",
}
PRELUDE = """
import ctypes, fcntl, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    if libc.syscall(*(ctypes.c_long(x) if isinstance(x, int) else x for x in a)) < 0:
        raise OSError(ctypes.get_errno(), 'refused')
try:
    ATTEMPT
    print('ESCAPED')
except OSError as error:
    print('refused', error.errno)
"""


@pytest.mark.parametrize("name", SHELL_ATTEMPTS)
def test_shell_attempt_fails(box: Sandbox, name: str) -> None:
    done = box.exec(
        f"({SHELL_ATTEMPTS[name]}) >out 2>&1 && echo ESCAPED; cat out; rm -rf ./* 2>/dev/null; exit 0", timeout=20
    )
    assert "ESCAPED" not in done.text, done.text
    assert done.exit_code == 0
    assert re.search(WHY[name], done.text.strip()), (WHY[name], done.text)


def test_there_are_sixty_attempts_and_a_reason_for_each() -> None:
    assert set(WHY) == set(SHELL_ATTEMPTS)
    assert len(SHELL_ATTEMPTS) + len(PYTHON_ATTEMPTS) >= 75


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, str]]:
    """The attempts in Python as programs, while what two of them reach for is there."""
    if os.uname().machine != "x86_64":
        pytest.skip("the call numbers of this test are x86_64's")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        port = server.getsockname()[1]
        abstract.bind(f"\0pelagos-test-{port}")
        abstract.listen()
        yield {n: PRELUDE.replace("ATTEMPT", a.replace("{port}", str(port))) for n, a in PYTHON_ATTEMPTS.items()}


# In one command each would cost a second; a refused call changes nothing, so they can share a process group.
RUN_PROGRAMS = 'cd t; for f in *.py; do echo "$f: $(python3 -I "$f" 2>&1 | tail -1)"; done; rm -r ../t'


def test_python_attempts_fail(box: Sandbox, programs: dict[str, str]) -> None:
    for name, program in programs.items():
        box.files.write(f"t/{name}.py", program)
    answers = dict(line.split(".py: ") for line in box.exec(RUN_PROGRAMS, timeout=100).text.splitlines())
    assert set(answers) == set(PYTHON_ATTEMPTS)
    assert {n: a for n, a in answers.items() if not a.startswith("refused")} == {}


def test_fork_bomb_stays_inside(make: Any) -> None:
    box = make(processes=24, memory_mb=128)
    done = box.exec("f() { f | f & }; f; sleep 1; echo alive", timeout=5)
    assert len([p for p in Path("/proc").iterdir() if p.name.isdigit()]) < 2000
    usage = box.info()["usage"]
    assert usage.get("processes", 0) <= 24 + 12, done
    box.close()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/pelagos/{box.id}"))


def test_memory_bomb_ends_the_command_only(make: Any) -> None:
    box = make(memory_mb=96)
    done = box.exec(["python3", "-c", "x = [bytearray(1 << 20) for _ in range(400)]"], timeout=20)
    assert done.exit_code != 0
    if box.capabilities.memory_limit == "cgroup":
        assert (done.killed_by, done.exit_code) == ("memory", -9)
    assert box.exec("head -c 200000000 /dev/zero > /dev/shm/x; echo $?", timeout=20).text.strip() != "0"
    assert box.exec("rm -f /dev/shm/x; echo fine").text.endswith("fine\n")


def test_disk_bombs_are_cut_or_ended(make: Any) -> None:
    box = make(disk_mb=8)
    one = box.exec("head -c 20000000 /dev/zero > big; stat -c %s big; rm big")
    assert int(one.stdout) <= 8 << 20
    done = box.exec("i=0; while :; do head -c 1000000 /dev/zero > f$i; i=$((i+1)); sleep 0.01; done", timeout=20)
    assert (done.killed_by, done.timed_out) == ("disk", False)
    again = box.exec("rm f*; ls | wc -l")
    assert (again.text, again.killed_by) == ("0\n", None)


def test_a_disk_of_its_own_is_full_when_it_is_full(make: Any) -> None:
    if os.geteuid() != 0 or shutil.which("mke2fs") is None:
        pytest.skip("a file system of its own needs root and mke2fs")
    before = Path("/proc/self/mountinfo").read_text()
    box = make(disk_mb=16, require={"disk_limit": "hard"})
    fill = "i=0; while head -c 1000000 /dev/zero > f$i; do i=$((i+1)); done; ls | wc -l"
    done = box.exec(fill, timeout=20)
    assert (done.killed_by, b"No space left" in done.stderr) == (None, True)
    assert 12 <= int(done.text) <= 17
    assert box.exec("rm f*; echo kept > file; ls").text == "file\n"
    os.kill(box.info()["pid"], signal.SIGKILL)
    assert box.exec("cat file").text == "kept\n"
    assert len(box.pack_diff()) < 100_000
    assert Path("/proc/self/mountinfo").read_text() == before
    box.close()
    deadline = time.monotonic() + 60
    while box.id in _loop_files() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert box.id not in _loop_files()


def _loop_files() -> str:
    return " ".join(path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file"))


def test_hidden_disk_use_is_seen(make: Any) -> None:
    box = make(disk_mb=8)
    fill = "while :; do head -c 1000000 /dev/zero > f$i; i=$((i+1)); sleep 0.01; done"
    done = box.exec(f"mkdir d; cd d; chmod 300 .; i=0; {fill}", timeout=20)
    assert done.killed_by == "disk"


def test_descriptor_bomb_and_output_flood(make: Any) -> None:
    box = make(open_files=64, output_bytes=10_000)
    done = box.exec(["python3", "-c", "import os\nwhile True: os.dup(1)"])
    assert b"Too many open files" in done.stderr
    began = time.monotonic()
    flood = box.exec("yes", timeout=1)
    assert (len(flood.stdout), flood.truncated, flood.timed_out) == (10_000, True, True)
    assert time.monotonic() - began < 30
    assert box.exec("echo fine").text == "fine\n"


def test_log_and_socket_are_out_of_reach_and_the_log_holds(make: Any, store: Store) -> None:
    box = make()
    ours = "-name '*.jsonl' -o -name s -type s -o -name spec.json -o -name 'keeper*'"
    look = f"find / -xdev \\( {ours} \\) -not -path '/usr/*' 2>/dev/null; ls {store.root} 2>&1"
    assert "No such file" in box.exec(look).text
    assert box.exec(look).text.count("\n") == 1
    fds = box.exec("ls -l /proc/self/fd | grep -cE 'socket|jsonl|upper|ns:'").text
    assert fds == "0\n"
    names = box.exec(
        "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' ' '"
    ).text
    assert "pelagos" not in names
    assert str(store.root) not in names
    assert logs.verify(box.directory)[0] >= 9


def test_one_sandbox_cannot_see_another(make: Any) -> None:
    first, second = make(), make()
    first.exec("echo secret > /tmp/secret; sleep 30 >/dev/null 2>&1 & echo secret > /dev/shm/secret")
    seen = second.exec("cat /tmp/secret /dev/shm/secret; pgrep sleep; find / -xdev -name secret 2>/dev/null")
    assert seen.stdout == b""


AS_NOBODY = """
import sys
sys.path.insert(0, sys.argv[1])
import json, re
from pathlib import Path
from pelagos.sandbox import Sandbox, Store
attempts, why, programs, run = json.loads(sys.argv[3])
with Sandbox.create(store=Store(Path(sys.argv[2]))) as box:
    for name, attempt in attempts.items():
        done = box.exec(f'({attempt}) >out 2>&1 && echo ESCAPED; cat out; rm -rf ./* 2>/dev/null; exit 0', timeout=20)
        assert 'ESCAPED' not in done.text and re.search(why[name], done.text.strip()), (name, done)
    for name, program in programs.items():
        box.files.write(f't/{name}.py', program)
    answers = dict(line.split('.py: ') for line in box.exec(run, timeout=100).text.splitlines())
    assert set(answers) == set(programs) and all(a.startswith('refused') for a in answers.values()), answers
FILL = "while :; do head -c 1000000 /dev/zero > f$i; i=$((i+1)); sleep 0.01; done"
with Sandbox.create(store=Store(Path(sys.argv[2])), processes=20, memory_mb=200, disk_mb=8) as box:
    flags = box.capabilities
    assert (flags.host_user, flags.network) == ('caller', 'none'), flags
    assert box.exec('touch /usr/x || unshare -U true || id -u').text == '1000\\n'
    assert b'fork' in box.exec('for i in $(seq 60); do sleep 20 & done', timeout=20).stderr
    assert box.exec(['pkill', 'sleep']).exit_code == 0
    assert box.exec(['python3', '-c', 'x = bytearray(300 << 20)']).exit_code != 0
    assert box.exec('mkdir d; touch d/f; chmod 0 d; i=0; ' + FILL, timeout=20).killed_by == 'disk'
    box.exec('rm f*; (while :; do echo x >> ticks; sleep 0.02; done) >/dev/null 2>&1 &')
    box.pause()
    ticks = box.directory / 'upper/workspace/ticks'
    size = ticks.stat().st_size
    import time; time.sleep(0.3)
    assert ticks.stat().st_size == size
    assert len(box.snapshot().layers) == 2
    assert box.exec(['pkill', 'sh']).exit_code == 0
print('fine')
"""


def test_an_ordinary_user_gets_containers_too(programs: dict[str, str]) -> None:
    """As root we also try as nobody: weaker limits, the same walls, and the flags say so."""
    if os.geteuid() != 0:
        pytest.skip("the other tests ran as an ordinary user already")
    python, house = "/usr/bin/python3", Path(logs.__file__).resolve().parents[2]
    asks = f"import sys; sys.exit(sys.version_info < (3, 11) or not __import__('os').access({str(house)!r}, 5))"
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", python, "-B", "-c"]
    if shutil.which("setpriv") is None or subprocess.run([*nobody, asks], capture_output=True).returncode:
        pytest.skip(f"needs setpriv, and a {python} of 3.11 or later that nobody can run on {house}")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as home:
        os.chown(home, 65534, 65534)
        words = [
            *nobody,
            AS_NOBODY,
            str(house),
            f"{home}/store",
            json.dumps([SHELL_ATTEMPTS, WHY, programs, RUN_PROGRAMS]),
        ]
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=100, env={"HOME": home, "PATH": os.defpath}
        )
        assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr
