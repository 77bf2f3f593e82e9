"""Expert parallelism: tokens go to the ranks that hold their experts and back, a part of the experts at a time.

A wave is dispatch, both products, combine. With `overlap` the rows of the next wave travel, and those of the last go
back, while a wave computes; the backward is the same with gradients. Source: technical report 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pelagos.errors import ConfigError
from pelagos.kernels.ref import experts as ops
from pelagos.kernels.ref.gemm import ordered_sum
from pelagos.model import Transformer
from pelagos.model.experts import Experts
from pelagos.model.layers import quantize_activations, quantize_weight
from pelagos.train.ranks import Line

Compute = Callable[[int, list[Tensor]], list[Tensor]]  # of a wave, what arrived for it -> what goes back


class Waves:
    """The forward of `experts` of which this rank of `line` holds its part.

    Ordered, each source's rows of an expert are multiplied apart, as that rank alone would, and their weights'
    gradients are kept apart in `sources`, (w13, w2) a rank; else all at once, into the parameters' `grad`.
    """

    def __init__(self, experts: Experts, line: Line, *, waves: int, overlap: bool, ordered: bool) -> None:
        count = experts.w2.shape[0]
        if count % (line.size * waves):
            raise ConfigError(f"{count} experts over ep={line.size} ranks in waves={waves}: expected a divisor of them")
        self.experts, self.line, self.waves, self.overlap, self.ordered = experts, line, waves, overlap, ordered
        self.count, self.part = count, count // line.size // waves  # of all experts, of those in a wave here
        own = slice(line.rank * count // line.size, (line.rank + 1) * count // line.size)
        experts.w13, experts.w2 = (nn.Parameter(w.detach()[own].clone()) for w in (experts.w13, experts.w2))
        self.sources: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, multiple: int = 0) -> Tensor:
        """Return the weighted sum (T, D) float32 of the chosen experts; compare `Experts.forward`."""
        experts, picks = self.experts, chosen.shape[1]
        quantize = quantize_activations if experts.simulate and experts.stored in ("fp8", "fp4") else None
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        trip = Trip(self, torch.bincount(flat, minlength=self.count), quantize)
        rows = (quantize(x) if quantize else x)[order // picks]
        out = _Site.apply(trip, rows, weights.flatten()[order], experts.w13, experts.w2)
        return ordered_sum(out[back].view(*chosen.shape, -1).float(), 1)


class Trip:
    """One batch's way through the waves: how many rows of each expert come from and go to each rank."""

    def __init__(self, site: Waves, counts: Tensor, quantize: ops.Quantizer | None) -> None:
        self.site, self.quantize = site, quantize
        size, shape = site.line.size, (site.line.size, site.waves, site.part)
        starts = (counts.cumsum(0) - counts).view(shape)
        places = [torch.arange(begin, end, device=counts.device) for wave in range(site.waves) for begin, end in (
            (int(starts[to, wave, 0]), int(starts[to, wave, 0] + counts.view(shape)[to, wave].sum()))
            for to in range(size))]  # fmt: skip
        self.order = torch.cat(places)  # of rows sorted by expert: those of a wave, to each rank in turn
        self.theirs = site.line.swap(counts.view(shape)).tolist()  # (source, wave, expert)
        self.to = counts.view(shape).sum(2).T.tolist()  # (wave, rank)
        self.of = [[sum(source[wave]) for source in self.theirs] for wave in range(site.waves)]
        self.graphs: list[list[tuple[int, slice, list[Tensor], Tensor]]] = [[] for _ in range(site.waves)]

    def travel(self, sent: list[Tensor], compute: Compute) -> list[Tensor]:
        """Send rows sorted by expert through all waves; return what comes back for them, sorted alike."""
        line, waves = self.site.line, range(self.site.waves)
        bounds = [sum(sum(to) for to in self.to[:wave]) for wave in range(self.site.waves + 1)]
        rows = [t[self.order] for t in sent]

        def dispatch(wave: int) -> list[tuple[Tensor, Any]]:
            return [line.send(t[bounds[wave] : bounds[wave + 1]], self.to[wave], self.of[wave]) for t in rows]

        arriving, returning = {0: dispatch(0)}, []
        for wave in waves:
            if self.site.overlap and wave + 1 < len(waves):
                arriving[wave + 1] = dispatch(wave + 1)
            arrived = arriving.pop(wave, None) or dispatch(wave)
            made = compute(wave, [self._here(*each) for each in arrived])
            going = [line.send(t, self.of[wave], self.to[wave]) for t in made]
            returning.append(going if self.site.overlap else [(self._here(*each), None) for each in going])
        parts = [[self._here(*each) for each in wave] for wave in returning]
        found = [torch.cat(each) for each in zip(*parts, strict=True)]
        return [torch.empty_like(t).index_copy_(0, self.order, t) for t in found]

    def _here(self, rows: Tensor, work: Any) -> Tensor:
        if work is not None:
            self.site.line.wait(work)
        return rows

    def groups(self, wave: int) -> list[tuple[int, int, slice]]:
        """Return (source, first expert, rows) of what is multiplied apart: each expert's rows of each source."""
        found, begin = [], 0
        for source, counts in enumerate(self.theirs):
            for place, count in enumerate(counts[wave]):
                found.append((source, wave * self.site.part + place, slice(begin, begin + count)))
                begin += count
        return [(source, expert, rows) for source, expert, rows in found if rows.stop > rows.start]


