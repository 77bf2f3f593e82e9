"""The way out: names on a list through a proxy that runs outside, and nothing else."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pelagos.sandbox import proxy


@pytest.fixture
def port() -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"hello from {self.path}".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=30).read().decode())"
TUNNEL = """
import http.client, sys
c = http.client.HTTPConnection('127.0.0.1', 3128, timeout=30)
c.set_tunnel('127.0.0.1', int(sys.argv[1])); c.request('GET', '/tunnel'); print(c.getresponse().read().decode())
"""
RAW = """
import socket, sys
s = socket.create_connection(('127.0.0.1', 3128), 30)
s.sendall(sys.argv[1].encode().decode('unicode_escape').encode('latin-1'))
s.shutdown(1); print(s.recv(99))
"""


def test_listed_names_are_reached_and_no_others(make: Any, port: int) -> None:
    box = make(network=[f"127.0.0.1:{port}", "localhost"])
    assert box.capabilities.network == "proxy"
    assert box.exec(["python3", "-c", FETCH, f"http://127.0.0.1:{port}/a?b"]).text == "hello from /a?b\n"
    assert box.exec(["python3", "-c", TUNNEL, str(port)]).text == "hello from /tunnel\n"
    for url in (
        f"http://127.0.0.1:{port + 1}/",
        "http://other.example/",
        "http://localhost/",
        "http://169.254.169.254/",
    ):
        assert b"403" in box.exec(["python3", "-c", FETCH, url]).stderr, url
    direct = box.exec(["python3", "-c", FETCH, f"http://127.0.0.1:{port}/"], env={"http_proxy": ""})
    assert b"refused" in direct.stderr, "it reached the host's loopback without the proxy"
    for bad in ("x", "GET / HTTP/1.1\\r\\n\\r\\n", "CONNECT a HTTP/1.1\\r\\n\\r\\n"):
        assert "400" in box.exec(["python3", "-c", RAW, bad]).text or bad == "x"
    facts = [json.loads(line) for line in (box.directory / "network.log").read_text().splitlines()]
    assert [f["allowed"] for f in facts] == [True, True, False, False, False, False]
    assert "no public address" in facts[4]["why"]
    with_none = make()
    assert b"403" not in with_none.exec(["python3", "-c", FETCH, "http://127.0.0.1:3128/"]).stderr


@given(host=st.sampled_from(["a.example", "x.a.example", "xa.example", "a.example.evil"]), port=st.integers(1, 65535))
def test_only_what_is_listed_is_looked_up(host: str, port: int) -> None:
    listed = (host in ("x.a.example", "b.a.example") and port in (80, 443)) or (host == "a.example" and port == 8080)
    if not listed:
        with pytest.raises(PermissionError, match="not on this sandbox's list"):
            proxy.addresses(host, port, (".a.example", "a.example:8080"))
