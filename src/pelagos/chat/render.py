"""From an OpenAI chat-completions body to the prompt DeepSeek-V4 was trained on.

The words come from `deepseek-recipe`, DeepSeek's own renderer, at run time; none is copied here. Ours around it:
the two prompt generations, quick instructions (`task`), the `developer` role, closed conversations, and lenient
reading of histories. Every case where the prompt differs from the library's stands in `docs/prompt_exceptions.md`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from pelagos.chat.tokens import ASSISTANT, BOS, END_THINK, EOS, LATEST_REMINDER, TASK_TOKENS, THINK, USER
from pelagos.config import GENERATIONS
from pelagos.errors import ConfigError, MissingDependency, RequestError

# The preview build knew two prompts; deepseek-recipe renders them as its `low` and `high`.
_PREVIEW_EFFORTS = {
    "minimal": "low",
    "low": "low",
    "medium": "low",
    "high": "low",
    "xhigh": "high",
    "max": "high",
    "ultra": "high",
}

Pieces = list[tuple[str, bool]]  # a text, and whether it is one special token


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt cut at its special tokens, and how the output that follows it begins."""

    pieces: tuple[tuple[str, bool], ...]  # a text, and whether it is one special token; no two texts in a row
    thinking: bool
    effort: str | None  # as deepseek-recipe names it
    start: Literal["reasoning", "content", "tool_calls"]  # what the model writes first
    continues: bool  # the prompt ends inside an assistant message that the caller began
    tools: tuple[dict[str, Any], ...] | None  # the declared functions as {"name", "parameters"}, None without any
    json_output: bool

    @property
    def text(self) -> str:
        """The prompt as one string."""
        return "".join(text for text, _ in self.pieces)

    @property
    def special_ranges(self) -> list[tuple[int, int]]:
        """Half-open character ranges of `text`, ascending, one special token each."""
        ends = list(accumulate(len(text) for text, _ in self.pieces))
        return [(end - len(text), end) for end, (text, special) in zip(ends, self.pieces, strict=True) if special]


def render(body: dict[str, Any], *, generation: str = "0731") -> str:
    """Return the prompt of a chat-completions body as text; see `render_prompt`, which also says what is special."""
    return render_prompt(body, generation=generation).text


def render_prompt(body: dict[str, Any], *, generation: str = "0731") -> Prompt:
    """Render a chat-completions body for a model generation, `preview` or `0731`.

    Reads messages, tools, tool_choice, response_format, thinking and reasoning_effort (also as
    `enable_thinking`, `think` and inside `chat_template_kwargs`) and ignores every other key.
    Raises RequestError for a body that cannot be rendered, ConfigError for another generation and
    MissingDependency without deepseek-recipe. Source: released encoder of V4-Flash and V4-Flash-0731.
    """
    if generation not in GENERATIONS:
        raise ConfigError(f"generation={generation!r}: expected one of {', '.join(GENERATIONS)}")
    asked = {key: body[key] for key in ("tools", "tool_choice", "response_format") if body.get(key) is not None}
    asked |= _mode(body, generation)
    given = body.get("messages")
    if not isinstance(given, list) or not all(isinstance(message, Mapping) for message in given):
        raise RequestError(f"messages: expected a list of objects, got {type(given).__name__}")
    messages = [dict(message) for message in given]
    edits = _plan(asked, messages)
    pieces, request = _convert(messages, asked)
    conversation, options = request.conversation, request.parsing_options
    thinking, tools = conversation.thinking_mode, conversation.tools if options.parse_tool_calls else None
    if edits.tools is not None:
        pieces = _move_tools(pieces, edits.tools, messages, asked)
    for mark, task in edits.tasks:
        pieces = _put_task(pieces, mark, task, thinking=thinking)
    if edits.end is not None:
        keeps_reasoning = thinking and tools is None
        pieces = _put_end(pieces, edits.end, edits.reasoning if keeps_reasoning else None)
    stage = str(options.thinking_initial_stage).rpartition(".")[2]
    in_reasoning = stage.startswith("Reasoning") and given[-1].get("task") is None
    return Prompt(
        pieces=_merge(pieces),
        thinking=thinking,
        effort=conversation.reasoning_effort,
        start="tool_calls" if options.starts_in_tool_calls else "reasoning" if in_reasoning else "content",
        continues=edits.continues,
        tools=None if tools is None else tuple({"name": tool.name, "parameters": tool.parameters} for tool in tools),
        json_output=options.parse_json_output,
    )


