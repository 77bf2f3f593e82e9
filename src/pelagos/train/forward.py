"""The forward as training runs it: the model's own layers, their hyper-connections joined from site to site.

On a CPU it gives the bits of `Transformer.run`; a test holds it there. Quantised, it gives there those of a server of
the export (`Samples`). `recompute` drops the norms' outputs after use and makes them again for the backward.
Source: technical report 5.1, 5.4.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pelagos.kernels import index_training, mhc, training_attention
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.ragged import Batch, Group, select
from pelagos.kernels.rows import Rows
from pelagos.model import Transformer
from pelagos.model.attention import Attention, Step
from pelagos.model.cache import Cache, LayerCache
from pelagos.model.exactness import ROWS
from pelagos.model.paged import attended
from pelagos.model.transformer import Block, Collapse, MTPBlock

Notes = dict[str, Tensor]


class Forward:
    """One model's training forward."""

    def __init__(self, model: Transformer, *, recompute: bool = False) -> None:
        self.model = model
        self._marks = Marks() if recompute else None

    def run(self, step: Step, cache: Cache, notes: list[Notes]) -> Tensor:
        """Return the backbone's streams (B, S, n, D); `notes` receives one dict a layer. Compare `Transformer.run`."""
        embedded = self.model.embed(step.ids).to(self.model.carrier)
        streams = embedded.unsqueeze(2).repeat(1, 1, self.model.config.hc_mult, 1)
        return self.through(streams, step, cache, notes)

    def through(self, streams: Tensor, step: Step, cache: Cache, notes: list[Notes]) -> Tensor:
        """Return the streams (B, S, n, D) after the layers that this model has."""
        pending, self._bounds = None, sample_bounds(step)
        self._samples = None if streams.is_cuda or self.model.mode == "reference" else Samples(step, self._bounds)
        for index, block in enumerate(self.model.layers):
            if not isinstance(block, Block):
                continue  # another stage's
            notes.append({})
            streams, pending = self._layer(block, pending, streams, step, cache.layer(index), notes[-1])
        assert pending is not None
        return mhc.leave(pending, streams)

    def draft(
        self, streams: Tensor, next_ids: Tensor, step: Step, cache: Cache, notes: Notes, embedded: Tensor | None = None
    ) -> Tensor:
        """Return the MTP block's normed vectors (B, S, D). Compare `Transformer.draft`."""
        model, index = self.model, len(self.model.layers)
        block = model.mtp[0]
        assert isinstance(block, MTPBlock)
        entered = block.enter(model.embed(next_ids).to(model.carrier) if embedded is None else embedded, streams)
        inner = replace(step, ids=next_ids)
        out, pending = self._layer(block, None, entered, inner, cache.layer(index), notes)
        return self.collapse(block, mhc.leave(pending, out))

    def collapse(self, part: Collapse, streams: Tensor) -> Tensor:
        """Return streams (B, S, n, D) collapsed and normed (B, S, D): a site of which only x counts."""
        config = self.model.config
        if not streams.is_cuda or config.hc_mult == 1:
            return part.collapse(streams, config)
        rows = (1 + config.hc_mult) * config.hc_mult
        fn, base = functional.pad(part.hc_head_fn, (0, 0, 0, rows)), functional.pad(part.hc_head_base, (0, rows))
        options = {"iters": 1, "eps": config.hc_eps, "norm_eps": config.rms_norm_eps}
        return part.norm(mhc.site(None, streams, fn, base, functional.pad(part.hc_head_scale, (0, 2)), **options)[1])

    def _layer(
        self, block: Block, pending: mhc.Pending | None, streams: Tensor, step: Step, cache: LayerCache, notes: Notes
    ) -> tuple[Tensor, mhc.Pending]:
        config = block.config
        options = {"iters": config.hc_sinkhorn_iters, "eps": config.hc_eps, "norm_eps": config.rms_norm_eps}
        for site in ("attn", "ffn"):
            weights = [getattr(block, f"hc_{site}_{part}") for part in ("fn", "base", "scale")]
            streams, x, post, comb = mhc.site(pending, streams, *weights, ordered=block.simulate, **options)
            norm = getattr(block, f"{site}_norm")
            with self._marks or nullcontext():
                x = self._marks.keep(norm)(x) if self._marks else norm(x)
                y = self._attend(block.attn, x, step, cache, notes) if site == "attn" else block.ffn(x, step.ids, notes)
            pending = (y, post, comb)
        return streams, pending

    def _attend(self, attn: Attention, x: Tensor, step: Step, cache: LayerCache, notes: Notes) -> Tensor:
        if x.is_cuda:
            return attention(attn, x, step, cache, notes, self._bounds)
        return self._samples.attend(attn, x, step, cache, notes) if self._samples else attn(x, step, cache, notes)


