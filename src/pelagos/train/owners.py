"""The optimizer over several ranks: each matrix, with its summed gradient, momentum and moments, has one owner.

Dense matrices are dealt by a knapsack over a capped group, experts evenly: all down, then up, then gate. No matrix is
cut, so Newton-Schulz asks nobody. Source: technical report 3.4.1.
"""
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pelagos.model import Transformer
from pelagos.model.experts import Experts
from pelagos.train.optim import EXPERTS, OptimConfig, Optimizer, Piece, cut, first_expert, logical_matrices, trained
from pelagos.train.ranks import Line, Ranks, Trip, stochastic_bf16
from pelagos.train.recipe import TrainConfig
from pelagos.train.waves import Waves

# Of the experts' matrices, down, up, gate: in which parameter they lie, and as which of its `logical_matrices`.
ORDER = {"w2": ("w2", 0), "w3": ("w13", 1), "w1": ("w13", 0)}
UNDER_WAY = 2  # layers whose experts' gradients travel while the backward makes the next: more for ranks out of step
Dealt = tuple[Piece, int]  # and its owner
Gradients = Callable[[Piece], Tensor | None]


def knapsack(sizes: Sequence[int], owners: int) -> list[int]:
    """Deal pieces to owners, the largest first, each to whom holds least; return the owner of each."""
    held, found = [0] * owners, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[place] = min(range(owners), key=lambda owner: (held[owner], owner))
        held[found[place]] += sizes[place]
    return found


