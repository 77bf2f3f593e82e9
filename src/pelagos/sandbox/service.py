"""Sandboxes over HTTP: a gateway with keys, projects, quotas and places; an edge per host; a watcher of edges.

One process is all three by default. A sandbox id names its edge, so a gateway holds no state that matters: it may be
killed and started at any time, and a request that is sent again with its `Idempotency-Key` gets its stored result.
An idle sandbox ends after its time to live and comes back, files and log, with the next request.
"""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hmac
import importlib
import io
import json
import random
import re
import socket
import time
import tomllib
import urllib.parse
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pelagos.errors import SandboxError, TrajectoryError, UnknownOutcome
from pelagos.sandbox import log
from pelagos.sandbox.api import ExecResult, Limits
from pelagos.sandbox.layers import Image, Store, remove_tree
from pelagos.sandbox.sdk import AsyncSandbox

BODY_BYTES = 96 << 20
SAMPLED = 2  # edges looked at for a new sandbox: the less loaded of two is nearly as good as the least of all
WATCH_S = 2.0
REACH_S = 2.0  # to connect to an edge, or to have it tell what lives there
ANSWER_S = 700.0
OPTIONS = frozenset(f.name for f in dataclasses.fields(Limits)) | {"substrate", "ttl_s", "require"}
# How an edge is asked: `Edge.answer`, or the same somewhere else; OSError where it cannot be reached.
Ask = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Project:
    """Who may ask, and for how much at a time."""

    name: str
    key: str
    sandboxes: int = 32
    memory_mb: int = 16384
    per_minute: int = 6000


@dataclass(slots=True)
class EdgeView:
    """What the watcher last saw of an edge."""

    name: str
    ask: Ask
    alive: bool = True
    boxes: list[dict[str, Any]] = field(default_factory=list)  # "id", "project" and "memory_mb" of each
    most_memory_mb: float = 0.0
    recent: int = 0  # placed there since it was seen

    @property
    def memory_mb(self) -> float:
        """What its sandboxes may use together."""
        return sum(box["memory_mb"] for box in self.boxes)


