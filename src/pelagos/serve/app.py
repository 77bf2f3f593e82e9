"""The FastAPI application: routes, the way of a request, and the one table from errors to HTTP codes.

Every route answers with and without `/v1`. Bad input is a 400 with the protocol's error object, never a 500.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from pelagos.engine import LLM
from pelagos.errors import ContextLengthError, MissingDependency, PelagosError, RequestError
from pelagos.serve.answer import Answer
from pelagos.serve.ask import Api, Ask, Card
from pelagos.serve.loading import Loading
from pelagos.serve.protocols import APIS

PAGE = Path(__file__).parent / "page"
MAX_BODY_BYTES = 32 * 2**20
KEEP_ALIVE_SECONDS = 5.0
# The page needs nothing from elsewhere, and no text of a model may ever run as a script.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_NO_STORE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_log = logging.getLogger(__name__)


def create_app(llm: LLM | Callable[[], LLM], *, card: Card) -> FastAPI:
    """Build the application over a loaded LLM, or over a function that loads one once the server runs.

    Until the model is there, `/health` and the API answer 503. What loads it is at `app.state.loading`.
    """
    loading = Loading(llm if not isinstance(llm, LLM) else lambda: llm)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        loading.close()

    app = FastAPI(title="Pelagos", lifespan=lifespan, openapi_url=None)
    app.state.loading = loading
    _handle_errors(app)
    listed = {"id": card.model, "object": "model", "created": 0, "owned_by": "pelagos"}

    @app.get("/health")
    async def health() -> Response:
        ready = loading.llm is not None
        return JSONResponse({"status": "ready" if ready else "loading", "model": card.model}, 200 if ready else 503)

    @app.get("/v1/models")
    @app.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [listed]}

    @app.get("/v1/models/{name:path}")
    @app.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != card.model:
            raise HTTPException(404, f"model {name!r} is not here; this server has {card.model!r}")
        return listed

    for api in APIS:
        for path in api.paths:
            app.add_api_route(path, _endpoint(api, card, loading), methods=["POST"])
            app.add_api_route(path.removeprefix("/v1"), _endpoint(api, card, loading), methods=["POST"])

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


def _endpoint(api: Api, card: Card, loading: Loading) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        ask = api.read(parse_body(await _read(request)), card)
        if loading.llm is None:
            raise HTTPException(503, "the model is still loading; ask /health until it answers 200")
        answer = await run_in_threadpool(Answer, loading.llm, ask, card, asyncio.get_running_loop())
        if ask.stream:
            frames = _stream(api, ask, answer, card)
            return StreamingResponse(frames, media_type="text/event-stream", headers=_NO_STORE)
        return await _while_connected(request, _whole(api, ask, answer, card))

    return endpoint


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in `raw`; raises RequestError for anything that is not one in valid Unicode."""
    try:
        body = json.loads(raw)
        # A lone surrogate (an escape such as \ud800) is legal JSON, but no text that can be tokenised.
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is not valid JSON text ({error})") from None
    if not isinstance(body, dict):
        raise RequestError(f"the request body is a JSON {type(body).__name__}: expected an object")
    return body


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request body is over {MAX_BODY_BYTES} bytes")
    return bytes(body)


async def _stream(api: Api, ask: Ask, answer: Answer, card: Card) -> AsyncIterator[str]:
    """The server-sent events of one answer; closing this iterator cancels it."""
    writer = api.writer(ask, answer, card)
    is_open = False
    try:
        async for events in answer.events(keep_alive=KEEP_ALIVE_SECONDS):
            if events is None:
                yield ": keep-alive\n\n"
                continue
            frames = [] if is_open else writer.open()
            is_open = True
            for event in events:
                if event.kind != "finish":
                    frames += writer.push(event)
            yield "".join(frames)
        yield "".join(writer.close())
    except PelagosError as error:
        yield "".join(writer.fail(500, str(error)))
    except Exception:
        _log.exception("a streamed answer broke off")
        yield "".join(writer.fail(500, "the server failed; its log says why"))


async def _whole(api: Api, ask: Ask, answer: Answer, card: Card) -> Response:
    async for _ in answer.events(keep_alive=KEEP_ALIVE_SECONDS):
        pass
    return JSONResponse(api.writer(ask, answer, card).whole())


async def _while_connected(request: Request, work: Any) -> Response:
    """Await the answer, or cancel it when the client leaves first."""
    work = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else Response(status_code=499)
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _api_of(request: Request) -> Api:
    """The protocol whose error object answers on this path; chat completions where none is asked for."""
    path = request.url.path
    return next((api for api in APIS if path in api.paths or f"/v1{path}" in api.paths), APIS[0])


def _handle_errors(app: FastAPI) -> None:
    def answer(request: Request, status: int, message: str, code: str | None = None, **more: Any) -> Response:
        param = "messages" if code == "context_length_exceeded" else None
        return JSONResponse(_api_of(request).error(status, message, code, param), status, **more)

    @app.exception_handler(PelagosError)
    async def pelagos_error(request: Request, error: PelagosError) -> Response:
        if isinstance(error, ContextLengthError):
            return answer(request, 400, str(error), "context_length_exceeded")
        status = 400 if isinstance(error, RequestError) else 501 if isinstance(error, MissingDependency) else 500
        return answer(request, status, str(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return answer(request, error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return answer(request, 500, f"the server failed ({type(error).__name__}); its log says why")
