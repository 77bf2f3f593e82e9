"""The report's optimizer: Muon for matrices, AdamW for the embedding, the head, norms and everything that is no matrix.

Source: technical report 2.4, Algorithm 1, 4.2.2.
"""
# torch.optim itself updates lists of tensors by the foreach functions, which torch names with an underscore.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pelagos.model import Transformer
from pelagos.model.experts import Experts

Coefficients = tuple[tuple[float, float, float], ...]
FAST, LANDING = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
# Polar Express for singular values from 1e-3 on, arXiv 2505.16932; all but the last step shrunk by 1 % to be safe.
_POLAR: Coefficients = (
    (8.287212018146, -23.5958865190988, 17.300387312531), (4.1070591115422, -2.9478499167379, 0.5448431082927),
    (3.948690853482, -2.908902115963, 0.551819139437), (3.318419657371, -2.488488024315, 0.510048940124),
    (2.300652019955, -1.668903984575, 0.418807311953), (1.891301407787, -1.267995827195, 0.376804089485),
    (1.875001480853, -1.25000164540, 0.375000164547),
)  # fmt: skip
POLAR_EXPRESS = (*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR), (1.875, -1.25, 0.375))
SCHEDULES: dict[str, Coefficients] = {
    "deepseek_v4": (FAST,) * 8 + (LANDING,) * 2, "polar_express": POLAR_EXPRESS, "quintic5": (FAST,) * 5,
}  # fmt: skip


EXPERTS = ".ffn.experts."
PART_ELEMENTS = 1 << 22  # AdamW's tensors are cut in parts of this size, the same in every world


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Constants of both optimizers: the report's values, and the sinks, scales, biases and positions undecayed."""

    momentum: float = 0.95
    newton_schulz: Coefficients = SCHEDULES["deepseek_v4"]
    dtype: torch.dtype = torch.bfloat16  # of Newton-Schulz
    muon: bool = True  # False: AdamW for matrices too, decayed alike
    update_rms: float = 0.18
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-20


def newton_schulz(
    x: Tensor, coefficients: Coefficients = SCHEDULES["deepseek_v4"], *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Orthogonalise each matrix of x (..., N, M), one step a coefficient triple, in `dtype`; keeps the dtype of x.

    Source: technical report Algorithm 1.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(dtype).flatten(0, -3) if x.dim() > 2 else (x.mT if tall else x).to(dtype)[None]
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-20)
    for a, b, c in coefficients:
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = y.mT if tall else y
    return y.reshape(x.shape).to(x.dtype)


def orthogonalise(updates: Tensor, config: OptimConfig) -> Tensor:
    """Return `newton_schulz` of updates (N, R, C); on a CPU a matrix gets the same bits however many there are."""
    alone = len(updates) == 1 and not updates.is_cuda  # a batch of one is multiplied by another routine
    found = newton_schulz(updates.expand(2, -1, -1) if alone else updates, config.newton_schulz, dtype=config.dtype)
    return found[: len(updates)]


def logical_matrices(name: str, parameter: Tensor, model: Transformer) -> list[Tensor]:
    """Cut a parameter into the matrices the report treats as independent: views (R, C) or stacks (E, R, C).

    Experts' gate and up are separate, a grouped projection is one matrix a group, an mHC generator is three.
    """
    leaf = name.rsplit(".", 1)[-1]
    config = model.config
    if leaf == "w13":
        return list(parameter.chunk(2, 1))
    if ".wo_a." in name:
        return [parameter.unflatten(0, (config.o_groups, -1))]
    if leaf.startswith("hc_") and leaf.endswith("_fn") and "head" not in leaf:
        n = config.hc_mult
        return list(parameter.split([n, n, n * n]))
    return [parameter]


