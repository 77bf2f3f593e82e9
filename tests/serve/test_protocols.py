"""What each protocol reads of a body: settings that no answer shows, and that no body breaks a reader."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pelagos.chat import render
from pelagos.errors import RequestError
from pelagos.serve.ask import Ask, Card
from pelagos.serve.protocols import APIS

CHAT, COMPLETIONS, RESPONSES, MESSAGES = APIS
LENIENT, STRICT = Card(model="nano"), Card(model="nano", strict=True)
SAY = [{"role": "user", "content": "Hi"}]
OFF = {"thinking": {"type": "disabled"}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def chat(card: Card = LENIENT, **body: Any) -> Ask:
    return CHAT.read({"messages": SAY} | body, card)


@pytest.mark.parametrize(
    ("body", "temperature", "top_p"),
    [
        ({"temperature": 0.3, "top_p": 0.5}, 1.0, 1.0),
        ({"temperature": 0.3, "top_p": 0.5, "tools": [TOOL]}, 1.0, 0.95),
        ({"temperature": 0.3, "tools": [TOOL], "tool_choice": "none"}, 1.0, 1.0),
        ({"temperature": 0.3, "top_p": 0.5, **OFF}, 0.3, 0.5),
        (OFF, None, None),
    ],
)
def test_thinking_has_its_own_sampling(body: dict[str, Any], temperature: Any, top_p: Any) -> None:
    asked = chat(**body).body
    assert (asked.get("temperature"), asked.get("top_p")) == (temperature, top_p)
    assert "presence_penalty" not in chat(presence_penalty=1, **OFF).body


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (OFF, 8_192), ({}, 65_536), ({"reasoning_effort": "max"}, 131_072), ({"reasoning_effort": "ultra"}, 131_072),
        ({"reasoning_effort": "max", **OFF}, 8_192), ({"max_tokens": 7}, 7), ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 10**9}, 393_216),
    ],
)  # fmt: skip
def test_how_long_an_answer_may_be(body: dict[str, Any], tokens: int) -> None:
    assert chat(**body).body["max_tokens"] == tokens
    assert chat(Card(model="nano", max_tokens=5), **OFF).body["max_tokens"] == 5


def test_only_a_strict_server_refuses_what_does_not_fit() -> None:
    assert chat(max_tokens=9).clamp
    assert chat(STRICT).clamp
    assert not chat(STRICT, max_tokens=9).clamp
    assert not RESPONSES.read({"input": "x", "max_output_tokens": 9}, STRICT).clamp
    assert not COMPLETIONS.read({"prompt": "x", "max_tokens": 9}, STRICT).clamp


def test_a_thinking_budget_is_kept_unless_strict() -> None:
    thinking = {"type": "enabled", "budget_tokens": 2000}
    assert chat(thinking=thinking).thinking_budget == 2000
    assert chat(thinking_budget=5, thinking=thinking).thinking_budget == 5
    assert chat(chat_template_kwargs={"thinking_budget": 6}).thinking_budget == 6
    assert chat(STRICT, thinking=thinking).thinking_budget is None
    assert MESSAGES.read({"messages": SAY, "thinking": thinking}, LENIENT).thinking_budget == 2000
    with pytest.raises(RequestError, match="budget_tokens"):
        chat(thinking={"type": "enabled", "budget_tokens": 0})


@pytest.mark.parametrize(
    ("user", "isolated"),
    [
        (None, ""), ("u-1", "u-1"), (7, "7"), ("user_ab_account__session_0f-12", "user_ab_account_"),
        ('{"device_id": "d", "session_id": "s"}', '{"device_id": "d"}'), ("{not json", "{not json"),
    ],
)  # fmt: skip
def test_caches_are_kept_apart_by_user_not_by_session(user: Any, isolated: str) -> None:
    assert chat(user_id=user).user_id == ("" if user is None else str(user))  # only Claude Code writes sessions there
    assert MESSAGES.read({"messages": SAY, "metadata": {"user_id": user}}, LENIENT).user_id == isolated


def test_log_probabilities() -> None:
    assert [chat(logprobs=True, top_logprobs=n).logprobs for n in (None, 0, 20)] == [0, 0, 20]
    assert chat().logprobs is None
    assert RESPONSES.read({"input": "x", "top_logprobs": 2}, LENIENT).logprobs == 2
    assert RESPONSES.read({"input": "x", "include": ["message.output_text.logprobs"]}, LENIENT).logprobs == 0
    asked = [COMPLETIONS.read({"prompt": "x", "logprobs": n}, LENIENT).logprobs for n in (None, False, True, 0, 1, 5)]
    assert asked == [None, None, 0, 0, 1, 5]


def test_strict_knows_the_served_model_only() -> None:
    assert chat(STRICT, model="nano[1m]").body["messages"] == SAY
    for api, body in ((CHAT, {"messages": SAY}), (MESSAGES, {"messages": SAY}), (RESPONSES, {"input": "x"})):
        with pytest.raises(RequestError, match=r"API model names are nano, but you passed other\."):
            api.read({**body, "model": "other"}, STRICT)
        api.read({**body, "model": "other"}, LENIENT)


def test_a_late_system_message_stands_behind_the_results() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    late, result = {"role": "system", "content": "late"}, {"role": "tool", "tool_call_id": "1", "content": "r"}
    given = [*SAY, {"role": "assistant", "content": "", "tool_calls": [call]}, late, result]
    roles = [message["role"] for message in chat(messages=given).body["messages"]]
    assert roles == ["user", "assistant", "tool", "user"]


def test_schemas_name_what_is_checked() -> None:
    for api in APIS:
        schema = api.schema
        assert schema["type"] == "object"
        assert set(schema["required"]) <= schema["properties"].keys()
        assert {"model", "stream", "temperature"} <= schema["properties"].keys()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=3,
)
KINDS = st.sampled_from(
    "text input_text output_text image thinking redacted_thinking tool_use tool_result document refusal reasoning "
    "message function_call function_call_output custom_tool_call custom_tool_call_output function custom namespace "
    "tool_reference enabled json_schema json_object allowed_tools tool any auto none other".split()
)
NAMES = (
    "role content text thinking id tool_use_id name input output call_id arguments tool_calls tool_call_id source "
    "signature function parameters input_schema strict tools schema format effort budget_tokens namespace mode"
)
PARTS = st.lists(st.fixed_dictionaries({"type": KINDS}, optional={"text": JSON, "tool_name": JSON}), max_size=2)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "developer"])
OBJECT = st.fixed_dictionaries(
    {"type": KINDS | JSON}, optional={**dict.fromkeys(NAMES.split(), JSON | PARTS), "role": ROLE}
)
OBJECTS = st.lists(OBJECT, max_size=3)
KEYS = (
    "model stream stream_options max_tokens max_output_tokens temperature top_p top_k seed stop stop_sequences n echo "
    "tool_choice thinking reasoning reasoning_effort response_format logprobs top_logprobs chat_template_kwargs user "
    "user_id metadata system instructions output_config text include thinking_budget continue_final_message suffix"
)
BODY = st.fixed_dictionaries(
    {"messages": OBJECTS | JSON, "input": OBJECTS | JSON, "prompt": JSON},
    optional={**dict.fromkeys(KEYS.split(), OBJECT | JSON), "tools": OBJECTS | JSON},
)


@pytest.mark.parametrize("api", APIS, ids=lambda api: type(api).__name__)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=BODY, strict=st.booleans())
def test_no_body_breaks_a_reader(api: Any, body: dict[str, Any], strict: bool) -> None:
    with contextlib.suppress(RequestError):
        ask = api.read(body, STRICT if strict else LENIENT)
        if ask.prompt is None:
            render(ask.body)
