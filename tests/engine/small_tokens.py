"""A small real tokenizer and the configuration of a tiny model over it."""

from __future__ import annotations

import dataclasses

from pelagos.chat import Tokenizer, train_tokenizer
from pelagos.chat.tokens import BOS, EOS, SPECIAL_TOKENS
from pelagos.config import ModelConfig, tiny

TEXTS = ["The quick brown fox jumps over the lazy dog. Hello, world! " * 3, 'invoke name="get_weather" parameter'] * 4


def small_tokenizer() -> Tokenizer:
    """All special tokens, the 256 bytes and a few merges."""
    return Tokenizer(train_tokenizer(TEXTS, len(SPECIAL_TOKENS) + 256 + 60))


def config_for(tokenizer: Tokenizer, **changes: int) -> ModelConfig:
    bos, eos = tokenizer.id(BOS), tokenizer.id(EOS)
    sizes = {"vocab_size": tokenizer.vocab_size, "bos_token_id": bos, "eos_token_id": eos} | changes
    return dataclasses.replace(tiny(), extra={"generation": "0731"}, **sizes)
