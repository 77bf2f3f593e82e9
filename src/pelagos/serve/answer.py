"""An answer under way: submitted to the engine from a thread, read as events in the event loop."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from pelagos.chat.parser import Event
from pelagos.chat.render import Prompt, render_prompt
from pelagos.chat.tokens import BOS, FIM_BEGIN, FIM_END, FIM_HOLE
from pelagos.engine import LLM, ChatTurn, SamplingParams, Step
from pelagos.engine.api import check_context
from pelagos.serve.ask import Ask, Card
from pelagos.serve.grammar import Grammars
from pelagos.serve.replay import Replay, replayed_ids, turn_ids

DEFAULT_MAX_TOKENS = 8192  # of requests that no protocol has given a bound
MAX_EFFORT_CONTEXT = 393216  # what maximal effort is made for


class Logprob(NamedTuple):
    """One generated token as a client sees it; `kind` says where it belongs: reasoning, content or markup."""

    kind: str
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Shared:
    """What the answers of one server share: compiled grammars, and the turns with tool calls to replay."""

    def __init__(self, disk_dir: str | Path | None = None) -> None:
        """`disk_dir` is where turns outlive the process; None keeps them in memory."""
        self.grammars = Grammars()
        self.replay = Replay(None if disk_dir is None else Path(disk_dir) / "turns.sqlite")

    def close(self) -> None:
        """Close the file of turns."""
        self.replay.close()


def render_ask(llm: LLM, ask: Ask) -> Prompt:
    """Return the prompt of a request; one of token ids has no pieces. Raises RequestError."""
    if ask.prompt is None:
        choice = ask.body.get("tool_choice")
        if isinstance(choice, dict) or choice == "required":
            # The library knows no forced call in thinking; there the grammar forces it and the prompt stays as it is.
            free = render_prompt({**ask.body, "tool_choice": "auto"}, generation=llm.generation)
            if free.thinking:
                return free
        return render_prompt(ask.body, generation=llm.generation)
    text = ask.prompt if isinstance(ask.prompt, str) else ""
    pieces = [(BOS, True), (text, False)]
    if ask.suffix is not None:
        pieces = [(BOS, True), (FIM_BEGIN, True), (text, False), (FIM_HOLE, True), (ask.suffix, False), (FIM_END, True)]
    return Prompt(
        pieces=tuple(piece for piece in pieces if piece[0]), thinking=False, effort=None, start="content",
        continues=True, tools=None, json_output=False,
    )  # fmt: skip


def prompt_ids(llm: LLM, ask: Ask, prompt: Prompt | None = None, shared: Shared | None = None) -> list[int]:
    """Return the token ids of a request, as they are counted and computed; raises RequestError."""
    prompt = render_ask(llm, ask) if prompt is None else prompt
    tokenizer = llm.tokenizer
    if ask.prompt is None:
        if shared is None:
            return tokenizer.encode_prompt(prompt)
        return replayed_ids(shared.replay, tokenizer, prompt, ask.body["messages"], ask.user_id)
    if isinstance(ask.prompt, str):
        return tokenizer.encode_prompt(prompt)
    given = list(ask.prompt)
    if ask.suffix is None:
        return given
    around = [tokenizer.id(name) for name in (BOS, FIM_BEGIN, FIM_HOLE, FIM_END)]
    return [*around[:2], *given, around[2], *tokenizer.encode(ask.suffix), around[3]]


class Answer(ChatTurn):
    """The events of one request and what they add up to; made in a thread, read in one event loop.

    `finish_reason` is None until the end: stop, length, tool_calls, cancelled or deadline.
    """

    def __init__(
        self, llm: LLM, ask: Ask, card: Card, loop: asyncio.AbstractEventLoop, shared: Shared | None = None
    ) -> None:
        """Render, tokenise and submit (call it off the loop: a long prompt takes a while); errors are the engine's."""
        self._loop, self._wake, self._told = loop, asyncio.Event(), False
        self._ask, self._shared = ask, shared or Shared()
        self.tokenizer = llm.tokenizer
        self.logprobs: list[Logprob] = []
        self.warnings: list[str] = []
        self._broken: Exception | None = None  # what ended the request, once events before it wait to be read
        self._unplaced: list[Step] = []  # whose text is held back: where it belongs is not known yet
        context, prompt = min(card.context_length, llm.config.max_position_embeddings), render_ask(llm, ask)
        is_max = prompt.thinking and prompt.effort == ("high" if llm.generation == "preview" else "max")
        if is_max and context < MAX_EFFORT_CONTEXT:
            self.warnings.append(
                f"maximal effort is made for a context of at least {MAX_EFFORT_CONTEXT} tokens; this one has "
                f"{context}, and the answer may be cut off while it thinks"
            )

        def prepare(params: SamplingParams) -> tuple[list[int], SamplingParams]:
            ids, grammar = prompt_ids(llm, ask, prompt, self._shared), None
            check_context(context, len(ids), 1 if ask.clamp else params.max_tokens)
            if ask.prompt is None:
                grammar = self._shared.grammars.turn(llm.tokenizer, prompt, ask.body, budget=ask.thinking_budget)
            return ids, dataclasses.replace(
                params,
                max_tokens=min(params.max_tokens, context - len(ids)),
                grammar=grammar,
                logprobs=False if ask.logprobs is None else ask.logprobs,
                prompt_logprobs=ask.echo and ask.logprobs is not None,
            )

        super().__init__(
            llm, ask.body, max_tokens=card.max_tokens or DEFAULT_MAX_TOKENS, prompt=prompt, prepare=prepare,
            user_id=ask.user_id, timeout_s=ask.timeout_s, on_step=self._tell,
        )  # fmt: skip

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed again; known once the prompt is admitted."""
        return self.stream.cached_tokens

    async def events(self, *, keep_alive: float) -> AsyncIterator[list[Event] | None]:
        """Yield events as they come, all that are there at a time, and None after `keep_alive` seconds of silence.

        Leaving the iteration early cancels the request; its error is raised here.
        """
        heard = self._loop.time()
        try:
            while self.finish_reason is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(heard + keep_alive):
                        await self._wake.wait()
                self._wake.clear()
                self._told = False
                events, now = self.drain(), self._loop.time()
                if events or now - heard >= keep_alive:
                    heard = now
                    yield events or None
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request; idempotent."""
        self.stream.cancel()

    def drain(self) -> list[Event]:
        """Return the events of the steps that are there, without waiting; raises the error that ended the request."""
        if self._broken is not None:
            raise self._broken
        events: list[Event] = []
        while self.finish_reason is None and (step := self._next(events)) is not None:
            events += self.push(step)
            if events and self._ask.logprobs is not None:  # a writer finds the log-probabilities of these and no more
                self._wake.set()
                return events
        if self.stream.is_ended and self._broken is None:
            events += self.finish(self.stream.finish_reason or "cancelled")
        return events

    def _next(self, events: list[Event]) -> Step | None:
        """Return the next step that is there; an error waits until the events before it have been given out."""
        try:
            return self.stream.wait(0)
        except Exception as error:
            if not events:
                raise
            self._broken = error
            self._wake.set()
            return None

    def push(self, step: Step) -> list[Event]:
        """See `ChatTurn.push`; notes log-probabilities where they were asked for."""
        if self._ask.logprobs is None:
            return super().push(step)
        self._unplaced.append(step)
        events = super().push(step)
        if events or step.token_id in self.tokenizer.special_tokens:
            self._place(events)
        return events

    def finish(self, reason: str) -> list[Event]:
        """See `ChatTurn.finish`; a turn with calls is remembered."""
        events = super().finish(reason)
        if events and self.finish_reason == "tool_calls" and self._ask.prompt is None:
            calls = [call["id"] for call in self.message["tool_calls"]]
            self._shared.replay.remember(self._ask.user_id, calls, turn_ids(self, self.tokenizer))
        return events

    def _place(self, events: list[Event]) -> None:
        """Note where held back tokens belong: to the text that has come out, or to the markup."""
        shown = [event.kind for event in events if event.kind in ("reasoning", "content")]
        for step in self._unplaced:
            kind = shown[-1] if shown and step.token_id not in self.tokenizer.special_tokens else "markup"
            self.logprobs.append(Logprob(kind, step.token_id, step.logprob, step.top_logprobs))
        self._unplaced.clear()

    def _tell(self) -> None:
        if not self._told:  # one call wakes the loop for all that has come until it looks
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._wake.set)
