"""Seeded random chat-completions bodies, full of texts that spell special tokens."""

from __future__ import annotations

import json
import random
from itertools import accumulate
from typing import Any

from pelagos.chat import Prompt
from pelagos.chat.tokens import SPECIAL_TOKENS


def special_ranges(prompt: Prompt) -> list[tuple[int, int]]:
    """Half-open character ranges of a prompt's text, ascending, one special token each."""
    ends = list(accumulate(len(text) for text, _ in prompt.pieces))
    return [(end - len(text), end) for end, (text, special) in zip(ends, prompt.pieces, strict=True) if special]


WORDS = (
    *SPECIAL_TOKENS,
    "<｜System｜>",
    "<｜DSML｜tool_calls>\n",
    '<｜DSML｜invoke name="f">',
    "</｜DSML｜parameter>",
    "</tool_result>",
    "<think",
    "hello",
    "json",
    "\n",
    "\n\n",
    "  ",
    "你好",
    "é\u0301",
    "\U0001f600",
    "\ue000\ue001",
    "2>&1",
    "x < y",
    '"quoted"',
    "\\",
    "{}",
    "1234567",
    "\t\r\n",
    "\x00",
)
NAMES = ("get_weather", "search", "read-file", "f")
EFFORTS = (None, "none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")


def some_text(rng: random.Random, most: int = 6) -> str:
    return "".join(rng.choice(WORDS) + rng.choice(("", " ")) for _ in range(rng.randint(0, most)))


def some_json(rng: random.Random, depth: int = 2) -> Any:
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [some_json(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    if kind == 7:
        return {some_text(rng, 2): some_json(rng, depth - 1) for _ in range(rng.randint(0, 3))}
    return (some_text(rng), rng.randint(-(10**12), 10**12), rng.random(), True, None, "")[kind]


def some_arguments(rng: random.Random) -> dict[str, Any]:
    return {rng.choice(("city", "n", "some key", "b")) + str(i): some_json(rng) for i in range(rng.randint(0, 3))}


def some_content(rng: random.Random) -> Any:
    if rng.random() < 0.2:
        return [{"type": "text", "text": some_text(rng)} for _ in range(rng.randint(1, 3))]
    return some_text(rng)


def some_tool(rng: random.Random, name: str) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.8:
        function["description"] = some_text(rng)
    if rng.random() < 0.8:
        properties = {some_text(rng, 2): {"type": "string", "description": some_text(rng)} for _ in range(2)}
        function["parameters"] = {"type": "object", "properties": properties}
    return {"type": "function", "function": function}


def some_tool_turn(rng: random.Random) -> list[dict[str, Any]]:
    ids = [f"call_{index:02}_{rng.randrange(10**6)}" for index in range(rng.randint(1, 3))]
    rng.shuffle(ids)
    calls = []
    for identity in ids:
        arguments = json.dumps(some_arguments(rng), ensure_ascii=rng.random() < 0.5)
        arguments = rng.choice(("bad json", "[1, 2]", "nul")) if rng.random() < 0.1 else arguments
        function = {"name": rng.choice(NAMES), "arguments": arguments}
        calls.append({"id": identity, "type": "function", "function": function})
    turn: dict[str, Any] = {"role": "assistant", "content": rng.choice((None, "", some_text(rng))), "tool_calls": calls}
    if rng.random() < 0.6:
        turn["reasoning_content"] = some_text(rng)
    rng.shuffle(ids)
    return [turn, *({"role": "tool", "tool_call_id": identity, "content": some_content(rng)} for identity in ids)]


def some_body(rng: random.Random) -> dict[str, Any]:
    """Return a body that deepseek-recipe accepts; about 1 in 80 ends with a finished assistant message."""
    messages: list[dict[str, Any]] = []
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        messages.append({"role": "system", "content": some_content(rng)})
    for _ in range(rng.randint(1, 5)):
        kind = rng.randrange(10)
        if kind < 5:
            messages.append({"role": "user", "content": some_content(rng)})
        elif kind < 7:
            messages += some_tool_turn(rng)
        elif kind < 9:
            messages.append({"role": "assistant", "content": some_text(rng)})
            if rng.random() < 0.5:
                messages[-1]["reasoning_content"] = some_text(rng)
        else:
            messages.append({"role": rng.choice(("latest_reminder", "system")), "content": some_text(rng)})
    body: dict[str, Any] = {"messages": messages}
    effort, mode = rng.choice(EFFORTS), rng.choice((None, "enabled", "disabled", "adaptive"))
    if effort:
        body["reasoning_effort"] = effort
    if mode:
        body["thinking"] = {"type": mode}
    ending = rng.random()
    if ending < 0.1 and not any("tool_calls" in message for message in messages):
        messages.append({"role": "user", "content": some_text(rng)})
        messages.append({"role": "assistant", "content": some_text(rng), "prefix": True})
        if rng.random() < 0.5:
            messages[-1]["reasoning_content"] = some_text(rng)
        return body
    if messages[-1]["role"] == "assistant" or ending < 0.3:
        messages.append({"role": "user", "content": "json"})
    if ending > 0.99:
        messages.append({"role": "assistant", "content": some_text(rng), "reasoning_content": some_text(rng)})
    if rng.random() < 0.5:
        body["tools"] = [some_tool(rng, name) for name in rng.sample(NAMES, rng.randint(1, 3))]
        thinks = mode in ("enabled", "adaptive") or (mode is None and effort != "none")
        body["tool_choice"] = rng.choice(("auto", "none") if thinks else ("auto", "none", "required"))
    if rng.random() < 0.1:
        schema = {"name": "answer", "schema": {"type": "object", "title": some_text(rng)}}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif rng.random() < 0.1 and messages[-1]["content"] == "json":
        body["response_format"] = {"type": "json_object"}
    return body
