"""An engine that writes a script instead of thinking, over a small real tokenizer: chat tests without a model."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from pelagos.chat import Tokenizer, train_tokenizer
from pelagos.chat.tokens import BOS, EOS, SPECIAL_TOKENS
from pelagos.config import ModelConfig, tiny
from pelagos.engine import LLM, EngineStats, SamplingParams, Stream
from pelagos.engine.output import TextStream
from pelagos.engine.sampler import Pick
from pelagos.errors import ContextLengthError

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


class ScriptedEngine:
    """An `Engine` that answers every prompt with `reply(prompt)`, then the end token; `delay` seconds a token.

    Each request runs on a thread of its own. `fail` is raised in place of the next token; `steps` counts tokens.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, reply: Callable[[str], str], *, delay: float = 0
    ) -> None:
        self.config, self.delay, self.steps = config, delay, 0
        self.fail: Exception | None = None
        self.calls: list[dict[str, Any]] = []  # the options of each submit
        self._tokenizer, self._reply = tokenizer, reply
        self._streams: dict[str, Stream] = {}
        self._done = 0

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        user_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        cuts: Sequence[int] = (),
        on_step: Callable[[], None] | None = None,
    ) -> Stream:
        limit, asked = self.config.max_position_embeddings, len(prompt_ids) + params.max_tokens
        if asked > limit:
            raise ContextLengthError(f"This model's maximum context length is {limit} tokens, {asked} asked for.")
        self.calls.append({"user_id": user_id, "priority": priority, "timeout_s": timeout_s, "cuts": list(cuts)})
        stream = Stream(f"req-{len(self.calls)}", on_step=on_step)
        self._streams[stream.request_id] = stream
        threading.Thread(target=self._write, args=(list(prompt_ids), params, stream), daemon=True).start()
        return stream

    def abort(self, request_id: str) -> None:
        if request_id in self._streams:
            self._streams[request_id].cancel()

    def stats(self) -> EngineStats:
        running = [stream for stream in self._streams.values() if stream.finish_reason is None]
        return EngineStats(requests_running=len(running), requests_done=self._done, generated_tokens=self.steps)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.cancel()

    def _write(self, prompt: list[int], params: SamplingParams, stream: Stream) -> None:
        eos = self.config.eos_token_id
        text = TextStream(self._tokenizer.stream_decoder(), params, eos)
        script = spell(self._tokenizer, self._reply(self._tokenizer.decode(prompt)))
        for token in [*script, eos]:
            time.sleep(self.delay)
            if self.fail is not None:
                stream.close(None, self.fail)
                return
            if stream.is_cancelled:
                break
            self.steps += 1
            for step in text.push([Pick(token, 0.0)]):
                stream.put(step)
            if text.finish_reason is not None:
                break
        self._done += 1
        stream.close(text.finish_reason or "cancelled")


def scripted_llm(reply: Callable[[str], str] | str, *, delay: float = 0, **changes: int) -> LLM:
    tokenizer = small_tokenizer()
    answer = reply if callable(reply) else lambda _: reply
    config = config_for(tokenizer, **changes)
    return LLM.over(ScriptedEngine(config, tokenizer, answer, delay=delay), config, tokenizer)


def scripted_engine(llm: LLM) -> ScriptedEngine:
    assert isinstance(llm.engine, ScriptedEngine)
    return llm.engine