def read_projects(path: Path) -> list[Project]:
    """Read `[NAME] key = "..."` tables with quotas; SandboxError for what is no such file."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        found = [Project(name=name, **facts) for name, facts in tables.items()]
    except (OSError, TypeError, ValueError) as error:
        said = "expected tables with key, sandboxes, memory_mb"
        raise SandboxError(f"{path}: no file of projects ({error}); {said}") from None
    if not found or any(not isinstance(p.key, str) or len(p.key) < 16 or "." in p.name for p in found):
        raise SandboxError(f"{path}: every project needs a name without dots and a key of at least 16 characters")
    return found


class Edge:
    """The sandboxes of one host; trusts its caller, which is the gateway."""

    def __init__(self, store: Store, *, name: str, most_memory_mb: float) -> None:
        self.name, self._store, self._most = name, store, most_memory_mb
        self._open: dict[str, AsyncSandbox] = {}
        self._making: dict[str, asyncio.Lock] = {}

    def view(self) -> dict[str, Any]:
        """Return what lives here, by project, counted from the directories, which outlive every process of ours."""
        found = [self._facts(path) for path in self._store.boxes.iterdir() if path.name.startswith(f"{self.name}.")]
        return {"name": self.name, "most_memory_mb": self._most, "boxes": [facts for facts in found if facts]}

    def _facts(self, path: Path) -> dict[str, Any] | None:
        try:
            spec = json.loads((path / "spec.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # on its way in or out
        return {"id": path.name, "project": path.name.split(".")[1], "memory_mb": spec["limits"]["memory_mb"]}

    async def answer(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Do what a gateway sent."""
        if ask["verb"] == "view":
            return self.view()
        return await self.handle(ask["verb"], ask["box"], ask["body"], ask["request"])

    async def handle(self, verb: str, box_id: str, body: dict[str, Any], request: str | None) -> dict[str, Any]:
        """Do one request; its answer is JSON, bytes in base64."""
        if verb == "create":
            image = Image.host(self._store)
            if body.get("tar"):
                tar = io.BytesIO(base64.b64decode(body["tar"]))
                image = Image(image.base, (*image.layers, await asyncio.to_thread(self._store.add_tar, tar)))
            elif body.get("layers"):
                image = Image("host", tuple(map(str, body["layers"])))
            options = {name: value for name, value in body.items() if name in OPTIONS}
            directory = self._store.box(box_id)
            async with self._making.setdefault(box_id, asyncio.Lock()):
                if all((directory / name).exists() for name in (log.NAME, "spec.json")):  # an answer was lost
                    box = await AsyncSandbox.open(box_id, store=self._store)
                else:
                    remove_tree(directory)  # of an edge that was killed while it made this
                    box = await AsyncSandbox.create(id=box_id, image=image, store=self._store, **options)
            self._making.pop(box_id, None)
            self._open[box_id] = box
            return {"id": box_id, "capabilities": dataclasses.asdict(box.capabilities), "layers": list(image.layers)}
        box = self._open.get(box_id)
        if box is None:
            box = self._open[box_id] = await AsyncSandbox.open(box_id, store=self._store)
        if verb == "delete":
            await box.close()
            self._open.pop(box_id, None)
            return {}
        if verb == "exec":
            facts = {k: body[k] for k in ("timeout", "env", "cwd") if k in body}
            data = base64.b64decode(body.get("stdin", ""))
            return _plain(await box.exec(body["command"], stdin=data, request_id=request, **facts))
        if verb == "call":
            return _plain(await box.call(body["source"], *body.get("arguments", []), request_id=request))
        if verb == "read":
            return {"data": _text(await box.files.read(body["path"], request_id=request))}
        if verb == "write":
            await box.files.write(body["path"], base64.b64decode(body["data"]), request_id=request)
        elif verb == "list":
            found = await box.files.list(body.get("path", "/workspace"), request_id=request)
            return {"entries": [dataclasses.asdict(entry) for entry in found]}
        elif verb == "snapshot":
            return {"layers": list((await box.snapshot(request_id=request)).layers)}
        elif verb == "diff":
            return {"data": _text(await box.pack_diff(request_id=request))}
        elif verb == "resolve":
            await box.resolve(body["request"], body["how"])
        elif verb in ("pause", "resume"):
            await getattr(box, verb)(request_id=request)
        elif verb == "info":
            return await box.info()
        else:
            raise SandboxError(f"there is no {verb!r}")
        return {}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _plain(done: ExecResult) -> dict[str, Any]:
    return dataclasses.asdict(done) | {"stdout": _text(done.stdout), "stderr": _text(done.stderr)}


