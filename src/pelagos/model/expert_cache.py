"""Which routed experts lie in fast places: counts of choices that fade, evictions on demand, exchanges that pay.

Experts are numbered over all layers. No device here: whoever moves bytes does as this says. Meaning: docs/streaming.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pelagos.errors import CapacityError, ConfigError

Array = np.ndarray
HALF_LIFE = 2048  # tokens after which a choice counts half
SURE = 4.0  # standard deviations that two counts differ by before their experts change places
_LARGEST = 1e100  # of what a choice counts; everything is scaled down then


class ExpertCache:
    """`places` of `count` experts; `place` (count,) int64 says where an expert is, -1 outside."""

    def __init__(self, count: int, places: int, *, half_life: float = HALF_LIFE) -> None:
        """Begin with empty places; raises ConfigError for sizes that mean nothing."""
        if not 0 < places <= count or half_life <= 0:
            raise ConfigError(f"expert cache: {places} places for {count} experts, half-life {half_life}")
        self.place = np.full(count, -1, np.int64)
        self.held = np.full(places, -1, np.int64)  # expert in each place
        self.hits = self.misses = self.tokens = 0
        self._score = np.zeros(count)
        self._worth, self._growth = 1.0, 2.0 ** (1.0 / half_life)

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for so far that were in a place."""
        return self.hits / max(1, self.hits + self.misses)

    def note(self, experts: Array, tokens: int = 0) -> None:
        """Count distinct experts that a call reads, and the tokens that pass with it."""
        found = int((self.place[experts] >= 0).sum())
        self.hits += found
        self.misses += len(experts) - found
        self.tokens += tokens
        self._score[experts] += self._worth
        self._worth *= self._growth**tokens
        if self._worth > _LARGEST:
            self._score /= self._worth
            self._worth = 1.0

    def admit(self, wanted: Array, keep: Array | Sequence[int] = ()) -> list[tuple[int, int]]:
        """Give a place to each of `wanted` that has none; return (expert, place) for those, to be filled.

        The least counted others leave, never one of wanted or `keep`. Raises CapacityError when too few can.
        """
        missing = wanted[self.place[wanted] < 0]
        if not len(missing):
            return []
        score = np.where(self.held < 0, -1.0, self._score[self.held])
        stay = self.place[np.concatenate((wanted, np.asarray(keep, np.int64)))]
        score[stay[stay >= 0]] = np.inf
        free = np.argsort(score, kind="stable")[: len(missing)]
        if len(free) < len(missing) or np.isinf(score[free[-1]]):
            raise CapacityError(f"{len(self.held)} places for experts: {len(wanted)} are needed at once")
        given = list(zip(missing.tolist(), free.tolist(), strict=True))
        for expert, place in given:
            if self.held[place] >= 0:
                self.leave(int(self.held[place]))
            self.take(expert, place)
        return given

    def leave(self, expert: int) -> None:
        """Free an expert's place."""
        self.held[self.place[expert]] = -1
        self.place[expert] = -1

    def take(self, expert: int, place: int) -> None:
        """Put an expert into a free place."""
        assert self.held[place] < 0
        self.held[place], self.place[expert] = expert, place

    def exchange(self, most: int = 1) -> list[tuple[int, int]]:
        """Return up to `most` pairs (expert outside, expert inside) that surely should change places."""
        outside, inside = np.flatnonzero(self.place < 0), self.held[self.held >= 0]
        most = min(most, len(outside), len(inside))
        if not most:
            return []
        hot = outside[np.argpartition(-self._score[outside], most - 1)[:most]]
        cold = inside[np.argpartition(self._score[inside], most - 1)[:most]]
        hot, cold = hot[np.argsort(-self._score[hot])], cold[np.argsort(self._score[cold])]
        more, less = self._score[hot] / self._worth, self._score[cold] / self._worth
        sure = more - less > 1 + SURE * (more + less) ** 0.5
        return list(zip(hot[sure].tolist(), cold[sure].tolist(), strict=True))


def draw_routes(rng: np.random.Generator, tokens: int, *, experts: int, picks: int, exponent: float) -> Array:
    """Draw (tokens, picks) int64 distinct experts each, the one of rank r with weight r^-exponent: 0 is uniform.

    Ranks are a permutation drawn first.
    """
    weight = -exponent * np.log1p(rng.permutation(experts))
    keys = weight + rng.gumbel(size=(tokens, experts))
    return np.argpartition(-keys, picks - 1, 1)[:, :picks]
