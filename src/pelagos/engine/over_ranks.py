"""One engine over several ranks: the first plans and picks, all compute.

A sequence's slot and pages are of one rank, chosen when it is admitted. The first rank tells the others each call
before it makes it. Prefixes are not kept, and what gives way is computed again. Source: docs/log/0009-placement.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor

from pelagos.chat.tokenizer import Tokenizer
from pelagos.engine.api import MAX_DRAFT, EngineOptions
from pelagos.engine.local import LocalEngine
from pelagos.engine.memory import plan_memory
from pelagos.engine.runner import Pools, available_bytes
from pelagos.engine.tiers import Tiers
from pelagos.errors import ConfigError, PelagosError
from pelagos.kernels.layout import CacheLayout, Output, Span
from pelagos.model.cuda_forward import tell
from pelagos.model.cuda_group import GroupForward, group_bytes
from pelagos.model.cuda_weights import Weights
from pelagos.parallel import Group


class _RankPools(Pools):
    """The pools of all ranks, of which an engine without caches only clears slots."""

    def __init__(self, layout: CacheLayout, pages: Sequence[Tensor], slots: Sequence[Tensor]) -> None:
        self.layout, self.on_cpu, self.pages, self._slots = layout, False, pages[0], slots

    def clear(self, slot: int) -> None:
        self._slots[slot % len(self._slots)][slot // len(self._slots)].zero_()


class _Lead:
    """The first rank's forward, which tells the others what to compute with it."""

    def __init__(self, forward: GroupForward, group: Group) -> None:
        self._forward, self._group = forward, group
        self.numeric_path, self.two_kinds, self.draws = forward.numeric_path, forward.two_kinds, forward.draws
        self.weight_bytes, self.scratch_bytes = forward.weight_bytes, forward.scratch_bytes

    def forward(self, spans: Sequence[Span], *streams: np.ndarray, call: str = "forward") -> Output:
        told = tell(spans)
        self._group.told((call, told.news(self._forward.known), *streams))
        return getattr(self._forward, call)(told, *streams)

    def draft(self, spans: Sequence[Span], streams: np.ndarray) -> Output:
        return self.forward(spans, streams, call="draft")


@contextmanager
def engine_over(
    weights: Weights, tokenizer: Tokenizer | None, options: EngineOptions, group: Group
) -> Iterator[LocalEngine | None]:
    """Yield an engine on the first rank; the others compute for it until it is closed, and then get None.

    weights are this rank's (`cut_tensors`); `kv_bytes` of the options is each rank's. Raises ConfigError for options
    that need caches, CapacityError where the plan does not fit.
    """
    if options.prefix_cache or options.preemption != "recompute":
        raise ConfigError("an engine over ranks: expected prefix_cache=False and preemption='recompute'")
    config, ranks, device = weights.config, group.size, weights.device
    drafts = MAX_DRAFT if options.speculation and config.num_nextn_predict_layers else 0
    layout, free = CacheLayout(config, weights.mode, drafts), available_bytes(device)
    plan = plan_memory(
        config, dataclasses.replace(options, max_requests=-(-options.max_requests // ranks)), mode=weights.mode,
        rewind=drafts, weight_bytes=weights.bytes, available=None if free is None else free + weights.bytes,
        scratch_bytes=group_bytes(layout, ranks, config.max_position_embeddings),
    )  # fmt: skip
    plan = min(group.gather(plan), key=lambda each: each.pages)
    pages, slots = (group.memory(size, torch.uint8) for size in ((plan.pages, layout.page_bytes),
                                                                 (plan.slots, layout.slot_bytes)))  # fmt: skip
    pages[group.rank].zero_()
    slots[group.rank].zero_()
    plan = dataclasses.replace(plan, pages=plan.pages * ranks, slots=plan.slots * ranks, ranks=ranks)
    positions = min(plan.positions, config.max_position_embeddings)
    forward = GroupForward(
        weights, layout, pages, slots, group, positions=positions, follow=not options.exact
    )  # fmt: skip
    if group.rank:
        while (order := group.told()) is not None:
            with suppress(PelagosError):  # the first rank's, too
                getattr(forward, order[0])(order[1].whole(forward.known), *order[2:])
        yield None
        return
    engine = LocalEngine(
        config, options, tiers=Tiers(_RankPools(layout, pages, slots), 0), forward=_Lead(forward, group), plan=plan,
        salt=b"", decoder=None if tokenizer is None else tokenizer.stream_decoder,
    )  # fmt: skip
    try:
        yield engine
    finally:
        engine.close()
        group.told(None)
