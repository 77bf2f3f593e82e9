"""Routed experts that are elsewhere until they are chosen: in the checkpoint's file, for the forwards on a CPU, or, for
the captured step, as blocks of which the least used are in pinned host memory.

Which of them have a fast place is one policy's: counts of choices that fade, evictions on demand, exchanges that pay.
Meaning, invariants: docs/streaming.md. Bits are those of a model that holds all experts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pelagos import numerics
from pelagos.config import ModelConfig
from pelagos.errors import CapacityError, ConfigError
from pelagos.kernels.prefill_experts import base_bytes
from pelagos.kernels.ref import experts as ops
from pelagos.model.experts import FEW_TOKENS, Experts
from pelagos.model.layers import quantize_activations

Array = np.ndarray
Read = Callable[[Sequence[str]], Mapping[str, Tensor]]
Put = Callable[[int, Array, Array, Array], None]
NAMES = ("w1", "w2", "w3")
HALF_LIFE = 2048  # tokens after which a choice counts half
SURE = 4.0  # standard deviations that two counts differ by before their experts change places
_LARGEST = 1e100  # of what a choice counts; everything is scaled down then
AT_ONCE = 4  # pairs that change places together
_ALIGN = 256


class ExpertCache:
    """`places` of `count` experts; `place` (count,) int64 says where an expert is, -1 outside."""

    def __init__(self, count: int, places: int, *, half_life: float = HALF_LIFE) -> None:
        """Begin with empty places; raises ConfigError for sizes that mean nothing."""
        if not 0 < places <= count or half_life <= 0:
            raise ConfigError(f"expert cache: {places} places for {count} experts, half-life {half_life}")
        self.place = np.full(count, -1, np.int64)
        self.held = np.full(places, -1, np.int64)  # expert in each place
        self.hits = self.misses = self.tokens = 0
        self._score = np.zeros(count)
        self._worth, self._growth = 1.0, 2.0 ** (1.0 / half_life)

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for so far that were in a place."""
        return self.hits / max(1, self.hits + self.misses)

    def report(self, read_bytes: float) -> dict[str, float]:
        """Return places, tokens, bytes read a token and the share of experts asked for that were in a place."""
        return {
            "places": len(self.held), "experts": len(self.place), "tokens": self.tokens,
            "bytes_per_token": round(read_bytes / max(1, self.tokens)), "hit_rate": round(self.hit_rate, 4),
        }  # fmt: skip

    def note(self, experts: Array, tokens: int = 0) -> None:
        """Count distinct experts that a call reads, and the tokens that pass with it."""
        found = int((self.place[experts] >= 0).sum())
        self.hits += found
        self.misses += len(experts) - found
        self.tokens += tokens
        self._score[experts] += self._worth
        self._worth *= self._growth**tokens
        if self._worth > _LARGEST:
            self._score /= self._worth
            self._worth = 1.0

    def admit(self, wanted: Array, keep: Array | Sequence[int] = ()) -> list[tuple[int, int]]:
        """Give a place to each of `wanted` that has none; return (expert, place) for those, to be filled.

        The least counted others leave, never one of wanted or `keep`. Raises CapacityError when too few can.
        """
        missing = wanted[self.place[wanted] < 0]
        if not len(missing):
            return []
        score = np.where(self.held < 0, -1.0, self._score[self.held])
        stay = self.place[np.concatenate((wanted, np.asarray(keep, np.int64)))]
        score[stay[stay >= 0]] = np.inf
        free = np.argsort(score, kind="stable")[: len(missing)]
        if len(free) < len(missing) or np.isinf(score[free[-1]]):
            raise CapacityError(f"{len(self.held)} places for experts: {len(wanted)} are needed at once")
        given = list(zip(missing.tolist(), free.tolist(), strict=True))
        for expert, place in given:
            if self.held[place] >= 0:
                self.leave(int(self.held[place]))
            self.take(expert, place)
        return given

    def leave(self, expert: int) -> None:
        """Free an expert's place."""
        self.held[self.place[expert]] = -1
        self.place[expert] = -1

    def take(self, expert: int, place: int) -> None:
        """Put an expert into a free place."""
        assert self.held[place] < 0
        self.held[place], self.place[expert] = expert, place

    def exchange(self, most: int = 1) -> list[tuple[int, int]]:
        """Return up to `most` pairs (expert outside, expert inside) that surely should change places."""
        outside, inside = np.flatnonzero(self.place < 0), self.held[self.held >= 0]
        most = min(most, len(outside), len(inside))
        if not most:
            return []
        hot = outside[np.argpartition(-self._score[outside], most - 1)[:most]]
        cold = inside[np.argpartition(self._score[inside], most - 1)[:most]]
        hot, cold = hot[np.argsort(-self._score[hot])], cold[np.argsort(self._score[cold])]
        more, less = self._score[hot] / self._worth, self._score[cold] / self._worth
        sure = more - less > 1 + SURE * (more + less) ** 0.5
        return list(zip(hot[sure].tolist(), cold[sure].tolist(), strict=True))