class _Site(torch.autograd.Function):
    """All waves of a site: rows (R, D) and routing weights (R,), sorted by expert, to the experts' outputs (R, D)."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, rows: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        experts = trip.site.experts
        if experts.master:
            w13, w2 = quantize_weight(w13, experts.stored), quantize_weight(w2, experts.stored)
        limit, hits, leave = experts.limit, experts.hits, experts.leave

        def compute(wave: int, arrived: list[Tensor]) -> list[Tensor]:
            out = torch.empty_like(arrived[0])
            for source, first, place, counts, taken in _products(trip, wave, arrived[0].device):
                x, weight = (t[taken].detach().requires_grad_() for t in arrived)
                up, down = (w[first : first + len(counts)].detach().requires_grad_() for w in (w13, w2))
                with torch.enable_grad():
                    made = ops.expert_rows(x, weight, up, down, counts, limit, trip.quantize, hits, leave)
                out[taken] = made.detach()
                trip.graphs[wave].append((source, place, [x, weight, up, down], made))
            return [out]

        ctx.trip = trip
        return trip.travel([rows, weights], compute)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        trip: Trip = ctx.trip
        site = trip.site
        apart = site.line.size if site.ordered else 1
        gradients = [[torch.zeros_like(w) for w in (site.experts.w13, site.experts.w2)] for _ in range(apart)]
        dtype = grad.dtype

        def compute(wave: int, arrived: list[Tensor]) -> list[Tensor]:
            to_rows = torch.empty_like(arrived[0])
            to_weights = to_rows.new_empty(len(to_rows), dtype=torch.float32)
            products = _products(trip, wave, arrived[0].device)
            for (*_, taken), (source, place, inputs, made) in zip(products, trip.graphs[wave], strict=True):
                x, w, *own = torch.autograd.grad(made, inputs, arrived[0][taken])
                to_rows[taken], to_weights[taken] = x.to(dtype), w
                for total, part in zip(gradients[source if site.ordered else 0], own, strict=True):
                    total[place] += part
            trip.graphs[wave].clear()
            return [to_rows, to_weights]

        to_rows, to_weights = trip.travel([grad], compute)
        if not site.ordered:
            return None, to_rows, to_weights, *gradients[0]
        site.sources = [(w13, w2) for w13, w2 in gradients]
        return None, to_rows, to_weights, None, None


def _products(trip: Trip, wave: int, device: torch.device) -> list[tuple[int, int, slice, list[int], Any]]:
    """Return (source, first expert, experts, rows of each, which rows) of each call of the experts in a wave."""
    groups = trip.groups(wave)
    if trip.site.ordered:
        return [(source, at, slice(at, at + 1), [rows.stop - rows.start], rows) for source, at, rows in groups]
    first = wave * trip.site.part
    counts = [sum(source[wave][place] for source in trip.theirs) for place in range(trip.site.part)]
    by_expert = sorted(groups, key=lambda group: (group[1], group[0]))
    taken = [torch.arange(rows.start, rows.stop, device=device) for _, _, rows in by_expert]
    whole = slice(first, first + trip.site.part)
    return [(0, first, whole, counts, torch.cat(taken))] if taken else []


def divide_experts(model: Transformer, line: Line, **options: Any) -> list[tuple[str, Waves]]:
    """Leave each rank of `line` its experts of every layer; return (module name, what computes it now)."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            waves = Waves(module, line, **options)
            module.forward = waves
            found.append((name, waves))
    return found
