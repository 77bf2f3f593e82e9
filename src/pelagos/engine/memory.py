"""The memory plan: how many pages, slots and snapshot bytes an engine gets, before anything is allocated.

All byte formulas are the cost model's; a request that can never fit is refused in words. Source: technical report 6.1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pelagos import cost
from pelagos.config import ModelConfig
from pelagos.engine.api import EngineOptions
from pelagos.errors import CapacityError, ConfigError

EMPTY_BLOCK = 1 << 20  # bytes of a host block where pages are empty
USUAL_CONTEXT = 32_768  # positions a request is planned with when nobody says how much memory to use
LAYOUTS = {"reference": "float32", "released": "released"}  # number mode -> how the cost model calls its rows


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The engine's buffers in numbers: `pages` x page_bytes, `slots` x slot_bytes, and snapshots up to state_bytes.

    With `host_pages` these and the snapshots are the host's, and `host_bytes` counts them, else host_bytes is 0.
    """

    pages: int
    slots: int
    state_bytes: int
    page_bytes: int
    slot_bytes: int
    page_tokens: int
    weight_bytes: int = 0
    scratch_bytes: int = 0
    host_pages: int = 0
    ranks: int = 1  # that pages and slots are divided over

    @property
    def kv_bytes(self) -> int:
        """Bytes of pages, slots and, without a tier of the host, snapshots together."""
        states = 0 if self.host_pages else self.state_bytes
        return self.pages * self.page_bytes + self.slots * self.slot_bytes + states

    @property
    def host_bytes(self) -> int:
        """Bytes of the host's tier: blocks, snapshots, and a row to pack and one to unpack a state."""
        rows = 2 * (self.slot_bytes + self.page_bytes)
        return self.host_pages * (self.page_bytes or EMPTY_BLOCK) + self.state_bytes + rows if self.host_pages else 0

    @property
    def total_bytes(self) -> int:
        """All planned bytes: weights and scratch too."""
        return self.kv_bytes + self.weight_bytes + self.scratch_bytes

    @property
    def positions(self) -> int:
        """Positions that all pages of a rank hold: the longest a request can become."""
        return self.pages // self.ranks * self.page_tokens

    def refuse(self, prompt_tokens: int, max_tokens: int) -> str | None:
        """Say why a request can never fit this plan, None when it can (alone, if need be)."""
        if prompt_tokens + max_tokens <= self.positions:
            return None
        pages, own = -(-(prompt_tokens + max_tokens) // self.page_tokens), self.pages // self.ranks
        each = f" on each of {self.ranks} ranks" if self.ranks > 1 else ""
        return (
            f"a prompt of {prompt_tokens:,} tokens and up to {max_tokens:,} more take {pages:,} pages of "
            f"{self.page_bytes:,} bytes, the engine has {own:,}{each} ({self.positions:,} positions): "
            f"ask for fewer tokens, or raise kv_bytes by {(pages - own) * self.page_bytes:,}{each}"
        )

    def describe(self) -> dict[str, int]:
        """Return every figure by name, for statistics and printing."""
        return asdict(self) | {n: getattr(self, n) for n in ("positions", "kv_bytes", "host_bytes", "total_bytes")}


def plan_memory(
    config: ModelConfig, options: EngineOptions, *, mode: str = "reference", rewind: int = 0, weight_bytes: int = 0,
    scratch_bytes: int = 0, available: int | None = None, host_available: int | None = None, apart: bool = False,
) -> MemoryPlan:  # fmt: skip
    """Split `kv_bytes` into slots (one a request), snapshots (a quarter of the rest) and pages.

    `host_kv_bytes` is for a tier of the host, which then holds the snapshots, in a quarter of it: without it there is
    none, but where the device's memory is `apart` from the host's, half as much as kv_bytes or a quarter of
    `host_available`, whichever is less. Without kv_bytes: enough for max_requests of min(the model's positions, 32,768)
    tokens, or half of what `available` bytes leave after weights and scratch, whichever is less. Raises CapacityError
    when not one request of chunk_tokens fits, or more than `available` is asked for, ConfigError for another mode.
    """
    kv_bytes, host_kv_bytes = options.kv_bytes, options.host_kv_bytes
    max_requests, chunk_tokens = options.max_requests, options.chunk_tokens
    if mode not in LAYOUTS:
        raise ConfigError(f"mode={mode!r}: expected {' or '.join(LAYOUTS)}")
    layout, tokens = LAYOUTS[mode], cost.page_tokens(config)
    page = sum(cost.page_bytes(config, tokens=tokens, layout=layout).values())
    slot = sum(cost.state_bytes(config, layout=layout, draft=True, rewind=rewind).values())
    slots = max_requests * slot
    least = slots + -(-chunk_tokens // tokens) * page
    room = None if available is None else available - weight_bytes - scratch_bytes
    tiered = options.keeps and (apart or bool(host_kv_bytes))
    if kv_bytes is None:
        pages = max_requests * -(-min(config.max_position_embeddings, USUAL_CONTEXT) // tokens)
        kv_bytes = slots + pages * page * (4 if options.prefix_cache and not tiered else 3) // 3
        kv_bytes = kv_bytes if room is None else min(kv_bytes, max(room // 2, min(least, room)))
    elif room is not None and kv_bytes > room:
        raise CapacityError(
            f"kv_bytes={kv_bytes:,} with weights of {weight_bytes:,} and scratch of {scratch_bytes:,} bytes: "
            f"there are {available:,} bytes; ask for at most {max(0, room):,}"
        )
    if kv_bytes < least:
        raise CapacityError(
            f"{max_requests} slots of {slot:,} bytes and pages for {chunk_tokens:,} tokens take {least:,} bytes, there "
            f"are {max(0, kv_bytes):,} for the cache: raise kv_bytes to that, or lower max_requests or chunk_tokens"
        )
    states = host_pages = 0
    if tiered:
        given = kv_bytes // 2 if host_available is None else min(kv_bytes // 2, host_available // 4)
        host = max(given, 8 * (slot + page)) if host_kv_bytes is None else host_kv_bytes
        states = host // 4 if options.prefix_cache else 0
        host_pages = (host - states - 2 * (slot + page)) // (page or EMPTY_BLOCK)
        if host_pages < 1 or (host_available is not None and host > host_available):
            raise CapacityError(
                f"host_kv_bytes={host:,}: expected at least {3 * (slot + page) + (page or EMPTY_BLOCK):,} and at most "
                f"the {'free' if host_available is None else f'{host_available:,}'} bytes of the host"
            )
    elif options.prefix_cache:
        states = min((kv_bytes - slots) // 4, kv_bytes - least)
    every = max_requests * -(-config.max_position_embeddings // tokens)  # pages without compressed layers are empty
    pages = (kv_bytes - slots - (0 if tiered else states)) // page if page else every
    return MemoryPlan(pages, max_requests, states, page, slot, tokens, weight_bytes, scratch_bytes, host_pages)