class ExpertStore:
    """The routed experts of a checkpoint in its file; `budget_bytes` of them may be in memory.

    `read` gives float32 values by name, `stored_bytes` what a name takes on disk; `narrow` says that every value is a
    bfloat16 one.
    """

    def __init__(
        self, config: ModelConfig, read: Read, stored_bytes: Mapping[str, int], budget_bytes: int, *, narrow: bool
    ) -> None:
        self.config, self.narrow, self.budget_bytes = config, narrow, budget_bytes
        self.layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self._read, self._stored_bytes = read, stored_bytes
        self._places: ExpertPlaces | None = None

    def tensors(self, layer: int, expert: int) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        """Return w1 (F, D), w2 (D, F), w3 (F, D) float32 from the file, and the bytes they take there."""
        backbone = self.config.num_hidden_layers
        prefix = f"layers.{layer}." if layer < backbone else f"mtp.{layer - backbone}."
        names = [f"{prefix}ffn.experts.{expert}.{name}.weight" for name in NAMES]
        values = self._read(names)
        w1, w2, w3 = (values[name].float() for name in names)
        return (w1, w2, w3), sum(self._stored_bytes[name] for name in names)

    def open(self, each_bytes: int, put: Put) -> ExpertPlaces:
        """Return as many empty places of `each_bytes` as the budget holds, which `put(place, w1, w2, w3)` fills.

        Raises CapacityError for a budget that does not hold one layer's experts.
        """
        count = self.config.n_routed_experts
        places = min(self.budget_bytes // each_bytes, self.layers * count)
        if places < count:
            raise CapacityError(
                f"expert_bytes={self.budget_bytes:,} holds {places} experts of {each_bytes:,} bytes: a layer has "
                f"{count}, expected at least {count * each_bytes:,}"
            )
        self._places = ExpertPlaces(self, ExpertCache(self.layers * count, places), put)
        return self._places

    @functools.cached_property
    def stacked(self) -> tuple[ExpertPlaces, Tensor, Tensor]:
        """Places for torch, with their w13 (P, 2F, D) and w2 (P, D, F) float32."""
        width, dim = self.config.moe_intermediate_size, self.config.hidden_size

        def put(place: int, first: Array, second: Array, third: Array) -> None:
            w13[place, :width], w13[place, width:], w2[place] = map(torch.from_numpy, (first, third, second))

        places = self.open(4 * 3 * width * dim, put)
        with torch.inference_mode(False):  # the reader thread writes them
            w13, w2 = torch.empty(places.count, 2 * width, dim), torch.empty(places.count, dim, width)
        return places, w13, w2

    def report(self) -> dict[str, float]:
        """As `ExpertCache.report`, once places are open."""
        return {} if self._places is None else self._places.cache.report(self._places.read_bytes)


class ExpertPlaces:
    """Places in memory for the experts of a store, filled by one reader thread as layers ask for them."""

    def __init__(self, store: ExpertStore, cache: ExpertCache, put: Put) -> None:
        self.cache, self.count, self.read_bytes = cache, len(cache.held), 0
        self._store, self._put = store, put
        self._each = store.config.n_routed_experts
        self._reader = ThreadPoolExecutor(1, "experts")
        self._ahead: dict[int, Future[None] | None] = {}

    def of(self, layer: int) -> Array:
        """The places (E,) int64 of a layer's experts, a live view; -1 for those that have none."""
        return self.cache.place[layer * self._each : (layer + 1) * self._each]

    def fetch(self, layer: int, chosen: Array) -> None:
        """Have the experts of `chosen` in places; they stay there until the next call."""
        if layer in self._ahead:
            loading = self._ahead.pop(layer)
        else:
            wanted = np.unique(chosen) + layer * self._each
            self.cache.note(wanted)
            loading = self._submit(wanted, wanted)
        if loading is not None:
            loading.result()

    def begin(self, tables: Mapping[int, Array], ids: Array) -> None:
        """Tell of a call's token ids: layers routed by tables (V, K) of them read ahead, as far as all that fits."""
        wait([each for each in self._ahead.values() if each])  # of a call that failed
        wanted = {layer: np.unique(table[ids]) + layer * self._each for layer, table in tables.items()}
        together = np.concatenate([*wanted.values(), np.empty(0, np.int64)]).astype(np.int64)
        if self.count < len(together):
            wanted = {}
        self.cache.note(together if wanted else together[:0], len(ids))
        self._ahead = {layer: self._submit(own, together) for layer, own in wanted.items()}

    def _submit(self, wanted: Array, keep: Array) -> Future[None] | None:
        """Let the reader fetch what is missing; None where nothing is."""
        return None if (self.cache.place[wanted] >= 0).all() else self._reader.submit(self._load, wanted, keep)

    def _load(self, wanted: Array, keep: Array) -> None:
        admitted = self.cache.admit(wanted, keep)
        try:
            while admitted:
                expert, place = admitted[-1]
                values, size = self._store.tensors(*divmod(expert, self._each))
                self._put(place, *(each.numpy() for each in values))
                self.read_bytes += size
                admitted.pop()
        finally:
            for expert, _ in admitted:  # what could not be read has no place
                self.cache.leave(expert)


class StreamedExperts(Experts):
    """The routed experts of a layer out of a store; no parameters of its own."""

    streamed = True

    def __init__(self, like: Experts, store: ExpertStore, layer: int) -> None:
        nn.Module.__init__(self)
        self.store, self.layer = store, layer
        self.limit, self.release, self.stored, self.simulate = like.limit, like.release, like.stored, like.simulate
        self.master, self.hits, self.leave = False, None, None

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor, multiple: int = 0) -> Tensor:
        """As `Experts.forward`."""
        places, w13, w2 = self.store.stacked
        places.fetch(self.layer, chosen.numpy())
        quantize = quantize_activations if self.simulate and self.stored in ("fp8", "fp4") else None
        at = torch.from_numpy(places.of(self.layer))[chosen]
        if len(x) <= FEW_TOKENS:
            return ops.mixture_few(x, at, weights, w13, w2, self.limit, quantize)
        used, at = at.unique(return_inverse=True)
        return ops.mixture(x, at, weights, w13[used], w2[used], self.limit, quantize, multiple)

    def released(self, dot: str) -> Iterator[tuple[str, Tensor, str]]:
        """As `Experts.released`, one expert in memory at a time."""
        for expert in range(self.store.config.n_routed_experts):
            for name, value in zip(NAMES, self.store.tensors(self.layer, expert)[0], strict=True):
                yield f"{dot}{expert}.{name}.weight", value, self.release


