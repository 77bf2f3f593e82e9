"""How one request picks its next token: frozen parameters, a private seeded stream, one draw per token.

Owns nothing shared: two requests with the same seed and logits pick the same tokens whatever runs beside them.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pelagos.errors import CheckpointError, RequestError

MAX_STOPS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """What one request asks of the sampler; a wrong value raises RequestError naming it.

    temperature 0 is greedy; top_k 0 keeps every token; seed None draws a fresh one per request. The text is cut
    before the first of the `stop` strings. `logprobs` (true or 1) asks for the log-probability of every picked token.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    logprobs: bool | int = False

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, "a whole number >= 1", _is_whole(self.max_tokens, 1))
        _check("temperature", self.temperature, "a number from 0 to 2", _is_number(self.temperature, 0, 2))
        in_range = _is_number(self.top_p, 0, 1) and self.top_p > 0
        _check("top_p", self.top_p, "a number above 0 and at most 1", in_range)
        _check("top_k", self.top_k, "a whole number >= 0 (0 keeps every token)", _is_whole(self.top_k, 0))
        if self.seed is not None:
            in_range = _is_whole(self.seed, 0) and self.seed < 2**63
            _check("seed", self.seed, "a whole number from 0 to 2**63 - 1", in_range)
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        good = isinstance(stops, (list, tuple)) and all(isinstance(s, str) and s for s in stops)
        _check("stop", self.stop, f"at most {MAX_STOPS} strings, none empty", good and len(stops) <= MAX_STOPS)
        object.__setattr__(self, "stop", tuple(stops))
        _check("logprobs", self.logprobs, "true, false, 0 or 1", self.logprobs in (0, 1))


def _check(name: str, value: object, expected: str, good: bool) -> None:
    if not good:
        raise RequestError(f"{name}={value!r}: expected {expected}")


def _is_whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: object, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most  # type: ignore[operator]  # NaN compares false


class Sampler:
    """Picks tokens for one request, on the CPU, from its own generator."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator().manual_seed(secrets.randbits(63) if params.seed is None else params.seed)

    def pick(self, logits: Tensor) -> tuple[int, float]:
        """Return (token id, its log-probability) from logits (V,) of any float dtype and device.

        The log-probability is the model's own: temperature 1, before top_k and top_p. Ties go to the lowest id.
        Raises CheckpointError when the logits hold NaN (broken weights).
        """
        logits = logits.detach().to("cpu", torch.float64)
        logprobs = torch.log_softmax(logits, dim=-1)
        token = int(logprobs.argmax()) if self.params.temperature == 0 else self._draw(logits)
        logprob = float(logprobs[token])
        if math.isnan(logprob):
            raise CheckpointError("the model computed NaN logits: its weights are damaged or of the wrong format")
        return token, logprob

    def _draw(self, logits: Tensor) -> int:
        order = torch.sort(logits / self.params.temperature, descending=True, stable=True)
        probs = torch.softmax(order.values, dim=-1)  # (V,), most likely first
        if self.params.top_k:
            probs[self.params.top_k :] = 0
        # top_p keeps the shortest head whose mass reaches it: a token stays while the mass before it is short.
        mass = probs.cumsum(-1)
        keep = mass - probs < self.params.top_p * mass[-1]
        mass = torch.where(keep, probs, 0).cumsum(-1)
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        index = int(torch.searchsorted(mass, uniform * mass[-1], right=True))
        return int(order.indices[min(index, int(keep.sum()) - 1)])
