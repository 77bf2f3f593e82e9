"""What agent programs sent while they fixed a bug, with long texts cut, sent again: fast, and without the programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from tests.clients.program import HERE, serving
from tests.engine.scripted import scripted_llm

from pelagos.serve import Settings
from pelagos.serve.scripted import Reply

CAPTURES = sorted((HERE / "captures").glob("*.json"))
LAST_EVENTS = {
    "messages": "event: message_stop",
    "responses": "event: response.completed",
    "completions": "data: [DONE]",
}
# The last user message of OpenClaw moves to the end in every request.
MOVES_CONTEXT = "openclaw"


@dataclass
class Replay:
    """A server whose model always says the same, and the prompts it saw."""

    client: httpx.Client
    prompts: list[str]


@pytest.fixture(scope="module")
def replay() -> Iterator[Replay]:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return "Short.</think>Done." if prompt.endswith("<think>") else "Done."

    llm = scripted_llm(reply, max_position_embeddings=1 << 20)
    with serving(llm) as (url, _), httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
        yield Replay(client, prompts)


def load(name: str) -> list[dict[str, Any]]:
    return json.loads((HERE / "captures" / f"{name}.json").read_text(encoding="utf-8"))["requests"]


@pytest.mark.parametrize("name", [path.stem for path in CAPTURES])
def test_a_session_is_answered_and_its_prompts_grow_at_the_end(replay: Replay, name: str) -> None:
    turns: list[str] = []
    for request in load(name):
        replay.prompts.clear()
        answer = replay.client.post(request["path"], json=request["body"], headers=request["headers"])
        assert answer.status_code == 200, answer.text
        last = answer.text.strip().split("\n\n")[-1]
        assert last.startswith(LAST_EVENTS[request["path"].rpartition("/")[2]])
        [prompt] = replay.prompts
        if request["body"].get("tools"):
            turns.append(prompt)
    first, second, third = turns
    for prompt in turns:
        assert prompt.endswith("<｜Assistant｜><think>")
        assert "billing-header" not in prompt
        assert prompt.count("<｜begin▁of▁sentence｜>") == 1
    assert first.count("<tool_result>") == 0
    if name != MOVES_CONTEXT:
        assert second.startswith(first)
        assert third.startswith(second)
    assert "<think>Both files first, then one edit.</think>I look at both files.\n\n<｜DSML｜tool_calls>\n" in second
    assert "<think>The sign is wrong.</think>I change the sign.\n\n<｜DSML｜tool_calls>\n" in third
    results = second[second.rindex("</｜DSML｜tool_calls>") :]
    assert results.count("<tool_result>") == 2
    assert 0 < results.index("return a - b") < results.index("assert add(2, 3)"), "results come in the order of calls"


@pytest.mark.parametrize("name", [path.stem for path in CAPTURES])
def test_the_same_request_without_streaming_is_one_object(replay: Replay, name: str) -> None:
    request = load(name)[-1]
    body = {key: value for key, value in request["body"].items() if key != "stream_options"} | {"stream": False}
    answer = replay.client.post(request["path"], json=body, headers=request["headers"])
    assert answer.status_code == 200, answer.text
    assert "Done." in answer.text
    assert "Short." in answer.text
    assert "</think>" not in answer.text


def test_claude_code_is_told_how_long_its_prompt_is(replay: Replay) -> None:
    request = load("claude-code")[-1]
    body = {key: request["body"][key] for key in ("model", "messages", "system", "tools", "thinking", "output_config")}
    counted = replay.client.post("/v1/messages/count_tokens?beta=true", json=body, headers=request["headers"]).json()
    usage = replay.client.post("/v1/messages", json=body | {"max_tokens": 8}, headers=request["headers"]).json()[
        "usage"
    ]
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"] > 1000


def test_codex_sees_that_a_slow_server_lives() -> None:
    """It gives up on a stream without events; comments are none to it."""
    [request, *_] = load("codex")
    llm = scripted_llm(lambda _: Reply("Short.</think>Done.", first_s=1.0), max_position_embeddings=1 << 20)
    with serving(llm, settings=Settings(keep_alive_s=0.1)) as (url, _):
        text = httpx.post(url + request["path"], json=request["body"], trust_env=False, timeout=20).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds.index("keepalive") == 2
    assert kinds.count("response.created") == 1
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
