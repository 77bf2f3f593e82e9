"""Context parallelism: each rank has a part of every row, and what lies before it comes from its neighbour.

Ranks exchange the borders of window rows and of uncompressed rows, then gather the entries they made, of which some
hold one more than others: each sends what it has, so nothing is padded. Source: technical report 3.4.3.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from pelagos.config import ModelConfig
from pelagos.errors import ConfigError
from pelagos.model.attention import CSA_RATIO, Step
from pelagos.model.cache import FullSequence
from pelagos.train.ranks import Line, Trip


class Context(FullSequence):
    """The memory of a forward over one rank's part of the rows, a `Cache`; and that part itself.

    A part of whole compression windows needs the m rows of the one before it, any other up to 2m - 1: a window lies
    across the border, and the overlapping half of it before that. `capped` sends m all the same.
    """

    def __init__(self, config: ModelConfig, line: Line, *, capped: bool = False) -> None:
        self.config, self.line, self.capped, self.size = config, line, capped, 0

    def cut(self, rows: Tensor) -> Tensor:
        """Return this rank's part of rows (B, S)."""
        return rows.chunk(self.line.size, 1)[self.line.rank].contiguous()

    def step(self, ids: Tensor, positions: Tensor, segments: Tensor) -> Step:
        """Describe this rank's part of packed rows, all (B, S); raises ConfigError for parts shorter than a border."""
        least = max(self.config.sliding_window, *(m * (1 + (m == CSA_RATIO)) for m in self.config.layer_ratios))
        size, rest = divmod(ids.shape[1], self.line.size)
        if rest or size < least:
            raise ConfigError(
                f"rows of {ids.shape[1]} tokens over cp={self.line.size}: expected equal parts of at least {least}"
            )
        self.size = size
        own, samples, begin = self.cut(positions), self.cut(segments), size * self.line.rank
        return Step(self.config, self.cut(ids), begin, own, samples, whole=(positions, segments))

    def layer(self, index: int) -> ContextLayer:
        """Return the memory of a layer."""
        return ContextLayer(self, self.config.compress_ratios[index] if index < len(self.config.compress_ratios) else 0)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over the parts of the rows, without a gradient."""
        return self.line.sum(x.detach())

    def share(self, targets: Tensor) -> Tensor:
        """Return by what a mean over this part's targets enters the mean over all of the rows'."""
        count = (targets >= 0).sum()
        return count.clamp_min(1) / self.sum(count).clamp_min(1)


class ContextLayer(FullSequence):
    """One layer's borders and entries of ratio `ratio`: a `LayerCache`."""

    def __init__(self, context: Context, ratio: int) -> None:
        self._context, self._ratio = context, ratio

    def window(self, kv: Tensor) -> Tensor:
        """Return kv (B, S, C) behind the window of rows before it."""
        return torch.cat((_before(self._context.line, kv[:, -self._context.config.sliding_window :]), kv), 1)

    def tail(self, name: str, kv: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Return compressor rows behind the `keep` rows before them, of which only those that count travel."""
        line, width = self._context.line, kv.shape[2]
        needed = keep // 2 if keep > self._ratio else 0  # the window before, which an overlapping one reads too
        if kv.shape[1] % self._ratio:
            needed = min(needed + self._ratio - 1, self._ratio if self._context.capped else keep)
        pad = functional.pad
        if needed == 0:
            return pad(kv, (0, 0, keep, 0)), pad(score, (0, 0, keep, 0), value=-torch.inf)
        got = _before(line, torch.cat((kv, score), 2)[:, -needed:])
        before, scores = got.split(width, 2)
        scores = scores if line.rank else torch.full_like(scores, -torch.inf)
        rest = (0, 0, keep - needed, 0)
        return torch.cat((pad(before, rest), kv), 1), torch.cat((pad(scores, rest, value=-torch.inf), score), 1)

    def entries(self, name: str, new: Tensor) -> Tensor:
        """Return the entries of all ranks (B, M, D) in the order of the rows, from this rank's new (B, N, D)."""
        line, size, ratio = self._context.line, self._context.size, self._ratio
        ends = [rank * size // ratio for rank in range(line.size + 1)]
        trip = Trip(line, [new.shape[1]] * line.size, [b - a for a, b in itertools.pairwise(ends)])
        sent = new.transpose(0, 1)  # (N, B, D), to everybody
        return trip.arrive(trip.leave(sent.repeat(line.size, 1, 1))).transpose(0, 1)


def _before(line: Line, rows: Tensor) -> Tensor:
    """Return the rows (B, N, C) of the rank before, zeros on the first, and send these to the next."""
    to, of = ([len(rows) * (other == rank) for other in range(line.size)] for rank in (line.rank + 1, line.rank - 1))
    trip = Trip(line, to, of)
    got = trip.arrive(trip.leave(rows[: sum(to)]))
    return torch.cat((got, rows.new_zeros((len(rows) - len(got), *rows.shape[1:]))))
