"""The front door: one HTTP server that gives each request to a replica and passes the answer through as it comes.

Connections, time limits, keys and the drain are those of `pelagos serve`, whose server this is; bodies are read for
their conversation only, so that the router can find who knows it. What is wrong with a body the replica says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from deploy.replicas.affinity import Hasher
from deploy.replicas.cluster import APP, DEPLOYMENT, Route, deployment
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from pelagos.checkpoint import resolve_model
from pelagos.errors import ConfigError
from pelagos.serve import Settings, read_settings
from pelagos.serve.app import LONG_BODY_BYTES, canonical, parse_body
from pelagos.serve.exchange import ClientGone, Exchange
from pelagos.serve.keys import KeyFile
from pelagos.serve.limits import READING, Traffic, check_origin, find_key, refusal
from pelagos.serve.metrics import logging_to_stderr
from pelagos.serve.protocols import APIS, wire
from pelagos.serve.run import Server, listen

WATCH_S = 1.0  # between looks at the replicas
REPORT_S = 5.0  # that a replica has to say what it counts
STORE_BYTES = 256 << 20  # of Ray's shared memory: long bodies pass through it
STREAM = b"text/event-stream"
SEND_BYTES = 32 << 10  # at a time: more would wait in the buffer of a client that reads slowly
_CONNECTION = (b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"expect", b"upgrade")
_log = logging.getLogger("pelagos.access")


class Front:
    """The ASGI application of the front door, over a deployment of replicas."""

    def __init__(self, settings: Settings, keys: KeyFile, *, replicas: int) -> None:
        """Serve with `replicas` replicas wanted; until one is there, requests are answered 503."""
        self.settings, self.wanted = settings, replicas
        self.traffic = Traffic((settings.max_requests + settings.max_queued) * replicas)
        self.states: dict[str, int] = {}
        self.failed: str | None = None  # why no replica will ever be there
        self._keys, self._hasher = keys, Hasher()
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"read-{each}") for each in ("short", "long")]
        self._under_way: set[asyncio.Task[Any]] = set()
        self._handle: Any = None
        self._on_status: Callable[[str], None] = lambda _: None
        self._began = time.monotonic()
        self._apis = {canonical(path): api for api in APIS for path in (*api.paths, *api.count_paths)}
        self._reads = {"/health": self._health, "/ready": self._ready, "/stats": self._stats, "/metrics": self._metrics}
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("pelagos_front_requests", "Requests that ended.", ["api", "status"], registry=registry)
        self._routed = Counter("pelagos_front_routed", "Requests by why their replica.", ["why"], registry=registry)
        self._bytes = Counter("pelagos_front_prompt_bytes", "Bytes of conversations.", registry=registry)
        self._known = Counter("pelagos_front_known_bytes", "Of these, known to their replica.", registry=registry)
        self._lost = Counter("pelagos_front_lost", "Answers that ended with their replica.", registry=registry)
        self._entries = Gauge("pelagos_front_map_entries", "Points of conversations known.", registry=registry)
        self._in_flight = Gauge("pelagos_front_requests_in_flight", "Requests under way.", registry=registry)
        self._replicas = Gauge("pelagos_front_replicas", "Replicas by state.", ["state"], registry=registry)

    @property
    def running(self) -> int:
        """Replicas that answer, as last seen."""
        return self.states.get("RUNNING", 0)

    @property
    def status(self) -> str:
        """loading, ready, failed or draining."""
        if self.traffic.draining:
            return "draining"
        return "ready" if self.running else "failed" if self.failed else "loading"

    def attach(self, handle: Any, on_status: Callable[[str], None]) -> None:
        """Begin to send requests to a deployment's handle; `on_status` hears what `status` becomes."""
        self._handle, self._on_status = handle, on_status

    async def watch(self) -> None:
        """Keep `states` and `failed`, for ever."""
        before = self.status
        while True:
            try:
                seen = await asyncio.to_thread(serve.status)
                if (app := seen.applications.get(APP)) is not None:
                    ours = app.deployments.get(DEPLOYMENT)
                    self.states = {str(state): count for state, count in ours.replica_states.items()} if ours else {}
                    is_over = app.status.value == "DEPLOY_FAILED" and not self.running
                    self.failed = ((ours and ours.message) or app.message) if is_over else None
            except Exception as error:  # the controller is being restarted: what was seen last stays
                _log.warning("Ray Serve does not say how the replicas are", exc_info=error)
            if self.status != before:
                before = self.status
                self._on_status(before)
            await asyncio.sleep(WATCH_S)

    def cancel_answers(self) -> None:
        """Break off all answers that still run; their clients are told."""
        for task in self._under_way:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request, or see the server begin and end."""
        if scope["type"] == "lifespan":
            await receive()
            watcher = asyncio.ensure_future(self.watch())
            await send({"type": "lifespan.startup.complete"})
            await receive()
            watcher.cancel()
            for threads in self._threads:
                threads.shutdown(cancel_futures=True)
            await send({"type": "lifespan.shutdown.complete"})
            return
        exchange, route = Exchange(scope, receive, send, canonical(scope["path"])), Route()
        try:
            await self._serve(exchange, route, scope, send)
        except ClientGone:
            exchange.is_gone, exchange.status = True, exchange.status or 499
        except Exception as error:
            await self._break(exchange, send, error)
        finally:
            self._finish(exchange, route)

    async def _serve(self, exchange: Exchange, route: Route, scope: Scope, send: Send) -> None:
        path, is_read = exchange.path, exchange.method in READING
        exchange.api = self._apis.get(path)
        exchange.kind = type(exchange.api).__name__.lower() if exchange.api else "read"
        if path in self._reads and exchange.method in ("GET", "HEAD"):
            check_origin(exchange, self.settings)
            if path in ("/stats", "/metrics"):
                find_key(exchange, self._keys)
            status, body, kind = await self._reads[path]()
            await exchange.respond(status, body, {"Content-Type": kind})
            return
        if exchange.api is None or is_read:  # pages, models, and what is not there
            await self._forward(exchange, route, scope, send, b"")
            return
        check_origin(exchange, self.settings)
        exchange.key = find_key(exchange, self._keys)
        with self.traffic.admitted(exchange.key):
            body = await exchange.read(self.settings.body_bytes, self.settings.body_s)
            await self._forward(exchange, route, scope, send, body)

    async def _forward(self, exchange: Exchange, route: Route, scope: Scope, send: Send, body: bytes) -> None:
        if self._handle is None or not self.running:
            raise refusal(503, self.failed or "no replica is there yet; ask /ready until it answers 200")
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        watch = asyncio.ensure_future(exchange.cancel_when_gone(task))
        response = None
        try:
            if body:
                threads, loop = self._threads[len(body) > LONG_BODY_BYTES], asyncio.get_running_loop()
                route.points = await loop.run_in_executor(threads, self._points, exchange, body)
            response = self._handle.answer.remote(_plain(exchange, scope), body, route=route)
            waits: float | None = self.settings.queue_s + REPORT_S  # then from its head on, as long as it takes
            more = True
            while more:
                async with asyncio.timeout(waits):
                    status, headers, content, more = await anext(response)
                if status:
                    waits, exchange.status = None, status
                    exchange.streams = any(k == b"content-type" and v.startswith(STREAM) for k, v in headers)
                    headers.append((b"x-pelagos-replica", route.replica.encode()))
                    await send({"type": "http.response.start", "status": status, "headers": headers})
                for begin in range(0, len(content) or 1, SEND_BYTES):
                    end = begin + SEND_BYTES
                    said = {"body": content[begin:end], "more_body": more or end < len(content)}
                    if said["body"] or not more:
                        await send({"type": "http.response.body", **said})
            watch.cancel()  # a client that closes now has all of it
            with contextlib.suppress(TimeoutError, RayActorError):
                async with asyncio.timeout(REPORT_S):
                    await anext(response, None)
        except asyncio.CancelledError:
            if not (exchange.is_gone or self.traffic.draining):
                raise
            task.uncancel()
            if not exchange.is_gone:
                raise refusal(503, "the server is ending") from None
            exchange.status = exchange.status or 499
        except TimeoutError:
            raise refusal(503, f"no replica answered within {self.settings.queue_s + REPORT_S:g} s") from None
        finally:
            self._under_way.discard(task)
            watch.cancel()
            route.is_over = True
            if route.replica and not exchange.status:  # an error says too whose it is
                exchange.more_headers.append((b"x-pelagos-replica", route.replica.encode()))
            if response is not None:
                response.cancel()

    def _points(self, exchange: Exchange, body: bytes) -> Any:
        """Return the points of a conversation; none of a body that is wrong, which the replica refuses."""
        assert exchange.api is not None
        try:
            ask = exchange.api.read(parse_body(body), self.settings.card)
            return self._hasher.points(ask, exchange.key.name if exchange.key else "")
        except Exception:  # whatever is wrong with it, the replica says so
            return ()

    async def _break(self, exchange: Exchange, send: Send, error: Exception) -> None:
        """Say why there is no answer, or why it ends here, in the protocol's form."""
        status, message, headers = _explain(error)
        if isinstance(error, RayActorError):
            self._lost.inc()
        api = exchange.api or APIS[0]
        if not exchange.status:
            await exchange.respond(status, api.error(status, message), headers)
            return
        if exchange.streams and exchange.kind == "responses":
            about = {"type": "error", "code": "server_error", "message": message, "param": None}
            text = wire.frame(about, named=True)
        elif exchange.streams:
            is_named = exchange.kind == "messages"
            text = wire.frame(api.error(status, message), named=is_named) + ("" if is_named else wire.DONE)
        else:
            text = json.dumps(api.error(status, message), ensure_ascii=False)
        with contextlib.suppress(RuntimeError):  # a body of a stated length, cut short: the connection is closed
            await send({"type": "http.response.body", "body": text.encode()})

    def _finish(self, exchange: Exchange, route: Route) -> None:
        self._requests.labels(exchange.kind, str(exchange.status)).inc()
        fields: dict[str, Any] = {
            "request_id": exchange.id, "api": exchange.kind, "method": exchange.method, "status": exchange.status,
            "ms": round((time.perf_counter() - exchange.began) * 1e3, 1), "key": exchange.key and exchange.key.name,
        }  # fmt: skip
        if route.replica:
            self._routed.labels(route.why).inc()
            self._bytes.inc(route.size)
            self._known.inc(route.reach)
            self._entries.set(route.entries)
            fields |= {"replica": route.replica, "why": route.why, "bytes": route.size, "known_bytes": route.reach}
        fields |= {"gone": True} if exchange.is_gone else {}
        level = logging.DEBUG if exchange.kind == "read" and exchange.status < 400 else logging.INFO
        _log.log(level, "request", extra={"fields": fields})

    async def _reports(self) -> list[dict[str, Any]]:
        """What each replica says of itself; one that does not answer is left out."""
        if self._handle is None or not self.running:
            return []
        try:
            answers = self._handle.broadcast("report").results_async(timeout_s=REPORT_S, return_exceptions=True)
            said = await asyncio.wait_for(answers, REPORT_S + 1)
        except (TimeoutError, DeploymentUnavailableError):
            return []
        return sorted((each for each in said if isinstance(each, dict)), key=lambda each: each["replica"])

    def _about(self) -> dict[str, Any]:
        about = {"status": self.status, "model": self.settings.card.model, "replicas": self.states}
        return about | {"replicas_wanted": self.wanted} | ({"error": self.failed} if self.failed else {})

    async def _health(self) -> tuple[int, Any, str]:
        return 200, self._about(), "application/json"

    async def _ready(self) -> tuple[int, Any, str]:
        return (200 if self.status == "ready" else 503), self._about(), "application/json"

    async def _stats(self) -> tuple[int, Any, str]:
        reports = await self._reports()
        total: dict[str, Any] = {}
        for each in reports:
            total = added(total, each["stats"])
        here = {"uptime_seconds": time.monotonic() - self._began, "in_flight": self.traffic.in_flight}
        each = [{key: report[key] for key in ("replica", "pid", "state", "stats")} for report in reports]
        return 200, self._about() | total | here | {"by_replica": each}, "application/json"

    async def _metrics(self) -> tuple[int, Any, str]:
        self._in_flight.set(self.traffic.in_flight)
        self._replicas.clear()
        for state, count in self.states.items():
            self._replicas.labels(state).set(count)
        texts = {report["replica"]: report["metrics"].decode() for report in await self._reports()}
        return 200, generate_latest(self._registry) + generate_latest(Labelled(texts)), "text/plain; version=0.0.4"


