"""The server over loopback: protocol shapes, streaming, refusals, queueing, disconnects and the page."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.engine.scripted import scripted_engine, scripted_llm
from tests.engine.test_turn import CALL, TOOL

from pelagos.engine import LLM
from pelagos.errors import CheckpointError
from pelagos.serve import App, Card
from pelagos.serve.app import PAGE
from pelagos.serve.scripted import Reply

ASK = [{"role": "user", "content": "Hi"}]
OFF = {"thinking": {"type": "disabled"}}
PATH = "/v1/chat/completions"


def reply(prompt: str) -> str:
    if "weather" in prompt:
        return f"I look.</think>{CALL}"
    if "long" in prompt:
        return "one two three four " * 200
    return "Hm.\n</think>Hello, \u4f60\u597d!" if prompt.endswith("<think>") else "Hello, \u4f60\u597d!"


@contextmanager
def serving(llm: LLM | Callable[[], LLM]) -> Iterator[httpx.Client]:
    app = App(llm, card=Card(model="nano"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited 60 s"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    llm = scripted_llm(reply)
    with serving(llm) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        yield client


def post(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post(PATH, json={"model": "nano", "messages": ASK, "temperature": 0} | body)


def stream(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    text = post(client, stream=True, **body).text
    frames = text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def test_health_and_models(client: httpx.Client) -> None:
    for path in ("/health", "/ready"):
        assert client.get(path).json() == {"status": "ready", "model": "nano", "context_length": 1 << 20}
    for path in ("/v1/models", "/models"):
        listed = client.get(path).json()
        assert (listed["object"], [each["id"] for each in listed["data"]]) == ("list", ["nano"])
    assert client.get("/v1/models/nano").json()["id"] == "nano"
    assert client.get("/v1/models/other").status_code == 404


def test_a_whole_answer(client: httpx.Client) -> None:
    done = post(client).json()
    assert done["object"] == "chat.completion"
    assert done["model"] == "nano"
    [choice] = done["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello, \u4f60\u597d!", "reasoning_content": "Hm."}
    assert choice["finish_reason"] == "stop"
    usage = done["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


@pytest.mark.parametrize("off", [OFF, {"reasoning_effort": "none"}])
def test_thinking_can_be_switched_off(client: httpx.Client, off: dict[str, Any]) -> None:
    done = post(client, **off).json()
    assert done["choices"][0]["message"] == {"role": "assistant", "content": "Hello, \u4f60\u597d!"}
    assert done["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_effort_changes_the_prompt(client: httpx.Client) -> None:
    low, high = (post(client, reasoning_effort=each).json()["usage"]["prompt_tokens"] for each in ("low", "high"))
    assert low < high


def test_a_stream_is_the_whole_answer_in_pieces(client: httpx.Client) -> None:
    chunks = stream(client)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": None, "reasoning_content": ""}
    assert "".join(d.get("reasoning_content") or "" for d in deltas) == "Hm."
    assert "".join(d.get("content") or "" for d in deltas) == "Hello, \u4f60\u597d!"
    assert deltas[-1] == {"content": "", "reasoning_content": None}
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert [c.get("usage") for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["usage"] == post(client).json()["usage"]
    assert stream(client, **OFF)[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_tool_calls_whole_and_streamed(client: httpx.Client) -> None:
    asked = {"messages": [{"role": "user", "content": "weather?"}], "tools": [TOOL]}
    [choice] = post(client, **asked).json()["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "")
    [call] = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}

    chunks = stream(client, **asked)
    parts = [p for chunk in chunks for p in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert parts[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert parts[0]["id"].startswith("call_00_")
    assert all(set(part) == {"index", "function"} and part["index"] == 0 for part in parts[1:])
    assert json.loads("".join(part["function"]["arguments"] for part in parts)) == {"city": "Paris"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    # The call goes back with its result.
    history = [*asked["messages"], choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    assert post(client, messages=history, tools=[TOOL]).status_code == 200


def test_stop_and_length(client: httpx.Client) -> None:
    choice = post(client, stop=["lo,"], **OFF).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hel", "stop")
    cut = post(client, max_tokens=2, **OFF).json()
    assert (cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 2)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"nul", b"\xff\xfe", b"[" * 10**5, b'{"messages": NaN}', b'"a"'])
def test_what_is_not_a_json_object_is_a_400(client: httpx.Client, raw: bytes) -> None:
    answer = client.post(PATH, content=raw)
    assert answer.status_code == 400
    assert "request body" in answer.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]), "content": st.text() | JSON},
    optional={"tool_calls": JSON, "tool_call_id": JSON, "reasoning_content": JSON, "prefix": JSON, "name": JSON},
)
KEYS = (
    "model stream stream_options max_tokens max_completion_tokens temperature top_p top_k seed stop n tools "
    "tool_choice thinking reasoning_effort response_format logprobs top_logprobs chat_template_kwargs user"
)
BODY = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3) | JSON}, optional=dict.fromkeys(KEYS.split(), JSON)
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@example({"messages": [{"role": "system", "content": -(2**63) - 1}]})
@example({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2**70, "seed": 2**63 - 1})
@given(BODY)
def test_no_body_breaks_the_server(client: httpx.Client, body: dict[str, Any]) -> None:
    answer = client.post(PATH, content=json.dumps({**body, "max_tokens": body.get("max_tokens", 2)}))
    assert answer.status_code in (200, 400, 422), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


def test_other_errors_have_the_same_shape(client: httpx.Client) -> None:
    for answer, status in ((client.get("/nothing"), 404), (client.get(PATH), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    big = client.post(PATH, content=b" " * (33 * 2**20))
    assert big.status_code == 413
    assert "bytes" in big.json()["error"]["message"]


def test_context_overflow_has_its_code() -> None:
    with serving(scripted_llm("x", max_position_embeddings=30)) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        answer = post(client, messages=[{"role": "user", "content": "z" * 40}], **OFF)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_loading_is_503_and_then_ready() -> None:
    go = threading.Event()

    def load() -> LLM:
        go.wait(60)
        return scripted_llm("Hello")

    with serving(load) as client:
        health, ready = client.get("/health"), client.get("/ready")
        assert (health.status_code, ready.status_code, ready.json()["status"]) == (200, 503, "loading")
        answer = post(client)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "internal_error")
        go.set()
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert post(client, **OFF).status_code == 200


def test_a_failing_turn_ends_its_stream_with_an_error() -> None:
    llm = scripted_llm(lambda _: Reply("Hello", token_s=0.01, fail="weights are damaged"))
    with serving(llm) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert stream(client)[-1]["error"]["message"] == "weights are damaged"
        scripted_engine(llm).fail = CheckpointError("weights are gone")
        for streamed in (True, False):  # nothing was sent yet: the status says it
            answer = post(client, stream=streamed)
            assert (answer.status_code, answer.json()["error"]["type"]) == (500, "internal_error")


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_stops_its_generation(streamed: bool) -> None:
    llm = scripted_llm(reply, delay=0.01)
    engine = scripted_engine(llm)
    body = {"messages": [{"role": "user", "content": "long"}], "stream": streamed, **OFF}
    with serving(llm) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        if streamed:
            with client.stream("POST", PATH, json=body) as answer:
                lines = answer.iter_lines()
                assert sum(1 for _ in zip(range(6), lines, strict=False)) == 6
                assert client.get("/health").status_code == 200
                assert engine.stats().requests_running == 1, "the server answers others meanwhile"
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(PATH, json=body, timeout=0.3)
        wait_until(lambda: len(engine.calls) == 1 and engine.stats().requests_running == 0)
        assert engine.stats().generated_tokens < 400
        assert post(client, **OFF).json()["choices"][0]["message"]["content"] == "Hello, \u4f60\u597d!"


def test_requests_wait_for_their_turn() -> None:
    with serving(scripted_llm(reply, delay=0.005)) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        answers: list[str] = []

        def ask() -> None:
            answers.append(post(client).json()["choices"][0]["message"]["content"])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == ["Hello, \u4f60\u597d!"] * 4


def test_the_page_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for link in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert client.get(f"/{link}").status_code == 200, link
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), file
    assert not re.search(r"\son\w+=|<script>|style=", page.text), "inline script or style, which the policy forbids"
