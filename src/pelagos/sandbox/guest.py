"""The first program of a virtual machine's guest: runs commands and file tasks that come as frames on a virtio port.

Runs as the text of `linux.py`, `inside.py` and this file, standard library only, as root of the guest; commands run as
its user, without capabilities, on an overlay whose upper directory is all that a snapshot keeps.
"""

import contextlib
import fcntl
import io
import json
import os
import select
import signal
import struct
import tarfile
import time
import traceback
import tty
from collections.abc import Iterator
from typing import Any

from pelagos.sandbox import inside, linux

HEAD = struct.Struct("!IcI")  # command, kind, bytes that follow
PIECE_BYTES = 1 << 15
PLACES = {"proc": "proc", "dev": "devtmpfs", "sys": "sysfs", "dev/pts": "devpts"}
PLACES |= dict.fromkeys(("dev/shm", "tmp", "run"), "tmpfs")
ROOT, DATA = "/mnt", "/d"


def take_frames(read: bytearray, most: int = 1 << 32) -> Iterator[tuple[int, bytes, bytes]]:
    """Take (command, kind, data) of each frame that is whole off the front of `read`; OSError for one beyond `most`."""
    while len(read) >= HEAD.size:
        number, kind, size = HEAD.unpack_from(read)
        if size > most:
            raise OSError(f"a frame of {size} bytes came, which none of ours sends")
        if len(read) < HEAD.size + size:
            return
        data = bytes(read[HEAD.size : HEAD.size + size])
        del read[: HEAD.size + size]
        yield number, kind, data


