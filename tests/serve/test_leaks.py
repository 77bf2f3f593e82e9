"""Markup never leaks out and text never becomes markup: a sample of `benchmarks.leaks`, and injection."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from benchmarks import leaks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.chat.conversations import WORDS
from tests.engine.small_tokens import small_tokenizer
from tests.serve.answers import CARD

from pelagos.chat.tokens import DSML
from pelagos.engine import LLM
from pelagos.errors import RequestError
from pelagos.serve.answer import Shared, prompt_ids
from pelagos.serve.protocols import APIS

TOKENIZER = small_tokenizer()
MODEL: Any = type("Model", (), {"tokenizer": TOKENIZER, "generation": "0731"})


def test_fuzzed_outputs_leak_nothing_however_they_are_cut() -> None:
    counts, wrong = zip(*(leaks.check_output(seed) for seed in range(250)), strict=True)
    assert [each for found in wrong for each in found] == []
    assert sum(counts) == 2000


def test_the_writers_of_all_protocols_leak_nothing() -> None:
    writers = leaks.Writers()
    assert [each for seed in range(40) for each in leaks.check_output(seed, writers)[1]] == []


def test_a_leak_would_be_seen() -> None:
    """The judge itself: a parser that does not know the DSML token lets its canary through."""
    text = leaks.with_canaries(f'Hm <{leaks.D}tool_calls>\n<{leaks.D}invoke name="f">\n</{leaks.D}invoke>\n')
    pieces = [(leaks.ORDINARY if piece == DSML else token, piece) for token, piece in leaks.cut(random.Random(0), text)]
    assert leaks.CANARY in leaks.parsed(pieces, False, ended=True)["content"]


def test_calls_sampled_from_nano_are_in_their_schema() -> None:
    llm, shared = LLM("nano", max_requests=8), Shared()
    try:
        result = leaks.sample_batch(llm, shared, 0, size=8)
    finally:
        llm.close()
    assert result["wrong"] == []
    assert result["counts"]["calls"] > 2


EVIL = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("".join),
)
SLOTS = 16


def chat_body(texts: list[str]) -> dict[str, Any]:
    arguments = {f"k{index}{text}": text for index, text in enumerate(texts[6:8])}
    call = {"id": texts[8], "type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    broken = {"id": "c2", "type": "function", "function": {"name": "f", "arguments": "{" + texts[9]}}
    return {
        "model": "nano",
        "messages": [
            {"role": "system", "content": texts[0]},
            {"role": "user", "content": [{"type": "text", "text": texts[1]}, {"type": "text", "text": texts[2]}]},
            {"role": "assistant", "content": texts[3], "reasoning_content": texts[4], "tool_calls": [call, broken]},
            {"role": "tool", "tool_call_id": texts[8], "content": texts[5]},
            {"role": "tool", "tool_call_id": "c2", "content": texts[10]},
            {"role": "latest_reminder", "content": texts[11]},
            {"role": "user", "content": texts[12], "name": texts[13]},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "description": texts[14], "parameters": schema(texts)}}
        ],
    }


def schema(texts: list[str]) -> dict[str, Any]:
    about = {"type": "string", "description": texts[15], "enum": [texts[14]], "default": texts[13]}
    return {"type": "object", "properties": {texts[12]: about}, "title": texts[0], "required": [texts[12]]}


def messages_body(texts: list[str]) -> dict[str, Any]:
    use = {"type": "tool_use", "id": texts[8], "name": "f", "input": {texts[6]: texts[7], "n": [texts[9]]}}
    thinks = {"type": "thinking", "thinking": texts[4], "signature": texts[2]}
    result = {"type": "tool_result", "tool_use_id": texts[8], "content": texts[5]}
    return {
        "model": "nano",
        "max_tokens": 100,
        "system": [{"type": "text", "text": texts[0]}],
        "messages": [
            {"role": "user", "content": texts[1]},
            {"role": "assistant", "content": [thinks, {"type": "text", "text": texts[3]}, use]},
            {"role": "user", "content": [result, {"type": "text", "text": texts[10]}]},
            {"role": "system", "content": texts[11]},
        ],
        "thinking": {"type": "enabled", "budget_tokens": 99},
        "tools": [{"name": "f", "description": texts[14], "input_schema": schema(texts)}],
    }


def responses_body(texts: list[str]) -> dict[str, Any]:
    arguments = json.dumps({texts[6]: texts[7]})
    return {
        "model": "nano",
        "instructions": texts[0],
        "input": [
            {"role": "developer", "content": [{"type": "input_text", "text": texts[1]}]},
            {"role": "user", "content": texts[2]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": texts[4]}], "summary": []},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": texts[3]}]},
            {"type": "function_call", "call_id": texts[8], "name": "f", "arguments": arguments},
            {"type": "function_call_output", "call_id": texts[8], "output": texts[5]},
            {"role": "user", "content": texts[10]},
        ],
        "tools": [{"type": "function", "name": "f", "description": texts[14], "parameters": schema(texts)}],
    }


BODIES = {"/v1/chat/completions": chat_body, "/v1/messages": messages_body, "/v1/responses": responses_body}


def structure(path: str, texts: list[str]) -> list[int] | None:
    """The special tokens of the prompt, None for a request that is refused."""
    api = next(api for api in APIS if path in api.paths)
    try:
        ids = prompt_ids(MODEL, api.read(BODIES[path](texts), CARD), shared=Shared())
    except RequestError:
        return None
    return [token for token in ids if token in TOKENIZER.special_tokens]


@pytest.mark.parametrize("path", BODIES)
def test_harmless_requests_are_read(path: str) -> None:
    marks = structure(path, [f"x{index}" for index in range(SLOTS)])
    assert marks is not None
    assert marks.count(TOKENIZER.id(DSML)) >= 6


@pytest.mark.parametrize("path", BODIES)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_text_changes_the_structure_of_a_prompt(path: str, data: st.DataObject) -> None:
    harmless = [f"x{index}" for index in range(SLOTS)]
    where = data.draw(st.sets(st.integers(0, SLOTS - 1), min_size=1, max_size=5))
    texts = [data.draw(EVIL) if index in where else text for index, text in enumerate(harmless)]
    marks = structure(path, texts)
    assert marks in (None, structure(path, harmless))
