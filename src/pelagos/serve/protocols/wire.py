"""What the protocols share: the official words for bad fields, the one body they all become, frames, log-probabilities.

Without `Card.strict` a request is read for what it means: unknown fields and tools are passed over, what cannot be
done is done as far as it can. With it, `deepseek-recipe` reads the body first and refuses what the official API does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pelagos.chat.parser import Event
from pelagos.errors import FormError, MissingDependency, RequestError
from pelagos.serve.ask import Card

if TYPE_CHECKING:
    from pelagos.chat.tokenizer import Tokenizer
    from pelagos.serve.answer import Answer, Logprob

MAX_TOKENS = 393_216
MAX_STOPS = 16
MAX_LOGPROBS = 20
KEEP_ALIVE = ": keep-alive\n\n"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")
_RANGES = {
    "temperature": (0, 2, "[0, 2]"),
    "top_p": (1e-12, 1, "(0, 1.0]"),
    "presence_penalty": (-2, 2, "[-2, 2]"),
    "frequency_penalty": (-2, 2, "[-2, 2]"),
}
# JSON schemas of the fields every protocol has by these names.
SAMPLING_SCHEMA: dict[str, Any] = {
    "model": {"type": ["string", "null"]},
    "stream": {"type": ["boolean", "null"]},
    "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2},
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
}
_KEPT = ("top_k", "min_p", "repetition_penalty")
_EMPTY = "empty string. Expected a string with minimum length 1, but got an empty string instead."


def library() -> Any:
    """Return deepseek-recipe, or raise MissingDependency."""
    try:
        import deepseek_recipe
    except ImportError as error:
        raise MissingDependency(f"this needs deepseek-recipe: `pip install deepseek-recipe==0.2.0` ({error})") from None
    return deepseek_recipe


def refuse_as_official(kind: str, body: Mapping[str, Any], card: Card, *, aliases: Iterable[str] = ()) -> None:
    """Read a body as deepseek-recipe's request class `kind` and raise what it raises, in its words."""
    recipe = library()
    versions = dict.fromkeys((card.model, *aliases), recipe.ModelVersion.DeepseekV4Pro)
    options = recipe.ConversionOptions().with_model_versions_by_name(versions)
    options = options.with_reasoning_content_behavior(recipe.ReasoningContentBehavior.Reject)
    options = options.with_messages_web_search(recipe.WebSearchBehavior.Drop)
    try:
        getattr(recipe, kind)({**body, "model": model_name(body, card)}).convert(options)
    except OverflowError:
        raise FormError("the request holds a whole number beyond 64 bits: write it as text") from None
    except recipe.ConversionError as error:
        raise RequestError(json.loads(error.body)["error"]["message"]) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise FormError(str(error)) from None


def model_name(body: Mapping[str, Any], card: Card) -> str:
    """Return the model a body names, without the `[1m]` some clients append; the served one where it names none."""
    name = body.get("model") or card.model
    if not isinstance(name, str):
        raise malformed("model", name, "a string")
    return name.removesuffix("[1m]")


def malformed(name: str, value: Any, expected: str) -> FormError:
    """The error of a field with a wrong type or an unknown value."""
    shown = json.dumps(value, ensure_ascii=False)
    return FormError(f"invalid request body: {name}: invalid value {shown[:80]}, expected {expected}")


def first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)


def flag(body: Mapping[str, Any], name: str) -> bool:
    """Return a boolean field, false where absent or null."""
    value = body.get(name)
    if value is not None and type(value) is not bool:
        raise malformed(name, value, "a boolean")
    return bool(value)


