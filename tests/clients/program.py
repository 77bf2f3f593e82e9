"""What the client tests share: a recorded server over a script, and the configuration blocks of the docs."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from pelagos.engine import LLM
from pelagos.serve import App, Card, Settings
from pelagos.serve.keys import KeyFile

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "clients"
DOC_URL, DOC_KEY = "http://127.0.0.1:8000", "YOUR-KEY"
MODEL = "nano"


@dataclass
class Exchange:
    """One request a program sent and what it was answered."""

    method: str
    path: str
    headers: dict[str, str]
    request: bytes = b""
    status: int = 0
    answer: bytes = b""

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.request)

    @property
    def text(self) -> str:
        return self.answer.decode("utf-8")

    @property
    def usage(self) -> dict[str, Any]:
        """The last usage in the stream, in whichever protocol."""
        lines = (line.removeprefix("data: ") for line in self.text.splitlines() if line.startswith("data: {"))
        events = [json.loads(line) for line in lines]
        return [use for event in events if (use := event.get("usage") or event.get("response", {}).get("usage"))][-1]

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were found cached."""
        usage = self.usage
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        return details["cached_tokens"] if details else usage["cache_read_input_tokens"]

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer."""
        usage = self.usage
        apart = usage.get("cache_read_input_tokens", 0)
        return usage.get("total_tokens") or apart + usage["input_tokens"] + usage["output_tokens"]


@dataclass
class Recorded:
    """An ASGI application that keeps what passes through another."""

    app: Any
    exchanges: list[Exchange] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        exchange = Exchange(scope["method"], scope["path"], headers)
        self.exchanges.append(exchange)

        async def record_request() -> Any:
            message = await receive()
            exchange.request += message.get("body", b"")
            return message

        async def record_answer(message: Any) -> None:
            exchange.status = message.get("status", exchange.status)
            exchange.answer += message.get("body", b"")
            await send(message)

        return await self.app(scope, record_request, record_answer)

    @property
    def generations(self) -> list[Exchange]:
        """The requests that a model answers, in order: what is sent to the paths of the three protocols."""
        return [one for one in self.exchanges if re.search(r"/(messages|responses|chat/completions)$", one.path)]


@contextmanager
def serving(
    llm: LLM, *, keys: KeyFile | None = None, settings: Settings | None = None
) -> Iterator[tuple[str, Recorded]]:
    """Yield the URL and the record of a server."""
    recorded = Recorded(App(llm, card=Card(model=MODEL), settings=settings, keys=keys))
    server = uvicorn.Server(uvicorn.Config(recorded, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 10
        while not (server.started and _is_ready(url := _url(server))):
            assert time.monotonic() < end, "the server was not ready in 10 s"
            time.sleep(0.02)
        recorded.exchanges.clear()
        yield url, recorded
    finally:
        server.should_exit = True
        thread.join()


def _url(server: uvicorn.Server) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def _is_ready(url: str) -> bool:
    return httpx.get(f"{url}/health", trust_env=False).status_code == 200


def block(doc: str, title: str) -> str:
    """Return the fenced block that follows the line with `title` in `docs/clients/<doc>.md`."""
    text = (DOCS / f"{doc}.md").read_text(encoding="utf-8")
    found = re.search(rf"^[^\n]*{re.escape(title)}[^\n]*\n+```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found, f"docs/clients/{doc}.md: no fenced block right below a line with {title!r}"
    return found[1]
