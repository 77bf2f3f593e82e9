"""What a request asks for, whatever protocol it came by, and what a protocol must be able to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pelagos.chat.parser import Event
    from pelagos.serve.answer import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the server says of itself, and how it reads requests."""

    model: str
    generation: str = "0731"
    context_length: int = 1 << 20
    max_tokens: int | None = None  # bound of answers that name none; None takes the protocol's defaults
    strict: bool = False  # refuse what the official API refuses
    fingerprint: str = "fp_pelagos"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request: a conversation in `body` or, without messages, a raw `prompt`.

    body has the keys of a chat completion that rendering and sampling read: messages, tools, tool_choice,
    response_format, thinking, reasoning_effort, max_tokens, temperature, top_p, seed, stop ...
    """

    body: dict[str, Any] = field(default_factory=dict)
    prompt: str | Sequence[int] | None = None
    suffix: str | None = None  # of a raw prompt: fill the middle
    echo: bool = False
    stream: bool = False
    user_id: str = ""
    logprobs: int | None = None  # most likely tokens beside each picked one; None: no log-probabilities
    thinking_budget: int | None = None  # reasoning tokens after which thinking is ended
    timeout_s: float | None = None  # after which the answer ends with `deadline`; set by the server
    clamp: bool = True  # max_tokens beyond the context are cut to what remains, not refused
    options: dict[str, Any] = field(default_factory=dict)  # what only the protocol's writer reads


class Writer(Protocol):
    """One answer on its way out in one protocol: frames of a stream, or one object."""

    def open(self) -> list[str]:
        """Frames that come before the first event; the answer's prompt has been admitted by then."""
        ...

    def push(self, event: Event) -> list[str]:
        """Frames of one event other than `finish`."""
        ...

    def close(self) -> list[str]:
        """Frames that end the stream, usage included, once the answer has finished."""
        ...

    def keep_alive(self) -> list[str]:
        """Frames that show a waiting client that the server lives, before `open` or after it."""
        ...

    def fail(self, status: int, message: str) -> list[str]:
        """Frames that end a stream which an error broke off."""
        ...

    def whole(self) -> dict[str, Any]:
        """The whole answer as one JSON object, once it has finished."""
        ...


class Api(Protocol):
    """A protocol: how its requests are read and its answers written. One instance serves all requests."""

    summary: str  # one line for the OpenAPI document
    paths: tuple[str, ...]  # of POST; each also with `/v1` taken away
    count_paths: tuple[str, ...]  # of POST of the same bodies, answered by `count`

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of a request body, for the OpenAPI document."""
        ...

    def read(self, body: dict[str, Any], card: Card) -> Ask:
        """Check a request body and say what it asks for; raises RequestError with the protocol's words."""
        ...

    def writer(self, ask: Ask, answer: Answer, card: Card) -> Writer:
        """Return the writer of one answer."""
        ...

    def count(self, tokens: int) -> dict[str, Any]:
        """The answer of `count_paths`: how many tokens the prompt of a body has."""
        ...

    def error(self, status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
        """The error object of this protocol for an HTTP status."""
        ...
