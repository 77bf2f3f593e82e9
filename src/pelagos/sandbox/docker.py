"""Docker as a backend: a container that an engine makes, with the agent of guests as its first program.

Asked for by name and never taken instead of another. The engine, reached over its HTTP socket, has the files and the
limits; requests, log and layers are ours. Podman's socket speaks the same. The engine must be of this host.
"""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import tempfile
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pelagos.config import read_environment
from pelagos.errors import SandboxError
from pelagos.sandbox import container, inside, keeper, layers, linux
from pelagos.sandbox.api import Capabilities, Spec
from pelagos.sandbox.cgroups import Group
from pelagos.sandbox.container import INSIDE_UID, PATH, START_S, Home
from pelagos.sandbox.mux import Guest, Mux

ANSWER_S = 300.0
OURS = "/.pelagos"  # where the socket the agent calls on is inside, and the host's Python for images without one
_MASKED = "acpi asound interrupts kcore keys latency_stats timer_list timer_stats sched_debug scsi".split()
_BOOT = f"""
import os, socket
port = socket.socket(socket.AF_UNIX)
port.connect("{OURS}/s")
size = int.from_bytes(port.recv(4, socket.MSG_WAITALL), "big")
exec(port.recv(size, socket.MSG_WAITALL))
module.main({INSIDE_UID}, port.fileno(), "/")
"""


