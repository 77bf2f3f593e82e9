"""The report's optimizer: Muon for matrices, AdamW for the embedding, the head, norms and everything that is no matrix.

Source: technical report 2.4, Algorithm 1, 4.2.2.
"""
# torch.optim itself updates lists of tensors by the foreach functions, which torch names with an underscore.
# pyright: reportPrivateImportUsage=false

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pelagos.model import Transformer

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


class Optimizer:
    """Muon and AdamW over one model. `step(lr)` applies one update; `state_dict` resumes it bitwise."""

    def __init__(self, model: Transformer, config: OptimConfig | None = None) -> None:
        self.config = config or OptimConfig()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._groups: dict[tuple[int, ...], list[tuple[str, int]]] = defaultdict(list)
        self._model, self._muon = model, [n for n, p in named.items() if self.config.muon and is_muon(n, p)]
        self._buffers = {n: torch.zeros_like(named[n]) for n in self._muon}
        for name in self._muon:
            for index, view in enumerate(logical_matrices(name, named[name].detach(), model)):
                self._groups[tuple(view.shape[-2:])].append((name, index))
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for name, p in named.items():
            if name not in self._buffers:
                (decayed if decays(name, p) or is_muon(name, p) else plain).append(p)
        adam = [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        fused = next(model.parameters()).is_cuda
        self._adam = torch.optim.AdamW(adam, lr=0.0, betas=self.config.betas, eps=self.config.eps, fused=fused)

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
        self._adam.step()
        named = dict(self._model.named_parameters())
        live = {n: g for n in self._muon if (g := named[n].grad) is not None}
        if not live:
            return
        names = list(live)
        buffers, gradients = [self._buffers[n] for n in names], [live[n] for n in names]
        torch._foreach_mul_(buffers, self.config.momentum)
        torch._foreach_add_(buffers, gradients)
        nesterov = torch._foreach_add(gradients, buffers, alpha=self.config.momentum)
        torch._foreach_mul_([named[n] for n in names], 1 - lr * self.config.weight_decay)
        update = dict(zip(names, nesterov, strict=True))
        for shape, members in self._groups.items():
            present = [(n, i) for n, i in members if n in update]
            if not present:
                continue
            views = [logical_matrices(n, update[n], self._model)[i].reshape(-1, *shape) for n, i in present]
            orthogonal = orthogonalise(torch.cat(views), self.config)
            scale = -lr * self.config.update_rms * max(shape) ** 0.5
            for (name, index), part in zip(present, orthogonal.split([len(v) for v in views]), strict=True):
                target = logical_matrices(name, named[name], self._model)[index]
                target.add_(part.view(target.shape), alpha=scale)

    def state_dict(self) -> dict[str, Any]:
        """Return momentum buffers and AdamW's state."""
        return {"muon": self._buffers, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned for the same model."""
        for name, buffer in self._buffers.items():
            buffer.copy_(state["muon"][name])
        self._adam.load_state_dict(state["adam"])