class Share:
    """Pieces dealt over `line`: gradients go to the owners, new values come back to all `owners`.

    Gradients travel in parts, those pieces of which `part_of` says the same. Ranks of `line` beyond the owners own the
    same again. `own` are this rank's pieces, `total` their summed gradients.
    """

    def __init__(self, line: Line, owners: Line, dealt: Sequence[Dealt], part_of: Callable[[Piece], str]) -> None:
        self.line, self.owners = line, owners
        self.buckets = [[piece for piece, to in dealt if to == owner] for owner in range(owners.size)]
        self.parts = {part: [[p for p in bucket if part_of(p) == part] for bucket in self.buckets]
                      for part in dict.fromkeys(part_of(piece) for piece, _ in dealt)}  # fmt: skip
        width = max(sum(p.value.numel() for p in bucket) for bucket in self.buckets)
        self.own = self.buckets[owners.rank]
        self.total = torch.zeros(width, device=dealt[0][0].value.device)
        self.sums = dict(zip((piece.key for piece in self.own), _views(self.total, self.own), strict=True))
        self.counted = line.rank < owners.size  # whether the norm counts this rank's pieces
        self._going: deque[tuple[Callable[[], Tensor], str, int]] = deque()

    def send(self, part: str, sources: Sequence[Gradients], rounding: torch.Generator | None = None) -> set[str]:
        """Start to bring gradients of a part to the owners' sums; return the names of parameters that have one.

        All ranks send the same parts in the same order. `rounding` sends in BF16, rounded stochastically; sums are
        float32 all the same.
        """
        self.land(min(UNDER_WAY, len(self.parts)) - 1)
        count, buckets = len(sources), [self.parts[part][rank % self.owners.size] for rank in range(self.line.size)]
        sizes = [count * sum(piece.value.numel() for piece in bucket) for bucket in buckets]
        sent = self.total.new_zeros(sum(sizes))
        laid = [(piece, source(piece)) for bucket in buckets for source in sources for piece in bucket]
        views = _views(sent, [piece for piece, _ in laid])
        _copy((view, gradient) for view, (_, gradient) in zip(views, laid, strict=True) if gradient is not None)
        wait = functools.partial(torch.Tensor.float, sent)
        if self.line.size > 1:
            trip = Trip(self.line, sizes, [sizes[self.line.rank]] * self.line.size)
            trip.start(stochastic_bf16(sent, rounding) if rounding else sent)
            wait = trip.wait
        self._going.append((wait, part, count))
        return {piece.name for piece, gradient in laid if gradient is not None}

    def land(self, most: int = 0) -> None:
        """Wait until at most `most` parts are under way; add what came: of each rank in turn its sources in turn."""
        while len(self._going) > most:
            wait, part, count = self._going.popleft()
            own, came = self.parts[part][self.owners.rank], wait().float()
            for each in came.chunk(count * self.line.size) if own else ():
                torch._foreach_add_([self.sums[piece.key] for piece in own], _views(each, own))

    def publish(self) -> None:
        """Bring the owners' new values to every rank."""
        if self.owners.size == 1:
            return
        mine = torch.empty_like(self.total)
        _copy(zip(_views(mine, self.own), (piece.value for piece in self.own), strict=True))
        for bucket, values in zip(self.buckets, self.owners.gather(mine), strict=True):
            if bucket is not self.own:
                _copy(zip((piece.value for piece in bucket), _views(values, bucket), strict=True))


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy into the first of each pair what the second holds, in a few launches."""
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
        self._whole = {one.name: one for one in trained(model, config)}
        parts = self._cut({one.name: one.value.detach() for one in self._whole.values() if EXPERTS not in one.name})
        dense = [replace(self._whole[name], key=key, value=value) for key, (name, value) in parts.items()]
        dealt = list(zip(dense, knapsack([p.value.numel() for p in dense], ranks.owners.size), strict=True))
        layered = list(self._runs(ranks.replicas.size)), lambda piece: piece.name.rpartition(".")[0]
        self._shares = [
            Share(ranks.data, ranks.owners, dealt, lambda _: ""), Share(ranks.replicas, ranks.replicas, *layered)
        ]  # fmt: skip
        self._live, self._steps = set[str](), 0
        self._hold(piece for share in self._shares for piece in share.own)
        self._experts = {n: m for n, m in model.named_modules() if isinstance(m, Experts)}
        self._waiting = list(self._experts)
        mine = weakref.proxy(self)  # what a parameter's hook holds on to, Python's collector does not see
        for module in self._experts.values() if self._ordered else ():
            if isinstance(module.forward, Waves):
                module.forward.done = self._send
            for parameter in module.parameters():
                parameter.register_post_accumulate_grad_hook(lambda _: mine._send())

    def _runs(self, owners: int) -> Iterator[Dealt]:
        """Deal the experts' matrices evenly, in ORDER; an owner's of a layer and kind are one piece (N, R, C)."""
        stacks = [(leaf, one, logical_matrices(one.name, one.value.detach(), self._model)[index])
                  for leaf, (parameter, index) in ORDER.items()
                  for one in self._whole.values() if one.name.endswith(f"{EXPERTS}{parameter}")]  # fmt: skip
        even, place = -(-sum(len(stack) for *_, stack in stacks) // owners), 0
        for leaf, one, stack in stacks:
            prefix, first, begin = one.name.rpartition(".")[0], first_expert(self._model, one.name), 0
            while begin < len(stack):
                owner = (place + begin) // even
                end = min(len(stack), (owner + 1) * even - place) if one.muon else begin + 1
                yield replace(one, key=f"{prefix}.{first + begin}.{leaf}", value=stack[begin:end]), owner
                begin = end
            place += len(stack)

    def collect(self) -> None:
        """After each micro-batch: with ordered sums send its gradients; experts' are under way since the backward."""
        if self._ordered:
            self._exchange()

    def _exchange(self) -> None:
        generator = None
        if not self._ordered:
            generator = torch.Generator(self._shares[0].total.device)
            generator.manual_seed((self._seed * 1_000_003 + self._steps) * 1_000_003 + self._ranks.rank)
        self._send(generator, complete=False)
        self._waiting = list(self._experts)
        dense = self._cut({name: p.grad for name, p in self._model.named_parameters() if p.grad is not None})
        self._live |= self._shares[0].send("", [lambda piece: dense.get(piece.key, ("", None))[1]])
        self._model.zero_grad()

    def _send(self, rounding: torch.Generator | None = None, *, complete: bool = True) -> None:
        """Send experts' gradients, those of the last layer first, as far as they are complete or all that are left."""
        while self._waiting:
            name = self._waiting[-1]
            module = self._experts[name]
            sources: Sequence[tuple[Tensor | None, ...]] = [(module.w13.grad, module.w2.grad)]
            if self._ordered and isinstance(site := module.forward, Waves):
                sources, site.sources = site.sources or [(None, None)] * self._ranks.ep.size, []
            if complete and any(gradient is None for source in sources for gradient in source):
                return
            self._waiting.pop()
            module.w13.grad = module.w2.grad = None
            found = [functools.partial(self._gradient, module.first, *source) for source in sources]
            self._live |= self._shares[1].send(name, found, rounding)

    def _gradient(self, first: int, w13: Tensor | None, w2: Tensor | None, piece: Piece) -> Tensor | None:
        """Return what gradients of a layer's experts say of a piece of theirs."""
        *_, number, leaf = piece.key.split(".")
        whole, begin = w2 if leaf == "w2" else w13, int(number) - first
        if whole is None:
            return None
        return logical_matrices(piece.name, whole, self._model)[ORDER[leaf][1]][begin : begin + len(piece.value)]

    def _cut(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        cuts = ((name, cut(self._whole[name], tensor, self._model)) for name, tensor in tensors.items())
        return {key: (name, part) for name, parts in cuts for key, part in parts.items()}

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale the summed gradients to a norm of at most `max_norm` over all ranks; return what it was."""
        if not self._ordered:
            self._exchange()
        for share in self._shares:
            share.land()
        squares = torch.zeros((), dtype=torch.float64, device=self._shares[0].total.device)
        for share in self._shares:
            if share.counted and share.sums:
                squares += torch.stack(torch._foreach_norm(list(share.sums.values()), 2, torch.float64)).square().sum()
        norm = self._ranks.world.sum(squares).sqrt().float()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for share in self._shares:
            share.total.mul_(scale)
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply one update at learning rate `lr` from the summed gradients; parameters without one are left."""
        for share in self._shares:
            for piece in share.own:
                piece.value.grad = share.sums[piece.key] if piece.name in self._live else None
        super().step(lr)
        for share in self._shares:
            share.publish()
            share.total.zero_()
        self._live.clear()
        self._steps += 1
