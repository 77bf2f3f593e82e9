"""Containers: bubblewrap over read-only layers and an overlay, entered from outside for each command.

Nothing of ours runs inside but a `cat` that waits on a pipe. Mounts are made in a private namespace of an unprivileged
user, so they end with the processes. Refuses to start where user namespaces, overlay or bubblewrap are missing.
"""

import contextlib
import fcntl
import functools
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pelagos.errors import SandboxError
from pelagos.sandbox import inside, linux
from pelagos.sandbox.api import Capabilities, Command, Spec
from pelagos.sandbox.cgroups import SPARE_PROCESSES, Group

# Who the inside is on the host when the caller is root: in no range of accounts or subordinate uids.
SANDBOX_UID = 2_000_739_100
INSIDE_UID = 1000
NS_GET_USERNS = 0xB701
START_S = 20.0
SILENT = b"it ended without a word"
END_S = 5.0
ASK_BYTES = 1 << 17  # what is said about a sandbox that is to be made
PROXY_PORT, PROXY_WORDS = 3128, ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
ENTERED = ("owner", *linux.NAMESPACES)  # the order in which namespaces travel
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MKE2FS = "mke2fs -q -F -t ext4 -O ^has_journal -m 0 -E".split()
ENVIRONMENT = {"PATH": PATH, "HOME": "/home/agent", "USER": "agent", "LANG": "C.UTF-8", "TERM": "dumb"}


def host_ids() -> tuple[int, int]:
    """Return the (uid, gid) sandboxes run as on the host: one of their own under root, else the caller's."""
    return (SANDBOX_UID, SANDBOX_UID) if os.geteuid() == 0 else (os.geteuid(), os.getegid())


def host_parts(wanted: bool) -> list[str]:
    """Return the directories of the host's programs that an image over them is given, nothing for another image."""
    names = ("usr", *(n for n in ("bin", "sbin", "lib", "lib32", "lib64") if not Path("/", n).is_symlink()))
    return [name for name in names if wanted and Path("/", name).is_dir()]


@functools.cache
def bubblewrap() -> str:
    """Return where bubblewrap lies; SandboxError where it is not installed."""
    tool = linux.which("bwrap")
    if tool is None:
        raise SandboxError("container: bwrap not found; install bubblewrap (Debian: apt-get install bubblewrap)")
    return tool


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
        terminal="yes" if files == "overlay" else "none",
    )


