"""The optimizer over several ranks: each matrix, with its summed gradient, momentum and moments, has one owner.

Dense matrices are dealt by a knapsack over a capped group, experts evenly: all down, then up, then gate. No matrix is
cut, so Newton-Schulz asks nobody. Source: technical report 3.4.1.
"""
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pelagos.model import Transformer
from pelagos.train.optim import EXPERTS, OptimConfig, Optimizer, Piece, cut, trained
from pelagos.train.ranks import Line, Ranks, stochastic_bf16
from pelagos.train.recipe import TrainConfig
from pelagos.train.waves import Waves

ORDER = ("w2", "w3", "w1")  # of the experts' matrices: down, up, gate


def knapsack(sizes: Sequence[int], owners: int) -> list[int]:
    """Deal pieces to owners, the largest first, each to whom holds least; return the owner of each."""
    held, found = [0] * owners, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[place] = min(range(owners), key=lambda owner: (held[owner], owner))
        held[found[place]] += sizes[place]
    return found


class Share:
    """Pieces dealt over `line`: gradients go to the owners, new values come back to all `owners`.

    Ranks of `line` beyond the owners own the same again. `own` are this rank's pieces, `total` their summed gradients.
    """

    def __init__(self, line: Line, owners: Line, pieces: Sequence[Piece], dealt: Sequence[int]) -> None:
        self.line, self.owners = line, owners
        self.buckets: list[list[Piece]] = [[] for _ in range(owners.size)]
        for piece, owner in zip(pieces, dealt, strict=True):
            self.buckets[owner].append(piece)
        self.width = max(sum(p.value.numel() for p in bucket) for bucket in self.buckets)
        self.own = self.buckets[owners.rank]
        self.total = torch.zeros(self.width, device=pieces[0].value.device)
        self.sums = _views(self.total, self.own)
        self.counted = line.rank < owners.size  # whether the norm counts this rank's pieces

    def add(self, sources: Sequence[Mapping[str, Tensor]], rounding: torch.Generator | None = None) -> None:
        """Add gradients by piece to the owners' sums: those of each rank in turn, of each its sources in turn.

        `rounding` sends them in BF16, rounded stochastically; they are added in float32 all the same.
        """
        sent = self.total.new_zeros((len(self.buckets), len(sources), self.width))
        _copy(
            (place, gradients[piece.key])
            for owner, bucket in enumerate(self.buckets)
            for number, gradients in enumerate(sources)
            for place, piece in zip(_views(sent[owner, number], bucket), bucket, strict=True)
            if piece.key in gradients
        )
        if self.line.size > 1:
            sent = stochastic_bf16(sent, rounding) if rounding else sent
            if len(self.buckets) < self.line.size:
                sent = sent[[rank % len(self.buckets) for rank in range(self.line.size)]]
            sent = self.line.swap(sent)
        for part in sent.flatten(0, 1):
            self.total += part

    def publish(self) -> None:
        """Bring the owners' new values to every rank."""
        if self.owners.size == 1:
            return
        mine = torch.zeros_like(self.total)
        _copy(zip(_views(mine, self.own), (piece.value for piece in self.own), strict=True))
        for bucket, values in zip(self.buckets, self.owners.gather(mine), strict=True):
            _copy(zip((piece.value for piece in bucket), _views(values, bucket), strict=True))


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy into the first of each pair what the second holds: thousands of experts' matrices in a few launches."""
    if found := list(pairs):
        torch._foreach_copy_([into for into, _ in found], [value for _, value in found])


def _views(flat: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """Return where pieces lie one after another in a tensor (N,)."""
    sizes = [piece.value.numel() for piece in pieces]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view(piece.value.shape) for piece, part in zip(pieces, parts, strict=True)]


class Owners(Optimizer):
    """Muon and AdamW over the ranks of a run; what it returns of a state is this rank's own."""

    def __init__(self, model: Transformer, config: OptimConfig, ranks: Ranks, run: TrainConfig) -> None:
        """Deal out every matrix."""
        self.config, self._model, self._ranks, self._seed = config, model, ranks, run.seed
        self._ordered = run.grad_sync == "fp32_ordered"
        self._sites = [(n, m.forward) for n, m in model.named_modules() if isinstance(m.forward, Waves)]
        self._whole = {one.name: one for one in trained(model, config)}
        cuts = [(one, self._cut({one.name: one.value.detach()})) for one in self._whole.values()]
        pieces = [replace(one, key=key, value=value) for one, parts in cuts for key, value in parts.items()]
        dense = [piece for piece in pieces if EXPERTS not in piece.name]
        experts = [p for leaf in ORDER for p in pieces if EXPERTS in p.name and p.key.endswith(leaf)]
        even = -(-len(experts) // ranks.replicas.size)
        self._shares = [
            Share(ranks.data, ranks.owners, dense, knapsack([p.value.numel() for p in dense], ranks.owners.size)),
            Share(ranks.replicas, ranks.replicas, experts, [place // max(1, even) for place in range(len(experts))]),
        ]
        self._live: set[str] = set()
        self._steps = 0
        self._hold(piece for share in self._shares for piece in share.own)

    def collect(self) -> None:
        """After each micro-batch of this rank: with ordered sums take its gradients to their owners."""
        if self._ordered:
            self._exchange()

    def _exchange(self) -> None:
        dense: dict[str, Tensor] = {}
        own: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                (own if EXPERTS in name else dense)[name] = parameter.grad
                parameter.grad = None
        sources = [own]
        if self._sites and self._ordered:
            sources = [
                {f"{name}.{leaf}": g for name, site in self._sites if site.sources
                 for leaf, g in zip(("w13", "w2"), site.sources[rank], strict=True)}
                for rank in range(self._ranks.ep.size)
            ]  # fmt: skip
            for _, site in self._sites:
                site.sources = []
        self._live.update(dense, *sources)
        generator = None
        if not self._ordered:
            generator = torch.Generator(self._shares[0].total.device)
            generator.manual_seed((self._seed * 1_000_003 + self._steps) * 1_000_003 + self._ranks.rank)
        self._shares[0].add([self._cut(dense)])
        self._shares[1].add([self._cut(source) for source in sources], generator)

    def _cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: part for name, t in tensors.items() for k, part in cut(self._whole[name], t, self._model).items()}

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale the summed gradients to a norm of at most `max_norm` over all ranks; return what it was."""
        if not self._ordered:
            self._exchange()
        squares = torch.zeros((), dtype=torch.float64, device=self._shares[0].total.device)
        for share in self._shares:
            if share.counted and share.sums:
                squares += torch.stack(torch._foreach_norm(share.sums, 2, torch.float64)).square().sum()
        norm = self._ranks.world.sum(squares).sqrt().float()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for share in self._shares:
            share.total.mul_(scale)
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply one update at learning rate `lr` from the summed gradients; parameters without one are left."""
        for share in self._shares:
            for piece, total in zip(share.own, share.sums, strict=True):
                piece.value.grad = total if piece.name in self._live else None
        super().step(lr)
        for share in self._shares:
            share.publish()
            share.total.zero_()
        self._live.clear()
        self._steps += 1
