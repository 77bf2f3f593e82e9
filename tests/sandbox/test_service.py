"""The service over its own HTTP: keys, quotas, places, other people's sandboxes, and deaths of every part."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pelagos.errors import SandboxError
from pelagos.sandbox import Store
from pelagos.sandbox.service import Edge, Gateway, Project, app, read_projects

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
    return app(Gateway([ALICE, BOB], {}, edge))


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
    gateway = Gateway([ALICE], {"far": url, "gone": "http://127.0.0.1:9"}, secret="s" * 20)
    alice = Client(app(gateway), ALICE.key)
    made = alice.post("/v1/sandboxes", memory_mb=128, ttl_s=30)
    assert made.status_code == 200, made.text
    box = f"/v1/sandboxes/{made.json()['id']}"
    assert made.json()["id"].startswith("far.alice.")
    assert text(alice.post(f"{box}/exec", command="echo here")) == "here\n"
    assert alice.post("/v1/sandboxes", memory_mb=500).status_code == 429, "more than the edge has"
    assert alice.post(f"{box}/read", path="none").status_code == 400
    stranger = Client(app(Gateway([ALICE], {"far": url}, secret="wrong")), ALICE.key)
    assert stranger.post(f"{box}/exec", command="id").status_code == 400
    assert alice.delete(box).status_code == 200
    assert 'edge_up{edge="gone"} 0' in gateway.metrics()
    assert 'edge_up{edge="far"} 1' in gateway.metrics()


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
