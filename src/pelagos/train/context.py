"""Context parallelism: each rank has a part of every row, and what lies before it comes from its neighbour.

Ranks exchange the borders of window rows and of uncompressed rows, then gather the entries they made, of which some
hold one more than others: padded to be gathered, selected behind. Source: technical report 3.4.3.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pelagos.config import ModelConfig
from pelagos.errors import ConfigError
from pelagos.kernels.ref import compress
from pelagos.kernels.ref.attention import window_mask
from pelagos.model.attention import CSA_RATIO, Step, Table
from pelagos.train.ranks import Line


@dataclass
class PartStep(Step):
    """A `Step` over a part of rows: `whole` are (positions, segments) of the rows, both (B, cp * S)."""

    whole: tuple[Tensor, Tensor] | None = None

    def entry_table(self, ratio: int, begin: int, count: int) -> Table:
        key = (ratio, begin, count)
        if key not in self._entry_tables:
            assert self.whole is not None
            positions = self.whole[0][:, begin * ratio : (begin + count) * ratio : ratio]
            self._entry_tables[key] = self.table_at(positions, True)
        return self._entry_tables[key]

    def entry_segments(self, ratio: int, begin: int, count: int) -> Tensor:
        assert self.whole is not None
        own = self.whole[1][:, : (begin + count) * ratio : ratio]
        return functional.pad(own, (1, 0), value=-2)[:, begin:]

    def window_mask(self) -> Tensor:
        if self._window is None:
            assert self.whole is not None
            size = self.config.sliding_window
            near = self.whole[1][:, max(0, self.start - size) : self.start + self.length]
            self._window = window_mask(self.start, self.length, size, near, self.ids.device)
        return self._window

    def visible(self, ratio: int, entries: int) -> Tensor:
        key = (ratio, entries)
        if key not in self._visible:
            assert self.whole is not None
            assert self.segments is not None
            mask = compress.visible_entries(self.start, self.length, ratio, entries, self.ids.device)
            own = self.whole[1][:, : entries * ratio : ratio]
            self._visible[key] = mask.unsqueeze(0) & (own.unsqueeze(1) == self.segments.unsqueeze(2))
        return self._visible[key]


class Context:
    """The memory of a forward over one rank's part of the rows, a `Cache`; and that part itself.

    A part of whole compression windows needs the m rows of the one before it, any other up to 2m - 1: a window lies
    across the border, and the overlapping half of it before that. `capped` sends m all the same.
    """

    position = 0

    def __init__(self, config: ModelConfig, line: Line, *, capped: bool = False) -> None:
        self.config, self.line, self.capped, self.size = config, line, capped, 0

    def cut(self, rows: Tensor) -> Tensor:
        """Return this rank's part of rows (B, S)."""
        return rows.chunk(self.line.size, 1)[self.line.rank].contiguous()

    def step(self, ids: Tensor, positions: Tensor, segments: Tensor) -> PartStep:
        """Describe this rank's part of packed rows, all (B, S); raises ConfigError for parts shorter than a border."""
        least = max(self.config.sliding_window, *(m * (1 + (m == CSA_RATIO)) for m in self.config.layer_ratios))
        size, rest = divmod(ids.shape[1], self.line.size)
        if rest or size < least:
            raise ConfigError(
                f"rows of {ids.shape[1]} tokens over cp={self.line.size}: expected equal parts of at least {least}"
            )
        self.size = size
        own, samples, begin = self.cut(positions), self.cut(segments), size * self.line.rank
        return PartStep(self.config, self.cut(ids), begin, own, samples, whole=(positions, segments))

    def layer(self, index: int) -> ContextLayer:
        """Return the memory of a layer."""
        return ContextLayer(self, self.config.compress_ratios[index] if index < len(self.config.compress_ratios) else 0)

    def check_room(self, tokens: int) -> None:
        """Nothing is held."""

    def advance(self, tokens: int) -> None:
        """Nothing is held."""

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over the parts of the rows, without a gradient."""
        return self.line.sum(x.detach())

    def share(self, targets: Tensor) -> Tensor:
        """Return by what a mean over this part's targets enters the mean over all of the rows'."""
        count = (targets >= 0).sum()
        return count.clamp_min(1) / self.sum(count).clamp_min(1)


class ContextLayer:
    """One layer's borders and entries of ratio `ratio`: a `LayerCache`."""

    def __init__(self, context: Context, ratio: int) -> None:
        self._context, self._ratio = context, ratio

    def window(self, kv: Tensor) -> Tensor:
        """Return kv (B, S, C) behind the window of rows before it."""
        return torch.cat((_Border.apply(self._context.line, kv[:, -self._context.config.sliding_window :]), kv), 1)

    def tail(self, name: str, kv: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Return compressor rows behind the `keep` rows before them, of which only those that count travel."""
        line, width = self._context.line, kv.shape[2]
        needed = keep // 2 if keep > self._ratio else 0  # the window before, which an overlapping one reads too
        if kv.shape[1] % self._ratio:
            needed = min(needed + self._ratio - 1, self._ratio if self._context.capped else keep)
        pad = functional.pad
        if needed == 0:
            return pad(kv, (0, 0, keep, 0)), pad(score, (0, 0, keep, 0), value=-torch.inf)
        got = _Border.apply(line, torch.cat((kv, score), 2)[:, -needed:])
        before, scores = got.split(width, 2)
        scores = scores if line.rank else torch.full_like(scores, -torch.inf)
        rest = (0, 0, keep - needed, 0)
        return torch.cat((pad(before, rest), kv), 1), torch.cat((pad(scores, rest, value=-torch.inf), score), 1)

    def entries(self, name: str, new: Tensor) -> Tensor:
        """Return the entries of all ranks (B, M, D) in the order of the rows, from this rank's new (B, N, D)."""
        ends = [rank * self._context.size // self._ratio for rank in range(self._context.line.size + 1)]
        return _Gathered.apply(self._context.line, new, [b - a for a, b in itertools.pairwise(ends)])


class _Border(torch.autograd.Function):
    """Rows (B, N, C) to the next rank, those of the rank before returned, zeros on the first; gradients go back."""

    @staticmethod
    def forward(ctx: Any, line: Line, rows: Tensor) -> Tensor:
        ctx.line = line
        return _shift(line, rows, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, _shift(ctx.line, grad, -1)


def _shift(line: Line, rows: Tensor, by: int) -> Tensor:
    to, of = line.rank + by, line.rank - by
    sent, got = ([len(rows) * (other == rank) for other in range(line.size)] for rank in (to, of))
    arrived, work = line.send(rows[: sum(sent)].contiguous(), sent, got)
    line.wait(work)
    return arrived if sum(got) else torch.zeros_like(rows)


class _Gathered(torch.autograd.Function):
    """All ranks' entries, one rank's after another's; each entry's gradient is added in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, line: Line, new: Tensor, counts: list[int]) -> Tensor:
        ctx.line, ctx.counts = line, counts
        padded = functional.pad(new, (0, 0, 0, max(counts) - new.shape[1]))
        return torch.cat([part[:, :count] for part, count in zip(line.gather(padded), counts, strict=True)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        line, counts = ctx.line, ctx.counts
        parts = [functional.pad(p, (0, 0, 0, max(counts) - p.shape[1])) for p in grad.split(counts, 1)]
        total, *rest = line.swap(torch.stack(parts)).unbind(0)
        for part in rest:
            total = total + part
        return None, total[:, : counts[line.rank]], None
