"""What this host can do, found by doing it: every substrate is really started, timed and ended."""

import dataclasses
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pelagos.errors import PelagosError
from pelagos.sandbox import linux
from pelagos.sandbox.keeper import SUBSTRATES
from pelagos.sandbox.layers import Image, Store
from pelagos.sandbox.sdk import Sandbox
from pelagos.sandbox.vm import PROGRAMS

OPTIONAL = ("uml", "docker")  # nothing is wrong with a host that lacks them
ROUNDS = 5
_RAW = "bwrap --unshare-all --ro-bind / / --proc /proc --dev /dev --die-with-parent -- true"


def examine(root: Path | None = None, names: Iterable[str] = tuple(SUBSTRATES)) -> dict[str, Any]:
    """Return `{"host", "missing", "substrates"}`; a substrate that does not start says why under `error`."""
    missing = {name: package for name, package in PROGRAMS.items() if shutil.which(name) is None}
    report: dict[str, Any] = {"host": host_facts(), "missing": missing, "substrates": {}}
    # Looked for and not driven: nothing here was ever run with it.
    report["host"]["firecracker"] = shutil.which("firecracker") or "not found"
    if "bwrap" not in missing:
        report["host"]["raw_bwrap_ms"] = _median(lambda: subprocess.run(_RAW.split(), check=True, capture_output=True))
    with tempfile.TemporaryDirectory(prefix="pelagos-doctor-", dir=root) as directory:
        store = Store(Path(directory))
        began = time.perf_counter()
        image = Image.host(store)
        report["host"]["host_image_ms"] = round((time.perf_counter() - began) * 1e3, 1)
        for name in names:
            try:
                report["substrates"][name] = _try(name, image, store)
            except PelagosError as error:
                report["substrates"][name] = {"works": False, "error": str(error)}
    return report


def table(report: dict[str, Any]) -> str:
    """Return the report for people."""
    lines = [f"{key:18} {value}" for key, value in report["host"].items()]
    lines += [f"missing: {name}; install {package} (Debian)" for name, package in report["missing"].items()]
    for name, found in report["substrates"].items():
        facts = found.get("error") or ", ".join(f"{k}={v}" for k, v in found.items() if k != "works")
        lines.append(f"{name:18} {'works' if found['works'] else 'FAILS'}: {facts}")
    return "\n".join(lines)


def host_facts() -> dict[str, Any]:
    """Return what the kernel is and whether it lets this user make user namespaces (else what it said)."""
    facts: dict[str, Any] = {
        "kernel": platform.release(), "machine": platform.machine(), "uid": os.geteuid(),
        "overlayfs": "\toverlay\n" in Path("/proc/filesystems").read_text(encoding="ascii"),
    }  # fmt: skip
    try:
        facts["seccomp_steps"] = len(linux.seccomp_program()) // 8
    except OSError as error:
        facts["seccomp_steps"] = str(error)
    house = str(Path(__file__).resolve().parents[2])
    probe = f"import sys; sys.path[:0] = [{house!r}]; from pelagos.sandbox import linux; linux.unshare('user', 'mnt')"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    facts["user_namespaces"] = done.returncode == 0 or done.stderr.strip().rpartition("\n")[2]
    return facts


def _try(name: str, image: Image, store: Store) -> dict[str, Any]:
    creations, found = [], {}
    for _ in range(ROUNDS):
        began = time.perf_counter()
        with Sandbox.create(substrate=name, image=image, store=store, ttl_s=60) as box:
            creations.append((time.perf_counter() - began) * 1e3)
            found = {
                "works": box.exec("echo here").text == "here\n",
                "create_ms": round(statistics.median(creations), 1),
            }
            found["exec_ms"] = _median(lambda box=box: box.exec(["true"]))
            if name == "function":
                found["call_ms"] = _median(lambda box=box: box.call("def main(): return 1"))
            found |= dataclasses.asdict(box.capabilities)
    return found


def _median(action: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        action()
        times.append((time.perf_counter() - began) * 1e3)
    return round(statistics.median(times), 1)
