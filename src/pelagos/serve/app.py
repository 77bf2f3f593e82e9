"""The ASGI application: what every request passes, the way of a request, and the one table from errors to HTTP codes.

Every route answers with and without `/v1`, and under the `/beta` and `/anthropic` base URLs of DeepSeek's API. Bad
input is a 4xx with the protocol's error object, never a 500.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from pelagos.engine import LLM, EngineStats
from pelagos.errors import CapacityError, ContextLengthError, FormError, MissingDependency, PelagosError, RequestError
from pelagos.serve.answer import Answer, Shared, prompt_ids
from pelagos.serve.ask import Api, Ask, Card
from pelagos.serve.exchange import ClientGone, Exchange
from pelagos.serve.keys import Key, KeyFile
from pelagos.serve.limits import Traffic, refusal
from pelagos.serve.loading import Loading
from pelagos.serve.metrics import Metrics
from pelagos.serve.openapi import document, listing
from pelagos.serve.protocols import APIS
from pelagos.serve.settings import Settings

PAGE = Path(__file__).parent / "page"
PAGES = ("/", "/dashboard", "/docs", "/openapi.json")
PROBES = ("/health", "/ready", "/metrics", "/stats")
# The page needs nothing from elsewhere, and no text of a model may ever run as a script.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
KEEP_ALIVE = ": keep-alive\n\n"
_PREPARING_THREADS = 4
_log = logging.getLogger(__name__)


def canonical(path: str) -> str:
    """Return a request's path without the prefixes that base URLs add, and without a slash at its end."""
    for prefix in ("/beta", "/anthropic", "/v1"):
        if path.startswith(f"{prefix}/"):
            path = path[len(prefix) :]
    return path.rstrip("/") or "/"


