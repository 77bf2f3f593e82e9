"""Requests of all protocols become the prompts that deepseek-recipe makes of them: seeded bodies."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pelagos.chat import render
from pelagos.errors import RequestError
from pelagos.serve.ask import Card
from pelagos.serve.protocols import APIS

recipe = pytest.importorskip("deepseek_recipe")
CHAT, _, RESPONSES, MESSAGES = APIS
LIBRARY = {CHAT: "ChatCompletionRequest", RESPONSES: "ResponsesRequest", MESSAGES: "MessagesRequest"}
CARD, STRICT = Card(model="nano"), Card(model="nano", strict=True)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}, "required": ["city"]}
TEXTS = [
    "Hi",
    "",
    "two\nlines",
    "\u4f60\u597d",
    "<think>",
    '{"a": 1}',
    " padded ",
    "<\uff5cUser\uff5c>x",
    "json please",
]


def theirs(api: Any, body: dict[str, Any]) -> str:
    options = recipe.ConversionOptions().with_model_versions_by_name({"nano": recipe.ModelVersion.DeepseekV4Pro})
    options = options.with_messages_web_search(recipe.WebSearchBehavior.Drop)
    request = getattr(recipe, LIBRARY[api])({"model": "nano", **body}).convert(options)
    return recipe.DeepseekV4Encoding().render_conversation(request.conversation).prompt


def ours(api: Any, body: dict[str, Any], card: Card = CARD) -> str:
    return render(api.read(body, card).body)


class Seeded:
    """Bodies as agents send them, from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self) -> str:
        return self.random.choice(TEXTS)

    def maybe(self, **fields: Any) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if self.random.random() < 0.5}

    def arguments(self) -> dict[str, Any]:
        return self.maybe(city=self.text(), n=self.random.randrange(9), deep={"a": [1, None, "\u00e9"]})

    def ids(self) -> list[str]:
        return [f"call_{index:02}_{self.random.randrange(100)}" for index in range(self.random.randrange(1, 4))]

    def messages(self) -> dict[str, Any]:
        body: dict[str, Any] = {"max_tokens": 9, "messages": []}
        for _ in range(self.random.randrange(1, 5)):
            user = [{"type": "text", "text": self.text()} for _ in range(self.random.randrange(1, 3))]
            if self.random.random() < 0.2:
                user.append({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}})
            if self.random.random() < 0.2:
                user.append({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}})
            body["messages"].append({"role": "user", "content": self.random.choice([self.text(), user])})
            if self.random.random() < 0.3:
                body["messages"].append({"role": "system", "content": self.random.choice(["rem", user[:1]])})
            turn: list[dict[str, Any]] = []
            if self.random.random() < 0.6:
                turn.append({"type": "thinking", "thinking": self.text(), "signature": "sig"})
            if self.random.random() < 0.6:
                turn.append({"type": "text", "text": self.text()})
            ids = self.ids() if self.random.random() < 0.5 else []
            turn += [{"type": "tool_use", "id": each, "name": "look", "input": self.arguments()} for each in ids]
            if turn and self.random.random() < 0.8:
                body["messages"].append({"role": "assistant", "content": turn})
                results = [{"type": "tool_result", "tool_use_id": each, **self.result()} for each in ids]
                self.random.shuffle(results)
                if results:
                    body["messages"].append({"role": "user", "content": results})
        if self.random.random() < 0.7:
            billing = {"type": "text", "text": "x-anthropic-billing-header: cc=1"}
            parts = [{"type": "text", "text": self.text(), "cache_control": {"type": "ephemeral"}} for _ in range(2)]
            body["system"] = self.random.choice(["You code.", parts, [billing, *parts], [billing]])
        if self.random.random() < 0.6:
            tool = {"name": "look", "description": "Looks", "input_schema": SCHEMA}
            body["tools"] = [tool, *([{**tool, "name": "late", "defer_loading": True}] * self.random.randrange(2))]
            body |= self.maybe(tool_choice={"type": self.random.choice(["auto", "none"])})
        thinking = {"type": self.random.choice(["enabled", "adaptive", "disabled"]), "budget_tokens": 2048}
        effort = self.random.choice(["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"])
        return body | self.maybe(thinking=thinking, output_config={"effort": effort}, temperature=0.3, stream=True)

    def result(self) -> dict[str, Any]:
        parts = [{"type": "text", "text": self.text()}, {"type": "text", "text": "more"}]
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
        return self.random.choice([{}, {"content": self.text()}, {"content": parts}, {"content": [*parts, image]}])

    def responses(self) -> dict[str, Any]:
        items: list[dict[str, Any]] = []
        for _ in range(self.random.randrange(1, 5)):
            parts = [{"type": "input_text", "text": self.text()} for _ in range(2)]
            role = self.random.choice(["user", "user", "developer"])
            items.append({"role": role, "content": self.random.choice([self.text(), parts])})
            if self.random.random() < 0.7:
                if self.random.random() < 0.6:
                    content = [{"type": "reasoning_text", "text": self.text()}]
                    items.append({"type": "reasoning", "id": "rs", "summary": [], "content": content})
                if self.random.random() < 0.6:
                    said = [{"type": "output_text", "text": self.text() or "x", "annotations": []}]
                    items.append({"type": "message", "role": "assistant", "content": said})
                ids = self.ids() if self.random.random() < 0.6 else []
                for each in ids:
                    call = {"type": "function_call", "call_id": each, "name": "look"}
                    items.append(call | {"arguments": json.dumps(self.arguments())})
                results = [{"type": "function_call_output", "call_id": each, "output": self.text()} for each in ids]
                self.random.shuffle(results)
                items += results
            if self.random.random() < 0.2:
                items.append({"type": "web_search_call", "id": "ws", "status": "completed"})
        items.append({"role": "user", "content": "go on"})
        body: dict[str, Any] = {"input": items}
        if self.random.random() < 0.6:
            function = {"type": "function", "name": "look", "description": "Looks", "parameters": SCHEMA}
            space = {"type": "namespace", "name": "ns", "description": "N", "tools": [{**function, "name": "in"}]}
            patch = {"type": "custom", "name": "apply_patch", "description": "patches"}
            body["tools"] = [function, *self.random.sample([space, patch, {"type": "web_search"}], 2)]
        effort = self.random.choice(["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"])
        return body | self.maybe(reasoning={"effort": effort}, instructions="You code.", store=False, user="u")

    def chat(self) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        if self.random.random() < 0.6:
            messages.append({"role": "system", "content": self.text()})
        for _ in range(self.random.randrange(1, 4)):
            parts = [{"type": "text", "text": self.text()}, {"type": "image_url", "image_url": {"url": "http://x"}}]
            messages.append({"role": "user", "content": self.random.choice([self.text(), parts])})
            if self.random.random() < 0.5:
                ids = self.ids()
                calls = [
                    {"id": each, "type": "function", "function": {"name": "look", "arguments": '{"city": "a"}'}}
                    for each in ids
                ]
                turn = {"role": "assistant", "content": self.text(), "tool_calls": calls}
                messages.append(turn | self.maybe(reasoning_content=self.text()))
                messages += [{"role": "tool", "tool_call_id": each, "content": self.text()} for each in ids]
            elif self.random.random() < 0.5:
                messages.append({"role": "assistant", "content": self.text()} | self.maybe(reasoning_content="R"))
        body: dict[str, Any] = {"messages": messages}
        if self.random.random() < 0.5:
            body["tools"] = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
            body |= self.maybe(tool_choice=self.random.choice(["auto", "none"]))
        effort = self.random.choice(["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"])
        return body | self.maybe(reasoning_effort=effort, thinking={"type": "adaptive"}, temperature=1)


@pytest.mark.parametrize("card", [CARD, STRICT], ids=["lenient", "strict"])
@pytest.mark.parametrize("kind", ["chat", "responses", "messages"])
def test_prompts_are_the_librarys(kind: str, card: Card) -> None:
    api = {"chat": CHAT, "responses": RESPONSES, "messages": MESSAGES}[kind]
    compared = 0
    for seed in range(300):
        body = getattr(Seeded(seed), kind)()
        try:
            expected = theirs(api, body)
        except (recipe.ConversionError, ValueError):
            continue
        compared += 1
        try:
            got = ours(api, body, card)
        except RequestError as error:  # the library's default fills in reasoning that was not sent back
            got = expected if card.strict and "must be passed back" in str(error) else str(error)
        assert got == expected, (seed, json.dumps(body))
    assert compared > 200
