"""Control groups of version 2 in a guest that has nothing else: limits, what is used, freezing, kills, sweeping."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import pytest

from pelagos.errors import SandboxError
from pelagos.sandbox import Store, vm
from pelagos.sandbox import log as logs
from pelagos.sandbox.api import Spec

INIT = """#!/bin/busybox sh
PATH=/bin
busybox mount -t proc p /proc; busybox mount -t devtmpfs d /dev
for m in MODULES; do [ -e /$m.ko ] && busybox insmod /$m.ko; done
n=0; while ! [ -b /dev/vda ] && [ $n -lt 100 ]; do busybox usleep 20000; n=$((n+1)); done
busybox mount -t ext4 -o ro /dev/vda /b
busybox mount --move /dev /b/dev; busybox mount --move /proc /b/proc
busybox mount -t sysfs s /b/sys; busybox mount -t cgroup2 c /b/sys/fs/cgroup
busybox chroot /b /usr/bin/python3 -I -S -c "$(busybox cat /agent)"
busybox reboot -f
"""
# What the guest does and tells: one JSON object behind the word FOUND.
AGENT = """
import json, os, sys, time, types
for name, text in TEXTS.items():
    parent = name.rpartition(".")[0]
    sys.modules.setdefault(parent, types.ModuleType(parent)).__path__ = []
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
Group, Limits = module.Group, sys.modules["pelagos.sandbox.api"].Limits
def child(group, work):
    pid = os.fork()
    if not pid:
        for fd in group.open_joins():
            os.write(fd, b"0")
        os.close(group.lock)
        try:
            work()
        finally:
            os._exit(0)
    return pid
def forks():
    count = 0
    try:
        while count < 100:
            if not os.fork():
                time.sleep(60)
                os._exit(0)
            count += 1
    except OSError:
        pass
    os.write(told, b"%d" % count)
def spin():
    began, used = time.monotonic(), time.process_time()
    while time.monotonic() - began < 2:
        pass
    os.write(told, b"%f" % ((time.process_time() - used) / 2))
hear, told = os.pipe()
group = Group.create("one")
group.limit(Limits(cpu=0.5, memory_mb=24, processes=8))
found = {"unified": group.unified, "controllers": sorted(group.directories)}
sleeper = child(group, lambda: time.sleep(60))
time.sleep(0.5)
found["processes"] = group.usage()["processes"]
events = group.directories["freezer"] / "cgroup.events"
for on in (True, False):
    group.freeze(on)
    found[f"frozen_{on}"] = f"frozen {int(on)}" in events.read_text()
found["hog"] = os.waitstatus_to_exitcode(os.waitpid(child(group, lambda: bytearray(60 << 20)), 0)[1])
found["kills"] = group.kills()
os.waitpid(child(group, forks), 0)
found["forks"] = int(os.read(hear, 100))
(group.directories["pids"] / "cgroup.kill").write_text("1")
os.waitpid(sleeper, 0)
group.remove()
found["left"] = group.directories["pids"].exists()
other = Group.create("two")
other.limit(Limits(cpu=0.5, memory_mb=64, processes=8))
os.waitpid(child(other, spin), 0)
found["share"] = float(os.read(hear, 100))
sleeper = child(other, lambda: time.sleep(60))
module.sweep()
found["held"] = other.directories["pids"].exists()
other.freeze(True)
os.close(other.lock)  # as if its keeper, which is us, had been killed
module.sweep()
found["swept"] = not other.directories["pids"].exists() and os.waitpid(sleeper, 0)[1]
print("FOUND" + json.dumps(found), flush=True)
time.sleep(0.5)
"""


@pytest.mark.slow
def test_version_2_limits_counts_freezes_and_sweeps(tmp_path: Path) -> None:
    try:
        vm.tools()
        modules = vm.find_modules()
    except SandboxError as missing:
        pytest.skip(str(missing))
    store = Store(tmp_path)
    (store.boxes / "x").mkdir()
    machine = vm.VirtualMachine(store.boxes / "x", store.layers, Spec(id="x", substrate="microvm", base="host"), None)
    house = Path(logs.__file__).parents[1]
    texts = {f"pelagos.{name}": house.joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8")
             for name in ("errors", "sandbox.linux", "sandbox.api", "sandbox.cgroups")}  # fmt: skip
    parts = {"init": (0o755, INIT.replace("MODULES", vm.MODULES).encode()),
             "agent": (0o644, f"TEXTS = {texts!r}{AGENT}".encode()),
             "bin/busybox": (0o755, Path("/bin/busybox").read_bytes())}  # fmt: skip
    parts |= {module.name: (0o644, module.read_bytes()) for module in modules}
    (tmp_path / "initrd").write_bytes(gzip.compress(vm._cpio(parts), 1))
    options = "-M microvm -m 256 -nodefaults -no-user-config -nographic -no-reboot -accel tcg -cpu max -serial stdio"
    disk = ["-drive", f"if=none,id=base,file={machine._base()},format=raw,readonly=on"]
    words = ["qemu-system-x86_64", *options.split(), *disk, "-device", "virtio-blk-device,drive=base", "-kernel",
             str(vm.host_kernel()), "-initrd", str(tmp_path / "initrd"), "-append",
             machine._command(False)[machine._command(False).index("-append") + 1]]  # fmt: skip
    said = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=120).stdout.decode()
    assert "FOUND" in said, said[-2000:]
    found = json.loads(said.partition("FOUND")[2].splitlines()[0])
    share = found.pop("share")
    assert 0.4 < share < 0.6
    assert found == {
        "unified": True, "controllers": ["cpu", "freezer", "memory", "pids"], "processes": 1, "frozen_True": True,
        "frozen_False": True, "hog": -9, "kills": 1, "forks": 18, "left": False, "held": True, "swept": 9,
    }  # fmt: skip
