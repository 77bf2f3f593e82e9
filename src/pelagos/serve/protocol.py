"""The shapes of the OpenAI chat-completions protocol: the body that comes in, the objects that go out."""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING, Any

from pelagos.errors import RequestError

if TYPE_CHECKING:
    from pelagos.chat.parser import Event
    from pelagos.engine import ChatTurn


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in `raw`; raises RequestError for anything that is not one in valid Unicode."""
    try:
        body = json.loads(raw)
        # A lone surrogate (an escape such as \ud800) is legal JSON, but no text that can be tokenised.
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is not valid JSON text ({error})") from None
    if not isinstance(body, dict):
        raise RequestError(f"the request body is a JSON {type(body).__name__}: expected an object")
    return body


def check_body(body: dict[str, Any], model_name: str) -> bool:
    """Check what the server itself decides (model, stream, n, logprobs) and return whether to stream."""
    model = body.get("model", model_name)
    if model != model_name:
        raise RequestError(f"The supported API model names are {model_name}, but you passed {model!r}.")
    stream = body.get("stream") or False
    if type(stream) is not bool:
        raise RequestError(f"stream={stream!r}: expected true or false")
    options = body.get("stream_options")
    if options is not None and not (stream and isinstance(options, dict)):
        raise RequestError("stream_options: expected an object, and only together with stream: true")
    if body.get("n") not in (None, 1):
        raise RequestError(f"n={body['n']!r}: only 1 is served")
    if body.get("logprobs") or body.get("top_logprobs"):
        raise RequestError("logprobs: not served here; `LLM.generate` returns them")
    return stream


class ChatReply:
    """One answer on its way out: chunks for a stream, or the whole object at the end."""

    def __init__(self, model_name: str, turn: ChatTurn) -> None:
        self._turn = turn
        self._frame = {"id": str(uuid.uuid4()), "created": int(time.time()), "model": model_name}

    def first(self) -> dict[str, Any]:
        """The chunk that opens the message."""
        silent = {"content": None, "reasoning_content": ""} if self._turn.thinking else {"content": ""}
        return self._chunk({"role": "assistant"} | silent)

    def middle(self, event: Event) -> dict[str, Any]:
        """The chunk of one event other than `finish`."""
        if event.kind == "reasoning":
            return self._chunk({"content": None, "reasoning_content": event.text})
        if event.kind == "content":
            return self._chunk({"content": event.text, "reasoning_content": None})
        call: dict[str, Any] = {"index": event.index}
        if event.kind == "tool_call":
            call |= {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}
        else:
            call["function"] = {"arguments": event.text}
        return self._chunk({"tool_calls": [call]})

    def last(self) -> dict[str, Any]:
        """The chunk that closes the message; it carries finish_reason and usage."""
        end = {"content": "", "reasoning_content": None}
        return self._chunk(end, self._turn.finish_reason) | {"usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """The chat.completion object, once the turn is over."""
        choice = {
            "index": 0,
            "message": self._turn.message,
            "finish_reason": self._turn.finish_reason,
            "logprobs": None,
        }
        return self._frame | {"object": "chat.completion", "choices": [choice], "usage": self._usage()}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self._frame | {"object": "chat.completion.chunk", "choices": [choice], "usage": None}

    def _usage(self) -> dict[str, Any]:
        prompt, completion = len(self._turn.prompt_ids), self._turn.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_cache_hit_tokens": 0,
            "prompt_cache_miss_tokens": prompt,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": self._turn.reasoning_tokens},
        }


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """The error object of the protocol; code is the kind unless given."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code or kind}}
