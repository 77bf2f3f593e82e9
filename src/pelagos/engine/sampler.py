"""How one request picks its next token: frozen parameters, counter-based noise, and the penalties' own record.

A pick depends on the logits, the request's seed, the token's position and the tokens before it, and on nothing else:
not on the batch, not on speculation, not on how many draws were made. Order of operations, with its sources:
repetition penalty (CTRL; transformers' definition, over prompt and generated tokens), frequency and presence penalty
(OpenAI's definition, over generated tokens), logit bias (OpenAI), grammar mask, temperature, top_k, top_p (nucleus,
of what top_k left), min_p (of the likeliest token).
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from pelagos.errors import CheckpointError, RequestError
from pelagos.kernels.layout import Draw, Drawn

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
_BROKEN = "the model computed logits that are NaN or infinite: its weights are damaged or misread"
_WORD = 2**64 - 1
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64


@runtime_checkable
class Grammar(Protocol):
    """What a request's output must follow, token by token; only its sampler calls it."""

    def mask(self) -> np.ndarray | None:
        """Return which tokens may come next, bool (V,) or shorter (ids beyond it may not), or None for all."""
        ...

    def accept(self, token: int) -> None:
        """Go on by one token that the mask allowed."""
        ...

    def rollback(self, count: int) -> None:
        """Undo the last `count` accepted tokens."""
        ...

    def fork(self) -> Grammar:
        """Return an independent copy at the same state: every request takes one."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """What one request asks of the sampler; a wrong value raises RequestError naming it.

    temperature 0 is greedy; top_k 0 keeps every token; seed None draws a fresh one per request. The text is cut
    before the first of the `stop` strings; `stop_token_ids` end it as the end token does, which `ignore_eos` makes an
    ordinary one. `logprobs`: true asks for the log-probability of every picked token, n for the n likeliest beside it.
    `prompt_logprobs` asks for those of the prompt. Log-probabilities are the model's own: temperature 1, nothing cut.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: bool | int = False
    prompt_logprobs: bool = False
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, "a whole number >= 1", _is_whole(self.max_tokens, 1))
        _check("temperature", self.temperature, "a number from 0 to 2", _is_number(self.temperature, 0, 2))
        in_range = _is_number(self.top_p, 0, 1) and self.top_p > 0
        _check("top_p", self.top_p, "a number above 0 and at most 1", in_range)
        _check("top_k", self.top_k, "a whole number >= 0 (0 keeps every token)", _is_whole(self.top_k, 0))
        _check("min_p", self.min_p, "a number from 0 to 1", _is_number(self.min_p, 0, 1))
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), "a number from -2 to 2", _is_number(getattr(self, name), -2, 2))
        in_range = _is_number(self.repetition_penalty, 0.01, 100)
        _check("repetition_penalty", self.repetition_penalty, "a number from 0.01 to 100", in_range)
        good = isinstance(self.logit_bias, Mapping) and all(
            _is_whole(token, 0) and _is_number(bias, -100, 100) for token, bias in self.logit_bias.items()
        )
        _check("logit_bias", self.logit_bias, "an object of token ids and numbers from -100 to 100", good)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if self.seed is not None:
            in_range = _is_whole(self.seed, 0) and self.seed < 2**63
            _check("seed", self.seed, "a whole number from 0 to 2**63 - 1", in_range)
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        good = isinstance(stops, (list, tuple)) and all(isinstance(s, str) and s for s in stops)
        _check("stop", self.stop, f"at most {MAX_STOPS} strings, none empty", good and len(stops) <= MAX_STOPS)
        object.__setattr__(self, "stop", tuple(stops))
        ids = self.stop_token_ids
        good = isinstance(ids, (list, tuple)) and all(_is_whole(token, 0) for token in ids)
        _check("stop_token_ids", ids, "a list of token ids", good)
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        for name in ("ignore_eos", "prompt_logprobs"):
            _check(name, getattr(self, name), "true or false", type(getattr(self, name)) is bool)
        good = type(self.logprobs) is bool or (_is_whole(self.logprobs, 0) and self.logprobs <= MAX_TOP_LOGPROBS)
        _check("logprobs", self.logprobs, f"true, false or a whole number from 0 to {MAX_TOP_LOGPROBS}", good)
        good = self.grammar is None or isinstance(self.grammar, Grammar)
        _check("grammar", self.grammar, "an object with mask, accept, rollback and fork", good)

    def ends(self, eos: int) -> frozenset[int]:
        """Return the token ids that end this request, given the model's end token."""
        return frozenset((*self.stop_token_ids, *(() if self.ignore_eos else (eos,))))


def _check(name: str, value: object, expected: str, good: bool) -> None:
    if not good:
        raise RequestError(f"{name}={value!r}: expected {expected}")


def _is_whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: object, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most  # type: ignore[operator]  # NaN compares false


