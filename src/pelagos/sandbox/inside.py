"""What is done among a sandbox's files: read, write, list, pack, and say how much disk they take.

Standard library only: containers run these in a fork of the keeper, virtual machines in their guest, which gets this
file as text. A task writes its answer to a descriptor; what goes wrong is an exception for the caller to tell.
"""

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from typing import IO, Any

FILE_BYTES = 64 << 20  # one file through the control channel; more travels as an image
WHITEOUT, OPAQUE = "PELAGOS.whiteout", "PELAGOS.opaque"
OPAQUE_ATTRIBUTE = "user.overlay.opaque"


def read(out: int, *, path: str) -> None:
    """Write a regular file's bytes to `out`."""
    fd = _open_regular(path, os.O_RDONLY)
    if os.fstat(fd).st_size > FILE_BYTES:
        raise OSError(f"{path}: more than {FILE_BYTES} bytes; use pack_diff")
    while piece := os.read(fd, 1 << 20):
        write_all(out, piece)


def write(out: int, *, path: str, data: bytes, mode: int) -> None:
    """Write a regular file, making its directories."""
    os.umask(0o022)
    os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
    fd = _open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    write_all(fd, data)
    os.fchmod(fd, mode)
    os.close(fd)


def list_(out: int, *, path: str) -> None:
    """Write [name, kind, size, mode] of a directory's entries as JSON."""
    found = []
    for entry in sorted(os.scandir(path), key=lambda e: e.name):
        facts = entry.stat(follow_symlinks=False)
        kind = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
        found.append([entry.name, kind.get(stat.S_IFMT(facts.st_mode), "other"), facts.st_size,
                      stat.S_IMODE(facts.st_mode)])  # fmt: skip
    write_all(out, json.dumps(found).encode())


def disk(out: int, *, upper: int) -> None:
    """Write the bytes on disk under a directory, each file once however many names it has."""
    total, seen = 0, set()
    for _, _, files, fd in os.fwalk(".", dir_fd=upper, onerror=None):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                facts = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if facts.st_nlink == 1 or facts.st_ino not in seen:
                    seen.add(facts.st_ino)
                    total += facts.st_blocks * 512 + 256
    os.write(out, b"%d" % total)


def pack(out: int, *, upper: int, most: int) -> None:
    """Write a directory as a canonical tar."""
    with os.fdopen(out, "wb", closefd=False) as pipe:
        pack_tree(upper, pipe, most=most)


TASKS: dict[str, Callable[..., None]] = {"read": read, "write": write, "list": list_, "disk": disk, "pack": pack}


def write_all(fd: int, data: bytes) -> None:
    """Write all of it, however little the descriptor takes at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _open_regular(path: str, flags: int, mode: int = 0) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, mode)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(f"{path}: not a regular file")
    return fd


def pack_path(path: str | os.PathLike[str], file: IO[bytes], **how: Any) -> None:
    """`pack_tree` of a directory by its name."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        pack_tree(fd, file, **how)
    finally:
        os.close(fd)


def pack_tree(
    directory: int, file: IO[bytes], *, at: str = "/", fixed_time: bool = False, most: int | None = None,
    owner: int | None = None,
) -> None:  # fmt: skip
    """Write the directory of a descriptor as a canonical tar; raises ValueError beyond `most` bytes of content.

    With an `owner`, as a layer of an OCI image: that user's, and whiteouts as such images have them.
    """
    import tarfile  # a third of what this module would cost each fork

    total = 0
    links: dict[tuple[int, int], str] = {}
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        prefix = [part for part in at.split("/") if part]
        for depth in range(len(prefix)):
            frame = tarfile.TarInfo("/".join(prefix[: depth + 1]))
            frame.type, frame.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(frame)
        for name, fd, entry in _walk(directory, "/".join(prefix)):
            info = tarfile.TarInfo(name)
            info.mode, info.uid, info.gid = entry.st_mode & 0o1777, owner or 0, owner or 0
            seconds, nanoseconds = divmod(entry.st_mtime_ns, 10**9)
            headers = {} if fixed_time else {"mtime": f"{seconds}.{nanoseconds:09d}"}
            source = None
            kind = stat.S_IFMT(entry.st_mode)
            if kind == stat.S_IFDIR:
                info.type = tarfile.DIRTYPE
                with contextlib.suppress(OSError):
                    if os.getxattr(fd, OPAQUE_ATTRIBUTE) == b"y":
                        headers[OPAQUE] = "1"
            elif kind == stat.S_IFCHR and entry.st_rdev == 0:
                headers, info.mode = {WHITEOUT: "1"}, 0
                if owner is not None:
                    head, slash, tail = name.rpartition("/")
                    headers, info.name = {}, f"{head}{slash}.wh.{tail}"
            elif kind == stat.S_IFLNK:
                info.type, info.mode = tarfile.SYMTYPE, 0o777
                info.linkname = os.readlink(name.rpartition("/")[2], dir_fd=fd)
            elif kind == stat.S_IFIFO:
                info.type = tarfile.FIFOTYPE
            elif kind != stat.S_IFREG:
                continue
            elif (first := links.setdefault((entry.st_dev, entry.st_ino), name)) != name and entry.st_nlink > 1:
                info.type, info.linkname = tarfile.LNKTYPE, first
            else:
                info.size = entry.st_size
                total += entry.st_size
                if most is not None and total > most:
                    raise ValueError(f"the files are more than {most} bytes at {name!r}; raise disk_mb, or delete some")
                source = os.fdopen(os.dup(fd), "rb")
            info.pax_headers = headers
            with source or contextlib.nullcontext():
                tar.addfile(info, source)
            if owner is not None and OPAQUE in headers:
                tar.addfile(tarfile.TarInfo(f"{name}/.wh..wh..opq"))


def _walk(directory: int, prefix: str) -> Iterator[tuple[str, int, os.stat_result]]:
    """(name, descriptor, stat) sorted: of a directory or file its own descriptor, else that of its directory."""
    for name in sorted(os.listdir(directory), key=os.fsencode):
        entry = os.stat(name, dir_fd=directory, follow_symlinks=False)
        path = f"{prefix}/{name}" if prefix else name
        if not stat.S_ISDIR(entry.st_mode) and not stat.S_ISREG(entry.st_mode):
            yield path, directory, entry
            continue
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        try:
            yield path, fd, entry
            if stat.S_ISDIR(entry.st_mode):
                yield from _walk(fd, path)
        finally:
            os.close(fd)
