"""OpenAI-style chat completions as DeepSeek's API speaks them."""

import time
import uuid
from typing import Any

from pelagos.chat.parser import Event
from pelagos.errors import FormError, RequestError
from pelagos.serve.answer import Answer, Logprob
from pelagos.serve.ask import Ask, Card
from pelagos.serve.protocols import wire

# What the end of an answer is called when it was not the model's.
_FINISH_REASONS = {"cancelled": "aborted", "deadline": "insufficient_system_resource"}
_THINKING = ("thinking", "enable_thinking", "think")


class ChoiceWriter(wire.Writer):
    """What chat and raw completions share of writing: objects with one choice, and an end mark."""

    def __init__(self, ask: Ask, answer: Answer, card: Card) -> None:
        super().__init__(ask, answer, card)
        self._wants_usage = ask.options.get("usage")
        self._told = 0  # log-probabilities that have been written
        self._frame = {
            "id": str(uuid.uuid4()), "created": int(time.time()), "model": card.model,
            "system_fingerprint": card.fingerprint,
        }  # fmt: skip

    @property
    def _reason(self) -> str:
        reason = self._answer.finish_reason or "stop"
        return _FINISH_REASONS.get(reason, reason)

    def fail(self, status: int, message: str) -> list[str]:
        return [wire.frame(Chat().error(status, message)), wire.DONE]

    def _usage(self) -> dict[str, Any]:
        answer = self._answer
        return {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            "prompt_cache_hit_tokens": answer.cached_tokens,
            "prompt_cache_miss_tokens": answer.prompt_tokens - answer.cached_tokens,
            "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
        }

    def _new_logprobs(self) -> list[Logprob]:
        new = self._answer.logprobs[self._told :]
        self._told += len(new)
        return new


class ChatWriter(ChoiceWriter):
    """Chunks for a stream, or the whole object at the end."""

    def __init__(self, ask: Ask, answer: Answer, card: Card) -> None:
        super().__init__(ask, answer, card)
        self._waiting: list[Logprob] = []  # log-probabilities of text that has not come yet

    def open(self) -> list[str]:
        silent = {"content": None, "reasoning_content": ""} if self._answer.thinking else {"content": ""}
        return [self._chunk({"role": "assistant"} | silent)]

    def push(self, event: Event) -> list[str]:
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
        return [self._chunk(self._text(""), "reasoning", "content", reason=self._reason), wire.DONE]

    def whole(self) -> dict[str, Any]:
        choice = {
            "index": 0, "message": self._answer.message, "finish_reason": self._reason,
            "logprobs": self._logprobs("reasoning", "content"),
        }  # fmt: skip
        return self._frame | {"object": "chat.completion", "choices": [choice], "usage": self._usage()}

    def _text(self, text: str) -> dict[str, Any]:
        return {"content": text} | ({"reasoning_content": None} if self._answer.thinking else {})

    def _chunk(self, delta: dict[str, Any], *kinds: str, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": self._logprobs(*kinds)}
        chunk = self._frame | {"object": "chat.completion.chunk", "choices": [choice]}
        if reason is not None or self._wants_usage:
            chunk["usage"] = None if reason is None else self._usage()
        return wire.frame(chunk)

    def _logprobs(self, *kinds: str) -> dict[str, Any] | None:
        """Log-probabilities of the tokens since the last call for these kinds; markup's are nobody's."""
        if self._ask.logprobs is None:
            return None
        self._waiting += self._new_logprobs()
        names = {"reasoning": "reasoning_content", "content": "content"}
        taken = {names[kind]: [pick[1:] for pick in self._waiting if pick.kind == kind] for kind in kinds}
        self._waiting = [pick for pick in self._waiting if pick.kind not in (*kinds, "markup")]
        return {name: wire.spelled(self._answer.tokenizer, picks) for name, picks in taken.items() if picks} or None


class Chat(wire.Api):
    """`POST /v1/chat/completions`."""

    summary = "Chat completion"
    paths = ("/v1/chat/completions",)
    writer = ChatWriter
    required = ("messages",)
    fields = {  # noqa: RUF012
        **wire.COMMON,
        **dict.fromkeys(("messages", "tools"), wire.OBJECTS),
        **dict.fromkeys(("response_format", "stream_options", "chat_template_kwargs"), wire.OBJECT),
        **dict.fromkeys(("parallel_tool_calls", "logprobs", "continue_final_message"), wire.BOOLEAN),
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), wire.TOKENS),
        **{"top_logprobs": wire.LOGPROBS, "n": {"type": "integer"}, "reasoning_effort": wire.TEXT},
        **{"thinking": {"type": ["object", "boolean"]}, "tool_choice": {"type": ["string", "object"]}},
        "stop": {"type": ["string", "array"]},
    }

    def read(self, body: dict[str, Any], card: Card) -> Ask:
        """Return with Ask.options `usage`: whether every chunk of a stream has the key."""
        wire.check(body, wire.COMMON if card.strict else self.fields)
        if card.strict:
            wire.converted("ChatCompletionRequest", body, card, official=True)
        extra = wire.mapping(body, "chat_template_kwargs")
        thinking = wire.first(*(place.get(name) for place in (body, extra) for name in _THINKING))
        given = {
            **body,
            "tools": _functions(body.get("tools") or []),
            "thinking": thinking,
            "reasoning_effort": wire.first(body.get("reasoning_effort"), extra.get("reasoning_effort")),
            "max_tokens": wire.first(body.get("max_tokens"), body.get("max_completion_tokens")),
        }
        messages = [_message(each) for each in body.get("messages") or ()]
        if not messages:
            raise RequestError("Empty input messages")
        if body.get("continue_final_message") and messages[-1].get("role") == "assistant":
            messages[-1]["prefix"] = True
        if not card.strict:
            messages = wire.move_reminders(messages, lambda message: message.get("role") == "tool")
        named = wire.first(body.get("thinking_budget"), extra.get("thinking_budget"))
        return Ask(
            body=wire.canonical(messages, given, card),
            stream=bool(body.get("stream")),
            user_id=str(wire.first(body.get("user_id"), body.get("user"), "")),
            logprobs=(body.get("top_logprobs") or 0) if body.get("logprobs") else None,
            thinking_budget=wire.budget(thinking, named, card),
            clamp=not (card.strict and given["max_tokens"]),
            options={"usage": bool(wire.mapping(body, "stream_options").get("include_usage"))},
        )


def _functions(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the function tools of a list; tools of other kinds are passed over."""
    kept = [{"type": "function", **tool} for tool in tools if tool.get("type", "function") == "function"]
    for tool in kept:
        wire.check(tool, {"function": wire.OBJECT})
        if not tool.get("function"):
            raise FormError("invalid request body: tools: missing field `function`")
    return kept


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with only parts the library knows, and its reasoning by its name here."""
    kept = {name: value for name, value in message.items() if name != "reasoning"}
    kept["content"] = wire.readable(message.get("content"), ("text", "image_url", "file"))
    reasoning = wire.first(message.get("reasoning_content"), message.get("reasoning"))
    return kept | ({} if reasoning is None else {"reasoning_content": reasoning})