class Pick(NamedTuple):
    """A picked token, the model's own log-probability of it, and (id, log-probability) of the likeliest if asked."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Picks the tokens of one request from rows of logits; keeps the tokens it picked, for penalties and grammar."""

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: Iterable[int] = ()) -> None:
        """`prompt` (ids below vocab_size) counts for the repetition penalty only; RequestError for a bias beyond it."""
        self.params = params
        self._key = _mix(secrets.randbits(63) if params.seed is None else params.seed)
        self._grammar = None if params.grammar is None else params.grammar.fork()
        self._top = 0 if params.logprobs is True else int(params.logprobs)
        self._picked: list[int] = []
        self._penalises = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)
        self._offset: np.ndarray | None = None  # (V,) float64, what penalties and bias add to the logits
        if self._penalises or params.logit_bias:
            self._offset = np.zeros(vocab_size)
        if self._offset is not None and params.logit_bias:
            if max(params.logit_bias) >= vocab_size:
                raise RequestError(f"logit_bias[{max(params.logit_bias)}]: expected token ids below {vocab_size}")
            self._offset[list(params.logit_bias)] = list(params.logit_bias.values())
        if self._penalises:
            self._counts = np.zeros(vocab_size, np.int64)  # of generated tokens
            self._in_prompt = np.zeros(vocab_size, bool)
            self._in_prompt[np.fromiter(prompt, np.int64)] = True
            self._seen = self._in_prompt.copy()

    def pick(self, logits: np.ndarray, position: int) -> Pick:
        """Pick the token of `position` from logits (V,) float32, those of the position before it, and record it.

        Ties go to the lowest id. Raises CheckpointError when the logits hold NaN or infinity (broken weights),
        RequestError when the grammar allows no token.
        """
        pick = self.peek(logits, position)
        self.accept(pick.token)
        return pick

    def draws(self, position: int, count: int) -> tuple[Draw, ...] | None:
        """Return what picks the tokens of `count` positions from logits alone, None where more than those counts."""
        params = self.params
        if self._offset is not None or self._grammar is not None or self._top:
            return None
        keys = (_mix(self._key ^ _mix(at)) for at in range(position, position + count))
        top_k = min(params.top_k, 1 << 31)
        return tuple(Draw(params.temperature, params.top_p, params.min_p, top_k, key) for key in keys)

    def verify(
        self, rows: np.ndarray | Sequence[Drawn], drafts: Sequence[int], position: int,
        ends: AbstractSet[int] = frozenset(),
    ) -> list[Pick]:  # fmt: skip
        """Pick from logits (1 + k, V) while the k drafts agree: 1 to 1 + k picks, the first one for `position`.

        Stops after a pick that differs from its draft or is in `ends`; equal to picking one at a time. Rows that were
        drawn already (`draws`) are taken as they are.
        """
        picks: list[Pick] = []
        for row, draft in zip(rows, (*drafts, -1), strict=True):
            picks.append(self._taken(row) if isinstance(row, Drawn) else self.pick(row, position + len(picks)))
            if picks[-1].token != draft or draft in ends:
                break
        return picks

    def _taken(self, drawn: Drawn) -> Pick:
        if drawn.token < 0:
            raise CheckpointError(_BROKEN)
        self.accept(drawn.token)
        return Pick(drawn.token, drawn.logprob)

    def accept(self, token: int) -> None:
        """Record a generated token: penalties and grammar go on by it."""
        self._picked.append(token)
        if self._penalises:
            self._count(token, 1)
        if self._grammar is not None:
            self._grammar.accept(token)

    def rollback(self, count: int) -> None:
        """Forget the last `count` recorded tokens."""
        for _ in range(count):
            token = self._picked.pop()
            if self._penalises:
                self._count(token, -1)
        if self._grammar is not None and count:
            self._grammar.rollback(count)

    def _count(self, token: int, change: int) -> None:
        params, offset = self.params, self._offset
        assert offset is not None
        self._counts[token] += change
        count = int(self._counts[token])
        self._seen[token] = count > 0 or self._in_prompt[token]
        penalty = params.frequency_penalty * count + params.presence_penalty * (count > 0)
        offset[token] = params.logit_bias.get(token, 0.0) - penalty

    def peek(self, logits: np.ndarray, position: int) -> Pick:
        """Pick as `pick` does and record nothing: what a drafter does with its own logits."""
        exact = logits.astype(np.float64)  # (V,)
        normaliser = _normaliser(exact)
        adjusted = self._adjust(exact)
        if self.params.temperature == 0:
            token = int((logits if adjusted is exact else adjusted).argmax())
        else:
            token = self._draw(adjusted, position)
        top = _likeliest(exact, normaliser, self._top) if self._top else ()
        return Pick(token, float(exact[token]) - normaliser, top)

    def _adjust(self, logits: np.ndarray) -> np.ndarray:
        """Return logits (V,) float64 after penalties, bias and grammar; the same array when there are none."""
        rate = self.params.repetition_penalty
        if rate != 1:
            logits = np.where(self._seen, np.where(logits < 0, logits * rate, logits / rate), logits)
        if self._offset is not None:
            logits = logits + self._offset
        mask = None if self._grammar is None else self._grammar.mask()
        if mask is not None:
            masked = np.full_like(logits, -np.inf)
            masked[: mask.size] = np.where(mask, logits[: mask.size], -np.inf)
            logits = masked
            if not mask.any():
                raise RequestError(f"the grammar allows no token after {len(self._picked)} generated: it is finished")
        return logits

    def _draw(self, logits: np.ndarray, position: int) -> int:
        """Return the argmax of kept logits / temperature + Gumbel noise: a draw from their softmax."""
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the likeliest to -inf
            scaled = (logits - logits.max()) / self.params.temperature  # (V,), the likeliest at exactly 0
        kept = self._keep(scaled)
        key = _mix(self._key ^ _mix(position))
        if kept is None:
            words = _words(key, _steps(scaled.size))
        else:
            scaled = scaled[kept]
            words = _words(key, _steps(logits.size)[kept])
        # Noise grows with its word, so the largest word bounds it: what cannot beat the likeliest token needs none.
        ends = _gumbel(np.stack((words[scaled.argmax()], words.max())))
        near = np.flatnonzero(scaled >= ends[0] - ends[1] - 1e-9)
        winner = near[(scaled[near] + _gumbel(words[near])).argmax()]
        return int(winner if kept is None else kept[winner])

    def _keep(self, scaled: np.ndarray) -> np.ndarray | None:
        """Return the ids, ascending, that top_k, top_p and min_p keep of scaled (V,); None for all."""
        params, kept = self.params, None
        if 0 < params.top_k < scaled.size:
            kept = _first(scaled, params.top_k)
        if params.top_p < 1:
            values = scaled if kept is None else scaled[kept]
            inside = _nucleus(values, params.top_p)
            kept = inside if kept is None else kept[inside]
        if params.min_p > 0:
            floor = math.log(params.min_p)
            kept = np.flatnonzero(scaled >= floor) if kept is None else kept[scaled[kept] >= floor]
        return kept


