"""What every kernel of a decode or verify call is told about its rows, as device tensors.

A row is one token. Several rows of one sequence in one call (verification) are consecutive positions in consecutive
rows: whoever needs a position p >= `first` takes it from row r - (positions[r] - p) of this call, older ones from the
window ring and the pages, so that no launch waits for what another writes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The T rows of a call, padded to its bucket; a padding row (position -1) writes nothing and attends nothing."""

    positions: Tensor  # (T,) int32 absolute position, -1 for padding
    slots: Tensor  # (T,) int32 state slot of its sequence
    first: Tensor  # (T,) int32 position of the first token of its span in this call
    owner: Tensor  # (T,) int32 row of `table`
    table: Tensor  # (B, P) int32 page of every page_tokens positions
    frozen: Tensor  # (T,) int32: entries of windows that end before it are there already and are not written


class Halves(NamedTuple):
    """bfloat16 rows (T, C) as sums of two E4M3 rows, to 2^-22 of the largest of every 128 columns."""

    codes: Tensor  # (2 T, C) uint8, a row's upper half before its lower one
    scales: Tensor  # (2 T, C / 128) uint8 UE8M0, the lower half's 2^-4 of the upper's

    def whole(self) -> Tensor:
        """Return (T, C) bfloat16."""
        values = self.codes.view(torch.float8_e4m3fn).float().unflatten(1, (-1, 128))
        values = values * self.scales.view(torch.float8_e8m0fnu).float().unsqueeze(2)
        return values.flatten(1).unflatten(0, (-1, 2)).sum(1).bfloat16()


class Parts(NamedTuple):
    """A result (T, D) whose sums are left to the site that reads it: float32 parts, added in order."""

    last: Tensor  # (P, T, D): their sum, rounded to bfloat16
    routed: Tensor | None = None  # (P, T, K, D): joined by the sum of K sums before it is rounded again

    def whole(self) -> Tensor:
        """Return (T, D) bfloat16."""
        last = sum_of(self.last).bfloat16()
        return last if self.routed is None else (sum_of(sum_of(self.routed).unbind(1)) + last.float()).bfloat16()


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """Add tensors one after another."""
    return functools.reduce(torch.add, parts)


class Mixing(NamedTuple):
    """What a site of T tokens leaves to the launch behind it, which writes `post` and `comb`."""

    parts: Tensor  # (T, 40, D / 128) float32 sums of the site's logits and Gram matrix
    base: Tensor  # (24,) float32
    scale: Tensor  # (3,) float32
    post: Tensor  # (T, 4) float32
    comb: Tensor  # (T, 4, 4) float32
    iters: int
    eps: float
    norm_eps: float


class Routed(NamedTuple):
    """What `router.route` finds for T tokens, and what the Triton experts take from it."""

    chosen: Tensor  # (T, K) int32
    weights: Tensor  # (T, K) float32
    shared: Tensor  # (T, 2F) float32, gate then up of the shared expert
    planes: Tensor | None = None  # (4T, D) uint8: codes in an order of their own, a row for each group of 32 columns
    lists: tuple[Tensor, ...] | None = None  # rows by expert, None where a pick is a list
