"""What sandboxes cost and what they survive, beside the raw tools in the same run.

python -m benchmarks.sandbox [speed alive row kill fork vm docker escape tasks] [--seconds 60] [--json FILE]

`speed`: creation beside `bwrap ... true` and `runc run`, a command, a call. `alive`: so many containers at once, each
running `sleep`, and the memory they take. `row`: so many created, used and closed one after another, and what is left
of them (mounts, control groups, processes, files). `kill`: a script of 50 commands that must not run twice, while the
client, the gateway, the edge or the keeper is killed (SIGKILL) at record boundaries; it goes on where an earlier run
of the same seed ended, for `--seconds` at a time. `fork`: snapshot, eight forks that diverge, packed and compared byte
by byte. `vm`: boot, restore and commands of a micro-VM beside QEMU alone on the same state, and how fast programs are
there, in a container and in user-mode Linux. `docker`: a container of the engine at DOCKER_HOST. `escape`: the
attempts of tests/sandbox/test_abuse.py, counted. `tasks`: 200 tasks solved and left alone, graded three times. Parts
that ran are merged into FILE.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import http.client
import importlib
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pelagos import tasks
from pelagos.errors import PelagosError
from pelagos.sandbox import AsyncSandbox, Image, Sandbox, Store, log
from pelagos.sandbox.container import SANDBOX_UID
from pelagos.sandbox.layers import remove_tree

RAW = "bwrap --unshare-all --ro-bind / / --proc /proc --dev /dev --die-with-parent -- "
PARTS = ["speed", "alive", "row", "kill", "fork", "vm", "escape", "tasks"]  # and "docker", where there is an engine
COMMANDS = 50
SPARE_GROUPS = 12  # of keepers kept ready, in four hierarchies: they move while one counts
VICTIMS = ("client", "gateway", "edge", "keeper")
KEY = "a-project-of-the-bench"
# The client of `kill`: it asks the same requests whenever it is started, and looks before it decides what is unknown.
# Its box is there (a store's directory and an id) or far (a gateway's address and an id).
CLIENT = """
import base64, http.client, json, secrets, sys, time, urllib.error, urllib.request
from pathlib import Path
from pelagos.errors import SandboxError, UnknownOutcome

class Far:
    def __init__(self, url, id):
        self.url = f"{url}/v1/sandboxes/{id}"
    def ask(self, verb, request_id, **body):
        headers = {"Authorization": "Bearer KEY", "Idempotency-Key": request_id}
        until = time.monotonic() + 60
        while True:
            try:
                ask = urllib.request.Request(f"{self.url}/{verb}", json.dumps(body).encode(), headers)
                return json.loads(urllib.request.urlopen(ask, timeout=60).read())
            except urllib.error.HTTPError as error:
                told = error.read().decode()
                if error.code in (502, 503):
                    pass
                elif error.code == 425:
                    raise UnknownOutcome(told) from None
                else:
                    raise SandboxError(told) from None
            except (OSError, ValueError, http.client.HTTPException):
                pass  # whoever was asked was killed
            if time.monotonic() > until:
                raise SandboxError("nobody answered for a minute")
            time.sleep(0.01)
    def exec(self, words, request_id):
        return base64.b64decode(self.ask("exec", request_id, command=words)["stdout"]).decode()
    def resolve(self, request, how):
        self.ask("resolve", secrets.token_hex(8), request=request, how=how)

class Near:
    def __init__(self, root, id):
        from pelagos.sandbox import Sandbox, Store
        self.box = Sandbox.open(id, replay=True, store=Store(Path(root)))
    def exec(self, words, request_id):
        return self.box.exec(words, request_id=request_id).text
    def resolve(self, request, how):
        self.box.resolve(request, how)

where, id, commands = sys.argv[1:]
box = (Far if where.startswith("http") else Near)(where, id)
def look(words):
    while True:
        try:
            return box.exec(words, secrets.token_hex(8))  # a new request: it may be asked again
        except UnknownOutcome:
            pass
for n in range(int(commands)):
    words = f"echo {n} >> trace; echo $(($(cat count || echo 0) + 1)) > count.new; mv count.new count"
    while True:
        try:
            box.exec(words, f"r{n}")
        except UnknownOutcome:
            seen = look("tail -1 trace; cat count").split()
            lines = look("wc -l < trace").strip() or "0"
            if seen[:1] == [str(n)] and seen[1:] != [lines]:
                # It was killed between its two effects: finish it by hand, once, as a person would.
                look(f"echo {lines} > count.new; mv count.new count")
            box.resolve(f"r{n}", "abandon" if seen[:1] == [str(n)] else "rerun")
            continue
        except SandboxError as error:
            if "abandoned" not in str(error):
                raise
        break
