"""From an OpenAI chat-completions body to the prompt DeepSeek-V4 was trained on.

The words come from `deepseek-recipe`, DeepSeek's own renderer, at run time; none is copied here. Ours around it:
the two prompt generations, quick instructions (`task`), the `developer` role, closed conversations, and lenient
reading of histories. Every case where the prompt differs from the library's stands in `docs/prompt_exceptions.md`.
"""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pelagos.chat.tokens import ASSISTANT, BOS, END_THINK, EOS, LATEST_REMINDER, MARKS, TASK_TOKENS, THINK, USER
from pelagos.config import GENERATIONS
from pelagos.errors import ConfigError, FormError, MissingDependency, RequestError

# The preview build knew two prompts; deepseek-recipe renders them as its `low` and `high`.
_PREVIEW_EFFORTS = {
    **dict.fromkeys(("minimal", "low", "medium", "high"), "low"),
    **dict.fromkeys(("xhigh", "max", "ultra"), "high"),
}
_TOKENS = {mark: token for token, mark in MARKS.items()}
_CUTS = re.compile(f"([{''.join(_TOKENS)}])")
_TURN = re.compile(f"[{MARKS[USER]}{MARKS[ASSISTANT]}{MARKS[LATEST_REMINDER]}]")


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


def render(body: dict[str, Any], *, generation: str = "0731") -> str:
    """Return the prompt of a chat-completions body as text; see `render_prompt`, which also says what is special."""
    return render_prompt(body, generation=generation).text


def render_prompt(body: dict[str, Any], *, generation: str = "0731") -> Prompt:
    """Render a chat-completions body for a model generation, `preview` or `0731`.

    Reads messages, tools, tool_choice, response_format, thinking and reasoning_effort (also as `enable_thinking`,
    `think`, in `chat_template_kwargs`) and add_generation_prompt (a turn opens even behind an assistant's), no more.
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
    edits = _plan(asked, messages, opens=bool(body.get("add_generation_prompt")))
    text, request = _convert(messages, asked)
    conversation, options = request.conversation, request.parsing_options
    thinking, tools = conversation.thinking_mode, conversation.tools if options.parse_tool_calls else None
    if edits.tools is not None:
        text = _move_tools(text, edits.tools, messages, asked)
    for place, task in edits.tasks:
        text = _put_task(text, place, task, thinking=thinking)
    if edits.end is not None:
        text = _put_end(text, edits.end, edits.reasoning if thinking and tools is None else None)
    in_reasoning = "Reasoning" in str(options.thinking_initial_stage).rpartition(".")[2] and not given[-1].get("task")
    return Prompt(
        pieces=tuple((_TOKENS.get(piece, piece), piece in _TOKENS) for piece in _CUTS.split(text) if piece),
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
    """Changes to make in the library's prompt, at places: texts no request can foresee, written into messages."""

    tasks: list[tuple[str, str]] = field(default_factory=list)  # place behind a text, task
    tools: str | None = None  # place behind the developer text the tool section belongs to
    end: str | None = None  # place before the text of the message that ends the conversation
    reasoning: str | None = None  # reasoning of that message, None where an answer to a task has none
    continues: bool = False  # the last message is to be continued


def _plan(asked: dict[str, Any], messages: list[dict[str, Any]], *, opens: bool) -> _Edits:
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
                edits.tools = _write_place(message, index, at_end=True)
    _fill_tool_calls(messages)
    for index, message in enumerate(messages):
        if message.get("task") is not None:
            _check_task(messages, index)
            edits.tasks.append((_write_place(message, index, at_end=True), message["task"]))
    last = messages[-1] if messages else {}
    edits.continues = last.get("prefix", False)
    if last.get("role") == "assistant" and not (edits.continues or opens) and last.get("task") is None:
        answers_task = len(messages) > 1 and messages[-2].get("task") is not None
        edits.reasoning = None if answers_task else last.get("reasoning_content") or ""
        edits.end = _write_place(last, len(messages) - 1, at_end=False)
        # The library insists on a result for each call; what stands behind the last message is cut off again.
        calls = [call for call in last.get("tool_calls") or () if isinstance(call, dict)]
        messages += [{"role": "tool", "tool_call_id": call.get("id"), "content": ""} for call in calls]
    return edits


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the request is not JSON: {error}") from None


