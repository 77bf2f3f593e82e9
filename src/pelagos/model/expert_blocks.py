"""Routed experts of the captured step as blocks, in device memory or, the least used, in pinned host memory.

A kernel finds a block by its layer's table of byte offsets and reads it where it lies. Between steps hot blocks change
places with cold ones, copies running beside the steps. Meaning, invariants: docs/streaming.md.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pelagos import numerics
from pelagos.config import ModelConfig
from pelagos.errors import CapacityError, ConfigError
from pelagos.kernels.prefill_experts import base_bytes
from pelagos.model.expert_cache import ExpertCache

AT_ONCE = 4  # pairs that change places together
_ALIGN = 256


class _Move(NamedTuple):
    """A hot expert on its way from a host block into the place of a cold one, whose block goes to a spare."""

    hot: int
    cold: int
    place: int
    spare: int


class ExpertBlocks:
    """All routed experts of a model, `fast_bytes` of them on the device; `table` (L, E) int64 tells kernels where.

    An offset counts from the first byte of the first fast block; pinned memory has addresses of the device's space.
    On a CPU (tests) all blocks lie in one tensor. Raises ConfigError for a budget without room for a block,
    CapacityError for one that the device has no room for.
    """

    def __init__(self, config: ModelConfig, device: torch.device, fast_bytes: int) -> None:
        d, inner, group = config.hidden_size, config.moe_intermediate_size, numerics.FP4_GROUP
        self.layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.experts = config.n_routed_experts
        self._shapes = [(2 * inner, d // 2), (2 * inner, d // group), (d, inner // 2), (d, inner // group)]
        ends = itertools.accumulate((-(-math.prod(shape) // _ALIGN) * _ALIGN for shape in self._shapes), initial=0)
        *self._offsets, self.block_bytes = ends
        count = self.layers * self.experts
        fast = min(fast_bytes // self.block_bytes, count)
        if fast < AT_ONCE:
            raise ConfigError(
                f"expert blocks: {fast_bytes:,} bytes hold {fast} of {self.block_bytes:,}, expected {AT_ONCE}"
            )
        self._cuda = device.type == "cuda"
        slow = count - fast + AT_ONCE
        if self._cuda:
            if (free := torch.cuda.mem_get_info(device)[0]) < fast * self.block_bytes:
                raise CapacityError(f"expert_bytes={fast_bytes:,}: the device has {free:,} bytes for all weights")
            self.fast = torch.empty((fast, self.block_bytes), dtype=torch.uint8, device=device)
            self.slow = torch.empty((slow, self.block_bytes), dtype=torch.uint8, pin_memory=True)
            self._side = torch.cuda.Stream(device)
        else:
            arena = torch.zeros((fast + slow, self.block_bytes), dtype=torch.uint8, device=device)
            self.fast, self.slow = arena.split((fast, slow))
        self.cache = ExpertCache(count, fast)
        # The last experts of every layer begin outside.
        order = np.arange(count).reshape(self.layers, self.experts).T.ravel()
        for place, expert in enumerate(order[:fast].tolist()):
            self.cache.take(expert, place)
        self.home = np.full(count, -1, np.int64)  # host block of an expert outside
        self.home[order[fast:]] = np.arange(count - fast)
        self.spares = list(range(count - fast, slow))
        self.table = torch.empty((self.layers, self.experts), dtype=torch.int64, device=device)
        self._mirror = torch.empty((self.layers, self.experts), dtype=torch.int64, pin_memory=self._cuda)
        self._moving: list[_Move] = []
        self._inward = False  # whether the hot blocks are on their way, or still the cold ones
        self._copied: torch.cuda.Event | None = None
        self.moved = 0
        self._point(np.arange(count))

    def parts(self, layer: int, expert: int) -> list[Tensor]:
        """Return w13 (2F, D/2), s13 (2F, D/32), w2 (D, F/2), s2 (D, F/32) uint8, views of an expert's block."""
        number = layer * self.experts + expert
        place = self.cache.place[number]
        return self._views(self.fast[place] if place >= 0 else self.slow[self.home[number]])

    def first(self) -> list[Tensor]:
        """Return the four parts of the first fast block, (1, ...) each: what offsets count from."""
        return [part.unsqueeze(0) for part in self._views(self.fast[0])]

    def bases(self) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's `base_bytes` of w13 and w2, (E, O/128) each, of filled blocks before any exchange."""
        outside = np.flatnonzero(self.home >= 0)
        found = []
        for at in (0, 2):
            rows = [base_bytes(*(self._stacked(blocks, part) for part in (at, at + 1)))
                    for blocks in (self.fast, self.slow[: max(1, len(outside))])]  # fmt: skip
            whole = torch.empty((len(self.home), rows[0].shape[1]), dtype=torch.uint8, device=self.table.device)
            whole[torch.from_numpy(self.cache.held).to(whole.device)] = rows[0]
            whole[torch.from_numpy(outside).to(whole.device)] = rows[1][self.home[outside]].to(whole.device)
            found.append(whole.view(self.layers, self.experts, -1).unbind(0))
        return list(zip(*found, strict=True))

    def note(self, first_layer: int, chosen: np.ndarray) -> None:
        """Count what a step over (N layers, T, K) chose."""
        for layer, own in enumerate(chosen, first_layer):
            self.cache.note(np.unique(own) + layer * self.experts, chosen.shape[1] if layer == 0 else 0)

    def turn(self) -> None:
        """Go on with exchanges; to be called while no step runs, before the next is launched on the current stream."""
        if self._copied is not None and not self._copied.query():
            return
        moves = self._moving
        if moves and not self._inward:
            for move in moves:
                self.cache.leave(move.cold)
                self.home[move.cold] = move.spare
            self._point(np.array([move.cold for move in moves]))
            self._copy([(self.fast[move.place], self.slow[self.home[move.hot]]) for move in moves])
            self._inward = True
            return
        for move in moves:
            self.spares.append(int(self.home[move.hot]))
            self.home[move.hot] = -1
            self.cache.take(move.hot, move.place)
        if moves:
            self._point(np.array([move.hot for move in moves]))
            self.moved += len(moves)
        self._inward = False
        pairs = self.cache.exchange(AT_ONCE)
        self._moving = [_Move(hot, cold, int(self.cache.place[cold]), self.spares.pop()) for hot, cold in pairs]
        self._copy([(self.slow[move.spare], self.fast[move.place]) for move in self._moving])

    def report(self) -> dict[str, float]:
        """Return places, hit rate, and bytes a token that kernels read from the host and that exchanges brought in."""
        cache, tokens = self.cache, max(1, self.cache.tokens)
        return {
            "places": len(cache.held), "experts": len(cache.place), "tokens": cache.tokens,
            "hit_rate": round(cache.hit_rate, 4),
            "bytes_per_token": round((cache.misses + self.moved) * self.block_bytes / tokens), "exchanges": self.moved,
        }  # fmt: skip

    def _views(self, block: Tensor) -> list[Tensor]:
        return [self._stacked(block.unsqueeze(0), part)[0] for part in range(len(self._shapes))]

    def _stacked(self, blocks: Tensor, part: int) -> Tensor:
        """One part of many blocks, a view."""
        shape = self._shapes[part]
        offset = self._offsets[part]
        return blocks[:, offset : offset + math.prod(shape)].unflatten(1, shape)

    def _point(self, experts: np.ndarray) -> None:
        """Write where experts are into the table, in the order of the current stream."""
        places, base = self.cache.place[experts], self.fast.data_ptr()
        outside = self.slow.data_ptr() - base + self.home[experts] * self.block_bytes
        self._mirror.view(-1).numpy()[experts] = np.where(places >= 0, places * self.block_bytes, outside)
        self.table.copy_(self._mirror, non_blocking=True)

    def _copy(self, copies: list[tuple[Tensor, Tensor]]) -> None:
        """Copy beside the steps; `turn` finds out when it is done."""
        self._copied = None
        if not self._cuda or not copies:
            for into, source in copies:
                into.copy_(source)
            return
        with torch.cuda.stream(self._side):
            for into, source in copies:
                into.copy_(source, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
