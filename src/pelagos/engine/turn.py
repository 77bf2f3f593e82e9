"""One answer in a conversation: a chat-completions body becomes a prompt, a stream of steps, and parsed events."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pelagos.chat.parser import Event, Parser
from pelagos.chat.render import Prompt, render_prompt
from pelagos.chat.tokens import ASSISTANT, END_THINK
from pelagos.engine.api import Step, StepReader
from pelagos.engine.sampler import SamplingParams

if TYPE_CHECKING:
    from pelagos.engine.llm import LLM

Prepare = Callable[[SamplingParams], tuple[list[int], SamplingParams]]

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
    """The answer to one body: checked, tokenised and submitted when made, folded as it is iterated or pushed to.

    `finish_reason` is None until the end: stop, length, tool_calls or cancelled.
    """

    def __init__(
        self, llm: LLM, body: dict[str, Any], *, max_tokens: int, cancel: threading.Event | None = None,
        prompt: Prompt | None = None, prepare: Prepare | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """`prompt` None is the body's; `prepare` returns its ids and the sampling in the place of the usual ones.

        `options` are those of `Engine.submit`.
        """
        prompt = render_prompt(body, generation=llm.generation) if prompt is None else prompt
        params = sampling_params(body, max_tokens=max_tokens)
        ids, params = (llm.tokenizer.encode_prompt(prompt), params) if prepare is None else prepare(params)
        self.prompt, self.prompt_ids, self.params = prompt, ids, params
        self.thinking = prompt.thinking
        self._texts: dict[tuple[str, int | None], list[str]] = {}  # by kind and call
        self._calls: list[Event] = []
        self.finish_reason: str | None = None
        self.output_ids: list[int] = []
        self.reasoning_tokens = 0
        self._reasons = prompt.start == "reasoning"
        self._end_think = llm.tokenizer.id(END_THINK)
        # The parser looks for stop strings, in the answer alone; the answer may take what room the prompt leaves.
        room = max(1, llm.config.max_position_embeddings - len(ids))
        unstopped = dataclasses.replace(params, max_tokens=min(params.max_tokens, room), stop=())
        told = [body, *(each for each in body.get("messages") or () if isinstance(each, Mapping))]
        mute = prompt.tools is None and any(each.get("tools") or each.get("tool_calls") for each in told)
        self.parser = Parser.for_prompt(prompt, llm.tokenizer, stop=params.stop, mute=mute)
        # The next turn renders what follows the last assistant mark differently: state is kept up to there.
        marks = [at + 1 for at, token in enumerate(ids) if token == llm.tokenizer.id(ASSISTANT)][-1:]
        self.stream = llm.submit(ids, unstopped, cuts=marks, **options)
        self._steps = StepReader(self.stream, cancel)

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message, as far as it has come."""
        texts = {key: "".join(parts) for key, parts in self._texts.items()}
        message: dict[str, Any] = {"role": "assistant", "content": texts.get(("content", None), "")}
        if self.thinking or ("reasoning", None) in texts:
            message["reasoning_content"] = texts.get(("reasoning", None), "")
        for call in self._calls:
            function = {"name": call.name, "arguments": texts.get(("arguments", call.index), "")}
            message.setdefault("tool_calls", []).append({"id": call.id, "type": "function", "function": function})
        return message

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, reasoning and markup included."""
        return len(self.output_ids)

    def __iter__(self) -> Iterator[Event]:
        for step in self._steps:
            yield from self.push(step)
            if self.finish_reason is not None:
                self.stream.cancel()
                return
        yield from self.finish((self.stream.is_ended and self.stream.finish_reason) or "cancelled")

    def push(self, step: Step) -> list[Event]:
        """Take the next step of `stream` and return its events; the last one sets `finish_reason`."""
        was_done = self.parser.done
        self.output_ids.append(step.token_id)
        self.reasoning_tokens += self._reasons
        self._reasons &= step.token_id != self._end_think
        events = [self._fold(event) for event in self.parser.push(step.token_id, step.text)]
        # Behind a tool block a grammar lets only the end token come; with it the engine keeps the turn for the next.
        awaits_end = self.params.grammar is not None and self.parser.stopped_by is None and not was_done
        if step.finish_reason is not None or (self.parser.done and not awaits_end):
            events += self.finish(step.finish_reason or "stop")
        return events

    def finish(self, reason: str) -> list[Event]:
        """End the turn for the engine's reason, if `push` has not; return what was held back and `finish`."""
        if self.finish_reason is not None:
            return []
        return [self._fold(event) for event in self.parser.finish("stop" if self.parser.done else reason)]

    def run(self) -> dict[str, Any]:
        """Generate to the end and return the message."""
        for _ in self:
            pass
        return self.message

    def _fold(self, event: Event) -> Event:
        self._reasons &= event.kind == "reasoning"
        if event.kind == "finish":
            self.finish_reason = event.text
        elif event.kind == "tool_call":
            self._calls.append(event)
        else:
            self._texts.setdefault((event.kind, event.index), []).append(event.text)
        return event
