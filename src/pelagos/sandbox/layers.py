"""Images: a base and a chain of layers; a layer is a canonical tar, named by its sha256, unpacked once.

Canonical: sorted names, no owners, no setuid bits, nanosecond times, hard links kept, whiteouts and opaque directories
as pax headers of our own. Extended attributes, sockets and devices are left out. Tars are treated as hostile.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

from pelagos.errors import SandboxError
from pelagos.sandbox import cgroups, linux
from pelagos.sandbox.container import INSIDE_UID, host_ids, run_tool
from pelagos.sandbox.inside import OPAQUE, OPAQUE_ATTRIBUTE, WHITEOUT, pack_path

# What programs of /usr need of /etc: links of alternatives, the loader's cache, names of services. No secrets.
_HOST_ETC = (
    "alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "mime.types", "protocols", "services", "shells",
    "debian_version", "os-release", "bash.bashrc", "profile", "terminfo", "perl", "ssl/certs",
    "ssl/openssl.cnf", "fonts", "magic", "inputrc", "localtime",
)  # fmt: skip
_ETC = {
    "passwd": f"root:x:0:0:root:/root:/bin/sh\nagent:x:{INSIDE_UID}:{INSIDE_UID}::/home/agent:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": f"root:x:0:\nagent:x:{INSIDE_UID}:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost sandbox\n",
    "hostname": "sandbox\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "resolv.conf": "",
}
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}  # by the names that images have for them


class Store:
    """The directory that holds layers and sandboxes; only its owner may look into it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.layers, self.boxes, self.machines = (self.root / name for name in ("layers", "boxes", "vm"))
        for directory, mode in ((self.root, 0o700), (self.layers, 0o711), (self.boxes, 0o711)):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(mode)

    @functools.cached_property
    def host_layer(self) -> str:
        """The layer under the host base: the frame of directories, home, and copies of the harmless part of /etc."""
        return self._frame(_build_host_frame)

    @functools.cached_property
    def own_layer(self) -> str:
        """The layer under images that bring a system of their own: /workspace, home, names."""
        return self._frame(_build_frame)

    def empty_layer(self, *names: str) -> str:
        """Return the layer of these directories, each after the one it lies in."""
        return self._frame(lambda frame: [(frame / name).mkdir() for name in names])

    def add_disk(self, path: Path) -> str:
        """Store a copy of a disk image and return its digest."""
        self.machines.mkdir(mode=0o711, exist_ok=True)
        with path.open("rb") as file:
            digest = _digest(file)
        if not (self.machines / digest).exists():
            with self._draft(self.machines) as draft:
                run_tool("cp", "--sparse=always", "--reflink=auto", str(path), str(draft / "disk"))
                (draft / "disk").chmod(0o444)
                self._place(draft, self.machines / digest)
        return digest

    def _frame(self, build: Callable[[Path], object]) -> str:
        with tempfile.TemporaryDirectory(dir=self.root) as temporary:
            build(Path(temporary))
            return self.add_directory(Path(temporary), fixed_time=True)

    def add_directory(self, path: Path, *, at: str = "/", fixed_time: bool = False) -> str:
        """Store a copy of a directory as a layer and return its digest."""
        with tempfile.TemporaryFile(dir=self.root) as file:
            try:
                pack_path(path, file, at=at, fixed_time=fixed_time)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise SandboxError(f"{path}: {error.strerror}; expected a directory to make a layer of") from None
            file.seek(0)
            return self.add_canonical(file)

    def add_tar(self, file: IO[bytes], *, oci: bool = False) -> str:
        """Store any tar as a layer and return the digest of its canonical form; `oci` for that format's whiteouts."""
        with self._draft(self.layers) as draft:
            unpack(file, draft, oci=oci)
            with tempfile.TemporaryFile(dir=self.root) as canonical:
                pack_path(draft, canonical)
                return self._place(draft, self.layers / _digest(canonical))

    def add_canonical(self, file: IO[bytes]) -> str:
        """Store what `pack` wrote, unless it is there already, and return its digest."""
        digest = _digest(file)
        if not (self.layers / digest).is_dir():
            with self._draft(self.layers) as draft:
                file.seek(0)
                unpack(file, draft)
                return self._place(draft, self.layers / digest)
        return digest

    def collect(self, *, older_s: float = 30 * 86400) -> dict[str, int]:
        """Delete what nobody used for `older_s`: layers, guests' snapshots, sandboxes whose making was cut short.

        And what killed keepers left, of whatever age.
        """
        cgroups.sweep()
        used = {path.parent.name for path in self.boxes.glob("*/log.jsonl") if path.with_name("spec.json").exists()}
        for path in self.boxes.glob("*/spec.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):  # on its way in or out: then its layers are fresh
                spec = json.loads(path.read_text(encoding="utf-8"))
                used |= {*spec["layers"], spec["base"].partition(":")[2]}
        for path in (self.root / "warm").glob("*"):
            if not Path("/proc", path.name).exists():
                remove_tree(path)  # of a spare keeper that was killed
        found = {"layers": 0, "snapshots": 0, "boxes": 0}
        for kind, directory in (("layers", self.layers), ("snapshots", self.machines), ("boxes", self.boxes)):
            for path in directory.glob("*"):
                with contextlib.suppress(FileNotFoundError):  # it was closed this moment
                    old = path.is_dir() and time.time() - path.stat().st_mtime > older_s
                    if old and path.name not in used:
                        gone = path.with_name(f"draft-{path.name}")
                        os.rename(path, gone)  # at once: a sandbox finds all of it or nothing
                        remove_tree(gone)
                        found[kind] += 1
        return found

    def box(self, name: str) -> Path:
        """Return the directory of a sandbox; raises SandboxError for an id that is no plain name."""
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}", name):
            raise SandboxError(f"sandbox id {name!r}: expected up to 64 letters, digits, '-', '_' or '.', no '.' first")
        return self.boxes / name

    @contextlib.contextmanager
    def _draft(self, place: Path) -> Iterator[Path]:
        draft = Path(tempfile.mkdtemp(prefix="draft-", dir=place))
        try:
            draft.chmod(0o755)
            yield draft
        finally:
            remove_tree(draft)

    def _place(self, draft: Path, place: Path) -> str:
        linux.sync_filesystem(draft)
        with contextlib.suppress(FileExistsError, OSError):  # another process placed the same first
            os.rename(draft, place)
        if not place.is_dir():
            raise SandboxError(f"{place}: cannot be put there; is the directory writable?")
        return place.name


