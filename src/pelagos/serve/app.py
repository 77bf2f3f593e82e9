"""The ASGI application: the way of a request, the one table from errors to HTTP codes, and what is read (GET).

Every route answers with and without `/v1`, and under the `/beta` and `/anthropic` base URLs of DeepSeek's API. Bad
input is a 4xx with the protocol's error object, never a 500.
"""

import asyncio
import dataclasses
import html
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from pelagos.chat.parser import Event
from pelagos.engine import LLM, EngineStats
from pelagos.engine.disk_file import USER_OF_KEY
from pelagos.errors import CapacityError, ContextLengthError, FormError, MissingDependency, PelagosError, RequestError
from pelagos.serve.answer import Answer, Shared, prompt_ids
from pelagos.serve.ask import Ask, Card
from pelagos.serve.exchange import ClientGone, Exchange
from pelagos.serve.keys import KeyFile
from pelagos.serve.limits import READING, Traffic, check_origin, find_key, refusal
from pelagos.serve.metrics import Metrics
from pelagos.serve.protocols import APIS
from pelagos.serve.protocols.wire import Api
from pelagos.serve.settings import Settings

PAGE = Path(__file__).parent / "page"
PAGES = {"/": "/index.html", "/dashboard": "/dashboard.html"}
OPEN = ("/health", "/ready", "/openapi.json", "/docs")  # to clients without a key, as the page is
# The page needs nothing from elsewhere, and no text of a model may ever run as a script. It is asked about each time,
# so that modules of two versions are never mixed.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
STATUSES: tuple[tuple[type[PelagosError], int, str | None], ...] = (
    (ContextLengthError, 400, "context_length_exceeded"),
    (FormError, 422, None),
    (RequestError, 400, None),
    (CapacityError, 413, "context_length_exceeded"),
    (MissingDependency, 501, None),
)
_PREPARING_THREADS = 2
LONG_BODY_BYTES = 64 << 10
Read = Callable[["App"], tuple[int, Any]]  # what answers GET: a status and a body
_log = logging.getLogger(__name__)


def canonical(path: str) -> str:
    """Return a request's path without the prefixes that base URLs add, and without a slash at its end."""
    for prefix in ("/beta", "/anthropic", "/v1"):
        if path.startswith(f"{prefix}/"):
            path = path[len(prefix) :]
    return path.rstrip("/") or "/"


