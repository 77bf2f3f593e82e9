"""What one forward needs from the past, and where it leaves what the next will need.

`LayerCache` is the only thing the model knows of caching: training passes `FullSequence`, which hands back what
it was given; generation passes a `ContiguousCache`; the serving engine brings its own pages.
Source: technical report 6.1 (state cache and classical cache); spec architecture 5.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pelagos.config import ModelConfig
from pelagos.errors import CapacityError


class LayerCache(Protocol):
    """The memory of one layer. Every call appends the S tokens of the present forward."""

    def window(self, kv: Tensor) -> Tensor:
        """Append kv (B, S, C); return rows (B, sliding_window + S, C) that end with it, zeros before position 0."""
        ...

    def tail(self, name: str, kv: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Append compressor rows (B, S, D) float32 and return them behind the last `keep` rows (B, keep + S, D).

        Before position 0 kv is 0 and score -inf. `name` is `main` or `index`.
        """
        ...

    def entries(self, name: str, new: Tensor) -> Tensor:
        """Append new entries (B, N, D), N possibly 0; return all of them (B, M, D)."""
        ...


class Cache(Protocol):
    """The memory of one sequence batch: a position and one `LayerCache` a layer (draft layers follow the backbone)."""

    position: int

    def layer(self, index: int) -> LayerCache:
        """Return the memory of a layer."""
        ...

    def check_room(self, tokens: int) -> None:
        """Raise CapacityError, with nothing appended yet, when `tokens` more do not fit."""
        ...

    def advance(self, tokens: int) -> None:
        """Record that a whole forward over `tokens` more tokens has been appended."""
        ...


class FullSequence:
    """No past: every sequence of the batch is whole. Serves all layers, keeps nothing."""

    position = 0

    def __init__(self, window: int) -> None:
        self._window = window

    def layer(self, index: int) -> FullSequence:
        return self

    def check_room(self, tokens: int) -> None:
        return None

    def advance(self, tokens: int) -> None:
        return None

    def window(self, kv: Tensor) -> Tensor:
        return torch.nn.functional.pad(kv, (0, 0, self._window, 0))

    def tail(self, name: str, kv: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        pad = torch.nn.functional.pad
        return pad(kv, (0, 0, keep, 0)), pad(score, (0, 0, keep, 0), value=-torch.inf)

    def entries(self, name: str, new: Tensor) -> Tensor:
        return new


class _ContiguousLayer:
    """Window rows, compressor tails and entries of one layer in growing tensors."""

    def __init__(self, window: int) -> None:
        self._window_size = window
        self._rows: dict[str, Tensor] = {}
        self._entries: dict[str, tuple[Tensor, int]] = {}

    def window(self, kv: Tensor) -> Tensor:
        return self._append("window", kv, self._window_size, 0.0)

    def tail(self, name: str, kv: Tensor, score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        return self._append(f"{name} kv", kv, keep, 0.0), self._append(f"{name} score", score, keep, -torch.inf)

    def _append(self, name: str, new: Tensor, keep: int, fill: float) -> Tensor:
        past = self._rows.get(name)
        rows = torch.cat((new.new_full((len(new), keep, new.shape[2]), fill) if past is None else past, new), 1)
        self._rows[name] = rows[:, -keep:].clone()
        return rows

    def entries(self, name: str, new: Tensor) -> Tensor:
        buffer, used = self._entries.get(name, (new, 0))
        count = used + new.shape[1]
        if count > buffer.shape[1] or used == 0:
            grown = new.new_empty((new.shape[0], max(32, 2 * count), new.shape[2]))
            grown[:, :used] = buffer[:, :used]
            buffer = grown
        if new.shape[1]:
            buffer[:, used:count] = new
        self._entries[name] = (buffer, count)
        return buffer[:, :count]


class ContiguousCache:
    """The whole past of `batch` sequences of equal length, for generation without a serving engine."""

    def __init__(self, config: ModelConfig, *, capacity: int | None = None) -> None:
        """Hold at most `capacity` tokens a sequence (default: the model's max_position_embeddings)."""
        self.capacity = capacity or config.max_position_embeddings
        self.position = 0
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self._layers = [_ContiguousLayer(config.sliding_window) for _ in range(layers)]

    def layer(self, index: int) -> LayerCache:
        """Return the memory of a layer."""
        return self._layers[index]

    def advance(self, tokens: int) -> None:
        """Move past `tokens` appended tokens."""
        self.position += tokens

    def check_room(self, tokens: int) -> None:
        """Raise CapacityError when `tokens` more do not fit."""
        if self.position + tokens > self.capacity:
            raise CapacityError(
                f"context: {self.position} tokens held + {tokens} new is more than the capacity of {self.capacity}"
            )