class Samples(Batch):
    """Packed rows, or parts of them, as the engine's batch: every sample, and what pads after it, is a span."""

    def __init__(self, step: Step, bounds: tuple[Tensor, Tensor]) -> None:
        starts, ends = (each.cpu().numpy() for each in bounds)
        row, begin = np.nonzero(starts == np.arange(step.length))
        first = step.positions.expand(step.ids.shape).cpu().numpy()[row, begin]
        lengths, none = ends[row, begin] - begin, np.zeros(1, np.int32)
        spans = [Span(np.zeros(n, np.int64), at, 0, none) for n, at in zip(lengths, first.tolist(), strict=True)]
        super().__init__(spans, CacheLayout(step.config, "released"), step.ids.device, ROWS[-1])
        self._row, self._origin = self._put(row), self._put(step.start + begin - first)
        # Of rows (B, W + S, C) the W before every span, then all that are here.
        places = np.arange(starts.size).reshape(starts.shape) + self.window * (1 + np.arange(len(starts)))[:, None]
        before = places[row, begin][:, None] + np.arange(-self.window, 0)
        self._near = self._put(np.concatenate((before.ravel(), places.ravel())))

    def entry(self, group: Group, index: Tensor, per_page: int) -> tuple[Tensor, Tensor]:
        """Return (span, entry of its sample) of entries `index` (B, N)."""
        return group.spans, index.clamp_min(0)

    def attend(self, attn: Attention, x: Tensor, step: Step, cache: LayerCache, notes: Notes) -> Tensor:
        """Return what `attn` makes of x (B, S, D): values by the engine's tiles and picks, gradients by its own."""
        latent, q, kv = attn.inputs(x, step)
        rows = cache.window(attn._store(kv))
        entries, mask = attn._entries(x, latent, step, cache, notes)
        out, weights = attn._attend(q, rows, step, entries, mask)
        if weights is not None:
            notes["entry_weights"] = weights
        with torch.no_grad():
            found, index_q = (entries, notes.pop("index_keys", None)), None
            main, index = (None if each is None else _Entries(each, self, attn.ratio) for each in found)
            if attn.indexer is not None and not step.dense:
                queries, gates = attn.indexer.queries(x, latent, step)
                index_q = queries.flatten(0, 1)[None], gates.flatten(0, 1)[None]
            near = select(rows.flatten(0, 1), self._near)
            served = attended(attn, q.flatten(0, 1), near, main, index, self, index_q)[: self.total].view(q.shape)
        return attn.output(served + (out - out.detach()), step)  # the difference is zero


class _Entries(Rows):
    """The entries (B, M, C) of packed rows, by span and place in its sample."""

    def __init__(self, entries: Tensor, samples: Samples, ratio: int) -> None:
        self.count, self._flat = 1, entries.flatten(0, 1)
        self._first = samples._row * entries.shape[1] + samples._origin // ratio

    def read(self, unit: Tensor, row: Tensor) -> Tensor:
        return select(self._flat, (self._first[unit] + row).clamp_max(len(self._flat) - 1))


def sample_bounds(step: Step) -> tuple[Tensor, Tensor]:
    """Return where each token's sample starts and ends in its row, both (B, S) int32."""
    ids, segments = step.ids, step.segments
    place = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    if segments is None:
        return torch.zeros_like(place, dtype=torch.int32), torch.full_like(place, ids.shape[1], dtype=torch.int32)
    opens = torch.ones_like(segments, dtype=torch.bool)
    opens[:, 1:] = segments[:, 1:] != segments[:, :-1]
    closes = torch.ones_like(opens)
    closes[:, :-1] = opens[:, 1:]
    starts = place.where(opens, 0).cummax(1).values
    ends = (place + 1).where(closes, ids.shape[1]).flip(1).cummin(1).values.flip(1)
    return starts.int(), ends.int()


def attention(
    attn: Attention, x: Tensor, step: Step, cache: LayerCache, notes: Notes, bounds: tuple[Tensor, Tensor],
    op: Callable[..., Any] = training_attention.attend,
) -> Tensor:  # fmt: skip
    """Attend as `Attention.forward` with notes does, by `kernels.training_attention`."""
    latent, q, kv = attn.inputs(x, step)
    rows, entries, scores, picked = attn._store(kv), None, None, None
    if attn.compressor is not None:
        entries = cache.entries("main", attn._store(attn.compressor(x, step, cache, "main")))
    if attn.indexer is not None:
        keys = attn.indexer.keys(x, step, cache)
        queries, gates = attn.indexer.queries(x, latent, step)
        scores = index_training.index_scores(queries, keys, gates, *bounds, ratio=attn.ratio)
        visible = step.visible(attn.ratio, keys.shape[1])
        if keys.shape[1] > attn.indexer.topk and not step.dense:
            notes["picked"] = picked = index_training.pick(scores, visible, attn.indexer.topk)
    out, weights = op(q, rows, entries, attn.attn_sink, picked, *bounds, window=attn.window_size, ratio=attn.ratio)
    if scores is not None and weights is not None:
        notes["index_scores"], notes["entry_weights"] = scores, weights.unsqueeze(2)
    return attn.output(out, step)


class Marks(saved_tensors_hooks):
    """Tensors marked as cheap: inside this context autograd keeps how to make them, not what they hold.

    `keep(function)` marks the results of a function of one tensor, whose inside keeps nothing either. What backward
    wants of a marked tensor is made again from the function's input, once for all.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        self._made: dict[int, list[Any]] = {}  # function, its input, and its result while somebody may need that

    def keep(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return `function` with its result marked; it must be pure, cheap, and give a tensor of its own."""

        def marked(x: Tensor) -> Tensor:
            out = checkpoint(function, x, use_reentrant=False)
            assert isinstance(out, Tensor)
            self._made[out.untyped_storage().data_ptr()] = [function, x.detach(), out.detach()]
            return out

        return marked

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for made in self._made.values():
            made[2] = None  # from here on only those who packed it can ask, and they make it again
        self._made.clear()

    def _pack(self, tensor: Tensor) -> Tensor | tuple[Any, ...]:
        made = self._made.get(tensor.untyped_storage().data_ptr())
        return tensor if made is None else (made, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _unpack(self, packed: Tensor | tuple[Any, ...]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        made, *view = packed
        function, x, out = made
        if out is None:
            with torch.enable_grad():  # by the kernels of the forward
                made[2] = out = function(x).detach()
        return out.as_strided(*view)
