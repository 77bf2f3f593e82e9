"""What every request passes: paths, ids, hosts and origins, limits, waiting, leaving, draining, counting, logging."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tests.engine.scripted import scripted_engine, scripted_llm
from tests.serve.served import Served, serve, wait_until

from pelagos.errors import ConfigError, RequestError
from pelagos.serve import Settings, run
from pelagos.serve.app import canonical, parse_body
from pelagos.serve.limits import hostname
from pelagos.serve.metrics import JsonLines
from pelagos.serve.scripted import Reply

CHAT = "/v1/chat/completions"
SECRET = "Zanzibar"
OFF = {"thinking": {"type": "disabled"}}


def reply(prompt: str) -> Reply:
    if "late" in prompt:
        return Reply("Hello", first_s=0.6)
    if "never" in prompt:
        return Reply("Hello", first_s=60)
    return Reply("word " * 300, token_s=0.01) if "long" in prompt else Reply("Hello")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    settings = Settings(keep_alive_s=0.1, body_bytes=100_000, cors_origins=("http://friend:1",))
    with serve(scripted_llm(reply), settings=settings) as served:
        yield served


def ask(
    served: Served, text: str = "Hi", path: str = CHAT, headers: dict[str, str] | None = None, **body: Any
) -> httpx.Response:
    given = {"messages": [{"role": "user", "content": text}], "max_tokens": 400, **OFF}
    return served.client.post(path, json=given | body, headers=headers)


@pytest.mark.parametrize("prefix", ["", "/v1", "/beta", "/beta/v1", "/anthropic", "/anthropic/v1"])
def test_every_base_url_leads_to_every_route(served: Served, prefix: str) -> None:
    assert ask(served, path=f"{prefix}/chat/completions").json()["object"] == "chat.completion"
    counted = ask(served, path=f"{prefix}/messages/count_tokens?beta=true").json()
    assert counted["input_tokens"] > 3
    assert ask(served, path=f"{prefix}/messages").json()["type"] == "message"
    assert served.client.get(f"{prefix}/models/nano").json()["id"] == "nano"


@bounds(deadline=None)
@given(st.text("/v1betanhropic.%", max_size=20))
def test_canonical_paths_are_stable(path: str) -> None:
    once = canonical("/" + path)
    assert once.startswith("/") or once == ""
    assert len(once) <= len(path) + 1
    assert once == "/" or not once.endswith("/")


def test_methods(served: Served) -> None:
    client = served.client
    assert client.head("/").status_code == 200
    assert client.head("/").content == b""
    options = client.options(CHAT)
    assert (options.status_code, options.headers["allow"]) == (204, "POST, OPTIONS")
    assert "access-control-allow-origin" not in options.headers
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        refused = client.request(method, CHAT)
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST, OPTIONS")
    assert client.post("/health").status_code == 405
    assert client.get("/nothing").json()["error"]["message"]


def test_request_ids(served: Served) -> None:
    for name, same in (("abc-1.2:3", True), ("a b", False), ("x" * 129, False), ("", False), ("<script>", False)):
        answer = served.client.get("/health", headers={"X-Request-Id": name})
        assert (answer.headers["x-request-id"] == name) is same
        assert re.fullmatch(r"[\w.:-]{1,128}", answer.headers["x-request-id"])


def test_a_foreign_page_gets_nothing(served: Served) -> None:
    port = served.port
    for host, status in (
        (f"localhost:{port}", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        (f"evil.example:{port}", 403),
    ):
        assert served.client.get("/health", headers={"Host": host}).status_code == status, host
    own, friend, foe = f"http://127.0.0.1:{port}", "http://friend:1", "http://foe"
    for origin, status in ((own, 200), (friend, 200), (foe, 403), ("null", 403), (f"{own}0", 403)):
        answer = ask(served, headers={"Origin": origin})
        assert answer.status_code == status, origin
        assert answer.headers.get("access-control-allow-origin") == (friend if origin == friend else None)
    asked = {"Origin": friend, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-other"}
    preflight = served.client.options(CHAT, headers=asked)
    assert (preflight.status_code, preflight.headers["access-control-allow-headers"]) == (204, "x-other")
    assert "access-control-allow-origin" not in served.client.options(CHAT, headers=asked | {"Origin": foe}).headers


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("a.B:80", "a.b"),
        ("[::1]:8000", "[::1]"),
        ("[::1]", "[::1]"),
        ("localhost", "localhost"),
        ("http://x:1", "x"),
        ("", ""),
    ],
)
def test_hostname(host: str, name: str) -> None:
    assert hostname(host) == name


def test_a_waiting_client_sees_signs_of_life(served: Served) -> None:
    streamed = ask(served, "late", stream=True).text
    assert streamed.startswith(": keep-alive\n\n: keep-alive\n\n")
    assert streamed.endswith("data: [DONE]\n\n")
    whole = ask(served, "late")
    assert re.match(r"\n{2,}\{", whole.text)
    assert whole.json()["choices"][0]["message"]["content"] == "Hello"
    assert whole.headers["content-type"] == "application/json"


def test_a_request_that_never_begins_is_given_up() -> None:
    llm = scripted_llm(reply)
    with serve(llm, settings=Settings(keep_alive_s=0.1, queue_s=0.3)) as served:
        assert "no token came within 0.3 s" in ask(served, "never", stream=True).text
        late = ask(served, "never")
        assert (late.status_code, late.json()["error"]["type"]) == (200, "internal_error")  # the head was out
        wait_until(lambda: scripted_engine(llm).stats().requests_running == 0)


def test_bodies_have_bounds(served: Served) -> None:
    for size in (100_001, 150_000, 250_000, 1_000_000):
        try:
            answer = served.client.post(CHAT, content=b" " * size)
        except httpx.WriteError:  # the server had hung up by then
            assert size > 200_000
            continue
        assert answer.status_code == 413
        assert "over 100000 bytes" in answer.json()["error"]["message"]
    wait_until(lambda: served.app.traffic.in_flight == 0)


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with (
        serve(scripted_llm(reply), settings=Settings(body_s=0.3)) as served,
        socket.create_connection(("127.0.0.1", served.port)) as slow,
    ):
        slow.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{{".encode())
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        wait_until(lambda: served.app.traffic.in_flight == 0)


@pytest.mark.parametrize(
    "raw", [b'{"a": "\xed\xa0\x80"}', b'{"a": "\\ud800"}', b'{"a": "\\uD9ab"}', b'{"a": 1e999}', b'{"a": -Infinity}',
            b"{" * 10_000, b'{"a": ' + b"9" * 5000 + b"}", b'\xef\xbb\xbf{}', b"{}\0", "{}".encode("utf-16")],
)  # fmt: skip
def test_what_is_no_json_text_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError, match="request body"):
        parse_body(raw)


@bounds(deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8")),
        st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    )
)
def test_what_is_json_text_is_read_as_it_is(body: dict[str, Any]) -> None:
    for ascii_only in (True, False):
        assert parse_body(json.dumps(body, ensure_ascii=ascii_only).encode()) == body


def test_too_many_requests() -> None:
    gate = threading.Event()
    llm = scripted_llm(lambda _: Reply("Hello", fail=None if gate.wait(60) else "nobody opened the gate"))
    with serve(llm, settings=Settings(max_requests=1, max_queued=1)) as served:
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(served))) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: served.app.traffic.in_flight == 2)
        for path in (CHAT, "/v1/messages", "/v1/responses"):
            refused = ask(served, path=path, input="Hi")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        gate.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert ask(served).status_code == 200


def test_a_deadline_ends_an_answer() -> None:
    with serve(scripted_llm(reply), settings=Settings(deadline_s=5.0)) as served:
        assert ask(served).status_code == 200
        assert [call["timeout_s"] for call in scripted_engine(served.app.llm).calls] == [5.0]  # type: ignore[arg-type]


def families(served: Served) -> dict[str, float]:
    samples = text_string_to_metric_families(served.client.get("/metrics").text)
    return {f"{s.name}{json.dumps(s.labels)}": s.value for family in samples for s in family.samples}


def test_metrics_and_stats_add_up() -> None:
    with serve(scripted_llm(reply)) as served:
        usage = [ask(served, stream=False).json()["usage"] for _ in range(3)]
        served.client.post(CHAT, content=b"{")
        with served.client.stream(
            "POST", CHAT, json={"messages": [{"role": "user", "content": "long"}], "stream": True}
        ) as gone:
            next(gone.iter_lines())
        wait_until(lambda: served.client.get("/stats").json()["requests_done"] == 4)
        found = families(served)
        assert found['pelagos_requests_total{"api": "chat", "status": "200"}'] == 4
        assert found['pelagos_requests_total{"api": "chat", "status": "400"}'] == 1
        assert found['pelagos_disconnects_total{"phase": "answer"}'] == 1
        assert found['pelagos_prompt_tokens_total{"api": "chat"}'] > sum(each["prompt_tokens"] for each in usage)
        assert found['pelagos_completion_tokens_total{"api": "chat"}'] > sum(
            each["completion_tokens"] for each in usage
        )
        assert found['pelagos_first_token_seconds_count{"api": "chat"}'] == 4
        assert found["pelagos_requests_in_flight{}"] == 0
        assert found["pelagos_engine_requests_done_total{}"] == 4
        assert found["pelagos_process_open_fds{}"] > 3
        served.client.get("/stats")
        ask(served)
        time.sleep(0.6)
        stats = served.client.get("/stats").json()
        assert stats["rates"]["generated_tokens"] > 0
        assert (stats["status"], stats["model"], stats["disconnects"], stats["in_flight"]) == ("ready", "nano", 1, 0)
        assert stats["requests_done"] == 5


def test_log_lines_say_much_and_quote_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "pelagos")
    llm = scripted_llm(lambda prompt: Reply(SECRET) if "boom" not in prompt else Reply(SECRET, fail=f"{SECRET} broke"))
    with serve(llm) as served:
        ask(served, f"Tell {SECRET}", headers={"X-Request-Id": "my-id"})
        ask(served, f"boom {SECRET}")
        ask(served, SECRET, temperature=SECRET)
        scripted_engine(llm).fail = ValueError(SECRET)
        assert ask(served, SECRET).status_code == 500
    lines = [JsonLines().format(record) for record in caplog.records if record.name.startswith("pelagos")]
    text = "\n".join(lines)
    assert SECRET not in text
    first = next(json.loads(line) for line in lines if "my-id" in line)
    assert {"time", "level", "message", "request_id", "api", "status", "ms", "key"} <= set(first)
    assert (first["api"], first["status"], first["finish_reason"], first["model"]) == ("chat", 200, "stop", "nano")
    assert first["completion_tokens"] > 1
    assert first["first_token_ms"] <= first["ms"]
    [crash] = [json.loads(line) for line in lines if '"ValueError"' in line]
    assert "wait" in crash["traceback"][-1]


def test_the_address_is_guarded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can be reached by others .* `pelagos keys add NAME`"):
        run(Settings(host="0.0.0.0", port=0, keys_file=tmp_path / "keys.json"))


@pytest.mark.parametrize("drain_s", [60, 0.3])
def test_the_first_signal_drains(tmp_path: Path, drain_s: float) -> None:
    """Running answers finish, or are told that they were cut; the log is JSON lines; the exit code is 0."""
    words = 60 if drain_s > 1 else 3000  # some 80 ms each: long enough to ask meanwhile, too long for 0.3 s
    with Process(tmp_path, "--drain-s", str(drain_s), words=words) as (process, url):
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, **OFF}
        with httpx.stream("POST", f"{url}{CHAT}", json=body, timeout=20, trust_env=False) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            if drain_s > 1:
                wait_until(lambda: httpx.get(f"{url}/health", trust_env=False).json()["status"] == "draining")
                assert httpx.get(f"{url}/ready", trust_env=False).status_code == 503
                refused = httpx.post(f"{url}{CHAT}", json=body, trust_env=False)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
            frames = [line for line in lines if line.startswith("data: ")]
        assert frames[-1] == "data: [DONE]"
        reason = json.loads(frames[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert (reason == "stop") is (drain_s > 1)
        assert process.wait(60) == 0
        assert process.stderr is not None
        logged = [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith("{")]
        assert logged[-1]["status"] == 200


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    with Process(tmp_path, words=5000) as (process, url):
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, **OFF}
        with httpx.stream("POST", f"{url}{CHAT}", json=body, timeout=20, trust_env=False) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url}/health", trust_env=False).json()["status"] == "draining")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == -signal.SIGTERM  # long before the answer's end


class Process:
    """`pelagos serve` on a script, in a process of its own; its URL once it is ready."""

    def __init__(self, tmp_path: Path, *flags: str, words: int = 40) -> None:
        script = tmp_path / "script.json"
        script.write_text(json.dumps({"rules": [{"reply": "word " * words, "token_delay_ms": 20}]}), encoding="utf-8")
        keys = str(tmp_path / "keys.json")
        self.command = [
            sys.executable, "-m", "pelagos", "serve", "--engine", f"scripted:{script}", "--port", "0",
            "--keys-file", keys, *flags,
        ]  # fmt: skip

    def __enter__(self) -> tuple[subprocess.Popen[str], str]:
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        banner = "".join(iter(self.process.stderr.readline, "Ctrl-C stops the server.\n"))
        return self.process, re.findall(r"serves nano at (http://127\.0\.0\.1:\d+)", banner)[0]

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
