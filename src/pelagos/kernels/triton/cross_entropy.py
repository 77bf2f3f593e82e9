"""Losses of logits and their gradient in place: a program a token, its row read twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 4096  # of a row a step


@triton.jit
def _turn_kernel(logits, targets, losses, words, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    target, row = tl.load(targets + token), logits + token * words
    real = target >= 0
    own = tl.load(row + target, mask=real, other=0.0).to(tl.float32)  # ahead of the sums' barriers, the stores are not
    top, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, words, BLOCK):
        word = begin + tl.arange(0, BLOCK)
        logit = tl.load(row + word, mask=word < words, other=-1e30).to(tl.float32)
        best = tl.maximum(top, logit)
        total = total * tl.exp(top - best) + tl.exp(logit - best)
        top = best
    best = tl.max(top, 0)
    level = best + tl.log(tl.sum(total * tl.exp(top - best), 0))
    tl.store(losses + token, tl.where(real, level - own, 0.0))
    for begin in range(0, words, BLOCK):
        word = begin + tl.arange(0, BLOCK)
        chance = tl.exp(tl.load(row + word, mask=word < words, other=0.0).to(tl.float32) - level)
        chance = tl.where(real, chance - tl.where(word == target, 1.0, 0.0), 0.0)
        tl.store(row + word, chance.to(logits.dtype.element_ty), mask=word < words)


def turn(logits: Tensor, targets: Tensor) -> Tensor:
    """As `kernels.cross_entropy.turn`; logits must be contiguous."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    block = min(WORDS, triton.next_power_of_2(logits.shape[1]))
    _turn_kernel[(len(logits),)](logits, targets, losses, logits.shape[1], BLOCK=block, num_warps=8)
    return losses
