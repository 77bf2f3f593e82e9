"""One HTTP request and its response, as ASGI messages."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from pelagos.serve.answer import Answer
    from pelagos.serve.ask import Api
    from pelagos.serve.keys import Key

Message = MutableMapping[str, Any]
_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)
_JSON = (b"content-type", b"application/json")
_EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
_NO_STORE = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]


class ClientGone(Exception):
    """The client closed its connection before the response was complete."""


class Exchange:
    """One request and its response, with what is logged and counted of them.

    `phase` is where the request is: head, body, queue (until the first token) or answer.
    """

    def __init__(
        self, scope: Mapping[str, Any], receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]], path: str,
    ) -> None:  # fmt: skip
        """`path` is the request's without the prefixes of base URLs."""
        self.began = time.perf_counter()
        self.path, self.method = path, scope["method"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        self.more_headers = [(b"x-request-id", self.id.encode()), (b"request-id", self.id.encode())]
        self.api: Api | None = None
        self.api_name, self.model, self.phase = "other", "", "head"
        self.key: Key | None = None
        self.answer: Answer | None = None
        self.streams, self.is_gone = False, False
        self.first: float | None = None
        self.status = 0
        self.receive, self._send = receive, send

    async def send(self, message: Message) -> None:
        """Pass on a message of the response: its head gets our headers, its status is remembered."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self.more_headers]
        await self._send(message)

    async def respond(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        """Send a whole response: an object as JSON, None as nothing."""
        content = b"" if body is None else json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        extra = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        head = [(b"content-length", str(len(content)).encode()), *([] if body is None else [_JSON]), *extra]
        await self.send({"type": "http.response.start", "status": status, "headers": head})
        await self.send({"type": "http.response.body", "body": content})

    async def write(self, text: str, *, more: bool = True) -> None:
        """Send a part of a body whose length is not known; the first part brings the head, with status 200."""
        if not self.status:
            head = [_EVENTS if self.streams else _JSON, *_NO_STORE]
            await self.send({"type": "http.response.start", "status": 200, "headers": head})
        await self._send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": more})

    async def read(self, limit: int, seconds: float) -> bytes:
        """Return the request's body; HTTPException 413 for more than `limit` bytes, 408 for one that takes too long."""
        self.phase = "body"
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    size += len(message.get("body", b""))
                    if size <= limit:
                        body += message.get("body", b"")
                    elif size > 2 * limit or not message.get("more_body"):  # who sends on is not read for ever
                        raise HTTPException(413, f"the request body is over {limit} bytes", {"Connection": "close"})
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            late = f"the request body was not here within {seconds:g} s"
            raise HTTPException(408, late, {"Connection": "close"}) from None

    async def cancel_when_gone(self, task: asyncio.Task[Any]) -> None:
        """Wait until the client leaves, then cancel what works for it."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        task.cancel()
