"""An answer under way: submitted to the engine from a thread, read as events in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pelagos.chat.parser import Event
from pelagos.chat.render import Prompt, render_prompt
from pelagos.chat.tokens import BOS, FIM_BEGIN, FIM_END, FIM_HOLE
from pelagos.engine import ChatTurn
from pelagos.errors import ContextLengthError
from pelagos.serve.grammar import Grammars
from pelagos.serve.replay import Replay, replayed_ids, turn_ids

if TYPE_CHECKING:
    from pelagos.engine import LLM, SamplingParams, Step
    from pelagos.serve.ask import Ask, Card

DEFAULT_MAX_TOKENS = 8192  # and where it thinks, and where it thinks with maximal effort:
THINKING_MAX_TOKENS = 65536
MAX_EFFORT_MAX_TOKENS = 131072
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


class Answer:
    """The events of one request and what they add up to; made in a thread, read in one event loop."""

    def __init__(
        self, llm: LLM, ask: Ask, card: Card, loop: asyncio.AbstractEventLoop, shared: Shared | None = None
    ) -> None:
        """Render, tokenise and submit (call it off the loop: a long prompt takes a while); errors are the engine's."""
        self._loop, self._wake, self._told = loop, asyncio.Event(), False
        self._llm, self._ask, self._shared = llm, ask, shared or Shared()
        self.tokenizer = llm.tokenizer
        self.logprobs: list[Logprob] = []
        self.warnings: list[str] = []
        self._unplaced: list[Step] = []  # whose text is held back: where it belongs is not known yet
        self._remembers = ask.prompt is None
        self._context = min(card.context_length, llm.config.max_position_embeddings)
        prompt = render_ask(llm, ask)
        is_max = prompt.thinking and prompt.effort == ("high" if llm.generation == "preview" else "max")
        if is_max and self._context < MAX_EFFORT_CONTEXT:
            self.warnings.append(
                f"maximal effort is made for a context of at least {MAX_EFFORT_CONTEXT} tokens; this one has "
                f"{self._context}, and the answer may be cut off while it thinks"
            )
        usual = THINKING_MAX_TOKENS if prompt.thinking else DEFAULT_MAX_TOKENS
        self.turn = ChatTurn(
            llm, ask.body, max_tokens=card.max_tokens or (MAX_EFFORT_MAX_TOKENS if is_max else usual), prompt=prompt,
            prepare=lambda params: self._prepare(prompt, params), clamp=ask.clamp, user_id=ask.user_id,
            timeout_s=ask.timeout_s, on_step=self._tell,
        )  # fmt: skip

    @property
    def thinking(self) -> bool:
        """Whether the answer may begin with reasoning."""
        return self.turn.thinking

    @property
    def finish_reason(self) -> str | None:
        """None until the end: stop, length, tool_calls, cancelled or deadline."""
        return self.turn.finish_reason

    @property
    def stopped_by(self) -> str | None:
        """The stop text that ended the answer."""
        return self.turn.parser.stopped_by

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt as it was computed."""
        return self.turn.prompt_ids

    @property
    def prompt_text(self) -> str:
        """A raw prompt as it was given, for `echo`."""
        prompt = self._ask.prompt
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt or ())

    @property
    def prompt_logprobs(self) -> list[float | None] | None:
        """The log-probabilities of the prompt's tokens, None first; with `echo` and `logprobs`, once admitted."""
        return self.turn.stream.prompt_logprobs

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
                if events := self.drain():
                    yield events
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request; idempotent."""
        self.turn.stream.cancel()

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], SamplingParams]:
        ask, ids = self._ask, prompt_ids(self._llm, self._ask, prompt, self._shared)
        room = self._context - len(ids)
        if room < 1 or not (ask.clamp or params.max_tokens <= room):
            most = 1 if ask.clamp else params.max_tokens
            raise ContextLengthError(
                f"This model's maximum context length is {self._context} tokens. However, you requested "
                f"{len(ids) + most} tokens ({len(ids)} in the messages, {most} in the completion). "
                "Please reduce the length of the messages or completion."
            )
        grammar = None
        if ask.prompt is None:
            grammar = self._shared.grammars.turn(self.tokenizer, prompt, ask.body, budget=ask.thinking_budget)
        return ids, dataclasses.replace(
            params,
            max_tokens=min(params.max_tokens, room),
            grammar=grammar,
            logprobs=False if ask.logprobs is None else ask.logprobs,
            prompt_logprobs=ask.echo and ask.logprobs is not None,
        )

    def drain(self) -> list[Event]:
        """Return the events of the steps that are there, without waiting; raises the error that ended the request."""
        events: list[Event] = []
        while self.turn.finish_reason is None and (step := self.turn.stream.wait(0)) is not None:
            events += self._push(step)
        if self.turn.stream.is_ended and self.turn.finish_reason is None:
            events += self._place(None, self.turn.finish(self.turn.stream.finish_reason or "cancelled"))
        if self.turn.finish_reason == "tool_calls" and self._remembers:
            self._remembers = False
            calls = [call["id"] for call in self.turn.message["tool_calls"]]
            self._shared.replay.remember(self._ask.user_id, calls, turn_ids(self.turn, self.tokenizer))
        return events

    def _push(self, step: Step) -> list[Event]:
        events = self.turn.push(step)
        return events if self._ask.logprobs is None else self._place(step, events)

    def _place(self, step: Step | None, events: list[Event]) -> list[Event]:
        """Note where tokens belong: a step's is the kind of the text it brings out, what is held back waits."""
        if self._ask.logprobs is None:
            return events
        if step is not None:
            self._unplaced.append(step)
        kinds = [event.kind for event in events]
        shown = next((kind for kind in reversed(kinds) if kind in ("reasoning", "content")), None)
        is_special = step is not None and step.token_id in self.tokenizer.special_tokens
        if shown is None and not is_special and not kinds:
            return events
        for each in self._unplaced:
            is_text = shown is not None and each.token_id not in self.tokenizer.special_tokens
            kind = shown if is_text and shown is not None else "markup"
            self.logprobs.append(Logprob(kind, each.token_id, each.logprob, each.top_logprobs))
        self._unplaced.clear()
        return events

    def _tell(self) -> None:
        if not self._told:  # one call wakes the loop for all that has come until it looks
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._wake.set)
