"""What one request's picked tokens become: steps with text, cut at stop strings, and why they ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from pelagos.engine.api import Step
from pelagos.engine.sampler import Pick, SamplingParams


class Decoder(Protocol):
    """Text of a token stream as it grows; `chat.tokenizer.StreamDecoder` is one."""

    def push(self, index: int) -> str:
        """Return the text that this token completes."""
        ...

    def flush(self) -> str:
        """Return what stands for bytes that never became a character."""
        ...


class TextStream:
    """Turns picks into steps one by one, however many come at once; `finish_reason` is None until the last.

    A token that ends the request is in the steps and not in the text; with `ignore_eos` the end token has no text.
    """

    def __init__(self, decoder: Decoder, params: SamplingParams, eos: int) -> None:
        """`eos` is the model's end token; `ends` are all the tokens that end this request."""
        self.finish_reason: str | None = None
        self.ends = params.ends(eos)
        self.left = params.max_tokens  # tokens this request may still get
        self._eos = eos
        self._decoder = decoder
        self._cut = StopCut(params.stop)

    def push(self, picks: Iterable[Pick]) -> list[Step]:
        """Return the steps of consecutive picks, up to the one that ends the request; later picks are dropped."""
        return [self._step(pick) for pick in picks if self.finish_reason is None]

    def _step(self, pick: Pick) -> Step:
        self.left -= 1
        ended = pick.token in self.ends
        text = self._cut.push("" if ended or pick.token == self._eos else self._decoder.push(pick.token))
        if ended or not self.left:
            text += self._cut.push(self._decoder.flush())
            text += self._cut.finish()
        if ended or self._cut.is_cut:
            self.finish_reason = "stop"
        elif not self.left:
            self.finish_reason = "length"
        return Step(pick.token, text, pick.logprob, self.finish_reason, pick.top)


class StopCut:
    """Lets text through up to the first stop string, holding back only what may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.is_cut = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """Return what is certain to come before any stop string; nothing more once `is_cut`."""
        if self.is_cut or not self._stops:
            return "" if self.is_cut else text
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_cut, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return the text still held back: nothing follows, so it is no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