def hostname(host: str) -> str:
    """Return the name in a Host header or an origin, without scheme and port."""
    host = host.rpartition("://")[2].lower()
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


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
        self._card = card or self.settings.card
        self._keys = keys
        self.loading = Loading(llm if not isinstance(llm, LLM) else lambda: llm)
        self.traffic = Traffic(self.settings.max_requests + self.settings.max_queued)
        self.metrics = Metrics(self._stats)
        self._threads = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="prepare")
        self._shared = Shared(self.settings.disk_dir)
        self._answers: set[Answer] = set()
        self._apis = {canonical(path): api for api in APIS for path in (*api.paths, *api.count_paths)}
        self._counts = {canonical(path) for api in APIS for path in api.count_paths}
        hosts = ["localhost", "127.0.0.1", "[::1]"] if is_loopback(self.settings.host) else []
        self._hosts = {*hosts, *map(hostname, self.settings.allowed_hosts)}
        self._pages = self._starlette()

    @property
    def card(self) -> Card:
        """What the server says of itself; the model's own bounds once it is there."""
        if (llm := self.loading.llm) is None:
            return self._card
        length = min(self._card.context_length, llm.config.max_position_embeddings)
        return dataclasses.replace(self._card, generation=llm.generation, context_length=length)

    @property
    def status(self) -> str:
        """loading, ready, failed or draining."""
        return "draining" if self.traffic.draining else self.loading.status

    def cancel_answers(self) -> None:
        """End all answers that still run; their clients are told."""
        for answer in self._answers:
            answer.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of ASGI."""
        if scope["type"] != "http":
            await self._pages(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, canonical(scope["path"]))
        try:
            await self._serve(exchange, scope)
        except ClientGone:
            exchange.is_gone, exchange.status = True, 499
        except Exception as error:
            await self._fail(exchange, error)
        finally:
            self.metrics.finish(exchange)

    async def _serve(self, exchange: Exchange, scope: Scope) -> None:
        path, method = exchange.path, exchange.method
        exchange.api = self._apis.get(path)
        exchange.api_name = (
            type(exchange.api).__name__.lower() if exchange.api
            else "probe" if path in PROBES
            else "page" if path in PAGES or path.startswith("/page/")
            else "models" if path.startswith("/models") else "other"
        )  # fmt: skip
        self._check_origin(exchange)
        if method == "OPTIONS":
            allowed = "POST, OPTIONS" if exchange.api else "GET, HEAD, OPTIONS"
            await exchange.respond(204, None, {"Allow": allowed})
            return
        if exchange.api_name != "page" and path not in ("/health", "/ready"):
            exchange.key = self._find_key(exchange)
        if exchange.api is None:
            await self._pages({**scope, "path": path, "raw_path": path.encode()}, exchange.receive, exchange.send)
        elif method != "POST":
            raise HTTPException(405, f"{method} is not served here: POST", {"Allow": "POST, OPTIONS"})
        else:
            await self._answer(exchange, exchange.api)

    def _check_origin(self, exchange: Exchange) -> None:
        """Refuse what a foreign web page sends: by another name of this address, or from another origin."""
        host, origin = (exchange.headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if self._hosts and host and hostname(host) not in self._hosts:
            raise HTTPException(403, f"Host {host!r} is not served here; allowed_hosts in the settings adds names")
        if not origin:
            return
        allowed = self.settings.cors_origins
        if origin in allowed or "*" in allowed:
            asked = exchange.headers.get(b"access-control-request-headers", b"authorization, content-type, x-api-key")
            exchange.more_headers += [
                (b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin"),
                (b"access-control-allow-methods", b"GET, POST, OPTIONS"), (b"access-control-allow-headers", asked),
                (b"access-control-expose-headers", b"x-request-id, retry-after"),
            ]  # fmt: skip
        elif exchange.method == "POST" and origin.rpartition("://")[2].lower() != host.lower():
            raise HTTPException(403, f"origin {origin!r} may not call; cors_origins in the settings adds some")

    def _find_key(self, exchange: Exchange) -> Key | None:
        if self._keys is None or not self._keys.is_needed():
            return None
        kind, _, token = exchange.headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        given = (
            token.strip() if kind.lower() == "bearer" else "",
            exchange.headers.get(b"x-api-key", b"").decode("latin-1"),
        )
        for secret in filter(None, given):
            if key := self._keys.find(secret):
                return key
        said = "Authentication failed: give a valid API key as `Authorization: Bearer KEY` or in `x-api-key`"
        raise HTTPException(401, said, {"WWW-Authenticate": "Bearer"})

    async def _answer(self, exchange: Exchange, api: Api) -> None:
        if (llm := self.loading.llm) is None:
            raise refusal(503, "the model is still loading; ask /ready until it answers 200", 5)
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

        def prepare() -> tuple[Ask, Answer | None, int]:
            ask = api.read(parse_body(raw), card)
            if exchange.path in self._counts:
                return ask, None, len(prompt_ids(llm, ask))
            user = ask.user_id if exchange.key is None else f"{exchange.key.name}\0{ask.user_id}"
            ask = dataclasses.replace(ask, user_id=user, timeout_s=self.settings.deadline_s)
            return ask, Answer(llm, ask, card, loop, self._shared), 0

        prepared = loop.run_in_executor(self._threads, prepare)
        try:
            ask, answer, tokens = await asyncio.shield(prepared)
        except asyncio.CancelledError:
            prepared.add_done_callback(_drop)
            raise
        if answer is None:
            await exchange.respond(200, api.count(tokens))
            return
        exchange.answer, exchange.streams = answer, ask.stream
        self._answers.add(answer)
        if ask.stream:
            await self._stream(exchange, api, ask, answer, card)
        else:
            await self._whole(exchange, api, ask, answer, card)

    async def _stream(self, exchange: Exchange, api: Api, ask: Ask, answer: Answer, card: Card) -> None:
        """Send the server-sent events of one answer; what breaks it off once it has begun becomes its last one."""
        writer = api.writer(ask, answer, card)
        try:
            async for events in answer.events(keep_alive=self.settings.keep_alive_s):
                if events is None:
                    self._check_wait(exchange)
                    await exchange.write(KEEP_ALIVE)
                    continue
                frames: list[str] = []
                if exchange.first is None:
                    exchange.first, exchange.phase = time.perf_counter(), "answer"
                    frames += writer.open()
                for event in events:
                    if event.kind != "finish":
                        frames += writer.push(event)
                if frames:
                    await exchange.write("".join(frames))
            await exchange.write("".join(writer.close()), more=False)
        except Exception as error:
            if not exchange.status:
                raise
            status, message, *_ = self._explain(exchange, error)
            await exchange.write("".join(writer.fail(status, message)), more=False)

    async def _whole(self, exchange: Exchange, api: Api, ask: Ask, answer: Answer, card: Card) -> None:
        """Send one answer as one object; blank lines before it show a waiting client that the server lives."""
        async for events in answer.events(keep_alive=self.settings.keep_alive_s):
            if events is None:
                self._check_wait(exchange)
                await exchange.write("\n")
            elif exchange.first is None:
                exchange.first, exchange.phase = time.perf_counter(), "answer"
        done = api.writer(ask, answer, card).whole()
        if exchange.status:
            await exchange.write(json.dumps(done, ensure_ascii=False), more=False)
        else:
            await exchange.respond(200, done)

    def _check_wait(self, exchange: Exchange) -> None:
        waited = time.perf_counter() - exchange.began
        if exchange.first is None and waited > self.settings.queue_s:
            raise refusal(
                503, f"no token came within {self.settings.queue_s:g} s", math.ceil(self.settings.queue_s / 10)
            )

    def _explain(self, exchange: Exchange, error: Exception) -> tuple[int, str, str | None, dict[str, str] | None]:
        """Status, message, code and headers of an error; what is our fault is logged."""
        if isinstance(error, HTTPException):
            return error.status_code, str(error.detail), None, dict(error.headers or {})
        for kind, status, code in STATUSES:
            if isinstance(error, kind):
                if status == 500:
                    _log.error("an answer broke off", exc_info=error, extra={"fields": {"request_id": exchange.id}})
                return status, str(error), code, None
        _log.error("the server failed", exc_info=error, extra={"fields": {"request_id": exchange.id}})
        return 500, f"the server failed ({type(error).__name__}); its log says why", None, None

    async def _fail(self, exchange: Exchange, error: Exception) -> None:
        status, message, code, headers = self._explain(exchange, error)
        param = "messages" if code == "context_length_exceeded" else None
        body = (exchange.api or APIS[0]).error(status, message, code, param)
        if not exchange.status:
            await exchange.respond(status, body, headers)
        elif exchange.api is not None:
            await exchange.write(json.dumps(body, ensure_ascii=False), more=False)

    def _stats(self) -> EngineStats:
        llm = self.loading.llm
        return EngineStats() if llm is None else llm.stats()

    def _starlette(self) -> Starlette:
        """What is read: probes, models, documents and the page."""

        async def health(_: Request) -> Response:
            return JSONResponse(self._state())

        async def ready(_: Request) -> Response:
            headers = None if self.status == "ready" else {"Retry-After": "1"}
            return JSONResponse(self._state(), 200 if self.status == "ready" else 503, headers)

        async def metrics(_: Request) -> Response:
            return Response(self.metrics.text(self.traffic.in_flight), media_type="text/plain; version=0.0.4")

        async def stats(_: Request) -> Response:
            return JSONResponse(self._state() | {"in_flight": self.traffic.in_flight} | self.metrics.report())

        async def models(_: Request) -> Response:
            return JSONResponse({"object": "list", "data": [self._listed()]})

        async def model(request: Request) -> Response:
            if (name := request.path_params["name"]) != self.card.model:
                raise HTTPException(404, f"model {name!r} is not here; this server has {self.card.model!r}")
            return JSONResponse(self._listed())

        async def page(request: Request) -> Response:
            return FileResponse(PAGE / f"{request.url.path.strip('/') or 'index'}.html", headers=PAGE_HEADERS)

        async def docs(_: Request) -> Response:
            return HTMLResponse(listing(APIS), headers=PAGE_HEADERS)

        async def openapi(_: Request) -> Response:
            return JSONResponse(document(APIS))

        async def refuse(_: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            return JSONResponse(APIS[0].error(error.status_code, str(error.detail)), error.status_code, error.headers)

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            self._threads.shutdown(cancel_futures=True)
            self.loading.close()
            self._shared.close()

        probes = (("/health", health), ("/ready", ready), ("/metrics", metrics), ("/stats", stats), ("/models", models))
        pages = (("/", page), ("/dashboard", page), ("/docs", docs), ("/openapi.json", openapi))
        routes = [Route(path, endpoint) for path, endpoint in (*probes, ("/models/{name:path}", model), *pages)]
        files = Mount("/page", _PageFiles(directory=PAGE), name="page")
        return Starlette(routes=[*routes, files], lifespan=lifespan, exception_handlers={HTTPException: refuse})

    def _state(self) -> dict[str, Any]:
        return {"status": self.status, "model": self.card.model, "context_length": self.card.context_length}

    def _listed(self) -> dict[str, Any]:
        about = {"id": self.card.model, "object": "model", "created": 0, "owned_by": "pelagos"}
        return about | {"context_length": self.card.context_length}


create_app = App


class _PageFiles(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """As they are, but asked about each time: modules of two versions are never mixed."""
        response = super().file_response(*args, **kwargs)
        response.headers.update({**PAGE_HEADERS, "Cache-Control": "no-cache"})
        return response


STATUSES: tuple[tuple[type[PelagosError], int, str | None], ...] = (
    (ContextLengthError, 400, "context_length_exceeded"),
    (FormError, 422, None),
    (RequestError, 400, None),
    (CapacityError, 413, "context_length_exceeded"),
    (MissingDependency, 501, None),
    (PelagosError, 500, None),
)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is of this machine alone."""
    return host in ("localhost", "::1") or host.startswith("127.")


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in `raw`; raises RequestError for anything that is not one in valid Unicode."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_number, parse_float=_finite)
        if b"\\ud" in raw or b"\\uD" in raw:  # half a character is legal JSON, but no text that can be tokenised
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is not valid JSON text ({error})") from None
    if not isinstance(body, dict):
        raise RequestError(f"the request body is a JSON {type(body).__name__}: expected an object")
    return body


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _drop(prepared: asyncio.Future[tuple[Ask, Answer | None, int]]) -> None:
    """End what was made for a client that has gone."""
    if not prepared.cancelled() and prepared.exception() is None and (answer := prepared.result()[1]) is not None:
        answer.cancel()
