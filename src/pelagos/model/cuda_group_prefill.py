"""Prompts on several ranks: rows are divided, experts cut by width, a sequence's cache written where it lies.

A rank computes consecutive rows of a call. Pools are memory of all ranks: what a row leaves goes straight into the
owner's, and a rank decodes what its rows attend from there, layer by layer behind the ranks that have earlier rows. For
the experts codes of all rows are brought together, beside the router, and partial results sent back, beside the shared
expert, of which every rank has the whole. A row's bits do not depend on who computes it. Source:
docs/log/0009-placement.md.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pelagos.errors import CapacityError
from pelagos.kernels import prefill_cache, prefill_experts
from pelagos.kernels.layout import Span
from pelagos.kernels.prefill_products import BLOCK, factors, product, swiglu, wide_product
from pelagos.model.cuda_prefill import Prefill, _Layer
from pelagos.model.cuda_weights import Fp8, LayerWeights
from pelagos.parallel import Group

ALIGN = 128  # rows of a rank come in multiples of it, the last one's apart
_KEYS, _ROWS, _PARTS, _CALL = range(4)  # channels


def own_span(which: int, span: Span, ranks: int) -> Span:
    """Return a span as its rank numbers slot and pages; CapacityError where its pages are on another."""
    if (span.pages % ranks != span.slot % ranks).any():
        raise CapacityError(f"span {which}: slot {span.slot} is of rank {span.slot % ranks}, a page of it is not")
    return span._replace(slot=span.slot // ranks, pages=span.pages // ranks)


def rows_of(spans: Sequence[Span], begin: int, end: int) -> list[Span]:
    """Return rows begin to end - 1 of spans behind each other, as spans."""
    found, at = [], 0
    for span in spans:
        count = len(span.tokens)
        low, high = max(begin - at, 0), min(end - at, count)
        if low < high:
            wants = {name: max(0, high - max(low, count - getattr(span, name))) for name in ("logits", "streams")}
            found.append(span._replace(tokens=span.tokens[low:high], start=span.start + low, **wants))
        at += count
    return found


class GroupPrefill(Prefill):
    """`Prefill` on all ranks together, each called with the same spans; `tokens` are the most of a call.

    pages and slots are the pools of all ranks, by rank (`Group.memory`).
    """

    def __init__(
        self, alone: Prefill, pages: Sequence[Tensor], slots: Sequence[Tensor], group: Group, tokens: int
    ) -> None:
        self.weights, self.layout, self._freqs = copy.copy(alone.weights), alone.layout, alone._freqs
        config, self._pools, self._group = self.weights.config, list(zip(pages, slots, strict=True)), group
        d, k, each = config.hidden_size, config.num_experts_per_tok, -(-tokens // (group.size * ALIGN)) * ALIGN
        self._codes = group.memory((tokens, d), torch.uint8)
        self._scales = group.memory((tokens, d // BLOCK), torch.uint8)
        self._chosen = group.memory((tokens, k), torch.int32)
        self._picked = group.memory((tokens, k), torch.float32)
        self._parts = group.memory((group.size, each, d), torch.bfloat16)  # of this rank's rows, by who computed them
        cuda = self.weights.device.type == "cuda"
        self._side = torch.cuda.Stream(self.weights.device) if cuda else None
        self._bounds: list[tuple[int, int]] = []
        self.weights.layers = [self._whole(layer) for layer in alone.weights.layers]
        self._layers = [
            extra._replace(shared13=factors(layer.shared13.scales), shared2=factors(layer.shared2.scales))
            for layer, extra in zip(self.weights.layers, alone._layers, strict=True)
        ]

    @torch.inference_mode()
    def run(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Append the spans' tokens; return logits and streams as `Prefill.run` does, the same on every rank."""
        ranks, device = self._group.size, self.weights.device
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for owner in sorted({span.slot % ranks for span in spans}):
            own = [which for which, span in enumerate(spans) if span.slot % ranks == owner]
            self.pages, self.slots = self._pools[owner]
            logits, streams = self._divided([own_span(which, spans[which], ranks) for which in own])
            for which, *rows in zip(own, logits.split([spans[which].logits for which in own]),
                                    streams.split([spans[which].streams for which in own]), strict=True):  # fmt: skip
                found[which] = rows[0], rows[1]
        logits, streams = (torch.cat([found[which][at] for which in range(len(spans))]).to(device) for at in (0, 1))
        return logits, streams

    def _divided(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Compute spans of one owner; return what they ask for, on the host."""
        group, config, total = self._group, self.weights.config, sum(len(span.tokens) for span in spans)
        share = -(-total // (group.size * ALIGN)) * ALIGN
        self._bounds = [(min(total, r * share), min(total, (r + 1) * share)) for r in range(group.size)]
        group.meet(_CALL)
        own = rows_of(spans, *self._bounds[group.rank])
        found = (torch.empty(0, config.vocab_size),
                 torch.empty(0, config.hc_mult, config.hidden_size, dtype=torch.bfloat16))  # fmt: skip
        if own:
            found = super().run(own)
        else:
            for layer, extra in zip(self.weights.layers, self._layers, strict=True):
                self._experts(layer, extra, None)
        if not any(span.logits or span.streams for span in spans):
            return found[0].cpu()[:0], found[1].cpu()[:0]
        logits, streams = zip(*group.gather([each.cpu() for each in found]), strict=True)
        return torch.cat(logits), torch.cat(streams)

    def _keys(self, *inputs: object) -> prefill_cache.Keys:
        """Write behind the ranks with earlier rows, for what a row attends may be theirs."""
        rank = self._group.rank
        if rank:
            self._group.wait(rank - 1, _KEYS)
        keys = super()._keys(*inputs)
        if rank + 1 < self._group.size and self._bounds[rank + 1][0] < self._bounds[rank + 1][1]:
            self._group.signal(rank + 1, _KEYS)
        return keys

    def _feed(self, state: list[Tensor | None], layer: LayerWeights, extra: _Layer, ids: Tensor) -> None:
        c, rank = self.weights.config, self._group.rank
        rows = slice(*self._bounds[rank])
        normed, codes, scales = self._site(state, layer.ffn_site)
        with self._beside():
            for rank_codes, rank_scales in zip(self._codes, self._scales, strict=True):
                rank_codes[rows].copy_(codes)
                rank_scales[rows].copy_(scales)
        chosen, weights = prefill_experts.choose(
            wide_product(normed, layer.gate), layer.bias, layer.table, ids, c.n_routed_experts, c.num_experts_per_tok,
            c.routed_scaling_factor,
        )  # fmt: skip
        with self._beside():
            for rank_chosen, rank_weights in zip(self._chosen, self._picked, strict=True):
                rank_chosen[rows].copy_(chosen)
                rank_weights[rows].copy_(weights)
            for other in self._others():
                self._group.signal(other, _ROWS)
        self._join()
        del normed
        state[0] = self._experts(layer, extra, (codes, scales))

    def _experts(self, layer: LayerWeights, extra: _Layer, own: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """Compute this rank's part of the experts of all rows, send it; return the sum of this rank's rows."""
        group, total = self._group, self._bounds[-1][1]
        filled = [rank for rank, (begin, end) in enumerate(self._bounds) if begin < end]
        for rank in filled:
            if rank != group.rank:
                group.wait(rank, _ROWS)
        limit = float(self.weights.config.swiglu_limit)
        codes, scales, chosen, weights = (
            each[group.rank][:total] for each in (self._codes, self._scales, self._chosen, self._picked)
        )
        part = prefill_experts.mixture(codes, scales, chosen, weights, *layer.w13, *layer.w2, extra.bases, limit)
        with self._beside():
            for rank in filled:
                begin, end = self._bounds[rank]
                self._parts[rank][group.rank, : end - begin].copy_(part[begin:end])
                if rank != group.rank:
                    group.signal(rank, _PARTS)
        y = None
        if own is not None:
            up = product(*own, layer.shared13.codes, extra.shared13)
            shared = product(*swiglu(up, limit), layer.shared2.codes, extra.shared2)
            for rank in self._others():
                group.wait(rank, _PARTS)
            self._join()
            begin, end = self._bounds[group.rank]
            y, *others = self._parts[group.rank][:, : end - begin].unbind(0)
            for each in [*others, shared]:
                y = y + each
        self._join()
        return y

    def _others(self) -> list[int]:
        return [rank for rank in range(self._group.size) if rank != self._group.rank]

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Copy on a stream of its own, behind what was launched so far; `_join` ends it."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield

    def _join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)

    def _whole(self, layer: LayerWeights) -> LayerWeights:
        """A layer with its shared expert uncut."""
        tall = [[half for at in (0, 1) for half in (part.chunk(2)[at] for part in self._everyones(each))]
                for each in layer.shared13]  # fmt: skip
        wide = [self._everyones(each) for each in layer.shared2]
        return dataclasses.replace(
            layer, shared13=Fp8(*(torch.cat(parts) for parts in tall)),
            shared2=Fp8(*(torch.cat(parts, 1) for parts in wide)),
        )  # fmt: skip

    def _everyones(self, x: Tensor) -> list[Tensor]:
        """What each rank has of x (uint8), by way of the partial results' memory."""
        size = x.numel()
        for parts in self._parts:
            parts[self._group.rank].view(torch.uint8).view(-1)[:size].copy_(x.reshape(-1))
        self._group.meet(_CALL)
        found = [part.view(torch.uint8).view(-1)[:size].clone().view_as(x) for part in self._parts[self._group.rank]]
        self._group.meet(_CALL)
        return found
