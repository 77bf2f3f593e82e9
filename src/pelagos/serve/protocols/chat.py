"""OpenAI-style chat completions as DeepSeek's API speaks them."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

from pelagos.errors import RequestError
from pelagos.serve.ask import Ask, Card
from pelagos.serve.protocols import wire

if TYPE_CHECKING:
    from pelagos.chat.parser import Event
    from pelagos.serve.answer import Answer

# What the end of an answer is called when it was not the model's.
FINISH_REASONS = {"cancelled": "aborted", "deadline": "insufficient_system_resource"}
_PARTS = {"image_url": "[Unsupported Image]", "file": "[Unsupported Document]", "thinking": "", "reasoning": ""}
_THINKING = ("thinking", "enable_thinking", "think")


class Chat:
    """`POST /v1/chat/completions`."""

    summary = "Chat completion"
    paths: tuple[str, ...] = ("/v1/chat/completions",)
    count_paths: tuple[str, ...] = ()

    @property
    def schema(self) -> dict[str, Any]:
        """See `Api.schema`."""
        return {
            "type": "object",
            "required": ["messages"],
            "properties": {
                "messages": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["role"]}},
                "thinking": {"type": ["object", "boolean", "null"]},
                "reasoning_effort": {"enum": [*wire.EFFORTS, None]},
                "max_tokens": {"type": ["integer", "null"], "minimum": 1},
                "stop": {"type": ["string", "array", "null"], "items": {"type": "string", "minLength": 1}},
                "tools": {"type": ["array", "null"], "items": {"type": "object"}},
                "tool_choice": {"type": ["string", "object", "null"]},
                "response_format": {"type": ["object", "null"]},
                "logprobs": {"type": ["boolean", "null"]},
                "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": wire.MAX_LOGPROBS},
                "n": {"enum": [1, None]},
                **wire.SAMPLING_SCHEMA,
            },
        }

    def read(self, body: dict[str, Any], card: Card) -> Ask:
        """See `Api.read`; Ask.options has `usage`: whether every chunk of a stream has the key."""
        if card.strict:
            wire.refuse_as_official("ChatCompletionRequest", body, card)
        wire.model_name(body, card)
        extra = wire.mapping(body, "chat_template_kwargs")
        given = {**body, "tools": wire.functions(body.get("tools"))}
        thinking = given["thinking"] = wire.first(*(place.get(name) for place in (body, extra) for name in _THINKING))
        given["reasoning_effort"] = wire.first(body.get("reasoning_effort"), extra.get("reasoning_effort"))
        given["max_tokens"] = wire.first(body.get("max_tokens"), body.get("max_completion_tokens"))
        if body.get("n") not in (None, 1):
            raise RequestError("Invalid n value (currently only n = 1 is supported)")
        messages = [_message(index, each) for index, each in enumerate(wire.objects("messages", body.get("messages")))]
        if not messages:
            raise RequestError("Empty input messages")
        if wire.flag(body, "continue_final_message") and messages[-1]["role"] == "assistant":
            messages[-1]["prefix"] = True
        budget = wire.first(body.get("thinking_budget"), extra.get("thinking_budget"))
        return Ask(
            body=wire.canonical(messages if card.strict else wire.move_reminders(messages), given, card),
            stream=wire.flag(body, "stream"),
            user_id=wire.isolation(wire.first(body.get("user_id"), body.get("user"))),
            logprobs=_logprobs(body),
            thinking_budget=wire.budget(thinking, budget, card),
            clamp=not (card.strict and given["max_tokens"]),
            options={"usage": wire.flag(wire.mapping(body, "stream_options"), "include_usage")},
        )

    def writer(self, ask: Ask, answer: Answer, card: Card) -> ChatWriter:
        """Return the writer of one answer."""
        return ChatWriter(ask, answer, card)

    def count(self, tokens: int) -> dict[str, Any]:
        """See `Api.count`."""
        return {"input_tokens": tokens}

    def error(self, status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`."""
        return wire.openai_error(status, message, code, param)


