"""What training minimises: next token, MTP, sequence balance, and the indexer's own divergence.

Source: technical report 2.1, 4.2.2; V3 for the balance rules; V3.2 for the indexer's loss over compressed entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pelagos.model import FullSequence, Transformer
from pelagos.model.attention import CSA_RATIO, Step
from pelagos.model.experts import Router
from pelagos.train.data import IGNORE
from pelagos.train.forward import Forward


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

    `recall` holds one number a CSA layer while attention is dense: `indexer_recall`.
    """

    total: Tensor
    next_token: Tensor
    mtp: Tensor
    balance: Tensor
    indexer: Tensor
    load: Tensor
    recall: list[Tensor]


class _ChunkedLoss(torch.autograd.Function):
    """Sum of cross-entropies; logits exist for one chunk of the vocabulary at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int):
        top = hidden.new_full(hidden.shape[:1], -torch.inf, dtype=torch.float32)
        total, picked = torch.zeros_like(top), torch.zeros_like(top)
        for begin in range(0, len(head), chunk):
            logits = functional.linear(hidden, head[begin : begin + chunk].to(hidden.dtype)).float()
            largest = torch.maximum(top, logits.amax(-1))
            total = total * (top - largest).exp() + (logits - largest.unsqueeze(-1)).exp().sum(-1)
            top, place = largest, targets - begin
            inside = (place >= 0) & (place < logits.shape[1])
            own = logits.gather(1, place.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
            picked = torch.where(inside, own, picked)
        each = top + total.log()
        ctx.save_for_backward(hidden, head, targets, each)
        ctx.chunk = chunk
        return (each - picked).masked_fill(targets == IGNORE, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, head, targets, each = ctx.saved_tensors
        weight = (grad * (targets != IGNORE)).unsqueeze(1)
        to_hidden, to_head = torch.zeros_like(hidden, dtype=torch.float32), torch.zeros_like(head)
        for begin in range(0, len(head), ctx.chunk):
            part = head[begin : begin + ctx.chunk].to(hidden.dtype)
            chances = (functional.linear(hidden, part).float() - each.unsqueeze(1)).exp()
            place = torch.arange(begin, begin + len(part), device=targets.device)
            change = ((chances - (targets.unsqueeze(1) == place).float()) * weight).to(hidden.dtype)
            to_hidden += change @ part
            to_head[begin : begin + ctx.chunk] = change.T @ hidden
        return to_hidden.to(hidden.dtype), to_head, None, None


def chunked_token_loss(hidden: Tensor, head: Tensor, targets: Tensor, *, chunk: int = 16384) -> Tensor:
    """Return `token_loss` with logits for `chunk` words of the vocabulary at a time: (T, chunk) instead of (T, V)."""
    count = (targets != IGNORE).sum().clamp_min(1)
    return _ChunkedLoss.apply(hidden, head, targets, chunk) / count


def token_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of normed vectors (T, D) under head (V, D) where targets (T,) are not IGNORE."""
    logits = functional.linear(hidden, head.to(hidden.dtype)).float()
    count = (targets != IGNORE).sum().clamp_min(1)
    return functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / count


def sequence_balance(scores: Tensor, chosen: Tensor) -> Tensor:
    """Return sum_e f_e P_e averaged over sequences: scores (B, S, E), chosen (B, S, K). It is 1 when balanced."""
    experts, picks = scores.shape[-1], chosen.shape[-1]
    share = scores / scores.sum(-1, keepdim=True)
    counts = functional.one_hot(chosen, experts).sum((1, 2)).float()  # (B, E)
    fraction = counts * experts / (chosen.shape[1] * picks)
    return (fraction * share.mean(1)).sum(-1).mean()


