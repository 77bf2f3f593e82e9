"""What clients, keeper and substrates say to each other: specs, limits, capability flags, results, commands."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from pelagos.errors import SandboxError

MOST = 1e12  # of any limit, and of seconds: megabytes as bytes still fit the kernel's numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one sandbox may use; `Capabilities` says how each is enforced."""

    cpu: float = 1.0
    memory_mb: int = 512
    disk_mb: int = 1024
    processes: int = 128
    open_files: int = 1024
    output_bytes: int = 1 << 20  # kept of each stream of one command; the rest is read, dropped and flagged

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            kinds = (int, float) if f.name in ("cpu", "memory_mb", "disk_mb") else int
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < MOST:
                raise SandboxError(f"{f.name}={value!r:.40}: not a {'whole ' * (kinds is int)}number > 0, < {MOST:.0e}")

    @property
    def memory_bytes(self) -> int:
        """`memory_mb` in bytes."""
        return int(self.memory_mb * (1 << 20))

    @property
    def disk_bytes(self) -> int:
        """`disk_mb` in bytes."""
        return int(self.disk_mb * (1 << 20))

    def of_process(self, *, memory: bool, spare: int = 0) -> dict[str, Any]:
        """Return what `linux.limit` sets, of memory only where nothing else limits that."""
        return {"processes": self.processes + spare, "open_files": self.open_files, "file_bytes": self.disk_bytes,
                "address_bytes": self.memory_bytes if memory else None}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """How strong each promise is on this host; a weaker way is named here and never taken silently."""

    memory_limit: str  # "cgroup" (the whole sandbox), "vm" or "per_process" (RLIMIT_AS)
    process_limit: str  # "cgroup", "vm", "per_user_namespace" (RLIMIT_NPROC, counted in the sandbox's) or "none"
    cpu_limit: str  # "cgroup", "vm" (so many processors) or "none"
    disk_limit: str  # "hard", "watched" (files hard, sum polled) or "memory" (tmpfs, charged as memory)
    pause: str  # "freezer", "signals" (SIGSTOP, which the inside can undo) or "none"
    files: str  # "overlay" or "none" (stateless: no file calls, no snapshots)
    # "separate" (an unprivileged uid of its own), "caller" (yours), "inside" (the number inside, whoever has it here)
    host_user: str
    network: str = "none"  # or "proxy": an HTTP proxy to the names on a list
    terminal: str = "none"  # or "yes"
    kernel: str = "shared"  # the host's own; or the guest's under "kvm", "tcg" or "uml"

    def check(self, required: Mapping[str, str]) -> None:
        """Raise SandboxError naming the first flag of `required` that this host does not have."""
        have = dataclasses.asdict(self)
        for name, value in required.items():
            if have.get(name) != value:
                flags = ", ".join(f"{k}={v}" for k, v in have.items())
                raise SandboxError(f"require {name}={value!r}: this host has {have.get(name)!r} (flags: {flags})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """Everything a sandbox is made from; it is written to its log's header."""

    id: str
    substrate: str
    base: str  # "host", "none" or "disk:" and a digest
    layers: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    ttl_s: float = 900.0
    require: Mapping[str, str] = field(default_factory=dict)
    network: tuple[str, ...] = ()  # names that may be connected to, perhaps with :PORT, or .SUFFIX; none: no network

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read back what `dataclasses.asdict` and JSON made of a spec."""
        return cls(**{**raw, "limits": Limits(**raw["limits"]), "layers": tuple(raw["layers"]),
                      "network": tuple(raw.get("network", ()))})  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecResult:
    """What came of one command; `exit_code` is minus the signal's number where a signal ended it."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool
    wall_ms: float
    timed_out: bool = False
    killed_by: str | None = None  # "disk" or "memory" where a limit ended it
    value: Any = None  # what a function call returned
    replayed: bool = False

    @property
    def text(self) -> str:
        """`stdout` as UTF-8, undecodable bytes replaced."""
        return self.stdout.decode("utf-8", "replace")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileInfo:
    """One entry of a listed directory."""

    name: str
    kind: str  # "file", "directory", "link" or "other"
    size: int
    mode: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command as a substrate gets it; `call` is Python source with a `main` for a warm worker instead of argv."""

    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/workspace"
    call: str | None = None
    arguments: str = "[]"
    tty: tuple[int, int] | None = None  # rows and columns: its first descriptor is a socket that wants the terminal
