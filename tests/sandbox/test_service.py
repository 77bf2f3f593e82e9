"""The service over its own HTTP: keys, quotas, places, other people's sandboxes, and deaths of every part."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pelagos.errors import SandboxError
from pelagos.sandbox import Store
from pelagos.sandbox.service import Edge, Gateway, Project, app, on_ray, over_http, read_projects

ALICE = Project(name="alice", key="a" * 20, sandboxes=2, memory_mb=1024)
BOB = Project(name="bob", key="b" * 20, per_minute=3)


class Client:
    """One project's view of an application."""

    def __init__(self, application: Any, key: str) -> None:
        self._transport, self._key = httpx.ASGITransport(application), key

    def post(self, path: str, /, key: str | None = None, **body: Any) -> httpx.Response:
        return asyncio.run(self._ask("POST", path, key, body))

    def delete(self, path: str) -> httpx.Response:
        return asyncio.run(self._ask("DELETE", path, None, {}))

    async def _ask(self, method: str, path: str, key: str | None, body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._key}"} | ({"Idempotency-Key": key} if key else {})
        async with httpx.AsyncClient(transport=self._transport, base_url="http://edge") as client:
            return await client.request(method, path, headers=headers, content=json.dumps(body))


def service(store: Store) -> Any:
    edge = Edge(store, name="e1", most_memory_mb=4096)
    return app(Gateway([ALICE, BOB], {"e1": edge.answer}))


def text(answer: httpx.Response) -> str:
    return base64.b64decode(answer.json()["stdout"]).decode()


def test_projects_are_walls_and_quotas_hold(store: Store) -> None:
    application = service(store)
    alice, bob, nobody = (Client(application, key) for key in (ALICE.key, BOB.key, "x"))
    assert nobody.post("/v1/sandboxes").status_code == 401
    made = alice.post("/v1/sandboxes", key="first", memory_mb=256, ttl_s=60)
    assert made.status_code == 200, made.text
    box = f"/v1/sandboxes/{made.json()['id']}"
    assert made.json()["id"] == "e1.alice.first"
    assert alice.post("/v1/sandboxes", key="first", memory_mb=256).json()["id"] == "e1.alice.first"
    for _ in range(2):
        assert text(alice.post(f"{box}/exec", key="bump", command="echo x >> n; wc -l < n")) == "1\n"
    assert alice.post(f"{box}/exec", key="bump", command="other").status_code == 409
    data = base64.b64encode(b"\xff\0").decode()
    assert alice.post(f"{box}/write", path="f", data=data).status_code == 200
    assert alice.post(f"{box}/read", path="f").json()["data"] == data
    assert [e["name"] for e in alice.post(f"{box}/list").json()["entries"]] == ["f", "n"]
    for verb, body in (("exec", {"command": "id"}), ("read", {"path": "f"}), ("info", {})):
        assert bob.post(f"{box}/{verb}", **body).status_code == 404
    assert bob.post("/v1/sandboxes", memory_mb=64).status_code == 429, "its fourth request of a minute"
    for bad in ({"command": 5}, {}, {"command": "x", "timeout": "long"}):
        assert alice.post(f"{box}/exec", **bad).status_code == 400, bad
    assert alice.post(f"{box}/dance").status_code == 400
    assert alice.post("/v1/sandboxes", memory_mb=9, layers=["../boxes/e1.bob.x/upper"]).status_code == 400
    assert alice.post("/v1/sandboxes", key="../../x", memory_mb=9).status_code == 400
    assert alice.post("/v1/sandboxes/..%2f..%2fx/exec", command="id").status_code == 404
    assert alice.post("/v1/sandboxes", memory_mb=900).status_code == 429, "over its memory"
    layers = alice.post(f"{box}/snapshot").json()["layers"]
    second = alice.post("/v1/sandboxes", memory_mb=64, layers=layers).json()["id"]
    assert text(alice.post(f"/v1/sandboxes/{second}/exec", command="cat n")) == "x\n"
    assert alice.post("/v1/sandboxes", memory_mb=64).status_code == 429, "over its number"
    again = Client(service(store), ALICE.key)  # the gateway and edge die; others know everything
    assert text(again.post(f"{box}/exec", key="bump", command="echo x >> n; wc -l < n")) == "1\n"
    assert again.post(f"{box}/pause").status_code == 200
    assert text(again.post(f"{box}/exec", command="cat n")) == "x\n"
    assert again.delete(f"/v1/sandboxes/{second}").status_code == 200
    assert again.delete(box).status_code == 200
    assert again.post(f"{box}/exec", command="id").status_code == 400
    assert 'project="alice",verb="exec",code="200"' in asyncio.run(_get(application, "/metrics"))