class App:
    """The application over a loaded LLM, or over a function that loads one once the server runs.

    Until the model is there, `/ready` and the API answer 503.
    """

    def __init__(
        self, llm: LLM | Callable[[], LLM], *, card: Card | None = None, settings: Settings | None = None,
        keys: KeyFile | None = None,
    ) -> None:  # fmt: skip
        """`card` None takes the settings'; without `keys` nobody needs one."""
        self.settings = settings or Settings()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loading")  # the event loop stays free meanwhile
        self.loading = self._loader.submit(llm if not isinstance(llm, LLM) else lambda: llm)
        self.traffic = Traffic(self.settings.max_requests + self.settings.max_queued)
        self.metrics = Metrics(lambda: EngineStats() if self.llm is None else self.llm.stats())
        self._card, self._keys = card or self.settings.card, keys
        self._threads = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="prepare")
        self._long = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="prepare-long")
        self._shared = Shared(self.settings.disk_dir)
        self._answers: set[Answer] = set()
        self._apis = {canonical(path): api for api in APIS for path in (*api.paths, *api.count_paths)}
        self._counts = {canonical(path) for api in APIS for path in api.count_paths}
        self._files = StaticFiles(directory=PAGE)

    @property
    def llm(self) -> LLM | None:
        """The model once it is loaded; None before that and after a failed load."""
        done = self.loading.done() and not self.loading.cancelled() and self.loading.exception() is None
        return self.loading.result() if done else None

    @property
    def card(self) -> Card:
        """What the server says of itself; the model's own bounds once it is there."""
        if (llm := self.llm) is None:
            return self._card
        length = min(self._card.context_length, llm.config.max_position_embeddings)
        return dataclasses.replace(self._card, generation=llm.generation, context_length=length)

    @property
    def status(self) -> str:
        """loading, ready, failed or draining."""
        if self.traffic.draining:
            return "draining"
        return "ready" if self.llm is not None else "failed" if self.loading.done() else "loading"

    def cancel_answers(self) -> None:
        """End all answers that still run; their clients are told."""
        for answer in self._answers:
            answer.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request, or see the server begin and end."""
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            for threads in (self._threads, self._long, self._loader):  # a load that has begun is waited for
                threads.shutdown(cancel_futures=True)
            if self.llm is not None:
                self.llm.close()
            self._shared.close()
            await send({"type": "lifespan.shutdown.complete"})
            return
        exchange = Exchange(scope, receive, send, canonical(scope["path"]))
        try:
            await self._route(exchange, scope)
        except ClientGone:
            exchange.is_gone, exchange.status = True, 499
        except Exception as error:
            await self._fail(exchange, error)
        finally:
            self.metrics.finish(exchange)

    async def _route(self, exchange: Exchange, scope: Scope) -> None:
        path, method, read = exchange.path, exchange.method, find_read(exchange.path)
        exchange.api, is_page = self._apis.get(path), path in PAGES or path.startswith("/page/")
        exchange.kind = type(exchange.api).__name__.lower() if exchange.api else "page" if is_page else "read"
        allowed = ("POST", "OPTIONS") if exchange.api else READING
        check_origin(exchange, self.settings)
        if method == "OPTIONS":
            await exchange.respond(204, b"", {"Allow": ", ".join(allowed)})
            return
        if not is_page and path not in OPEN:
            exchange.key = find_key(exchange, self._keys)
        if not (exchange.api or read or is_page):
            raise HTTPException(404, f"nothing is at {path}; /openapi.json lists what is")
        if method not in allowed:
            served = ", ".join(allowed)
            raise HTTPException(405, f"{method} is not served here: {served}", {"Allow": served})
        if exchange.api:
            await self._answer(exchange, exchange.api)
        elif read:
            status, body = read(self)
            kinds = {"/docs": "text/html; charset=utf-8", "/metrics": "text/plain; version=0.0.4"}
            kind = kinds.get(path, "application/json")
            await exchange.respond(status, body, {"Content-Type": kind, **PAGE_HEADERS})
        else:
            exchange.more_headers += [(name.lower().encode(), value.encode()) for name, value in PAGE_HEADERS.items()]
            file = PAGES.get(path, path.removeprefix("/page"))
            await self._files({**scope, "path": file, "root_path": ""}, exchange.receive, exchange.send)

    async def _answer(self, exchange: Exchange, api: Api) -> None:
        if (llm := self.llm) is None:
            raise refusal(503, "the model is still loading; ask /ready until it answers 200")
        with self.traffic.admitted(exchange.key):
            raw = await exchange.read(self.settings.body_bytes, self.settings.body_s)
            task = asyncio.current_task()
            assert task is not None
            watch = asyncio.ensure_future(exchange.cancel_when_gone(task))
            try:
                await self._generate(exchange, api, llm, raw)
            except asyncio.CancelledError:
                if not exchange.is_gone:
                    raise
                task.uncancel()
                exchange.status = exchange.status or 499
            finally:
                watch.cancel()
                if exchange.answer is not None:
                    exchange.answer.cancel()
                    self._answers.discard(exchange.answer)

    async def _generate(self, exchange: Exchange, api: Api, llm: LLM, raw: bytes) -> None:
        exchange.phase, card = "queue", self.card
        exchange.model = card.model
        loop = asyncio.get_running_loop()

        def prepare() -> tuple[Ask, Answer | int]:
            ask = api.read(parse_body(raw), card)
            user = ask.user_id if exchange.key is None else USER_OF_KEY.format(exchange.key.name, ask.user_id)
            ask = dataclasses.replace(ask, user_id=user, timeout_s=self.settings.deadline_s)
            if exchange.path in self._counts:
                return ask, len(prompt_ids(llm, ask, shared=self._shared))
            return ask, Answer(llm, ask, card, loop, self._shared)

        # Long bodies take seconds: they wait for one another, not short ones for them.
        prepared = loop.run_in_executor(self._long if len(raw) > LONG_BODY_BYTES else self._threads, prepare)
        try:
            ask, answer = await asyncio.shield(prepared)
        except asyncio.CancelledError:
            prepared.add_done_callback(_drop)
            raise
        if isinstance(answer, int):
            await exchange.respond(200, api.count(answer))
            return
        exchange.answer, exchange.streams = answer, ask.stream
        exchange.more_headers += [(b"x-pelagos-warning", warning.encode("ascii")) for warning in answer.warnings]
        self._answers.add(answer)
        await self._send(exchange, api, ask, answer, card)

    async def _send(self, exchange: Exchange, api: Api, ask: Ask, answer: Answer, card: Card) -> None:
        """Send one answer as events or as one object; what breaks it off once it has begun becomes the end of it.

        While a client waits, comments or blank lines before the object show that the server lives.
        """
        writer = api.writer(ask, answer, card)
        try:
            async for events in answer.events(keep_alive=self.settings.keep_alive_s):
                if events is None:
                    self._check_wait(exchange)
                    await exchange.write("".join(writer.keep_alive()) if ask.stream else "\n")
                    continue
                frames: list[str] = []
                if exchange.first is None:
                    exchange.first, exchange.phase = time.perf_counter(), "answer"
                    frames += writer.open() if ask.stream else []
                for event in (events if ask.logprobs is not None else merged(events)) if ask.stream else ():
                    if event.kind != "finish":
                        frames += writer.push(event)
                if frames:
                    await exchange.write("".join(frames))
            if ask.stream:
                await exchange.write("".join(writer.close()), more=False)
            elif exchange.status:
                await exchange.write(json.dumps(writer.whole(), ensure_ascii=False), more=False)
            else:
                await exchange.respond(200, writer.whole())
        except Exception as error:
            if not (exchange.status and ask.stream):
                raise
            status, message, *_ = _explain(exchange, error)
            await exchange.write("".join(writer.fail(status, message)), more=False)

    def _check_wait(self, exchange: Exchange) -> None:
        if exchange.first is None and time.perf_counter() - exchange.began > self.settings.queue_s:
            raise refusal(503, f"no token came within {self.settings.queue_s:g} s")

    async def _fail(self, exchange: Exchange, error: Exception) -> None:
        status, message, code, headers = _explain(exchange, error)
        param = "messages" if code == "context_length_exceeded" else None
        body = (exchange.api or APIS[0]).error(status, message, code, param)
        if not exchange.status:
            await exchange.respond(status, body, headers)
        elif exchange.api is not None:
            await exchange.write(json.dumps(body, ensure_ascii=False), more=False)


def _explain(exchange: Exchange, error: Exception) -> tuple[int, str, str | None, dict[str, str] | None]:
    """Status, message, code and headers of an error; what is our fault is logged."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), None, dict(error.headers or {})
    for kind, status, code in STATUSES:
        if isinstance(error, kind):
            return status, str(error), code, None
    _log.error("the server failed", exc_info=error, extra={"fields": {"request_id": exchange.id}})
    said = f"the server failed ({type(error).__name__}); its log says where"
    return 500, str(error) if isinstance(error, PelagosError) else said, None, None


