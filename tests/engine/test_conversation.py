"""A conversation with nano that goes on after the process has ended: nothing of it is computed twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pelagos import LLM
from pelagos.chat import Tokenizer
from pelagos.checkpoint import resolve_model
from pelagos.load import load_model

ASK = {"role": "user", "content": "Show the disk usage of a directory."}
NEXT = {"role": "user", "content": "And only of its files?"}


def turn(llm: LLM, messages: list[dict[str, Any]]) -> tuple[dict[str, Any], int, int]:
    """The answer, the prompt's tokens and how many of them were cached."""
    before = llm.stats()
    asked = llm.chat({"messages": messages, "temperature": 0}, max_tokens=60, user_id="someone")
    message = asked.run()
    after = llm.stats()
    return message, len(asked.prompt_ids), after.cached_tokens - before.cached_tokens


def test_yesterdays_conversation_goes_on_without_prefill(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_requests": 2, "kv_bytes": 64 << 20}
    path = resolve_model("nano")
    parts = load_model(path), Tokenizer.load(path)
    first = LLM.from_parts(*parts, disk_dir=tmp_path / "cache", **options)
    answer, asked, cached = turn(first, [ASK])
    assert cached == 0
    first.close()

    second = LLM.from_parts(*parts, disk_dir=tmp_path / "cache", **options)
    messages = [ASK, answer, NEXT]
    later, length, cached = turn(second, messages)
    # All up to where the answer begins is there; the answer itself is rendered without its thoughts, so it is new.
    assert cached == asked - 1
    assert second.stats().disk["hits"] > 0
    other, _, cached = turn(second, messages)
    assert (other, cached) == (later, length - 1)
    second.close()

    cold = LLM.from_parts(*parts, **options)
    assert turn(cold, messages) == (later, length, 0)
    cold.close()