def mapping(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an object field, empty where absent or null."""
    value = body.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise malformed(name, value, "an object")
    return value or {}


def whole(name: str, value: Any, least: int, most: int, shown: str) -> int:
    """Return a whole number within its range; the range is named as the official API names it."""
    if type(value) is not int:
        raise malformed(name, value, "a whole number")
    if not least <= value <= most:
        raise RequestError(f"Invalid {name} value, the valid range of {name} is {shown}")
    return value


def objects(name: str, value: Any) -> list[dict[str, Any]]:
    """Return a list of objects; null is an empty one."""
    if not isinstance(value, list | None) or not all(isinstance(each, dict) for each in value or ()):
        raise malformed(name, value, "a list of objects")
    return value or []


def functions(tools: Any) -> list[dict[str, Any]]:
    """Return the function tools of a list; tools of other kinds are passed over."""
    kept = [tool for tool in objects("tools", tools) if tool.get("type", "function") == "function"]
    for tool in kept:
        if not isinstance(tool.get("function"), dict):
            raise malformed("tools.function", tool.get("function"), "an object")
    return [{"type": "function", **tool} for tool in kept]


def budget(thinking: Any, named: Any, card: Card) -> int | None:
    """Return the reasoning tokens a request allows: an extension `named`, or `thinking.budget_tokens`."""
    tokens = first(named, thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None)
    return None if card.strict or tokens is None else whole("thinking budget", tokens, 1, 2**31, "[1, 2^31)")


def stops(value: Any) -> list[str]:
    """Return stop texts, at most 16 and none empty."""
    listed = [value] if isinstance(value, str) else value or []
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise malformed("stop", value, "a string or a list")
    if len(listed) > MAX_STOPS:
        raise RequestError(f"Stop string array too long: {len(listed)}")
    if "" in listed:
        place = "" if value == "" else f"[{listed.index('')}]"
        raise RequestError(f"Invalid 'stop{place}': {_EMPTY}")
    return listed


def sampling(given: Mapping[str, Any], *, thinking: bool = False, tools: bool = False) -> dict[str, Any]:
    """Check the sampling fields and return those that have an effect: thinking has its own temperature and top_p."""
    for name, (least, most, shown) in _RANGES.items():
        value = given.get(name)
        if value is not None and type(value) not in (int, float):
            raise malformed(name, value, "a number")
        if value is not None and not least <= value <= most:
            raise RequestError(f"Invalid {name} value, the valid range of {name} is {shown}")
    named = {name: given[name] for name in ("temperature", "top_p") if given.get(name) is not None}
    own = {"temperature": 1.0, "top_p": 0.95 if tools else 1.0} if thinking else named
    seed = {} if given.get("seed") is None else {"seed": whole("seed", given["seed"], 0, 2**63 - 1, "[0, 2^63)")}
    return {**own, **seed, "stop": stops(given.get("stop"))}


def canonical(messages: list[dict[str, Any]], given: Mapping[str, Any], card: Card) -> dict[str, Any]:
    """Return the chat-completions body that is rendered: messages, tools and the settings in `given` by chat's names.

    Thinking, max_tokens and sampling are written out; null in `given` is absent. Raises RequestError, FormError.
    """
    thinking, effort = given.get("thinking"), given.get("reasoning_effort")
    if effort is not None and effort not in EFFORTS:
        raise malformed("reasoning_effort", effort, f"one of {', '.join(EFFORTS)}")
    if isinstance(thinking, Mapping):
        if thinking.get("type") not in ("enabled", "disabled", "adaptive"):
            raise malformed("thinking", thinking, "a type of enabled, disabled or adaptive")
        thinking = thinking["type"] != "disabled"
    elif not isinstance(thinking, bool | None):
        raise malformed("thinking", thinking, "an object or a boolean")
    thinks = effort != "none" if thinking is None else thinking
    tools, form = _unstrict(given.get("tools") or [], given.get("response_format"), card)
    choice = given.get("tool_choice")
    body: dict[str, Any] = {"messages": messages, "add_generation_prompt": True}
    body["thinking"] = {"type": "enabled" if thinks else "disabled"}
    body |= {"reasoning_effort": effort} if effort is not None else {}
    if tools:
        body |= {"tools": tools, "tool_choice": _choice(choice, tools)}
    body |= {} if form is None else {"response_format": form}
    if given.get("parallel_tool_calls") is not None and not card.strict:
        body["parallel_tool_calls"] = flag(given, "parallel_tool_calls")
    body |= {name: given[name] for name in _KEPT if given.get(name) is not None}
    body |= sampling(given, thinking=thinks, tools=bool(tools) and choice != "none")
    usual = 8_192 if not thinks else 131_072 if effort in ("max", "ultra") else 65_536
    asked = given.get("max_tokens")
    if asked is not None:
        asked = min(whole("max_tokens", asked, 1, 2**63, f"[1, {MAX_TOKENS}]"), MAX_TOKENS)
    return body | {"max_tokens": asked or card.max_tokens or usual}


def _unstrict(tools: list[dict[str, Any]], form: Any, card: Card) -> tuple[list[dict[str, Any]], Any]:
    """Leave out `strict` of tools and response format where the official API would not take it so."""
    schema = form.get("json_schema") if isinstance(form, Mapping) else None
    named = [*(tool["function"] for tool in tools), *([schema] if isinstance(schema, Mapping) else [])]
    if card.strict or not any(each.get("strict") for each in named):
        return tools, form
    probe = {"messages": [{"role": "user", "content": "json"}], "tools": tools, "response_format": form}
    try:
        refuse_as_official("ChatCompletionRequest", probe, card)
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
        raise RequestError(
            f"Invalid value for 'tool_call': no function named '{name}' was specified in the 'tools' parameter."
        )
    return {"type": "function", "function": {"name": function["name"]}}


def joined(content: Any, place: str, names: Mapping[str, str]) -> str:
    """Return the texts of a content, a string or parts; other parts become their name in `names`, "" to pass over."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise malformed(place, content, "a string or a list of parts")
    texts: list[str] = []
    for part in content:
        kind = "text" if isinstance(part, str) else part.get("type", "text") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise malformed(place, part, "a part with a type")
        if kind in ("text", "input_text", "output_text", "refusal"):
            text = part if isinstance(part, str) else part.get("refusal" if kind == "refusal" else "text")
            if not isinstance(text, str):
                raise malformed(f"{place}.text", text, "a string")
            texts.append(text)
        elif name := names.get(kind, f"[Unsupported {kind}]"):
            texts.append(name)
    return "\n\n".join(texts)


def remind(text: str) -> dict[str, Any]:
    """Return a system message that comes inside a conversation, as the user message the model knows it by."""
    return {"role": "user", "content": f"<system-reminder>\n{text}\n</system-reminder>"}


def move_reminders(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn system messages behind the first other one into reminders in place, never between calls and results.

    The library would move them to the front, where each new one makes the whole prompt new.
    """
    moved: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    for message in messages:
        if message.get("role") == "system" and any(each.get("role") != "system" for each in moved):
            waiting.append(remind(joined(message.get("content"), "content", {})))
            continue
        if message.get("role") != "tool":
            moved += waiting
            waiting = []
        moved.append(message)
    return moved + waiting


def pairs_up(messages: list[dict[str, Any]]) -> bool:
    """Whether every tool call has its one result right behind it, and every result its call."""
    waiting: list[Any] = []
    for message in [*messages, {"role": "end"}]:
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                return False
            waiting.remove(message["tool_call_id"])
        elif waiting:
            return False
        else:
            waiting = [call["id"] for call in message.get("tool_calls") or ()]
            if any(waiting.count(each) > 1 for each in waiting):
                return False
    return True


def isolation(user: Any) -> str:
    """Return the name that caches are kept apart by: a client's session is not a user of its own."""
    text = "" if user is None else str(user)
    if text.startswith("{"):
        try:
            parsed = json.loads(text)
            return json.dumps({name: value for name, value in parsed.items() if name != "session_id"})
        except ValueError:
            return text
    return re.sub(r"_session_[0-9a-f-]+$", "", text)


def frame(data: Mapping[str, Any], *, named: bool = False) -> str:
    """Return a server-sent event; a named one has its `type` in the event line."""
    head = f"event: {data['type']}\n" if named else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"


def spelled(tokenizer: Tokenizer, picks: Iterable[Logprob]) -> list[dict[str, Any]]:
    """Return log-probabilities as clients read them; bytes that are no text by themselves are escaped."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.spell(token)
        text = raw.decode("utf-8", "backslashreplace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    return [
        entry(pick.token_id, pick.logprob) | {"top_logprobs": [entry(*each) for each in pick.top]} for pick in picks
    ]


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


def usage(answer: Answer) -> dict[str, Any]:
    """Return the token counts of an answer as chat and raw completions give them."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_cache_hit_tokens": answer.cached_tokens,
        "prompt_cache_miss_tokens": answer.prompt_tokens - answer.cached_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
    }


def openai_error(status: int, message: str, code: str | None, param: str | None) -> dict[str, Any]:
    """Return `{"error": {message, type, param, code}}`."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = "internal_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or kind}}
