"""Spikes of the loss: seen by their distance from recent losses, answered by rollback and anticipatory routing.

Anticipatory routing computes a step's features with the present weights but takes expert indices that older weights
chose: batches are fetched some steps ahead and routed on arrival. The report gives neither the rule nor the lag.
Source: technical report 4.2.3; defaults of the specification's section 12.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pelagos.model import Transformer
from pelagos.model.experts import Router
from pelagos.train.data import Batch

FEWEST = 20  # losses before any can be called a spike


class SpikeDetector:
    """Says whether a loss lies more than `sigmas` standard deviations above the mean of the last `window` losses."""

    def __init__(self, window: int, sigmas: float) -> None:
        self.sigmas = sigmas
        self.losses: deque[float] = deque(maxlen=window)

    def spike(self, loss: float) -> str | None:
        """Return what is wrong with a loss, or None; only a loss that is no spike is remembered."""
        if len(self.losses) >= min(FEWEST, self.losses.maxlen or FEWEST):
            mean = sum(self.losses) / len(self.losses)
            spread = math.sqrt(sum((x - mean) ** 2 for x in self.losses) / len(self.losses))
            limit = mean + self.sigmas * spread
            if not loss <= limit:  # a loss that is no number is one too
                return f"loss {loss:.4f} is above {limit:.4f} (mean + {self.sigmas:g} sigma of {len(self.losses)})"
        self.losses.append(loss)
        return None


class Ahead:
    """Batches fetched up to `lag` steps ahead with the routes they got on arrival; empty while routing is ordinary.

    `fetch(step)` yields a step's micro-batches in turn, `route` returns the chosen experts (T, K) a routed layer.
    """

    def __init__(
        self, lag: int, fetch: Callable[[int], list[Batch]], route: Callable[[Batch], list[Tensor]], state: Any
    ) -> None:
        self.lag, self.until = lag, 0  # `until`: the first step that is routed as usual again
        self._fetch, self._route, self._state = fetch, route, state
        self._queue: deque[tuple[Any, list[Batch], list[list[Tensor]]]] = deque()

    def take(self, step: int) -> tuple[list[Batch], list[list[Tensor]] | None]:
        """Return the micro-batches of a step, with routes while anticipating; fetch and route those to come."""
        wanted = self.lag + 1 if step < self.until else 1
        while len(self._queue) < wanted:
            before = self._state()
            batches = self._fetch(step + len(self._queue))
            routes = [self._route(batch) for batch in batches] if wanted > 1 else []
            self._queue.append((before, batches, routes))
        _, batches, routes = self._queue.popleft()
        return batches, routes if routes and step < self.until else None

    def state(self) -> dict[str, Any]:
        """Return what resumes this: the loader's state before the first batch held, and the routes of those held."""
        data = self._queue[0][0] if self._queue else self._state()
        return {"data": data, "until": self.until, "routes": [routes for _, _, routes in self._queue]}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from `state`; the loader has been restored to state["data"] already, `step` is the next one."""
        self.until = state["until"]
        self._queue.clear()
        for place, routes in enumerate(state["routes"]):
            before = self._state()
            self._queue.append((before, self._fetch(step + place), routes))


def routers(model: Transformer) -> list[Router]:
    """Return the router of every layer, the draft's last."""
    found = [layer.get_submodule("ffn.gate") for layer in [*model.layers, *model.mtp]]
    return [gate for gate in found if isinstance(gate, Router)]


@contextmanager
def routed(model: Transformer, routes: Sequence[Tensor] | None):
    """Take `routes` (T, K) a layer, as `routers` counts them, for the choices of the routers; weights stay theirs."""
    for gate, chosen in zip(routers(model), routes or [], strict=routes is not None):
        gate.routes = chosen.to(torch.int64)
    try:
        yield
    finally:
        for gate in routers(model):
            gate.routes = None