class Agent:
    """One port's commands: what each writes is sent on, up to its limit, and how it ends."""

    def __init__(self, port: int, uid: int, root: str = ROOT, paced: bool = False) -> None:
        self._port, self._uid, self._root, self._paced, self._in = port, uid, root, paced, bytearray()
        self._poll = select.poll()
        self._poll.register(port, select.POLLIN)
        self._reads: dict[int, list[Any]] = {}  # descriptor: [command, kind, bytes it may still send]
        self._ends: dict[int, tuple[int, list[int]]] = {}  # pid: command, its pipes

    def send(self, number: int, kind: bytes, data: bytes) -> None:
        """Write one frame."""
        inside.write_all(self._port, HEAD.pack(number, kind, len(data)) + data)

    def serve(self) -> None:
        """Answer until the far end hangs up."""
        died, died_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(died_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._poll.register(died, select.POLLIN)
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._port:
                    if not (piece := os.read(fd, 1 << 18)):
                        return
                    self._in += piece
                    if self._paced:
                        self.send(0, b"A", b"%d" % len(piece))
                    for frame in take_frames(self._in):
                        self._frame(*frame)
                elif fd in self._reads:
                    self._pass_on(fd)
                elif fd == died:
                    os.read(fd, 4096)
                    self._reap()

    def _frame(self, number: int, kind: bytes, data: bytes) -> None:
        if kind == b"K":
            for pid in [pid for pid, (n, _) in self._ends.items() if n == number]:
                linux.kill_session(pid)
            return
        head, _, rest = data.partition(b"\n")
        ask = json.loads(head)
        if "layers" in ask:
            self._mount(ask["layers"], rest, [] if ask["base"] == "none" else ["/"])
            self.send(number, b"X", b'{"exit_code":0}')
        elif "now" in ask:  # a restored guest has the clock and the randomness of its snapshot
            with contextlib.suppress(OSError), open("/dev/urandom", "wb") as random:
                fcntl.ioctl(random, 0x40085203, struct.pack("ii", 8 * len(rest), len(rest)) + rest)
                fcntl.ioctl(random, 0x5207)
            time.clock_settime(time.CLOCK_REALTIME, ask["now"])
        else:
            self._begin(number, ask, rest)

    def _mount(self, sizes: list[int], data: bytes, lower: list[str]) -> None:
        """Unpack the layers that are not there yet and put the overlay together."""
        stream = io.BytesIO(data)
        for n, size in enumerate(sizes):
            place = f"{DATA}/layer{n}"
            if not os.path.exists(place) and size:
                os.mkdir(f"{place}.new")
                with tarfile.open(fileobj=io.BytesIO(stream.read(size))) as tar:
                    for info in tar:
                        _unpack_one(tar, info, f"{place}.new", self._uid)
                os.rename(f"{place}.new", place)
            lower.insert(0, place)
        for name in ("upper", "work"):
            os.makedirs(f"{DATA}/{name}", exist_ok=True)
        options = f"userxattr,lowerdir={':'.join(lower)},upperdir={DATA}/upper,workdir={DATA}/work"
        linux.mount("overlay", ROOT, "overlay", linux.MS_NODEV, options)
        for place, kind in PLACES.items():
            os.makedirs(f"{ROOT}/{place}", exist_ok=True)
            flags = linux.MS_NOSUID | (linux.MS_RDONLY if kind == "sysfs" else 0)
            linux.mount(kind, f"{ROOT}/{place}", kind, flags, "mode=1777" if kind == "tmpfs" else None)
        os.sync()

    def _begin(self, number: int, ask: dict[str, Any], data: bytes) -> None:
        (out, out_w), (err, err_w), stdin = os.pipe(), os.pipe(), linux.file_of(data)

        def work() -> None:
            os.setsid()
            for target, fd in enumerate((stdin, out_w, err_w)):
                os.dup2(fd, target)
            linux.close_all_but([])
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            if "argv" not in ask:
                arguments = ask["arguments"] | ({"data": data} if ask["task"] == "write" else {})
                if ask["task"] in ("disk", "pack"):
                    arguments["upper"] = os.open(f"{DATA}/upper", os.O_RDONLY)
                else:
                    self._enter()
                if ask["task"] == "stop":
                    os.kill(-1, ask["arguments"]["signal"])
                else:
                    inside.TASKS[ask["task"]](1, **arguments)
                return
            os.umask(0o022)
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                file.write("900")
            self._enter()
            os.chdir(ask["cwd"])
            linux.limit(**ask["limits"])
            linux.drop_capabilities()
            if ask.get("filter"):
                linux.load_seccomp(linux.seccomp_program())
            os.execvpe(ask["argv"][0], ask["argv"], ask["env"])

        def complain(error: BaseException) -> None:
            if "argv" in ask:
                os.write(2, f"sandbox: cannot run {ask['argv'][0]!r} in {ask['cwd']}: {error}\n".encode())
                os._exit(127)
            inside.write_all(1, json.dumps({"error": f"{error}"}).encode())

        pid = linux.fork(work, complain)
        linux.close(stdin, out_w, err_w)
        for fd, kind in ((out, b"O"), (err, b"E")):
            os.set_blocking(fd, False)
            self._reads[fd] = [number, kind, ask["most"]]
            self._poll.register(fd, select.POLLIN)
        self._ends[pid] = (number, [out, err])

    def _enter(self) -> None:
        if self._root != "/":
            os.chroot(self._root)
        os.chdir("/")
        linux.become(self._uid, self._uid)

    def _pass_on(self, fd: int) -> bool:
        number, kind, left = self._reads[fd]
        try:
            data = os.read(fd, PIECE_BYTES)
        except BlockingIOError:
            return False
        if data[:left]:
            self._reads[fd][2] -= len(data[:left])
            self.send(number, kind, data[:left])
        if not data:
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)
        return bool(data) and left > 0

    def _reap(self) -> None:
        """Take notice of every child that ended, ours and those whose parents did."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] in self._ends:
                    self._end(*self._ends.pop(ended[0]), os.waitstatus_to_exitcode(ended[1]))

    def _end(self, number: int, pipes: list[int], code: int) -> None:
        for fd in pipes:
            while self._pass_on(fd):
                pass
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)
            del self._reads[fd]
            os.close(fd)
        os.sync()  # what is told as done is on the disk, which outlives the machine
        self.send(number, b"X", b'{"exit_code":%d}' % code)


def _unpack_one(tar: tarfile.TarFile, info: tarfile.TarInfo, root: str, uid: int) -> None:
    """Put one entry of a canonical tar, which our own `pack_tree` wrote, where it belongs."""
    path = f"{root}/{info.name}"
    if inside.WHITEOUT in info.pax_headers:
        os.mknod(path, 0o20600, 0)
        return
    info.uid = info.gid = uid
    info.uname = info.gname = ""
    tar.extraction_filter = lambda member, path: member  # it is ours, and owners must stay
    tar.extract(info, root, numeric_owner=True)
    if inside.OPAQUE in info.pax_headers:
        os.setxattr(path, inside.OPAQUE_ATTRIBUTE, b"y")


def main(uid: int, port: int = -1, root: str = ROOT) -> None:
    """Be the guest's first program, on the first virtio port or a serial line unless there is a socket."""
    try:
        line = ""
        if port < 0:
            line = next((name for name in sorted(os.listdir("/dev")) if name.startswith("vport")), "tty1")
            port = os.open(f"/dev/{line}", os.O_RDWR | os.O_NOCTTY)
        if line == "tty1":
            tty.setraw(port)
        agent = Agent(port, uid, root, line == "tty1")
        agent.send(0, b"R", b"")
        agent.serve()
    except BaseException:
        traceback.print_exc()  # on the console; the kernel ends with its first program, and QEMU with the kernel
