"""Docker as a backend: the same promises as containers, from a real engine; skipped where there is none to be had."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_abuse import PYTHON_ATTEMPTS, RUN_PROGRAMS, SHELL_ATTEMPTS, programs  # noqa: F401  a fixture

from pelagos.errors import SandboxError
from pelagos.sandbox import Image, Sandbox, Store, docker, sdk
from pelagos.sandbox import log as logs


@pytest.fixture(scope="module", autouse=True)
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The engine at DOCKER_HOST, or one of this module's own where dockerd is installed and may be started."""
    try:
        docker.ask("GET", "/info")
        yield
        return
    except SandboxError:
        if os.geteuid() != 0 or shutil.which("dockerd") is None:
            pytest.skip("needs docker: no engine at DOCKER_HOST, and no dockerd (Debian: docker.io) to start as root")
    root = tmp_path_factory.mktemp("engine")
    (root / "none.json").write_text("{}")
    words = ["unshare", "-m", "dockerd", "--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false"]
    words += [f"--data-root={root}/data", f"--exec-root={root}/exec", f"--pidfile={root}/pid"]
    words += [f"--config-file={root}/none.json", "-H", f"unix://{root}/s"]
    with pytest.MonkeyPatch.context() as patch, (root / "log").open("wb") as log:
        patch.setenv("DOCKER_HOST", f"unix://{root}/s")
        process = subprocess.Popen(words, stdout=log, stderr=log)
        sdk._nursery.cache_clear()  # one that knows the variable
        try:
            deadline = time.monotonic() + 60
            while not (root / "s").exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    said = (root / "log").read_text(errors="replace")[-500:]
                    pytest.skip(f"needs docker: dockerd does not start here: {said}")
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait(60)
            sdk._nursery.cache_clear()


SIZE: dict[str, Any] = {"substrate": "docker", "memory_mb": 128, "disk_mb": 32, "processes": 64}


@pytest.fixture(scope="module")
def boxed(engine: None, store: Store) -> Iterator[Sandbox]:
    """A sandbox that tests leave as they found it."""
    with Sandbox.create(store=store, ttl_s=120, **SIZE) as made:
        yield made


def test_commands_files_and_stored_results(boxed: Sandbox) -> None:
    flags = boxed.capabilities
    assert (flags.disk_limit, flags.pause, flags.files, flags.network) == ("watched", "signals", "overlay", "none")
    done = boxed.exec("cat; id -u; pwd; echo oops >&2; exit 3", stdin=b"in\0put")
    assert (done.exit_code, done.stdout, done.stderr) == (3, b"in\0put1000\n/workspace\n", b"oops\n")
    boxed.files.write("sub/data", bytes(range(256)) * 300, mode=0o640)
    assert boxed.files.read("sub/data") == bytes(range(256)) * 300
    assert [(e.name, e.kind, e.mode) for e in boxed.files.list("sub")] == [("data", "file", 0o640)]
    with pytest.raises(SandboxError, match="No such file"):
        boxed.files.read("none")
    assert boxed.exec("echo x >> n; wc -l < n", request_id="once").text == "1\n"
    assert boxed.exec("echo x >> n; wc -l < n", request_id="once").replayed
    slow = boxed.exec("sleep 30", timeout=0.3)
    assert (slow.timed_out, slow.exit_code) == (True, -signal.SIGKILL)
    assert boxed.exec("no-such-program").exit_code == 127
    mounts = boxed.exec("grep -E ' /.pelagos| /usr' /proc/self/mountinfo").text.splitlines()
    assert len(mounts) >= 2
    assert all(line.split()[5].startswith("ro") for line in mounts)
    boxed.exec("rm -r sub n")
    assert logs.verify(boxed.directory)[0] > 10


def test_limits_are_the_engines(boxed: Sandbox) -> None:
    if boxed.capabilities.memory_limit == "cgroup":
        bomb = boxed.exec(["python3", "-c", "x = bytearray(300 << 20)"])
        assert (bomb.exit_code != 0, bomb.killed_by) == (True, "memory")
    assert b"fork" in boxed.exec("for i in $(seq 100); do sleep 20 & done; wait", timeout=20).stderr
    assert boxed.exec(["pkill", "sleep"]).exit_code == 0
    orphans = "for i in $(seq 200); do (true &); done; sleep 0.2; echo fine"
    assert boxed.exec(orphans).text == "fine\n", "the first process does not reap what is given to it"
    assert boxed.exec("yes", timeout=1).truncated
    fill = "i=0; while :; do head -c 1000000 /dev/zero > f$i; i=$((i+1)); sleep 0.01; done"
    assert boxed.exec(fill, timeout=60).killed_by == "disk"
    assert boxed.exec("rm f*; ls | wc -l").text == "0\n"