def over_http(url: str, secret: str) -> Ask:
    """Reach the edge of another host, whose `app` was given the same secret."""
    place = urllib.parse.urlsplit(url)
    port = place.port or (443 if place.scheme == "https" else 80)

    async def ask(what: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(what).encode()
        head = (f"POST {place.path}/edge HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
                f"Authorization: Bearer {secret}\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
        reach = asyncio.open_connection(place.hostname, port, ssl=True if place.scheme == "https" else None)
        reader, writer = await asyncio.wait_for(reach, REACH_S)
        try:
            link: socket.socket = writer.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that is gone says nothing
            for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
                link.setsockopt(socket.IPPROTO_TCP, option, value)
            writer.write(head.encode("ascii") + body)
            answer = await asyncio.wait_for(reader.read(), REACH_S if what["verb"] == "view" else ANSWER_S)
        finally:
            writer.close()
        status = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
        try:
            told = json.loads(answer.partition(b"\r\n\r\n")[2])
        except ValueError:
            raise ConnectionError(f"{url}: no whole answer; it ended, or is no edge") from None
        if not status or int(status[1]) >= 400:
            code = int(status[1]) if status else 0
            raise {409: TrajectoryError, 425: UnknownOutcome}.get(code, SandboxError)(told["error"])
        return told

    return ask


def on_ray(name: str, root: Path, *, most_memory_mb: float, **options: Any) -> Ask:
    """Reach an edge that is an actor of a Ray cluster, made where there is none; `options` say where (`resources`)."""
    ray: Any = importlib.import_module("ray")  # which nothing else needs

    class RayEdge(Edge):
        def __init__(self) -> None:
            super().__init__(Store(root), name=name, most_memory_mb=most_memory_mb)

    settings = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 1000, "get_if_exists": True} | options
    actor = ray.remote(RayEdge).options(name=f"pelagos-edge-{name}", **settings).remote()

    async def ask(what: dict[str, Any]) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(actor.answer.remote(what), REACH_S if what["verb"] == "view" else ANSWER_S)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise ConnectionError(f"the actor of edge {name} ({error})") from None

    return ask


class Gateway:
    """The way in: who asks, whether they may, and which edge does it."""

    def __init__(self, projects: list[Project], edges: Mapping[str, Ask]) -> None:
        self._projects = projects
        self._edges = {name: EdgeView(name, ask) for name, ask in edges.items()}
        self._asked: dict[str, list[float]] = {}
        self._placing: Counter[str] = Counter()
        self.counts: Counter[tuple[str, str, int]] = Counter()
        self.seconds: dict[str, float] = {}

    async def watch(self) -> None:
        """Look at every edge for ever."""
        while True:
            await asyncio.gather(*(self._look(edge) for edge in self._edges.values()))
            await asyncio.sleep(WATCH_S)

    async def _look(self, edge: EdgeView) -> None:
        try:
            seen = await edge.ask({"verb": "view"})
        except (OSError, SandboxError):
            edge.alive = False
            return
        edge.alive, edge.recent, edge.boxes, edge.most_memory_mb = True, 0, seen["boxes"], seen["most_memory_mb"]

    def project_of(self, authorization: str) -> Project | None:
        """Return whose key this is, taking as long for a wrong one."""
        key = authorization.removeprefix("Bearer ").encode()
        return next((p for p in self._projects if hmac.compare_digest(p.key.encode(), key)), None)

    def over_rate(self, project: Project) -> bool:
        """Count a request and say whether it is one too many of the last minute."""
        now = time.monotonic()
        asked = [t for t in self._asked.get(project.name, []) if t > now - 60]
        self._asked[project.name] = [*asked, now]
        return len(asked) >= project.per_minute

    async def handle(
        self, project: Project, verb: str, box: str, body: dict[str, Any], *, request: str | None
    ) -> dict[str, Any]:
        """Do one request of a project; PermissionError for another's sandbox, OverflowError beyond a quota."""
        ask = {"verb": verb, "body": body, "request": request}
        if verb != "create":
            edge = self._edges.get(box.split(".")[0])
            if edge is None or box.split(".")[1:2] != [project.name]:
                raise PermissionError(f"there is no sandbox {box!r} of this project")
            return await edge.ask(ask | {"box": box})
        limits = Limits(**{f.name: body[f.name] for f in dataclasses.fields(Limits) if f.name in body})
        await asyncio.gather(*(self._look(edge) for edge in self._edges.values() if edge.alive))
        every = [(edge, there) for edge in self._edges.values() for there in edge.boxes]
        for edge, there in every:
            if request and there["id"] == f"{edge.name}.{project.name}.{request}":  # it was asked before
                return await edge.ask(ask | {"box": there["id"]})
        mine = [there["memory_mb"] for _, there in every if there["project"] == project.name]
        many = len(mine) + self._placing[project.name] >= project.sandboxes
        if many or sum(mine) + limits.memory_mb > project.memory_mb:
            raise OverflowError(f"project {project.name} has {len(mine)} sandboxes of {sum(mine):.0f} MB; its quota is "
                                f"{project.sandboxes} and {project.memory_mb} MB: close some")  # fmt: skip
        self._placing[project.name] += 1
        try:
            fits = [e for e in self._edges.values() if e.alive and e.memory_mb + limits.memory_mb <= e.most_memory_mb]
            if not fits:
                raise OverflowError(f"no edge has {limits.memory_mb} MB left; try again later")
            some = random.sample(fits, min(SAMPLED, len(fits)))
            edge = min(some, key=lambda e: (e.recent + len(e.boxes), e.memory_mb))
            edge.recent += 1
            return await edge.ask(ask | {"box": f"{edge.name}.{project.name}.{request or random.randbytes(8).hex()}"})
        finally:
            self._placing[project.name] -= 1

    def metrics(self) -> str:
        """Return what Prometheus reads."""
        lines = [
            f'pelagos_sandbox_requests_total{{project="{p}",verb="{v}",code="{c}"}} {n}'
            for (p, v, c), n in self.counts.items()
        ]
        lines += [f'pelagos_sandbox_seconds_total{{verb="{v}"}} {spent:.6f}' for v, spent in self.seconds.items()]
        for edge in self._edges.values():
            lines += [f'pelagos_sandbox_edge_up{{edge="{edge.name}"}} {int(edge.alive)}',
                      f'pelagos_sandbox_edge_sandboxes{{edge="{edge.name}"}} {len(edge.boxes)}',
                      f'pelagos_sandbox_edge_memory_mb{{edge="{edge.name}"}} {edge.memory_mb}']  # fmt: skip
        return "\n".join(lines) + "\n"


# What an error is told as; the first that it is an instance of.
_CODES: dict[type[Exception], int] = {
    PermissionError: 404, OverflowError: 429, UnknownOutcome: 425, TrajectoryError: 409, SandboxError: 400,
    KeyError: 400, TypeError: 400, ValueError: 400, OSError: 502,
}  # fmt: skip


def app(gateway: Gateway | None, edge: Edge | None = None, *, secret: str = "") -> Any:
    """Return the ASGI application: `/v1/...` for clients of a gateway, `/edge` for gateways of an edge."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    async def answer(request: Request, work: Callable[[dict[str, Any]], Coroutine[Any, Any, Any]]) -> Response:
        try:
            size = int(request.headers.get("content-length") or 0)
            if size > BODY_BYTES or "chunked" in request.headers.get("transfer-encoding", ""):
                return JSONResponse({"error": f"a body of at most {BODY_BYTES} bytes, with its length"}, 413)
            body = json.loads(await request.body() or b"{}")
            if not isinstance(body, dict):
                raise TypeError("expected a JSON object")
            return JSONResponse(await work(body))
        except tuple(_CODES) as error:
            code = next(code for kind, code in _CODES.items() if isinstance(error, kind))
            said = repr(error) if isinstance(error, (KeyError, TypeError, ValueError)) else f"{error}"
            if code == 502:
                said = f"the sandbox's edge cannot be reached ({said})"
            return JSONResponse({"error": said}, code, headers={"Retry-After": "5"} if code == 429 else None)

    async def client(request: Request) -> Response:
        assert gateway is not None
        began, verb = time.perf_counter(), request.path_params.get("verb", "create")
        if request.method == "DELETE":
            verb = "delete"
        project = gateway.project_of(request.headers.get("authorization", ""))
        if project is None:
            return JSONResponse({"error": "expected a project's key as bearer token"}, 401)
        if gateway.over_rate(project):
            response: Response = JSONResponse({"error": "too many requests"}, 429, headers={"Retry-After": "60"})
        else:
            box, key = request.path_params.get("box", ""), request.headers.get("idempotency-key")
            response = await answer(request, functools.partial(gateway.handle, project, verb, box, request=key))
        gateway.counts[project.name, verb if response.status_code < 400 else "refused", response.status_code] += 1
        if response.status_code < 400:
            gateway.seconds[verb] = gateway.seconds.get(verb, 0.0) + time.perf_counter() - began
        return response

    async def inner(request: Request) -> Response:
        assert edge is not None
        if not hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {secret}".encode()):
            return JSONResponse({"error": "not a gateway of this edge"}, 401)

        return await answer(request, edge.answer)

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(gateway.metrics() if gateway else "")

    @contextlib.asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        watcher = asyncio.create_task(gateway.watch()) if gateway else None
        yield
        if watcher is not None:
            watcher.cancel()

    routes = [Route("/metrics", metrics), Route("/health", lambda _: PlainTextResponse("ok"))]
    if gateway is not None:
        routes += [Route("/v1/sandboxes", client, methods=["POST"]),
                   Route("/v1/sandboxes/{box}", client, methods=["DELETE"]),
                   Route("/v1/sandboxes/{box}/{verb}", client, methods=["POST"])]  # fmt: skip
    if edge is not None and secret:
        routes.append(Route("/edge", inner, methods=["POST"]))
    return Starlette(routes=routes, lifespan=life)
