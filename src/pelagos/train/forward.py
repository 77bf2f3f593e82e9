"""The forward as training runs it: the model's own layers, their hyper-connections joined from site to site.

On a CPU it gives the bits of `Transformer.run`; a test holds it there. `compile` compiles what lies between two
hyper-connections; `recompute` drops the norms' outputs after use and makes them again for the backward.
Source: technical report 5.1, 5.4.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from pelagos.kernels import mhc, training_attention
from pelagos.kernels.ref.compress import index_scores
from pelagos.model import Transformer
from pelagos.model.attention import Attention, Step
from pelagos.model.cache import Cache, LayerCache
from pelagos.model.transformer import Block, MTPBlock

Notes = dict[str, Tensor]
Part = Callable[..., Tensor]


class Forward:
    """One model's training forward; the compiled parts live as long as this does. Kernels stay outside of them."""

    def __init__(self, model: Transformer, *, compile: bool = False, recompute: bool = False) -> None:
        self.model = model
        self._marks = Marks() if recompute else None
        op = torch.compiler.disable(training_attention.attend) if compile else training_attention.attend
        attend = partial(_attend, op)
        blocks = [*model.blocks, *(block for block in model.mtp if isinstance(block, MTPBlock))]
        self._parts = [
            (self._part(b, attend, b.attn_norm, compile), self._part(b, _mix, b.ffn_norm, compile)) for b in blocks
        ]

    def _part(self, block: Block, inner: Part, norm: nn.Module, compiled: bool) -> Part:
        part = partial(inner, block, self._marks.keep(norm) if self._marks else norm)
        return torch.compile(part, dynamic=False) if compiled else part

    def run(self, step: Step, cache: Cache, notes: list[Notes]) -> Tensor:
        """Return the backbone's streams (B, S, n, D); `notes` receives one dict a layer. Compare `Transformer.run`."""
        model, pending = self.model, None
        self._bounds = sample_bounds(step)
        embedded = model.embed(step.ids).to(model.carrier)
        streams = embedded.unsqueeze(2).repeat(1, 1, model.config.hc_mult, 1)
        for index, block in enumerate(model.blocks):
            notes.append({})
            streams, pending = self._layer(index, block, pending, streams, step, cache.layer(index), notes[-1])
        assert pending is not None
        return mhc.leave(pending, streams)

    def draft(self, streams: Tensor, next_ids: Tensor, step: Step, cache: Cache, notes: Notes) -> Tensor:
        """Return the MTP block's normed vectors (B, S, D). Compare `Transformer.draft`."""
        model, index = self.model, len(self.model.layers)
        block = model.mtp[0]
        assert isinstance(block, MTPBlock)
        entered = block.enter(model.embed(next_ids).to(model.carrier), streams)
        inner = Step(model.config, next_ids, step.start, step.positions, step.segments)
        out, pending = self._layer(index, block, None, entered, inner, cache.layer(index), notes)
        return block.collapse(mhc.leave(pending, out), model.config)

    def _layer(
        self, index: int, block: Block, pending: mhc.Pending | None, streams: Tensor, step: Step, cache: LayerCache,
        notes: Notes,
    ) -> tuple[Tensor, mhc.Pending]:  # fmt: skip
        config, (attend, mix) = block.config, self._parts[index]
        options = {"iters": config.hc_sinkhorn_iters, "eps": config.hc_eps, "norm_eps": config.rms_norm_eps}
        for site in ("attn", "ffn"):
            weights = [getattr(block, f"hc_{site}_{part}") for part in ("fn", "base", "scale")]
            streams, x, post, comb = mhc.site(pending, streams, *weights, ordered=block.simulate, **options)
            with self._marks or nullcontext():
                y = attend(x, step, cache, notes, self._bounds) if site == "attn" else mix(x, step.ids, notes)
            pending = (y, post, comb)
        return streams, pending


def _attend(
    op: Callable[..., Any], block: Block, norm: Callable[[Tensor], Tensor], x: Tensor, step: Step, cache: LayerCache,
    notes: Notes, bounds: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    if x.is_cuda:
        return attention(block.attn, norm(x), step, cache, notes, bounds, op)
    return block.attn(norm(x), step, cache, notes)


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
    """Attend as `Attention.forward` with notes does, by `kernels.training_attention`: nothing queries x entries large.

    But for dense CSA, whose indexer learns from all entries; sparse CSA notes scores and weights of the picks alone.
    """
    latent, q, kv = attn.inputs(x, step)
    rows, entries, picks = attn._store(kv), None, None
    if attn.compressor is not None:
        entries = cache.entries("main", attn._store(attn.compressor(x, step, cache, "main")))
    keys = attn.indexer.keys(x, step, cache) if attn.indexer is not None else None
    if attn.indexer is not None and keys is not None and keys.shape[1] > attn.indexer.topk and not step.dense:
        with torch.no_grad():
            picks = attn.indexer.picks(x, latent, keys, step)
    options = {"window": attn.window_size, "ratio": attn.ratio}
    chosen = None if picks is None else picks.int()
    out, weights = op(q, rows, entries, attn.attn_sink, chosen, *bounds, **options)
    if attn.indexer is not None and keys is not None and weights is not None:
        notes["entry_weights"] = weights.unsqueeze(2)
        if picks is None:
            notes["index_scores"] = attn.indexer.scores(x, latent, keys, step)
        else:
            queries, gates = attn.indexer.queries(x, latent, step)
            sequence = torch.arange(len(keys), device=keys.device)[:, None, None]
            own = keys[sequence, picks.clamp_min(0)].flatten(0, 1)  # (B*S, K, D): a sorted sum in the backward
            flat = (queries.flatten(0, 1).unsqueeze(1), own, gates.flatten(0, 1).unsqueeze(1))
            notes["index_scores"] = index_scores(*flat).view(picks.shape)
            notes["picked"] = picks >= 0
    return attn.output(out, step)


def _mix(block: Block, norm: Callable[[Tensor], Tensor], x: Tensor, ids: Tensor, notes: Notes) -> Tensor:
    return block.ffn(norm(x), ids, notes)


class Marks(saved_tensors_hooks):
    """Tensors marked as cheap: inside this context autograd keeps how to make them, not what they hold.

    `keep(function)` marks the results of a function of one tensor, whose inside keeps nothing either. What backward
    wants of a marked tensor is made again from the function's input, once for all.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        self._made: dict[int, _Made] = {}

    def keep(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return `function` with its result marked; it must be pure, cheap, and give a tensor of its own."""

        def marked(x: Tensor) -> Tensor:
            out = checkpoint(function, x, use_reentrant=False)
            assert isinstance(out, Tensor)
            self._made[out.untyped_storage().data_ptr()] = _Made(function, x.detach(), out.detach())
            return out

        return marked

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for made in self._made.values():
            made.out = None  # from here on only those who packed it can ask, and they make it again
        self._made.clear()

    def _pack(self, tensor: Tensor) -> Tensor | tuple[Any, ...]:
        made = self._made.get(tensor.untyped_storage().data_ptr())
        return tensor if made is None else (made, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _unpack(self, packed: Tensor | tuple[Any, ...]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        made, *view = packed
        return made.again().as_strided(*view)


class _Made:
    """One marked result: how to make it, and what it is while somebody may still need it."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, out: Tensor) -> None:
        self.function, self.x = function, x
        self.out: Tensor | None = out

    def again(self) -> Tensor:
        if self.out is None:
            with torch.no_grad():
                self.out = self.function(self.x)
        return self.out