class _Engine(http.client.HTTPConnection):
    """One connection to the engine's socket."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ANSWER_S)
        self.sock.connect(self.host)


def ask(
    method: str, path: str, body: dict[str, Any] | IO[bytes] | None = None, *, into: IO[bytes] | None = None
) -> Any:
    """Return what the engine answers (JSON, else bytes), None where there is no such thing; SandboxError else."""
    place = read_environment().docker_host
    try:
        with contextlib.closing(_Engine(place.removeprefix("unix://"))) as engine:
            tar = body if body and not isinstance(body, dict) else None
            kind = "application/x-tar" if tar else "application/json"
            engine.request(method, path, tar or json.dumps(body).encode(), {"Content-Type": kind, "Host": "docker"})
            answer = engine.getresponse()
            if into is not None and answer.status == 200:
                return shutil.copyfileobj(answer, into, 1 << 20)
            text = answer.read()
    except OSError as error:
        do = "start dockerd (Debian: apt-get install docker.io), or give the socket of an engine on this host"
        raise SandboxError(f"docker: no engine at DOCKER_HOST={place!r} ({error}); {do}") from None
    if answer.status >= 400 and answer.status != 404:
        raise SandboxError(f"docker: {method} {path}: {text[-600:].decode('utf-8', 'replace').strip()}")
    if answer.status == 404:
        return None
    # What is loaded is told of in several documents: the first is enough.
    return json.JSONDecoder().raw_decode(text.decode())[0] if text.startswith((b"{", b"[")) else text


class Docker(Guest):
    """One container of an engine."""

    _filters = True

    def __init__(self, box: Path, layers: Path, spec: Spec, home: Home | None) -> None:
        super().__init__(box, layers, spec, home)
        self._url = f"/containers/pelagos-{hashlib.sha256(os.fsencode(box)).hexdigest()[:24]}"
        self._labels = {"pelagos.store": str(box.parents[1])}
        self._limited: Group | None = None
        if home is None:
            return
        if not (facts := ask("GET", "/info")):
            raise SandboxError("docker: what answers is no engine; expected one that knows /info")
        mapped = {"name=userns", "name=rootless"} & {word.partition(",")[0] for word in facts["SecurityOptions"] or ()}
        self.capabilities = Capabilities(
            memory_limit="cgroup" if facts["MemoryLimit"] else "per_process",
            process_limit="cgroup" if facts["PidsLimit"] else "none",
            cpu_limit="cgroup" if facts["CpuCfsQuota"] else "none",
            disk_limit="watched", pause="signals", files="overlay", host_user="separate" if mapped else "inside",
        )  # fmt: skip

    def start(self) -> None:
        ask("POST", f"{self._url}/stop?t=0")  # of a keeper that was killed
        place = self._box / "port"
        (place / "usr").mkdir(parents=True, exist_ok=True)
        place.chmod(0o711)
        (place / "s").unlink(missing_ok=True)
        if not ask("GET", f"{self._url}/json"):
            self._sweep()
            ask("POST", f"/containers/create?name={self._url.rpartition('/')[2]}", self._wanted(self._image(), place))
        try:
            with socket.socket(socket.AF_UNIX) as server:
                with keeper.short_name(place) as short:
                    server.bind(f"{short}/s")
                (place / "s").chmod(0o666)  # the agent is root inside, which may be anybody here; see `_bring_up`
                server.listen(1)
                ask("POST", f"{self._url}/start")
                said = self._hand_up({}, server.detach())
            if said:
                last = ask("GET", f"{self._url}/logs?stdout=1&stderr=1&tail=10")[-600:].decode("utf-8", "replace")
                raise SandboxError(f"docker {self._spec.id} did not start: {said}: {last}")
            with contextlib.suppress(OSError, KeyError):  # what is not told here is told nowhere
                self._limited = Group.of(ask("GET", f"{self._url}/json")["State"]["Pid"])
        except BaseException:
            self.stop()
            raise

    def _wanted(self, image: str, place: Path) -> dict[str, Any]:
        """Return what the engine is asked to make."""
        limits = self._spec.limits
        host = self._spec.base == "host"
        usr = "/usr" if host else f"{OURS}/usr"
        # An image of its own system may have no Python, or one for another C library: the host's goes in with its own.
        loader = "" if host else os.path.realpath("/lib64/ld-linux-x86-64.so.2").replace("/usr", usr, 1)
        libraries = ":".join(f"{usr}/{name}" for name in ("lib/x86_64-linux-gnu", "lib64", "lib"))
        words = [] if host else [loader, "--library-path", libraries]
        # All read-only: the uid inside may be its owner's here, and a socket takes calls all the same.
        mounts = {OURS: str(place), **{f"/{name}": f"/{name}" for name in container.host_parts(host)}}
        mounts |= {} if host else {usr: "/usr"}
        return {
            "Image": image, "Entrypoint": [], "Cmd": [*words, f"{usr}/bin/python3", "-I", "-S", "-c", _BOOT],
            "User": "0:0", "WorkingDir": "/", "Hostname": "sandbox", "Env": [f"PATH={PATH}"], "NetworkDisabled": True,
            "Labels": self._labels | {"pelagos.box": self._box.name},
            "HostConfig": {
                "NetworkMode": "none", "CapDrop": ["ALL"], "CapAdd": ["SETUID", "SETGID", "KILL"],
                "SecurityOpt": ["no-new-privileges"], "Memory": limits.memory_bytes,
                "MemorySwap": limits.memory_bytes, "NanoCpus": int(limits.cpu * 1e9),
                "PidsLimit": limits.processes + 1, "ShmSize": limits.memory_bytes // 2,
                "MaskedPaths": ["/sys", *(f"/proc/{name}" for name in _MASKED)],
                "Mounts": [{"Type": "bind", "Source": s, "Target": t, "ReadOnly": True} for t, s in mounts.items()],
            },
        }  # fmt: skip

    def _bring_up(self, ask: dict[str, Any], control: socket.socket, *fds: int) -> Mux:
        with socket.socket(fileno=fds[0]) as server:
            server.settimeout(START_S)
            self._port, _ = server.accept()
        (self._box / "port" / "s").unlink()  # nobody else calls: the agent came before there was any command
        self._port.settimeout(None)
        program = linux.modules_as_program("linux", "inside", "guest").encode()
        self._port.sendall(len(program).to_bytes(4, "big") + program)
        mux = Mux(control, self._port)
        mux.until_up(b"R", START_S)
        return mux

    def _limits(self) -> dict[str, int | None]:
        # The uid inside may be anybody's outside, whose processes would count: the engine's limit is the limit.
        grouped = self.capabilities.memory_limit == "cgroup"
        return self._spec.limits.of_process(memory=not grouped) | {"processes": None}

    def inside(self, task: str, arguments: dict[str, Any]) -> tuple[int, Callable[[], bool]]:
        tasks = {"disk": self._disk, "pack": self._pack}
        if task not in tasks:
            return super().inside(task, arguments)
        return self.apart(lambda out: tasks[task](out, **arguments))

    def _disk(self, out: int) -> None:
        inside.write_all(out, b"%d" % ask("GET", f"{self._url}/json?size=1").get("SizeRw", 0))

    def _pack(self, out: int, *, most: int) -> None:
        """Write what differs from the image, as the engine tells it: an image of one more layer, its last one ours."""
        made = ask("POST", f"/commit?container={self._url.rpartition('/')[2]}")["Id"]
        stage = Path(tempfile.mkdtemp(dir=self._box))
        try:
            saved, tree = stage / "saved", stage / "tree"
            tree.mkdir(mode=0o755)
            with saved.open("wb") as file:
                ask("GET", f"/images/{made}/get", into=file)
            with layers.oci_files(saved) as read:
                layers.unpack(read(layers.oci_layers(read, saved)[-1]), tree, oci=True)
            with os.fdopen(out, "wb", closefd=False) as pipe:
                inside.pack_path(tree, pipe, most=most)
        finally:
            ask("DELETE", f"/images/{made}?noprune=1")
            layers.remove_tree(stage)

    def usage(self) -> dict[str, int]:
        return {"memory": self._limited.usage()["memory"]} if self._limited and self.alive() else {}

    def kills(self) -> int:
        return self._limited.kills() if self._limited and self.alive() else 0

    def stop(self) -> None:
        super().stop()
        with contextlib.suppress(SandboxError):
            ask("POST", f"{self._url}/stop?t=0")

    def discard(self) -> None:
        with contextlib.suppress(SandboxError):
            ask("DELETE", f"{self._url}?force=1")

    def _sweep(self) -> None:
        """Delete containers of this store whose sandboxes are gone, and images of any whose layers are."""
        mine = urllib.parse.quote(json.dumps({"label": [f"pelagos.store={self._labels['pelagos.store']}"]}))
        for found in ask("GET", f"/containers/json?all=1&filters={mine}"):
            if not (self._box.parent / found["Labels"]["pelagos.box"]).exists():
                ask("DELETE", f"/containers/{found['Id']}?force=1")
        for found in ask("GET", "/images/json?filters=" + urllib.parse.quote('{"label": ["pelagos.layer"]}')):
            labels = found["Labels"]
            with contextlib.suppress(PermissionError, SandboxError):  # somebody else's, or one that a container has
                if not Path(labels["pelagos.store"], "layers", labels["pelagos.layer"]).exists():
                    ask("DELETE", f"/images/{found['Id']}")

    def _image(self) -> str:
        """Return the name of the image with this sandbox's layers, which the engine is given once."""
        facts = json.dumps([self._labels, *self._spec.layers])
        name = f"pelagos:{hashlib.sha256(facts.encode()).hexdigest()[:32]}"
        if ask("GET", f"/images/{name}/json"):
            return name
        with tempfile.TemporaryFile(dir=self._box) as file:
            below = layers.Store(self._box.parents[1]).empty_layer(OURS[1:])
            trees = [self._layers / digest for digest in (below, *self._spec.layers)]
            layers.write_archive(name, trees, self._labels | {"pelagos.layer": self._spec.layers[-1]}, file)
            ask("POST", "/images/load?quiet=1", file)
        if not ask("GET", f"/images/{name}/json"):
            raise SandboxError(f"docker: the engine took {name} and does not have it; is its disk full?")
        return name
