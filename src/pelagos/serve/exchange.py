"""One HTTP request and its response, as ASGI messages."""

import asyncio
import json
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from pelagos.serve.answer import Answer
from pelagos.serve.keys import Key
from pelagos.serve.protocols.wire import Api

_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)
_NO_STORE = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]


class ClientGone(Exception):
    """The client closed its connection before the response was complete."""


class Exchange:
    """One request and its response, with what is logged and counted of them.

    `path` is without the prefixes of base URLs; `phase` is body, queue (until the first token) or answer.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        self.began = time.perf_counter()
        self.path, self.method = path, scope["method"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        self.more_headers = [(b"x-request-id", self.id.encode()), (b"request-id", self.id.encode())]
        self.kind, self.model, self.phase = "other", "", "body"
        self.api: Api | None = None
        self.key: Key | None = None
        self.answer: Answer | None = None
        self.streams = self.is_gone = False
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
        """Send a whole response: text as it is, anything else as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        given = {name.lower(): value for name, value in (headers or {}).items()}
        head = {"content-length": str(len(content)), "content-type": "application/json"} | given
        pairs = [(name.encode(), value.encode()) for name, value in head.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": content})

    async def write(self, text: str, *, more: bool = True) -> None:
        """Send a part of a body whose length is not known; the first part brings the head, with status 200."""
        if not self.status:
            kind = b"text/event-stream; charset=utf-8" if self.streams else b"application/json"
            head = [(b"content-type", kind), *_NO_STORE]
            await self.send({"type": "http.response.start", "status": 200, "headers": head})
        await self._send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": more})

    async def read(self, limit: int, seconds: float) -> bytes:
        """Return the request's body; HTTPException 413 for more than `limit` bytes, 408 for one that takes too long."""
        body, size, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(seconds):
                while more and size <= 2 * limit:  # a client hears why only once it has stopped sending
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    more, part = message.get("more_body", False), message.get("body", b"")
                    size += len(part)
                    body += part if size <= limit else b""
        except TimeoutError:
            late = f"the request body was not here within {seconds:g} s"
            raise HTTPException(408, late, {"Connection": "close"}) from None
        if size > limit:
            raise HTTPException(413, f"the request body is over {limit} bytes", {"Connection": "close"})
        return bytes(body)

    async def cancel_when_gone(self, task: asyncio.Task[Any]) -> None:
        """Wait until the client leaves, then cancel what works for it."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        task.cancel()
