"""Containers: bubblewrap over read-only layers and an overlay, entered from outside for each command.

Nothing of ours runs inside but a `cat` that waits on a pipe. Mounts are made in a private namespace of an unprivileged
user, so they end with the processes. Refuses to start where user namespaces, overlay or bubblewrap are missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from pelagos.errors import SandboxError
from pelagos.sandbox import inside, linux
from pelagos.sandbox.api import Capabilities, Child, Command, Spec
from pelagos.sandbox.cgroups import SPARE_PROCESSES, Group

# Who the inside is on the host when the caller is root: in no range of accounts or subordinate uids.
SANDBOX_UID = 2_000_739_100
INSIDE_UID = 1000
START_S = 20.0
NS_GET_USERNS = 0xB701
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PATH, "HOME": "/home/agent", "USER": "agent", "LANG": "C.UTF-8", "TERM": "dumb"}


def host_ids() -> tuple[int, int]:
    """Return the (uid, gid) sandboxes run as on the host: one of their own under root, else the caller's."""
    return (SANDBOX_UID, SANDBOX_UID) if os.geteuid() == 0 else (os.geteuid(), os.getegid())


def capabilities_here(group: Group | None, *, files: str) -> Capabilities:
    """Say how strong the limits of a sandbox in `group` are."""
    have = set(group.directories) if group else set()
    return Capabilities(
        memory_limit="cgroup" if "memory" in have else "per_process",
        process_limit="cgroup" if "pids" in have else "per_user_namespace",
        cpu_limit="cgroup" if "cpu" in have else "none",
        disk_limit="watched" if files == "overlay" else "memory",
        pause="freezer" if "freezer" in have else "signals",
        files=files,
        host_user="separate" if os.geteuid() == 0 else "caller",
    )


class Waiter:
    """The process outside that waits for one command; it outlives the keeper by nothing."""

    def __init__(self, pid: int, status_fd: int) -> None:
        self.pid, self.status_fd = pid, status_fd

    def kill(self) -> None:
        """Kill the command's session; the waiter still reports how it ended."""
        os.kill(self.pid, signal.SIGTERM)

    def reap(self) -> None:
        """Collect the waiter, which ends when it has reported."""
        os.close(self.status_fd)
        os.waitpid(self.pid, 0)


