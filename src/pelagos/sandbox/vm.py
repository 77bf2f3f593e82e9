"""Virtual machines: a kernel of the guest's own, inside bubblewrap, with an agent in it that runs commands.

`microvm` is QEMU's machine without PCI or BIOS, restored once it booted; `fullvm` is a PC that boots; `uml` is Linux as
a program of the host. KVM is used only where a guest booted with it, else QEMU translates (TCG). Guests have a copy of
some of the host's packages as a disk, the image's layers on a second one, and no network.
"""

import base64
import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pelagos.errors import SandboxError
from pelagos.sandbox import container, inside, linux
from pelagos.sandbox.api import Capabilities, Spec
from pelagos.sandbox.container import INSIDE_UID, PATH, Home, host_ids
from pelagos.sandbox.mux import Guest, Mux

# What a guest has of the host, with what these packages need; a host without dpkg has no such base.
PACKAGES = (
    "bash coreutils dash diffutils findutils gawk git grep gzip libpython3-stdlib make mawk patch procps "
    "python3-minimal sed tar util-linux"
)
_UNWANTED = re.compile(r"^/usr/share/(doc|man|locale|info|lintian|perl|i18n)/|/(__pycache__|tests?|idlelib|lib2to3)/")
_DEPENDS = """apt-cache depends --recurse --installed --no-recommends --no-suggests --no-conflicts --no-breaks
    --no-replaces --no-enhances"""
MODULES = (
    "virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_mmio virtio_pci virtio_blk "
    "virtio_console overlay"
)
PROGRAMS = {
    "bwrap": "bubblewrap", "qemu-system-x86_64": "qemu-system-x86", "linux.uml": "user-mode-linux",
    "mke2fs": "e2fsprogs", "busybox": "busybox-static", "apt-cache": "apt",
}  # fmt: skip
MACHINES = ("qemu-system-x86_64", "linux.uml")  # of which each needs its own
UML_MODULES = Path("/usr/lib/uml/modules")
OVERHEAD_MB = 224  # of QEMU itself, beside the guest's memory
PROBE_S = 10.0
HELLO = b"pelagos-guest-is-up"
_INIT = """#!/bin/busybox sh
PATH=/bin
busybox mount -t proc p /proc; busybox mount -t devtmpfs d /dev; busybox mount -t sysfs s /sys
for m in MODULES; do [ -e /$m.ko ] && busybox insmod /$m.ko; done
if busybox grep -q pelagos.probe /proc/cmdline; then echo HELLO; busybox reboot -f; fi
n=0; while ! [ -b /dev/DISKb ] && [ $n -lt 100 ]; do busybox usleep 20000; n=$((n+1)); done
busybox mount -t ext4 -o ro /dev/DISKa /b && busybox mount -t ext4 /dev/DISKb /b/d
busybox mount --move /dev /b/dev; busybox mount --move /proc /b/proc
exec busybox chroot /b /usr/bin/python3 -I -S -c "$(busybox cat /agent)"
"""

# The same on a system of others: its kernel and its init have done the rest.
_FOREIGN = """modprobe -a virtio_console overlay; mkdir -p /d; mount /dev/disk/by-id/virtio-pelagos /d &&
python3 -I -S -c "$1"; systemctl poweroff -ff"""


