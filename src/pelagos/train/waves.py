"""Expert parallelism: tokens go to the ranks that hold their experts and back, a part of the experts at a time.

A wave is dispatch, the experts, combine. With `overlap` the rows of the next wave travel, and those of the last go
back, while a wave computes; the backward is the same with gradients. Source: technical report 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pelagos.errors import ConfigError
from pelagos.kernels import grouped_experts
from pelagos.kernels.ref import experts as ops
from pelagos.kernels.ref.gemm import ordered_sum
from pelagos.model import Transformer
from pelagos.model.experts import Experts
from pelagos.model.layers import quantize_activations, quantize_weight
from pelagos.train.ranks import Line, Trip


class Waves:
    """The forward of `experts` of which this rank of `line` keeps its part.

    Ordered, each source's rows are multiplied apart, as that rank alone would, and their weights' gradients are kept
    apart in `sources`, (w13, w2) a rank; else all at once, into the parameters' `grad`.
    """

    def __init__(self, experts: Experts, line: Line, *, waves: int, overlap: bool, ordered: bool) -> None:
        count = experts.w2.shape[0]
        if count % (line.size * waves):
            raise ConfigError(f"{count} experts over ep={line.size} ranks in waves={waves}: expected a divisor of them")
        self.experts, self.line, self.overlap, self.ordered = experts, line, overlap, ordered
        self.shape = (line.size, waves, count // line.size // waves)
        own = count // line.size
        experts.first = line.rank * own
        parts = (w[experts.first : experts.first + own].clone() for w in (experts.w13.detach(), experts.w2.detach()))
        experts.w13, experts.w2 = map(nn.Parameter, parts)
        self.sources: list[tuple[Tensor, Tensor]] = []
        self.done: Callable[[], None] = lambda: None  # called when they are there

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, multiple: int = 0) -> Tensor:
        """Return the weighted sum (T, D) float32 of the chosen experts; compare `Experts.forward`."""
        (size, waves, part), flat = self.shape, chosen.flatten()
        numbers = torch.arange(size * waves * part, device=x.device).view(self.shape)
        order = flat.argsort(stable=True)  # of rows by expert, that their gradients are added as one rank does
        place = numbers.transpose(0, 1).flatten().argsort()[flat[order]].argsort(stable=True)  # by wave, rank, expert
        to = torch.bincount(flat, minlength=numbers.numel()).view(self.shape)
        of = self.line.swap(to)  # by source, wave and expert
        rows, *own = _Apart.apply(self, x[order // chosen.shape[1]], self.experts.w13, self.experts.w2)
        bounds = to.sum((0, 2)).tolist()
        sent = list(zip(rows[place].split(bounds), weights.flatten()[order][place].split(bounds), strict=True))
        away, here = to.sum(2).T.tolist(), of.sum(2).T.tolist()  # rows by wave and rank
        going: list[list[tuple[Trip, Tensor]]] = []
        coming: list[tuple[Trip, Tensor]] = []
        for wave in range(waves):
            for ahead in range(len(going), min(wave + 1 + self.overlap, waves)):
                trips = [Trip(self.line, away[ahead], here[ahead]) for _ in sent[ahead]]
                going.append([(trip, trip.leave(t)) for trip, t in zip(trips, sent[ahead], strict=True)])
            arrived = [trip.arrive(t) for trip, t in going[wave]]
            expert = numbers[0, 0].repeat(size).repeat_interleave(of[:, wave].flatten())
            weight = own[wave::waves]  # (w13, w2) a source
            if self.ordered:
                split = [t.split(here[wave]) for t in (*arrived, expert)]
                made = torch.cat([self._mixture(*rows, *weight[2 * i : 2 * i + 2])
                                  for i, rows in enumerate(zip(*split, strict=True))])  # fmt: skip
            else:
                made = self._mixture(arrived[0], arrived[1], expert, *weight)
            trip = Trip(self.line, here[wave], away[wave])
            left = trip.leave(made)
            coming.append((trip, left if self.overlap else trip.arrive(left)))
        back = torch.cat([trip.arrive(t) if self.overlap else t for trip, t in coming])
        return ordered_sum(back[order[place].argsort()].view(*chosen.shape, -1).float(), 1)

    def _mixture(self, x: Tensor, weights: Tensor, expert: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        """Return what one expert each makes of rows, by what the one-rank path calls."""
        if not len(x):
            return x * weights.unsqueeze(1).to(x.dtype)  # whoever sent none waits for gradients all the same
        experts = self.experts
        quantize = quantize_activations if experts.simulate and experts.stored in ("fp8", "fp4") else None
        mixture = grouped_experts.mixture if x.is_cuda and x.dtype == torch.bfloat16 else ops.mixture
        inputs = (x, expert.unsqueeze(1), weights.unsqueeze(1), w13, w2, experts.limit, quantize)
        return mixture(*inputs, hits=experts.hits, leave=experts.leave).to(x.dtype)


class _Apart(torch.autograd.Function):
    """Rows as they are, and weights of each source (or of all) and wave, whose gradients stay apart if ordered."""

    @staticmethod
    def forward(ctx: Any, site: Waves, rows: Tensor, w13: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        ctx.site, experts = site, site.experts
        own = [quantize_weight(w, experts.stored) if experts.master else w.detach() for w in (w13, w2)]
        sources, waves, part = site.shape if site.ordered else (1, *site.shape[1:])
        views = [view for _ in range(sources) for w in own for view in w.unflatten(0, (waves, part)).unbind()]
        return rows.view_as(rows), *[view.detach() for view in views]

    @staticmethod
    def backward(ctx: Any, to_rows: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        site, waves = ctx.site, ctx.site.shape[1]
        whole = [torch.cat(grads[begin : begin + waves]) for begin in range(0, len(grads), waves)]
        if not site.ordered:
            return None, to_rows, *whole
        site.sources = list(zip(whole[::2], whole[1::2], strict=True))
        site.done()
        return None, to_rows, None, None


def divide_experts(model: Transformer, line: Line, **options: Any) -> None:
    """Leave each rank of `line` its experts of every layer."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.forward = Waves(module, line, **options)
