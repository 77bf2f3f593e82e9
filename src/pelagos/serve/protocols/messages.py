"""Anthropic's messages as DeepSeek's API speaks them."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

from pelagos.chat.parser import Event
from pelagos.errors import RequestError
from pelagos.serve.ask import Ask, Card
from pelagos.serve.protocols import wire

if TYPE_CHECKING:
    from pelagos.serve.answer import Answer

_BILLING = "x-anthropic-billing-header"  # differs in every request of some clients: no prompt would be found cached
_PARTS = {
    "image": "[Unsupported Image]", "thinking": "", "redacted_thinking": "", "tool_use": "", "tool_result": "",
    "server_tool_use": "", "web_search_tool_result": "",
}  # fmt: skip
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


class Messages:
    """`POST /v1/messages` and `/v1/messages/count_tokens`."""

    summary = "Message, as Anthropic's clients ask for it"
    paths: tuple[str, ...] = ("/v1/messages",)
    count_paths: tuple[str, ...] = ("/v1/messages/count_tokens",)

    @property
    def schema(self) -> dict[str, Any]:
        """See `Api.schema`."""
        return {
            "type": "object",
            "required": ["messages"],
            "properties": {
                "messages": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["role"]}},
                "system": {"type": ["string", "array", "null"]},
                "max_tokens": {"type": ["integer", "null"], "minimum": 1},
                "stop_sequences": {"type": ["array", "null"], "items": {"type": "string", "minLength": 1}},
                "thinking": {"type": ["object", "null"]},
                "output_config": {"type": ["object", "null"]},
                "tools": {"type": ["array", "null"], "items": {"type": "object"}},
                "tool_choice": {"type": ["object", "null"]},
                "metadata": {"type": ["object", "null"]},
                **wire.SAMPLING_SCHEMA,
            },
        }

    def read(self, body: dict[str, Any], card: Card) -> Ask:
        """See `Api.read`."""
        name = wire.model_name(body, card)
        aliases = [name] if name.startswith("claude") else []
        if card.strict:
            wire.refuse_as_official("MessagesRequest", body, card, aliases=aliases)
        tools, config = _tools(body.get("tools")), wire.mapping(body, "output_config")
        form = None if card.strict else wire.mapping(config, "format")
        given = {
            **{key: body.get(key) for key in ("temperature", "top_p", "thinking", "max_tokens")},
            "stop": body.get("stop_sequences"),
            "reasoning_effort": config.get("effort"),
            "tools": tools,
            "tool_choice": _choice(wire.mapping(body, "tool_choice"), tools, card),
        }
        if form and form.get("type") == "json_schema":
            schema = {"name": "answer", "schema": form.get("schema")}
            given["response_format"] = {"type": "json_schema", "json_schema": schema}
        messages = _conversation(body)
        if not wire.pairs_up(messages):  # in the words clients know
            wire.refuse_as_official("MessagesRequest", body, card, aliases=[name])
        return Ask(
            body=wire.canonical(messages, given, card),
            stream=wire.flag(body, "stream"),
            user_id=wire.isolation(wire.mapping(body, "metadata").get("user_id")),
            thinking_budget=wire.budget(body.get("thinking"), None, card),
            clamp=not (card.strict and body.get("max_tokens")),
        )

    def writer(self, ask: Ask, answer: Answer, card: Card) -> MessagesWriter:
        """Return the writer of one answer."""
        return MessagesWriter(answer, card)

    def count(self, tokens: int) -> dict[str, Any]:
        """See `Api.count`."""
        return {"input_tokens": tokens}

    def error(self, status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
        """`{"type": "error", "error": {type, message}}`; clients know an overflow by "prompt is too long"."""
        kind = _ERRORS.get(status, "api_error" if status >= 500 else "invalid_request_error")
        said = f"prompt is too long: {message}" if code == "context_length_exceeded" else message
        return {"type": "error", "error": {"type": kind, "message": said}}


def _tools(tools: Any) -> list[dict[str, Any]]:
    """Return the tools with a schema as chat's; those that run at the server are passed over."""
    kept = [
        tool for tool in wire.objects("tools", tools) if tool.get("type") in (None, "custom") or "input_schema" in tool
    ]
    names = {"name": "name", "description": "description", "parameters": "input_schema", "strict": "strict"}
    return [
        {"type": "function", "function": {ours: tool[theirs] for ours, theirs in names.items() if theirs in tool}}
        for tool in kept
    ]


def _choice(choice: Any, tools: list[dict[str, Any]], card: Card) -> Any:
    """Return chat's tool choice; a tool that was passed over cannot be forced."""
    kind, name = choice.get("type"), choice.get("name")
    if kind == "tool" and (name in [tool["function"].get("name") for tool in tools] or card.strict):
        return {"type": "function", "function": {"name": name}}
    forced = "auto" if card.strict else "required"  # the official API does not force it
    return {None: None, "none": "none", "any": forced}.get(kind, "auto")


def _conversation(body: dict[str, Any]) -> list[dict[str, Any]]:
    system = body.get("system")
    if isinstance(system, list):
        system = [part for part in system if not (isinstance(part, dict) and _is_billing(part.get("text")))]
    text = wire.joined(system, "system", {})
    messages = [{"role": "system", "content": text}] if text else []
    given = wire.objects("messages", body.get("messages"))
    if not given:
        raise RequestError("messages: at least one message is required")
    for index, message in enumerate(given):
        role, content, place = message.get("role"), message.get("content"), f"messages.{index}"
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else wire.objects(place, content)
        text = wire.joined([_plain(block) for block in blocks if block.get("text") != ""], place, _PARTS)
        if role == "assistant":
            messages.append(_assistant(blocks, text))
        elif role == "user":
            results = [_result(block, place) for block in blocks if block.get("type") == "tool_result"]
            messages += results if results and not text else [*results, {"role": "user", "content": text}]
        elif role != "system":
            raise wire.malformed(f"{place}.role", role, "user, assistant or system")
        elif text:
            messages.append(wire.remind(text))
    return messages


