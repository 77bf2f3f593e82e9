"""A chat turn: events, the folded message, token counts, stops, cancels, over a scripted model."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from tests.engine.scripted import scripted_llm

from pelagos.engine import sampling_params
from pelagos.errors import ContextLengthError, RequestError

ASK = [{"role": "user", "content": "Hi"}]
OFF = {"thinking": {"type": "disabled"}}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
DSML = "\uff5cDSML\uff5c"
CALL = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n'
    f'<{DSML}parameter name="city" string="true">Paris</{DSML}parameter>\n'
    f"</{DSML}invoke>\n</{DSML}tool_calls>"
)


def test_thinking_is_apart_from_the_answer() -> None:
    llm = scripted_llm("Let me see.</think>Hello, world!")
    turn = llm.chat({"messages": ASK})
    kinds = [event.kind for event in turn]
    assert turn.message == {"role": "assistant", "content": "Hello, world!", "reasoning_content": "Let me see."}
    assert (turn.finish_reason, kinds[-1]) == ("stop", "finish")
    assert turn.thinking
    thought = len(llm.tokenizer.encode("Let me see.")) + 1  # and the closing tag
    assert turn.reasoning_tokens == thought
    assert turn.completion_tokens == thought + len(llm.tokenizer.encode("Hello, world!")) + 1  # and the end token


def test_without_thinking_there_is_no_reasoning_field() -> None:
    turn = scripted_llm("Hello").chat({"messages": ASK, **OFF})
    assert turn.run() == {"role": "assistant", "content": "Hello"}
    assert (turn.thinking, turn.reasoning_tokens) == (False, 0)


@pytest.mark.parametrize("body", [OFF, {"thinking": {"type": "enabled"}}, {"reasoning_effort": "none"}])
def test_the_prompt_says_whether_to_think(body: dict[str, Any]) -> None:
    llm = scripted_llm(lambda prompt: "thinks</think>" if prompt.endswith("<think>") else "answers")
    thinking = body.get("thinking", {}).get("type") == "enabled"
    assert llm.chat({"messages": ASK, **body}).run()["reasoning_content" if thinking else "content"] == (
        "thinks" if thinking else "answers"
    )


def test_tool_calls_are_parsed_and_end_the_turn() -> None:
    llm = scripted_llm(f"I look.</think>{CALL}never read, never generated")
    turn = llm.chat({"messages": ASK, "tools": [TOOL]})
    [call] = turn.run()["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert (turn.finish_reason, turn.message["content"]) == ("tool_calls", "")
    assert turn.completion_tokens < len(llm.tokenizer.encode("I look." + CALL)) + 8


def test_stop_strings_count_in_the_answer_only() -> None:
    turn = scripted_llm("one two</think>three two four").chat({"messages": ASK, "stop": "two"})
    turn.run()
    assert (turn.message["reasoning_content"], turn.message["content"]) == ("one two", "three ")
    assert turn.finish_reason == "stop"


def test_length_and_context_bounds() -> None:
    turn = scripted_llm("Hello, world! " * 9).chat({"messages": ASK, **OFF, "max_completion_tokens": 4})
    turn.run()
    assert (turn.finish_reason, turn.completion_tokens) == ("length", 4)
    llm = scripted_llm("Hello, world! " * 9, max_position_embeddings=20)
    turn = llm.chat({"messages": ASK, **OFF, "max_tokens": 10**6})
    turn.run()
    assert turn.completion_tokens + len(turn.prompt_ids) == 20
    with pytest.raises(ContextLengthError, match="maximum context length is 20"):
        llm.chat({"messages": [{"role": "user", "content": "Hi" * 50}]})


def test_cancel_ends_the_turn() -> None:
    cancel = threading.Event()
    turn = scripted_llm("a b c d e f g").chat({"messages": ASK, **OFF}, cancel=cancel)
    events = iter(turn)
    next(events)
    cancel.set()
    assert [event.kind for event in events][-1] == "finish"
    assert turn.finish_reason == "cancelled"
    assert turn.completion_tokens < 5


def test_sampling_keys_of_a_body() -> None:
    params = sampling_params({"temperature": 0, "stop": None, "max_tokens": 5, "max_completion_tokens": 7, "x": 1})
    assert (params.temperature, params.stop, params.max_tokens, params.top_p) == (0, (), 7, 1.0)
    assert sampling_params({}, max_tokens=9).max_tokens == 9
    with pytest.raises(RequestError, match=r"^temperature='hot'"):
        sampling_params({"temperature": "hot"})
