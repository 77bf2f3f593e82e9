"""The optimizer over several ranks: each matrix, with its summed gradient, momentum and moments, has one owner.

Dense matrices are dealt by a knapsack over a capped group, experts evenly: all down, then up, then gate. No matrix is
cut, so Newton-Schulz asks nobody. Source: technical report 3.4.1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pelagos.model import Transformer
from pelagos.train.optim import OptimConfig, decays, is_muon, logical_matrices, orthogonalise
from pelagos.train.ranks import Line, Ranks, stochastic_bf16
from pelagos.train.recipe import TrainConfig
from pelagos.train.waves import Waves, divide_experts

PART_ELEMENTS = 1 << 22  # AdamW's tensors are dealt in parts of this size, the same in every world
EXPERTS = ".ffn.experts."
ORDER = ("w2", "w3", "w1")  # of the experts' matrices: down, up, gate


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What has one owner: a matrix, or a part of a tensor that AdamW updates. `key` is the same in every world."""

    key: str
    name: str  # of its parameter
    path: tuple[int, int] | slice  # logical matrix and place in its stack, or flat elements
    value: Tensor  # a view of the parameter
    muon: bool
    decayed: bool

    def of(self, tensor: Tensor, model: Transformer) -> Tensor:
        """Return this piece of a tensor that is like its parameter."""
        if isinstance(self.path, slice):
            return tensor.flatten()[self.path]
        index, place = self.path
        return _stack(logical_matrices(self.name, tensor, model)[index])[place]


def _stack(matrices: Tensor) -> Tensor:
    return matrices.reshape(-1, *matrices.shape[-2:])


