"""Random faults while processes write the prefix cache on disk: nothing wrong may come back, nothing may be left over.

python -m benchmarks.disk_faults [--cases 200] [--seed 0] [--json FILE]

Each case starts real writer processes on a fresh directory and hurts them: `kill -9` at a random moment or at a
random system call, a flipped bit or a cut in a published file, a full disk (a small tmpfs where mounting is allowed,
an injected ENOSPC elsewhere), a failing rename or fsync, two writers of which one dies. Then a fresh cache must return
only pages and states equal to what their keys stand for, count each damaged file, hold its quota, leave no temporary
file, and write and read on. Finished cases are kept in FILE; a run that is broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pelagos.evals.commit import commit

if TYPE_CHECKING:
    from pelagos.engine.disk import DiskCache

ROOT = Path(__file__).resolve().parents[1]
PAGE_BYTES = 3001
USERS, CHAINS, PAGES = 3, 4, 24
QUOTA = 400_000  # under pressure: the pages alone are 860 KB
KINDS = (
    *("kill at a moment", "kill at a call", "kill at a call", "kill at a moment", "flip", "truncate"),
    *("full disk", "two writers", "rename fails", "fsync fails"),
)


def page_key(user: int, chain: int, index: int) -> bytes:
    """The key of a page; everything about a case's data follows from keys."""
    return hashlib.blake2b(f"page {user} {chain} {index}".encode(), digest_size=16).digest()


def state_key(user: int, chain: int, index: int) -> bytes:
    """The key of the state before page `index`."""
    return hashlib.blake2b(f"state {user} {chain} {index}".encode(), digest_size=16).digest()


def page_content(key: bytes) -> bytes:
    """What a page of this key must hold."""
    return hashlib.shake_128(key).digest(PAGE_BYTES)


def state_content(key: bytes) -> bytes:
    """What a state of this key must hold."""
    return hashlib.shake_128(key).digest(500 + 30 * key[0])


def open_cache(root: Path, quota: int) -> DiskCache:
    """Open the cache as the model of this benchmark."""
    from pelagos.engine.disk import DiskCache

    return DiskCache(root, fingerprint=b"disk faults", page_bytes=PAGE_BYTES, quota_bytes=quota)


# A writer: its own process.


def write(root: Path, seed: int, rounds: int, quota: int, fault: str, at: int) -> int:
    """Write, and read back, random chains; exit code 3 when anything read is wrong. Prints the final counters."""
    from pelagos.engine import disk

    disk._PAUSE_S = (0.01, 0.05)
    draw = random.Random(seed)
    if fault == "kill at a call":
        inject(fault, at, draw)
    cache = open_cache(root, quota)
    print("ready", flush=True)
    if fault != "kill at a call":  # opening may be killed, but where it fails there is no cache
        inject(fault, at, draw)
    reach: Counter[tuple[int, int]] = Counter()
    for _ in range(rounds):
        user, chain = draw.randrange(USERS), draw.randrange(CHAINS)
        first = reach[user, chain] % PAGES
        count = min(draw.randint(1, 6), PAGES - first)
        keys = [page_key(user, chain, i) for i in range(first, first + count)]
        cache.write_pages(f"user {user}", [(key, page_content(key)) for key in keys], first=first)
        reach[user, chain] += count
        if draw.random() < 0.4:
            key = state_key(user, chain, first + count)
            cache.write_state(f"user {user}", keys[-1], 0, key, 128 * (first + count), state_content(key))
        if draw.random() < 0.5:
            cache.flush(20)
        if draw.random() < 0.3 and not all_right(cache, draw.randrange(USERS), draw.randrange(CHAINS))[0]:
            return 3
    last = page_key(0, 0, PAGES)
    for _ in range(4):  # an injected fault lasts for three calls
        cache.flush(20)
        time.sleep(disk._PAUSE_S[1])
        cache.write_pages("user 0", [(last, page_content(last))], first=PAGES)
    cache.close(20)
    print(json.dumps(cache.stats()), flush=True)
    return 0


def inject(fault: str, at: int, draw: random.Random) -> None:
    """Make the `at`-th system call of a kind kill this process or fail."""
    calls = Counter()

    def wrap(name: str, hurt: Callable[..., None]) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls["all"] += 1
            calls[name] += 1
            hurt(real, name, args)
            return real(*args, **kwargs)

        setattr(os, name, call)

    def part_of(real: Callable[..., Any], args: Any) -> None:
        real(args[0], args[1][: draw.randrange(len(args[1]))])

    def kill(real: Callable[..., Any], name: str, args: Any) -> None:
        if calls["all"] == at:
            if name == "write":
                part_of(real, args)
            os.kill(os.getpid(), signal.SIGKILL)

    def fail(real: Callable[..., Any], name: str, args: Any) -> None:
        if at <= calls[name] < at + 3:
            if name == "write":
                part_of(real, args)
            raise OSError(errno.ENOSPC if name == "write" else errno.EIO, "injected")

    if fault == "kill at a call":
        for name in ("open", "write", "fsync", "close", "rename", "unlink", "mkdir", "utime"):
            wrap(name, kill)
    elif fault != "none":
        wrap({"full disk": "write", "rename fails": "rename", "fsync fails": "fsync"}[fault], fail)