def take_notes(box: Path) -> None:
    """Write what goes wrong from here on to the sandbox's `keeper.err`."""
    os.dup2(os.open(box / "keeper.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), 2)


class Home:
    """The control groups of a sandbox to come, and two processes in them: one will start it, one fork what runs there.

    Joining groups takes 16 ms (the kernel waits for a grace period), forking Python 1 and touching its pages for the
    first time 2, so all of it is done before anybody asks, and once.
    """

    def __init__(self, make: "Callable[[Path, Spec, None], Substrate]", rehearse: Callable[[], None]) -> None:
        self.group = Group.create(f"{os.getpid()}-{os.urandom(4).hex()}")
        self.control, theirs = linux.link()
        self.launcher, asks = linux.link()
        linux.seccomp_program()

        def made(box: str, spec: dict[str, Any]) -> Substrate:
            substrate = make(Path(box), Spec.from_dict(spec), None)
            substrate.grouped = self.group is not None
            return substrate

        def launch() -> None:
            linux.close_all_but([asks.fileno()])
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            rehearse()
            told, fds, _, _ = socket.recv_fds(asks, ASK_BYTES, 3)
            if told:
                box, spec, first = json.loads(told)
                made(box, spec).launch(first, asks, *fds)

        def work() -> None:
            joins = self.group.open_joins() if self.group else []
            for fd in joins:
                os.write(fd, b"0")
            linux.close_all_but([theirs.fileno(), asks.fileno()])
            # It outlives a keeper that is killed by as long as it takes to end all that it began, which bubblewrap
            # does not: killed between its fork and its word to go on, it leaves a first process that waits for ever.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGTERM)
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
            rehearse()
            launcher = linux.fork(launch, traceback.print_exception)
            asks.close()
            try:
                if told := theirs.recv(ASK_BYTES):
                    box, spec = json.loads(told)
                    take_notes(Path(box))
                    substrate = made(box, spec)
                    substrate.launcher = launcher
                    substrate.run_inside(theirs)
            except SystemExit:
                pass  # the keeper was killed
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                with contextlib.suppress(OSError):  # it ended
                    os.kill(launcher, signal.SIGKILL)
                linux.end_children()

        self.pid = linux.fork(work, traceback.print_exception)
        linux.close(theirs.detach(), asks.detach())

    def meet(self, box: Path, spec: Spec) -> None:
        """Tell whoever will fork what runs there which sandbox it is."""
        self.control.send(json.dumps([str(box), asdict(spec)]).encode())

    def close(self) -> None:
        """End the processes, and with them the sandbox; remove the groups."""
        if self.group and "freezer" in self.group.directories:
            with contextlib.suppress(OSError):
                self.group.freeze(False)
        self.control.close()
        self.launcher.close()
        if self.pid > 0:
            fd = os.pidfd_open(self.pid)
            if not select.select([fd], [], [], END_S)[0]:
                os.kill(self.pid, signal.SIGKILL)
            os.close(fd)
            os.waitpid(self.pid, 0)
            self.pid = -1
        if self.group:
            self.group.remove()
            self.group = None


class Running:
    """A command that runs: how it ended comes on `link`, and whoever has the other end ends it when this one closes."""

    def __init__(self, link: socket.socket, ended: Callable[[], object] = lambda: None) -> None:
        self.status_fd, self.link, self._ended = link.fileno(), link, ended

    def kill(self) -> None:
        """End the command and what belongs to it; its status still comes."""
        self.link.shutdown(socket.SHUT_WR)

    def reap(self) -> None:
        """Let go of the command, and of what it left running where it is a call."""
        self.link.close()
        self._ended()


class Substrate(ABC):
    """One way to isolate; the keeper drives it and owns log, pipes, caps and timeouts.

    It exists twice: in the keeper with its `home`, and in the process of that `Home` without one.
    """

    capabilities: Capabilities
    whole_disks = False  # whether it takes images of whole disks
    proxies = False  # whether a list of names can be reached from inside
    launcher = -1  # in the process of `Home`: who launches

    def __init__(self, box: Path, layers: Path, spec: Spec, home: Home | None) -> None:
        self._box, self._layers, self._spec, self._home = box, layers, spec, home
        self._group = home.group if home else None
        self.grouped = self._group is not None  # whether control groups limit memory
        self._apart: set[int] = set()
        if spec.base.startswith("disk:") and not self.whole_disks:
            raise SandboxError(f"{spec.substrate}: an image of a whole disk needs a machine; use substrate='fullvm'")
        if spec.network and not self.proxies:
            raise SandboxError(f"{spec.substrate}: network={list(spec.network)}; only containers reach a list of names")

    @property
    def home(self) -> Home:
        """What the keeper's half has; the copy inside has none."""
        assert self._home is not None, "made in the process that is inside already"
        return self._home

    def begin(self) -> None:
        """Begin what takes time, for `start` to wait for; raises SandboxError for what is missing."""
        if self._home:
            self._home.launcher.close()  # who would launch a container

    @abstractmethod
    def start(self) -> None:
        """Bring the sandbox up; raises SandboxError with what the tool said."""

    def launch(self, first: list[str], report: socket.socket, *fds: int) -> None:
        """In the other process of `Home`: become what `begin` said, if it said that."""
        raise NotImplementedError

    def settle(self) -> None:  # noqa: B027  most have nothing left to do
        """Do what nobody waits for once it has started."""

    @abstractmethod
    def run_inside(self, control: socket.socket) -> None:
        """In the process of `Home`: start and run what comes on `control` until it closes."""

    @abstractmethod
    def spawn(self, command: Command, stdio: tuple[int, int, int]) -> Running:
        """Start a command with these three descriptors (the caller closes its own copies)."""

    @abstractmethod
    def inside(self, task: str, arguments: dict[str, Any]) -> tuple[int, Callable[[], bool]]:
        """Begin a task of `inside.py`: a descriptor to read to its end, and what then says whether it went well."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether the sandbox is up."""

    def usage(self) -> dict[str, int]:
        """Return the bytes and counts in use (`memory`, `processes`) as far as the host's control groups tell."""
        return self._group.usage() if self._group and self.alive() else {}

    def kills(self) -> int:
        """Return how many processes were killed for memory, as far as the host's control groups tell."""
        return self._group.kills() if self._group else 0

    @abstractmethod
    def pause(self, on: bool) -> None:
        """Stop every process inside, or let them go on."""

    @abstractmethod
    def stop(self) -> None:
        """Kill everything inside and free what the host holds; files stay."""

    def discard(self) -> None:  # noqa: B027  where nothing lies elsewhere
        """Delete what lies elsewhere than in the sandbox's directory; it has stopped for good."""

    def apart(self, work: Callable[[int], None]) -> tuple[int, Callable[[], bool]]:
        """Do `work`, which writes to a descriptor, in a fork: where to read that, and what tells if it went well."""
        out, out_w = os.pipe()

        def complain(error: BaseException) -> None:
            inside.write_all(out_w, json.dumps({"error": f"{error}"}).encode())

        pid = linux.fork(lambda: work(out_w), complain)
        os.close(out_w)
        self._apart.add(pid)

        def ended() -> bool:
            self._apart.discard(pid)
            return os.waitpid(pid, 0)[1] == 0

        return out, ended

    def let_go(self) -> None:
        """End what works apart; nobody waits for it any more."""
        for pid in self._apart:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def hand_over(self, ask: dict[str, Any], stdio: tuple[int, int, int]) -> Running:
        """Send a command with its three descriptors to the process in `home`; SandboxError where that has ended."""
        text, (link, theirs) = linux.file_of(json.dumps(ask).encode()), linux.link()
        try:
            socket.send_fds(self.home.control, [b"run"], [text, *stdio, theirs.fileno()])
        except OSError as error:
            link.close()
            raise SandboxError(f"sandbox {self._spec.id}: what runs its commands ended ({error})") from None
        finally:
            linux.close(text, theirs.detach())
        return Running(link)


class Container(Substrate):
    """One container."""

    root_bind = "--bind"  # how the overlay becomes the root
    proxies = True
    nested = False  # whether the first process makes namespaces of its own, and filters what runs in them

    def __init__(self, box: Path, layers: Path, spec: Spec, home: Home | None) -> None:
        super().__init__(box, layers, spec, home)
        self.capabilities = capabilities_here(self._group, files="overlay")
        self._filter = linux.seccomp_program()
        # A file system of its own, where that is asked for: a loop device needs root and takes 30 ms.
        self._own_disk = spec.require.get("disk_limit") == "hard" and os.geteuid() == 0
        self._place = box / "own" if self._own_disk else box  # of what the overlay writes
        if self._own_disk:
            self.capabilities = replace(self.capabilities, disk_limit="hard")
        if spec.network:
            self.capabilities = replace(self.capabilities, network="proxy")
        self._ns: dict[str, int] = {}
        self._proxy = -1
        self._hold = self._said = self._info = self._first = self._upper = self._outer = self._pid = -1

    def begin(self) -> None:
        if not self._spec.layers:
            raise SandboxError(f"sandbox {self._spec.id}: an image needs at least one layer; start from Image.host()")
        self._info, info_w = os.pipe()
        self._said, said_w = os.pipe()
        first, hold = self._first_process()
        ask = json.dumps([str(self._box), asdict(self._spec), first])
        socket.send_fds(self.home.launcher, [ask.encode()], [info_w, said_w, hold])
        linux.close(info_w, said_w, hold)

    def start(self) -> None:
        try:
            self.home.meet(self._box, self._spec)
            facts = until_ready(self._info, START_S)
            if facts.startswith(b"{"):  # else it said why not
                self._take_namespaces(json.loads(facts)["child-pid"])
            if self._group:  # whose limit may be less than the memory of what became bubblewrap just now
                self._group.limit(self._spec.limits)
            text = until_ready(self._said, START_S)
            if text != b"ready\n":
                said = text.decode("utf-8", "replace").strip()
                if self.kills():
                    said = f"killed for memory; memory_mb={self._spec.limits.memory_mb} is too little for it"
                elif text == SILENT:
                    raise ConnectionResetError(said)  # it was killed: whoever asked asks another
                raise SandboxError(f"{self._spec.substrate} {self._spec.id} did not start: {said}")
            self._ns["user"] = os.open(f"/proc/{self._pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            if self._spec.network:
                from pelagos.sandbox import proxy  # of which other containers need nothing

                notes = self._box / "network.log"
                self._proxy = proxy.start(notes, self._spec.network, lambda: self._enter("owner", "net"), host_ids())
        except BaseException:
            self.stop()
            raise

    def settle(self) -> None:
        socket.send_fds(self.home.control, [b"enter"], [self._ns[name] for name in ENTERED])
        self._upper, self._outer = socket.recv_fds(self.home.launcher, 16, 2)[1]

    def _first_process(self) -> tuple[list[str], int]:
        """Return the first program and a descriptor it reads; it says `ready`, and ends when ours of that closes."""
        # None inside can kill the first process of their pid namespace, and as it ignores SIGCHLD it leaves no zombies.
        hold, self._hold = os.pipe()
        os.write(self._hold, b"ready\n")
        return ["cat"], hold

    def launch(self, first: list[str], report: socket.socket, *fds: int) -> None:
        """Private mounts, then bubblewrap on top of them, with `first` in it; what goes wrong is told to `fds`."""
        info, said, hold = fds
        try:
            self._mount(report)
            self._become_first(info, said, hold, first)
        except (OSError, SandboxError) as error:
            os.write(said, f"{error}".encode())

    def rehearse(self) -> None:
        """Do once what `launch` does as far as nothing comes of it, in a sandbox that is nowhere."""
        words = ["/nowhere", *self._arguments(0, 0)]
        tries: list[Callable[[], object]] = [
            lambda: linux.mount(words[0], words[0], "none", 0, " "), (self._place / "upper").mkdir,
            lambda: linux.write(words[0], b""), lambda: os.execve(words[0], words, {"PATH": PATH}),
        ]  # fmt: skip
        for attempt in tries:
            with contextlib.suppress(OSError):
                attempt()

    def _mount(self, report: socket.socket) -> None:
        """Mount the layers and what is written over them at /tmp, as the user that runs it."""
        uid, gid = host_ids()
        root, layers = str(self._box), str(self._layers)
        if os.geteuid() == 0:
            linux.unshare("mnt")
            linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
            (self._box / "layers").mkdir(exist_ok=True)
        if self._own_disk:
            disk = self._box / "disk"
            if not disk.exists():
                make_disk(disk, self._spec.limits.disk_mb)
            self._place.mkdir(mode=0o711, exist_ok=True)
            run_tool("mount", "-n", "-o", "loop,nosuid,nodev,noinit_itable", str(disk), str(self._place))
        for name in ("upper", "work"):
            directory = self._place / name
            directory.mkdir(exist_ok=True)
            directory.chmod(0o755)
            os.chown(directory, uid, gid)
        # The keeper holds this mount namespace too: the last who leaves one waits for the kernel to free it, 0.8 ms.
        paths = (f"{self._place}/upper", "/proc/self/ns/mnt")
        socket.send_fds(report, [b"upper"], [os.open(path, os.O_RDONLY) for path in paths])
        if os.geteuid() == 0:
            # The unprivileged user may not walk to our directories, so root lends them under a name it may walk to.
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
        place = f"{root}/own" if self._own_disk else root
        upper, work = (os.open(f"{place}/{name}", os.O_PATH) for name in ("upper", "work"))
        stack = ":".join(f"/proc/self/fd/{fd}" for fd in lower)
        options = f"userxattr,lowerdir={stack},upperdir=/proc/self/fd/{upper},workdir=/proc/self/fd/{work}"
        linux.mount("overlay", "/tmp", "overlay", linux.MS_NOSUID | linux.MS_NODEV, options)

    def _become_first(self, info: int, said: int, hold: int, first: list[str]) -> None:
        """Limit this process and execute bubblewrap, and that the first process, in it."""
        linux.write("/proc/self/oom_score_adj", b"900")
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
        os.execve(bubblewrap(), ["bwrap", *self._arguments(info, rules), *first], {"PATH": PATH})

    def _arguments(self, info: int, rules: int) -> list[str]:
        words = ["--unshare-user --uid", INSIDE_UID, "--gid", INSIDE_UID, "--unshare-pid",
                 "--unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try --hostname sandbox --die-with-parent",
                 "--new-session --as-pid-1 --cap-drop ALL --clearenv", self.root_bind, "/tmp /"]  # fmt: skip
        words += [f"--ro-bind /{name} /{name}" for name in host_parts(self._spec.base == "host")]
        shared = self._spec.limits.memory_bytes // 2
        words += [f"--proc /proc --dev /dev --size {shared} --tmpfs /dev/shm --remount-ro /dev --chdir /",
                  f"--info-fd {info}", "--" if self.nested else f"--disable-userns --seccomp {rules} --"]  # fmt: skip
        return " ".join(map(str, words)).split()

    def _take_namespaces(self, pid: int) -> None:
        """Hold all that were made for the first process; what it goes on to, a user namespace below, is there later."""
        places = {name: f"/proc/{pid}/ns/{name}" for name in linux.NAMESPACES if name != "user"}
        self._ns = {name: os.open(place, os.O_RDONLY | os.O_CLOEXEC) for name, place in places.items()}
        self._ns["owner"] = fcntl.ioctl(self._ns["mnt"], NS_GET_USERNS)  # it gives the right to enter the others
        self._first, self._pid = os.pidfd_open(pid), pid

    def _limit(self) -> None:
        linux.limit(**self._spec.limits.of_process(memory=not self.grouped, spare=SPARE_PROCESSES))

    def _enter(self, *names: str) -> None:
        for name in names:
            linux.setns(self._ns[name], "user" if name == "owner" else name)

    def spawn(self, command: Command, stdio: tuple[int, int, int]) -> Running:
        way = dict.fromkeys(PROXY_WORDS, f"http://127.0.0.1:{PROXY_PORT}") if self._spec.network else {}
        ask = {"argv": command.argv, "env": way | dict(command.env), "cwd": command.cwd, "tty": command.tty}
        return self.hand_over(ask, stdio)

    def run_inside(self, control: socket.socket) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ended = os.pidfd_open(self.launcher)
        if control not in select.select([control, ended], [], [])[0]:
            return  # bubblewrap, before there was anything to enter
        os.close(ended)
        said, fds, _, _ = socket.recv_fds(control, 16, len(ENTERED))
        if said:
            self._ns = dict(zip(ENTERED, fds, strict=True))
            # Commands are killed for memory before the first process, which all of them end with.
            linux.write("/proc/self/oom_score_adj", b"1000")
            linux.become(*host_ids())
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGTERM)
            linux.prctl(linux.PR_SET_DUMPABLE, 0)
            self._enter("owner", "pid")
            gc.freeze()
            self._serve(control)

    def _serve(self, control: socket.socket) -> None:
        poll = select.poll()
        poll.register(control, select.POLLIN)
        ends: dict[int, tuple[int, int]] = {}  # pidfd: pid and link
        links: dict[int, int] = {}  # link: pid, 0 once it was told to end
        while True:
            for fd, _ in poll.poll():
                if fd == control.fileno():
                    data, fds, _, _ = socket.recv_fds(control, 16, 5)
                    if not data:
                        return
                    *given, link = fds
                    links[link] = pid = self._begin(*given)
                    pidfd = os.pidfd_open(pid)
                    ends[pidfd] = pid, link
                    poll.register(pidfd, select.POLLIN)
                    poll.register(link, select.POLLRDHUP)
                elif links.get(fd):
                    poll.unregister(fd)
                    linux.kill_session(links[fd])
                    links[fd] = 0
                elif fd in ends:
                    pid, link = ends.pop(fd)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with contextlib.suppress(OSError):  # the keeper wants to know no more
                        os.write(link, b'{"exit_code":%d}\n' % code)
                    poll.unregister(fd)
                    if links.pop(link):
                        poll.unregister(link)
                    linux.close(fd, link)

    def _begin(self, text: int, *stdio: int) -> int:
        """Fork a command and return its pid."""
        ask = json.loads(os.pread(text, os.fstat(text).st_size, 0))
        command = Command(argv=tuple(ask["argv"]), env=ask["env"], cwd=ask["cwd"], tty=ask["tty"])

        def complain(error: BaseException) -> None:
            os.write(2, f"sandbox: cannot run {command.argv[0]!r} in {command.cwd}: {error}\n".encode())
            os._exit(127)

        pid = linux.fork(lambda: self._execute(command, stdio), complain)
        linux.close(text, *stdio)
        return pid

    def _execute(self, command: Command, stdio: Sequence[int]) -> None:
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        linux.forbid_imports()
        self._enter("mnt", "net", "ipc", "uts", "cgroup", "user")
        os.setsid()
        if command.tty:
            master, slave = os.openpty()  # of the sandbox's own devpts: the host's terminals are not there
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *command.tty, 0, 0))
            with socket.socket(fileno=os.dup(stdio[0])) as wants:
                socket.send_fds(wants, [b"tty"], [master])
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            stdio = (slave, slave, slave)
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
        as_owner = task in ("disk", "pack")

        def work(out_w: int) -> None:
            linux.close_all_but([*self._ns.values(), self._upper, out_w])
            linux.become(*host_ids())
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            linux.prctl(linux.PR_SET_DUMPABLE, 0)
            self._enter("owner")
            if not as_owner:
                linux.forbid_imports()
                self._enter("mnt", "user")
                self._limit()
                linux.drop_capabilities()
            inside.TASKS[task](out_w, **arguments, **({"upper": self._upper} if as_owner else {}))

        return self.apart(work)

    def alive(self) -> bool:
        ends = [self._first, self._home.control] if self._home else []  # the second with who forks commands
        return self._first >= 0 and not select.select(ends, [], [], 0)[0]

    def pause(self, on: bool) -> None:
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
        if self._home:
            self._home.close()  # with it bubblewrap, and so the pid namespace
        if self._first >= 0:
            select.select([self._first], [], [], END_S)
        if self._proxy > 0:
            os.kill(self._proxy, signal.SIGKILL)
            os.waitpid(self._proxy, 0)
            self._proxy = -1
        for fd in (*self._ns.values(), self._hold, self._said, self._info, self._first, self._upper, self._outer):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._ns = {}
        self._hold = self._said = self._info = self._first = self._upper = self._outer = self._pid = -1


def until_ready(fd: int, seconds: float) -> bytes:
    """Read what somebody who starts says: `ready`, or a complaint up to its end."""
    text, deadline = b"", time.monotonic() + seconds
    while text != b"ready\n":
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return text + f"nothing within {seconds:.0f} s".encode()
        if not (piece := os.read(fd, 65536)):
            return text or SILENT
        text += piece
    return text


def make_disk(path: Path, megabytes: float) -> None:
    """Make an empty file system in a sparse file."""
    run_tool(*MKE2FS, "root_owner=0:0,lazy_itable_init=1", str(path), f"{int(megabytes * 1024)}k")


def run_tool(*words: str) -> str:
    """Run one of the host's programs and return what it says; SandboxError with its complaint."""
    import subprocess  # of which other keepers need nothing

    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise SandboxError(f"{words[0]} not found; install it") from None
    if done.returncode:
        raise SandboxError(f"{words[0]}: {done.stderr.strip()}")
    return done.stdout