class VirtualMachine(Guest):
    """One machine."""

    program, machine = MACHINES[0], "microvm"
    bus = "device"  # what a virtio device's name ends in on this machine
    disk = "vd"  # what a disk's name begins with
    restores = True

    def __init__(self, box: Path, layers: Path, spec: Spec, home: Home | None) -> None:
        super().__init__(box, layers, spec, home)
        self._art = box.parents[1] / "vm"
        self._art.mkdir(exist_ok=True)
        self._art.chmod(0o711)
        self._state, self._pid, self._notes, self._how = Path(), -1, -1, "format=raw,readonly=on"
        self.capabilities = Capabilities(
            memory_limit="vm", process_limit="vm", cpu_limit="cgroup" if self._group else "vm", disk_limit="hard",
            pause="signals", files="overlay", host_user="separate" if os.geteuid() == 0 else "caller",
            kernel="tcg" if home is None else self._means(),
        )  # fmt: skip

    def start(self) -> None:
        tools(self.program)
        limits = replace(self._spec.limits, memory_mb=self._spec.limits.memory_mb + OVERHEAD_MB,
                         processes=self._spec.limits.processes + 256)  # fmt: skip
        if self._group:
            self._group.limit(replace(limits, cpu=os.cpu_count() or 1))  # to start is not the guest's own work
        given = self._given()
        facts = [*(path.name for path in given.values()), self.machine, self._spec.base, *self._spec.layers,
                 self._spec.limits.memory_mb, self._spec.limits.disk_mb, self.capabilities.kernel]  # fmt: skip
        self._state = self._art / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        own = self._box / "vm"
        fresh = not own.exists()
        with _locked(self._art / "lock" if fresh and self.restores else self._box / "lock"):
            restore = fresh and self.restores and self._state.exists()
            if fresh:
                own.mkdir(mode=0o700)
                if restore:
                    os.utime(self._state)
                    _copy_sparse(self._state / "disk", own / "disk")
                else:
                    container.make_disk(own / "disk", self._spec.limits.disk_mb)
            uid, gid = host_ids()
            for path in (own, own / "disk"):
                os.chown(path, uid, gid)
            words = [*self._bubblewrap(given, restore), *self._command(restore)]
            keep = str(self._state) if fresh and self.restores and not restore else ""
            ask = {"words": words, "restore": restore, "keep": keep}
            if said := self._hand_up(ask):
                self.stop()
                last = (own / "console").read_bytes()[-600:] if (own / "console").exists() else b""
                raise SandboxError(f"{self._spec.substrate} {self._spec.id} did not start: {said}; "
                                   f"last on its console: {last.decode('utf-8', 'replace')}")  # fmt: skip
        if self._group:
            self._group.limit(limits)

    def _given(self) -> dict[str, Path]:
        """Return what the machine finds of ours by the names it knows."""
        return {"/base": self._base(), "/initrd": self._initrd(), "/kernel": self._kernel()}

    def _bubblewrap(self, given: dict[str, Path], restore: bool) -> list[str]:
        words = """--unshare-all --die-with-parent --new-session --cap-drop ALL --clearenv --ro-bind /usr /usr
            --setenv TMPDIR /vm --proc /proc --dev /dev --tmpfs /tmp --symlink usr/bin /bin --symlink usr/lib /lib
            --symlink usr/lib64 /lib64 --symlink usr/sbin /sbin"""
        lent = {name: str(path).replace(f"{self._art}/", "ART/") for name, path in given.items()}
        places = [("--bind", "OWN", "/vm"), *(("--ro-bind", path, name) for name, path in lent.items())]
        if restore:
            places.append(("--ro-bind", f"ART/{self._state.name}/state", "/state"))
        if self.capabilities.kernel == "kvm":
            places.append(("--dev-bind", "/dev/kvm", "/dev/kvm"))
        return ["bwrap", *words.split(), *(word for place in places for word in place), "--"]

    def _command(self, restore: bool) -> list[str]:
        limits, bus = self._spec.limits, self.bus
        # What is translated is kept up to so many MB (part of OVERHEAD_MB): without a limit it grows to a GB.
        accel = "-accel kvm -cpu host" if self.capabilities.kernel == "kvm" else "-accel tcg,tb-size=96 -cpu max"
        words = f"""-M {self.machine} -m {int(limits.memory_mb)} -smp {max(1, int(limits.cpu))} -nodefaults
            -no-user-config -nographic -no-reboot -sandbox on,spawn=allow {accel}
            -drive if=none,id=base,file=/base,{self._how}
            -device virtio-blk-{bus},drive=base
            -drive if=none,id=data,file=/vm/disk,format=raw
            -device virtio-blk-{bus},drive=data,serial=pelagos
            -device virtio-serial-{bus} -device virtserialport,chardev=port,name=pelagos
            -chardev socket,id=port,fd=@PORT -chardev socket,id=qmp,fd=@QMP
            -mon chardev=qmp,mode=control -serial file:/vm/console"""
        return [self.program, *words.split(), *self._boot(), *(["-incoming", "exec:cat /state"] if restore else [])]

    def _boot(self) -> list[str]:
        # Translated code is too slow to measure the clock against a timer, and without it this machine has no tick.
        mhz = re.search(r"cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(encoding="ascii"))
        clock = f"tsc_early_khz={int(float(mhz[1]) * 1000)} " if mhz and self.capabilities.kernel == "tcg" else ""
        append = clock + "console=ttyS0 reboot=t panic=-1 no_timer_check mitigations=off random.trust_cpu=on"
        return ["-kernel", "/kernel", "-initrd", "/initrd", "-append", append]

    def _bring_up(self, ask: dict[str, Any], control: socket.socket, *fds: int) -> Mux:
        (port, port_vm), (qmp, qmp_vm) = socket.socketpair(), socket.socketpair()
        words = [w.replace("@PORT", f"{port_vm.fileno()}").replace("@QMP", f"{qmp_vm.fileno()}") for w in ask["words"]]
        self._notes = os.open(self._box / "qemu.err", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

        def launch() -> None:
            os.dup2(self._notes, 1)
            os.dup2(self._notes, 2)
            linux.close_all_but([port_vm.fileno(), qmp_vm.fileno()])
            for sock in (port_vm, qmp_vm):
                sock.set_inheritable(True)
            with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                file.write("900")
            art, own = str(self._art), str(self._box / "vm")
            if os.geteuid() == 0:
                # The unprivileged user may not walk to our directories, so root lends them under names it may walk to.
                linux.unshare("mnt")
                places = {"a": os.open(art, os.O_PATH), "o": os.open(own, os.O_PATH)}
                linux.mount("tmpfs", "/tmp", "tmpfs")
                for name, fd in places.items():
                    os.mkdir(f"/tmp/{name}")
                    linux.mount(f"/proc/self/fd/{fd}", f"/tmp/{name}", None, linux.MS_BIND)
                art, own = "/tmp/a", "/tmp/o"
            lent = [re.sub(r"^ART(?=/)", art, own if word == "OWN" else word) for word in words]
            linux.become(*host_ids())
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            os.execvpe(lent[0], lent, {"PATH": PATH})

        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._pid = linux.fork(launch, traceback.print_exception)
        port_vm.close()
        qmp_vm.close()
        mux = Mux(control, port, self.window)
        if ask["restore"]:
            say = _monitor(qmp)
            while say("query-status")["status"] == "inmigrate":
                time.sleep(0.002)
            say("cont")  # it was saved while it stood still
        else:
            mux.until_up(b"R", self.boot_s)
            layers = [self._layer_tar(digest) for digest in self._spec.layers]
            mux.ask({"layers": [len(data) for data in layers], "base": self._spec.base}, b"".join(layers))
            if ask["keep"]:
                self._save(_monitor(qmp), Path(ask["keep"]))
        mux.ask({"now": time.time()}, os.urandom(64), answered=False)
        return mux

    def _take_down(self) -> str:
        if self._pid > 0:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = -1
        return os.pread(self._notes, 4096, 0).decode("utf-8", "replace") if self._notes >= 0 else ""

    def _layer_tar(self, digest: str) -> bytes:
        with tempfile.TemporaryFile() as file:
            inside.pack_path(self._layers / digest, file)
            file.seek(0)
            return file.read()

    def _save(self, say: Callable[..., Any], state: Path) -> None:
        """Keep the running guest's memory and a copy of its disk of the same moment."""
        say("stop")
        say("migrate", uri="exec:cat > /vm/state")
        while (status := say("query-migrate").get("status")) not in ("completed", "failed"):
            time.sleep(0.01)
        if status == "failed":
            raise SandboxError("QEMU could not write its state; is the disk full?")
        own, draft = self._box / "vm", state.with_suffix(f".{os.getpid()}")
        draft.mkdir()
        draft.chmod(0o711)
        _copy_sparse(own / "disk", draft / "disk")
        os.rename(own / "state", draft / "state")
        (draft / "state").chmod(0o444)
        os.rename(draft, state)
        say("cont")

    def _base(self) -> Path:
        """Return the disk of the host's packages, made once."""
        stamp = f"{PACKAGES} {os.stat('/var/lib/dpkg/status').st_mtime_ns}"
        path = self._art / f"base-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}"
        if not path.exists():
            with _locked(self._art / "lock"), tempfile.TemporaryDirectory(dir=self._art) as stage:
                if not path.exists():
                    files = _package_files()
                    _stage(files, Path(stage))
                    size = sum(os.lstat(f).st_blocks // 2 + 4 for f in files) * 5 // 4 + (16 << 10)
                    draft = path.with_suffix(".new")
                    container.run_tool(*container.MKE2FS, "root_owner=0:0", "-d", stage, str(draft), f"{size}k")
                    draft.chmod(0o444)
                    draft.rename(path)
        return path

    def _initrd(self) -> Path:
        """Return the first file system: modules, busybox and the agent's text."""
        agent = _agent()
        modules = self._modules()
        init = _INIT.replace("MODULES", MODULES).replace("HELLO", HELLO.decode()).replace("DISK", self.disk)
        facts = f"{modules}{agent}{init}"
        path = self._art / f"initrd-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
        if not path.exists():
            parts = {"init": (0o755, init.encode()), "agent": (0o644, agent.encode())}
            parts |= {"bin/busybox": (0o755, Path(str(linux.which("busybox"))).read_bytes())}
            parts |= {module.name: (0o644, module.read_bytes()) for module in modules}
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_bytes(gzip.compress(_cpio(parts), 1, mtime=0))
            draft.chmod(0o444)
            draft.rename(path)
        return path

    def _kernel(self) -> Path:
        return host_kernel()

    def _modules(self) -> list[Path]:
        return find_modules()

    def _means(self) -> str:
        """Return what runs the guest's programs: "kvm", "tcg" or "uml"."""
        return "tcg" if self._why_no_kvm() else "kvm"

    def _why_no_kvm(self) -> str:
        """Return why KVM is not used, found once a boot of the host by booting a guest with it; "" where it is."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        path = self._art / f"kvm-{boot}"
        with _locked(self._art / "kvm-lock"):
            if not path.exists():
                path.write_text(self._probe_kvm(), encoding="utf-8")
            return path.read_text(encoding="utf-8")

    def _probe_kvm(self) -> str:
        tools()
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            return "/dev/kvm is missing or may not be opened"
        words = f"""-M microvm -accel kvm -cpu host -m 128 -nodefaults -no-user-config -nographic -no-reboot
            -serial stdio -kernel {host_kernel()} -initrd {self._initrd()} -append"""
        words = [self.program, *words.split(), "console=ttyS0 pelagos.probe reboot=t panic=-1"]
        try:
            done = subprocess.run(words, capture_output=True, timeout=PROBE_S, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return f"a guest under KVM said nothing within {PROBE_S:.0f} s"
        complaint = done.stderr.decode("utf-8", "replace").strip() or "no guest came up"
        return "" if HELLO in done.stdout else complaint[-300:]


class FullVM(VirtualMachine):
    """A PC with PCI, ACPI and a BIOS, booted each time; with an `Image.disk`, from that disk as it was made.

    Such a system must have cloud-init, systemd and Python: the agent comes on a NoCloud seed. What it writes to its own
    disk is forgotten; commands run over an overlay as in any guest.
    """

    machine, bus, restores, whole_disks, boot_s = "q35", "pci", False, True, 600.0

    def _given(self) -> dict[str, Path]:
        digest = self._spec.base.partition(":")[2]
        if not digest:
            return super()._given()
        path = self._art / digest / "disk"
        if not re.fullmatch("[0-9a-f]{64}", digest) or not path.exists():
            raise SandboxError(f"disk {digest[:12]} is not in {self._art}; make the image with this store")
        os.utime(path.parent)  # `Store.collect` leaves what was used lately
        with path.open("rb") as file:
            self._how = f"format={'qcow2' if file.read(3) == b'QFI' else 'raw'},snapshot=on"
        return {"/base": path}

    def _boot(self) -> list[str]:
        if not self._spec.base.startswith("disk:"):
            return super()._boot()
        words = ["systemd-run", "--no-block", "sh", "-c", _FOREIGN, "sh", _agent()]
        user = {"bootcmd": [words], "ssh_genkeytypes": [], "locale": False}
        seed = self._box / "vm" / "seed"
        seed.mkdir(exist_ok=True)
        seed.chmod(0o755)
        about = {"instance-id": self._spec.id}
        told = {"user-data": f"#cloud-config\n{json.dumps(user)}", "meta-data": json.dumps(about)}
        for name, text in told.items():
            (seed / name).write_text(text, encoding="ascii")
            (seed / name).chmod(0o644)
        disk = "if=none,id=seed,driver=vvfat,dir=/vm/seed,label=cidata,readonly=on"
        return ["-drive", disk, "-device", "virtio-blk-pci,drive=seed"]


class UserMode(VirtualMachine):
    """User-mode Linux: a kernel that is a program, whose programs run as the host's own do; booted each time.

    The one line it has into it loses what comes while its buffer is full, so no more is sent than the agent has told
    of having read (`window`).
    """

    program, disk, restores, window = MACHINES[1], "ubd", False, 2048

    def _means(self) -> str:
        return "uml"

    def _kernel(self) -> Path:
        return Path(str(linux.which(self.program)))

    def _modules(self) -> list[Path]:
        return sorted(UML_MODULES.rglob("overlay.ko"))[-1:]

    def _command(self, restore: bool) -> list[str]:
        words = f"""mem={int(self._spec.limits.memory_mb)}M initrd=/initrd ubdar=/base ubdb=/vm/disk
            con=null ssl=null con0=null,fd:1 con1=fd:@PORT uml_dir=/tmp panic=-1 quiet noreboot"""
        return ["/kernel", *words.split()]


def _agent() -> str:
    """Return the agent as one short program."""
    program = f"{linux.modules_as_program('linux', 'inside', 'guest')}module.main({INSIDE_UID})"
    packed = base64.b64encode(zlib.compress(program.encode(), 9)).decode("ascii")
    return f"import zlib, base64; exec(zlib.decompress(base64.b64decode('{packed}')))"


def _monitor(sock: socket.socket) -> Callable[..., Any]:
    """Return what says one command to QEMU's monitor and gives its answer."""
    file = sock.makefile("rw", encoding="ascii", newline="\n")

    def say(command: str, **arguments: str) -> Any:
        file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        file.flush()
        while "return" not in (answer := json.loads(file.readline() or '{"error": {"desc": "it ended"}}')):
            if "error" in answer:
                raise SandboxError(f"QEMU: {answer['error']['desc']}")
        return answer["return"]

    file.readline()
    say("qmp_capabilities")
    return say


def tools(machine: str = MACHINES[0]) -> None:
    """Raise SandboxError naming the first program or file that a virtual machine needs and this host lacks."""
    for program, package in PROGRAMS.items():
        if linux.which(program) is None and program in (machine, *(set(PROGRAMS) - set(MACHINES))):
            raise SandboxError(f"virtual machines need {program} (Debian: apt-get install {package})")


def find_modules() -> list[Path]:
    """Return the kernel's modules that a guest loads; SandboxError where one is neither a plain file nor built in."""
    root = Path("/lib/modules", host_kernel().name.removeprefix("vmlinuz-"))
    found = {path.stem: path for path in root.rglob("*.ko") if path.stem in MODULES.split()}
    built_in = (root / "modules.builtin").read_text(encoding="utf-8") if (root / "modules.builtin").exists() else ""
    for name in ("virtio_blk", "virtio_console", "overlay"):
        if name not in found and f"/{name}.ko" not in built_in:
            said = "compressed ones are not read"
            raise SandboxError(f"{root}: no plain module {name} ({said}); install linux-image-cloud-amd64")
    return list(found.values())


def host_kernel() -> Path:
    """Return the newest kernel of this host that has modules and may be read; SandboxError where there is none."""
    for path in sorted(Path("/boot").glob("vmlinuz-*"), reverse=True):
        if Path("/lib/modules", path.name.removeprefix("vmlinuz-")).is_dir() and os.access(path, os.R_OK):
            return path
    needed = "a readable kernel /boot/vmlinuz-* with modules"
    raise SandboxError(f"virtual machines need {needed}; install linux-image-cloud-amd64")


def _package_files() -> list[str]:
    """Return the files of `PACKAGES` and what they depend on that are installed, as apt and dpkg list them."""
    depends = container.run_tool(*_DEPENDS.split(), *PACKAGES.split())
    words = ["dpkg-query", "-L", *(line for line in depends.splitlines() if line[:1].isalnum())]
    listed = subprocess.run(words, capture_output=True, text=True).stdout  # and complaints of what is not installed
    wanted = {f for f in listed.splitlines() if f.startswith(("/usr/", "/bin", "/sbin", "/lib"))}
    return sorted(f for f in wanted if not _UNWANTED.search(f) and os.path.lexists(f))


def _stage(files: list[str], stage: Path) -> None:
    """Copy the files under a directory, without setuid bits."""
    before = os.umask(0o022)
    stage.chmod(0o755)
    for name in ("b", "d", "dev", "mnt", "proc", "run", "sys", "tmp", "usr"):
        (stage / name).mkdir()
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if Path("/", name).is_symlink():
            (stage / name).symlink_to(os.readlink(f"/{name}").lstrip("/"))
    places = {os.path.join(os.path.realpath(os.path.dirname(f)), os.path.basename(f)) for f in files}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as names, tempfile.NamedTemporaryFile() as tar:
        names.write("\n".join(sorted(places)))
        names.flush()
        container.run_tool("tar", "-C", "/", "-cf", tar.name, "--no-recursion", "--mode=u-s,g-s",
                           "--ignore-failed-read", "-T", names.name)  # fmt: skip
        container.run_tool("tar", "-C", str(stage), "-xf", tar.name)
    # What alternatives make is in no package's list.
    for link in ("awk", "python3"):
        if not (stage / "usr/bin" / link).is_symlink():
            (stage / "usr/bin" / link).symlink_to(os.path.realpath(f"/usr/bin/{link}"))
    os.umask(before)


def _copy_sparse(source: Path, target: Path) -> None:
    container.run_tool("cp", "--sparse=always", "--reflink=auto", str(source), str(target))


def _cpio(parts: dict[str, tuple[int, bytes]]) -> bytes:
    """Return the archive the kernel unpacks as its first file system, with the directories the start needs."""
    entries = [(name, 0o40755, b"") for name in ("bin", "b", "dev", "proc", "sys")]
    entries += [(name, 0o100000 | mode, data) for name, (mode, data) in parts.items()]
    out = bytearray()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


@contextlib.contextmanager
def _locked(path: Path) -> Any:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
