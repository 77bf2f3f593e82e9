"""Answers without HTTP: an Ask in, the events and the finished Answer out."""

from __future__ import annotations

import asyncio
from typing import Any

from pelagos.chat.parser import Event
from pelagos.engine import LLM
from pelagos.serve import Card
from pelagos.serve.answer import Answer, Shared
from pelagos.serve.ask import Ask

OFF = {"thinking": {"type": "disabled"}}
CARD = Card(model="nano")


def ask_for(text: str = "Hi", **body: Any) -> Ask:
    return Ask(body={"messages": [{"role": "user", "content": text}], **body})


def answered(llm: LLM, ask: Ask, *, card: Card = CARD, shared: Shared | None = None) -> tuple[Answer, list[Event]]:
    async def read() -> tuple[Answer, list[Event]]:
        answer = Answer(llm, ask, card, asyncio.get_running_loop(), shared)
        return answer, [event async for events in answer.events(keep_alive=5) for event in events or ()]

    return asyncio.run(read())


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, "description": "", "parameters": parameters or {"type": "object"}, **more}
    return {"type": "function", "function": function}
