"""The scripted engine over a small real tokenizer: chat tests without a model."""

from __future__ import annotations

from collections.abc import Callable

from tests.engine.small_tokens import config_for, small_tokenizer

from pelagos.engine import LLM
from pelagos.serve.scripted import Reply, ScriptedEngine


def scripted_llm(reply: Callable[[str], Reply | str] | str, *, delay: float = 0, **changes: int) -> LLM:
    tokenizer = small_tokenizer()
    answer = reply if callable(reply) else lambda _: reply
    config = config_for(tokenizer, **changes)
    return LLM.over(ScriptedEngine(config, tokenizer, answer, delay=delay), config, tokenizer)


def scripted_engine(llm: LLM) -> ScriptedEngine:
    assert isinstance(llm.engine, ScriptedEngine)
    return llm.engine
