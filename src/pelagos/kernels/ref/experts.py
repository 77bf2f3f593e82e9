"""Routing and the clamped SwiGLU experts.

Source: technical report 2.1; inference/model.py Gate, Expert, MoE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pelagos.kernels.ref.gemm import elementwise, linear, ordered_sum, quantized_linear

FEW_ROWS = 32  # up to here an expert's rows are padded to those of the fullest

Quantizer = Callable[[Tensor], Tensor]


def route(scores: Tensor, chosen: Tensor, scaling: float) -> Tensor:
    """Return the weights (T, K) float32 of the chosen experts (T, K): their scores, normalised, times `scaling`."""
    picked = scores.gather(-1, chosen)
    return picked / (ordered_sum(picked, -1).unsqueeze(-1) + 1e-20) * scaling


def swiglu(gate: Tensor, up: Tensor, limit: float, hits: Tensor | None = None) -> Tensor:
    """Return silu(min(gate, limit)) * clamp(up, -limit, limit) in float32; the gate has an upper clamp only.

    `hits` (3,) int64, if given, grows by how often gate, up above and up below met the clamp.
    """
    if hits is not None:
        hits += torch.stack([(gate > limit).sum(), (up > limit).sum(), (up < -limit).sum()])
    return elementwise(functional.silu, gate.float().clamp_max(limit)) * up.float().clamp(-limit, limit)


def grouped_linear(x: Tensor, weight: Tensor, counts: Sequence[int], *, quantized: bool = False) -> Tensor:
    """Multiply consecutive row groups of x (R, I) by their expert's weight (E, O, I); the E counts sum to R.

    `quantized` chooses `gemm.quantized_linear`.
    """
    if not quantized and len(counts) > 1 and len(set(counts)) == 1:
        return torch.bmm(x.view(len(counts), -1, x.shape[1]), weight.to(x.dtype).transpose(1, 2)).flatten(0, 1)
    product, weight = (quantized_linear, weight) if quantized else (functional.linear, weight.to(x.dtype))
    groups = zip(x.split(counts), weight.unbind(0), counts, strict=True)
    return torch.cat([product(group, expert) for group, expert, count in groups if count])


def _places(chosen: np.ndarray, experts: int, multiple: int) -> tuple[np.ndarray, list[int]]:
    """Return where each of chosen (R,) goes when grouped by expert, (R,) int64, and the rows kept for each expert.

    Those are the rows that chose it, or with a `multiple` above 0 as many of it as hold them; then, where they are few
    and it adds less than a third, all get equally many, so that one product does for all.
    """
    order = chosen.argsort(kind="stable")
    counts = room = np.bincount(chosen, minlength=experts)
    if multiple:
        room = -(-counts // multiple) * multiple
        most = room.max()
        if most <= FEW_ROWS and 3 * most * experts <= 4 * room.sum():
            room = np.full_like(room, most)
    begin = (room.cumsum() - room) - (counts.cumsum() - counts)
    place = np.empty_like(order)
    place[order] = begin.repeat(counts) + np.arange(len(chosen))
    return place, room.tolist()


def mixture(
    x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float, quantize: Quantizer | None,
    multiple: int = 0, hits: Tensor | None = None, leave: Quantizer | None = None,
) -> Tensor:  # fmt: skip
    """Return the routed experts' sum (T, D) float32 for x (T, D), chosen (T, K) int64, weights (T, K) float32.

    w13 (E, 2F, D) holds w1 over w3, w2 (E, D, F). `quantize` simulates the activation format before each
    product; the routing weight enters before w2, as released. A `multiple` pads an expert's rows (`_places`). Training
    counts clamp `hits` (see `swiglu`) and passes what leaves a product through `leave`. Of weights (E, S, ...), the
    same S times, number e S + s in `chosen` is expert e of source s: its rows are multiplied, its gradients kept apart.
    """
    w13, w2 = w13.flatten(0, -3), w2.flatten(0, -3)
    tokens, picks = chosen.shape
    flat = chosen.flatten()
    prepared = quantize(x) if quantize else x
    places, rows = _places(flat.cpu().numpy(), w13.shape[0], multiple)
    kept = np.zeros(sum(rows), np.int64)
    kept[places] = np.arange(len(places))
    back, order = (torch.from_numpy(each).to(x.device) for each in (places, kept))
    inputs = (prepared[order // picks], weights.flatten()[order], w13, w2, rows, limit, quantize, hits, leave)
    return ordered_sum(expert_rows(*inputs)[back].view(tokens, picks, -1).float(), 1)


def expert_rows(
    x: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, counts: Sequence[int], limit: float,
    quantize: Quantizer | None, hits: Tensor | None = None, leave: Quantizer | None = None,
) -> Tensor:  # fmt: skip
    """Return what experts make of consecutive row groups of x (R, D) with routing weights (R,): (R, D); see `mixture`.

    x has been through `quantize` already.
    """
    quantized = quantize is not None
    both = grouped_linear(x, w13, counts, quantized=quantized)
    gate, up = (leave(both) if leave else both).chunk(2, -1)
    hidden = (swiglu(gate, up, limit, hits) * weights.unsqueeze(-1)).to(x.dtype)
    out = grouped_linear(quantize(hidden) if quantize else hidden, w2, counts, quantized=quantized)
    return leave(out) if leave else out


def mixture_few(
    x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float, quantize: Quantizer | None
) -> Tensor:
    """The same as `mixture` for a handful of tokens: each token visits its experts one by one."""
    product = quantized_linear if quantize else linear
    prepared = quantize(x) if quantize else x
    out = []
    for token, experts in enumerate(chosen.tolist()):
        row = prepared[token : token + 1]
        pairs = [product(row, w13[e]) for e in experts]
        gate, up = torch.cat(pairs).chunk(2, -1)
        hidden = (swiglu(gate, up, limit) * weights[token].unsqueeze(-1)).to(x.dtype)
        hidden = quantize(hidden) if quantize else hidden
        parts = [product(hidden[i : i + 1], w2[e]).float() for i, e in enumerate(experts)]
        out.append(torch.cat(parts).sum(0, keepdim=True))
    return torch.cat(out)