def _write_place(message: dict[str, Any], index: int, *, at_end: bool) -> str:
    holder, key, content = message, "content", message.get("content") or ""
    if content and isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        message["content"] = parts = [dict(part) for part in content]
        holder, key = parts[-1 if at_end else 0], "text"
        content = holder.get("text")
    if not isinstance(content, str):
        raise RequestError(f"messages[{index}].content: expected text at the {'end' if at_end else 'beginning'}")
    place = secrets.token_hex(16)
    holder[key] = content + place if at_end else place + content
    return place


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
            if calls:
                calls = calls if isinstance(calls, list) else [calls]
                calls = message["tool_calls"] = [_fill_call(call, index) for index, call in enumerate(calls)]
                waiting = [call.get("id") for call in calls if isinstance(call, dict)]
            if message.get("content") is None and (not calls or message["prefix"]):
                message["content"] = ""
        elif message.get("role") == "tool":
            if message.get("tool_call_id") is None and waiting:
                message["tool_call_id"] = waiting[0]
            waiting = [identity for identity in waiting if identity != message.get("tool_call_id")]


def _fill_call(call: Any, index: int) -> Any:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call  # the library names what is missing
    arguments = call["function"].get("arguments")
    arguments = "{}" if arguments is None or arguments == "" else arguments
    function = {**call["function"], "arguments": arguments if isinstance(arguments, str) else _to_json(arguments)}
    return {"type": "function", **call, "id": call.get("id") or f"call_{index:02}", "function": function}


def _convert(messages: list[dict[str, Any]], asked: Mapping[str, Any]) -> tuple[str, Any]:
    """Return deepseek-recipe's prompt, marks for special tokens, and its converted request."""
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
    except OverflowError:
        raise RequestError("the request holds a whole number beyond 64 bits: write it as text") from None
    except (recipe.ConversionError, ValueError, TypeError, RecursionError) as error:
        raise (RequestError if isinstance(error, recipe.ConversionError) else FormError)(str(error)) from None
    text, position = "", 0
    for begin, end in rendered.special_ranges:
        text += rendered.prompt[position:begin] + MARKS[rendered.prompt[begin:end]]
        position = end
    return text + rendered.prompt[position:], request


def _move_tools(text: str, place: str, messages: list[dict[str, Any]], asked: dict[str, Any]) -> str:
    """Move the tool section from behind the system text to a place."""
    without, _ = _convert(messages, {key: asked[key] for key in ("thinking", "reasoning_effort") if key in asked})
    alone, _ = _convert([{"role": "user", "content": ""}], {"tools": asked["tools"], "reasoning_effort": "none"})
    begin = _TURN.split(without, maxsplit=1)[0]
    section = _TURN.split(alone, maxsplit=1)[0].removeprefix(MARKS[BOS])
    return text.replace(begin + section, begin, 1).replace(place, section)


def _put_task(text: str, place: str, task: str, *, thinking: bool) -> str:
    """Put a task's token in the place of the opening of the next assistant turn."""
    before, _, after = text.partition(place)
    if after.startswith(MARKS[EOS]):
        before, after = before + after[0], after[1:]
    opening = MARKS[ASSISTANT] + MARKS[THINK if thinking else END_THINK] if task == "action" else ""
    after = after.lstrip(MARKS[ASSISTANT] + MARKS[THINK] + MARKS[END_THINK])
    return before + opening + MARKS[TASK_TOKENS[task]] + after


def _put_end(text: str, place: str, reasoning: str | None) -> str:
    """End the prompt with the message at a place, its reasoning put back where the library dropped it."""
    before, _, after = text.partition(place)
    if reasoning is not None:
        before = before[:-1] + MARKS[THINK] + reasoning + before[-1]
    return before + after[: after.index(MARKS[EOS]) + 1]
