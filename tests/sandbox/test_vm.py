"""Virtual machines: they boot, restore, run and keep the same promises as containers; skipped where QEMU is missing."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import struct
import subprocess
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
    boot = second.exec("cat /proc/sys/kernel/random/boot_id").text
    second.exec("for i in $(seq 100); do /bin/true; done; python3 -c 'for i in range(5000000): pass'; ps ax")
    assert second.exec("md5sum", stdin=b"y" * 4_000_000).exit_code == 0
    assert second.exec("cat /proc/sys/kernel/random/boot_id").text == boot, "what QEMU translated outgrew its memory"
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


def test_uml_keeps_the_same_promises(make: Any, store: Store) -> None:
    """Its one line loses what comes too fast: commands with much input and output are what must come through whole."""
    try:
        vm.tools("linux.uml")
    except SandboxError as missing:
        pytest.skip(str(missing))
    box = make(**(SIZE | {"substrate": "uml"}))
    assert (box.capabilities.kernel, box.capabilities.disk_limit) == ("uml", "hard")
    done = box.exec("cat; id -u; echo oops >&2; exit 3", stdin=b"in\0put")
    assert (done.exit_code, done.stdout, done.stderr) == (3, b"in\0put1000\n", b"oops\n")
    assert box.exec("uname -r").text != os.uname().release + "\n"
    data = bytes(range(256)) * 2000
    assert box.exec("cat", stdin=data).stdout == data
    box.files.write("sub/data", data)
    assert box.files.read("sub/data") == data
    assert box.exec("for i in $(seq 200); do (true &); done; sleep 0.2; echo fine").text == "fine\n"
    slow = box.exec("sleep 30", timeout=0.5)
    assert (slow.timed_out, slow.exit_code) == (True, -signal.SIGKILL)
    for attempt in ("echo x > /proc/sysrq-trigger", "mount -t tmpfs x /mnt", "cat /dev/ubdb", "ls /sys/class/net/eth0"):
        assert box.exec(attempt).exit_code != 0, attempt
    with Sandbox.create(store=store, image=box.snapshot()) as container:
        assert container.files.read("sub/data") == data


def test_a_disk_is_for_machines_only(make: Any, store: Store, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    image = Image.disk(tmp_path / "disk", store=store)
    assert image.base == f"disk:{hashlib.sha256(bytes(1 << 20)).hexdigest()}"
    assert Image.disk(tmp_path / "disk", store=store) == image
    for substrate in ("container", "function", "microvm"):
        with pytest.raises(SandboxError, match="use substrate='fullvm'"):
            make(substrate=substrate, image=image)
    with pytest.raises(SandboxError, match=r"is not in .*; make the image"):
        make(substrate="fullvm", image=Image("disk:../../x", image.layers))
    with pytest.raises(SandboxError, match="expected a file that holds a disk"):
        Image.disk(tmp_path / "none", store=store)


# A system as others make it, with a boot loader, its own kernel and cloud-init; in a directory it may mount in.
SYSTEM = """
set -e
debootstrap --variant=minbase --include=systemd-sysv,python3-minimal,kmod,udev,dbus bookworm root
cp -r /etc/apt/. root/etc/apt/; cp /etc/resolv.conf /etc/hosts root/etc/
mount --bind /proc root/proc
export DEBIAN_FRONTEND=noninteractive
chroot root apt-get -qq update
chroot root apt-get -qq install --no-install-recommends linux-image-cloud-amd64 initramfs-tools cloud-init \
    grub-pc-bin grub2-common ifupdown
umount root/proc
cat > root/grub.cfg << 'END'
set root=(hd0,msdos1)
linux /vmlinuz root=/dev/vda1 rw console=ttyS0 net.ifnames=0
initrd /initrd.img
boot
END
chroot root grub-mkimage -O i386-pc -o /core.img -p / -c /grub.cfg biosdisk part_msdos ext2 linux normal
truncate -s 1500M disk
mke2fs -q -t ext4 -F -E offset=1048576 -d root disk 1534976k
dd if=root/usr/lib/grub/i386-pc/boot.img of=disk bs=440 count=1 conv=notrunc status=none
dd if=root/core.img of=disk bs=512 seek=1 conv=notrunc status=none
"""


@pytest.mark.slow
def test_fullvm_boots_a_disk_of_another_system(make: Any, store: Store, tmp_path: Path) -> None:
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        pytest.skip("needs root, debootstrap and a mirror of Debian, to make a disk")
    made = subprocess.run(["unshare", "-m", "sh", "-c", SYSTEM], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    with (tmp_path / "disk").open("r+b") as disk:  # a table of one partition, that Linux boots from
        disk.seek(446)
        disk.write(
            struct.pack("<B3sB3sII", 0x80, bytes(3), 0x83, bytes(3), 2048, 2 * 1534976) + bytes(48) + b"\x55\xaa"
        )
    _live_in_a_disk(make, Image.disk(tmp_path / "disk", store=store))


def _live_in_a_disk(make: Any, image: Image) -> None:
    size = {"substrate": "fullvm", "memory_mb": 512, "disk_mb": 128, "ttl_s": 900}
    box = make(**size, image=image)
    system = "cat /proc/1/comm; . /etc/os-release; echo $VERSION_CODENAME; id -u; pwd"
    assert box.exec(system).text == "systemd\nbookworm\n1000\n/workspace\n"
    assert b"denied" in box.exec("rm /etc/motd").stderr, "the system's files are its root's"
    assert box.exec("sudo -n true || mount -t tmpfs x /mnt").exit_code != 0
    assert box.exec("echo kept > f; df /workspace | tail -1 | cut -d' ' -f1").text == "overlay\n"
    packed = box.snapshot()
    assert packed.base == image.base
    os.kill(box.info()["pid"], signal.SIGKILL)
    assert box.exec("cat f").text == "kept\n", "its disk outlives it"
    box.close()
    other = make(**size, image=packed)
    assert other.exec("cat f").text == "kept\n"


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
