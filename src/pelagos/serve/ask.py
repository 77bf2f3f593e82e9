"""What a server says of itself, and what a request asks for, whatever protocol it came by."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


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
