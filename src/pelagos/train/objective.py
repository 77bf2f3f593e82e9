"""What training minimises: next token, MTP, sequence balance, and the indexer's own divergence.

Source: technical report 2.1, 4.2.2; V3 for the balance rules; V3.2 for the indexer's loss over compressed entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from pelagos.kernels.index_training import divergence
from pelagos.kernels.ref.compress import index_topk
from pelagos.model import FullSequence, Transformer
from pelagos.model.attention import CSA_RATIO, Step
from pelagos.model.cache import Cache
from pelagos.model.experts import Router
from pelagos.train.data import IGNORE
from pelagos.train.forward import Forward

if TYPE_CHECKING:
    from pelagos.train.context import Context

Across = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """Weights of the terms; one of weight 0 leaves no gradient, not even zeros."""

    main: float = 1.0
    mtp: float = 0.3
    balance: float = 1e-4
    indexer: float = 1.0


@dataclass
class Losses:
    """One batch's terms: `total` to differentiate, the others detached; `load` (layers, E) tokens an expert.

    `recall`, where it was asked for, holds one number a CSA layer while attention is dense: `indexer_recall`.
    """

    total: Tensor
    next_token: Tensor
    mtp: Tensor
    balance: Tensor
    indexer: Tensor
    load: Tensor
    recall: list[Tensor]


def token_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of normed vectors (T, D) under head (V, D) where targets (T,) are not IGNORE."""
    logits = functional.linear(hidden, head.to(hidden.dtype)).float()
    count = (targets != IGNORE).sum().clamp_min(1)
    return functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / count


def _here(x: Tensor) -> Tensor:
    return x


def sequence_balance(
    scores: Tensor, chosen: Tensor, real: Tensor | None = None, across: Across = _here
) -> tuple[Tensor, Tensor]:
    """Return sum_e f_e P_e averaged over sequences, 1 when balanced, and tokens an expert (E,).

    scores (B, S, E), chosen (B, S, K); padding, where `real` (B, S) is False, counts nowhere. Of a part of sequences it
    is that part's term: `across` adds counts over all parts.
    """
    experts, picks = scores.shape[-1], chosen.shape[-1]
    real = torch.ones_like(scores[..., :1]) if real is None else real.unsqueeze(-1).float()  # (B, S, 1)
    tokens = across(real.sum(1)).clamp_min(1)  # (B, 1)
    share = (scores / scores.sum(-1, keepdim=True) * real).sum(1) / tokens
    counts = (functional.one_hot(chosen, experts).sum(2) * real).sum(1)  # (B, E)
    return (across(counts) * experts / (tokens * picks) * share).sum(-1).mean(), counts.sum(0).long()


def indexer_divergence(scores: Tensor, weights: Tensor, visible: Tensor, across: Across = _here) -> Tensor:
    """KL from the main attention over compressed entries to the indexer, averaged over queries that see any.

    scores (B, S, M), weights (B, S, H, M), visible broadcastable (B, S, M) bool: the entries attended, all or picked.
    The target sums the heads and is normalised over entries; it is detached.
    """
    mass = weights.sum(2) if weights.shape[2] > 1 else weights.squeeze(2)
    seen = visible.expand(scores.shape)
    any_seen = seen.any(-1)
    return (divergence(scores, mass, seen) * any_seen).sum() / across(any_seen.sum()).clamp_min(1)


@torch.no_grad()
def indexer_recall(scores: Tensor, weights: Tensor, visible: Tensor, topk: int) -> Tensor:
    """Return what the indexer's picks hold of the weight that the best picks would: 1 is perfect.

    Dense attention's scores (B, S, M) and weights (B, S, H, M); over queries that see more than `topk` entries.
    """
    mass, seen = weights.sum(2), visible.expand(scores.shape)
    picked = mass.gather(-1, scores.masked_fill(~seen, -torch.inf).topk(topk, -1).indices).sum(-1)
    best = mass.masked_fill(~seen, 0).topk(topk, -1).values.sum(-1)
    many = seen.sum(-1) > topk
    return ((picked / best.clamp_min(1e-20)) * many).sum() / many.sum().clamp_min(1)


