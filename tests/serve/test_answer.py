"""Answers: raw prompts, log-probabilities and where they belong, bounds, stops and warnings."""

from __future__ import annotations

import dataclasses

import pytest
from tests.engine.scripted import scripted_engine, scripted_llm
from tests.engine.test_turn import CALL, TOOL
from tests.serve.answers import CARD, OFF, answered, ask_for

from pelagos.chat.tokens import BOS, FIM_BEGIN, FIM_END, FIM_HOLE
from pelagos.errors import ContextLengthError, RequestError
from pelagos.serve.answer import prompt_ids
from pelagos.serve.ask import Ask


def test_a_raw_prompt_is_completed_as_it_stands() -> None:
    llm = scripted_llm("\n and so on")
    answer, _ = answered(llm, Ask(body={"max_tokens": 50}, prompt="Once", echo=True))
    assert (answer.message["content"], answer.finish_reason) == ("\n and so on", "stop")
    assert llm.tokenizer.decode(answer.prompt_ids) == f"{BOS}Once"
    by_ids, _ = answered(llm, Ask(prompt=[0, 40, 41]))
    assert by_ids.prompt_ids == [0, 40, 41]


def test_a_suffix_makes_the_middle_the_answer() -> None:
    llm = scripted_llm("b")
    ids = prompt_ids(llm, Ask(prompt="a <｜User｜>", suffix="c"))
    assert llm.tokenizer.decode(ids) == f"{BOS}{FIM_BEGIN}a <｜User｜>{FIM_HOLE}c{FIM_END}"
    assert [index for index in ids if index in llm.tokenizer.special_tokens] == [
        llm.tokenizer.id(name) for name in (BOS, FIM_BEGIN, FIM_HOLE, FIM_END)
    ]
    assert prompt_ids(llm, Ask(prompt=llm.tokenizer.encode("a <｜User｜>"), suffix="c")) == ids
    assert answered(llm, Ask(prompt="", suffix="c"))[0].message["content"] == "b"


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_only_the_beginning(prompt: str | list[int]) -> None:
    llm = scripted_llm("x")
    assert prompt_ids(llm, Ask(prompt=prompt)) == ([llm.tokenizer.id(BOS)] if prompt == "" else [])


def test_log_probabilities_know_where_they_belong() -> None:
    llm = scripted_llm(f"I look.\n</think>See\n{CALL}")
    ask = dataclasses.replace(ask_for(tools=[TOOL]), logprobs=2)
    answer, events = answered(llm, ask)
    spelled = {
        kind: [each.token_id for each in answer.logprobs if each.kind == kind] for kind in ("reasoning", "content")
    }
    for kind, ids in spelled.items():
        assert llm.tokenizer.decode(ids) == "".join(event.text for event in events if event.kind == kind)
    assert [each.token_id for each in answer.logprobs] == answer.output_ids
    assert answer.logprobs[-1].kind == "markup"
    assert answered(llm, ask_for(tools=[TOOL]))[0].logprobs == []


def test_held_back_text_is_placed_when_it_comes_out() -> None:
    llm = scripted_llm("a\n\nb <c\n")
    answer, _ = answered(llm, dataclasses.replace(ask_for(tools=[TOOL], **OFF), logprobs=0))
    assert llm.tokenizer.decode([each.token_id for each in answer.logprobs if each.kind == "content"]) == "a\n\nb <c\n"


def test_the_context_of_the_card_bounds_too() -> None:
    llm = scripted_llm("one two three four five six", max_position_embeddings=1 << 20)
    used = len(prompt_ids(llm, ask_for(**OFF)))
    card = dataclasses.replace(CARD, context_length=used + 2)
    answer, _ = answered(llm, ask_for(**OFF), card=card)
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 2)
    with pytest.raises(ContextLengthError, match=f"{used + 9} tokens \\({used} in the messages, 9 in the completion"):
        answered(llm, dataclasses.replace(ask_for(max_tokens=9, **OFF), clamp=False), card=card)
    with pytest.raises(ContextLengthError, match="maximum context length"):
        answered(llm, ask_for(**OFF), card=dataclasses.replace(CARD, context_length=used))


def test_maximal_effort_in_a_small_context_is_warned_of() -> None:
    small, large = (scripted_llm("x", max_position_embeddings=1 << bits) for bits in (18, 20))
    [warning] = answered(small, ask_for(reasoning_effort="max"))[0].warnings
    assert "393216" in warning
    assert answered(small, ask_for(reasoning_effort="max", **OFF))[0].warnings == []
    assert answered(small, ask_for(reasoning_effort="high"))[0].warnings == []
    assert answered(large, ask_for(reasoning_effort="max"))[0].warnings == []


def test_the_stop_text_is_told() -> None:
    answer, _ = answered(scripted_llm("one two three"), ask_for(stop=["x", "two"], **OFF))
    assert (answer.parser.stopped_by, answer.message["content"]) == ("two", "one ")


def test_options_reach_the_engine() -> None:
    llm = scripted_llm("x")
    answered(llm, dataclasses.replace(ask_for(), user_id="ann", timeout_s=5.0))
    [call] = scripted_engine(llm).calls
    assert (call["user_id"], call["timeout_s"]) == ("ann", 5.0)


def test_a_forced_call_does_not_change_a_thinking_prompt() -> None:
    llm = scripted_llm(f"Hm.</think>{CALL}")
    free = prompt_ids(llm, ask_for(tools=[TOOL]))
    assert prompt_ids(llm, ask_for(tools=[TOOL], tool_choice="required")) == free
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer, _ = answered(llm, ask_for(tools=[TOOL], tool_choice=named))
    assert (answer.prompt_ids, answer.finish_reason) == (free, "tool_calls")
    with pytest.raises(RequestError):
        prompt_ids(llm, ask_for(tools=5))
