"""Function calls: values, errors, isolation of one call from the next, and what a call cannot reach."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pelagos.errors import SandboxError
from pelagos.sandbox import AsyncSandbox, Sandbox, Store
from pelagos.sandbox import log as logs


@pytest.fixture(scope="module")
def functions(store: Store) -> Iterator[Sandbox]:
    with Sandbox.create(substrate="function", store=store, ttl_s=120, memory_mb=256, disk_mb=16, processes=16) as made:
        yield made


def test_values_output_and_errors(functions: Sandbox) -> None:
    done = functions.call("def main(a, b=1):\n    print('out'); return {'sum': a + b}", 2, 3)
    assert (done.value, done.stdout, done.exit_code) == ({"sum": 5}, b"out\n", 0)
    failed = functions.call("def main():\n    return 1 / 0")
    assert (failed.exit_code, failed.value) == (1, None)
    assert b"ZeroDivisionError" in failed.stderr
    assert functions.call("import sys\ndef main():\n    sys.exit(7)").exit_code == 7
    assert functions.call("def main():\n    return object()").exit_code == 1
    assert b"at most" in functions.call("def main():\n    return 'x' * 2_000_000").stderr
    assert functions.call("import os\ndef main():\n    os.kill(os.getpid(), 6)").exit_code == -signal.SIGABRT


def test_commands_run_too(functions: Sandbox) -> None:
    done = functions.exec("cat > f; wc -c < f; exit 137", stdin=b"12345")
    assert (done.text, done.exit_code) == ("5\n", 137)
    assert functions.exec("kill -9 $$").exit_code == -signal.SIGKILL
    assert b"cannot run" in functions.exec(["no-such"]).stderr


def test_nothing_of_a_call_is_left(functions: Sandbox) -> None:
    leave = (
        "import builtins, os, subprocess\ndef main():\n    builtins.left = 1\n"
        "    for p in ('/tmp/x', '/workspace/x', '/dev/shm/x'):\n        open(p, 'w').write('x')\n"
        "    subprocess.Popen(['sleep', '60'], start_new_session=True)\n    return os.listdir('/tmp')"
    )
    look = (
        "import builtins, os\ndef main():\n    return [hasattr(builtins, 'left'), os.listdir('/tmp'),"
        " os.listdir('/workspace'), os.listdir('/dev/shm'), sum(p.isdigit() for p in os.listdir('/proc'))]"
    )
    assert functions.call(leave).value == ["x"]
    for _ in range(4):
        assert functions.call(look).value == [False, [], [], [], 2]


def test_timeouts_and_bombs_end_and_the_next_call_works(functions: Sandbox) -> None:
    assert functions.call("def main():\n    while True: pass", timeout=0.3).timed_out
    assert functions.exec("trap '' TERM; sleep 60 & sleep 60", timeout=0.3).timed_out
    forks = functions.call("import os\ndef main():\n    n = 0\n    while True:\n        if os.fork() == 0:\n"
                           "            import time; time.sleep(30)\n        n += 1", timeout=5)  # fmt: skip
    assert b"BlockingIOError" in forks.stderr
    disk = functions.exec("head -c 40000000 /dev/zero > /tmp/big; echo $?; ls -s --block-size=1M /tmp | head -1")
    assert int(disk.text.split()[-1]) <= 17
    memory = functions.call("def main():\n    return len(bytearray(600 * 2**20))")
    assert memory.exit_code != 0
    assert functions.call("def main():\n    return 'fine'").value == "fine"


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/x', 'w')", "open('/usr/x', 'w')", "open('/etc/x', 'w')",
        "ctypes.CDLL(None, use_errno=True).unshare(0x10000000) and (_ for _ in ()).throw(OSError)",
        "socket.create_connection(('192.0.2.1', 80), 1)", "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
        "open('/proc/1/mem', 'r+b')", "os.listdir('/proc/1/fd')", "os.setuid(0)", "os.mkdir('/dev/x')",
        "open('/proc/1/environ').read()",
    ],
)  # fmt: skip
def test_a_call_cannot(functions: Sandbox, attempt: str) -> None:
    source = "import ctypes, os, socket\ndef main():\n    try:\n        " + attempt
    source += "\n    except OSError:\n        return 'refused'"
    assert functions.call(source).value == "refused"


def test_many_at_once_and_each_its_own(store: Store) -> None:
    async def go() -> list[object]:
        async with await AsyncSandbox.create(substrate="function", store=store, ttl_s=60) as box:
            source = "import os, time\ndef main(n):\n    open('/tmp/n', 'x').write(str(n)); time.sleep(0.1); return n"
            return [done.value for done in await asyncio.gather(*(box.call(source, n) for n in range(8)))]

    assert asyncio.run(go()) == list(range(8))


def test_stateless_means_no_files_and_calls_are_logged_once(functions: Sandbox, store: Store) -> None:
    assert functions.capabilities.files == "none"
    for ask in (functions.snapshot, functions.pack_diff, lambda: functions.files.read("x"), functions.files.list):
        with pytest.raises(SandboxError, match="stateless"):
            ask()
    first = functions.call("import os\ndef main():\n    return os.urandom(8).hex()", request_id="draw")
    again = functions.call("import os\ndef main():\n    return os.urandom(8).hex()", request_id="draw")
    assert (again.value, first.replayed, again.replayed) == (first.value, False, True)
    assert {r["kind"] for r in logs.read_records(functions.directory)} == {"header", "result"}
    with Sandbox.create(store=store) as container, pytest.raises(SandboxError, match="no warm worker"):
        container.call("def main(): pass")


def test_a_warm_interpreter_waits_for_the_next_like_the_last(make: Any, store: Store) -> None:
    options: dict[str, Any] = {"substrate": "function", "memory_mb": 300}

    def make_one() -> tuple[Sandbox, int]:
        """A sandbox, and the keeper that was made warm after it."""
        before = set(store.root.glob("warm/*"))
        one, deadline = make(**options), time.monotonic() + 60
        while not (new := set(store.root.glob("warm/*")) - before):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return one, int(new.pop().name)

    _, warm = make_one()
    second, doomed = make_one()
    assert second.info()["pid"] == warm
    assert second.call("def main(x): return x + 1", 7).value == 8
    os.kill(doomed, signal.SIGKILL)
    assert make(**options).call("def main(): return 5").value == 5, "one that was killed is passed over"
    assert make(**options | {"memory_mb": 200}).call("def main(): return 6").value == 6


def test_a_keeper_does_not_hold_what_calls_returned(functions: Sandbox) -> None:
    source = "def main(): return 'x' * 1_000_000"
    for _ in range(100):  # each with a timer of a minute that nobody waits for any more
        assert len(functions.call(source).value) == 1_000_000
    text = Path(f"/proc/{functions.info()['pid']}/status").read_text()
    resident = int(text.partition("VmRSS:")[2].split()[0])
    assert resident < 140_000, f"{resident} kB, of which what is returned is no part"