# A case: the process that hurts and judges.


def all_right(cache: DiskCache, user: int, chain: int) -> tuple[bool, int]:
    """Read every page and state of a chain by itself; whether what came is right, and how many came."""
    name = f"user {user}"
    tickets = []
    for index in range(PAGES + 1):
        page, state = page_key(user, chain, index), state_key(user, chain, index)
        if cache.known_pages(f"user {(user + 1) % USERS}", [page]):
            return False, 0  # a hit across users
        tickets.append((page, state, cache.read(name, [page], state)))
    came = 0
    for page, state, ticket in tickets:
        if not ticket.wait(20):
            return False, came
        wrong = [each for each in ticket.pages if bytes(each) != page_content(page)]
        if wrong or (ticket.state is not None and bytes(ticket.state) != state_content(state)):
            return False, came
        came += len(ticket.pages) + (ticket.state is not None)
    return True, came


@contextlib.contextmanager
def writer(root: Path, seed: int, rounds: int, quota: int, fault: str = "none", at: int = 0) -> Iterator[Any]:
    """Start a writer process and make sure that it ends."""
    arguments = [str(root), seed, rounds, quota, fault, at]
    command = [sys.executable, "-m", "benchmarks.disk_faults", "--writer", *map(str, arguments)]
    paths = os.pathsep.join(map(str, (ROOT / "src", ROOT)))
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def finish(process: Any) -> dict[str, int]:
    """Wait for a writer that must end well, and return its counters."""
    out, _ = process.communicate(timeout=60)
    if process.returncode != 0:
        raise AssertionError(f"writer ended with {process.returncode}")
    return json.loads(out.splitlines()[-1])


def wait_ready(process: Any) -> None:
    """Wait until a writer has opened its cache; one that a fault killed before is as well."""
    process.stdout.readline()


def cache_files(root: Path) -> list[Path]:
    """The published files, oldest name first."""
    return sorted(path for path in root.glob("*/*") if path.suffix != ".tmp")


def hurt_file(root: Path, kind: str, draw: random.Random) -> Path | None:
    """Flip one bit of, or cut, a random published file (one time in twenty the secret)."""
    files = cache_files(root)
    if not files:
        return None
    path = root / "secret" if draw.random() < 0.05 else draw.choice(files)
    size = path.stat().st_size
    if kind == "truncate":
        os.truncate(path, draw.randrange(size))
    else:
        with open(path, "r+b") as file:
            offset = draw.randrange(size)
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))
    return path


def run_case(root: Path, kind: str, seed: int, tmpfs_kib: int) -> dict[str, Any]:
    """Run one case in an empty directory; AssertionError when anything is not as promised."""
    draw = random.Random(seed)
    detail: dict[str, Any] = {}
    damaged, expected = 0, 0
    quota = 1 << 30 if kind in ("flip", "truncate", "full disk") else QUOTA
    if kind == "kill at a moment":
        with writer(root, seed, 10_000, quota) as process:
            wait_ready(process)
            time.sleep(draw.random() * 0.5)
            process.kill()
    elif kind == "kill at a call":
        detail["call"] = draw.randint(1, 400)
        with writer(root, seed, 300, quota, kind, detail["call"]) as process:
            process.communicate(timeout=60)
            detail["killed"] = process.returncode == -signal.SIGKILL
            assert process.returncode in (0, -signal.SIGKILL), f"writer ended with {process.returncode}"
    elif kind in ("flip", "truncate"):
        with writer(root, seed, 30, quota) as process:
            wait_ready(process)
            time.sleep(draw.random() * 0.3)
            path = hurt_file(root, kind, draw) if draw.random() < 0.5 else None
            damaged += finish(process)["damaged"]
        path = path or hurt_file(root, kind, draw)
        assert path is not None
        expected = len(cache_files(root)) if path.name == "secret" else 1
        detail["file"] = "secret" if path.name == "secret" else path.suffix[1:]
    elif kind == "two writers":
        with writer(root, seed, 10_000, quota) as doomed, writer(root, seed + 1, 60, quota) as other:
            wait_ready(doomed)
            time.sleep(draw.random() * 0.4)
            doomed.kill()
            damaged += finish(other)["damaged"]
    else:
        with writer(root, seed, 40, quota, "none" if tmpfs_kib else kind, draw.randint(1, 30)) as process:
            stats = finish(process)
            detail["errors"] = stats["errors"]
            damaged += stats["damaged"]
            assert stats["errors"] > 0, "the fault did not happen"
            assert stats["written"] > 0, "it never wrote on"
    judge(root, tmpfs_kib * 512 or quota, seed, damaged, expected, detail)
    return detail


