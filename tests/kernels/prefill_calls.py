"""What the tests of the prompt kernels share: calls over random pools, cut ones, and how far pools differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pelagos.kernels import prefill_cache
from pelagos.kernels.batch_rows import Rows
from pelagos.kernels.layout import Span
from pelagos.kernels.ref import decode_attention as calls


def make(shape: str, parts: tuple[tuple[int, int], ...], ratio: int, *, device: str = "cpu", seed: int = 0) -> Any:
    """Return (call, spans, prompt, inputs of `prefill_cache.cache_write`) over random pools."""
    call = calls.make_call(shape, ratio, parts, device=device, seed=seed)
    projected, weights, turn, entry_turn = calls.make_projected(call, seed=seed)
    spans = [Span(np.zeros(count, np.int64), first, slot, call.rows.table[slot].cpu().numpy())
             for slot, (first, count) in enumerate(parts)]  # fmt: skip
    prompt = prefill_cache.prompt(spans, call.layout, device)
    columns = call.layout.config.q_lora_rank + call.layout.config.head_dim
    wide = projected[:, columns:].contiguous() if ratio else None
    first = projected[:, :columns].bfloat16().contiguous()
    return call, spans, prompt, (first, wide, prompt, call.layout, 0, call.pages, call.slots, weights, turn, entry_turn)


def part(inputs: tuple[Any, ...], first: int, end: int) -> tuple[Any, ...]:
    """Return the inputs of tokens first..end-1 of a call of one sequence, over the same pools."""
    own, wide, call, layout, layer, pages, slots, weights, turn, entry_turn = inputs
    rows: Rows = call.rows
    start = int(rows.positions[0])
    span = Span(np.zeros(end - first, np.int64), start + first, int(call.slot[0]), rows.table[0].cpu().numpy())
    some = prefill_cache.prompt([span], layout, own.device)
    cut = [None if each is None else each[first:end].contiguous() for each in (own, wide, turn, entry_turn)]
    return cut[0], cut[1], some, layout, layer, pages, slots, weights, cut[2], cut[3]


def pools_differ(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> float:
    """The share of bytes that differ by more than one (a rounding); tails (float32) are compared as bytes too."""
    return max(float(((a.int() - b.int()).abs() > 0).float().mean()) for a, b in zip(some, others, strict=True))