def _message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its content as text and its reasoning by its name here."""
    place = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise wire.malformed(f"{place}.role", message.get("role"), "a role")
    kept = {name: value for name, value in message.items() if name != "reasoning"}
    kept["content"] = wire.joined(message.get("content"), f"{place}.content", _PARTS)
    reasoning = wire.first(message.get("reasoning_content"), message.get("reasoning"))
    return kept | ({} if reasoning is None else {"reasoning_content": reasoning})


def _logprobs(body: dict[str, Any]) -> int | None:
    most = wire.first(body.get("top_logprobs"), 0)
    if not wire.flag(body, "logprobs"):
        if most:
            raise RequestError(
                "Invalid top_logprobs and logprobs value, logprobs must be set to true if top_logprobs is used."
            )
        return None
    return wire.whole("top_logprobs", most, 0, wire.MAX_LOGPROBS, f"[0, {wire.MAX_LOGPROBS}].")


class ChatWriter:
    """Chunks for a stream, or the whole object at the end."""

    def __init__(self, ask: Ask, answer: Answer, card: Card) -> None:
        self._answer, self._wants_usage, self._logs = answer, ask.options.get("usage"), ask.logprobs is not None
        self._told = 0  # log-probabilities that have been written
        self._waiting: dict[str, list[dict[str, Any]]] = {"reasoning": [], "content": [], "markup": []}
        self._frame = {
            "id": str(uuid.uuid4()), "created": int(time.time()), "model": card.model,
            "system_fingerprint": card.fingerprint,
        }  # fmt: skip

    def open(self) -> list[str]:
        """The chunk that opens the message."""
        silent = {"content": None, "reasoning_content": ""} if self._answer.thinking else {"content": ""}
        return [self._chunk({"role": "assistant"} | silent)]

    def push(self, event: Event) -> list[str]:
        """The chunk of one event other than `finish`."""
        if event.kind == "reasoning":
            return [self._chunk({"content": None, "reasoning_content": event.text}, "reasoning")]
        if event.kind == "content":
            return [self._chunk(self._text(event.text), "content")]
        call: dict[str, Any] = {"index": event.index}
        if event.kind == "tool_call":
            call |= {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}
        else:
            call["function"] = {"arguments": event.text}
        return [self._chunk({"tool_calls": [call]})]

    def close(self) -> list[str]:
        """The chunk with finish_reason and usage, and the end mark."""
        reason = self._answer.finish_reason or "stop"
        end = self._chunk(self._text(""), "reasoning", "content", reason=FINISH_REASONS.get(reason, reason))
        return [end, "data: [DONE]\n\n"]

    def keep_alive(self) -> list[str]:
        """A comment."""
        return [wire.KEEP_ALIVE]

    def fail(self, status: int, message: str) -> list[str]:
        """An error object in the stream, and the end mark."""
        return [wire.frame(wire.openai_error(status, message, None, None)), "data: [DONE]\n\n"]

    def whole(self) -> dict[str, Any]:
        """The chat.completion object."""
        reason = self._answer.finish_reason or "stop"
        choice = {
            "index": 0, "message": self._answer.message, "finish_reason": FINISH_REASONS.get(reason, reason),
            "logprobs": self._logprobs("reasoning", "content"),
        }  # fmt: skip
        return self._frame | {
            "object": "chat.completion", "choices": [choice], "usage": wire.usage(self._answer),
        }  # fmt: skip

    def _text(self, text: str) -> dict[str, Any]:
        return {"content": text} | ({"reasoning_content": None} if self._answer.thinking else {})

    def _chunk(self, delta: dict[str, Any], *kinds: str, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": self._logprobs(*kinds)}
        chunk = self._frame | {"object": "chat.completion.chunk", "choices": [choice]}
        if reason is not None or self._wants_usage:
            chunk["usage"] = None if reason is None else wire.usage(self._answer)
        return wire.frame(chunk)

    def _logprobs(self, *kinds: str) -> dict[str, Any] | None:
        """Log-probabilities of the tokens since the last call for these kinds; markup's are nobody's."""
        if not self._logs:
            return None
        for pick in self._answer.logprobs[self._told :]:
            self._waiting[pick.kind] += wire.spelled(self._answer.tokenizer, [pick])
        self._told = len(self._answer.logprobs)
        names = {"reasoning": "reasoning_content", "content": "content"}
        taken = {names[kind]: self._waiting[kind] for kind in kinds if self._waiting[kind]}
        self._waiting |= {kind: [] for kind in kinds}
        return taken or None
