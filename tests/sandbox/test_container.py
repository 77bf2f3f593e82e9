"""Containers as a client sees them: commands, streams, files, snapshots, pauses, and what survives whose death."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pelagos.errors import SandboxError, TrajectoryError, UnknownOutcome
from pelagos.sandbox import AsyncSandbox, Image, Sandbox, Store, replay
from pelagos.sandbox import log as logs


def test_exec_gives_streams_code_and_time(box: Sandbox) -> None:
    done = box.exec("cat; echo oops >&2; exit 3", stdin=b"in\0put")
    assert (done.exit_code, done.stdout, done.stderr, done.truncated, done.timed_out) == (
        3, b"in\0put", b"oops\n", False, False,
    )  # fmt: skip
    assert 0 < done.wall_ms < 20_000
    assert box.exec(["printf", "%s|", "a b", "$HOME"]).text == "a b|$HOME|"
    assert box.exec("echo $HOME $X; pwd; id -un", env={"X": "y"}, cwd="/tmp").text == "/home/agent y\n/tmp\nagent\n"
    assert box.exec("kill -9 $$").exit_code == -signal.SIGKILL


@pytest.mark.parametrize(
    ("argv", "options", "word"),
    [
        (["no-such-program"], {}, "No such file"),
        (["true"], {"cwd": "/nowhere"}, "No such file"),
        (["/etc"], {}, "denied"),
    ],
)
def test_what_cannot_run_says_why(box: Sandbox, argv: list[str], options: dict[str, Any], word: str) -> None:
    done = box.exec(argv, **options)
    assert done.exit_code == 127
    assert word in done.stderr.decode()


def test_streams_arrive_while_the_command_runs(store: Store) -> None:
    async def go() -> None:
        async with await AsyncSandbox.create(store=store, ttl_s=120) as box:
            pieces, heard = bytearray(), asyncio.Event()

            def hear(data: bytes) -> None:
                pieces.extend(data)
                heard.set()

            waits = "echo one; until [ -e go ]; do sleep 0.01; done; echo two"
            running = asyncio.ensure_future(box.exec(waits, timeout=60, on_stdout=hear))
            await heard.wait()
            assert (pieces, running.done()) == (b"one\n", False)
            await box.exec("touch go")
            done = await running
            assert (done.stdout, done.timed_out) == (b"one\ntwo\n", False)
            assert pieces == done.stdout

    asyncio.run(go())


def test_timeout_kills_the_session_and_not_the_sandbox(box: Sandbox) -> None:
    done = box.exec("echo begun; sleep 30 & sleep 30", timeout=2)
    assert (done.exit_code, done.timed_out, done.stdout) == (-signal.SIGKILL, True, b"begun\n")
    assert box.exec("ps ax | grep -c '[s]leep 30'").text == "0\n"


def test_background_children_do_not_hang_exec_and_live_on(make: Any) -> None:
    box = make()
    began = time.monotonic()
    assert box.exec("sleep 60 & echo started").stdout == b"started\n"
    assert time.monotonic() - began < 30
    assert box.exec("pgrep -c sleep").text == "1\n"


def test_first_process_stays_and_leaves_no_zombies(make: Any) -> None:
    box = make()
    box.exec("for i in 1 2 3 4 5; do (sleep 0.01 &) ; done; for i in 1 2 3; do sleep 60 & done")
    assert box.exec(["pkill", "sleep"]).exit_code == 0
    assert box.exec("kill -9 1; kill -9 -1").exit_code == 1  # nobody left to kill: not the first, not the caller
    assert box.exec("while ps ax -o stat= | grep -q Z; do sleep 0.02; done", timeout=60).exit_code == 0
    assert box.info()["usage"].get("processes", 3) == 3
    assert [r for r in logs.read_records(box.directory) if r["kind"] == "event"] == [], "it was started again"


def test_commands_are_killed_for_memory_before_the_first_process(box: Sandbox) -> None:
    command, first = box.exec("cat /proc/self/oom_score_adj /proc/1/oom_score_adj").text.split()
    assert (command, first) == ("1000", "900")


def test_the_waiting_face_refuses_a_running_event_loop(box: Sandbox, store: Store) -> None:
    async def inside_a_loop() -> str:
        for work in (lambda: box.exec("true"), lambda: Sandbox.create(store=store)):
            with pytest.raises(RuntimeError, match="AsyncSandbox"):
                work()
        return (await box.wrapped.exec("echo both")).text

    assert asyncio.run(inside_a_loop()) == "both\n"
    assert box.exec("echo faces").text == "faces\n"


def test_files(box: Sandbox) -> None:
    data = bytes(range(256)) * 5000
    box.files.write("deep/er/data.bin", data, mode=0o640)
    assert box.files.read("/workspace/deep/er/data.bin") == data
    (entry,) = box.files.list("deep/er")
    assert (entry.name, entry.kind, entry.size, entry.mode) == ("data.bin", "file", len(data), 0o640)
    assert box.exec("stat -c %U:%a deep/er/data.bin; rm -r deep").text == "agent:640\n"
    box.exec("mkfifo pipe; ln -s /etc/passwd link; mkdir d")
    assert {e.name: e.kind for e in box.files.list()} == {"pipe": "other", "link": "link", "d": "directory"}
    assert box.files.read("link").startswith(b"root:x:0:0:")
    for path, word in (
        ("pipe", "regular"),
        ("d", "regular"),
        ("none", "No such file"),
        ("/proc/1/mem", "error|denied"),
    ):
        with pytest.raises(SandboxError, match=word):
            box.files.read(path)
    with pytest.raises(SandboxError, match=r"regular|No such device"):
        box.files.write("pipe", b"x")
    with pytest.raises(SandboxError, match="Read-only"):
        box.files.write("/usr/bin/evil", b"x")
    box.exec("rm -r pipe link d")


def test_output_is_capped_and_flagged(make: Any) -> None:
    box = make(output_bytes=1000)
    done = box.exec("yes | head -c 300000; echo end >&2")
    assert (len(done.stdout), done.truncated, done.stderr, done.exit_code) == (1000, True, b"end\n", 0)
    assert box.exec("yes | head -c 1000").truncated is False


def test_same_request_runs_once_and_another_diverges(make: Any) -> None:
    box = make()
    for replayed in (False, True, True):
        done = box.exec("echo x >> count; wc -l < count", request_id="bump")
        assert (done.text, done.replayed) == ("1\n", replayed)
    with pytest.raises(TrajectoryError, match="diverges"):
        box.exec("echo other", request_id="bump")
    with pytest.raises(SandboxError, match="No such file"):
        box.files.read("none", request_id="look")
    box.files.write("none", b"now there")
    with pytest.raises(SandboxError, match="No such file"):
        box.files.read("none", request_id="look")


def test_same_request_at_the_same_time_runs_once(store: Store) -> None:
    async def go() -> list[bytes]:
        async with await AsyncSandbox.create(store=store, ttl_s=60) as box:
            asks = [box.exec("sleep 0.2; echo x >> count; wc -l < count", request_id="bump") for _ in range(4)]
            return [done.stdout for done in await asyncio.gather(*asks)]

    assert asyncio.run(go()) == [b"1\n"] * 4


SCRIPT = """
import sys
import threading
from pathlib import Path
from pelagos.sandbox import Sandbox, Store
box = Sandbox.open(sys.argv[2], replay=True, store=Store(Path(sys.argv[1])))
for n in range(8):
    box.exec(f"sleep 0.05; echo {n} >> trace")
    print(n, flush=True)
