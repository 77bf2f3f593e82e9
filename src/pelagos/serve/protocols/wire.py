"""What the protocols share: tables of fields, the library's conversions, the one body all become, and frames.

Without `Card.strict` a request is read for what it means: unknown fields and tools are passed over, what cannot be
done is done as far as it can. With it, `deepseek-recipe` reads the body first and refuses what the official API does.
A whole answer is what its stream's events add up to: writers build it by replaying the finished message (`replayed`).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from pelagos.chat.parser import Event
from pelagos.chat.tokenizer import Tokenizer
from pelagos.errors import FormError, MissingDependency, RequestError
from pelagos.serve.answer import Answer
from pelagos.serve.ask import Ask, Card

Field = Mapping[str, Any]  # a JSON schema
MAX_TOKENS = 393_216
KEEP_ALIVE, DONE = ": keep-alive\n\n", "data: [DONE]\n\n"
_TYPES = {"boolean": bool, "string": str, "object": dict, "array": list, "integer": int, "number": (int, float)}
_SETTINGS = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "max_tokens", "stop", "seed", "n", "logprobs",
    "top_logprobs", "thinking", "reasoning_effort",
)  # fmt: skip


def ranged(kind: str, least: float, most: float) -> Field:
    """A number within bounds; the library checks them, in the official words."""
    return {"type": kind, "minimum": least, "maximum": most}


BOOLEAN, TEXT, OBJECT = {"type": "boolean"}, {"type": "string"}, {"type": "object"}
OBJECTS: Field = {"type": "array", "items": OBJECT}
TOKENS = ranged("integer", 1, 2**63)
LOGPROBS = ranged("integer", 0, 20)
# What requests of every protocol may have.
COMMON: Mapping[str, Field] = {
    "model": TEXT,
    "stream": BOOLEAN,
    "temperature": ranged("number", 0, 2),
    "top_p": ranged("number", 1e-12, 1),
    "presence_penalty": ranged("number", -2, 2),
    "frequency_penalty": ranged("number", -2, 2),
    "seed": ranged("integer", 0, 2**63 - 1),
}


class Writer(ABC):
    """One answer on its way out in one protocol: frames of a stream, or one object."""

    def __init__(self, ask: Ask, answer: Answer, card: Card) -> None:
        self._ask, self._answer = ask, answer

    @abstractmethod
    def open(self) -> list[str]:
        """Frames that come before the first event; the answer's prompt has been admitted by then."""

    @abstractmethod
    def push(self, event: Event) -> list[str]:
        """Frames of one event other than `finish`."""

    @abstractmethod
    def close(self) -> list[str]:
        """Frames that end the stream, usage included, once the answer has finished."""

    def keep_alive(self) -> list[str]:
        """Frames that show a waiting client that the server lives, before `open` or after it: a comment."""
        return [KEEP_ALIVE]

    @abstractmethod
    def fail(self, status: int, message: str) -> list[str]:
        """Frames that end a stream which an error broke off."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The whole answer as one JSON object, once it has finished."""