class Labelled:
    """The metrics of all replicas in one, each sample with the label `replica`."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        """`texts` are expositions by replica."""
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        """Yield the families, each once."""
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                ours = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                ours.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
        yield from families.values()


def added(total: Any, more: Any) -> Any:
    """Return the sum of two statistics of one form: numbers added, tables field by field."""
    if isinstance(more, dict):
        base = total if isinstance(total, dict) else {}
        return base | {key: added(base.get(key), value) for key, value in more.items()}
    is_number = isinstance(more, (int, float)) and not isinstance(more, bool)
    return more + total if is_number and isinstance(total, (int, float)) else more


def _plain(exchange: Exchange, scope: Scope) -> dict[str, Any]:
    """Return the request's head as a replica's application is to see it."""
    headers = [(k, v) for k, v in scope["headers"] if k not in (*_CONNECTION, b"x-request-id")]
    kept = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "client")
    given = {name: scope[name] for name in kept if name in scope}
    return given | {"asgi": {"version": "3.0"}, "headers": [*headers, (b"x-request-id", exchange.id.encode())]}


def _explain(error: Exception) -> tuple[int, str, Mapping[str, str] | None]:
    """Status, message and headers of an error."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), error.headers
    again = {"Retry-After": "1"}
    if isinstance(error, RayActorError):
        return 503, "the replica that computed this answer ended before it was complete; ask again", again
    if isinstance(error, DeploymentUnavailableError):
        return 503, "no replica is there", again
    if isinstance(error, BackPressureError):
        return 429, "all replicas are full", again
    _log.error("the front failed", exc_info=error)
    return 500, f"the front failed ({type(error).__name__}); its log says where", None


