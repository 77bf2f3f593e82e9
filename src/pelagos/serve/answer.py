"""An answer under way: submitted to the engine from a thread, read as events in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, NamedTuple

from pelagos.chat.parser import Event
from pelagos.engine import ChatTurn

if TYPE_CHECKING:
    from pelagos.engine import LLM, Step
    from pelagos.serve.ask import Ask, Card

DEFAULT_MAX_TOKENS = 8192


class Logprob(NamedTuple):
    """One generated token as a client sees it; `kind` says where it belongs: reasoning, content or markup."""

    kind: str
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Answer:
    """The events of one request and what they add up to; made by `submit`, read in one event loop."""

    def __init__(self, llm: LLM, ask: Ask, card: Card, loop: asyncio.AbstractEventLoop) -> None:
        """Render, tokenise and submit (call it off the loop: a long prompt takes a while); errors are the engine's."""
        self._loop, self._wake, self._told = loop, asyncio.Event(), False
        self.tokenizer = llm.tokenizer
        self.logprobs: list[Logprob] = []
        self.turn = ChatTurn(
            llm, ask.body, max_tokens=card.max_tokens or DEFAULT_MAX_TOKENS, user_id=ask.user_id, on_step=self._tell
        )

    @property
    def thinking(self) -> bool:
        """Whether the answer may begin with reasoning."""
        return self.turn.thinking

    @property
    def finish_reason(self) -> str | None:
        """None until the end: stop, length, tool_calls, cancelled or deadline."""
        return self.turn.finish_reason

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.turn.prompt_ids)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed again; known once the prompt is admitted."""
        return self.turn.stream.cached_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens generated, reasoning and markup included."""
        return self.turn.completion_tokens

    @property
    def reasoning_tokens(self) -> int:
        """Of them, those before the end of thinking."""
        return self.turn.reasoning_tokens

    async def events(self, *, keep_alive: float) -> AsyncIterator[list[Event] | None]:
        """Yield events as they come, all that are there at a time, and None after `keep_alive` seconds of silence.

        Leaving the iteration early cancels the request; its error is raised here.
        """
        try:
            while self.turn.finish_reason is None:
                try:
                    async with asyncio.timeout(keep_alive):
                        await self._wake.wait()
                except TimeoutError:
                    yield None
                    continue
                self._wake.clear()
                self._told = False
                if events := self._drain():
                    yield events
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request; idempotent."""
        self.turn.stream.cancel()

    def _drain(self) -> list[Event]:
        events: list[Event] = []
        while self.turn.finish_reason is None and (step := self.turn.stream.wait(0)) is not None:
            events += self._push(step)
        if self.turn.stream.is_ended:
            events += self.turn.finish(self.turn.stream.finish_reason or "cancelled")
        return events

    def _push(self, step: Step) -> list[Event]:
        return self.turn.push(step)

    def _tell(self) -> None:
        if not self._told:  # one call wakes the loop for all that has come until it looks
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._wake.set)