def judge(root: Path, quota: int, seed: int, damaged: int, expected: int, detail: dict[str, Any]) -> None:
    """What must hold after any fault."""
    cache = open_cache(root, quota)
    results = [all_right(cache, user, chain) for user in range(USERS) for chain in range(CHAINS)]
    stats = cache.stats()
    detail |= {"came_back": sum(came for _, came in results), "damaged": damaged + stats["damaged"]}
    assert all(right for right, _ in results), "something wrong was returned"
    assert detail["damaged"] == expected, f"{detail['damaged']} damaged files counted, expected {expected}"
    for index in range(4):  # it serves and writes on
        key = page_key(0, 1000 + seed, index)
        cache.write_pages("user 0", [(key, page_content(key))], first=index)
    assert cache.close(20), "it did not come to an end"
    assert cache.stats()["errors"] == 0, f"errors after the fault: {cache.stats()}"
    again = open_cache(root, quota)
    ticket = again.read("user 0", [page_key(0, 1000 + seed, index) for index in range(4)])
    assert ticket.wait(20)
    assert [bytes(page) for page in ticket.pages] == [page_content(page_key(0, 1000 + seed, i)) for i in range(4)]
    again.close(20)
    assert again.stats()["damaged"] == 0, "a damaged file was left"
    assert not list(root.glob("**/*.tmp")), "a temporary file was left"
    assert sum(path.stat().st_size for path in cache_files(root)) <= quota, "over its quota"


@contextlib.contextmanager
def case_directory(kind: str, seed: int) -> Iterator[tuple[Path, int]]:
    """A place for a cache, and the KiB of the tmpfs made for most full disks where this process may mount one, or 0."""
    with tempfile.TemporaryDirectory() as made:
        mounted, size = False, 0
        if kind == "full disk" and seed % 4 and os.geteuid() == 0 and shutil.which("mount"):
            size = random.Random(seed).randrange(80, 200)
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", made]
            mounted = subprocess.run(command, capture_output=True).returncode == 0
        try:
            yield Path(made) / "cache", size if mounted else 0
        finally:
            if mounted:
                subprocess.run(["umount", made], check=True)


def run(kind: str, seed: int) -> dict[str, Any]:
    """Run one case and return its record; `ok` says how it went."""
    record: dict[str, Any] = {"kind": kind, "seed": seed}
    started = time.perf_counter()
    with case_directory(kind, seed) as (root, tmpfs_kib):
        record |= {"tmpfs_kib": tmpfs_kib} if tmpfs_kib else {}
        try:
            record |= run_case(root, kind, seed, tmpfs_kib)
            record["ok"] = True
        except Exception as error:  # whatever is raised, the case failed
            record |= {"ok": False, "error": str(error) if isinstance(error, AssertionError) else repr(error)}
    return record | {"seconds": round(time.perf_counter() - started, 2)}


def main() -> int:
    """Run the cases that FILE does not have yet and write the summary."""
    engine = types.ModuleType("pelagos.engine")  # stands in for a front door that loads torch
    engine.__path__ = [str(ROOT / "src" / "pelagos" / "engine")]
    sys.modules["pelagos.engine"] = engine
    if sys.argv[1:2] == ["--writer"]:
        root, seed, rounds, quota, fault, at = sys.argv[2:]
        return write(Path(root), int(seed), int(rounds), int(quota), fault, int(at))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk_faults", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="keep finished cases and the summary here")
    args = parser.parse_args()
    cases: dict[int, dict[str, Any]] = {}
    if args.json and args.json.exists():
        cases = {each["seed"]: each for each in json.loads(args.json.read_text(encoding="utf-8"))["cases"]}
    result: dict[str, Any] = {}
    for index in range(args.cases):
        seed = args.seed + index
        if seed not in cases:
            cases[seed] = run(KINDS[index % len(KINDS)], seed)
            print(json.dumps(cases[seed]), file=sys.stderr)
        result = {
            "bench": "disk_faults",
            "commit": commit(),
            "command": f"python -m benchmarks.disk_faults --cases {args.cases} --seed {args.seed}",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "done": len(cases),
            "failed": sum(not each["ok"] for each in cases.values()),
            "kinds": dict(Counter(each["kind"] for each in cases.values())),
            "records_back": sum(each.get("came_back", 0) for each in cases.values()),
            "damaged_counted": sum(each.get("damaged", 0) for each in cases.values()),
            "cases": list(cases.values()),
        }
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "cases"}, indent=1))
    return 1 if result.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