def _mode(body: Mapping[str, Any], generation: str) -> dict[str, Any]:
    """Return `thinking` and `reasoning_effort` as deepseek-recipe reads them."""
    extra = body.get("chat_template_kwargs") or {}
    places = [body] + ([extra] if isinstance(extra, Mapping) else [])
    names = ("thinking", "enable_thinking", "think")
    thinking = next((p[name] for p in places for name in names if p.get(name) is not None), None)
    if isinstance(thinking, bool):
        thinking = {"type": "enabled" if thinking else "disabled"}
    effort = next((p["reasoning_effort"] for p in places if p.get("reasoning_effort") is not None), None)
    if generation == "preview":
        forced = isinstance(thinking, Mapping) and thinking.get("type") != "disabled"
        if effort is None or (effort == "none" and forced):
            effort = "high"
        effort = _PREVIEW_EFFORTS.get(effort, effort) if isinstance(effort, str) else effort
    mode = {"thinking": thinking, "reasoning_effort": effort}
    return {key: value for key, value in mode.items() if value is not None}


@dataclass(slots=True)
class _Edits:
    """Changes to make in the library's prompt, at private marks written into message texts."""

    tasks: list[tuple[str, str]] = field(default_factory=list)  # mark behind a text, task
    tools: str | None = None  # mark behind the developer text the tool section belongs to
    end: str | None = None  # mark before the text of the message that ends the conversation
    reasoning: str | None = None  # reasoning of that message, None where an answer to a task has none
    continues: bool = False  # the last message is to be continued


def _plan(asked: dict[str, Any], messages: list[dict[str, Any]]) -> _Edits:
    """Bring `messages` (and tools in `asked`) to what deepseek-recipe accepts and return what to change afterwards."""
    edits = _Edits()
    for index, message in enumerate(messages):
        message["prefix"] = bool(message.get("prefix") or message.pop("wo_eos", False))
        role, tools = message.get("role"), message.pop("tools", None)
        if role == "developer":
            message["role"] = "user"
        if tools and role in ("system", "developer"):
            if asked.get("tools"):
                raise RequestError(f"messages[{index}].tools: the request declares tools already; declare them once")
            asked["tools"] = tools
            if role == "developer":
                edits.tools = _new_mark()
                _write_mark(message, edits.tools, index, at_end=True)
    _fill_tool_calls(messages)
    for index, message in enumerate(messages):
        if message.get("task") is not None:
            _check_task(messages, index)
            edits.tasks.append((_new_mark(), message["task"]))
            _write_mark(message, edits.tasks[-1][0], index, at_end=True)
    last = messages[-1] if messages else {}
    edits.continues = last.get("prefix", False)
    if last.get("role") == "assistant" and not edits.continues and last.get("task") is None:
        answers_task = len(messages) > 1 and messages[-2].get("task") is not None
        edits.reasoning = None if answers_task else last.get("reasoning_content") or ""
        edits.end = _new_mark()
        _write_mark(last, edits.end, len(messages) - 1, at_end=False)
        # The library insists on a result for each call; what stands behind the last message is cut off again.
        calls = last.get("tool_calls")
        ids = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
        messages += [{"role": "tool", "tool_call_id": identity, "content": ""} for identity in ids]
    return edits


def _new_mark() -> str:
    """Return a text that no request can foresee and so none contains."""
    return secrets.token_hex(16)


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the request is not JSON: {error}") from None


def _write_mark(message: dict[str, Any], mark: str, index: int, *, at_end: bool) -> None:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content) and content:
        parts = [dict(part) for part in content]
        part, key = parts[-1 if at_end else 0], "text"
        message["content"] = parts
    else:
        part, key = message, "content"
        content = part[key] = content or ""
    if not isinstance(part.get(key), str):
        raise RequestError(f"messages[{index}].content: expected text at the {'end' if at_end else 'beginning'}")
    part[key] = part[key] + mark if at_end else mark + part[key]


def _check_task(messages: list[dict[str, Any]], index: int) -> None:
    message = messages[index]
    if not isinstance(message["task"], str) or message["task"] not in TASK_TOKENS:
        raise RequestError(f"messages[{index}].task={message['task']!r}: expected one of {', '.join(TASK_TOKENS)}")
    if message.get("role") not in ("user", "assistant") or message.get("tool_calls"):
        raise RequestError(f"messages[{index}].task: only a user message or an assistant's answer can carry a task")
    if index + 1 < len(messages):
        if messages[index + 1].get("role") != "assistant":
            raise RequestError(f"messages[{index}].task: expected the last message, or an assistant message after it")
        messages[index + 1].pop("reasoning_content", None)


def _fill_tool_calls(messages: list[dict[str, Any]]) -> None:
    """Give calls and results without an id matching ones, arguments their text, and empty answers a text."""
    waiting: list[Any] = []
    for message in messages:
        calls = message.pop("tool_calls", None)
        if message.get("role") == "assistant":
            if message.get("content") is None and (not calls or message["prefix"]):
                message["content"] = ""
            if isinstance(calls, list) and calls:
                calls = [_fill_call(call, index) for index, call in enumerate(calls)]
                waiting = [call.get("id") for call in calls if isinstance(call, dict)]
            if calls:
                message["tool_calls"] = calls
        elif message.get("role") == "tool":
            if message.get("tool_call_id") is None and waiting:
                message["tool_call_id"] = waiting[0]
            waiting = [identity for identity in waiting if identity != message.get("tool_call_id")]


