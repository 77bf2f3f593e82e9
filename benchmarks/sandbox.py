"""What sandboxes cost and what they survive, beside the raw tools in the same run.

python -m benchmarks.sandbox [speed alive row kill fork vm] [--alive 300] [--row 2000] [--kills 500] [--json FILE]

`speed`: creation beside `bwrap ... true`, a command, a call. `alive`: so many containers at once, each running
`sleep`, and the memory they take. `row`: so many created, used and closed one after another, and what is left of them
(mounts, control groups, processes, files). `kill`: a script of 50 commands that must not run twice, while the client or
the keeper is killed at random record boundaries. `fork`: snapshot, eight forks that diverge, packed and compared byte
by byte. `vm`: boot, restore and commands of a micro-VM. Parts that ran are merged into FILE.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pelagos.errors import PelagosError
from pelagos.sandbox import AsyncSandbox, Image, Sandbox, Store, log
from pelagos.sandbox.layers import remove_tree

RAW = "bwrap --unshare-all --ro-bind / / --proc /proc --dev /dev --die-with-parent -- "
COMMANDS = 50
SPARE_GROUPS = 12  # of keepers kept ready, in four hierarchies: they move while one counts
# The client of `kill`: it asks the same requests whenever it is started, and looks before it decides what is unknown.
CLIENT = """
import secrets, sys
from pathlib import Path
from pelagos.errors import SandboxError, UnknownOutcome
from pelagos.sandbox import Sandbox, Store
box = Sandbox.open(sys.argv[2], replay=True, store=Store(Path(sys.argv[1])))
for n in range(int(sys.argv[3])):
    words = f"echo {n} >> trace; echo $(($(cat count || echo 0) + 1)) > count.new; mv count.new count"
    while True:
        try:
            box.exec(words, request_id=f"r{n}")
        except UnknownOutcome:
            seen = box.exec("tail -1 trace; cat count", request_id=secrets.token_hex(8)).text.split()
            lines = box.exec("wc -l < trace", request_id=secrets.token_hex(8)).text.strip() or "0"
            if seen[:1] == [str(n)] and seen[1:] != [lines]:
                # It was killed between its two effects: finish it by hand, once, as a person would.
                box.exec(f"echo {lines} > count.new; mv count.new count", request_id=secrets.token_hex(8))
            box.resolve(f"r{n}", "abandon" if seen[:1] == [str(n)] else "rerun")
            continue
        except SandboxError as error:
            if "abandoned" not in str(error):
                raise
        break