"""


def test_client_killed_anywhere_and_started_again_runs_nothing_twice(make: Any, store: Store) -> None:
    box = make()
    for after in (0.25, 0.32, 0.38, 120.0):
        client = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(store.root), box.id], stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(logs.__file__).parents[2])},
        )  # fmt: skip
        try:
            client.wait(timeout=after)
        except subprocess.TimeoutExpired:
            client.kill()
        client.communicate()
    assert client.returncode == 0
    assert box.files.read("trace", request_id="look") == b"".join(b"%d\n" % n for n in range(8))
    assert logs.verify(box.directory)[0] > 16


def test_keeper_killed_keeps_files_and_leaves_unknown(make: Any) -> None:
    box = make()
    box.exec("echo kept > file; sync")

    async def go() -> None:
        running = asyncio.ensure_future(box.wrapped.exec("echo y >> twice; sleep 20", request_id="long"))
        while not box.directory.joinpath("upper/workspace/twice").exists():
            await asyncio.sleep(0.01)
        os.kill((await box.wrapped.info())["pid"], signal.SIGKILL)
        with pytest.raises(UnknownOutcome, match="may have run"):
            await running

    asyncio.run(go())
    assert box.info()["unknown"] == ["long"]
    assert box.exec("cat file; wc -l < twice; pgrep -c sleep").text == "kept\n1\n0\n"
    box.resolve("long", "abandon")
    with pytest.raises(SandboxError, match="abandoned"):
        box.exec("echo y >> twice; sleep 20", request_id="long")
    assert [r["event"] for r in logs.read_records(box.directory) if r["kind"] == "event"] == ["start"]


def test_idle_sandbox_ends_and_comes_back(make: Any) -> None:
    box = make(ttl_s=0.3)
    box.exec("echo here > file")
    pid = box.info()["pid"]
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    assert box.exec("cat file").text == "here\n"
    assert box.info()["pid"] != pid


def test_pause_stops_and_any_request_resumes(make: Any) -> None:
    box = make()
    ticking = "(while :; do echo x >> ticks; sleep 0.02; done) >/dev/null 2>&1 &"
    box.exec(f"{ticking} until [ -s ticks ]; do sleep 0.01; done")
    box.pause()
    first = box.directory.joinpath("upper/workspace/ticks").stat().st_size
    time.sleep(0.3)
    assert box.directory.joinpath("upper/workspace/ticks").stat().st_size == first
    box.resume()
    box.pause()
    assert box.exec(f"until [ $(stat -c %s ticks) -gt {first} ]; do sleep 0.01; done", timeout=60).exit_code == 0


def test_snapshot_fork_diverge_pack_and_restore(make: Any, store: Store, tmp_path: Path) -> None:
    source = tmp_path / "project"
    (source / "sub").mkdir(parents=True)
    (source / "gone.txt").write_text("x")
    (source / "sub" / "old").write_text("x")
    (source / "keep.py").write_text("print(1)\n")
    image = Image.host(store).with_directory(source, at="/workspace", store=store)
    box = make(image=image)
    box.exec(
        "rm gone.txt; rm -r sub; mkdir sub; echo new > sub/new; ln keep.py hard; ln -s keep.py soft; chmod 000 sub/new"
    )
    first, second = box.fork(2)
    first.exec("echo first > who; chmod 600 sub/new")
    second.exec("echo second > who")
    listing = "find . -printf '%P %y %m %s %n %l %T@\\n' | sort; cat keep.py who 2>/dev/null"
    diff = tmp_path / "diff.tar"
    diff.write_bytes(first.pack_diff())
    restored = make(image=Image(first.spec.base, first.spec.layers).with_tar(diff, store=store))
    want, got = first.exec(listing).text, restored.exec(listing).text
    assert want.splitlines()[-1] == "first"
    assert [line.rsplit(" ", 1)[0] if line.startswith(" d") else line for line in got.splitlines()] == [
        line.rsplit(" ", 1)[0] if line.startswith(" d") else line for line in want.splitlines()
    ]
    assert "gone" not in got
    assert "sub/old" not in got
    assert second.exec("cat who").text == "second\n"
    assert box.exec("ls").text == "hard\nkeep.py\nsoft\nsub\n"
    assert restored.snapshot().layers == (*restored.spec.layers, restored.snapshot().layers[-1])
    for fork in (first, second):
        fork.close()


def test_replay_of_a_log_tells_what_differs(make: Any, store: Store) -> None:
    box = make()
    box.files.write("a", b"\xff\x00data")
    box.exec("md5sum a; echo $((6 * 7))")
    box.exec("cat /proc/sys/kernel/random/uuid", request_id="random")
    (different,) = asyncio.run(replay(box.directory, store=store))
    assert different["request"] == "random"
    assert different["recorded"]["blobs"] != different["now"]["blobs"]


def test_replay_has_the_network_and_the_flags_of_what_it_replays(make: Any, store: Store) -> None:
    box = make(network=["one.example"], require={"network": "proxy"})
    box.exec("echo $http_proxy")
    assert asyncio.run(replay(box.directory, store=store)) == []


def test_create_refuses_what_it_cannot_do(store: Store, make: Any) -> None:
    before = sorted(store.boxes.iterdir())
    for options, word in (
        ({"substrate": "nothing"}, "expected one of"), ({"network": "full"}, "expected 'none'"),
        ({"network": ["a b"]}, "expected"),
        ({"network": ["a.example"], "substrate": "function"}, "only containers"),
        ({"memory_mb": 0}, "number > 0"), ({"cpu": float("inf")}, "number > 0"), ({"processes": 1.5}, "whole number"),
        ({"require": {"pause": "checkpoint"}}, "require pause='checkpoint'"),
        ({"image": Image("none", ())}, "at least one layer"),
        ({"id": "../x"}, "sandbox id"), ({"ttl_s": "x"}, "ttl_s"), ({"ttl_s": float("nan")}, "ttl_s"),
        ({"id": 5}, "sandbox id 5"), ({"substrate": 3}, "substrate=3: expected str"), ({"require": 5}, "require=5"),
        ({"image": "debian"}, "image='debian': expected"), ({"network": 5}, "expected 'none'"),
        ({"network": [5]}, "expected 'none'"), ({"network": ["a.example:99999"]}, "expected 'none'"),
        ({"network": ["a.example:0"]}, "expected 'none'"), ({"disk_mb": 1e300}, "number > 0, < 1e"),
        ({"image": Image("host", ("../boxes",))}, "is not in"),
        ({"image": Image("host", ("0" * 64,))}, "is not in"),
    ):  # fmt: skip
        with pytest.raises(SandboxError, match=word):
            Sandbox.create(store=store, **options)
    assert sorted(store.boxes.iterdir()) == before, "what is refused leaves nothing"
    with pytest.raises(SandboxError, match="expected a tar"):
        Image.host(store).with_tar("/nowhere", store=store)
    box = make(id="taken")
    with pytest.raises(SandboxError, match="exists"):
        make(id="taken")
    with pytest.raises(SandboxError, match="is 'other' a sandbox"):
        Sandbox.open("other", store=store)
    box.close(keep=False)
    with asyncio.Runner() as runner, pytest.raises(SandboxError, match="closed"):
        runner.run(box.wrapped.exec("true"))


@pytest.mark.parametrize("substrate", ["container", "function"])
def test_too_little_memory_is_said_at_once(make: Any, substrate: str) -> None:
    if make().capabilities.memory_limit != "cgroup":
        pytest.skip("needs control groups")
    with pytest.raises(SandboxError, match="memory_mb=1"):
        make(memory_mb=1, substrate=substrate)


def test_a_timeout_that_no_clock_has_is_refused_and_a_long_one_is_not(make: Any) -> None:
    box = make()
    keeper = box.info()["pid"]
    for timeout in (float("nan"), float("inf"), -1, "x", 10**400):
        with pytest.raises(SandboxError, match=r"exec: timeout=.*: expected seconds"):
            box.exec("echo no >> ran", timeout=timeout)
    # The keeper looks at the disk meanwhile and so has no other timer: poll(2) itself would take no more than 24 days.
    assert box.exec("sleep 1; cat ran", timeout=1e9).exit_code == 1
    assert box.exec("sleep 60", timeout=0.2).timed_out
    assert box.info()["pid"] == keeper


def test_who_waits_while_another_closes_starts_nothing_again(store: Store) -> None:
    for _ in range(6):
        box, said = Sandbox.create(store=store, ttl_s=120), []

        def wait(box: Sandbox = box, said: list[str] = said) -> None:
            try:
                Sandbox.open(box.id, store=store).exec("touch began; sleep 60")
            except SandboxError as error:
                said.append(str(error))

        waits = threading.Thread(target=wait)
        waits.start()
        while b"began" not in bytes(box.pack_diff()):
            time.sleep(0.01)
        box.close()
        waits.join(60)
        assert "closed" in said[0]
        assert not box.directory.exists()


def test_a_killed_forker_is_made_again_for_the_very_next_request(make: Any) -> None:
    box = make()
    for turn in range(5):
        keeper = box.info()["pid"]
        for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split():
            ended = os.pidfd_open(int(pid))
            os.kill(int(pid), signal.SIGKILL)
            assert select.select([ended], [], [], 60)[0]
            os.close(ended)
        assert box.exec(f"echo {turn}").text == f"{turn}\n"


def test_a_request_that_nobody_expected_is_answered_and_noted(make: Any) -> None:
    box = make()
    with pytest.raises(SandboxError, match=r"nobody expected \(TypeError.*keeper.err"):
        asyncio.run(box.wrapped._ask("nonsense", {"x": {}}, None, ["no", "name"]))
    assert "Traceback" in (box.directory / "keeper.err").read_text()
    assert box.exec("echo on").text == "on\n"


def test_limits_beyond_the_default_are_set(make: Any) -> None:
    box = make(memory_mb=1500, cpu=2)
    assert box.exec(["python3", "-c", "x = b'x' * (700 << 20); print(len(x))"]).text == f"{700 << 20}\n"


def test_close_leaves_no_process_mount_or_group(store: Store) -> None:
    box = Sandbox.create(store=store)
    box.exec("sleep 60 >/dev/null 2>&1 &")
    pid, name = box.info()["pid"], box.id
    box.close()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()
    assert str(store.root) not in Path("/proc/self/mountinfo").read_text()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/pelagos/{name}"))
    assert not box.directory.exists()


def test_a_full_disk_is_told_and_survived(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a small file system of its own needs root to mount it")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "x", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this host lets nobody mount a tmpfs")
    try:
        small = Store(tmp_path)
        box = Sandbox.create(store=small, ttl_s=60)
        assert box.exec("head -c 30000000 /dev/zero > fill").exit_code != 0
        with pytest.raises(TrajectoryError, match="cannot append"):  # noqa: PT012  which of them fails is chance
            for n in range(40):
                box.exec(f"echo {n} >> trace", request_id=f"q{n}")
        box.directory.joinpath("upper/workspace/fill").unlink()
        time.sleep(0.3)
        assert box.exec("echo again", request_id="after").text == "again\n"
        assert logs.verify(box.directory)[0] > 4
        ballast = tmp_path / "ballast"
        with contextlib.suppress(OSError):
            ballast.write_bytes(bytes(12 << 20))
        with pytest.raises(SandboxError, match="disk full"):
            Sandbox.create(store=small)
        ballast.unlink()
        box.close()
        assert list(small.boxes.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_result_that_finds_no_room_leaves_its_request_of_unknown_outcome(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a small file system of its own needs root to mount it")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "x", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this host lets nobody mount a tmpfs")
    try:
        box = Sandbox.create(store=Store(tmp_path), ttl_s=60)
        ballast = tmp_path / "ballast"
        space = os.statvfs(tmp_path)
        ballast.write_bytes(bytes(space.f_bavail * space.f_frsize - 200_000))
        with pytest.raises(TrajectoryError, match="No space"):
            box.exec("head -c 600000 /dev/zero", request_id="large")
        ballast.unlink()
        time.sleep(0.3)
        with pytest.raises(UnknownOutcome):
            box.exec("head -c 600000 /dev/zero", request_id="large")
        box.resolve("large", "rerun")
        assert len(box.exec("head -c 600000 /dev/zero", request_id="large").stdout) == 600_000
        box.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def _at_once(work: Callable[[], object], count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        for each in [pool.submit(work) for _ in range(count)]:
            each.result()


def test_many_connections_survive_their_keeper(make: Any) -> None:
    box = make()
    _at_once(lambda: box.exec("sleep 0.4"), 8)
    os.kill(box.info()["pid"], signal.SIGKILL)
    assert box.exec("echo back").text == "back\n"
    os.kill(box.info()["pid"], signal.SIGKILL)
    assert Sandbox.open(box.id, store=box.wrapped.store).exec("echo here").text == "here\n"
    began = time.monotonic()
    box.close()  # the keeper that is there now, whoever started it
    assert not box.directory.exists()
    assert time.monotonic() - began < 5


def test_a_forked_client_asks_for_itself(make: Any) -> None:
    box = make()
    box.exec("true")
    pid = os.fork()
    said = [box.exec(f"echo {bool(pid)} {n}").text == f"{bool(pid)} {n}\n" for n in range(5)]
    if not pid:
        os._exit(0 if all(said) else 1)
    assert all(said)
    assert os.waitpid(pid, 0)[1] == 0


def test_what_does_not_go_into_a_message_is_refused(store: Store) -> None:
    with pytest.raises(SandboxError, match="at most 126976"):
        Sandbox.create(store=store, network=[f"host{n}.example.org" for n in range(12_000)])


def test_a_spare_without_its_launcher_is_passed_over(make: Any) -> None:
    make()
    time.sleep(1.0)  # the spares are there
    below: dict[int, list[int]] = {}
    for process in (each for each in Path("/proc").iterdir() if each.name.isdigit()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = (process / "stat").read_text().rpartition(")")[2].split()
            below.setdefault(int(words[1]), []).append(int(process.name))
    keepers = [k for nursery in below[os.getpid()] for k in below.get(nursery, [])]
    used = make().info()["pid"]  # the spares go in the order in which they were made
    keeper = min(k for k in keepers if k > used and below.get(k))
    os.kill(below[below[keeper][0]][0], signal.SIGKILL)
    assert make().exec("echo up").text == "up\n"


def test_threads_share_a_nursery(store: Store) -> None:
    program = (
        f"import os, pathlib, sys, threading; sys.path = {sys.path!r}\n"
        "from pelagos.sandbox import Sandbox, Store\n"
        "store = Store(pathlib.Path(sys.argv[1]))\n"
        "work = [threading.Thread(target=lambda: Sandbox.create(store=store).close()) for _ in range(8)]\n"
        "[w.start() for w in work], [w.join() for w in work]\n"
        "told = [p.read_text().rpartition(')')[2].split() for p in pathlib.Path('/proc').glob('[0-9]*/stat')]\n"
        "print(sum(int(words[1]) == os.getpid() for words in told))\n"
    )
    words = [sys.executable, "-c", program, str(store.root)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n", done.stderr


def test_a_killed_nursery_or_forker_is_made_again(make: Any) -> None:
    box = make()
    parent: dict[int, int] = {}
    for process in (each for each in Path("/proc").iterdir() if each.name.isdigit()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that ended meanwhile
            parent[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    keeper = box.info()["pid"]
    for pid in [p for p, of in parent.items() if of in (keeper, os.getpid()) and p != keeper]:
        if b"nursery" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert make().exec("echo here").text == "here\n"
    assert box.exec("echo here too").text == "here too\n"


def test_a_terminal_is_typed_into_resized_and_logged(store: Store) -> None:
    async def go() -> None:
        async with await AsyncSandbox.create(store=store, ttl_s=60) as box:
            seen = bytearray()
            session = asyncio.ensure_future(
                box.terminal(["bash", "--norc"], rows=30, on_output=seen.extend, request_id="t")
            )

            async def until(word: bytes) -> None:
                for _ in range(6000):
                    if word in seen:
                        return
                    await asyncio.sleep(0.01)
                raise AssertionError(bytes(seen))

            await until(b"$ ")
            assert await box.type("tty; stty size; echo a$((40+2))\n") == 32
            await until(b"a42")
            assert b"/dev/pts/" in seen
            assert b"30 80" in seen
            await box.type("", size=(11, 44))
            await box.type("stty size; sleep 60\n")
            await until(b"11 44")
            await box.type(b"\x03")  # what a terminal turns into an interrupt
            await box.type("exit 5\n")
            done = await session
            assert (done.exit_code, done.stderr) == (5, b"")
            assert done.stdout == bytes(seen)
            assert (await box.terminal(["bash", "--norc"], rows=30, request_id="t")).replayed
            with pytest.raises(SandboxError, match="no terminal"):
                await box.type("x")
            typed = [r for r in logs.read_records(box.directory) if r["kind"] == "intent" and r["op"] == "type"]
            assert len(typed) == 6
            slow = await box.terminal(["sleep", "30"], timeout=0.3)
            assert (slow.timed_out, slow.exit_code) == (True, -signal.SIGKILL)

    asyncio.run(go())
