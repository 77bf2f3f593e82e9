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

from pelagos.engine import LLM, ChatTurn
from pelagos.errors import ContextLengthError, MissingDependency, PelagosError, RequestError
from pelagos.serve.protocol import ChatReply, check_body, error_body, parse_body
from pelagos.serve.worker import Worker

PAGE = Path(__file__).parent / "page"
MAX_BODY_BYTES = 32 * 2**20
KEEP_ALIVE_SECONDS = 5.0
# The page needs nothing from elsewhere, and no text of a model may ever run as a script.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_log = logging.getLogger(__name__)


def create_app(llm: LLM | Callable[[], LLM], *, model_name: str, max_tokens: int = 8192) -> FastAPI:
    """Build the application over a loaded LLM, or over a function that loads one once the server runs.

    Until the model is there, `/health` and the chat routes answer 503. `max_tokens` bounds answers of requests
    that name no bound; the worker is at `app.state.worker`.
    """
    worker = Worker(llm if not isinstance(llm, LLM) else lambda: llm)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(title="Pelagos", lifespan=lifespan, openapi_url=None)
    app.state.worker = worker
    _handle_errors(app)
    card = {"id": model_name, "object": "model", "created": 0, "owned_by": "pelagos"}

    @app.get("/health")
    async def health() -> Response:
        ready = worker.llm is not None
        return JSONResponse({"status": "ready" if ready else "loading", "model": model_name}, 200 if ready else 503)

    @app.get("/v1/models")
    @app.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    @app.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != model_name:
            raise HTTPException(404, f"model {name!r} is not here; this server has {model_name!r}")
        return card

    @app.post("/v1/chat/completions")
    @app.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = parse_body(await _read(request))
        stream = check_body(body, model_name)
        if worker.llm is None:
            raise HTTPException(503, "the model is still loading; ask /health until it answers 200")
        turn = await run_in_threadpool(worker.llm.chat, body, max_tokens=max_tokens)
        reply = ChatReply(model_name, turn)
        if stream:
            return StreamingResponse(_sse(worker, turn, reply), media_type="text/event-stream", headers=_NO_STORE)
        return await _while_connected(request, _whole(worker, turn, reply))

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


_NO_STORE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request body is over {MAX_BODY_BYTES} bytes")
    return bytes(body)


async def _sse(worker: Worker, turn: ChatTurn, reply: ChatReply) -> AsyncIterator[str]:
    """The server-sent events of one answer; closing this iterator cancels the turn."""
    yield _event(reply.first())
    try:
        async for event in worker.events(turn, keep_alive=KEEP_ALIVE_SECONDS):
            if event is None:
                yield ": keep-alive\n\n"
            elif event.kind != "finish":
                yield _event(reply.middle(event))
        yield _event(reply.last())
    except PelagosError as error:
        yield _event(error_body(str(error), "internal_error"))
    except Exception:
        _log.exception("a streamed answer broke off")
        yield _event(error_body("the server failed; its log says why", "internal_error"))
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _whole(worker: Worker, turn: ChatTurn, reply: ChatReply) -> Response:
    async for _ in worker.events(turn, keep_alive=KEEP_ALIVE_SECONDS):
        pass
    return JSONResponse(reply.whole())


async def _while_connected(request: Request, answer: Any) -> Response:
    """Await the answer, or cancel it when the client leaves first."""
    work = asyncio.ensure_future(answer)
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


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(PelagosError)
    async def pelagos_error(_: Request, error: PelagosError) -> Response:
        if isinstance(error, ContextLengthError):
            return JSONResponse(error_body(str(error), code="context_length_exceeded"), 400)
        if isinstance(error, RequestError):
            return JSONResponse(error_body(str(error)), 400)
        return JSONResponse(
            error_body(str(error), "internal_error"), 501 if isinstance(error, MissingDependency) else 500
        )

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        kind = "internal_error" if error.status_code >= 500 else "invalid_request_error"
        return JSONResponse(error_body(str(error.detail), kind), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return JSONResponse(
            error_body(f"the server failed ({type(error).__name__}); its log says why", "internal_error"), 500
        )
