"""The official SDKs of OpenAI and Anthropic against the server over the scripted engine of the parity suite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from tests.api.test_suite import SCRIPT, serving

from pelagos.serve import Card
from pelagos.serve.scripted import scripted_llm

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

SAY = [{"role": "user", "content": "Say hello"}]
OFF = {"thinking": {"type": "disabled"}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


class Number(BaseModel):
    a: int


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(scripted_llm("nano", SCRIPT), Card(model="nano")) as client:
        yield str(client.base_url)


@pytest.fixture(scope="module")
def oai(url: str) -> Iterator[Any]:
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False)
    ) as client:
        yield client


@pytest.fixture(scope="module")
def claude(url: str) -> Iterator[Any]:
    with anthropic.Anthropic(
        base_url=url, api_key="none", http_client=anthropic.DefaultHttpxClient(trust_env=False)
    ) as client:
        yield client


def test_openai_chat(oai: Any) -> None:
    done = oai.chat.completions.create(model="nano", messages=SAY)
    message = done.choices[0].message
    assert (message.content, message.reasoning_content) == ("Hello, world!", "I greet.")
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.completion_tokens_details.reasoning_tokens > 0
    assert [model.id for model in oai.models.list()] == ["nano"]
    assert oai.models.retrieve("nano").id == "nano"


def test_openai_chat_stream(oai: Any) -> None:
    options = {"include_usage": True}
    with oai.chat.completions.stream(model="nano", messages=SAY, stream_options=options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds[-1] == "content.done"
    assert final.choices[0].message.content == "Hello, world!"
    assert final.choices[0].finish_reason == "stop"
    assert final.usage.total_tokens > 0


def test_openai_tools_over_two_turns(oai: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "Weather in Paris"}]
    first = oai.chat.completions.create(model="nano", messages=messages, tools=[TOOL]).choices[0]
    [call] = first.message.tool_calls
    assert first.finish_reason == "tool_calls"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "Say hello"}]
    second = oai.chat.completions.create(model="nano", messages=messages, tools=[TOOL]).choices[0]
    assert second.finish_reason in ("stop", "tool_calls")


def test_openai_streams_tool_calls(oai: Any) -> None:
    asked = [{"role": "user", "content": "Weather in both"}]
    with oai.chat.completions.stream(model="nano", messages=asked, tools=[TOOL]) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        message = stream.get_final_completion().choices[0].message
    assert [json.loads(event.arguments)["city"] for event in done] == ["Paris", "Rome"]
    assert [call.function.name for call in message.tool_calls] == ["get_weather"] * 2


def test_openai_structured_output(oai: Any) -> None:
    asked = [{"role": "user", "content": "Give json"}]
    done = oai.chat.completions.parse(model="nano", messages=asked, response_format=Number, extra_body=OFF)
    assert done.choices[0].message.parsed == Number(a=1)
    response = oai.responses.parse(model="nano", input="Give json", text_format=Number, reasoning={"effort": "none"})
    assert response.output_parsed == Number(a=1)


def test_openai_parses_strict_tools(oai: Any) -> None:
    class GetWeather(BaseModel):
        city: str

    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    asked = [{"role": "user", "content": "Weather in Paris"}]
    done = oai.chat.completions.parse(model="nano", messages=asked, tools=[tool])
    assert done.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(city="Paris")


def test_openai_errors(oai: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="Empty input messages"):
        oai.chat.completions.create(model="nano", messages=[])
    with pytest.raises(openai.UnprocessableEntityError, match="extreme"):
        oai.chat.completions.create(model="nano", messages=SAY, reasoning_effort="extreme")


def test_openai_completions(oai: Any) -> None:
    done = oai.completions.create(model="nano", prompt="def f():\n", suffix="\nprint(f())", max_tokens=20)
    assert done.choices[0].text == "    return 1"
    pieces = oai.completions.create(model="nano", prompt="Once upon a time", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == " there was a fox."


def test_openai_responses(oai: Any) -> None:
    response = oai.responses.create(model="nano", input="Say hello", instructions="Greet.")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert (response.output_text, response.status) == ("Hello, world!", "completed")
    assert response.usage.output_tokens_details.reasoning_tokens > 0


def test_openai_responses_stream_and_replay(oai: Any) -> None:
    tools: Any = [{"type": "function", **TOOL["function"], "strict": False}]
    with oai.responses.stream(model="nano", input="Weather in both", tools=tools) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.function_call_arguments.done") == 2
    calls = [item for item in final.output if item.type == "function_call"]
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Paris", "Rome"]
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "sun"} for call in calls]
    again = [{"role": "user", "content": "Weather in both"}, *final.output, *outputs]
    assert oai.responses.create(model="nano", input=again, tools=tools).status == "completed"


def test_anthropic_messages(claude: Any) -> None:
    done = claude.messages.create(model="claude-x", max_tokens=99, messages=SAY, system="Greet.")
    assert [(block.type, getattr(block, "text", None)) for block in done.content] == [
        ("thinking", None), ("text", "Hello, world!"),
    ]  # fmt: skip
    assert (done.stop_reason, done.content[0].signature) == ("end_turn", done.id)
    assert done.usage.input_tokens + done.usage.cache_read_input_tokens > 0


def test_anthropic_stream(claude: Any) -> None:
    thinking = {"type": "enabled", "budget_tokens": 2000}
    asked: dict[str, Any] = {"model": "nano", "max_tokens": 4000, "messages": SAY, "thinking": thinking}
    with claude.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert {"thinking", "signature", "text", "message_stop"} <= set(kinds)
    assert (final.content[0].thinking, final.content[1].text) == ("I greet.", "Hello, world!")
    assert final.usage.output_tokens > 0


def test_anthropic_tools_over_two_turns(claude: Any) -> None:
    tools = [{"name": "get_weather", "input_schema": PARAMETERS}]
    asked: list[Any] = [{"role": "user", "content": "Weather in both"}]
    with claude.messages.stream(model="nano", max_tokens=500, messages=asked, tools=tools) as stream:
        first = stream.get_final_message()
    uses = [block for block in first.content if block.type == "tool_use"]
    assert (first.stop_reason, [use.input["city"] for use in uses]) == ("tool_use", ["Paris", "Rome"])
    results = [{"type": "tool_result", "tool_use_id": use.id, "content": "sun"} for use in uses]
    asked += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = claude.messages.create(model="nano", max_tokens=500, messages=asked, tools=tools)
    assert second.content[0].type == "thinking"


def test_anthropic_counts_tokens(claude: Any) -> None:
    tools = [{"name": "get_weather", "input_schema": PARAMETERS}]
    asked: dict[str, Any] = {"model": "nano", "messages": SAY, "system": "Greet."}
    counted = claude.messages.count_tokens(**asked, tools=tools).input_tokens
    used = claude.messages.create(**asked, tools=tools, max_tokens=2).usage
    assert counted == used.input_tokens + used.cache_read_input_tokens
    assert counted > claude.messages.count_tokens(**asked).input_tokens


def test_anthropic_errors(claude: Any) -> None:
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    asked: Any = [*SAY, {"role": "assistant", "content": [use]}, *SAY]
    with pytest.raises(anthropic.BadRequestError, match="tool_result"):
        claude.messages.create(model="nano", max_tokens=9, messages=asked)
