"""Replay: a turn's own tokens come back in later prompts, and never any other meaning."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.scripted import scripted_engine, scripted_llm
from tests.engine.small_tokens import small_tokenizer
from tests.serve.answers import OFF, answered, tool

from pelagos.chat.render import render_prompt
from pelagos.chat.tokens import ASSISTANT, DSML, EOS, THINK, USER
from pelagos.engine import LLM
from pelagos.errors import CacheError
from pelagos.serve.answer import Shared
from pelagos.serve.ask import Ask
from pelagos.serve.replay import Replay, _key, replayed_ids

TOKENIZER = small_tokenizer()
ASK = {"role": "user", "content": "Hi"}
PROPERTIES = {"s": {"type": "string"}, "o": {}, "all": {"type": "boolean", "default": False}}
TOOLS = [tool("f", {"type": "object", "properties": PROPERTIES})]
# Spelled as no renderer spells it: other blanks in the JSON, keys in another order.
CALL = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n'
    f'<{DSML}parameter name="s" string="true">a </ b\n</{DSML}parameter>\n'
    f'<{DSML}parameter name="o" string="false">{{"k":[1,2.50],  "a":null}}</{DSML}parameter>\n'
    f"</{DSML}invoke>\n</{DSML}tool_calls>"
)
ARGUMENTS = {"o": {"a": None, "k": [1, 2.5]}, "s": "a </ b\n"}
REPLY = f"Let me see.\n\n</think>I look.{CALL}"


def first_turn(reply: str = REPLY, *, shared: Shared, user_id: str = "", **body: Any) -> tuple[Any, dict[str, Any]]:
    """The answer to ASK, and its message as a client that writes JSON its own way sends it back."""
    answer, _ = answered(
        scripted_llm(reply), Ask(body={"messages": [ASK], "tools": TOOLS, **body}, user_id=user_id), shared=shared
    )
    message = json.loads(json.dumps(answer.message))
    for call in message["tool_calls"]:
        call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), sort_keys=True, indent=3)
    return answer, message


def second_prompt(message: dict[str, Any], *, shared: Shared, user_id: str = "", **body: Any) -> list[int]:
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "done"} for call in message["tool_calls"]]
    messages = [ASK, message, *results]
    prompt = render_prompt({"messages": messages, "tools": TOOLS, **body})
    return replayed_ids(shared.replay, TOKENIZER, prompt, messages, user_id)


def written(answer: Any) -> list[int]:
    return [*answer.prompt_ids, *answer.output_ids]


@pytest.mark.parametrize("mode", [{}, OFF])
def test_the_next_prompt_begins_with_what_was_written(mode: dict[str, Any]) -> None:
    shared = Shared()
    reply = REPLY if not mode else f"I look.{CALL}"
    answer, message = first_turn(reply, shared=shared, **mode)
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == ARGUMENTS
    ids = second_prompt(message, shared=shared, **mode)
    assert ids[: len(written(answer))] == written(answer)
    plain = second_prompt(message, shared=Shared(), **mode)
    assert plain[: len(written(answer))] != written(answer)
    assert ids[len(written(answer)) :] == plain[plain.index(TOKENIZER.id(EOS)) + 1 :]


def test_the_engine_finds_the_turn_in_its_cache() -> None:
    shared, llm = Shared(), scripted_llm(lambda prompt: REPLY.replace("I look.", "I look. " * 200))
    asked = {"tools": TOOLS, "messages": [ASK]}
    answer, _ = answered(llm, Ask(body=asked), shared=shared)
    message = json.loads(json.dumps(answer.message))
    [call] = message["tool_calls"]
    call["function"]["arguments"] = json.dumps(ARGUMENTS)
    result = {"role": "tool", "tool_call_id": call["id"], "content": "x" * 300}
    later = Ask(body={"tools": TOOLS, "messages": [ASK, message, result]})
    again, _ = answered(llm, later, shared=shared)
    assert again.cached_tokens > len(written(answer)) - 130
    assert answered(scripted_llm(REPLY), later, shared=Shared())[0].cached_tokens == 0
    assert scripted_engine(llm).calls[1]["cuts"] == [len(again.prompt_ids) - 1]


def test_the_local_engine_goes_on_where_the_turn_ended() -> None:
    llm, shared = LLM("nano"), Shared()
    tools = [tool("add", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})]
    body = {"messages": [ASK], "tools": tools, "tool_choice": "required", "max_tokens": 200, "seed": 1}
    try:
        answer, _ = answered(llm, Ask(body=body, thinking_budget=8), shared=shared)
        message = json.loads(json.dumps(answer.message))
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "5"} for call in message["tool_calls"]]
        later = body | {"messages": [ASK, message, *results], "tool_choice": "auto", "max_tokens": 2}
        again, _ = answered(llm, Ask(body=later), shared=shared)
    finally:
        llm.close()
    assert answer.finish_reason == "tool_calls"
    assert again.cached_tokens == len(written(answer)) - 1  # all but the end token, which was never computed


def test_forced_calls_keep_their_prefilled_opening() -> None:
    shared = Shared()
    opened = f"\n\n<{DSML}tool_calls>\n"
    answer, message = first_turn(CALL.removeprefix(opened), shared=shared, tool_choice="required", **OFF)
    ids = second_prompt(message, shared=shared, **OFF)
    assert ids[: len(written(answer))] == written(answer)


def edited(message: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(message)), **changes}


def test_only_equal_fields_are_replayed() -> None:
    shared = Shared()
    answer, message = first_turn(shared=shared)
    block = answer.output_ids[answer.output_ids.index(TOKENIZER.id(DSML)) : -1]

    def has(ids: list[int], part: list[int]) -> bool:
        return any(ids[at : at + len(part)] == part for at in range(len(ids)))

    same = second_prompt(message, shared=shared)
    assert has(same, block)
    # Other reasoning or content: the block alone is the model's own.
    for change in ({"reasoning_content": "I thought."}, {"content": "Other"}, {"reasoning_content": None}):
        ids = second_prompt(edited(message, **change), shared=shared)
        assert has(ids, block)
        plain = second_prompt(edited(message, **change), shared=Shared())
        assert TOKENIZER.decode(ids).replace(" ", "") != TOKENIZER.decode(same).replace(" ", "")
        start = plain.index(TOKENIZER.id(DSML))
        assert ids[:start] == plain[:start]
    changes = [{"s": "a"}, {"x": 1}, {"o": {"k": [1]}}, {"o": {"a": None, "k": [True, 2.5]}}]
    for arguments in ({"s": ARGUMENTS["s"]}, *({**ARGUMENTS, **change} for change in changes)):
        other = edited(message)
        other["tool_calls"][0]["function"]["arguments"] = json.dumps(arguments)
        assert second_prompt(other, shared=shared) == second_prompt(other, shared=Shared())
    renamed = edited(message)
    renamed["tool_calls"][0]["function"]["name"] = "g"
    assert second_prompt(renamed, shared=shared) == second_prompt(renamed, shared=Shared())
    strange = edited(message)
    strange["tool_calls"][0]["id"] = "call_00_other"
    assert second_prompt(strange, shared=shared) == second_prompt(strange, shared=Shared())


def test_ids_may_lose_their_punctuation_but_not_their_user() -> None:
    shared = Shared()
    answer, message = first_turn(shared=shared, user_id="ann")
    [call] = message["tool_calls"]
    call["id"] = call["id"].replace("_", "")
    ids = second_prompt(message, shared=shared, user_id="ann")
    assert ids[: len(written(answer))] == written(answer)
    assert second_prompt(message, shared=shared, user_id="bob") == second_prompt(message, shared=Shared())


def test_clients_may_fill_in_declared_defaults() -> None:
    shared = Shared()
    answer, message = first_turn(shared=shared)
    call = message["tool_calls"][0]["function"]
    call["arguments"] = json.dumps({"all": False, **ARGUMENTS})
    assert second_prompt(message, shared=shared)[: len(written(answer))] == written(answer)
    call["arguments"] = json.dumps({"all": True, **ARGUMENTS})
    assert second_prompt(message, shared=shared) == second_prompt(message, shared=Shared())


def test_whole_numbers_may_change_their_spelling() -> None:
    shared = Shared()
    reply = REPLY.replace("2.50", "3.0")
    answer, message = first_turn(reply, shared=shared)
    call = message["tool_calls"][0]["function"]
    call["arguments"] = json.dumps({"o": {"a": None, "k": [1, 3]}, "s": "a </ b\n"})
    assert second_prompt(message, shared=shared)[: len(written(answer))] == written(answer)


def record_of(*extra: int) -> list[int]:
    return [TOKENIZER.id(THINK), *TOKENIZER.encode("x"), *extra]


@pytest.fixture(scope="module")
def turn() -> tuple[Shared, list[int], int, dict[str, Any], list[int]]:
    shared = Shared()
    answer, message = first_turn(shared=shared)
    return shared, written(answer), len(answer.prompt_ids) - 1, message, second_prompt(message, shared=Shared())


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, TOKENIZER.vocab_size + 5), max_size=8), at=st.integers(0, 200), inside=st.booleans()
)
def test_a_wrong_record_changes_nothing_but_spelling(
    turn: tuple[Shared, list[int], int, dict[str, Any], list[int]], tokens: list[int], at: int, inside: bool
) -> None:
    shared, own, begin, message, plain = turn
    record = own[begin:-1]
    record = record[: at % len(record)] + tokens + record[at % len(record) :] if inside else tokens
    shared.replay.remember("", [call["id"] for call in message["tool_calls"]], record)
    got = second_prompt(message, shared=shared)
    special = [[token for token in each if token in TOKENIZER.special_tokens] for each in (got, plain)]
    assert special[0] == special[1]
    # What is the model's own may differ in blanks and the spelling of numbers in its JSON; nothing else may.
    texts = [re.sub(r"[\s0.eE+]", "", TOKENIZER.decode(each)) for each in (got, plain)]
    assert sorted(texts[0]) == sorted(texts[1])


@pytest.mark.parametrize("extra", [USER, ASSISTANT, EOS, THINK])
def test_special_tokens_in_a_record_are_refused(extra: str) -> None:
    """The model wrote a role token in its reasoning: nobody saw it, and it must not come back."""
    shared = Shared()
    _, message = (
        first_turn(REPLY.replace("see", f"see{extra}"), shared=shared) if extra != EOS else first_turn(shared=shared)
    )
    got = second_prompt(message, shared=shared)
    assert [token for token in got if token in TOKENIZER.special_tokens] == [
        token for token in second_prompt(message, shared=Shared()) if token in TOKENIZER.special_tokens
    ]


def test_damaged_blocks_are_not_replayed() -> None:
    shared = Shared()
    for damage in (
        lambda text: text.replace("tool_calls>\n<", "toolcalls>\n<", 1),
        lambda text: text.replace(' string="true"', ""),
    ):
        _, message = first_turn(damage(REPLY), shared=shared)
        assert second_prompt(message, shared=shared) == second_prompt(message, shared=Shared())


def test_cut_calls_are_not_remembered() -> None:
    shared = Shared()
    answer, _ = answered(
        scripted_llm(REPLY), Ask(body={"messages": [ASK], "tools": TOOLS, "max_tokens": 40}), shared=shared
    )
    assert answer.finish_reason == "length"
    assert shared.replay.recall("", [["a"]]) == [None]
    assert shared.replay._database.execute("SELECT count(*) FROM turns").fetchone() == (0,)


def test_the_table_is_bounded_and_keeps_what_is_used() -> None:
    replay = Replay(max_turns=30, max_bytes=4000)
    for index in range(200):
        replay.remember("u", [f"c{index}"], [index] * 5)
        assert replay.recall("u", [["c0"]]) == [[0] * 5]
        kept = [each for each in range(index + 1) if each >= index - 99 and replay._database.execute(
            "SELECT 1 FROM turns WHERE key = ?", (_key("u", [f"c{each}"]),)).fetchone()]  # fmt: skip
        assert len(kept) <= 30 + 3
    assert {190, 199} <= set(kept)
    assert replay.recall("u", [["c1"], ["c150"]]) == [None, None]
    for index in range(40):
        replay.remember("u", [f"big{index}"], range(300))
    [count, size] = replay._database.execute("SELECT count(*), sum(length(ids)) FROM turns").fetchone()
    assert count <= 4
    assert size <= 4000 + 1200
    replay.remember("u", ["c99"], [7])
    replay.remember("u", ["c99"], [8])
    assert replay.recall("u", [["c99"]]) == [[8]]


def test_a_file_is_private_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "new" / "turns.sqlite"
    replay = Replay(file)
    replay.remember("u", ["a", "b"], [1, 2, 3])
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in file.parent.iterdir()} == {0o600}
    replay.close()
    assert replay.recall("u", [["a", "b"]]) == [None]  # closed: nothing is found, nothing breaks
    replay = Replay(file)
    assert replay.recall("u", [["a", "b"], ["a"], ["b", "a"]]) == [[1, 2, 3], None, None]
    replay.close()
    with pytest.raises(CacheError, match="cannot keep turns"):
        Replay(tmp_path)


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "turns.sqlite"
    code = (  # the one file, without the rooms around it
        "import sys, os, runpy; from pathlib import Path\n"
        "replay = runpy.run_path(sys.argv[2])['Replay'](Path(sys.argv[1]))\n"
        "for i in range(200): replay.remember('u', [str(i)], [i] * 50)\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    source = Path(__file__).parents[2] / "src"
    command = [sys.executable, "-c", code, str(file), str(source / "pelagos" / "serve" / "replay.py")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(source)})
    assert done.returncode == -signal.SIGKILL
    replay = Replay(file)
    assert replay.recall("u", [[str(i)] for i in range(200)]) == [[i] * 50 for i in range(200)]
    assert replay.damaged == 0
    replay.close()


def test_a_broken_file_is_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "turns.sqlite"
    file.write_bytes(b"no database " * 1000)
    replay = Replay(file)
    assert replay.damaged == 1
    assert file.with_name("turns.sqlite.damaged").read_bytes().startswith(b"no database")
    replay.remember("u", ["a"], [1])
    assert replay.recall("u", [["a"]]) == [[1]]
    replay.close()
    content = bytearray(file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    file.write_bytes(content)
    for suffix in ("-wal", "-shm"):
        Path(f"{file}{suffix}").unlink(missing_ok=True)
    replay = Replay(file)
    assert replay.damaged == 1
    assert replay.recall("u", [["a"]]) == [None]
    replay._database.close()
    replay._database = sqlite3.connect(file, check_same_thread=False)  # and one that breaks while it is in use
    replay._database.close()
    replay.remember("u", ["a"], [1])
    replay.close()