def is_muon(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix outside embedding, head and positional biases."""
    leaf = name.rsplit(".", 1)[-1]
    return parameter.dim() >= 2 and leaf != "ape" and not name.startswith(("embed.", "head."))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether AdamW decays a parameter: embedding, head and norm weights, not biases, scales, sinks or positions."""
    return name.startswith(("embed.", "head.")) or name.endswith("norm.weight")


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A whole parameter (`key` is its name), what `cut` makes of it, or several experts of it; `value` is a view."""

    key: str
    name: str
    value: Tensor
    muon: bool
    decayed: bool


def trained(model: Transformer, config: OptimConfig) -> Iterator[Piece]:
    """Yield the parameters that learn, whole."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = is_muon(name, parameter)
            yield Piece(name, name, parameter, config.muon and matrix, matrix or decays(name, parameter))


def cut(one: Piece, tensor: Tensor, model: Transformer) -> dict[str, Tensor]:
    """Cut a tensor that is like a parameter into what may have an owner each: views by keys, the same in every world.

    These are matrices, of which none is cut, and parts of what AdamW updates.
    """
    if EXPERTS in one.name:
        prefix, first = one.name.rpartition(".")[0], first_expert(model, one.name)
        leaves = ("w1", "w3") if one.name.endswith("w13") else ("w2",)
        stacks = zip(leaves, logical_matrices(one.name, tensor, model), strict=True)
        return {f"{prefix}.{first + place}.{leaf}": m for leaf, stack in stacks for place, m in enumerate(stack)}
    if not one.muon:
        return {f"{one.name}.{i * PART_ELEMENTS}": x for i, x in enumerate(tensor.flatten().split(PART_ELEMENTS))}
    stacks = [m.reshape(-1, *m.shape[-2:]) for m in logical_matrices(one.name, tensor, model)]
    return {f"{one.name}.{index}.{place}": m for index, stack in enumerate(stacks) for place, m in enumerate(stack)}


def first_expert(model: Transformer, name: str) -> int:
    """Return the number of the first expert in a parameter of experts."""
    module = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(module, Experts)
    return module.first


class Optimizer:
    """Muon and AdamW over one model. `step(lr)` applies one update; what `tensors` returns resumes it bitwise."""

    def __init__(self, model: Transformer, config: OptimConfig | None = None) -> None:
        self.config, self._model = config or OptimConfig(), model
        self._hold(trained(model, self.config))

    def _hold(self, pieces: Iterable[Piece]) -> None:
        """Keep momentum and moments of these."""
        self.own = {piece.key: piece for piece in pieces}
        self._buffers = {key: torch.zeros_like(piece.value) for key, piece in self.own.items() if piece.muon}
        self._groups: dict[tuple[int, ...], list[tuple[str, int]]] = defaultdict(list)
        for key in self._buffers:
            for index, view in enumerate(self._matrices(key, self.own[key].value.detach())):
                self._groups[tuple(view.shape[-2:])].append((key, index))
        adam = [piece for piece in self.own.values() if not piece.muon]
        groups = [
            {"params": [p.value for p in adam if p.decayed is decayed], "weight_decay": decay}
            for decayed, decay in ((True, self.config.weight_decay), (False, 0.0))
        ]
        fused = next(self._model.parameters()).is_cuda
        self._adam = torch.optim.AdamW(groups, lr=0.0, betas=self.config.betas, eps=self.config.eps, fused=fused)

    def _matrices(self, key: str, tensor: Tensor) -> list[Tensor]:
        piece = self.own[key]
        return logical_matrices(key, tensor, self._model) if key == piece.name else [tensor]

    def collect(self) -> None:
        """Take note of the gradients of one more micro-batch: they are where autograd adds them."""

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients to a norm of at most `max_norm`; return what it was, summed in float64 in every world."""
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        if not gradients:
            return torch.zeros(())
        norm = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum().sqrt().float()
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply one update at learning rate `lr` from the gradients in place; parameters without one are left."""
        for group in self._adam.param_groups:
            group["lr"] = lr
            torch.autograd.graph.increment_version(group["params"])  # which a fused update does not
        self._adam.step()
        live = {key: g for key in self._buffers if (g := self.own[key].value.grad) is not None}
        if not live:
            return
        buffers, gradients = [self._buffers[key] for key in live], list(live.values())
        torch._foreach_mul_(buffers, self.config.momentum)
        torch._foreach_add_(buffers, gradients)
        nesterov = torch._foreach_add(gradients, buffers, alpha=self.config.momentum)
        torch._foreach_mul_([self.own[key].value for key in live], 1 - lr * self.config.weight_decay)
        update = dict(zip(live, nesterov, strict=True))
        for shape, members in self._groups.items():
            present = [(key, index) for key, index in members if key in update]
            if not present:
                continue
            views = [self._matrices(key, update[key])[index].reshape(-1, *shape) for key, index in present]
            orthogonal = orthogonalise(torch.cat(views), self.config)
            scale = -lr * self.config.update_rms * max(shape) ** 0.5
            targets = [self._matrices(key, self.own[key].value)[index] for key, index in present]
            parts = zip(orthogonal.split([len(view) for view in views]), targets, strict=True)
            torch._foreach_add_(targets, [part.view(target.shape) for part, target in parts], alpha=scale)

    def tensors(self) -> dict[str, Tensor]:
        """Return this rank's momentum and moments by names that are the same in every world: to save, or to fill."""
        found: dict[str, Tensor] = {}
        for one in self.own.values():
            for leaf, held in ({"muon": self._buffers[one.key]} if one.muon else self._moments(one.value)).items():
                if held.dim() == 3 and one.key != one.name:  # consecutive experts, of which the key is the first's
                    prefix, number, kind = one.key.rsplit(".", 2)
                    found |= {f"{leaf}/{prefix}.{int(number) + i}.{kind}": each for i, each in enumerate(held)}
                elif one.key != one.name:
                    found[f"{leaf}/{one.key}"] = held
                else:  # of every part the number of steps is the same
                    parts = cut(one, one.value.detach() if leaf == "step" else held, self._model)
                    found |= {f"{leaf}/{key}": held if leaf == "step" else part for key, part in parts.items()}
        return found

    def _moments(self, value: Tensor) -> dict[str, Tensor]:
        state = self._adam.state[value]
        if not state:  # as torch.optim begins it
            zero = torch.zeros_like(value)
            state |= {"step": zero.new_zeros(()), "exp_avg": zero, "exp_avg_sq": zero.clone()}
        return {leaf: state[leaf] for leaf in ("step", "exp_avg", "exp_avg_sq")}
