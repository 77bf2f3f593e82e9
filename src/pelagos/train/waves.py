"""Expert parallelism: tokens go to the ranks that hold their experts and back, a part of the experts at a time.

A wave is dispatch, the experts, combine. With `overlap` the rows of the next wave travel, and those of the last go
back, while a wave computes; the backward is the same with gradients. Source: technical report 3.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pelagos.errors import ConfigError
from pelagos.kernels import grouped_experts
from pelagos.kernels.ref import experts as ops
from pelagos.model import Transformer
from pelagos.model.experts import Experts
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
        w13, w2, *options = self.experts.in_products(x.dtype)
        numbers = torch.arange(size * waves * part, device=x.device)
        order = numbers.view(waves, size, part).transpose(0, 1).flatten()[flat].argsort(stable=True)  # as picks leave
        to = torch.zeros_like(numbers).scatter_add_(0, flat, torch.ones_like(flat)).view(self.shape)
        of = self.line.swap(to)  # by source, wave and expert
        away, here = torch.stack((to, of)).sum(3).transpose(1, 2).tolist()  # the one time that the host waits
        bounds, places = [sum(rows) for rows in away], order.argsort().view(chosen.shape)
        rows, *own = _Apart.apply(self, x, chosen, order, places, w13, w2)
        sent = list(zip(rows.split(bounds), weights.flatten().index_select(0, order).split(bounds), strict=True))
        going, coming = list[list[tuple[Trip, Tensor]]](), list[tuple[Trip, Tensor]]()
        for wave in range(waves):
            for ahead in range(len(going), min(wave + 1 + self.overlap, waves)):
                trips = [Trip(self.line, away[ahead], here[ahead]) for _ in sent[ahead]]
                going.append([(trip, trip.leave(t)) for trip, t in zip(trips, sent[ahead], strict=True)])
            arrived = [trip.arrive(t) for trip, t in going[wave]]
            made = self._mixture(*arrived, of[:, wave], *own[wave::waves], *options)
            trip = Trip(self.line, here[wave], away[wave])
            left = trip.leave(made)
            coming.append((trip, left if self.overlap else trip.arrive(left)))
        return _Sum.apply(torch.cat([trip.arrive(t) if self.overlap else t for trip, t in coming]), order, places)

    def _mixture(self, x: Tensor, weights: Tensor, counts: Tensor, w13: Tensor, w2: Tensor, *options: Any) -> Tensor:
        """Return what one expert each makes of x (R, D), `counts` by source and expert, by what one rank calls."""
        if not len(x):
            return x * weights.unsqueeze(1).to(x.dtype)  # whoever sent none waits for gradients all the same
        numbers = torch.arange(w13.shape[:2].numel(), device=x.device).view(w13.shape[:2]).T.expand_as(counts)
        expert = numbers.flatten().repeat_interleave(counts.flatten(), output_size=len(x)).unsqueeze(1)
        mixture = grouped_experts.mixture if x.is_cuda and x.dtype == torch.bfloat16 else ops.mixture
        inputs = (x, expert, weights.unsqueeze(1), w13, w2, *options)
        return mixture(*inputs, hits=self.experts.hits, leave=self.experts.leave).to(x.dtype)


class _Apart(torch.autograd.Function):
    """Rows in `order`, and weights (part, sources, ...) a wave, whose gradients stay apart by source if ordered."""

    @staticmethod
    def forward(
        ctx: Any, site: Waves, x: Tensor, chosen: Tensor, order: Tensor, places: Tensor, *weights: Tensor
    ) -> Any:
        ctx.site = site
        ctx.save_for_backward(chosen, places)
        apart = [w.unsqueeze(1).expand(-1, site.shape[0] if site.ordered else 1, -1, -1) for w in weights]
        return x[order // chosen.shape[1]], *[view.detach() for w in apart for view in w.split(site.shape[2])]

    @staticmethod
    def backward(ctx: Any, to_rows: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        site, waves, (chosen, places) = ctx.site, ctx.site.shape[1], ctx.saved_tensors
        if to_rows.is_cuda:
            to_x = grouped_experts.sum_rows(to_rows, places, to_rows.dtype)
        else:  # in the order in which one rank's autograd adds them
            rows = to_rows[places.gather(1, chosen.argsort(dim=1, stable=True))]
            to_x = functools.reduce(torch.add, rows.unbind(1))
        whole = [torch.cat(grads[:waves]), torch.cat(grads[waves:])]
        if not site.ordered:
            return None, to_x, None, None, None, *[gradient.squeeze(1) for gradient in whole]
        site.sources = list(zip(*(gradient.unbind(1) for gradient in whole), strict=True))
        site.done()
        return None, to_x, *[None] * 5


class _Sum(torch.autograd.Function):
    """The sums (T, D) float32 of rows (R, D) at places (T, K)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        ctx.picks, ctx.dtype = places.shape[1], rows.dtype
        return grouped_experts.sum_rows(rows, places, torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.to(ctx.dtype)[ctx.saved_tensors[0] // ctx.picks], None, None


def divide_experts(model: Transformer, line: Line, **options: Any) -> None:
    """Leave each rank of `line` its experts of every layer."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.forward = Waves(module, line, **options)