def _fill_call(call: Any, index: int) -> Any:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call  # the library names what is missing
    arguments = call["function"].get("arguments")
    if arguments is None or arguments == "":
        arguments = "{}"
    elif not isinstance(arguments, str):
        arguments = _to_json(arguments)
    function = {**call["function"], "arguments": arguments}
    return {"type": "function", **call, "id": call.get("id") or f"call_{index:02}", "function": function}


def _convert(messages: list[dict[str, Any]], asked: Mapping[str, Any]) -> tuple[Pieces, Any]:
    """Return deepseek-recipe's prompt in pieces, and its converted request."""
    try:
        import deepseek_recipe as recipe
    except ImportError as error:
        raise MissingDependency(
            f"chat prompts need deepseek-recipe: `pip install deepseek-recipe==0.2.0` ({error}); "
            "raw completion of text works without it"
        ) from None
    body = {"model": "DeepSeek-V4-Pro", "messages": messages, **asked}
    try:
        request = recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())
        rendered = recipe.DeepseekV4Encoding().render_conversation(request.conversation)
    except (recipe.ConversionError, ValueError, TypeError, RecursionError) as error:
        raise RequestError(str(error)) from None
    pieces, position = [], 0
    for begin, end in rendered.special_ranges:
        pieces += [(rendered.prompt[position:begin], False), (rendered.prompt[begin:end], True)]
        position = end
    return [*pieces, (rendered.prompt[position:], False)], request


def _merge(pieces: Pieces) -> tuple[tuple[str, bool], ...]:
    """Join neighbouring texts, which must be tokenised as one, and drop empty ones."""
    merged: Pieces = []
    for text, special in pieces:
        if not special and merged and not merged[-1][1]:
            merged[-1] = (merged[-1][0] + text, False)
        elif text:
            merged.append((text, special))
    return tuple(merged)


def _slice(pieces: Pieces, begin: int, end: int | None = None) -> Pieces:
    """Return the pieces between two character positions."""
    cut, position = [], 0
    for text, special in pieces:
        part = text[max(begin - position, 0) : None if end is None else max(end - position, 0)]
        cut += [(part, special)] if part else []
        position += len(text)
    return cut


def _split(pieces: Pieces, mark: str) -> tuple[Pieces, Pieces]:
    """Cut at a mark and drop it."""
    position = "".join(text for text, _ in pieces).index(mark)
    return _slice(pieces, 0, position), _slice(pieces, position + len(mark))


def _length_to_special(pieces: Pieces, names: Container[str]) -> int:
    """Count the characters before the first of these special tokens behind BOS."""
    at = next(index for index, (text, special) in enumerate(pieces) if special and text in names)
    return sum(len(text) for text, _ in pieces[:at])


def _move_tools(pieces: Pieces, mark: str, messages: list[dict[str, Any]], asked: dict[str, Any]) -> Pieces:
    """Move the tool section from behind the system text to the mark."""
    turns = (USER, ASSISTANT, LATEST_REMINDER)
    mode = {key: value for key, value in asked.items() if key in ("thinking", "reasoning_effort")}
    begin = _length_to_special(_convert(messages, mode)[0], turns)
    section, _ = _convert([{"role": "user", "content": ""}], {"tools": asked["tools"], "reasoning_effort": "none"})
    end = begin + _length_to_special(section, turns) - len(BOS)
    before, after = _split(_slice(pieces, 0, begin) + _slice(pieces, end), mark)
    return before + _slice(pieces, begin, end) + after


def _put_task(pieces: Pieces, mark: str, task: str, *, thinking: bool) -> Pieces:
    """Replace the opening of the next assistant turn by the task's token."""
    before, after = _split(pieces, mark)
    if after[0] == (EOS, True):
        before, after = [*before, after[0]], after[1:]
    while after and after[0][1] and after[0][0] in (ASSISTANT, THINK, END_THINK):
        after = after[1:]
    opening = [ASSISTANT, THINK if thinking else END_THINK] if task == "action" else []
    return before + [(token, True) for token in [*opening, TASK_TOKENS[task]]] + after


def _put_end(pieces: Pieces, mark: str, reasoning: str | None) -> Pieces:
    """End the prompt with the marked message, its reasoning put back where the library dropped it."""
    before, after = _split(pieces, mark)
    if reasoning is not None:
        before = [*before[:-1], (THINK, True), (reasoning, False), before[-1]]
    return before + after[: after.index((EOS, True)) + 1]
