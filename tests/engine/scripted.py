"""A model that writes a script instead of thinking, over a small real tokenizer: chat tests without training."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pelagos.chat import Tokenizer, train_tokenizer
from pelagos.chat.tokens import ASSISTANT, BOS, EOS, SPECIAL_TOKENS
from pelagos.config import ModelConfig, tiny
from pelagos.engine import LLM
from pelagos.model import Cache

TEXTS = ["The quick brown fox jumps over the lazy dog. Hello, world! " * 3, 'invoke name="get_weather" parameter'] * 4


def small_tokenizer() -> Tokenizer:
    """All special tokens, the 256 bytes and a few merges."""
    return Tokenizer(train_tokenizer(TEXTS, len(SPECIAL_TOKENS) + 256 + 60))


def config_for(tokenizer: Tokenizer, **changes: int) -> ModelConfig:
    bos, eos = tokenizer.id(BOS), tokenizer.id(EOS)
    sizes = {"vocab_size": tokenizer.vocab_size, "bos_token_id": bos, "eos_token_id": eos} | changes
    return dataclasses.replace(tiny(), extra={"generation": "0731"}, **sizes)


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of text in which every spelling of a special token is that token."""
    ids: list[int] = []
    while text:
        at, token = min(((text.find(t), t) for t in SPECIAL_TOKENS if t in text), default=(len(text), ""))
        ids += tokenizer.encode(text[:at]) + ([tokenizer.id(token)] if token else [])
        text = text[at + len(token) :]
    return ids


class ScriptedModel(nn.Module):
    """Answers every prompt with `reply(prompt)`, then the end token, then more end tokens; `delay` seconds a token."""

    def __init__(self, tokenizer: Tokenizer, reply: Callable[[str], str], *, delay: float = 0, **changes: int) -> None:
        super().__init__()
        self.config = config_for(tokenizer, **changes)
        self.delay = delay
        self.forwards = 0
        self._tokenizer = tokenizer
        self._reply = reply
        self._seen: dict[int, list[int]] = {}
        self._weight = nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor, cache: Cache, *, last_only: bool = False) -> Tensor:
        assert last_only
        self.forwards += 1
        time.sleep(self.delay)
        seen = self._seen.setdefault(id(cache), [])
        if cache.position == 0:
            seen.clear()
        cache.advance(ids.shape[1])
        seen += ids[0].tolist()
        logits = torch.full((1, 1, self.config.vocab_size), -20.0)
        logits[0, 0, self._next(seen)] = 20.0
        return logits

    def _next(self, seen: Sequence[int]) -> int:
        if self._tokenizer.id(ASSISTANT) not in seen:  # the middle of a prompt
            return self.config.eos_token_id
        turn = len(seen) - 1 - list(reversed(seen)).index(self._tokenizer.id(ASSISTANT))
        written = len(seen) - (turn + 2)  # behind <Assistant> and the thinking tag
        script = spell(self._tokenizer, self._reply(self._tokenizer.decode(seen[: turn + 2])))
        return script[written] if 0 <= written < len(script) else self.config.eos_token_id


def scripted_llm(reply: Callable[[str], str] | str, *, delay: float = 0, **changes: int) -> LLM:
    tokenizer = small_tokenizer()
    answer = reply if callable(reply) else lambda _: reply
    return LLM.from_parts(ScriptedModel(tokenizer, answer, delay=delay, **changes), tokenizer)  # type: ignore[arg-type]
