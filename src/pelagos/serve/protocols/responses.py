"""OpenAI's responses as DeepSeek's API speaks them: stateless, with reasoning in the open."""

import json
import re
import time
import uuid
from typing import Any

from pelagos.chat.parser import Event
from pelagos.serve.answer import Answer
from pelagos.serve.ask import Ask, Card
from pelagos.serve.protocols import wire

_PARTS = ("input_text", "output_text", "input_image", "input_file")
# Escapes whole, and both halves of a surrogate pair together: what may be decoded before the rest has come.
_STRING = re.compile(
    r'(?:[^"\\]|\\[^u]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u(?![dD][89abAB])[0-9a-fA-F]{4})*'
)
_INPUT = '{"input": "'


class ResponsesWriter(wire.Writer):
    """The events of one response; the response object is what they add up to."""

    def __init__(self, ask: Ask, answer: Answer, card: Card) -> None:
        super().__init__(ask, answer, card)
        self._key, self._sequence, self._told = uuid.uuid4().hex, 0, 0
        self._response: dict[str, Any] = {
            "id": f"resp_{self._key}", "object": "response", "created_at": int(time.time()), "status": "in_progress",
            "model": card.model, **ask.options["echo"], "output": [],
        }  # fmt: skip
        self._item: dict[str, Any] | None = None  # the open one
        self._arguments, self._shown = "", 0  # of the open call; how much of them the input deltas have given

    def open(self) -> list[str]:
        """The response as it begins, unless a sign of life has shown it already."""
        if self._sequence:
            return []
        begun = {**self._response, "output": []}
        return [self._event("created", response=begun), self._event("in_progress", response=begun)]

    def push(self, event: Event) -> list[str]:
        if event.kind == "tool_call":
            return self._start_call(event)
        if event.kind == "arguments":
            return self._push_arguments(event.text)
        kind = "reasoning" if event.kind == "reasoning" else "message"
        frames = [] if self._item and self._item["type"] == kind else self._start_text(kind)
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += event.text
        more: dict[str, Any] = {"delta": event.text}
        if kind == "message":
            more["logprobs"] = self._logprobs()
            part["logprobs"] += more["logprobs"]
        return [*frames, self._event(f"{part['type']}.delta", **self._place(), content_index=0, **more)]

    def close(self) -> list[str]:
        reason, answer = self._answer.finish_reason or "stop", self._answer
        if reason not in ("stop", "tool_calls", "length"):
            return [*self._stop("incomplete"), *self.fail(500, f"the answer ended early: {reason}")]
        status = "incomplete" if reason == "length" else "completed"
        frames = self._stop(status)
        self._response |= {
            "status": status, "completed_at": int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "usage": {
                "input_tokens": answer.prompt_tokens,
                "input_tokens_details": {"cached_tokens": answer.cached_tokens},
                "output_tokens": answer.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
                "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            },
        }  # fmt: skip
        return [*frames, self._event(status, response=self._response)]

    def keep_alive(self) -> list[str]:
        """The response as it begins, then events of their own kind: Codex does not count comments as life."""
        if frames := self.open():
            return frames
        self._sequence += 1
        return [wire.frame({"type": "keepalive", "sequence_number": self._sequence - 1}, named=True)]

    def fail(self, status: int, message: str) -> list[str]:
        code = "server_error" if status >= 500 else "invalid_prompt"
        self._response |= {"status": "failed", "error": {"code": code, "message": message}}
        return [self._event("failed", response=self._response)]

    def whole(self) -> dict[str, Any]:
        for event in wire.replayed(self._answer):
            self.push(event)
        self.close()
        return self._response

    def _event(self, name: str, **fields: Any) -> str:
        self._sequence += 1
        return wire.frame({"type": f"response.{name}", "sequence_number": self._sequence - 1, **fields}, named=True)

    def _place(self) -> dict[str, Any]:
        output = self._response["output"]
        return {"item_id": output[-1]["id"], "output_index": len(output) - 1}

    def _start(self, item: dict[str, Any]) -> list[str]:
        frames = self._stop("completed", "commentary" if item["type"].endswith("_call") else "final_answer")
        output = self._response["output"]
        self._item = {**item, "id": f"{item['id']}_{self._key}_{len(output)}", "status": "in_progress"}
        output.append(self._item)
        return [*frames, self._event("output_item.added", output_index=len(output) - 1, item=self._item)]

    def _start_text(self, kind: str) -> list[str]:
        item: dict[str, Any] = {"type": kind, "id": "msg", "content": [], "role": "assistant", "phase": "final_answer"}
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        if kind == "reasoning":  # what is encrypted is nothing: the text stands in the open
            secret = f"{self._key}-{len(self._response['output'])}"
            item = {"type": kind, "id": "rs", "content": [], "summary": [], "encrypted_content": secret}
            part = {"type": "reasoning_text", "text": ""}
        frames = self._start(item)
        assert self._item is not None
        self._item["content"].append(part)
        return [*frames, self._event("content_part.added", **self._place(), content_index=0, part=part)]

    def _start_call(self, event: Event) -> list[str]:
        self._arguments, self._shown = "", 0
        if event.name in self._ask.options["customs"]:
            item = {"type": "custom_tool_call", "id": "ctc", "call_id": event.id, "name": event.name, "input": ""}
            return self._start(item)
        space, name = self._ask.options["spaces"].get(event.name, (None, event.name))
        where = {"namespace": space} if space else {}
        item = {"type": "function_call", "id": "fc", "call_id": event.id, "name": name, **where, "arguments": ""}
        return self._start(item)

    def _push_arguments(self, text: str) -> list[str]:
        assert self._item is not None
        self._arguments += text
        if self._item["type"] == "function_call":
            self._item["arguments"] += text
            return [self._event("function_call_arguments.delta", **self._place(), delta=text)]
        if not self._arguments.startswith(_INPUT):
            return []
        match = _STRING.match(self._arguments, max(self._shown, len(_INPUT)))
        assert match is not None
        self._shown = match.end()
        return self._push_input(json.loads(f'"{match[0]}"'))

    def _push_input(self, text: str) -> list[str]:
        assert self._item is not None
        self._item["input"] += text
        return [self._event("custom_tool_call_input.delta", **self._place(), delta=text)] if text else []

    def _stop(self, status: str, phase: str | None = None) -> list[str]:
        item, place = self._item, self._place() if self._item else {}
        if item is None:
            return []
        item["status"], frames = status, []
        if item["type"] == "function_call":
            frames = [self._event("function_call_arguments.done", **place, arguments=item["arguments"])]
        elif item["type"] == "custom_tool_call":
            if not self._shown:  # another shape of arguments
                frames = self._push_input(wire.parsed(self._arguments).get("input") or self._arguments)
            frames.append(self._event("custom_tool_call_input.done", **place, input=item["input"]))
        else:
            part = item["content"][0]
            done = {key: part[key] for key in ("text", "logprobs") if key in part}
            frames = [
                self._event(f"{part['type']}.done", **place, content_index=0, **done),
                self._event("content_part.done", **place, content_index=0, part=part),
            ]
        if item["type"] == "message" and phase:
            item["phase"] = phase
        self._item = None
        return [*frames, self._event("output_item.done", output_index=place["output_index"], item=item)]

    def _logprobs(self) -> list[dict[str, Any]]:
        if self._ask.logprobs is None:
            return []
        new = [pick[1:] for pick in self._answer.logprobs[self._told :] if pick.kind == "content"]
        self._told = len(self._answer.logprobs)
        return wire.spelled(self._answer.tokenizer, new)


class Responses(wire.Api):
    """`POST /v1/responses`."""

    summary = "Response, as OpenAI's newer clients ask for it"
    paths = ("/v1/responses",)
    writer = ResponsesWriter
    content = "input"
    fields = {  # noqa: RUF012
        "input": {"type": ["string", "array"]},
        "instructions": wire.TEXT,
        "max_output_tokens": wire.TOKENS,
        "reasoning": wire.OBJECT,
        "text": wire.OBJECT,
        "tools": wire.OBJECTS,
        "tool_choice": {"type": ["string", "object"]},
        "parallel_tool_calls": wire.BOOLEAN,
        "top_logprobs": wire.LOGPROBS,
        "include": {"type": "array"},
        **wire.COMMON,
    }

    def read(self, body: dict[str, Any], card: Card) -> Ask:
        """Return with Ask.options `echo` for the response object, `customs` and `spaces` of tool names."""
        wire.check(body, self.fields)
        if card.strict:
            wire.converted("ResponsesRequest", body, card, official=True)
        reasoning, text = wire.mapping(body, "reasoning"), wire.mapping(body, "text")
        form, listed = wire.mapping(text, "format"), body.get("tools") or []
        plain = {key: body[key] for key in ("instructions", "input") if body.get(key) is not None}
        if isinstance(body.get("input"), list):
            items = [_item(item) for item in wire.objects(body, "input")]
            plain["input"] = items if card.strict else wire.move_reminders(items, _is_output)
        if form.get("type") == "json_object":
            plain["text"] = {"format": form}  # the library wants the word json somewhere
        plain["tools"] = [_tool(tool) for tool in listed]
        conversation, spaces = wire.converted("ResponsesRequest", plain, card)
        messages, tools = wire.as_chat(conversation, [tool.get("name") for tool in listed if tool.get("strict")])
        given = {
            **{key: body.get(key) for key in ("temperature", "top_p", "seed", "parallel_tool_calls")},
            "max_tokens": body.get("max_output_tokens"),
            "reasoning_effort": reasoning.get("effort"),
            "tools": tools,
            "tool_choice": _choice(body.get("tool_choice")),
            "response_format": _format(form),
        }
        top = body.get("top_logprobs")
        given |= {"logprobs": True, "top_logprobs": top} if top is not None else {}
        wants = bool(top) or "message.output_text.logprobs" in (body.get("include") or ())
        customs = {tool.get("name") for tool in listed if tool.get("type") == "custom"}
        return Ask(
            body=wire.canonical(messages, given, card),
            stream=bool(body.get("stream")),
            user_id=str(wire.first(body.get("user"), "")),
            logprobs=(top or 0) if wants else None,
            clamp=not (card.strict and given["max_tokens"]),
            options={"echo": _echo(body, reasoning, text), "customs": customs, "spaces": spaces},
        )


def _format(form: Any) -> dict[str, Any] | None:
    if not form or form.get("type") != "json_schema":
        return dict(form) or None
    kept = {key: form[key] for key in ("name", "description", "schema", "strict") if form.get(key) is not None}
    return {"type": "json_schema", "json_schema": kept}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool the library takes: free text for another tool than `apply_patch` is its parameter `input`."""
    if tool.get("type") != "custom" or tool.get("name") == "apply_patch":
        inner = {"tools": [_tool(each) for each in wire.objects(tool, "tools")]} if "tools" in tool else {}
        return {key: value for key, value in tool.items() if key != "strict"} | inner
    wire.check(tool, {"description": wire.TEXT})
    wire.check(form := wire.mapping(tool, "format"), {"definition": wire.TEXT})
    grammar = form.get("definition")
    description = "\n\n".join(filter(None, (tool.get("description"), grammar)))
    parameters = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    return {"type": "function", "name": tool.get("name"), "description": description, "parameters": parameters}


def _choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    kind, name = choice.get("type"), choice.get("name")
    if kind == "allowed_tools":
        return choice.get("mode") or "auto"
    if kind not in ("function", "custom"):
        return "auto"
    name = f"{choice['namespace']}__{name}" if "namespace" in choice else name
    return {"type": "function", "function": {"name": name}}


def _item(item: dict[str, Any]) -> dict[str, Any]:
    if item.get("type", "message") == "message":
        return {**item, "content": wire.readable(item.get("content"), _PARTS, "input_text")}
    return {**item, "output": wire.readable(item.get("output"), _PARTS, "input_text")} if _is_output(item) else item


def _is_output(item: dict[str, Any]) -> bool:
    return item.get("type") in ("function_call_output", "custom_tool_call_output")


def _echo(body: dict[str, Any], reasoning: Any, text: Any) -> dict[str, Any]:
    return {
        "background": False, "completed_at": None, "error": None, "frequency_penalty": 0.0, "incomplete_details": None,
        "instructions": body.get("instructions"), "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": None, "metadata": {}, "output": [],
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False, "presence_penalty": 0.0,
        "previous_response_id": None, "prompt_cache_key": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "safety_identifier": None, "service_tier": "default", "store": False,
        "temperature": wire.first(body.get("temperature"), 1.0),
        "text": {"format": text.get("format") or {"type": "text"}, "verbosity": text.get("verbosity")},
        "tool_choice": body.get("tool_choice") or "auto", "tools": body.get("tools") or [],
        "top_logprobs": body.get("top_logprobs") or 0, "top_p": wire.first(body.get("top_p"), 1.0),
        "truncation": "disabled", "usage": None, "user": body.get("user"),
    }  # fmt: skip
