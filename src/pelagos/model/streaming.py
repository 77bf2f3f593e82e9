"""Routed experts that stay in the checkpoint's file until they are chosen, for the forwards on a CPU.

Meaning, invariants: docs/streaming.md. Bits are those of a model that holds all experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor, nn

from pelagos.config import ModelConfig
from pelagos.errors import CapacityError
from pelagos.kernels.ref import experts as ops
from pelagos.model.expert_cache import ExpertCache
from pelagos.model.experts import FEW_TOKENS, Experts
from pelagos.model.layers import quantize_activations

Array = np.ndarray
Read = Callable[[Sequence[str]], Mapping[str, Tensor]]
Put = Callable[[int, Array, Array, Array], None]
NAMES = ("w1", "w2", "w3")


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
        """Return places, tokens, bytes read a token and the share of experts asked for that were in a place."""
        if self._places is None:
            return {}
        cache, read = self._places.cache, self._places.read_bytes
        return {
            "places": len(cache.held), "experts": len(cache.place), "tokens": cache.tokens,
            "bytes_per_token": round(read / max(1, cache.tokens)), "hit_rate": round(cache.hit_rate, 4),
        }  # fmt: skip


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