def main(argv: Sequence[str] | None = None) -> None:
    """Start the replicas and serve until told to end."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.replicas", allow_abbrev=False,
        description="Several engines behind one front door, through Ray Serve; all settings of `pelagos serve` too.",
    )  # fmt: skip
    cores = os.cpu_count() or 1
    parser.add_argument("--replicas", type=int, default=2, help="engines")
    parser.add_argument("--cpus", type=float, help="processors of each (default: this machine's, shared out)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each")
    parser.add_argument("--entries", type=int, default=200_000, help="points of conversations the router remembers")
    parser.add_argument("--address", help="a running Ray cluster, such as auto (default: start one here)")
    args, rest = parser.parse_known_args(argv)
    settings = read_settings(rest)
    if args.replicas < 1 or args.entries < 1:
        raise ConfigError(f"replicas={args.replicas}, entries={args.entries}: expected at least 1")
    cpus = args.cpus or max(1, cores // args.replicas)
    resolve_model(settings.model)  # here it is said at once what is wrong with it
    listener, keys = listen(settings)
    front = Front(settings, keys, replicas=args.replicas)
    server = Server(front)  # type: ignore[arg-type]
    url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{listener.getsockname()[1]}"

    def tell(status: str) -> None:
        if status == "failed":
            server.should_exit = True
        elif status == "ready":
            print(f"Pelagos serves {settings.card.model} at {url}", file=sys.stderr, flush=True)

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    with tempfile.TemporaryDirectory(prefix="pelagos-turns-") as turns, logging_to_stderr(settings.log_level):
        here = {"num_cpus": cpus * args.replicas, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        ray.init(
            address=args.address or "local",
            logging_level=logging.WARNING,
            log_to_driver=False,
            **({} if args.address else here),
        )
        try:
            serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
            app = deployment(
                settings, keys, Path(turns), replicas=args.replicas, cpus=cpus, gpus=args.gpus, entries=args.entries
            )
            target = serve.RunTarget(app, name=APP, route_prefix=None)
            [handle] = serve.run_many([target], wait_for_applications_running=False)
            front.attach(handle.options(stream=True), tell)
            print(f"the front listens at {url}; {args.replicas} replicas are starting", file=sys.stderr, flush=True)
            server.run(sockets=[listener])
        finally:
            if args.address:  # another's cluster, and what else it serves, goes on
                serve.delete(APP)
            else:
                serve.shutdown()
            ray.shutdown()
    if front.failed:
        raise ConfigError(front.failed)