""".replace("KEY", KEY)


def times_ms(action: Callable[[], object], rounds: int) -> dict[str, float]:
    """Time an action so often: p50, p99 and the fastest."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        taken.append((time.perf_counter() - began) * 1e3)
    taken.sort()
    return {
        "p50": round(statistics.median(taken), 2),
        "p99": round(taken[min(len(taken) - 1, int(len(taken) * 0.99))], 2),
        "min": round(taken[0], 2),
        "rounds": rounds,
    }


def speed(store: Store, image: Image, rounds: int = 100) -> dict[str, Any]:
    """Creation, commands and calls, each beside the raw tool, alternating so that both meet the same noise."""
    raw: dict[str, Any] = {"true": (RAW + "true").split(), "python": (RAW + "python3 -I -S -c pass").split()}
    began = time.perf_counter()
    Sandbox.create(image=image, store=store).close()
    out: dict[str, Any] = {"first_create_ms": round((time.perf_counter() - began) * 1e3, 1)}  # it starts the nursery
    for name, substrate, words in (("container", "container", raw["true"]), ("function", "function", raw["python"])):
        ours, theirs, used = [], [], []
        for _ in range(rounds if name == "container" else rounds // 3):
            theirs.append(
                times_ms(lambda words=words: subprocess.run(words, check=True, capture_output=True), 1)["p50"]
            )
            began = time.perf_counter()
            box = Sandbox.create(substrate=substrate, image=image, store=store, ttl_s=60)
            ours.append((time.perf_counter() - began) * 1e3)
            box.call("def main(): return 1") if name == "function" else box.exec(["true"])
            used.append((time.perf_counter() - began) * 1e3)
            box.close()
            time.sleep(0.05)  # the kernel ends the last one, the nursery makes the next; `row` has no such pause
        found = {f"create_{name}": ours, f"raw_{name}": theirs, f"create_{name}_and_use": used}
        for key, taken in ((key, sorted(taken)) for key, taken in found.items()):
            out[key] = {"p50": round(statistics.median(taken), 2), "p99": round(taken[int(len(taken) * 0.99)], 2),
                        "min": round(taken[0], 2), "rounds": len(taken)}  # fmt: skip
        out[f"overhead_{name}_p50"] = round(out[f"create_{name}"]["p50"] - out[f"raw_{name}"]["p50"], 2)
    with tempfile.TemporaryDirectory() as place:
        if runc := runc_words(Path(place)):
            out["raw_runc"] = times_ms(lambda: subprocess.run(runc, check=True, capture_output=True), 20)
    with Sandbox.create(image=image, store=store, ttl_s=60) as box:
        out["exec_true"] = times_ms(lambda: box.exec(["true"]), rounds)
        out["files_write_1kB"] = times_ms(lambda: box.files.write("f", b"x" * 1000), rounds)
        out["files_read_1kB"] = times_ms(lambda: box.files.read("f"), rounds)
    with Sandbox.create(substrate="function", image=image, store=store, ttl_s=60) as box:
        source = "def main(x): return x + 1"

        def call() -> None:
            time.sleep(0.01)  # callers that think; without it the two processors make the next processes meanwhile
            if box.call(source, 41).value != 42:
                raise AssertionError("wrong value")

        spaced = times_ms(call, rounds)
        out["call_spaced_10ms"] = {k: round(v - 10.1, 2) if k != "rounds" else v for k, v in spaced.items()}
        out["call_back_to_back"] = times_ms(lambda: box.call(source, 41), rounds)
    return out


def runc_words(bundle: Path) -> list[str]:
    """Prepare a bundle over the host's /usr and return what runs `true` in it; nothing where there is no runc."""
    if shutil.which("runc") is None:
        return []
    for name in ("usr", "proc", "dev", "sys"):
        (bundle / "rootfs" / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (bundle / "rootfs" / name).symlink_to(f"usr/{name}")
    subprocess.run(["runc", "spec", "-b", str(bundle)], check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"] |= {"args": ["true"], "terminal": False, "rlimits": []}
    config["mounts"].append({"destination": "/usr", "source": "/usr", "type": "bind", "options": ["rbind", "ro"]})
    (bundle / "config.json").write_text(json.dumps(config))
    return ["runc", "run", "-b", str(bundle), f"bench-{os.getpid()}"]


def alive(store: Store, image: Image, count: int) -> dict[str, Any]:
    """Many containers at once, each with a `sleep` running; a command in each, then all are closed."""

    async def go() -> dict[str, Any]:
        before = resources(store)
        boxes: list[AsyncSandbox] = []
        marks = []
        began = time.perf_counter()
        gate = asyncio.Semaphore(4)

        async def make() -> None:
            async with gate:
                box = await AsyncSandbox.create(image=image, store=store, ttl_s=900, memory_mb=64, processes=16)
                await box.exec("sleep 900 >/dev/null 2>&1 &")
                boxes.append(box)
                if len(boxes) % max(1, count // 5) == 0:
                    marks.append({"alive": len(boxes), "seconds": round(time.perf_counter() - began, 2),
                                  "host_mb": (resources(store)["memory"] - before["memory"]) // 10**6})  # fmt: skip

        await asyncio.gather(*(make() for _ in range(count)))
        took = time.perf_counter() - began
        during = resources(store)
        began = time.perf_counter()
        answers = await asyncio.gather(*(box.exec("pgrep -c sleep") for box in boxes))
        swept = time.perf_counter() - began
        idle = await asyncio.to_thread(idle_share)
        began = time.perf_counter()
        await asyncio.gather(*(box.close() for box in boxes))
        closed = time.perf_counter()
        after = await asyncio.to_thread(what_is_left, store, before)
        return {
            "count": count, "runs": "sh, sleep 900", "all_answered": all(a.text == "1\n" for a in answers),
            "created_per_second": round(count / took, 1), "a_command_in_each_s": round(swept, 2),
            "memory_mb_each": round((during["memory"] - before["memory"]) / 1e6 / count, 2),
            "processes_each": round((during["processes"] - before["processes"]) / count, 2),
            "cpu_share_idle": idle, "growth": marks, "closed_in_s": round(closed - began, 2), "left": after,
        }  # fmt: skip

    return asyncio.run(go())


def row(store: Store, image: Image, count: int) -> dict[str, Any]:
    """Many containers one after another, and what is left of them."""
    Sandbox.create(image=image, store=store).close()
    before, taken, closing, marks = resources(store), [], [], []
    began = time.perf_counter()
    for number in range(count):
        start = time.perf_counter()
        box = Sandbox.create(image=image, store=store)
        taken.append((time.perf_counter() - start) * 1e3)
        if box.exec("echo $((6*7))").text != "42\n":
            raise AssertionError("wrong answer")
        start = time.perf_counter()
        box.close()
        closing.append((time.perf_counter() - start) * 1e3)
        if (number + 1) % max(1, count // 4) == 0:
            part = sorted(taken[-max(1, count // 4) :])
            marks.append({"made": number + 1, "create_p50_ms": round(statistics.median(part), 2)})
    took = time.perf_counter() - began
    return {
        "count": count, "per_second": round(count / took, 1), "create_p50_ms": round(statistics.median(taken), 2),
        "create_p99_ms": round(sorted(taken)[int(count * 0.99)], 2), "growth": marks,
        "close_p50_ms": round(statistics.median(closing), 2),
        "close_p99_ms": round(sorted(closing)[int(count * 0.99)], 2), "left": what_is_left(store, before),
    }  # fmt: skip


class Service:
    """A gateway and an edge, each a process of its own behind a port of its own, made again when it was killed."""

    def __init__(self, store: Store) -> None:
        self._home = store.root.parents[1]
        (self._home / "projects.toml").write_text(f'[bench]\nkey = "{KEY}"\nper_minute = 1000000\n')
        (self._home / "secret").write_text("between-gateway-and-edge")
        one, two = free_ports(2)
        ports = {"gateway": str(one), "edge": str(two)}
        self.url, edge = f"http://127.0.0.1:{one}", f"e1=http://127.0.0.1:{two}"
        parts = {"edge": ["--name", "e1"], "gateway": ["projects.toml", "--edge", edge, "--memory-mb", "0"]}
        self._words = {
            name: [sys.executable, "-m", "pelagos", "sandbox", "serve", *words, "--secret", "secret", "--port",
                   ports[name]] for name, words in parts.items()
        }  # fmt: skip
        self.processes = {name: self._start(name) for name in ("edge", "gateway")}

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
        env = {"PYTHONPATH": paths, "PATH": os.defpath, "HOME": str(self._home), "XDG_CACHE_HOME": str(self._home)}
        return subprocess.Popen(self._words[name], env=env, cwd=self._home, stderr=subprocess.DEVNULL)

    def kill(self, name: str) -> None:
        """Kill one and start it again."""
        self.close(name)
        self.processes[name] = self._start(name)

    def close(self, *names: str) -> None:
        for name in names or tuple(self.processes):
            self.processes[name].kill()
            self.processes[name].wait()

    def ask(self, path: str, request: str, method: str = "POST", **body: Any) -> dict[str, Any]:
        """One request, sent until somebody answers."""
        headers = {"Authorization": f"Bearer {KEY}", "Idempotency-Key": request}
        ask = urllib.request.Request(f"{self.url}/v1/sandboxes{path}", json.dumps(body).encode(), headers)
        ask.method = method
        until = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(ask, timeout=60) as answer:
                    return json.loads(answer.read())
            except (OSError, ValueError, http.client.HTTPException) as error:
                code = error.code if isinstance(error, urllib.error.HTTPError) else 502
                if code not in (429, 502) or time.monotonic() > until:  # 429: the gateway saw no edge yet
                    raise
                time.sleep(0.02)


def kill(
    store: Store, image: Image, kills: int, seed: int, commands: int = COMMANDS,
    victims: tuple[str, ...] = VICTIMS, state: dict[str, Any] | None = None, seconds: float = 1e9,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Run the script while one of `victims` is killed at record boundaries; every run must end as if nothing happened.

    Goes on from `state`, what an earlier call returned, and tells `keep` after every run.
    """
    began = time.monotonic()
    state = state or {"kill_points": dict.fromkeys(victims, 0), "runs": 0, "commands": commands, "wrong": [],
                      "resolved_after_looking": 0, "boundaries": {}, "seed": seed}  # fmt: skip
    service = Service(store) if {"gateway", "edge"} & set(victims) else None
    try:
        while sum(state["kill_points"].values()) < kills and time.monotonic() - began < seconds:
            left = kills - sum(state["kill_points"].values())
            _killed_run(store, image, service, random.Random(f"{seed}/{state['runs']}"), victims, state, left)
            state["complete"] = sum(state["kill_points"].values()) >= kills
            state["distinct_boundaries"] = len(state["boundaries"])
            keep(state)
    finally:
        if service:
            service.close()
    return state


def _killed_run(
    store: Store, image: Image, service: Service | None, r: random.Random, victims: tuple[str, ...],
    state: dict[str, Any], left: int,
) -> None:  # fmt: skip
    hits, commands = state["boundaries"], state["commands"]
    box = None
    if service:
        id = service.ask("", f"run{state['runs']}-{os.getpid()}", ttl_s=300)["id"]
        words = [sys.executable, "-c", CLIENT, service.url, id, str(commands)]
    else:
        box = Sandbox.create(image=image, store=store, ttl_s=300)
        id = box.id
        words = [sys.executable, "-c", CLIENT, str(store.root), id, str(commands)]
    directory = store.box(id)
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath, "HOME": str(store.root)}
    client = subprocess.Popen(words, env=env, stderr=subprocess.PIPE)
    for _ in range(min(8, left)):
        # The boundary among the next ones that was met least: in the end every one of the script was.
        now = records(directory)
        target = min(range(now + 1, now + 15), key=lambda n: (hits.get(str(n), 0), r.random()))
        while client.poll() is None and records(directory) < target:
            time.sleep(0.0005)
        time.sleep(r.uniform(0, 0.006))
        if client.poll() is not None:
            break
        victim, at = r.choice(victims), str(records(directory))
        hits[at] = hits.get(at, 0) + 1
        state["kill_points"][victim] += 1
        if victim == "client":
            client.kill()
            client.communicate()
            client = subprocess.Popen(words, env=env, stderr=subprocess.PIPE)
        elif victim == "keeper":
            with contextlib.suppress(ProcessLookupError, StopIteration):
                os.kill(keeper_of(directory), signal.SIGKILL)
        elif service:
            service.kill(victim)
    error = client.communicate(timeout=120)[1].decode()
    with box or Sandbox.open(id, store=store) as box:
        trace = box.files.read("trace", request_id="look-trace").decode().split()
        count = box.files.read("count", request_id="look-count").decode().strip()
        found = list(log.read_records(directory))
        log.verify(directory)
    state["resolved_after_looking"] += sum(f.get("event") == "resolve" or f.get("status") == "abandoned" for f in found)
    if client.returncode or trace != [str(n) for n in range(commands)] or count != str(commands):
        state["wrong"].append({"run": state["runs"], "trace": len(trace), "count": count, "error": error[-500:]})
    state["runs"] += 1


def keeper_of(directory: Path) -> int:
    """Return the pid of the process that holds the writer's lock of a log."""
    node = (directory / log.NAME).stat().st_ino
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return next(int(words[4]) for words in locks if words[1] == "FLOCK" and words[5].endswith(f":{node}"))


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody has."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def fork(store: Store, image: Image) -> dict[str, Any]:
    """Snapshot, fork(8), diverge, pack, restore: the bytes of every file are the same."""
    look = (
        "find . -type f | sort | xargs sha256sum; find . -type l -printf '%p %l\\n'; stat -c '%n %a' $(find . | sort)"
    )
    with Sandbox.create(image=image, store=store) as box, tempfile.TemporaryDirectory() as place:
        box.exec("mkdir d; head -c 3000000 /dev/urandom > d/big; ln -s d/big l; echo base > f; chmod 640 f")
        began = time.perf_counter()
        forks = box.fork(8)
        took = (time.perf_counter() - began) * 1e3
        same = []
        for number, one in enumerate(forks):
            one.exec(f"echo {number} >> f; rm l; mkdir x{number}; cp d/big x{number}/; chmod 600 d/big")
            diff = Path(place, "diff.tar")
            diff.write_bytes(one.pack_diff())
            restored = Image(one.spec.base, one.spec.layers).with_tar(diff, store=store)
            with Sandbox.create(image=restored, store=store) as other:
                same.append(one.exec(look).stdout == other.exec(look).stdout)
            one.close()
    return {"forks": len(forks), "fork_8_ms": round(took, 1), "identical": sum(same)}


def vm(store: Store, image: Image) -> dict[str, Any]:
    """A micro-VM's first boot, its restores beside QEMU's own, and its commands."""
    size: dict[str, Any] = {"substrate": "microvm", "memory_mb": 128, "disk_mb": 128, "image": image, "store": store}
    began = time.perf_counter()
    with Sandbox.create(**size) as box:
        out: dict[str, Any] = {"first_boot_s": round(time.perf_counter() - began, 2), "kernel": box.capabilities.kernel}
        state = next((store.root / "vm").glob("*/state"))
        out["state_mb"] = round(state.stat().st_blocks / 2048, 1)
        ours, theirs = [], []
        for _ in range(12):
            theirs.append(raw_restore(box, store))
            began = time.perf_counter()
            with Sandbox.create(**size) as other:
                other.exec(["true"])
                ours.append((time.perf_counter() - began) * 1e3)
                out["exec_true"] = times_ms(lambda other=other: other.exec(["true"]), 10)
    for name, taken in (("restore_to_first_command_ms", ours), ("raw_restore_to_first_command_ms", theirs)):
        out[name] = {
            "p50": round(statistics.median(taken), 1),
            "p99": round(max(taken), 1),
            "min": round(min(taken), 1),
        }
    out["ratio_p50"] = round(statistics.median(ours) / statistics.median(theirs), 2)
    for name in ("container", "microvm", "uml"):
        made = []
        for _ in range(5):
            began = time.perf_counter()
            with Sandbox.create(**(size | {"substrate": name})) as box:
                box.exec(["true"])
                made.append((time.perf_counter() - began) * 1e3)
                out[name] = {"exec_true": times_ms(lambda box=box: box.exec(["true"]), 10), **pace(box)}
        out[name]["create_to_first_command_ms"] = round(statistics.median(made), 1)
    return out


def pace(box: Sandbox) -> dict[str, float]:
    """How fast a sandbox's programs are: a loop in Python, 100 processes, Python itself."""
    loop = "import time; t = time.perf_counter()\nfor i in range(5_000_000): pass\nprint(time.perf_counter() - t)"
    return {
        "loop_s": round(statistics.median(float(box.exec(["python3", "-c", loop]).text) for _ in range(3)), 3),
        "hundred_processes_s": round(box.exec("for i in $(seq 100); do /bin/true; done").wall_ms / 1e3, 2),
        "start_python_ms": round(times_ms(lambda: box.exec(["python3", "-c", "import json"]), 5)["p50"], 1),
    }


def docker(store: Store, image: Image) -> dict[str, Any]:
    """A container of an engine: made, used and snapshot."""
    size: dict[str, Any] = {"substrate": "docker", "image": image, "store": store, "memory_mb": 128, "disk_mb": 128}
    out: dict[str, Any] = {}
    with Sandbox.create(**size) as box:  # which gives the engine its image
        out["exec_true"] = times_ms(lambda: box.exec(["true"]), 50)
        out["pack_ms"] = times_ms(box.pack_diff, 5)
    out["create"] = times_ms(lambda: Sandbox.create(**size).close(), 10)
    return out


def raw_restore(box: Sandbox, store: Store) -> float:
    """Milliseconds of QEMU alone, outside every wall, from its start to the end of its first command."""
    from pelagos.sandbox import vm as machines

    art = store.root / "vm"
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["cp", "--sparse=always", str(next(art.glob("*/disk"))), f"{place}/disk"], check=True)
        paths = {"kernel": machines.host_kernel(), "vm/disk": Path(place, "disk"), "vm/console": Path(place, "console"),
                 "state": next(art.glob("*/state")), "base": next(art.glob("base-*")),
                 "initrd": next(art.glob("initrd-*"))}  # fmt: skip
        (port, port_vm), (qmp, qmp_vm) = socket.socketpair(), socket.socketpair()
        made = machines.VirtualMachine(box.directory, store.layers, box.spec, None)
        ends = {"@PORT": f"{port_vm.fileno()}", "@QMP": f"{qmp_vm.fileno()}"}
        words = []
        for word in made._command(True):
            for name, path in paths.items():
                word = re.sub(rf"(^|[=: ])/{name}(?=$|,)", rf"\1{path}", word)
            words.append(functools.reduce(lambda text, end: text.replace(*end), ends.items(), word))
        began = time.perf_counter()
        process = subprocess.Popen(words, pass_fds=(port_vm.fileno(), qmp_vm.fileno()))
        for end in (port_vm, qmp_vm):
            end.close()
        try:
            say, mux = machines._monitor(qmp), machines.Mux(qmp, port)
            while say("query-status")["status"] == "inmigrate":
                time.sleep(0.002)
            say("cont")
            limits = {"processes": 64, "open_files": 256, "file_bytes": 1 << 20, "address_bytes": None}
            ask = {"argv": ["true"], "env": {"PATH": "/usr/bin"}, "cwd": "/", "limits": limits, "most": 100}
            mux.ask(ask, b"")
            return (time.perf_counter() - began) * 1e3
        finally:
            process.kill()
            process.wait()
            port.close()
            qmp.close()


def escape(_: Store, __: Image) -> dict[str, Any]:
    """Run the attempts to get out, as root and as an ordinary user, and count them."""
    sys.path.insert(0, "tests/sandbox")
    tests = importlib.import_module("test_abuse")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests.__file__)]
    done = subprocess.run(words, capture_output=True, text=True)
    return {
        "shell_attempts": len(tests.SHELL_ATTEMPTS), "python_attempts": len(tests.PYTHON_ATTEMPTS),
        "as": ["root", "an ordinary user"] if os.geteuid() == 0 else ["an ordinary user"],
        "succeeded": "none" if done.returncode == 0 else done.stdout[-2000:],
    }  # fmt: skip


def graded(store: Store, _: Image, count: int = 200, runs: int = 3) -> dict[str, Any]:
    """Do every task by its solution and not at all, and grade each so often: what came out, and whether it differed."""
    passed, failed, different, began = 0, 0, [], time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        tasks.write_all(Path(place, "all"), count=count)
        for task in tasks.load_all(Path(place, "all")):
            for touch in (True, False):
                with Sandbox.create(image=tasks.image_of(task, store), store=store, memory_mb=task.memory_mb) as box:
                    if touch:
                        box.exec(["sh", "-s"], stdin=(task.path / "solution/solve.sh").read_bytes())
                    diff = box.pack_diff()
                grades = [tasks.grade(task, diff, store) for _ in range(runs)]
                passed += touch and grades[0].passed
                failed += not touch and not grades[0].passed and grades[0].reward == 0.0
                if any(grade != grades[0] for grade in grades):
                    different.append({"task": task.name, "outputs": [grade.output[-200:] for grade in grades]})
    return {"tasks": count, "graded": runs, "solutions_pass": passed, "untouched_fail": failed, "different": different,
            "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip


def records(directory: Path) -> int:
    """Count the lines of a log."""
    return (directory / log.NAME).read_bytes().count(b"\n")


def resources(store: Store) -> dict[str, int]:
    """Count what sandboxes could leave behind, and the memory that is not available."""
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    groups = [g for g in Path("/sys/fs/cgroup").glob("*/pelagos/*") if g.is_dir()]
    dying = sum(
        int(line.split()[2]) for line in Path("/proc/cgroups").read_text().splitlines()[1:] if line.startswith("memory")
    )
    return {
        "mounts": Path("/proc/self/mountinfo").read_text().count("\n"),
        "groups": len(groups), "groups_with_dying": dying,
        "processes": sum(p.name.isdigit() for p in Path("/proc").iterdir()),  # of everybody on the host
        "processes_inside": sum(owner == SANDBOX_UID for owner in map(owner_of, Path("/proc").iterdir())),
        "loop_devices": sum(1 for _ in Path("/sys/block").glob("loop*/loop")),
        "boxes": sum(1 for _ in store.boxes.iterdir()),
        "memory": (int(memory["MemTotal"].split()[0]) - int(memory["MemAvailable"].split()[0])) * 1024,
    }  # fmt: skip


def what_is_left(store: Store, before: dict[str, int]) -> dict[str, Any]:
    """Say what there is beside what was, and how long after the last `close` nothing of any sandbox was."""
    began = time.perf_counter()
    while True:
        now = resources(store)
        left = {k: now[k] - before[k] for k in now if k != "memory"}
        gone = max(left["mounts"], left["processes_inside"], left["loop_devices"], left["boxes"]) <= 0
        after = round(time.perf_counter() - began, 3)
        if (gone and left["groups"] <= SPARE_GROUPS) or after > 30:
            return left | {"counted_after_s": after}
        time.sleep(0.01)


def owner_of(path: Path) -> int:
    """Return whose a file is, -1 where it is gone."""
    try:
        return path.stat().st_uid
    except OSError:
        return -1


def idle_share() -> float:
    """Return the share of all processors that is used over two seconds in which nobody asks anything."""

    def used() -> tuple[int, int]:
        numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(numbers) - numbers[3] - numbers[4], sum(numbers)

    before = used()
    time.sleep(2)
    after = used()
    return round((after[0] - before[0]) / max(1, after[1] - before[1]), 3)


def main() -> int:
    """Run the parts that are asked for and merge what they found into the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS)
    parser.add_argument("--alive", type=int, default=300)
    parser.add_argument("--row", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="how long `kill` goes on in this call")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/sandbox.json"))
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    root = Path(tempfile.mkdtemp(prefix="pelagos-bench-"))
    load = 0.0

    def keep(name: str, found: dict[str, Any]) -> None:
        words = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
        result[name] = found | {"commit": commit, "date": time.strftime("%Y-%m-%d", time.gmtime()), "load_before": load}
        result["host"] = f"{platform.release()}, {os.cpu_count()} processors, uid {os.geteuid()}"
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def killed() -> dict[str, Any]:
        state = result.get("kill", {})
        goes_on = state.get("seed") == args.seed and state.get("complete") is False
        return kill(store, image, args.kills, args.seed, state=state if goes_on else None, seconds=args.seconds,
                    keep=lambda found: keep("kill", found))  # fmt: skip

    try:
        store = Store(root / "pelagos" / "sandbox")
        image = Image.host(store)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "speed": lambda: speed(store, image), "alive": lambda: alive(store, image, args.alive),
            "row": lambda: row(store, image, args.row), "kill": killed, "fork": lambda: fork(store, image),
            "vm": lambda: vm(store, image), "docker": lambda: docker(store, image),
            "escape": lambda: escape(store, image), "tasks": lambda: graded(store, image),
        }  # fmt: skip
        for name in args.parts:
            load = round(os.getloadavg()[0], 1)
            try:
                keep(name, parts[name]())
            except PelagosError as error:
                keep(name, {"error": str(error)})
            print(json.dumps({name: result[name]}, indent=1))
    finally:
        remove_tree(root)
    return 1 if result.get("kill", {}).get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
