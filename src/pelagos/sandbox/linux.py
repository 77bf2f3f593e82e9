"""The kernel's own words that Python lacks: namespaces, mounts, capabilities, seccomp, resource limits.

Standard library only, because warm workers get this file's text into a sandbox without Pelagos. Failures are OSError.
Numbers are from the kernel's headers; the seccomp program is classic BPF as `seccomp(2)` describes it.
"""

import contextlib
import ctypes
import functools
import marshal
import os
import resource
import signal
import socket
import struct
import sys
import time
from _frozen_importlib_external import MAGIC_NUMBER  # as importlib.util has it, which is more to load
from collections.abc import Callable, Sequence
from typing import NoReturn

NAMESPACES = {  # in the order in which they are entered: the user namespace gives the right to the others
    "user": 0x10000000, "mnt": 0x00020000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000,
    "cgroup": 0x02000000,
}  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 4, 22, 24, 36
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47
LOCK_SH, LOCK_EX, LOCK_NB = 1, 2, 4

_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Refused with EPERM: (x86_64, aarch64) numbers, None where the machine has no such call.
_REFUSED: dict[str, tuple[int | None, int]] = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268), "unshare": (272, 97), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "statmount": (457, 457), "listmount": (458, 458),
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "init_module": (175, 105),
    "delete_module": (176, 106), "finit_module": (313, 273), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "open_by_handle_at": (304, 265), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "syslog": (103, 116), "fanotify_init": (300, 262),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "memfd_secret": (447, 447), "vhangup": (153, 58),
    "iopl": (172, -1), "ioperm": (173, -1), "modify_ldt": (154, -1), "uselib": (134, -1),
}  # fmt: skip
_CLONE, _CLONE3, _SOCKET, _IOCTL = (56, 220), 435, (41, 198), (16, 29)
_FAMILIES = (1, 2, 10, 16)  # unix, inet, inet6, netlink; vsock and others are not bound to the network namespace
_IOCTLS = (0x5412, 0x541C, 0xC028660F, 0xC0C0586D)  # TIOCSTI, TIOCLINUX, ext4 and xfs extent swaps
_CLOSE_RANGE = 436
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97

_MAKE_MODULES = """
import _frozen_importlib_external, marshal, sys, types
package = sys.modules['pelagos'] = sys.modules['pelagos.sandbox'] = types.ModuleType('pelagos.sandbox')
for name, (text, code) in MODULES.items():
    module = sys.modules[name] = types.ModuleType(name)
    setattr(package, name.rpartition('.')[2], module)
    same = MAGIC == _frozen_importlib_external.MAGIC_NUMBER
    exec(marshal.loads(code) if same else compile(text, name, 'exec'), module.__dict__)
"""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    result = getattr(_libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def fork(work: Callable[[], object], complain: Callable[[BaseException], object]) -> int:
    """Return the pid of a child that does `work` and ends, with 1 after a complaint; it never comes back from here."""
    return os.fork() or _child(work, complain)


def fork_into(names: Sequence[str], work: Callable[[], object], complain: Callable[[BaseException], object]) -> int:
    """`fork` with new namespaces for the child, again and again, which unshare cannot for pid namespaces."""
    flags = sum(NAMESPACES[name] for name in names) | signal.SIGCHLD
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    return _call("syscall", number, ctypes.c_ulong(flags), None, None, None, None) or _child(work, complain)


def _child(work: Callable[[], object], complain: Callable[[BaseException], object]) -> NoReturn:
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        complain(error)
    finally:
        os._exit(code)  # whatever happened, the complaint's own failure too: two of us must not go on


def file_of(data: bytes) -> int:
    """Return a descriptor of a file in memory that holds `data`, at its start."""
    fd = os.memfd_create("pelagos")
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def link() -> tuple[socket.socket, socket.socket]:
    """Return two ends of a link that keeps messages apart and carries descriptors."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def write(path: str, data: bytes) -> None:
    """Write to a file of the kernel's in one call."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def close(*fds: int) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


def lock(path: os.PathLike[str] | str, how: int = LOCK_EX | LOCK_NB) -> int:
    """Return a descriptor that holds a lock on a file or directory; BlockingIOError where somebody else has it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("flock", fd, how)
    except BaseException:
        os.close(fd)
        raise
    return fd


def which(program: str) -> str | None:
    """Return where a program lies on the path, None where it is not installed."""
    found = (f"{directory}/{program}" for directory in os.get_exec_path())
    return next((path for path in found if os.access(path, os.X_OK)), None)


def forbid_imports() -> None:
    """Let this process import nothing any more: in a sandbox's mounts, what it would find is the sandbox's."""
    sys.meta_path.clear()
    sys.path.clear()


def unshare(*names: str) -> None:
    """Leave for new namespaces, by the names of `NAMESPACES`."""
    _call("unshare", sum(NAMESPACES[name] for name in names))


def setns(fd: int, name: str) -> None:
    """Enter a namespace by a descriptor of `/proc/<pid>/ns/<name>`."""
    _call("setns", fd, NAMESPACES[name])


def mount(source: str, target: str, kind: str | None, flags: int = 0, options: str | None = None) -> None:
    """Call mount(2)."""
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def prctl(option: int, *arguments: int) -> None:
    """Call prctl(2)."""
    _call("prctl", option, *(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]))


def map_user(inside: int, uid: int, gid: int) -> None:
    """Give this process, alone in a new user namespace, one uid and gid there for its own outside."""
    prctl(PR_SET_DUMPABLE, 1)  # else /proc/self is root's after a change of uid
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {uid} 1"), ("gid_map", f"{inside} {gid} 1")):
        write(f"/proc/self/{name}", text.encode())


def become(uid: int, gid: int) -> None:
    """Give up root for good; without effect for who is not root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)


