"""Virtual machines: they boot, restore, run and keep the same promises as containers; skipped where QEMU is missing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pelagos.errors import SandboxError
from pelagos.sandbox import Image, Sandbox, Store, guest, inside, vm
from pelagos.sandbox import log as logs


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    try:
        vm.tools()
        vm.find_modules()
    except SandboxError as missing:
        pytest.skip(str(missing))


SIZE: dict[str, Any] = {"substrate": "microvm", "memory_mb": 160, "disk_mb": 128}


def test_microvm_runs_restores_and_forgets_nothing(make: Any, store: Store, tmp_path: Path) -> None:
    first = make(**SIZE)
    done = first.exec("cat; uname -r; id -u; echo oops >&2; exit 3", stdin=b"in\0put")
    version = vm.host_kernel().name.removeprefix("vmlinuz-")
    assert (done.exit_code, done.stdout, done.stderr) == (3, b"in\0put" + f"{version}\n1000\n".encode(), b"oops\n")
    flags = first.capabilities
    assert (flags.memory_limit, flags.disk_limit, flags.network) == ("vm", "hard", "none")
    assert flags.kernel in ("kvm", "tcg")
    began = time.monotonic()
    second = make(**SIZE)  # from the state the first left
    assert time.monotonic() - began < 6
    assert len(list(store.root.glob("vm/*/state"))) == 1
    entropy = {box.exec(["cat", "/proc/sys/kernel/random/uuid"]).text for box in (first, second)}
    assert len(entropy) == 2, "two guests share their randomness"
    assert abs(float(second.exec(["date", "+%s.%N"]).text) - time.time()) < 30
    second.files.write("sub/data", bytes(range(256)) * 300)
    assert second.files.read("sub/data") == bytes(range(256)) * 300
    assert [(e.name, e.kind) for e in second.files.list("sub")] == [("data", "file")]
    with pytest.raises(SandboxError, match="No such file"):
        second.files.read("none")
    slow = second.exec("sleep 30", timeout=0.3)
    assert (slow.timed_out, slow.exit_code) == (True, -signal.SIGKILL)
    assert second.exec("echo x >> n; wc -l < n", request_id="once").text == "1\n"
    assert second.exec("echo x >> n; wc -l < n", request_id="once").replayed
    for attempt in ("echo x > /proc/sysrq-trigger", "mount -t tmpfs x /mnt", "cat /dev/vdb", "ls /sys/class/net/eth0"):
        assert second.exec(attempt).exit_code != 0, attempt
    diff = tmp_path / "diff.tar"
    diff.write_bytes(second.pack_diff())
    with Sandbox.create(store=store, image=Image.host(store).with_tar(diff, store=store)) as container:
        assert container.exec("sha256sum sub/data n").text == second.exec("sha256sum sub/data n").text
    assert logs.verify(second.directory)[0] > 20


@pytest.mark.slow
def test_microvm_floods_fills_and_dies(make: Any) -> None:
    second = make(**SIZE)
    assert second.exec("yes", timeout=1).truncated
    assert second.exec("head -c 200000000 /dev/zero > big; wc -c < big; rm big", timeout=60).text < "2"
    assert second.exec("echo x >> n; wc -l < n", request_id="once").text == "1\n"
    ended = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_qemu_of(p, second)]
    os.kill(ended[0], signal.SIGKILL)
    time.sleep(0.5)
    assert second.exec("cat n; sync").text == "x\n", "the disk outlives the machine"


def _is_qemu_of(process: Path, box: Sandbox) -> bool:
    try:
        return (
            b"qemu" in (process / "cmdline").read_bytes()
            and str(box.directory) in (process / "fd/2").resolve().as_posix()
        )
    except OSError:
        return False


@pytest.mark.slow
def test_fullvm_is_a_machine_with_a_bus(make: Any) -> None:
    box = make(**(SIZE | {"substrate": "fullvm"}))
    assert int(box.exec("ls /sys/bus/pci/devices | wc -l").text) > 3
    assert box.exec("nproc").text == "1\n"


def test_agent_keeps_order_and_limits() -> None:
    """Its frames, without a machine: what a command writes comes before its end, and no more than it may send."""
    port, far = os.pipe()
    agent = guest.Agent(far, os.getuid())
    agent.send(7, b"O", b"abc")
    assert guest.HEAD.unpack(os.read(port, guest.HEAD.size)) == (7, b"O", 3)
    assert set(inside.TASKS) == {"read", "write", "list", "disk", "pack"}
    os.close(far)
    os.close(port)


def test_initial_file_system_is_what_cpio_reads() -> None:
    data = vm._cpio({"init": (0o755, b"#!"), "x": (0o644, b"12345")})
    assert data.startswith(b"070701")
    assert len(data) % 4 == 0
    assert data.count(b"070701") == 5 + 2 + 1
    assert b"TRAILER!!!\0" in data
