"""A server on a free port of this machine, in a thread of the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from pelagos.engine import LLM
from pelagos.serve import App, Card, Settings
from pelagos.serve.keys import KeyFile
from pelagos.serve.run import Server


@dataclass(frozen=True)
class Served:
    """A running server: its application, the address it listens on, and a client of it."""

    app: App
    server: Server
    port: int
    client: httpx.Client


@contextmanager
def serve(
    llm: LLM | Callable[[], LLM], *, card: Card | None = None, settings: Settings | None = None,
    keys: KeyFile | None = None, ready: bool = True,
) -> Iterator[Served]:  # fmt: skip
    app = App(llm, card=card or Card(model="nano"), settings=settings, keys=keys)
    server = Server(app)
    server.config.port = 0
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            if ready:
                wait_until(lambda: client.get("/ready").status_code == 200)
            yield Served(app, server, port, client)
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.01)