def token_logprobs(logits: np.ndarray, tokens: Sequence[int]) -> list[float]:
    """Return the log-probability of tokens (S,) under logits (S, V) float32, in the arithmetic of `Sampler`."""
    rows = (row.astype(np.float64) for row in logits)
    return [float(row[token]) - _normaliser(row) for row, token in zip(rows, tokens, strict=True)]


def _normaliser(logits: np.ndarray) -> float:
    """Return log(sum(exp(logits))) of contiguous (V,) float64, summed in numpy's one order for V."""
    peak = float(logits.max())
    if not math.isfinite(peak):
        raise CheckpointError(_BROKEN)
    return peak + math.log(float(np.exp(logits - peak).sum()))


def _first(values: np.ndarray, count: int) -> np.ndarray:
    """Return where the `count` largest of values (N,) are, ascending; ties to the lowest index."""
    at = np.flatnonzero(values >= np.partition(values, values.size - count)[values.size - count])
    if at.size > count:
        at = np.sort(at[np.argsort(-values[at], kind="stable")[:count]])
    return at


def _likeliest(logits: np.ndarray, normaliser: float, count: int) -> tuple[tuple[int, float], ...]:
    ids = _first(logits, min(count, logits.size))
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return tuple((int(token), float(logits[token]) - normaliser) for token in ids)


def _nucleus(scaled: np.ndarray, top_p: float) -> np.ndarray:
    """Return where the shortest head of scaled (N,), largest 0, is whose mass reaches top_p of the whole, ascending.

    A value stays while the mass before it is short; of equal ones the lowest indices stay.
    """
    mass = float(np.exp(scaled).sum())
    # N values below this floor weigh less than half of what the head may leave out: only the others are sorted.
    floor = math.log((1 - top_p) * mass / (2 * scaled.size))
    order = np.sort(scaled[scaled >= floor])[::-1]
    count = 1 + int(np.searchsorted(np.cumsum(np.exp(order))[:-1], top_p * mass))
    return _first(scaled, count)


def _mix(word: int) -> int:
    """SplitMix64's output for one 64-bit state."""
    word = (word + _GOLDEN) & _WORD
    word = ((word ^ word >> 30) * _MIX1) & _WORD
    word = ((word ^ word >> 27) * _MIX2) & _WORD
    return word ^ word >> 31


@functools.cache
def _steps(vocab_size: int) -> np.ndarray:
    """The states of one SplitMix64 stream relative to its key, (V,) uint64: token i takes the i-th."""
    steps = np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    steps.flags.writeable = False
    return steps


def _words(key: int, steps: np.ndarray) -> np.ndarray:
    """SplitMix64's outputs at key + steps, (N,) uint64."""
    words = steps + np.uint64(key)
    words ^= words >> np.uint64(30)
    words *= np.uint64(_MIX1)
    words ^= words >> np.uint64(27)
    words *= np.uint64(_MIX2)
    words ^= words >> np.uint64(31)
    return words


def _gumbel(words: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise, float64, of the top 52 bits of uint64 words.

    u = (bits + 1/2) / 2**52 is exact and neither 0 nor 1; the noise lies between -3.61 and 36.74.
    """
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(-np.log(uniform))