def store_of(model: nn.Module) -> ExpertStore | None:
    """Return the store that a model's experts come from, None when they are in memory."""
    return next((module.store for module in model.modules() if isinstance(module, StreamedExperts)), None)


def expert_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Return the shapes of a routed expert's w13, its scales, w2 and its scales, as packed bytes."""
    d, inner, group = config.hidden_size, config.moe_intermediate_size, numerics.FP4_GROUP
    return [(2 * inner, d // 2), (2 * inner, d // group), (d, inner // 2), (d, inner // group)]


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
        self.layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.experts = config.n_routed_experts
        self._shapes = expert_shapes(config)
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
        return [self._stacked(self.fast[:1], part) for part in range(len(self._shapes))]

    def bases(self) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's `base_bytes` of w13 and w2, (E, O/128) each, of filled blocks wherever they are."""
        found = []
        for layer in range(self.layers):
            blocks = [self.parts(layer, expert) for expert in range(self.experts)]
            pairs = ([base_bytes(*(part[None] for part in own[at : at + 2])) for own in blocks] for at in (0, 2))
            first, second = (torch.cat([each.to(self.table.device) for each in pair]) for pair in pairs)
            found.append((first, second))
        return found

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
        """As `ExpertCache.report`, of bytes that kernels read from the host and that exchanges brought in."""
        return self.cache.report((self.cache.misses + self.moved) * self.block_bytes) | {"exchanges": self.moved}

    def _views(self, block: Tensor) -> list[Tensor]:
        return [self._stacked(block.unsqueeze(0), part)[0] for part in range(len(self._shapes))]

    def _stacked(self, blocks: Tensor, part: int) -> Tensor:
        """One part of many blocks, a view."""
        shape, offset = self._shapes[part], self._offsets[part]
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
