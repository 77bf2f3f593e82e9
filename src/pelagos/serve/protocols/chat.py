"""OpenAI-style chat completions as DeepSeek's API speaks them."""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING, Any

from pelagos.errors import RequestError
from pelagos.serve.ask import Ask, Card

if TYPE_CHECKING:
    from pelagos.chat.parser import Event
    from pelagos.serve.answer import Answer


class Chat:
    """`POST /v1/chat/completions`."""

    paths: tuple[str, ...] = ("/v1/chat/completions",)

    def read(self, body: dict[str, Any], card: Card) -> Ask:
        """Check what the server itself decides; rendering and sampling check the rest."""
        model = body.get("model", card.model)
        if model != card.model:
            raise RequestError(f"The supported API model names are {card.model}, but you passed {model!r}.")
        stream = body.get("stream") or False
        if type(stream) is not bool:
            raise RequestError(f"stream={stream!r}: expected true or false")
        options = body.get("stream_options")
        if options is not None and not (stream and isinstance(options, dict)):
            raise RequestError("stream_options: expected an object, and only together with stream: true")
        if body.get("n") not in (None, 1):
            raise RequestError(f"n={body['n']!r}: only 1 is served")
        return Ask(body=body, stream=stream, user_id=str(body.get("user_id") or ""))

    def writer(self, ask: Ask, answer: Answer, card: Card) -> ChatWriter:
        """Return the writer of one answer."""
        return ChatWriter(answer, card)

    def error(self, status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`."""
        kind = "invalid_request_error" if status < 500 else "internal_error"
        return {"error": {"message": message, "type": kind, "param": param, "code": code or kind}}


class ChatWriter:
    """Chunks for a stream, or the whole object at the end."""

    def __init__(self, answer: Answer, card: Card) -> None:
        self._answer = answer
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
            return [self._chunk({"content": None, "reasoning_content": event.text})]
        if event.kind == "content":
            return [self._chunk({"content": event.text, "reasoning_content": None})]
        call: dict[str, Any] = {"index": event.index}
        if event.kind == "tool_call":
            call |= {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}
        else:
            call["function"] = {"arguments": event.text}
        return [self._chunk({"tool_calls": [call]})]

    def close(self) -> list[str]:
        """The chunk with finish_reason and usage, and the end mark."""
        end = {"content": "", "reasoning_content": None}
        return [self._chunk(end, self._answer.finish_reason, usage=self._usage()), "data: [DONE]\n\n"]

    def fail(self, status: int, message: str) -> list[str]:
        """An error object in the stream, and the end mark."""
        return [_frame(Chat().error(status, message)), "data: [DONE]\n\n"]

    def whole(self) -> dict[str, Any]:
        """The chat.completion object."""
        choice = {
            "index": 0, "message": self._answer.turn.message, "finish_reason": self._answer.finish_reason,
            "logprobs": None,
        }  # fmt: skip
        return self._frame | {"object": "chat.completion", "choices": [choice], "usage": self._usage()}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, usage: Any = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _frame(self._frame | {"object": "chat.completion.chunk", "choices": [choice], "usage": usage})

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


def _frame(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