class Container:
    """One container; see `api.Substrate`."""

    root_bind = "--bind"  # how the overlay becomes the root
    nested = False  # whether the first process makes namespaces of its own, and filters what runs in them

    def __init__(self, box: Path, layers: Path, spec: Spec) -> None:
        self._box, self._layers, self._spec = box, layers, spec
        self._group = Group.create(spec.id, spec.limits)
        self.capabilities = capabilities_here(self._group, files="overlay")
        self._filter = linux.seccomp_program()
        self._joins: list[int] = []
        self._ns: dict[str, int] = {}
        self._pid = self._hold = self._said = self._first = -1
        self.upper_fd = -1

    def start(self) -> None:
        """Bring bubblewrap up and take hold of its namespaces; raises SandboxError with what it said."""
        tool = linux.which("bwrap")
        if tool is None:
            raise SandboxError("container: bwrap not found; install bubblewrap (Debian: apt-get install bubblewrap)")
        if not self._spec.layers:
            raise SandboxError(f"sandbox {self._spec.id}: an image needs at least one layer; start from Image.host()")
        self._joins = self._group.open_joins() if self._group else []
        self._prepare()
        info, info_w = os.pipe()
        self._said, said_w = os.pipe()
        hold = self._stdin()
        self._pid = linux.fork(
            lambda: self._launch(tool, info_w, said_w, hold, self._first_process()),
            lambda error: os.write(said_w, f"{type(error).__name__}: {error}".encode()),
        )
        for fd in (info_w, said_w, hold):
            os.close(fd)
        try:
            text = _until_ready(self._said)
            if text != b"ready\n":
                raise SandboxError(
                    f"container {self._spec.id} did not start: {text.decode('utf-8', 'replace').strip()}"
                )
            self._take_namespaces(json.loads(os.read(info, 65536))["child-pid"])
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(info)

    def _stdin(self) -> int:
        """Make what the first process waits on and return its end."""
        hold, self._hold = os.pipe()
        return hold

    def _first_process(self) -> list[str]:
        # It says `ready` because the keeper tells it to, and then waits. None inside can kill the first process of
        # their pid namespace, and as it ignores SIGCHLD it leaves no zombies.
        os.write(self._hold, b"ready\n")
        return ["cat"]

    def _prepare(self) -> None:
        uid, gid = host_ids()
        for name in ("upper", "work"):
            directory = self._box / name
            directory.mkdir(exist_ok=True)
            directory.chmod(0o755)
            os.chown(directory, uid, gid)
        (self._box / "layers").mkdir(exist_ok=True)
        self.upper_fd = os.open(self._box / "upper", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _launch(self, tool: str, info: int, said: int, hold: int, first: list[str]) -> None:
        """In the child: private mounts, then bubblewrap on top of them; only an exec returns from here."""
        uid, gid = host_ids()
        self._join()
        root, layers = str(self._box), str(self._layers)
        if os.geteuid() == 0:
            # The unprivileged user may not walk to our directories, so root lends them under a name it may walk to.
            linux.unshare("mnt")
            linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
            linux.mount(layers, f"{root}/layers", None, linux.MS_BIND)
            linux.mount(root, "/tmp", None, linux.MS_BIND | linux.MS_REC)
            root, layers = "/tmp", "/tmp/layers"
        linux.become(uid, gid)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        linux.unshare("user", "mnt")
        linux.map_user(INSIDE_UID, uid, gid)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        # Layers by descriptor: short enough for many of them, and no path of ours shows in the inside's mount table.
        lower = [os.open(f"{layers}/{digest}", os.O_PATH) for digest in reversed(self._spec.layers)]
        upper, work = (os.open(f"{root}/{name}", os.O_PATH) for name in ("upper", "work"))
        stack = ":".join(f"/proc/self/fd/{fd}" for fd in lower)
        options = f"userxattr,lowerdir={stack},upperdir=/proc/self/fd/{upper},workdir=/proc/self/fd/{work}"
        linux.mount("overlay", "/tmp", "overlay", linux.MS_NOSUID | linux.MS_NODEV, options)
        rules, rules_w = os.pipe()
        os.write(rules_w, self._filter)
        os.close(rules_w)
        self._limit()
        os.dup2(hold, 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        linux.close_all_but([info, rules])
        os.set_inheritable(info, True)
        os.set_inheritable(rules, True)
        if self.nested:
            os.close(rules)
        os.chdir("/")
        os.execve(tool, [tool, *self._arguments(info, rules), *first], {"PATH": PATH})

    def _arguments(self, info: int, rules: int) -> list[str]:
        words = ["--unshare-user --uid", INSIDE_UID, "--gid", INSIDE_UID, "--unshare-pid",
                 "--unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try --hostname sandbox --die-with-parent",
                 "--new-session --as-pid-1 --cap-drop ALL --clearenv", self.root_bind, "/tmp /"]  # fmt: skip
        if self._spec.base == "host":
            parts = ["usr", *(n for n in ("bin", "sbin", "lib", "lib32", "lib64") if not Path("/", n).is_symlink())]
            words += [f"--ro-bind /{name} /{name}" for name in parts if Path("/", name).is_dir()]
        shared = int(self._spec.limits.memory_mb * 1024 * 1024) // 2
        words += [f"--proc /proc --dev /dev --size {shared} --tmpfs /dev/shm --remount-ro /dev --chdir /",
                  f"--info-fd {info}", "--" if self.nested else f"--disable-userns --seccomp {rules} --"]  # fmt: skip
        return " ".join(map(str, words)).split()

    def _take_namespaces(self, pid: int) -> None:
        self._ns = {name: os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in linux.NAMESPACES}
        self._first = os.pidfd_open(pid)
        # bubblewrap ends in a user namespace below the one that owns the rest; that one gives the right to enter.
        self._ns["owner"] = fcntl.ioctl(self._ns["mnt"], NS_GET_USERNS)

    def _join(self) -> None:
        for fd in self._joins:
            os.write(fd, b"0")
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("900")

    def _limit(self) -> None:
        limits = self._spec.limits
        megabyte = 1024 * 1024
        linux.limit(
            processes=limits.processes + SPARE_PROCESSES,
            open_files=limits.open_files,
            file_bytes=int(limits.disk_mb * megabyte),
            address_bytes=None if self._group else int(limits.memory_mb * megabyte),
        )

    def _enter(self, *names: str) -> None:
        for name in names:
            linux.setns(self._ns[name], "user" if name == "owner" else name)

    def spawn(self, command: Command, stdio: tuple[int, int, int]) -> Child:
        """Start a command inside; `stdio` stays the caller's to close."""
        status, status_w = os.pipe()

        def complain(error: BaseException) -> None:
            os.write(status_w, b'{"exit_code":126}\n')
            os.write(stdio[2], f"sandbox: cannot start the command: {error}\n".encode())

        pid = linux.fork(lambda: self._wait_for(command, stdio, status_w), complain)
        os.close(status_w)
        return Waiter(pid, status)

    def _wait_for(self, command: Command, stdio: tuple[int, int, int], status: int) -> None:
        signal.set_wakeup_fd(-1)
        linux.close_all_but([*stdio, *self._ns.values(), *self._joins, status])
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        linux.become(*host_ids())
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        self._enter("owner", "pid")
        target = 0

        def end(number: int, frame: FrameType | None) -> None:
            if target:
                _kill_session(target)

        signal.signal(signal.SIGTERM, end)

        def complain(error: BaseException) -> None:
            os.write(2, f"sandbox: cannot run {command.argv[0]!r} in {command.cwd}: {error}\n".encode())
            os._exit(127)

        target = linux.fork(lambda: self._execute(command, stdio), complain)
        for fd in stdio:
            os.close(fd)
        code = os.waitstatus_to_exitcode(os.waitpid(target, 0)[1])
        os.write(status, json.dumps({"exit_code": code}).encode() + b"\n")

    def _execute(self, command: Command, stdio: tuple[int, int, int]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        self._join()
        linux.forbid_imports()
        self._enter("mnt", "net", "ipc", "uts", "cgroup", "user")
        os.setsid()
        for number, fd in enumerate(stdio):
            os.dup2(fd, number)
        linux.close_all_but([])
        os.umask(0o022)
        os.chdir(command.cwd)
        self._limit()
        linux.drop_capabilities()
        linux.load_seccomp(self._filter)
        os.execvpe(command.argv[0], list(command.argv), ENVIRONMENT | dict(command.env))

    def inside(self, task: str, arguments: dict[str, Any]) -> tuple[int, Callable[[], bool]]:
        """Do a task of `inside.py` in a fork: as the inside's user, or outside with rights over what it owns."""
        out, out_w = os.pipe()
        as_owner = task in ("disk", "pack")

        def work() -> None:
            signal.set_wakeup_fd(-1)
            linux.close_all_but([*self._ns.values(), self.upper_fd, out_w])
            linux.become(*host_ids())
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            linux.prctl(linux.PR_SET_DUMPABLE, 0)
            self._enter("owner")
            if not as_owner:
                linux.forbid_imports()
                self._enter("mnt", "user")
                self._limit()
                linux.drop_capabilities()
            inside.TASKS[task](out_w, **arguments, **({"upper": self.upper_fd} if as_owner else {}))

        pid = linux.fork(work, lambda error: inside.write_all(out_w, json.dumps({"error": f"{error}"}).encode()))
        os.close(out_w)
        return out, lambda: os.waitpid(pid, 0)[1] == 0

    def alive(self) -> bool:
        """Whether the first process still runs."""
        return self._first >= 0 and not select.select([self._first], [], [], 0)[0]

    def usage(self) -> dict[str, int]:
        """Return what the control groups say, nothing where there are none."""
        return self._group.usage() if self._group else {}

    def pause(self, on: bool) -> None:
        """Freeze by control group, else stop each process by signal."""
        if self._group and "freezer" in self._group.directories:
            self._group.freeze(on)
            return

        def work() -> None:
            linux.become(*host_ids())
            self._enter("owner", "pid")
            number = signal.SIGSTOP if on else signal.SIGCONT
            linux.fork(lambda: os.kill(-1, number), print)  # all but the first process and the caller
            os.wait()

        os.waitpid(linux.fork(work, print), 0)

    def stop(self) -> None:
        """Kill bubblewrap, and with it the pid namespace; remove the control groups."""
        if self._group and "freezer" in self._group.directories:
            with contextlib.suppress(FileNotFoundError):  # stopped before
                self._group.freeze(False)
        if self._pid > 0:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
            self._pid = -1
        for fd in (*self._ns.values(), *self._joins, self._hold, self._said, self._first, self.upper_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._ns, self._joins = {}, []
        self._hold = self._said = self._first = self.upper_fd = -1
        if self._group:
            self._group.remove()


def _until_ready(fd: int) -> bytes:
    """What the starting child said: `ready`, or its complaint up to its end."""
    text, deadline = b"", time.monotonic() + START_S
    while text != b"ready\n":
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return text + f"nothing within {START_S:.0f} s".encode()
        if not (piece := os.read(fd, 65536)):
            return text or b"it ended without a word"
        text += piece
    return text


def _kill_session(leader: int) -> None:
    """Kill every process of a session, twice, since some may be forking."""
    for _ in range(2):
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with contextlib.suppress(OSError, ValueError):
                with open(f"/proc/{entry}/stat", "rb") as file:
                    session = int(file.read().rpartition(b")")[2].split()[3])
                if session == leader:
                    os.kill(int(entry), signal.SIGKILL)