def test_snapshots_are_layers_like_any_other(boxed: Sandbox, store: Store) -> None:
    base = boxed.snapshot()
    boxed.exec("mkdir -p a/b; echo one > a/b/f; ln a/b/f a/g; ln -s g a/l; rm /etc/mime.types; chmod 751 a")
    boxed.exec("rm -r /home/agent; mkdir /home/agent; echo new > /home/agent/y")
    packed = boxed.pack_diff()
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        names = set(tar.getnames())
    assert {"workspace/a/b/f", "etc/mime.types", "home/agent/y"} <= names
    assert not any(name.startswith(".pelagos") for name in names)
    look = "cat a/b/f a/l; stat -c '%a %h' a a/g; ls /etc/mime.types; ls -A /home/agent"
    want = boxed.exec(look).text
    assert ("new" in want, "2" in want) == (False, True)
    image = boxed.snapshot()
    for substrate in ("container", "docker"):
        with Sandbox.create(**(SIZE | {"substrate": substrate}), image=image, store=store) as other:
            assert other.exec(look).text == want, substrate
            assert other.exec("touch z; rm -r a /home/agent/y /workspace/z; ls -A /workspace").text == ""
    assert base.layers != image.layers
    boxed.exec("rm -r a; touch /etc/mime.types")


def test_an_image_without_python(make: Any, store: Store, tmp_path: Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox (Debian package busybox-static) is not installed")
    root = tmp_path / "root" / "bin"
    root.mkdir(parents=True)
    shutil.copy(busybox, root / "busybox")
    for name in ("sh", "cat", "ls"):
        (root / name).symlink_to("busybox")
    image = Image("none", (store.own_layer,)).with_directory(tmp_path / "root", store=store)
    box = make(**SIZE, image=image)
    assert box.exec("echo here > f; cat f; ls /usr").text == "here\n"
    assert box.files.read("f") == b"here\n"


def test_killed_keepers_and_containers_come_back_with_their_files(make: Any) -> None:
    box = make(**SIZE)
    box.exec("echo kept > f; sleep 100 >/dev/null 2>&1 &")
    os.kill(box.info()["pid"], signal.SIGKILL)
    assert box.exec("cat f; pgrep sleep").text == "kept\n"
    docker.ask("POST", f"{_container(box)}/kill")
    deadline = time.monotonic() + 60
    while docker.ask("GET", f"{_container(box)}/json")["State"]["Running"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert box.exec("cat f").text == "kept\n"
    url = _container(box)
    box.close()
    assert docker.ask("GET", f"{url}/json") is None


def test_what_is_left_of_sandboxes_that_are_gone_is_swept(make: Any, tmp_path: Path) -> None:
    with Sandbox.create(**SIZE, store=Store(tmp_path / "other")) as there:
        assert there.exec("echo here").text == "here\n"
    shutil.rmtree(tmp_path / "other")
    box = make(**SIZE)
    stores = [image["Labels"]["pelagos.store"] for image in docker.ask("GET", "/images/json") if image["Labels"]]
    assert str(box.directory.parents[1]) in stores
    assert str(tmp_path / "other") not in stores
    os.kill(box.info()["pid"], signal.SIGKILL)
    url = _container(box)
    shutil.rmtree(box.directory)
    assert docker.ask("GET", f"{url}/json") is not None
    make(**SIZE)
    assert docker.ask("GET", f"{url}/json") is None


def _container(box: Sandbox) -> str:
    found = [c for c in docker.ask("GET", "/containers/json?all=1") if c["Labels"].get("pelagos.box") == box.id]
    return f"/containers/{found[0]['Id']}"


def test_attempts_to_get_out_fail(boxed: Sandbox, programs: dict[str, str]) -> None:  # noqa: F811
    for name, attempt in SHELL_ATTEMPTS.items():
        if name == "layer of ours":  # the table of mounts names the store's place, which nobody inside can reach
            continue
        words = f"({attempt}) >out 2>&1 && echo ESCAPED; cat out; rm -rf ./* 2>/dev/null; exit 0"
        tried = boxed.exec(words, timeout=20)
        assert "ESCAPED" not in tried.text, (name, tried)
    for name, program in programs.items():
        boxed.files.write(f"t/{name}.py", program)
    answers = dict(line.split(".py: ") for line in boxed.exec(RUN_PROGRAMS, timeout=100).text.splitlines())
    assert set(answers) == set(PYTHON_ATTEMPTS)
    assert {n: a for n, a in answers.items() if not a.startswith("refused")} == {}


def test_what_is_missing_is_said(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="only containers reach"):
        Sandbox.create(**SIZE, store=store, network=["example.org"])
    with pytest.raises(SandboxError, match="disk_limit='hard'"):
        Sandbox.create(**SIZE, store=store, require={"disk_limit": "hard"})
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    with pytest.raises(SandboxError, match="no engine at DOCKER_HOST"):
        docker.ask("GET", "/info")
