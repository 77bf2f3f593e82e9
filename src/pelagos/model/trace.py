"""What one token met on its way through the layers: window, compressed entries, experts, mixing of the streams.

Reads the notes (`aux`) that the forward leaves, so what is shown is what was computed. Source: technical report 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pelagos.cost import layer_kind
from pelagos.kernels.ref.compress import index_topk
from pelagos.model.attention import Step
from pelagos.model.cache import ContiguousCache
from pelagos.model.transformer import Transformer

PREFILL_CHUNK = 512  # tokens before the traced one, run at once without notes


@dataclass(frozen=True, slots=True)
class Mixing:
    """A site's mixing matrix: `matrix[j][k]` of stream j goes to stream k; sums near 1 keep the signal's size."""

    matrix: list[list[float]]
    row_sums: list[float]
    column_sums: list[float]
    spectral_norm: float


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """One layer as the token met it."""

    layer: int
    kind: str  # window, csa or hca
    ratio: int
    window: tuple[int, int]  # first and last position the sliding window shows
    visible: int  # compressed entries the token may see
    picks: list[int] | None  # those the indexer chose, ascending; None in layers without an indexer
    scores: list[float] | None  # the indexer's score of each pick
    shares: list[float]  # attention of each pick (without an indexer: of each visible entry), mean over heads
    routing: str  # hash or learned
    experts: list[int]
    expert_weights: list[float]
    attn_mixing: Mixing
    ffn_mixing: Mixing


@dataclass(frozen=True, slots=True)
class Trace:
    """The last token of a text in every layer, and the likeliest tokens after it as (id, probability)."""

    ids: list[int]
    layers: list[LayerTrace]
    following: list[tuple[int, float]]


@torch.inference_mode()
def trace(model: Transformer, ids: Sequence[int], *, following: int = 5) -> Trace:
    """Run token ids (S,), S >= 1, through the model and report the last one; the others go through the cache.

    Raises RequestError for no ids or ids outside the vocabulary.
    """
    batch = torch.tensor([list(ids)], dtype=torch.int64, device=model.embed.weight.device)  # (1, S)
    model._check(batch)
    cache = ContiguousCache(model.config)
    for past in batch[:, :-1].split(PREFILL_CHUNK, dim=1):
        if past.shape[1]:
            model(past, cache, last_only=True)
    step = model.step(batch[:, -1:], start=cache.position)
    aux: list[dict[str, Tensor]] = []
    logits = model.logits(model.collapse(model.run(step, cache, aux), model.config))[0, -1]
    best = logits.softmax(-1).topk(min(following, len(logits)))
    layers = [_layer(model, step, index, notes) for index, notes in enumerate(aux)]
    return Trace(list(ids), layers, list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def _layer(model: Transformer, step: Step, index: int, notes: dict[str, Tensor]) -> LayerTrace:
    config = model.config
    ratio = config.layer_ratios[index]
    visible = torch.empty(0, dtype=torch.int64)
    shares = torch.empty(0)
    if "entry_weights" in notes:
        by_head = notes["entry_weights"][0, -1]  # (H, M)
        visible = step.visible(ratio, by_head.shape[1])[0, -1].nonzero().flatten()
        shares = by_head.mean(0)
    picks, scores = ([], []) if layer_kind(ratio) == "csa" else (None, None)
    if "index_scores" in notes:
        last = notes["index_scores"][:, -1:]
        chosen = index_topk(last, step.visible(ratio, last.shape[2]), config.index_topk)[0, 0]
        chosen = chosen[chosen >= 0]
        picks, scores = chosen.tolist(), last[0, 0, chosen].tolist()
    attended = visible if picks is None else torch.tensor(picks, dtype=torch.int64)
    return LayerTrace(
        layer=index, kind=layer_kind(ratio), ratio=ratio, visible=len(visible), picks=picks, scores=scores,
        window=(max(0, step.start - config.sliding_window + 1), step.start),
        shares=shares[attended.to(shares.device)].tolist(), ffn_mixing=mixing(notes["hc_ffn_comb"][0, -1]),
        routing="hash" if index < config.num_hash_layers else "learned", experts=notes["chosen"][-1].tolist(),
        expert_weights=notes["chosen_weights"][-1].tolist(), attn_mixing=mixing(notes["hc_attn_comb"][0, -1]),
    )  # fmt: skip


def mixing(comb: Tensor) -> Mixing:
    """Describe a mixing matrix (n, n): the sums Sinkhorn brings near 1 and the largest singular value."""
    norm = torch.linalg.matrix_norm(comb.double(), 2)
    return Mixing(comb.tolist(), comb.sum(1).tolist(), comb.sum(0).tolist(), float(norm))
