"""What killed launchers, forkers and keepers leave: nothing, once the next one has started and the store was collected.

Each test's client is a process that adopts what loses its parent, so that what it has for children at the end is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pelagos.sandbox import Store

PROGRAM = f"""
import contextlib, json, os, pathlib, random, signal, sys, threading, time
sys.path = {sys.path!r}
from pelagos.errors import SandboxError
from pelagos.sandbox import Sandbox, Store, linux, sdk
linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
store = Store(pathlib.Path(sys.argv[1]))

def parents():
    found = {{}}
    for place in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = place.read_text().rpartition(")")[2].split()
            if words[0] != "Z":
                found[int(place.parent.name)] = int(words[1])
    return found

def below(*pids):
    of, found = parents(), []
    while pids := [pid for pid in of if of[pid] in pids]:
        found += pids
    return found

def end():
    linux.close(sdk._nursery())
    for _ in range(6000):  # spares end, and the nursery
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not (left := below(os.getpid())):
            break
        time.sleep(0.01)
    return [pathlib.Path(f"/proc/{{pid}}/comm").read_text() for pid in left]
"""
ONE = """
said = []
with Sandbox.create(store=store) as box:
    store.collect()
    said.append(box.exec("echo up").text)
print(json.dumps(said + end()))
"""
PAUSED = """
box = Sandbox.create(store=store)
box.exec("sleep 900 >/dev/null 2>&1 &")
box.pause()
os.kill(box.info()["pid"], signal.SIGKILL)
said = box.exec("pgrep -c sleep").text
box.close()
print(json.dumps([said] + end()))
"""
MANY = """
r = random.Random(int(sys.argv[2]))
Sandbox.create(store=store).close()
keepers, made, refused = set(), [], 0
def make():
    global refused
    try:
        made.append(Sandbox.create(store=store, ttl_s=600))
        made[-1].exec("echo x >> trace")
    except SandboxError:  # whoever was asked was killed, and the one after it
        refused += 1
nursery = below(os.getpid())[0]
for n in range(40):
    maker = threading.Thread(target=make)
    maker.start()
    time.sleep(r.uniform(0, 0.05))
    of = parents()
    mine = sorted(pid for pid in of if of[pid] == nursery)
    keepers |= set(mine)
    for keeper in r.sample(mine, min(len(mine), r.choice((1, 1, 2)))):
        forkers = [pid for pid in of if of[pid] == keeper]
        for pid in forkers if r.random() < 0.3 else []:  # at once: one that is stopped does nothing before it is killed
            os.kill(pid, signal.SIGSTOP)
        for pid in (keeper, *(forkers if r.random() < 0.6 else [])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in forkers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    maker.join()
traces = []
for box in made:
    with contextlib.suppress(SandboxError):
        traces.append(box.exec("wc -l < trace; pgrep -c -f '^cat' ; true").text)
    box.close()
Sandbox.create(store=store).close()
left = end()
store.collect()  # now that nobody who was killed waits to be reaped, which looks like life
groups = [str(g) for g in pathlib.Path("/sys/fs/cgroup").glob("*/pelagos/*-*") if int(g.name.split("-")[0]) in keepers]
others = {p for p in store.root.glob("warm/*") if int(p.name) not in keepers}  # spares of who else uses the store
files = sorted(str(p.relative_to(store.root)) for p in store.root.glob("[!l]*/*") if p not in others)
print(json.dumps({"made": len(made), "refused": refused, "left": left, "groups": groups, "files": files}))
"""
# Bubblewrap with a full pipe for what it tells before its word to go on: its inner half waits, as long as that lasts.
HALTED = """#!/bin/bash
if [ -e {place}/pipe ]; then
    for ((n = 1, m = 2; n < $#; n++, m++)); do
        [ "${{!n}}" = --info-fd ] && eval "exec ${{!m}}> {place}/pipe"
    done
fi
exec {bwrap} "$@"
"""


def run(program: str, store: Store, *words: str, path: str = "") -> subprocess.Popen[str]:
    env = os.environ | {"PATH": f"{path}{os.environ['PATH']}"}
    asked = [sys.executable, "-c", PROGRAM + program, str(store.root), *words]
    return subprocess.Popen(asked, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(client: subprocess.Popen[str]) -> object:
    out, err = client.communicate(timeout=240)
    assert client.returncode == 0, err
    return json.loads(out)


def until(found: Callable[[], object], seconds: float = 120) -> object:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if seen := found():
            return seen
        time.sleep(0.01)
    raise AssertionError("it never came")


def chain_to_halted(client: int) -> list[int]:
    """The pids from the keeper down to a bubblewrap that was forked by another, below this client; [] until then."""
    of, name = {}, {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, words = place.read_text().rpartition(")")
            pid = int(place.parent.name)
            of[pid], name[pid] = int(words.split()[1]), head.partition("(")[2]
    for pid in of:
        if name[pid] == "bwrap" == name.get(of[pid]):
            chain = [pid]
            while chain[-1] in of and chain[-1] != client:
                chain.append(of[chain[-1]])
            if chain[-1] == client:
                return chain[-3::-1]  # without the client and its nursery
    return []


@pytest.fixture
def halted() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:  # where who runs bubblewrap may look
        place = Path(directory)
        place.chmod(0o755)
        found = subprocess.run(["which", "bwrap"], capture_output=True, text=True).stdout.strip()
        (place / "bwrap").write_text(HALTED.format(place=place, bwrap=found))
        (place / "bwrap").chmod(0o755)
        os.mkfifo(place / "pipe")
        (place / "pipe").chmod(0o666)
        pipe = os.open(place / "pipe", os.O_RDWR | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(pipe, bytes(4096))
        yield place
        os.close(pipe)


@pytest.mark.parametrize("victims", ["launcher", "keeper", "keeper and forker"])
def test_killed_between_fork_and_go_nothing_waits_for_ever(store: Store, halted: Path, victims: str) -> None:
    client = run(ONE, store, path=f"{halted}:")
    keeper, forker, launcher, inner = until(lambda: chain_to_halted(client.pid))  # type: ignore[misc]
    waits = os.pidfd_open(inner)
    (halted / "pipe").unlink()  # the next one is not halted
    groups = [each for each in Path("/sys/fs/cgroup").glob(f"*/pelagos/{keeper}-*") if each.is_dir()]
    if "forker" in victims:
        os.kill(forker, signal.SIGSTOP)  # so that both are killed at once
    for victim in victims.split(" and "):
        os.kill({"launcher": launcher, "keeper": keeper, "forker": forker}[victim], signal.SIGKILL)
    if "forker" in victims and not groups:
        os.kill(inner, signal.SIGKILL)  # without control groups nobody knows what a forker that was killed had begun
    assert answer(client) == ["up\n"], "another is asked, and nothing of the first is left"
    assert select.select([waits], [], [], 0)[0], "it waits for ever"
    assert not any(each.exists() for each in groups)
    os.close(waits)


def test_what_was_paused_when_its_keeper_was_killed_ends(store: Store) -> None:
    assert answer(run(PAUSED, store)) == ["0\n"]


def test_keepers_killed_anywhere_leave_nothing(store: Store) -> None:
    found = answer(run(MANY, store, "7"))
    assert isinstance(found, dict)
    assert found["made"] + found["refused"] >= 40
    assert found["made"] > 10
    assert (found["left"], found["groups"], found["files"]) == ([], [], [])
