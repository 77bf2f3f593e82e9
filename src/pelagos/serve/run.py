"""Run the application on a socket: bind first, listen while the model loads, drain when told to end."""

import json
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from pelagos.engine import LLM, SamplingParams
from pelagos.errors import ConfigError
from pelagos.serve.app import App
from pelagos.serve.keys import KeyFile
from pelagos.serve.limits import is_loopback
from pelagos.serve.metrics import logging_to_stderr
from pelagos.serve.scripted import scripted_llm
from pelagos.serve.settings import Settings

CANCELLED_SECONDS = 2  # that a cancelled answer has to tell its client


def run(settings: Settings) -> None:
    """Serve until told to end; prints the URL and a `curl` line on stderr once the model is ready.

    SIGTERM or SIGINT lets running answers finish for `drain_s` seconds; a second one ends at once. Raises ConfigError
    when the address is taken, wrong, or open to others without keys, and whatever loading the model raises.
    """
    listener, keys = listen(settings)
    app = App(lambda: load_llm(settings), settings=settings, keys=keys)
    server = Server(app)
    url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{listener.getsockname()[1]}"

    def announce(_: object) -> None:
        if app.llm is None:
            server.should_exit = True
        else:
            print(_banner(url, app.card.model, keyed=keys.is_needed()), file=sys.stderr, flush=True)

    app.loading.add_done_callback(announce)
    with logging_to_stderr(settings.log_level):
        server.run(sockets=[listener])
    if app.loading.done() and not app.loading.cancelled():
        app.loading.result()


def listen(settings: Settings) -> tuple[socket.socket, KeyFile]:
    """Return a socket that listens where the settings say, and the keys; raises ConfigError as `run` does."""
    listener, keys = _bind(settings.host, settings.port), KeyFile(settings.keys_file)
    if not (is_loopback(listener.getsockname()[0]) or settings.allow_open or keys.read()):
        listener.close()
        raise ConfigError(
            f"--host {settings.host} can be reached by others and {keys.path} holds no keys: make one with "
            "`pelagos keys add NAME`, or let everybody in with --allow-open"
        )
    return listener, keys


def load_llm(settings: Settings) -> LLM:
    """Return the model the settings name after it has answered once, so that no client waits for what comes first.

    Raises what `LLM` raises.
    """
    if settings.engine != "local":
        script = Path(settings.engine.removeprefix("scripted:"))
        return scripted_llm(settings.model, script, generation=settings.generation)
    llm = LLM(settings.model, **settings.engine_options)
    llm.generate("Hello", SamplingParams(max_tokens=8))
    return llm


class Server(uvicorn.Server):
    """uvicorn with a drain at its end, and time limits where it waits for clients for ever."""

    def __init__(self, app: App) -> None:
        settings = app.settings
        config = uvicorn.Config(
            app, log_config=None, access_log=False, http="h11", ws="none", server_header=False, proxy_headers=False,
            timeout_keep_alive=int(settings.idle_s) or 1, timeout_graceful_shutdown=CANCELLED_SECONDS,
        )  # fmt: skip
        super().__init__(config)
        self._app, self._settings = app, settings
        self._drain_until: float | None = None
        self._waits: dict[Any, tuple[int, float]] = {}

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the second signal ends the process as if nobody listened to it."""
        if self._drain_until is not None:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._app.traffic.draining = True
        self._drain_until = time.monotonic() + self._settings.drain_s

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's own chores ten times a second, and dropping the clients that keep us waiting too long."""
        if self._drain_until is not None and not self.should_exit:
            late = time.monotonic() >= self._drain_until
            if late:
                self._app.cancel_answers()
            self.should_exit = late or not self._app.traffic.in_flight
        self._drop_late(time.monotonic())
        return await super().on_tick(counter)

    def _drop_late(self, now: float) -> None:
        """Cut connections that do not take what they are sent, or do not send the head of a request."""
        before, self._waits = self._waits, {}
        connections: set[Any] = self.server_state.connections
        for connection in connections:
            unsent = connection.transport.get_write_buffer_size()
            idle = connection.cycle is None or connection.cycle.response_complete
            if not unsent and (not idle or connection.timeout_keep_alive_task is not None):
                continue
            size, since = before.get(connection, (unsent, now))
            if unsent < size or (unsent > 0) != (size > 0):
                since = now
            self._waits[connection] = unsent, since
            if now - since > (self._settings.write_s if unsent else self._settings.head_s):
                connection.transport.abort()


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from None


def _banner(url: str, model_name: str, *, keyed: bool) -> str:
    body = json.dumps({"model": model_name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if keyed else ""
    return (
        f"Pelagos serves {model_name} at {url}\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n    -d '{body}'\n\n"
        "Ctrl-C stops the server."
    )