def next_of(ids: Tensor, targets: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the MTP block's inputs and targets: the next token of each position and the token after that."""
    follows = functional.pad(segments[:, 1:] == segments[:, :-1], (0, 1))
    next_ids = torch.where(follows, functional.pad(ids[:, 1:], (0, 1)), ids)
    after = torch.where(follows, functional.pad(targets[:, 1:], (0, 1), value=IGNORE), IGNORE)
    return next_ids, after


def losses(
    model: Transformer, ids: Tensor, positions: Tensor, segments: Tensor, targets: Tensor, weights: LossWeights, *,
    dense: bool, cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = token_loss,
    forward: Forward | None = None, notes: list[dict[str, Tensor]] | None = None, context: Context | None = None,
) -> Losses:  # fmt: skip
    """Run one packed batch, all (B, S), and return its loss terms.

    `dense` attends every visible entry; `cross_entropy` is `token_loss` or the chunked one; `notes` receives what each
    layer noted and has the indexer's recall measured. With a `context` this is the part of the rows that it cuts:
    `total` and `load` are this part's, the other terms those of whole rows.
    """
    forward = forward or Forward(model)
    batch = prepare(model, ids, positions, segments, targets, dense=dense, context=context)
    measured, notes = notes is not None, [] if notes is None else notes
    streams = forward.run(batch.step, batch.cache, notes)
    zero = streams.new_zeros((), dtype=torch.float32)
    return finish(forward, batch, streams, None, weights, cross_entropy, notes, (zero, zero), measured=measured)


@dataclass
class Prepared:
    """What a forward over a batch, or a part of its rows, needs: all (B, S) but step, cache and `context`."""

    step: Step
    cache: Cache
    targets: Tensor
    next_ids: Tensor
    after: Tensor
    real: Tensor
    context: Context | None


def prepare(
    model: Transformer, ids: Tensor, positions: Tensor, segments: Tensor, targets: Tensor, *, dense: bool,
    context: Context | None = None,
) -> Prepared:  # fmt: skip
    """Describe a packed batch, or the part of it that `context` cuts, and compute what its layers share once."""
    step = (
        context.step(ids, positions, segments) if context else model.step(ids, positions=positions, segments=segments)
    )
    step.dense = dense
    step.window_mask()
    for ratio in {r for r in model.config.layer_ratios if r}:
        step.table(True)
        step.visible(ratio, ids.shape[1] // ratio)
        step.entry_table(ratio, 0, ids.shape[1] // ratio)
    step.table(False)
    cut = context.cut if context else _here
    next_ids, after = map(cut, next_of(ids, targets, segments))
    cache = context or FullSequence(model.config.sliding_window)
    return Prepared(step, cache, cut(targets), next_ids, after, cut(segments) >= 0, context)


def finish(
    forward: Forward, batch: Prepared, streams: Tensor, embedded: Tensor | None, weights: LossWeights,
    cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor], notes: list[dict[str, Tensor]],
    sums: tuple[Tensor, Tensor], *, measured: bool = False,
) -> Losses:  # fmt: skip
    """Return the terms of a batch from the backbone's streams; `embedded` are those of `next_ids`, if made elsewhere.

    `notes` are the layers' here, `sums` the balance and divergence of layers elsewhere.
    """
    model, context = forward.model, batch.context
    hidden = forward.collapse(model, streams)
    main = cross_entropy(hidden.flatten(0, 1), model.head.weight, batch.targets.flatten())
    zero = main.new_zeros(())
    draft = zero
    if len(model.mtp):
        notes.append({})
        drafted = forward.draft(streams, batch.next_ids, batch.step, batch.cache, notes[-1], embedded)
        draft = cross_entropy(drafted.flatten(0, 1), model.head.weight, batch.after.flatten())
    if context:
        main, draft = main * context.share(batch.targets), draft * context.share(batch.after)
    balance, indexer, load, recall = noted(model, batch, notes, sums, measured=measured)
    terms = ((weights.main, main), (weights.mtp, draft), (weights.balance, balance), (weights.indexer, indexer))
    total = sum((weight * term for weight, term in terms if weight), zero)
    across = context.sum if context else _here
    main, draft, balance, indexer = (across(term.detach()) for term in (main, draft, balance, indexer))
    return Losses(total, main, draft, balance, indexer, load, recall)


def noted(
    model: Transformer, batch: Prepared, notes: list[dict[str, Tensor]], sums: tuple[Tensor, Tensor], *,
    measured: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Add what layers noted to `sums`, their balance and divergence; return these, load (layers, E) and recalls."""
    (balance, indexer), load, recall, topk = sums, [], [], model.config.index_topk
    across = batch.context.sum if batch.context else _here
    for note in notes:
        scores, chosen = (note[k].unflatten(0, batch.real.shape) for k in ("router_scores", "chosen"))
        uneven, counts = sequence_balance(scores, chosen, batch.real, across)
        balance = balance + uneven
        load.append(counts)
        if "index_scores" in note:
            found = (note["index_scores"], note["entry_weights"], _attended(note, batch.step, topk, batch.real))
            indexer = indexer + indexer_divergence(*found, across)
            if measured and batch.step.dense and found[0].shape[-1] > topk:
                recall.append(indexer_recall(*found, topk))
    return balance, indexer, torch.stack(load), recall


def _attended(note: dict[str, Tensor], step: Step, topk: int, real: Tensor) -> Tensor:
    """Return which of the scored entries (B, S, M or K) took part in attention: the indexer learns on these."""
    real = real.unsqueeze(-1)
    if "picked" in note:
        return note["picked"] & real
    scores = note["index_scores"].detach()
    visible = step.visible(CSA_RATIO, scores.shape[-1]) & real
    if step.dense or scores.shape[-1] <= topk:
        return visible
    picks = index_topk(scores, visible, topk)
    mask = torch.zeros((*scores.shape[:2], scores.shape[2] + 1), dtype=torch.bool, device=scores.device)
    return mask.scatter(2, picks.where(picks >= 0, scores.shape[2]), True)[..., :-1]


@torch.no_grad()
def update_balance_bias(model: Transformer, load: Tensor, speed: float) -> None:
    """Nudge each learned router's bias by `speed` towards the mean load: load (layers, E) counts of this step."""
    for gate, counts in zip((m for m in model.modules() if isinstance(m, Router)), load.float(), strict=True):
        if gate.bias is not None:
            gate.bias += speed * torch.sign(counts.mean() - counts)