"""


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
    out: dict[str, Any] = {}
    for name, substrate, words in (("container", "container", raw["true"]), ("function", "function", raw["python"])):
        ours, theirs = [], []
        for _ in range(rounds if name == "container" else rounds // 3):
            theirs.append(
                times_ms(lambda words=words: subprocess.run(words, check=True, capture_output=True), 1)["p50"]
            )
            began = time.perf_counter()
            box = Sandbox.create(substrate=substrate, image=image, store=store, ttl_s=60)
            ours.append((time.perf_counter() - began) * 1e3)
            box.close()
        for key, taken in ((f"create_{name}", sorted(ours)), (f"raw_{name}", sorted(theirs))):
            out[key] = {"p50": round(statistics.median(taken), 2), "p99": round(taken[int(len(taken) * 0.99)], 2),
                        "min": round(taken[0], 2), "rounds": len(taken)}  # fmt: skip
        out[f"overhead_{name}_p50"] = round(out[f"create_{name}"]["p50"] - out[f"raw_{name}"]["p50"], 2)
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
        await asyncio.gather(*(box.close() for box in boxes))
        await asyncio.sleep(1)
        after = resources(store)
        return {
            "count": count, "runs": "sh, sleep 900", "all_answered": all(a.text == "1\n" for a in answers),
            "created_per_second": round(count / took, 1), "a_command_in_each_s": round(swept, 2),
            "memory_mb_each": round((during["memory"] - before["memory"]) / 1e6 / count, 2),
            "processes_each": round((during["processes"] - before["processes"]) / count, 2),
            "cpu_share_idle": idle, "growth": marks, "left": {k: after[k] - before[k] for k in after if k != "memory"},
        }  # fmt: skip

    return asyncio.run(go())


def row(store: Store, image: Image, count: int) -> dict[str, Any]:
    """Many containers one after another, and what is left of them."""
    Sandbox.create(image=image, store=store).close()
    before, taken, marks = resources(store), [], []
    began = time.perf_counter()
    for number in range(count):
        start = time.perf_counter()
        box = Sandbox.create(image=image, store=store)
        taken.append((time.perf_counter() - start) * 1e3)
        if box.exec("echo $((6*7))").text != "42\n":
            raise AssertionError("wrong answer")
        box.close()
        if (number + 1) % max(1, count // 4) == 0:
            part = sorted(taken[-max(1, count // 4) :])
            marks.append({"made": number + 1, "create_p50_ms": round(statistics.median(part), 2)})
    took = time.perf_counter() - began
    time.sleep(2)
    after = resources(store)
    return {
        "count": count, "per_second": round(count / took, 1), "create_p50_ms": round(statistics.median(taken), 2),
        "create_p99_ms": round(sorted(taken)[int(count * 0.99)], 2), "growth": marks,
        "left": {k: after[k] - before[k] for k in after if k != "memory"},
    }  # fmt: skip


def kill(store: Store, image: Image, kills: int, seed: int, commands: int = COMMANDS) -> dict[str, Any]:
    """Run the script while its client or keeper is killed; every run must end as if nothing happened."""
    r = random.Random(seed)
    done = {"client": 0, "keeper": 0}
    runs, wrong, unknown = 0, [], 0
    while sum(done.values()) < kills:
        box = Sandbox.create(image=image, store=store, ttl_s=300)
        words = [sys.executable, "-c", CLIENT, str(store.root), box.id, str(commands)]
        env = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath, "HOME": str(store.root)}
        for _ in range(min(8, kills - sum(done.values()))):
            client = subprocess.Popen(words, env=env, stderr=subprocess.PIPE)
            keeper = box.info()["pid"]
            target = records(box.directory) + r.randint(1, 14)
            while client.poll() is None and records(box.directory) < target:
                time.sleep(0.0005)
            time.sleep(r.uniform(0, 0.006))
            victim = r.choice(("client", "keeper"))
            if client.poll() is None:
                done[victim] += 1
                os.kill(client.pid if victim == "client" else keeper, signal.SIGKILL)
                if victim == "keeper":
                    time.sleep(r.uniform(0, 0.1))
                    client.kill()
            client.communicate()
        last = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
        trace = box.files.read("trace", request_id="look-trace").decode().split()
        count = box.files.read("count", request_id="look-count").decode().strip()
        unknown += sum(r["kind"] == "event" and r["event"] == "resolve" for r in log.read_records(box.directory))
        log.verify(box.directory)
        if last.returncode or trace != [str(n) for n in range(commands)] or count != str(commands):
            wrong.append({"run": runs, "trace": len(trace), "count": count, "error": last.stderr[-500:]})
        runs += 1
        box.close()
    return {
        "kill_points": done,
        "runs": runs,
        "commands": commands,
        "wrong": wrong,
        "rerun_after_looking": unknown,
        "seed": seed,
    }


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
    """A micro-VM's first boot, its restores and its commands."""
    size: dict[str, Any] = {"substrate": "microvm", "memory_mb": 128, "disk_mb": 128, "image": image, "store": store}
    began = time.perf_counter()
    with Sandbox.create(**size) as box:
        out: dict[str, Any] = {"first_boot_s": round(time.perf_counter() - began, 2), "kernel": box.capabilities.kernel}
        state = next((store.root / "vm").glob("*/state"))
        out["state_mb"] = round(state.stat().st_blocks / 2048, 1)
    taken = []
    for _ in range(8):
        began = time.perf_counter()
        with Sandbox.create(**size) as box:
            box.exec(["true"])
            taken.append((time.perf_counter() - began) * 1e3)
            out["exec_true"] = times_ms(lambda box=box: box.exec(["true"]), 10)
    out["restore_to_first_command_ms"] = {"p50": round(statistics.median(taken), 1), "min": round(min(taken), 1)}
    return out


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
        "processes": sum(p.name.isdigit() for p in Path("/proc").iterdir()),
        "boxes": sum(1 for _ in store.boxes.iterdir()),
        "memory": (int(memory["MemTotal"].split()[0]) - int(memory["MemAvailable"].split()[0])) * 1024,
    }  # fmt: skip


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
    parser.add_argument("parts", nargs="*", default=["speed", "alive", "row", "kill", "fork", "vm"])
    parser.add_argument("--alive", type=int, default=300)
    parser.add_argument("--row", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/sandbox.json"))
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    root = Path(tempfile.mkdtemp(prefix="pelagos-bench-"))
    try:
        store = Store(root)
        image = Image.host(store)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "speed": lambda: speed(store, image), "alive": lambda: alive(store, image, args.alive),
            "row": lambda: row(store, image, args.row), "kill": lambda: kill(store, image, args.kills, args.seed),
            "fork": lambda: fork(store, image), "vm": lambda: vm(store, image),
        }  # fmt: skip
        for name in args.parts:
            load = round(os.getloadavg()[0], 1)
            try:
                found = parts[name]()
            except PelagosError as error:
                found = {"error": str(error)}
            commit = subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip()
            result[name] = found | {
                "commit": commit,
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "load_before": load,
            }
            result["host"] = f"{platform.release()}, {os.cpu_count()} processors, uid {os.geteuid()}"
            print(json.dumps({name: result[name]}, indent=1))
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    finally:
        remove_tree(root)
    return 1 if result.get("kill", {}).get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