async def _get(application: Any, path: str) -> str:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://edge") as client:
        return (await client.get(path)).text


@pytest.fixture
def far(tmp_path: Path, store: Store) -> Iterator[tuple[str, Any]]:
    """An edge of its own behind a port."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(
        uvicorn.Config(
            app(None, Edge(store, name="far", most_memory_mb=512), secret="s" * 20), port=0, log_level="error"
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    server.should_exit = True
    thread.join()


def test_another_host_is_placed_on_reached_and_missed(far: tuple[str, Any], store: Store) -> None:
    url, _ = far
    gateway = Gateway([ALICE], {"far": over_http(url, "s" * 20), "gone": over_http("http://127.0.0.1:9", "")})
    alice = Client(app(gateway), ALICE.key)
    made = alice.post("/v1/sandboxes", memory_mb=128, ttl_s=30)
    assert made.status_code == 200, made.text
    box = f"/v1/sandboxes/{made.json()['id']}"
    assert made.json()["id"].startswith("far.alice.")
    assert text(alice.post(f"{box}/exec", command="echo here")) == "here\n"
    assert alice.post("/v1/sandboxes", memory_mb=500).status_code == 429, "more than the edge has"
    assert alice.post(f"{box}/read", path="none").status_code == 400
    stranger = Client(app(Gateway([ALICE], {"far": over_http(url, "wrong")})), ALICE.key)
    assert stranger.post(f"{box}/exec", command="id").status_code == 400
    assert alice.delete(box).status_code == 200
    assert 'edge_up{edge="gone"} 0' in gateway.metrics()
    assert 'edge_up{edge="far"} 1' in gateway.metrics()


def test_a_create_that_was_killed_halfway_is_made_again(store: Store) -> None:
    edge = Edge(store, name="e1", most_memory_mb=4096)
    application = app(Gateway([ALICE], {"e1": edge.answer}))
    (store.boxes / "e1.alice.half").mkdir()
    alice = Client(application, ALICE.key)
    made = alice.post("/v1/sandboxes", key="half", memory_mb=64)
    assert (made.status_code, made.json().get("id")) == (200, "e1.alice.half"), made.text
    assert text(alice.post("/v1/sandboxes/e1.alice.half/exec", command="echo well")) == "well\n"
    assert alice.delete("/v1/sandboxes/e1.alice.half").status_code == 200


@pytest.mark.slow
def test_an_edge_may_be_an_actor_of_a_cluster(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, configure_logging=False)
    try:
        alice = Client(app(Gateway([ALICE], {"r1": on_ray("r1", tmp_path, most_memory_mb=512)})), ALICE.key)
        box = f"/v1/sandboxes/{alice.post('/v1/sandboxes', key='one', memory_mb=64, ttl_s=60).json()['id']}"
        assert box.endswith("r1.alice.one")
        assert text(alice.post(f"{box}/exec", key="bump", command="echo x >> n; wc -l < n")) == "1\n"
        assert alice.post(f"{box}/exec", key="bump", command="other").status_code == 409
        ray.kill(ray.get_actor("pelagos-edge-r1"), no_restart=False)
        deadline = time.monotonic() + 30
        while (again := alice.post(f"{box}/exec", key="bump", command="echo x >> n; wc -l < n")).status_code == 502:
            assert time.monotonic() < deadline
        assert text(again) == "1\n", "the actor was made again and nothing ran twice"
        assert alice.delete(box).status_code == 200
    finally:
        ray.shutdown()


RELAY = """
import json, sys, urllib.error, urllib.request
for line in sys.stdin:
    method, url, headers, body = json.loads(line)
    try:
        ask = urllib.request.Request(url, json.dumps(body).encode(), headers, method=method)
        with urllib.request.urlopen(ask, timeout=30) as answer:
            told = [answer.status, answer.read().decode()]
    except urllib.error.HTTPError as error:
        told = [error.code, error.read().decode()]
    except OSError as error:
        told = [0, str(error)]
    print(json.dumps(told), flush=True)