def drop_capabilities() -> None:
    """Empty every capability set, the bounding one too, and refuse new privileges from here on."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # the first number this kernel does not know
    prctl(PR_CAP_AMBIENT, 4)
    header = struct.pack("=Ii", 0x20080522, 0)
    _call("capset", header, bytes(24))
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def limit(*, processes: int | None, open_files: int, file_bytes: int, address_bytes: int | None) -> None:
    """Set hard resource limits of this process and what it starts; None leaves one as it is."""
    wanted = {
        resource.RLIMIT_NPROC: processes, resource.RLIMIT_NOFILE: open_files, resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_AS: address_bytes, resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 1 << 16,
        resource.RLIMIT_MSGQUEUE: 1 << 16, resource.RLIMIT_SIGPENDING: 1024,
    }  # fmt: skip
    for kind, value in wanted.items():
        if value is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


@functools.cache
def seccomp_program() -> bytes:
    """Return the filter every command runs under; OSError for a machine whose call numbers are not known here."""
    machine = os.uname().machine
    if machine not in _ARCHES:
        raise OSError(_ENOSYS, f"no seccomp filter for {machine}; known: {', '.join(_ARCHES)}")
    column = list(_ARCHES).index(machine)
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    program: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4), (equal, 1, 0, _ARCHES[machine]), (give, 0, 0, kill), (load, 0, 0, 0),
    ]  # fmt: skip

    def refuse(number: int, error: int) -> None:
        program.extend([(equal, 0, 1, number), (give, 0, 0, 0x50000 | error)])

    if machine == "x86_64":
        program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, 0x50000 | _ENOSYS)]  # the x32 numbers
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None and number >= 0:
            refuse(number, _EPERM)
    refuse(_CLONE3, _ENOSYS)  # its flags lie in memory, where no filter sees them; libc falls back to clone
    namespaces = sum(NAMESPACES.values())
    program += [
        (equal, 0, 4, _CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, namespaces),
        (give, 0, 0, 0x50000 | _EPERM), (give, 0, 0, allow),
        (equal, 0, 3 + len(_FAMILIES), _SOCKET[column]), (load, 0, 0, 16),
        *((equal, len(_FAMILIES) - i, 0, family) for i, family in enumerate(_FAMILIES)),
        (give, 0, 0, 0x50000 | _EAFNOSUPPORT), (give, 0, 0, allow),
        (equal, 0, 3 + len(_IOCTLS), _IOCTL[column]), (load, 0, 0, 24),
        *((equal, len(_IOCTLS) - i, 0, request) for i, request in enumerate(_IOCTLS)),
        (give, 0, 0, allow), (give, 0, 0, 0x50000 | _EPERM),
        (give, 0, 0, allow),
    ]  # fmt: skip
    return b"".join(struct.pack("=HBBI", *step) for step in program)


def load_seccomp(program: bytes) -> None:
    """Put this thread and what it starts under a filter; needs no-new-privileges."""
    steps = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HxxxxxxQ", len(program) // 8, ctypes.addressof(steps)))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(header))


def close_all_but(keep: Sequence[int]) -> None:
    """Close every descriptor from 3 up that is not in `keep`, in one call per gap: there may be a million numbers."""
    start = 3
    for fd in [*sorted({fd for fd in keep if fd >= 3}), 0xFFFFFFFF]:
        if fd > start:
            _call("syscall", _CLOSE_RANGE, start, ctypes.c_uint(min(fd - 1, 0xFFFFFFFE)), 0)
        start = fd + 1


@functools.cache
def modules_as_program(*names: str) -> str:
    """Return Python that makes modules of this room where there is no Pelagos; the last is `module`."""
    found = {}
    for name in (f"pelagos.sandbox.{name}" for name in names):
        with open(f"{os.path.dirname(__file__)}/{name.rpartition('.')[2]}.py", encoding="utf-8") as file:
            text = file.read()
        # Where Python is the same, what it compiles to: to compile takes 9 ms.
        found[name] = (text, marshal.dumps(compile(text, name, "exec")))
    return f"MAGIC, MODULES = {MAGIC_NUMBER!r}, {found!r}\n{_MAKE_MODULES}\n"


def sync_filesystem(path: os.PathLike[str]) -> None:
    """Bring the file system that holds `path` to disk (syncfs)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        _call("syncfs", fd)
    finally:
        os.close(fd)


def kill_session(leader: int) -> None:
    """Kill every process of a session, twice, since some may be forking."""
    for _ in range(2):
        _kill_where(3, leader)


def _kill_where(field: int, value: int) -> None:
    """Kill the processes that have this number there in what their `stat` says after the name."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{entry}/stat", "rb") as file:
                found = int(file.read().rpartition(b")")[2].split()[field])
            if found == value:
                os.kill(int(entry), signal.SIGKILL)


def end_children() -> None:
    """Wait until no child is left, also of those that came to us from theirs; kill what does not end by itself."""
    looks = 0  # not a time: on a busy host all that ends takes longer
    with contextlib.suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                looks += 1
                if looks % 200 == 0:
                    _kill_where(1, os.getpid())
                time.sleep(0.0005)
