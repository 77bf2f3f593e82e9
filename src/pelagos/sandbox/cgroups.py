"""Limits by control group, version 1 or 2, where this process may make groups; `None` where it may not.

Groups lie under `pelagos/<name>` of each hierarchy. Their keeper holds a lock on the one of `memory`, so whoever gets
that lock knows that the keeper is dead. What a controller cannot do here is a flag, never a guess.
"""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pelagos.errors import SandboxError
from pelagos.sandbox import linux
from pelagos.sandbox.api import Limits

PARENT = "pelagos"
CONTROLLERS = ("memory", "pids", "cpu", "freezer")
SPARE_PROCESSES = 12  # beside the limit: bubblewrap, the first process, the ready ones of a function sandbox
END_S = 5.0
_OPTIONAL = ("memory.memsw.limit_in_bytes", "memory.swap.max")


@dataclass(frozen=True, slots=True)
class Group:
    """The groups of one sandbox: controller name to directory (all the same one in version 2)."""

    directories: dict[str, Path]
    unified: bool
    lock: int = -1

    @classmethod
    def create(cls, name: str) -> Self | None:
        """Make the groups and hold their lock; None where memory and process limits cannot both be had."""
        found, unified = _hierarchies()
        made: dict[str, Path] = {}
        lock = -1
        for controller, root in found.items():
            directory = root / PARENT / name
            try:
                directory.parent.mkdir(mode=0o700, exist_ok=True)  # nobody else may hold a lock there
                for above in (root, root / PARENT) if unified else ():
                    (above / "cgroup.subtree_control").write_text("+memory +pids +cpu", encoding="ascii")
                gate = linux.lock(root / PARENT, linux.LOCK_SH)  # none is swept before it is held
                try:
                    directory.mkdir(exist_ok=True)
                    lock = linux.lock(directory) if lock < 0 else lock
                finally:
                    os.close(gate)
                made[controller] = directory
            except OSError:
                continue
        group = cls(made, unified, lock)
        if {"memory", "pids"} <= set(made) and all(os.access(d / "cgroup.procs", os.W_OK) for d in made.values()):
            return group
        group.remove()
        return None

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return the groups that a process is in, made by somebody else."""
        roots, unified = _hierarchies()
        own = {}
        for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines():
            _, names, path = line.split(":", 2)
            own |= dict.fromkeys(names.split(","), path.lstrip("/"))
        return cls({name: root / own["" if unified else name] for name, root in roots.items()}, unified)

    def limit(self, limits: Limits) -> None:
        """Set what may be used."""
        for controller, directory in self.directories.items():
            for file, value in _settings(controller, limits, self.unified):
                if file not in _OPTIONAL or (directory / file).exists():
                    try:
                        linux.write(f"{directory}/{file}", value.encode())
                    except OSError as error:
                        asked = f"{file}={value} cannot be had ({error.strerror})"
                        raise SandboxError(f"{limits}: {asked}; what starts a sandbox may take more") from None

    def open_joins(self) -> list[int]:
        """Open what a process writes "0" to in order to join."""
        return [os.open(d / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for d in sorted(set(self.directories.values()))]

    def usage(self) -> dict[str, int]:
        """Return memory bytes and processes."""
        used = self.directories["memory"] / ("memory.current" if self.unified else "memory.usage_in_bytes")
        processes = self.directories["pids"] / "pids.current"
        return {"memory": int(used.read_bytes()), "processes": int(processes.read_bytes())}

    def kills(self) -> int:
        """Return how many processes were killed for memory."""
        file = self.directories["memory"] / ("memory.events" if self.unified else "memory.oom_control")
        return _fields(file).get("oom_kill", 0)

    def freeze(self, on: bool) -> None:
        """Stop or thaw every process, and wait until the kernel says so."""
        directory = self.directories["freezer"]
        file = directory / ("cgroup.freeze" if self.unified else "freezer.state")
        file.write_text(("1" if on else "0") if self.unified else ("FROZEN" if on else "THAWED"), encoding="ascii")
        deadline, frozen = time.monotonic() + 2, not on
        while frozen != on and time.monotonic() < deadline:
            time.sleep(0.0005)
            if self.unified:
                frozen = bool(_fields(directory / "cgroup.events")["frozen"])
            else:
                frozen = file.read_text(encoding="ascii").strip() == "FROZEN"

    def remove(self) -> None:
        """Kill what is still in the groups, wait for its end, remove them, that of the lock last, and let go of it."""
        deadline = time.monotonic() + END_S
        for directory in dict.fromkeys(reversed(self.directories.values())):
            while time.monotonic() < deadline:
                try:
                    directory.rmdir()
                except FileNotFoundError:
                    pass
                except OSError:
                    self._kill(directory / "cgroup.procs")
                    time.sleep(0.002)
                    continue
                break
        if self.lock >= 0:
            os.close(self.lock)

    def _kill(self, members: Path) -> None:
        with contextlib.suppress(OSError):
            for pid in set(members.read_text(encoding="ascii").split()) - {"0"}:  # 0: of another pid namespace
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            if "freezer" in self.directories:
                self.freeze(False)  # in version 1 what is frozen does not die


def _settings(controller: str, limits: Limits, unified: bool) -> list[tuple[str, str]]:
    memory, quota = str(limits.memory_bytes), int(limits.cpu * 100_000)
    pids = [("pids.max", str(limits.processes + SPARE_PROCESSES))]
    if unified:
        found = {"memory": [("memory.max", memory), ("memory.swap.max", "0")], "cpu": [("cpu.max", f"{quota} 100000")]}
    else:
        names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        found = {"memory": [(name, memory) for name in names], "cpu": [("cpu.cfs_quota_us", str(quota))]}
    return (found | {"pids": pids}).get(controller, [])


def _hierarchies() -> tuple[dict[str, Path], bool]:
    """Where each controller is mounted, `memory` first, and whether that is version 2."""
    found: dict[str, Path] = {}
    unified: Path | None = None
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup":
            for controller in set(options.split(" ")[-1].split(",")) & set(CONTROLLERS):
                found[controller] = Path(left.split(" ")[4])
        elif kind == "cgroup2":
            unified = Path(left.split(" ")[4])
    if unified is not None and "memory" not in found:
        offered = (unified / "cgroup.controllers").read_text(encoding="ascii").split()
        found = {c: unified for c in CONTROLLERS if c in offered or (c == "freezer" and "memory" in offered)}
        return found, True
    return {c: found[c] for c in CONTROLLERS if c in found}, False


def sweep() -> None:
    """End and remove what keepers that were killed left: groups that nobody holds."""
    roots, unified = _hierarchies()
    for path in (roots["memory"] / PARENT).glob("*/cgroup.procs") if "memory" in roots else ():
        with contextlib.suppress(OSError):  # it is held, or gone, or not ours
            gate = linux.lock(roots["memory"] / PARENT, linux.LOCK_EX)
            try:
                lock = linux.lock(path.parent)
            finally:
                os.close(gate)
            Group({c: root / PARENT / path.parent.name for c, root in roots.items()}, unified, lock).remove()


def _fields(path: Path) -> dict[str, int]:
    return {k: int(v) for k, v in (line.split() for line in path.read_bytes().decode("ascii").splitlines())}
