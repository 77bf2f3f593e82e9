"""Requests at the edges of the protocols: calls where none may be made, odd fields, who shares a cache, methods."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.engine.scripted import scripted_engine, scripted_llm
from tests.engine.test_turn import CALL, TOOL
from tests.serve.served import Served, serve

from pelagos.serve import Card
from pelagos.serve.scripted import Reply

OFF = {"thinking": {"type": "disabled"}}
NAMES = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


def reply(prompt: str) -> str | Reply:
    if "break" in prompt:
        return Reply("one two three", fail="the engine broke")
    return f"Sunny.{CALL}" if "weather" in prompt else "one two three four five six seven"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(scripted_llm(reply), card=Card(model="nano", context_length=65_536)) as served:
        yield served


def frames(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": "none"}),
        ("/v1/messages", {"tools": [NAMES], "tool_choice": {"type": "none"}, "max_tokens": 99}),
    ],
)
def test_a_call_that_may_not_be_made_is_dropped(served: Served, path: str, body: dict[str, Any], stream: bool) -> None:
    asked = {"messages": [{"role": "user", "content": "weather?"}], "stream": stream, **OFF, **body}
    text = served.client.post(path, json=asked).text
    said = re.findall(r'"(?:text|content)": ?"([^"]*)"', text)  # a stream may cut it anywhere
    assert "Sunny." in "".join(said)
    assert "DSML" not in text
    assert "get_weather" not in text
    assert '"end_turn"' in text or '"stop"' in text


def test_calls_of_the_history_are_markup_too(served: Served) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "weather?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "weather: rain"}, {"role": "user", "content": "Sum up."},
    ]  # fmt: skip
    done = served.client.post("/v1/chat/completions", json={"messages": messages, **OFF}).json()
    assert done["choices"][0]["message"]["content"] == "Sunny."
    assert done["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"user_id": '{"a":' * 990 + "1" + "}" * 990}),
        ("/v1/messages", {"metadata": {"user_id": '{"a":' * 990 + "1" + "}" * 990}, "max_tokens": 9}),
        ("/v1/messages", {"tool_choice": {"type": []}, "tools": [NAMES], "max_tokens": 9}),
        ("/v1/responses", {"input": "Hi", "tools": [{"type": "custom", "name": "x", "description": 5}]}),
        ("/v1/responses", {"input": "Hi", "tools": [{"type": "custom", "name": "x", "format": {"definition": 5}}]}),
    ],
)
def test_odd_fields_are_never_the_servers_fault(served: Served, path: str, body: dict[str, Any]) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}]} if path != "/v1/responses" else {}
    assert served.client.post(path, json={**asked, **body}).status_code < 500


def test_users_of_chat_are_kept_apart_by_their_whole_name(served: Served) -> None:
    engine = scripted_engine(served.app.loading.result())
    for name in ("t_session_1", "t_session_2"):
        body = {"messages": [{"role": "user", "content": "Hi"}], "user_id": name, **OFF}
        assert served.client.post("/v1/chat/completions", json=body).status_code == 200
        assert engine.calls[-1]["user_id"] == name
    for session in ("1", "2"):
        user = json.dumps({"device": "d", "session_id": session})
        body = {"messages": [{"role": "user", "content": "Hi"}], "metadata": {"user_id": user}, "max_tokens": 9}
        assert served.client.post("/v1/messages", json=body).status_code == 200
    assert engine.calls[-1]["user_id"] == engine.calls[-2]["user_id"] == '{"device": "d"}'


def test_log_probabilities_come_with_their_text(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Count"}], "stream": True, "logprobs": True, **OFF}
    seen = 0
    for frame in frames(served.client.post("/v1/chat/completions", json=body).text):
        choice = frame["choices"][0]
        picks = (choice["logprobs"] or {}).get("content") or []
        assert "".join(pick["token"] for pick in picks) == (choice["delta"].get("content") or "")
        seen += len(picks)
    assert seen > 3


@pytest.mark.parametrize(("method", "path"), [("GE", "/health"), ("T", "/v1/chat/completions"), ("P", "/health")])
def test_a_part_of_a_methods_name_is_no_method(served: Served, method: str, path: str) -> None:
    assert served.client.request(method, path).status_code == 405


def test_another_method_from_another_origin_is_refused(served: Served) -> None:
    answer = served.client.request("PUT", "/v1/chat/completions", headers={"Origin": "http://evil.example"})
    assert answer.status_code == 403


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/metrics", "text/plain"), ("/openapi.json", "application/json"), ("/docs", "text/html"), ("/stats", "appl")],
)
def test_one_content_type(served: Served, path: str, kind: str) -> None:
    [found] = served.client.get(path).headers.get_list("content-type")
    assert found.startswith(kind)


def test_docs_name_every_path(served: Served) -> None:
    page = served.client.get("/docs").text
    assert all(path in page for path in served.client.get("/openapi.json").json()["paths"])


def test_maximal_effort_in_a_short_context_is_warned_of(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "max"}
    assert "maximal effort" in served.client.post("/v1/chat/completions", json=body).headers["x-pelagos-warning"]
    low = served.client.post("/v1/chat/completions", json={**body, "reasoning_effort": "low"})
    assert "x-pelagos-warning" not in low.headers


def test_what_came_before_an_error_is_not_lost(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "break"}], "stream": True, **OFF}
    for _ in range(20):
        found = frames(served.client.post("/v1/chat/completions", json=body).text)
        texts = [frame["choices"][0]["delta"].get("content") or "" for frame in found if "choices" in frame]
        assert "".join(texts) == "one two three"
        assert found[-1]["error"]["message"] == "the engine broke"