def _is_billing(text: Any) -> bool:
    return isinstance(text, str) and text.startswith(_BILLING)


def _plain(block: Any) -> Any:
    """Return a block that stands for one of a kind the model cannot read."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "document":
        source = block.get("source")
        media = source.get("media_type") if isinstance(source, dict) else None
        return f"[Unsupported document type: {media or 'unknown'}]"
    return str(block.get("tool_name", "")) if kind == "tool_reference" else block


def _assistant(blocks: list[dict[str, Any]], text: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    thoughts = [str(block.get("thinking") or "") for block in blocks if block.get("type") == "thinking"]
    calls = [block for block in blocks if block.get("type") == "tool_use"]
    if thoughts:
        message["reasoning_content"] = "\n\n".join(thoughts)
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _call(block: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
    return {"id": block.get("id"), "type": "function", "function": {"name": block.get("name"), "arguments": arguments}}


def _result(block: dict[str, Any], place: str) -> dict[str, Any]:
    content = block.get("content")
    parts = [_plain(part) for part in content] if isinstance(content, list) else content
    text = wire.joined(parts, f"{place}.tool_result", _PARTS)
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}


class MessagesWriter:
    """The events of one message; the whole message is what they add up to."""

    def __init__(self, answer: Answer, card: Card) -> None:
        self._answer = answer
        self._message: dict[str, Any] = {
            "id": str(uuid.uuid4()), "type": "message", "role": "assistant", "model": card.model, "content": [],
            "stop_reason": None, "stop_sequence": None,
        }  # fmt: skip
        self._block: dict[str, Any] | None = None  # the open one
        self._arguments = ""  # of the open call
        self._is_pinged = False

    def open(self) -> list[str]:
        """The start of the message and, where it thinks, of the first block."""
        started = {"type": "message_start", "message": {**self._message, "content": [], "usage": self._usage(0)}}
        first = self._start({"type": "thinking", "thinking": "", "signature": ""}) if self._answer.thinking else []
        return [wire.frame(started, named=True), *first]

    def push(self, event: Event) -> list[str]:
        """The events of one event other than `finish`."""
        if event.kind == "tool_call":
            return self._start({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
        if event.kind == "arguments":
            self._arguments += event.text
            return [self._delta({"type": "input_json_delta", "partial_json": event.text})]
        kind = {"reasoning": "thinking", "content": "text"}[event.kind]
        empty = {"thinking": {"thinking": "", "signature": ""}, "text": {"text": ""}}[kind]
        frames = [] if self._block and self._block["type"] == kind else self._start({"type": kind, **empty})
        assert self._block is not None
        self._block[kind] += event.text
        return [*frames, self._delta({"type": f"{kind}_delta", kind: event.text})]

    def close(self) -> list[str]:
        """The end of the open block and of the message, usage included."""
        reason, stop = self._answer.finish_reason or "stop", self._answer.stopped_by
        kind = "stop_sequence" if reason == "stop" and stop else _STOP_REASONS.get(reason, "max_tokens")
        ends = {"stop_reason": kind, "stop_sequence": stop if kind == "stop_sequence" else None}
        frames = self._stop()
        self._message |= {**ends, "usage": self._usage(self._answer.completion_tokens)}
        ended = {"type": "message_delta", "delta": ends, "usage": self._message["usage"]}
        return [*frames, wire.frame(ended, named=True), wire.frame({"type": "message_stop"}, named=True)]

    def keep_alive(self) -> list[str]:
        """A comment."""
        return [wire.KEEP_ALIVE]

    def fail(self, status: int, message: str) -> list[str]:
        """An error event."""
        return [wire.frame(Messages().error(status, message), named=True)]

    def whole(self) -> dict[str, Any]:
        """The message object."""
        self.open()
        for event in wire.replayed(self._answer):
            self.push(event)
        self.close()
        return self._message

    def _start(self, block: dict[str, Any]) -> list[str]:
        frames = self._stop()
        self._block, self._arguments = block, ""
        self._message["content"].append(block)
        frames.append(
            wire.frame({"type": "content_block_start", "index": self._index, "content_block": block}, named=True)
        )
        if not self._is_pinged:
            frames.append(wire.frame({"type": "ping"}, named=True))
            self._is_pinged = True
        return frames

    def _stop(self) -> list[str]:
        if self._block is None:
            return []
        frames = []
        if self._block["type"] == "thinking":
            self._block["signature"] = self._message["id"]
            frames.append(self._delta({"type": "signature_delta", "signature": self._message["id"]}))
        elif self._block["type"] == "tool_use":
            self._block["input"] = wire.parsed(self._arguments)
        self._block = None
        return [*frames, wire.frame({"type": "content_block_stop", "index": self._index}, named=True)]

    @property
    def _index(self) -> int:
        return len(self._message["content"]) - 1

    def _delta(self, delta: dict[str, Any]) -> str:
        return wire.frame({"type": "content_block_delta", "index": self._index, "delta": delta}, named=True)

    def _usage(self, output_tokens: int) -> dict[str, Any]:
        answer = self._answer
        return {
            "input_tokens": answer.prompt_tokens - answer.cached_tokens, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": answer.cached_tokens, "output_tokens": output_tokens,
            "output_tokens_details": {"thinking_tokens": answer.reasoning_tokens}, "service_tier": "standard",
        }  # fmt: skip
