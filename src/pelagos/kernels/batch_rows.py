"""What every kernel of a decode or verify call is told about its rows, as device tensors.

A row is one token. Several rows of one sequence in one call (verification) are consecutive positions in consecutive
rows: whoever needs a position p >= `first` takes it from row r - (positions[r] - p) of this call, older ones from the
window ring and the pages, so that no launch waits for what another writes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """The T rows of a call, padded to its bucket; a padding row (position -1) writes nothing and attends nothing."""

    positions: Tensor  # (T,) int32 absolute position, -1 for padding
    slots: Tensor  # (T,) int32 state slot of its sequence
    first: Tensor  # (T,) int32 position of the first token of its span in this call
    owner: Tensor  # (T,) int32 row of `table`
    table: Tensor  # (B, P) int32 page of every page_tokens positions
    frozen: Tensor  # (T,) int32: entries of windows that end before it are there already and are not written


class Routed(NamedTuple):
    """What `router.route` finds for T tokens, and what the Triton experts take from it."""

    chosen: Tensor  # (T, K) int32
    weights: Tensor  # (T, K) float32
    shared: Tensor  # (T, 2F) float32, gate then up of the shared expert
    planes: Tensor | None = None  # (T, D) bfloat16, even columns then odd ones, in an order of their own
    lists: tuple[Tensor, ...] | None = None  # rows by expert, None where a pick is a list