def merged(events: Sequence[Event]) -> list[Event]:
    """Return events with texts that belong together in one: what came while the server was busy is sent at once."""
    out: list[Event] = []
    for (kind, index), run in itertools.groupby(events, key=lambda event: (event.kind, event.index)):
        same = list(run)
        joined = len(same) > 1 and kind in ("reasoning", "content", "arguments")
        out += [Event(kind, "".join(event.text for event in same), index)] if joined else same
    return out


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in `raw`; raises RequestError for anything that is not one in valid Unicode."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
        if b"\\ud" in raw or b"\\uD" in raw:  # half a character is legal JSON, but no text that can be tokenised
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is not valid JSON text ({error})") from None
    if not isinstance(body, dict):
        raise RequestError(f"the request body is a JSON {type(body).__name__}: expected an object")
    return body


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no JSON number")
    return number


def _drop(prepared: asyncio.Future[tuple[Ask, Answer | int]]) -> None:
    """End what was made for a client that has gone."""
    if not prepared.cancelled() and prepared.exception() is None:
        answer = prepared.result()[1]
        if isinstance(answer, Answer):
            answer.cancel()


def find_read(path: str) -> Read | None:
    """Return what answers GET of a path, without prefixes, with a status and a body; None where nothing does."""
    name = path.removeprefix("/models/")
    if name != path:
        return lambda app: (200, _model(app, name))
    return READS[path][1] if path in READS else None