@functools.cache
def default_store() -> Store:
    """Return the store under the user's cache directory."""
    from pelagos.config import read_environment

    return Store(read_environment().cache_home / "pelagos" / "sandbox")


@dataclass(frozen=True, slots=True)
class Image:
    """What a sandbox starts from: base "host" (its /usr, read-only), "disk:DIGEST" or "none", and layers upwards."""

    base: str
    layers: tuple[str, ...]

    @classmethod
    def host(cls, store: Store | None = None) -> Self:
        """Return the image of the host's own programs, with home, /workspace and an /etc without secrets."""
        return cls("host", ((store or default_store()).host_layer,))

    @classmethod
    def disk(cls, path: Path | str, *, store: Store | None = None) -> Self:
        """Return the image of a whole disk, raw or qcow2, with a system of its own (a cloud image) for `fullvm`.

        That system must boot by BIOS and have cloud-init, systemd and Python.
        """
        store = store or default_store()
        try:
            layer = store.empty_layer("workspace", "home", "home/agent")
            return cls(f"disk:{store.add_disk(Path(path))}", (layer,))
        except OSError as error:
            raise SandboxError(f"{path}: {error.strerror}; expected a file that holds a disk") from None

    def with_directory(self, path: Path | str, *, at: str = "/", store: Store | None = None) -> Self:
        """Return this image with a copy of a host directory on top."""
        return replace(self, layers=(*self.layers, (store or default_store()).add_directory(Path(path), at=at)))

    def with_tar(self, path: Path | str, *, store: Store | None = None) -> Self:
        """Return this image with a tar on top (a root file system, or what `pack_diff` gave)."""
        try:
            with Path(path).open("rb") as file:
                return replace(self, layers=(*self.layers, (store or default_store()).add_tar(file)))
        except OSError as error:
            raise SandboxError(f"{path}: {error.strerror}; expected a tar to make a layer of") from None

    def compose(self, *others: "Image") -> Self:
        """Return this image with the layers of others on top, each layer once: a base, a workspace, a toolkit."""
        layers = list(self.layers)
        for other in others:
            if other.base not in ("none", self.base):
                raise SandboxError(f"compose: an image over base {other.base!r} cannot go on one over {self.base!r}")
            layers += [digest for digest in other.layers if digest not in layers]
        return replace(self, layers=tuple(layers))

    @classmethod
    def from_oci(cls, path: Path | str, *, store: Store | None = None) -> Self:
        """Return the image of an OCI archive or layout, or of what `docker save` wrote; base "none".

        Devices, extended attributes and the configuration (environment, entry point) are left out.
        """
        store = store or default_store()
        with oci_files(Path(path)) as read:
            digests = [store.add_tar(blob, oci=True) for blob in map(read, oci_layers(read, Path(path)))]
        return cls("none", (store.own_layer, *digests))

    @classmethod
    def debootstrap(
        cls, suite: str, *, packages: Sequence[str] = (), mirror: str | None = None, store: Store | None = None
    ) -> Self:
        """Return a small Debian of its own with some packages, made by debootstrap; needs root and a mirror."""
        store = store or default_store()
        if linux.which("debootstrap") is None:
            raise SandboxError("debootstrap not found; install it (Debian: apt-get install debootstrap)")
        for word in (suite, *packages):
            if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]*", word):
                raise SandboxError(f"debootstrap: {word!r} is no name of a suite or package")

        with tempfile.TemporaryDirectory(dir=store.root) as place:
            # In mounts of its own: what it mounts and forgets ends with it.
            words = "unshare -m debootstrap --variant=minbase".split()
            words += [f"--include={','.join(packages)}", suite, f"{place}/root", *([mirror] if mirror else [])]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise SandboxError(f"debootstrap {suite}: {(done.stdout + done.stderr).strip()[-600:]}")
            return cls("none", (store.own_layer, store.add_directory(Path(place, "root"))))