def indexer_divergence(scores: Tensor, weights: Tensor, visible: Tensor) -> Tensor:
    """KL from the main attention over compressed entries to the indexer, averaged over queries that see any.

    scores (B, S, M), weights (B, S, H, M), visible broadcastable (B, S, M) bool. The target sums the heads and is
    normalised over entries; it is detached.
    """
    target = weights.detach().sum(2)
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-20)
    seen = visible.expand(scores.shape)
    log_q = scores.masked_fill(~seen, -1e30).log_softmax(-1)
    divergence = (target * (target.clamp_min(1e-20).log() - log_q)).masked_fill(~seen, 0).sum(-1)
    any_seen = seen.any(-1)
    return (divergence * any_seen).sum() / any_seen.sum().clamp_min(1)


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
    model: Transformer,
    ids: Tensor,
    positions: Tensor,
    segments: Tensor,
    targets: Tensor,
    weights: LossWeights,
    *,
    dense: bool,
    cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = token_loss,
    forward: Forward | None = None,
    notes: list[dict[str, Tensor]] | None = None,
) -> Losses:
    """Run one packed batch, all (B, S), and return its loss terms.

    `dense` attends every visible entry; `cross_entropy` is `token_loss`, a compiled form of it, or the chunked one;
    `forward` is this model's, kept where its parts are compiled; `notes` receives what each layer noted.
    """
    forward = forward or Forward(model)
    step = prepare_step(model, ids, positions, segments, dense=dense)
    cache = FullSequence(model.config.sliding_window)
    notes = [] if notes is None else notes
    streams = forward.run(step, cache, notes)
    hidden = model.collapse(streams, model.config)
    main = cross_entropy(hidden.flatten(0, 1), model.head.weight, targets.flatten())
    zero = main.new_zeros(())
    draft = zero
    if len(model.mtp):
        next_ids, after = next_of(ids, targets, segments)
        draft_notes: dict[str, Tensor] = {}
        drafted = forward.draft(streams, next_ids, step, cache, draft_notes)
        notes.append(draft_notes)
        draft = cross_entropy(drafted.flatten(0, 1), model.head.weight, after.flatten())
    balance, indexer, load, recall = zero, zero, [], []
    for note in notes:
        scores, chosen = (note[k].unflatten(0, ids.shape) for k in ("router_scores", "chosen"))
        balance = balance + sequence_balance(scores, chosen)
        load.append(functional.one_hot(chosen.flatten(), scores.shape[-1]).sum(0))
        if "index_scores" in note:
            visible = step.visible(CSA_RATIO, note["index_scores"].shape[-1])
            indexer = indexer + indexer_divergence(note["index_scores"], note["entry_weights"], visible)
            if dense and visible.shape[-1] > model.config.index_topk:
                found = (note["index_scores"], note["entry_weights"], visible)
                recall.append(indexer_recall(*found, model.config.index_topk))
    terms = ((weights.main, main), (weights.mtp, draft), (weights.balance, balance), (weights.indexer, indexer))
    total = sum((weight * term for weight, term in terms if weight), zero)
    return Losses(total, main.detach(), draft.detach(), balance.detach(), indexer.detach(), torch.stack(load), recall)


def prepare_step(model: Transformer, ids: Tensor, positions: Tensor, segments: Tensor, *, dense: bool) -> Step:
    """Describe a packed batch and compute what its layers share once, outside any compiled region."""
    step = model.step(ids, positions=positions, segments=segments)
    step.dense = dense
    step.window_mask()
    for ratio in {r for r in model.config.layer_ratios if r}:
        step.table(True)
        step.visible(ratio, ids.shape[1] // ratio)
        step.entry_table(ratio, 0, ids.shape[1] // ratio)
    step.table(False)
    return step


@torch.no_grad()
def update_balance_bias(model: Transformer, load: Tensor, speed: float) -> None:
    """Nudge each learned router's bias by `speed` towards the mean load: load (layers, E) counts of this step."""
    for layer, counts in zip([*model.layers, *model.mtp], load.float(), strict=True):
        gate = layer.get_submodule("ffn.gate")
        assert isinstance(gate, Router)
        if gate.bias is not None:
            gate.bias += speed * torch.sign(counts.mean() - counts)