"""


class Hosts:
    """Three hosts as network namespaces: a gateway, and two edges each behind a link of its own."""

    def __init__(self, stack: contextlib.ExitStack, place: Path) -> None:
        self._stack, self._place, self._name = stack, place, f"pel{os.getpid() % 100000}"
        (place / "projects.toml").write_text(f'[alice]\nkey = "{ALICE.key}"\nsandboxes = 9\n')
        (place / "secret").write_text("s" * 20)
        for host in ("g", "h1", "h2"):
            self._ip("netns", "add", f"{self._name}{host}")
            stack.callback(self._ip, "netns", "del", f"{self._name}{host}")
        far = []
        for n, host in enumerate(("h1", "h2")):
            ours, theirs = f"10.77.{n}.1", f"10.77.{n}.2"
            self._ip("link", "add", f"g{host}", "netns", f"{self._name}g", "type", "veth", "peer", "name", "up0",
                     "netns", f"{self._name}{host}")  # fmt: skip
            for space, device, address in (("g", f"g{host}", ours), (host, "up0", theirs)):
                self._ip("-n", f"{self._name}{space}", "addr", "add", f"{address}/24", "dev", device)
                self._ip("-n", f"{self._name}{space}", "link", "set", device, "up")
            self.start(host, "serve", "--name", host, "--host", theirs, "--memory-mb", "300")
            far += ["--edge", f"{host}=http://{theirs}:8100"]
        self._ip("-n", f"{self._name}g", "link", "set", "lo", "up")
        self.start("g", "serve", "projects.toml", *far, "--memory-mb", "0")
        words = ["nsenter", f"--net=/run/netns/{self._name}g", sys.executable, "-c", RELAY]
        self._relay = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(self._relay.communicate)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def start(self, host: str, *words: str) -> None:
        env = {"PATH": os.defpath, "HOME": str(self._place), "XDG_CACHE_HOME": str(self._place / host),
               "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}  # fmt: skip
        enter = ["nsenter", f"--net=/run/netns/{self._name}{host}", sys.executable, "-m", "pelagos", "sandbox"]
        done = subprocess.Popen([*enter, *words, "--secret", "secret"], env=env, cwd=self._place)
        self._stack.callback(done.wait)
        self._stack.callback(done.kill)

    def link(self, host: str, state: str) -> None:
        self._ip("-n", f"{self._name}g", "link", "set", f"g{host}", state)

    def ask(self, method: str, path: str, key: str | None = None, **body: Any) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {ALICE.key}"} | ({"Idempotency-Key": key} if key else {})
        assert self._relay.stdin
        assert self._relay.stdout
        print(json.dumps([method, f"http://127.0.0.1:8100{path}", headers, body]), file=self._relay.stdin, flush=True)
        code, told = json.loads(self._relay.stdout.readline())
        return code, json.loads(told) if told.startswith("{") else told

    def until(self, method: str, path: str, key: str, **body: Any) -> Any:
        """Ask until it is done."""
        deadline = time.monotonic() + 30
        while (told := self.ask(method, path, key, **body))[0] != 200:
            assert time.monotonic() < deadline, told
            time.sleep(0.1)
        return told[1]


def test_hosts_of_a_network_fill_up_vanish_and_come_back(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nsenter") or not shutil.which("bwrap"):
        pytest.skip("network namespaces need root, iproute2 and nsenter")
    with contextlib.ExitStack() as stack:
        hosts = Hosts(stack, tmp_path)
        ids = [hosts.until("POST", "/v1/sandboxes", f"k{n}", memory_mb=128, ttl_s=60)["id"] for n in range(4)]
        assert sorted(i.split(".")[0] for i in ids) == ["h1", "h1", "h2", "h2"]
        assert hosts.ask("POST", "/v1/sandboxes", memory_mb=128)[0] == 429, "both hosts are full"
        bump = "echo x >> n; wc -l < n"
        far = next(i for i in ids if i.startswith("h1"))
        near = next(i for i in ids if i.startswith("h2"))
        assert (
            base64.b64decode(hosts.ask("POST", f"/v1/sandboxes/{far}/exec", "b", command=bump)[1]["stdout"]) == b"1\n"
        )
        hosts.link("h1", "down")
        assert hosts.ask("POST", f"/v1/sandboxes/{far}/exec", "b", command=bump)[0] == 502
        assert hosts.ask("POST", f"/v1/sandboxes/{near}/exec", "b", command=bump)[0] == 200
        assert hosts.ask("POST", "/v1/sandboxes", memory_mb=64)[0] == 429, "the host that is left is full"
        hosts.link("h1", "up")
        again = hosts.until("POST", f"/v1/sandboxes/{far}/exec", "b", command=bump)
        assert (base64.b64decode(again["stdout"]), again["replayed"]) == (b"1\n", True)
        for box in ids:
            hosts.until("DELETE", f"/v1/sandboxes/{box}", "end")


def test_files_of_projects(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('[a]\nkey = "0123456789abcdef"\nsandboxes = 3\n')
    assert read_projects(path) == [Project(name="a", key="0123456789abcdef", sandboxes=3)]
    for bad in (
        "",
        "[a]\n",
        "[a]\nkey = 'short'\n",
        "[a]\nkey = 5\n",
        "x",
        "[a]\nkey = '0123456789abcdef'\nother = 1\n",
    ):
        path.write_text(bad)
        with pytest.raises(SandboxError):
            read_projects(path)
