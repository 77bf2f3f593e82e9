"""Run the application on a socket: bind first, listen while the model loads, say when it is ready."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack

import uvicorn

from pelagos.engine import LLM
from pelagos.errors import ConfigError
from pelagos.serve.app import create_app
from pelagos.serve.ask import Card
from pelagos.serve.loading import Loading


def run(load: Callable[[], LLM], *, card: Card, host: str, port: int) -> None:
    """Serve until interrupted; prints the URL and a `curl` line on stderr once the model is ready.

    Raises ConfigError when the address is taken or wrong, and whatever `load` raises.
    """
    listener = _bind(host, port)
    app = create_app(load, card=card)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    loading: Loading = app.state.loading
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

    def announce(_: object) -> None:
        if loading.llm is None:
            server.should_exit = True
        else:
            print(_banner(url, card.model), file=sys.stderr, flush=True)

    loading.done.add_done_callback(announce)
    server.run(sockets=[listener])
    if loading.done.done() and not loading.done.cancelled():
        loading.done.result()


def _bind(host: str, port: int) -> socket.socket:
    with ExitStack() as opened:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = opened.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from None
        opened.pop_all()
    return listener


def _banner(url: str, model_name: str) -> str:
    body = json.dumps({"model": model_name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
    return (
        f"Pelagos serves {model_name} at {url}\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{body}'\n\n"
        "Ctrl-C stops the server."
    )
