"""One answer in a conversation: a chat-completions body becomes a prompt, a stream of steps, and parsed events."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pelagos.chat.parser import Event, Parser
from pelagos.chat.render import render_prompt
from pelagos.chat.tokens import ASSISTANT, END_THINK
from pelagos.engine.sampler import SamplingParams

if TYPE_CHECKING:
    from pelagos.engine.llm import LLM


_SAMPLING_KEYS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "stop",
)  # fmt: skip


def sampling_params(body: Mapping[str, Any], *, max_tokens: int = 256) -> SamplingParams:
    """Read the sampling keys of a request body, null and absent meaning the default; raises RequestError.

    `max_completion_tokens` is `max_tokens` by its newer name; `max_tokens` here is the default of both.
    """
    given: dict[str, Any] = {"max_tokens": max_tokens}
    given |= {name: body[name] for name in _SAMPLING_KEYS if body.get(name) is not None}
    if body.get("max_completion_tokens") is not None:
        given["max_tokens"] = body["max_completion_tokens"]
    return SamplingParams(**given)


class ChatTurn:
    """The answer to one body: checked and tokenised when made, generated once as it is iterated.

    `message` grows with the events; `finish_reason` is None until the end: stop, length, tool_calls or cancelled.
    """

    def __init__(
        self, llm: LLM, body: dict[str, Any], *, max_tokens: int, cancel: threading.Event | None, user_id: str = ""
    ) -> None:
        prompt = render_prompt(body, generation=llm.generation)
        params = sampling_params(body, max_tokens=max_tokens)
        self.cancel = cancel or threading.Event()
        self.prompt_ids = llm.tokenizer.encode_prompt(prompt)
        self.thinking = prompt.thinking
        self.message: dict[str, Any] = {"role": "assistant", "content": ""}
        if self.thinking:
            self.message["reasoning_content"] = ""
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self._reasons = prompt.start == "reasoning"
        self._end_think = llm.tokenizer.id(END_THINK)
        # The parser looks for stop strings, in the answer alone; the answer may take what room the prompt leaves.
        room = max(1, llm.config.max_position_embeddings - len(self.prompt_ids))
        unstopped = dataclasses.replace(params, max_tokens=min(params.max_tokens, room), stop=())
        self._parser = Parser.for_prompt(prompt, llm.tokenizer, stop=params.stop)
        # The next turn renders what follows the last assistant mark differently: state is kept up to there.
        marks = [at + 1 for at, token in enumerate(self.prompt_ids) if token == llm.tokenizer.id(ASSISTANT)][-1:]
        self._steps = llm.stream(self.prompt_ids, unstopped, cancel=self.cancel, cuts=marks, user_id=user_id)

    def __iter__(self) -> Iterator[Event]:
        reason = None
        for step in self._steps:
            self.completion_tokens += 1
            self.reasoning_tokens += self._reasons
            self._reasons &= step.token_id != self._end_think
            reason = step.finish_reason
            for event in self._parser.push(step.token_id, step.text):
                yield self._fold(event)
            if self._parser.done:
                reason = "stop"
                break
        for event in self._parser.finish(reason or "cancelled"):
            yield self._fold(event)

    def run(self) -> dict[str, Any]:
        """Generate to the end and return the message."""
        for _ in self:
            pass
        return self.message

    def _fold(self, event: Event) -> Event:
        self._reasons &= event.kind == "reasoning"
        if event.kind == "reasoning":
            self.message["reasoning_content"] = self.message.get("reasoning_content", "") + event.text
        elif event.kind == "content":
            self.message["content"] += event.text
        elif event.kind == "tool_call":
            function = {"name": event.name, "arguments": ""}
            call = {"id": event.id, "type": "function", "function": function}
            self.message.setdefault("tool_calls", []).append(call)
        elif event.kind == "arguments":
            self.message["tool_calls"][event.index]["function"]["arguments"] += event.text
        else:
            self.finish_reason = event.text
        return event
