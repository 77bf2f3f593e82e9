"""What clients do wrong, on purpose or not: the server answers or hangs up, and holds nothing afterwards."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.engine.scripted import scripted_llm
from tests.serve.served import Served, serve, wait_until

from pelagos.serve import Settings
from pelagos.serve.app import document
from pelagos.serve.scripted import Reply

CHAT = "/v1/chat/completions"
SEED = 20261122
FAST = settings(max_examples=20, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    llm = scripted_llm(lambda prompt: Reply("word " * 200, token_s=0.01) if "long" in prompt else Reply("Hello"))
    with serve(llm, settings=Settings(head_s=1.0, body_s=1.0, write_s=1.0, max_queued=1000)) as served:
        yield served


def is_quiet(served: Served) -> bool:
    llm = served.app.llm
    assert llm is not None
    return served.app.traffic.in_flight == 0 and llm.stats().requests_running == 0 and not served.app._answers


@pytest.fixture(scope="module")
def operations() -> list[Any]:
    import schemathesis  # takes seconds, and in the process that runs this alone

    return [result.ok() for result in schemathesis.openapi.from_dict(document()).get_all_operations()]


@FAST
@given(st.data())
def test_no_request_of_the_document_is_a_5xx(served: Served, operations: list[Any], data: st.DataObject) -> None:
    assert len(operations) >= 11
    for operation in operations:
        case = data.draw(operation.as_strategy())
        body = case.body if isinstance(case.body, dict) else {}
        if operation.method.upper() == "POST":  # short answers, as long ones only take time
            body = body | {"max_tokens": 2, "max_output_tokens": 2}
            raw = json.dumps(body).encode("utf-8", "replace")
            answer = served.client.post(operation.path, content=raw)
        else:
            answer = served.client.get(operation.path)
        assert answer.status_code < 500, (operation.path, body, answer.text)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]


@FAST
@given(
    st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "X"]),
    st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=30),
    st.binary(max_size=60),
)
def test_no_path_or_method_is_a_5xx(served: Served, method: str, path: str, body: bytes) -> None:
    for prefix in ("/", "/v1/", "/page/", "/models/", "/page/../"):
        try:
            url = httpx.URL(f"http://127.0.0.1:{served.port}{prefix}{path}")
        except httpx.InvalidURL:
            continue
        answer = served.client.request(method, url, content=body)
        assert answer.status_code < 500, (method, url, answer.text)
        assert answer.status_code != 200 or "passwd" not in answer.text


def test_files_beside_the_page_are_not_served(served: Served) -> None:
    for path in (
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page//etc/passwd",
        "/page/..%2fapp.py",
        "/page/\\..\\app.py",
    ):
        with socket.create_connection(("127.0.0.1", served.port)) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert b"class App" not in read_all(raw), path


def read_all(raw: socket.socket) -> bytes:
    raw.settimeout(60)
    parts = []
    try:
        while part := raw.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 1000, b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 500,
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n", HEAD + b"Content-Length: 99999999999999999999\r\n\r\n{",
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n{}", HEAD + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n{}",
        HEAD + b"Content-Length: 2\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n{}",
        HEAD + b"Content-Length: 2\r\nX-Request-Id: \xff\xfe\r\n\r\n{}",
        HEAD + b"Authorization: \xff\r\nContent-Length: 2\r\n\r\n{}",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)  # fmt: skip
def test_garbage_is_refused_or_cut(served: Served, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        try:
            raw.sendall(garbage)
            raw.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = read_all(raw)
    assert not re_5xx(answer), answer[:200]
    assert served.client.get("/ready").status_code == 200
    wait_until(lambda: is_quiet(served))


def re_5xx(answer: bytes) -> bool:
    return answer.startswith(b"HTTP/1.1 5")


@FAST
@given(
    st.lists(
        st.sampled_from([HEAD, b"\r\n", b"Content-Length: 2\r\n", b"{}", b"GET / HTTP/1.1\r\n", b"0\r\n", b"\0"])
        | st.binary(max_size=20),
        max_size=8,
    )
)
def test_random_bytes_break_nothing(served: Served, parts: list[bytes]) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        try:
            raw.sendall(b"".join(parts))
            raw.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        assert not re_5xx(read_all(raw))


def test_a_client_that_does_not_go_on_is_cut_off(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for sent in (b"", b"GET / HT", HEAD, HEAD + b"Content-Length: 5\r\n\r\n{"):
            stack.enter_context(raw := socket.create_connection(("127.0.0.1", served.port)))
            raw.sendall(sent)
            stack.callback(read_all, raw)  # until the server hangs up
    wait_until(lambda: is_quiet(served))


def test_a_client_that_drips_its_head_is_cut_off(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as raw, pytest.raises(ConnectionError):  # noqa: PT012
        for letter in HEAD * 20:  # which one is too many is chance
            raw.sendall(bytes([letter]))
            time.sleep(0.05)


@contextlib.contextmanager
def narrow(served: Served, *, stream: bool) -> Iterator[socket.socket]:
    """A connection that holds little, on which a long answer was asked for: what is not read waits in the server."""
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", served.port))
        mine = raw.getsockname()
        wait_until(lambda: any(each.client == mine for each in served.server.server_state.connections))
        for each in served.server.server_state.connections:
            each.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = json.dumps(
            {"messages": [{"role": "user", "content": "Hi"}], "stream": stream, "logprobs": True, "max_tokens": 9000}
        ).encode()
        raw.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        yield raw


def test_a_client_that_does_not_read_is_cut_off() -> None:
    llm = scripted_llm(lambda _: "word " * 2000)
    with serve(llm, settings=Settings(write_s=1.0)) as served, narrow(served, stream=True):
        wait_until(lambda: served.app.traffic.in_flight == 1)
        wait_until(lambda: is_quiet(served))
        wait_until(lambda: len(served.server.server_state.connections) <= 1)  # the test's own
        held = served.app.metrics.text(0).decode()
        assert 'pelagos_disconnects_total{phase="answer"} 1.0' in held


def test_a_client_that_reads_slowly_but_does_is_not() -> None:
    llm = scripted_llm(lambda _: "word " * 1600)
    with serve(llm, settings=Settings(write_s=1.0)) as served, narrow(served, stream=False) as raw:
        end, waits = b"", list[float]()
        while part := raw.recv(4096):
            end = (end + part)[-40:]
            if any(each.transport.get_write_buffer_size() for each in served.server.server_state.connections):
                waits.append(time.monotonic())
            time.sleep(0.05)
        assert end.endswith(b"}")
        assert waits[-1] - waits[0] > 2.0, "the server did not have to wait for longer than write_s"


def test_hundreds_of_dropped_connections_leave_nothing(served: Served) -> None:
    """10,000 of them: `python -m benchmarks.serve_load --drops 10000`."""
    pick = random.Random(SEED)
    drop_some(served, pick, 20)
    wait_until(lambda: is_quiet(served))
    gc.collect()
    wait_until(lambda: len(served.server.server_state.connections) <= 1)
    before = len(os.listdir("/proc/self/fd"))
    drop_some(served, pick, 500)
    # The server may still be accepting them when none is in flight, so wait for the descriptors themselves.
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    wait_until(lambda: is_quiet(served))
    wait_until(lambda: len(served.server.server_state.connections) <= 1)
    assert served.client.post(CHAT, json={"messages": [{"role": "user", "content": "Hi"}]}).status_code == 200


def drop_some(served: Served, pick: random.Random, count: int) -> None:
    held: list[socket.socket] = []
    for _ in range(count):
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "long"}], "stream": pick.random() < 0.7}
        raw = json.dumps(body).encode()
        request = HEAD + b"Content-Length: %d\r\n\r\n" % len(raw) + raw
        connection = socket.create_connection(("127.0.0.1", served.port))
        connection.sendall(request[: pick.choice([pick.randrange(len(request)), len(request)])])
        held.append(connection)
        while len(held) > pick.randrange(1, 40):
            left = held.pop(0)
            if pick.random() < 0.3:  # a reset in place of an orderly end
                left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            left.close()
    for connection in held:
        connection.close()
