"""Anthropic's messages as DeepSeek's API speaks them."""

import json
import re
import uuid
from typing import Any

from pelagos.chat.parser import Event
from pelagos.serve.answer import Answer
from pelagos.serve.ask import Ask, Card
from pelagos.serve.protocols import wire

_BLOCKS = ("text", "image", "document", "tool_use", "tool_result", "server_tool_use", "web_search_tool_result")
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


class MessagesWriter(wire.Writer):
    """The events of one message; the whole message is what they add up to."""

    def __init__(self, ask: Ask, answer: Answer, card: Card) -> None:
        super().__init__(ask, answer, card)
        self._message: dict[str, Any] = {
            "id": str(uuid.uuid4()), "type": "message", "role": "assistant", "model": card.model, "content": [],
            "stop_reason": None, "stop_sequence": None,
        }  # fmt: skip
        self._block: dict[str, Any] | None = None  # the open one
        self._arguments = ""  # of the open call
        self._is_pinged = False

    def open(self) -> list[str]:
        started = {"type": "message_start", "message": {**self._message, "content": [], "usage": self._usage(0)}}
        first = self._start({"type": "thinking", "thinking": "", "signature": ""}) if self._answer.thinking else []
        return [wire.frame(started, named=True), *first]

    def push(self, event: Event) -> list[str]:
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
        reason, stop = self._answer.finish_reason or "stop", self._answer.parser.stopped_by
        if reason in ("cancelled", "deadline") and self._is_pinged:
            return [*self._stop(), *self.fail(503, f"the answer ended early: {reason}")]
        kind = "stop_sequence" if reason == "stop" and stop else _STOP_REASONS.get(reason, "max_tokens")
        ends = {"stop_reason": kind, "stop_sequence": stop if kind == "stop_sequence" else None}
        frames = self._stop()
        self._message |= {**ends, "usage": self._usage(self._answer.completion_tokens)}
        ended = {"type": "message_delta", "delta": ends, "usage": self._message["usage"]}
        return [*frames, wire.frame(ended, named=True), wire.frame({"type": "message_stop"}, named=True)]

    def fail(self, status: int, message: str) -> list[str]:
        return [wire.frame(Messages().error(status, message), named=True)]

    def whole(self) -> dict[str, Any]:
        self.open()
        for event in wire.replayed(self._answer):
            self.push(event)
        self.close()
        return self._message

    def _start(self, block: dict[str, Any]) -> list[str]:
        frames = self._stop()
        self._block, self._arguments = block, ""
        self._message["content"].append(block)
        started = {"type": "content_block_start", "index": self._index, "content_block": block}
        frames.append(wire.frame(started, named=True))
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


class Messages(wire.Api):
    """`POST /v1/messages` and `/v1/messages/count_tokens`."""

    summary = "Message, as Anthropic's clients ask for it"
    paths = ("/v1/messages",)
    count_paths = ("/v1/messages/count_tokens",)
    writer = MessagesWriter
    required = ("messages",)
    fields = {  # noqa: RUF012
        **wire.COMMON,
        **dict.fromkeys(("messages", "tools"), wire.OBJECTS),
        **dict.fromkeys(("thinking", "output_config", "tool_choice", "metadata"), wire.OBJECT),
        "max_tokens": wire.TOKENS,
        "system": {"type": ["string", "array"]},
        "stop_sequences": {"type": "array"},
    }

    def read(self, body: dict[str, Any], card: Card) -> Ask:
        wire.check(body, wire.COMMON if card.strict else self.fields)
        name = wire.model_name(body, card)
        if card.strict:
            aliases = [name] if name.startswith("claude") else []
            wire.converted("MessagesRequest", body, card, official=True, aliases=aliases)
        kept = [_tool(each) for each in body.get("tools") or () if _runs_at_client(each)]
        messages = [_message(each) for each in body.get("messages") or ()]
        plain = {"messages": messages, "tools": kept} | ({"system": body["system"]} if body.get("system") else {})
        conversation, _ = wire.converted("MessagesRequest", plain, card)
        stricts = [each.get("name") for each in body.get("tools") or () if each.get("strict")]
        messages, tools = wire.as_chat(conversation, stricts)
        config = wire.mapping(body, "output_config")
        given = {
            **{key: body.get(key) for key in ("temperature", "top_p", "seed", "thinking", "max_tokens")},
            "stop": body.get("stop_sequences"),
            "reasoning_effort": config.get("effort"),
            "tools": tools,
            "tool_choice": _choice(wire.mapping(body, "tool_choice"), tools, card),
        }
        form = wire.mapping(config, "format")
        if form.get("type") == "json_schema" and not card.strict:
            schema = {"name": "answer", "schema": form.get("schema")}
            given["response_format"] = {"type": "json_schema", "json_schema": schema}
        return Ask(
            body=wire.canonical(messages, given, card),
            stream=bool(body.get("stream")),
            user_id=_user(str(wire.first(wire.mapping(body, "metadata").get("user_id"), ""))),
            thinking_budget=wire.budget(body.get("thinking"), None, card),
            clamp=not (card.strict and body.get("max_tokens")),
        )

    def error(self, status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
        """`{"type": "error", "error": {type, message}}`; clients know an overflow by "prompt is too long"."""
        kind = _ERRORS.get(status, "api_error" if status >= 500 else "invalid_request_error")
        said = f"prompt is too long: {message}" if code == "context_length_exceeded" else message
        return {"type": "error", "error": {"type": kind, "message": said}}


def _runs_at_client(tool: dict[str, Any]) -> bool:
    return tool.get("type") in (None, "custom") or "input_schema" in tool


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    kept = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
    return kept | {"input_schema": tool.get("input_schema") or {"type": "object"}}


def _choice(choice: Any, tools: list[dict[str, Any]], card: Card) -> Any:
    """Return chat's tool choice; a tool that was passed over cannot be forced."""
    kind, name = choice.get("type"), choice.get("name")
    if kind == "tool" and (name in [tool["function"]["name"] for tool in tools] or card.strict):
        return {"type": "function", "function": {"name": name}}
    forced = "auto" if card.strict else "required"  # the official API does not force it
    return None if kind is None else {"none": "none", "any": forced}.get(str(kind), "auto")


def _user(text: str) -> str:
    """Return a user without the session that Claude Code writes into the name: sessions share what is cached."""
    if text.startswith("{"):
        try:
            parsed = json.loads(text)
            return json.dumps({name: value for name, value in parsed.items() if name != "session_id"})
        except (ValueError, RecursionError):
            return text
    return re.sub(r"_session_[0-9a-f-]+$", "", text)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with only blocks the library knows, results first."""
    thinks = message.get("role") == "assistant"
    blocks = wire.readable(message.get("content"), (*_BLOCKS, *(["thinking"] if thinks else [])))
    if isinstance(blocks, list):
        blocks = [_block(block) for block in blocks if isinstance(block, dict)] or ""
        blocks = sorted(blocks, key=lambda block: block["type"] != "tool_result") if blocks and not thinks else blocks
    return {**message, "content": blocks}


def _block(block: dict[str, Any]) -> dict[str, Any]:
    if block["type"] == "tool_result":
        return {**block, "content": wire.readable(block.get("content"), ("text", "image", "document"))}
    return {**block, "input": block.get("input") or {}} if block["type"] == "tool_use" else block