def pieces_of(model: Transformer, config: OptimConfig, first_expert: int = 0) -> tuple[list[Piece], list[Piece]]:
    """Cut trained parameters into (dense pieces, expert pieces), the latter ordered all down, up, gate."""
    dense: list[Piece] = []
    experts: dict[str, list[Piece]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        data, matrix = parameter.detach(), is_muon(name, parameter)
        muon, decayed = config.muon and matrix, matrix or decays(name, parameter)
        if EXPERTS in name:
            for index, stack in enumerate(logical_matrices(name, data, model)):
                leaf = ("w1", "w3")[index] if name.endswith("w13") else "w2"
                for place, value in enumerate(stack):
                    key = f"{name.rpartition('.')[0]}.{first_expert + place}.{leaf}"
                    experts[leaf].append(Piece(key, name, (index, place), value, muon, decayed))
        elif muon:
            for index, found in enumerate(logical_matrices(name, data, model)):
                for place, value in enumerate(_stack(found)):
                    dense.append(Piece(f"{name}.{index}.{place}", name, (index, place), value, muon, decayed))
        else:
            for begin in range(0, data.numel(), PART_ELEMENTS):
                part = slice(begin, begin + PART_ELEMENTS)
                dense.append(Piece(f"{name}.{begin}", name, part, data.flatten()[part], muon, decayed))
    return dense, [piece for leaf in ORDER for piece in experts[leaf]]


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
        sizes = [p.value.numel() for p in self.own]
        parts = self.total[: sum(sizes)].split(sizes)
        self.sums = [part.view(p.value.shape) for p, part in zip(self.own, parts, strict=True)]
        self.counted = line.rank < owners.size  # whether the norm counts this rank's pieces

    def add(
        self, sources: Sequence[Mapping[str, Tensor]], model: Transformer, rounding: torch.Generator | None
    ) -> None:
        """Add gradients by parameter name to the owners' sums: those of each rank in turn, of each its sources in turn.

        `rounding` sends them in BF16, rounded stochastically; they are added in float32 all the same.
        """
        sent = self.total.new_zeros((len(self.buckets), len(sources), self.width))
        for owner, bucket in enumerate(self.buckets):
            for number, gradients in enumerate(sources):
                parts = [p.of(gradients[p.name], model).reshape(-1) if p.name in gradients
                         else self.total.new_zeros(p.value.numel()) for p in bucket]  # fmt: skip
                if parts:
                    torch.cat(parts, out=sent[owner, number, : sum(map(len, parts))])
        if self.line.size > 1:
            sent = stochastic_bf16(sent, rounding) if rounding else sent
            sent = self.line.swap(sent[[rank % len(self.buckets) for rank in range(self.line.size)]])
        for part in sent.flatten(0, 1):
            self.total += part

    def publish(self) -> None:
        """Bring the owners' new values to every rank."""
        if self.owners.size == 1:
            return
        mine = self.total.new_zeros(self.width)
        if self.own:
            flat = torch.cat([p.value.reshape(-1) for p in self.own])
            mine[: len(flat)] = flat
        for owner, values in enumerate(self.owners.gather(mine)):
            if owner != self.owners.rank:
                sizes = [p.value.numel() for p in self.buckets[owner]]
                for piece, part in zip(self.buckets[owner], values[: sum(sizes)].split(sizes), strict=True):
                    piece.value.copy_(part.view(piece.value.shape))


class Owners:
    """Muon and AdamW over the ranks of a run; stands for `Optimizer`. What it returns of a state is this rank's own."""

    def __init__(self, model: Transformer, config: OptimConfig, ranks: Ranks, run: TrainConfig) -> None:
        """Divide the experts of `model` over ranks and deal out every matrix."""
        self.config, self._model, self._ranks, self._seed = config, model, ranks, run.seed
        self._ordered = run.grad_sync == "fp32_ordered"
        options = {"waves": run.waves, "overlap": run.overlap, "ordered": self._ordered}
        self._sites: list[tuple[str, Waves]] = divide_experts(model, ranks.ep, **options) if run.ep > 1 else []
        first = ranks.ep.rank * (model.config.n_routed_experts // run.ep)
        dense, experts = pieces_of(model, config, first)
        even = -(-len(experts) // ranks.replicas.size)
        self._shares = [
            Share(ranks.data, ranks.owners, dense, knapsack([p.value.numel() for p in dense], ranks.owners.size)),
            Share(ranks.replicas, ranks.replicas, experts, [place // max(1, even) for place in range(len(experts))]),
        ]
        self._live: set[str] = set()
        self._steps = 0
        self.own = {p.key: (p, total) for share in self._shares for p, total in zip(share.own, share.sums, strict=True)}
        self._buffers = {key: torch.zeros_like(p.value) for key, (p, _) in self.own.items() if p.muon}
        adam = [(p.value, p.decayed) for p, _ in self.own.values() if not p.muon]
        groups = [{"params": [v for v, d in adam if d is decayed], "weight_decay": config.weight_decay * decayed}
                  for decayed in (True, False)]  # fmt: skip
        self._adam = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps)

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
        self._shares[0].add([dense], self._model, None)
        self._shares[1].add(sources, self._model, generator)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale the summed gradients to a norm of at most `max_norm` over all ranks; return what it was."""
        if not self._ordered:
            self._exchange()
        squares = torch.zeros((), dtype=torch.float64, device=self._shares[0].total.device)
        for share in self._shares:
            for total in share.sums if share.counted else []:
                squares += torch.linalg.vector_norm(total, dtype=torch.float64).square()
        norm = self._ranks.world.sum(squares).sqrt().float()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for share in self._shares:
            share.total.mul_(scale)
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply one update at learning rate `lr` from the summed gradients; parameters without one are left."""
        config = self.config
        live = {key: pair for key, pair in self.own.items() if pair[0].name in self._live}
        for piece, total in self.own.values():
            if not piece.muon:
                piece.value.grad = total if piece.key in live else None
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for key, (piece, total) in live.items():
            if piece.muon:
                buffer = self._buffers[key]
                buffer.mul_(config.momentum).add_(total)
                piece.value.mul_(1 - lr * config.weight_decay)
                shapes[piece.value.shape].append((piece.value, total.add(buffer, alpha=config.momentum)))
        for shape, members in shapes.items():
            updates = torch.stack([update for _, update in members])
            for (value, _), part in zip(members, orthogonalise(updates, config), strict=True):
                value.add_(part, alpha=-lr * config.update_rms * max(shape) ** 0.5)
        for share in self._shares:
            share.publish()
            share.total.zero_()
        self._live.clear()
        self._steps += 1

    def tensors(self) -> dict[str, Tensor]:
        """Return what this rank holds of momentum and moments by names that are the same in every world."""
        found = {f"muon/{key}": buffer for key, buffer in self._buffers.items()}
        for key, (piece, _) in self.own.items():
            if not piece.muon:
                state = self._adam.state[piece.value]
                if not state:  # as torch.optim begins it
                    zero = torch.zeros_like(piece.value)
                    state |= {"step": torch.zeros(()), "exp_avg": zero, "exp_avg_sq": zero.clone()}
                found |= {f"{leaf}/{key}": state[leaf] for leaf in ("step", "exp_avg", "exp_avg_sq")}
        return found

    def whole(self, name: str, parameter: Tensor) -> Tensor:
        """Return a parameter with the experts of all ranks; every rank calls it for the same names in turn."""
        return self._ranks.ep.gather(parameter.detach()).flatten(0, 1) if EXPERTS in name else parameter.detach()