def _state(app: App) -> dict[str, Any]:
    return {"status": app.status, "model": app.card.model, "context_length": app.card.context_length}


def _model(app: App, name: str | None = None) -> dict[str, Any]:
    card = app.card
    if name not in (None, card.model):
        raise HTTPException(404, f"model {name!r} is not here; this server has {card.model!r}")
    about = {"id": card.model, "object": "model", "created": 0, "owned_by": "pelagos"}
    return about | {"context_length": card.context_length}


def document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document; the schemas of requests are those beside the protocols."""
    answers = {"200": {"description": "As asked."}, "default": {"description": "An error object of the protocol."}}
    paths: dict[str, Any] = {}
    for path, (about, _) in READS.items():
        paths[path] = {"get": {"summary": about, "responses": answers}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    found = {"summary": "The model of that name.", "parameters": [name], "responses": answers}
    paths["/models/{name}"] = {"get": found}
    for api in APIS:
        for path in (*api.paths, *api.count_paths):
            body = {"required": True, "content": {"application/json": {"schema": api.schema}}}
            paths[path] = {"post": {"summary": api.summary, "requestBody": body, "responses": answers}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pelagos", "version": "1", "description": "Every path answers with /v1 and without."},
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        },
        "security": [{}, {"key": []}, {"header": []}],
    }


def listing() -> bytes:
    """Return the document as a page to read: each path, what it is for, and the fields of its body."""
    rows = []
    for path, ways in document()["paths"].items():
        for method, about in ways.items():
            content = about.get("requestBody", {}).get("content", {}).get("application/json", {})
            fields = ", ".join(content.get("schema", {}).get("properties", ()))
            cells = (f"{method.upper()} {path}", about["summary"], fields)
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "<!doctype html><html lang=en><meta charset=utf-8><title>Pelagos API</title><h1>Pelagos API</h1>"
    return f'{head}<p><a href="/openapi.json">openapi.json</a></p><table>{"".join(rows)}</table></html>'.encode()


READS: dict[str, tuple[str, Read]] = {
    "/health": ("What the server is doing; it lives.", lambda app: (200, _state(app))),
    "/ready": (
        "200 once the model is there and has answered once; 503 before, and while the server ends.",
        lambda app: (200 if app.status == "ready" else 503, _state(app)),
    ),
    "/stats": (
        "The engine's statistics, and how fast they grow.",
        lambda app: (200, _state(app) | app.metrics.report(app.traffic.in_flight)),
    ),
    "/metrics": ("The same in the Prometheus text format.", lambda app: (200, app.metrics.text(app.traffic.in_flight))),
    "/models": ("The models served: one.", lambda app: (200, {"object": "list", "data": [_model(app)]})),
    "/openapi.json": ("This document.", lambda app: (200, document())),
    "/docs": ("This document as a page.", lambda app: (200, listing())),
}