class Api(ABC):
    """A protocol: how its requests are read and its answers written. One instance serves all requests."""

    summary: ClassVar[str]  # one line for the OpenAPI document
    paths: ClassVar[tuple[str, ...]]  # of POST; each also with `/v1` taken away
    count_paths: ClassVar[tuple[str, ...]] = ()  # of POST of the same bodies, answered by `count`
    fields: ClassVar[Mapping[str, Field]]  # checked before anything else
    required: ClassVar[tuple[str, ...]] = ()
    content: ClassVar[str] = "messages"  # the field that is too long when the context overflows
    writer: ClassVar[type[Writer]]

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of a request body, for the OpenAPI document."""
        fields = {name: {"anyOf": [dict(field), {"type": "null"}]} for name, field in self.fields.items()}
        return {"type": "object", "required": list(self.required), "properties": fields}

    @abstractmethod
    def read(self, body: dict[str, Any], card: Card) -> Ask:
        """Check a request body and say what it asks for; raises RequestError with the protocol's words."""

    def count(self, tokens: int) -> dict[str, Any]:
        """The answer of `count_paths`: how many tokens the prompt of a body has."""
        return {"input_tokens": tokens}

    def error(self, status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
        """The error object for an HTTP status: `{"error": {message, type, param, code}}`."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "internal_error" if status >= 500 else kinds.get(status, "invalid_request_error")
        place = self.content if param == "messages" else param
        return {"error": {"message": message, "type": kind, "param": place, "code": code or kind}}


def check(body: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Raise FormError for a field of another type and RequestError for one beyond its bounds; null is absent."""
    for name, field in fields.items():
        value = body.get(name)
        if value is None:
            continue
        kinds = [field["type"]] if isinstance(field["type"], str) else field["type"]
        good = any(isinstance(value, _TYPES[kind]) and (kind == "boolean") is isinstance(value, bool) for kind in kinds)
        if not good or ("items" in field and not all(isinstance(each, dict) for each in value)):
            raise malformed(name, value, f"{' or '.join(kinds)}{' of objects' if 'items' in field else ''}")


def malformed(name: str, value: Any, expected: str) -> FormError:
    """The error of a field with a wrong type or an unknown value."""
    shown = json.dumps(value, ensure_ascii=False)
    return FormError(f"invalid request body: {name}: invalid value {shown[:80]}, expected {expected}")


def mapping(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an object field, empty where absent or null."""
    check(body, {name: OBJECT})
    return body.get(name) or {}


def objects(body: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return a field that is a list of objects, empty where absent or null."""
    check(body, {name: OBJECTS})
    return body.get(name) or []


def first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)


def model_name(body: Mapping[str, Any], card: Card) -> str:
    """Return the model a body names, without the `[1m]` some clients append; the served one where it names none."""
    return (body.get("model") or card.model).removesuffix("[1m]")


def converted(
    kind: str, body: Mapping[str, Any], card: Card, *, official: bool = False, aliases: Iterable[str] = ()
) -> tuple[Any, dict[str, tuple[str, str]]]:
    """Return the conversation deepseek-recipe's request class `kind` makes of a body, and its namespaces' tools.

    `official` also refuses unknown models and reasoning that was not sent back. Errors are in the library's words.
    """
    try:
        import deepseek_recipe as recipe
    except ImportError as error:
        raise MissingDependency(f"this needs deepseek-recipe: `pip install deepseek-recipe==0.2.0` ({error})") from None
    model = model_name(body, card) if official else card.model
    versions = dict.fromkeys((card.model, *aliases), recipe.ModelVersion.DeepseekV4Pro)
    options = recipe.ConversionOptions().with_model_versions_by_name(versions)
    options = options.with_messages_web_search(recipe.WebSearchBehavior.Drop)
    if official:
        options = options.with_reasoning_content_behavior(recipe.ReasoningContentBehavior.Reject)
    try:
        request = getattr(recipe, kind)({**body, "model": model})
        spaces = request.namespace_tool_map(options) if kind == "ResponsesRequest" else {}
        return request.convert(options).conversation, spaces
    except OverflowError:
        raise FormError("the request holds a whole number beyond 64 bits: write it as text") from None
    except recipe.ConversionError as error:
        raise RequestError(json.loads(error.body)["error"]["message"]) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise FormError(str(error)) from None


def as_chat(conversation: Any, strict_tools: Container[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the messages and tools of a conversation as a chat-completions body has them."""
    messages: list[dict[str, Any]] = []
    for each in conversation.messages:
        more = {"reasoning_content": each.reasoning_content, "tool_call_id": each.tool_call_id}
        kept = {name: value for name, value in more.items() if value is not None}
        messages.append({"role": each.role, "content": each.content, **kept})
        if each.tool_calls:
            messages[-1]["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in each.tool_calls
            ]
    functions = (
        {"name": tool.name, "description": tool.description or "", "parameters": tool.parameters}
        | ({"strict": True} if tool.name in strict_tools else {})
        for tool in conversation.tools
    )
    return messages, [{"type": "function", "function": function} for function in functions]


def readable(content: Any, known: Container[str], text: str = "text") -> Any:
    """Return a content whose parts of other kinds than `known` are replaced by their texts or names."""
    if not isinstance(content, list):
        return "" if content is None else content
    parts: list[Any] = []
    for part in content:
        part = {"type": text, "text": part} if isinstance(part, str) else part
        kind = str(part.get("type")) if isinstance(part, dict) else ""
        if kind in known or not isinstance(part, dict):
            parts.append(part)
        elif kind not in ("thinking", "redacted_thinking", "reasoning"):
            names = (part.get("text"), part.get("refusal"), part.get("tool_name"), f"[Unsupported {kind}]")
            parts.append({"type": text, "text": first(*names)})
    return parts


def move_reminders(messages: list[dict[str, Any]], is_result: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Turn system messages behind the first other one into reminders in place, never between calls and results.

    The library would move them to the front, where each new one makes the whole prompt new.
    """
    moved: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    for message in messages:
        if message.get("role") == "system" and any(each.get("role") != "system" for each in moved):
            content = message.get("content") or ""
            parts = content if isinstance(content, list) else [content]
            text = "\n\n".join(str(part.get("text") or "" if isinstance(part, dict) else part) for part in parts)
            waiting.append({"role": "user", "content": f"<system-reminder>\n{text}\n</system-reminder>"})
            continue
        if not is_result(message):
            moved += waiting
            waiting = []
        moved.append(message)
    return moved + waiting


def check_settings(given: Mapping[str, Any], card: Card) -> None:
    """Raise what deepseek-recipe says of settings by chat's names; more tokens than any answer has are the most."""
    probe = {name: given[name] for name in _SETTINGS if given.get(name) is not None}
    if type(probe.get("max_tokens")) is int:
        probe["max_tokens"] = min(probe["max_tokens"], MAX_TOKENS)
    if isinstance(probe.get("thinking"), bool):
        del probe["thinking"]
    converted("ChatCompletionRequest", {"messages": [{"role": "user", "content": ""}], **probe}, card)


def sampling(given: Mapping[str, Any], *, thinking: bool = False, tools: bool = False) -> dict[str, Any]:
    """Return the sampling fields that have an effect: thinking has its own temperature and top_p."""
    names = ("seed", "top_k", "min_p", "repetition_penalty", *(() if thinking else ("temperature", "top_p")))
    kept = {name: given[name] for name in names if given.get(name) is not None}
    own = {"temperature": 1.0, "top_p": 0.95 if tools else 1.0} if thinking else {}
    return kept | own | {"stop": given.get("stop") or []}


def budget(thinking: Any, named: Any, card: Card) -> int | None:
    """Return the reasoning tokens a request allows: an extension `named`, or `thinking.budget_tokens`."""
    tokens = first(named, thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None)
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise malformed("budget_tokens", tokens, "a whole number >= 1")
    return None if card.strict else tokens


def canonical(messages: list[dict[str, Any]], given: Mapping[str, Any], card: Card) -> dict[str, Any]:
    """Return the chat-completions body that is rendered: messages, tools and the settings in `given` by chat's names.

    Thinking, max_tokens and sampling are written out; null in `given` is absent. Raises RequestError, FormError.
    """
    check_settings(given, card)
    thinking, effort = given.get("thinking"), given.get("reasoning_effort")
    thinking = thinking["type"] != "disabled" if isinstance(thinking, Mapping) else thinking
    thinks = effort != "none" if thinking is None else thinking
    tools, form = _unstrict(given.get("tools") or [], given.get("response_format"), card)
    choice = given.get("tool_choice")
    body: dict[str, Any] = {"messages": messages, "add_generation_prompt": True}
    body["thinking"] = {"type": "enabled" if thinks else "disabled"}
    if tools:
        body |= {"tools": tools, "tool_choice": _choice(choice, tools)}
    parallel = None if card.strict else given.get("parallel_tool_calls")
    more = {"reasoning_effort": effort, "response_format": form, "parallel_tool_calls": parallel}
    body |= {name: value for name, value in more.items() if value is not None}
    body |= sampling(given, thinking=thinks, tools=bool(tools) and choice != "none")
    usual = 8_192 if not thinks else 131_072 if effort in ("max", "ultra") else 65_536
    asked = given.get("max_tokens")
    return body | {"max_tokens": min(asked, MAX_TOKENS) if asked else card.max_tokens or usual}


def _unstrict(tools: list[dict[str, Any]], form: Any, card: Card) -> tuple[list[dict[str, Any]], Any]:
    """Leave out `strict` of tools and response format where the official API would not take it so."""
    schema = form.get("json_schema") if isinstance(form, Mapping) else None
    named = [*(tool["function"] for tool in tools), *([schema] if isinstance(schema, Mapping) else [])]
    if card.strict or not any(each.get("strict") for each in named):
        return tools, form
    probe = {"messages": [{"role": "user", "content": "json"}], "tools": tools, "response_format": form}
    try:
        converted("ChatCompletionRequest", probe, card)
    except RequestError:
        loose = [{name: value for name, value in each.items() if name != "strict"} for each in named]
        form = {**form, "json_schema": loose[-1]} if isinstance(schema, Mapping) else form
        return [{**tool, "function": each} for tool, each in zip(tools, loose, strict=False)], form
    return tools, form


def _choice(choice: Any, tools: list[dict[str, Any]]) -> Any:
    """Return a tool choice that can be met: one of a kind that was passed over becomes `auto`."""
    if choice is None or choice in ("none", "auto", "required"):
        return choice or "auto"
    function = choice.get("function") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not (function is None or isinstance(function, Mapping)):
        raise malformed("tool_choice", choice, "one of none, auto, required or a tool")
    if choice.get("type", "function") != "function" or not function:
        return "auto"
    if function.get("name") not in [tool["function"].get("name") for tool in tools]:
        name = function.get("name")
        missing = f"no function named '{name}' was specified in the 'tools' parameter"
        raise RequestError(f"Invalid value for 'tool_call': {missing}.")
    return {"type": "function", "function": {"name": function["name"]}}


def frame(data: Mapping[str, Any], *, named: bool = False) -> str:
    """Return a server-sent event; a named one has its `type` in the event line."""
    head = f"event: {data['type']}\n" if named else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"


def spelled(tokenizer: Tokenizer, picks: Iterable[tuple[int, float | None, Any]]) -> list[dict[str, Any]]:
    """Return (token, log-probability, likeliest) as clients read them; bytes that are no text alone are escaped."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = tokenizer.spell(token)
        known = None if logprob is None else max(logprob, -9999.0)
        return {"token": raw.decode("utf-8", "backslashreplace"), "logprob": known, "bytes": list(raw)}

    return [entry(token, logprob) | {"top_logprobs": [entry(*each) for each in top]} for token, logprob, top in picks]


def parsed(arguments: str) -> dict[str, Any]:
    """Return the arguments of a call, empty where they were cut off."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def replayed(answer: Answer) -> Iterator[Event]:
    """The events of an answer that is complete, from its message."""
    message = answer.message
    if message.get("reasoning_content"):
        yield Event("reasoning", message["reasoning_content"])
    if message["content"]:
        yield Event("content", message["content"])
    for index, call in enumerate(message.get("tool_calls") or ()):
        yield Event("tool_call", index=index, id=call["id"], name=call["function"]["name"])
        yield Event("arguments", call["function"]["arguments"], index=index)
