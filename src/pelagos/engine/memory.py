"""The memory plan: how many pages, slots and snapshot bytes an engine gets, before anything is allocated.

All byte formulas are the cost model's. Source: technical report 6.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from pelagos.config import ModelConfig


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The engine's buffers in numbers: `pages` x page_bytes, `slots` x slot_bytes, and snapshots up to state_bytes."""

    pages: int
    slots: int
    state_bytes: int
    page_bytes: int
    slot_bytes: int
    page_tokens: int
    weight_bytes: int
    scratch_bytes: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of pages, slots and snapshots together."""
        return self.pages * self.page_bytes + self.slots * self.slot_bytes + self.state_bytes

    @property
    def total_bytes(self) -> int:
        """All planned bytes: weights and scratch too."""
        return self.kv_bytes + self.weight_bytes + self.scratch_bytes

    def refuse(self, prompt_tokens: int, max_tokens: int) -> str | None:
        """Say why a request can never fit this plan, None when it can (alone, if need be)."""
        raise NotImplementedError

    def describe(self) -> dict[str, int]:
        """Return every figure by name, for statistics and printing."""
        raise NotImplementedError


def plan_memory(
    config: ModelConfig,
    *,
    mode: str = "reference",
    kv_bytes: int | None = None,
    max_requests: int = 16,
    chunk_tokens: int = 1024,
    rewind: int = 0,
    prefix_cache: bool = True,
    weight_bytes: int = 0,
    scratch_bytes: int = 0,
    available: int | None = None,
) -> MemoryPlan:
    """Split `kv_bytes` into slots, snapshots and pages.

    Without kv_bytes: enough for max_requests of min(the model's positions, 32,768) tokens, or a share of what
    `available` bytes leave after weights and scratch, whichever is less. Raises CapacityError when not one request
    of chunk_tokens fits.
    """
    raise NotImplementedError