@contextlib.contextmanager
def oci_files(path: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """Give what opens a file of an image by its name; a blob is checked against its digest."""
    with contextlib.ExitStack() as stack:
        try:
            tar = None if path.is_dir() else stack.enter_context(tarfile.open(path))
        except (tarfile.TarError, OSError) as error:
            raise SandboxError(f"{path}: no OCI archive ({error})") from None

        def read(name: str) -> IO[bytes]:
            try:
                file = tar.extractfile(name) if tar else path.joinpath(*name.split("/")).open("rb")
            except (KeyError, OSError, tarfile.TarError):
                file = None
            if file is None:
                raise SandboxError(f"{path}: no {name}; expected an OCI archive, its layout or what docker save wrote")
            stack.enter_context(file)
            if name.startswith("blobs/") and _digest(file) != name.rpartition("/")[2]:
                raise SandboxError(f"{path}: {name} is damaged; its digest is another")
            file.seek(0)
            return file

        yield read


def oci_layers(read: Callable[[str], IO[bytes]], path: Path) -> list[str]:
    """Return the names of an image's layers from the bottom up."""

    def told(name: str) -> Any:
        try:
            return json.loads(read(name).read(1 << 22))
        except ValueError as error:
            raise SandboxError(f"{path}: {name} is no JSON of an image ({error})") from None

    def blob(digest: str) -> str:
        if not re.fullmatch("sha256:[0-9a-f]{64}", digest):
            raise SandboxError(f"{path}: digest {digest!r}; expected sha256 and 64 hexadecimal digits")
        return f"blobs/{digest.replace(':', '/')}"

    ours = _MACHINES.get(os.uname().machine)
    try:
        try:
            found = told("index.json")
        except SandboxError:
            names = told("manifest.json")[0]["Layers"]  # docker save before it wrote layouts
            if any(not isinstance(name, str) or ".." in name.split("/") or name.startswith("/") for name in names):
                raise SandboxError(f"{path}: a layer's name leaves the archive; it is not to be trusted") from None
            return names
        for _ in range(4):
            if "layers" in found:
                return [blob(layer["digest"]) for layer in found["layers"]]
            fits = [m for m in found["manifests"] if m.get("platform", {}).get("architecture", ours) == ours]
            if not fits:
                raise SandboxError(f"{path}: no image for {ours} in it")
            found = told(blob(fits[0]["digest"]))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise SandboxError(f"{path}: no index of an image ({error!r})") from None
    raise SandboxError(f"{path}: an index of an index of an index; there is no image")


def write_archive(name: str, trees: Sequence[Path], labels: Mapping[str, str], file: IO[bytes]) -> None:
    """Write layers as an archive that engines load (`docker load`), all of it the inside's user's, and rewind it."""
    digests = []
    with tarfile.open(fileobj=file, mode="w") as archive:

        def add(name: str, data: IO[bytes]) -> None:
            info = tarfile.TarInfo(name)
            info.size = data.seek(0, os.SEEK_END)
            data.seek(0)
            archive.addfile(info, data)

        for number, tree in enumerate(trees):
            with tempfile.TemporaryFile() as layer:
                pack_path(tree, layer, owner=INSIDE_UID)
                add(f"{number}.tar", layer)
                digests.append(f"sha256:{_digest(layer)}")
        rootfs = {"type": "layers", "diff_ids": digests}
        config = {"architecture": _MACHINES.get(os.uname().machine), "os": "linux", "config": {"Labels": labels},
                  "rootfs": rootfs}  # fmt: skip
        add("config.json", io.BytesIO(json.dumps(config).encode()))
        told = {"Config": "config.json", "RepoTags": [name], "Layers": [f"{n}.tar" for n in range(len(digests))]}
        add("manifest.json", io.BytesIO(json.dumps([told]).encode()))
    file.seek(0)


def unpack(file: IO[bytes], target: Path, *, oci: bool = False) -> None:
    """Unpack a tar into an empty directory for the inside's user; SandboxError for what tries to leave it."""
    uid, gid = host_ids()
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    directories: dict[str, tuple[int, int]] = {}  # path: mode and time, set once nothing is put there any more
    try:
        os.chown(root, uid, gid)
        try:
            with tarfile.open(fileobj=file, mode="r|*") as tar:
                for info in tar:
                    if not (oci and (info.ischr() or info.isblk())):
                        _unpack_one(tar, info, root, uid, gid, directories, oci)
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise SandboxError(f"layer: not a tar that can be unpacked here ({error})") from None
        for name, (mode, nanoseconds) in sorted(directories.items(), reverse=True):
            fd = _open_parent(root, f"{name}/x")[0]
            os.fchmod(fd, mode)
            os.utime(fd, ns=(nanoseconds, nanoseconds))
            os.close(fd)
    finally:
        os.close(root)


def _unpack_one(
    tar: tarfile.TarFile, info: tarfile.TarInfo, root: int, uid: int, gid: int,
    directories: dict[str, tuple[int, int]], oci: bool,
) -> None:  # fmt: skip
    path = "/".join(part for part in info.name.split("/") if part not in ("", "."))
    if not path:
        return
    if ".." in path.split("/"):
        raise SandboxError(f"layer: name {info.name!r} leaves the tree; this tar is not to be trusted")
    parent, name = _open_parent(root, path, directories)
    try:
        if oci and name == ".wh..wh..opq":
            os.setxattr(parent, OPAQUE_ATTRIBUTE, b"y")
            return
        if oci and name.startswith(".wh."):
            name, info.pax_headers = name[4:], {WHITEOUT: "1"}
        nanoseconds = _nanoseconds(info.pax_headers.get("mtime"), info.mtime)
        mode = info.mode & 0o1777
        if info.isdir():
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent)
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
            if OPAQUE in info.pax_headers:
                os.setxattr(fd, OPAQUE_ATTRIBUTE, b"y")
            os.close(fd)
            directories[path] = (mode, nanoseconds)
            os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
        if WHITEOUT in info.pax_headers:
            os.mknod(name, stat.S_IFCHR | 0o600, os.makedev(0, 0), dir_fd=parent)
        elif info.issym():
            os.symlink(info.linkname, name, dir_fd=parent)
        elif info.islnk():
            other, first = _open_parent(root, "/".join(p for p in info.linkname.split("/") if p not in ("", ".")))
            try:
                if not stat.S_ISREG(os.stat(first, dir_fd=other, follow_symlinks=False).st_mode):
                    raise SandboxError(f"layer: {info.name!r} is a hard link to no file; this tar is not to be trusted")
                os.link(first, name, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)
            finally:
                os.close(other)
            return
        elif info.isfifo():
            os.mkfifo(name, 0o600, dir_fd=parent)
        elif info.isfile():
            source = tar.extractfile(info)
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=parent)
            with os.fdopen(fd, "wb") as sink:
                if source is not None:
                    shutil.copyfileobj(source, sink, 1 << 20)
        else:
            raise SandboxError(f"layer: {info.name!r} is a device; this tar is not to be trusted")
        os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
        if not info.issym() and WHITEOUT not in info.pax_headers:
            os.chmod(name, mode, dir_fd=parent)
        os.utime(name, ns=(nanoseconds, nanoseconds), dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(parent)


def _open_parent(root: int, path: str, made: dict[str, tuple[int, int]] | None = None) -> tuple[int, str]:
    """Walk to the directory of `path` following no link, making what is missing; the descriptor is the caller's."""
    *parts, name = path.split("/")
    if ".." in parts or name in ("", ".."):
        raise SandboxError(f"layer: name {path!r} leaves the tree; this tar is not to be trusted")
    fd = os.dup(root)
    try:
        for depth, part in enumerate(parts, 1):
            try:
                step = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            except FileNotFoundError:
                os.mkdir(part, 0o755, dir_fd=fd)
                os.chown(part, *host_ids(), dir_fd=fd)
                if made is not None:
                    made["/".join(parts[:depth])] = (0o755, 0)
                step = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            fd, old = step, fd
            os.close(old)
    except BaseException:
        os.close(fd)
        raise
    return fd, name


def _nanoseconds(exact: str | None, rough: float) -> int:
    whole, _, part = (exact or "").partition(".")
    if whole.lstrip("-").isdigit() and (part.isdigit() or not part):
        return int(whole) * 10**9 + int(f"{part:0<9.9}")
    return int(rough) * 10**9


def _digest(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def remove_tree(path: Path) -> None:
    """Delete a tree, its directories permitted or not; nothing where there is none."""
    if not path.exists():
        return
    try:
        shutil.rmtree(path)
    except PermissionError:
        for directory, names, _ in os.walk(path):
            for name in names:
                if not os.path.islink(os.path.join(directory, name)):
                    os.chmod(os.path.join(directory, name), 0o700)
        shutil.rmtree(path)


def _build_frame(frame: Path) -> None:
    for name, mode in {
        "etc": 0o755, "home": 0o755, "home/agent": 0o755, "workspace": 0o755, "tmp": 0o1777, "run": 0o755,
        "proc": 0o555, "dev": 0o755,
    }.items():  # fmt: skip
        (frame / name).mkdir()
        (frame / name).chmod(mode)
    for name, text in _ETC.items():
        (frame / "etc" / name).write_text(text, encoding="ascii")


def _build_host_frame(frame: Path) -> None:
    _build_frame(frame)
    for name, mode in {
        "usr": 0o755, "etc/ssl": 0o755, "var": 0o755, "var/tmp": 0o1777, "var/lib": 0o755, "opt": 0o755, "root": 0o700,
    }.items():  # fmt: skip
        (frame / name).mkdir()
        (frame / name).chmod(mode)
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        host = Path("/", name)
        if host.is_symlink():
            (frame / name).symlink_to(os.readlink(host).lstrip("/"))
        elif host.is_dir():
            (frame / name).mkdir()
    for name in (*_HOST_ETC, *(path.name for path in Path("/etc").glob("python3*"))):
        source, target = Path("/etc", name), frame / "etc" / name
        if source.is_symlink() or source.is_file():
            shutil.copy2(source, target, follow_symlinks=False)
        elif source.is_dir():
            shutil.copytree(source, target, symlinks=True)
