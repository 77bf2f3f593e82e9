"""What a prompt's tokens leave in the cache, and the keys they attend, decoded once a layer: contract and dispatch.

On CUDA up to five Triton launches; elsewhere `ref.prefill_cache`, which defines the meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.kernels.batch_rows import Rows
from pelagos.kernels.cache_write import CacheWeights, check_pools, widths
from pelagos.kernels.dispatch import contract, select
from pelagos.kernels.layout import CacheLayout, Span

QUERIES = 64  # of one sequence that are scored together


class Entries(NamedTuple):
    """Where the B sequences of a call have the entries of one ratio, and which of its windows are to be written."""

    base: Tensor  # (B,) int32 row of `Keys.codes` of a sequence's first entry
    counts: Tensor  # (B,) int32 entries that its last token sees
    seen: Tensor  # (T,) int32 entries that a token sees
    ends: Tensor  # (N,) int32 rows at which a window ends that is not there already
    total: int
    most: int


class Prompt(NamedTuple):
    """The T rows of a call, none of them padding, spans behind each other; what all its layers share."""

    rows: Rows
    end: Tensor  # (T,) int32 position behind its span
    start: Tensor  # (B,) int32 first position of a span
    slot: Tensor  # (B,) int32
    window: Tensor  # (B,) int32 row of `Keys.main` of position start - sliding_window + 1
    windows: int  # rows of all windows; entries follow
    entries: dict[int, Entries]  # by ratio
    blocks: Tensor  # (N, 3) int32 queries that are scored together: first row, rows, sequence


class Keys(NamedTuple):
    """Decoded rows that a call attends: windows, then entries; index keys as E4M3 codes of value / scale."""

    main: Tensor  # (R, C) bfloat16
    codes: Tensor | None  # (E, D) uint8
    scales: Tensor | None  # (E,) float32


def prompt(spans: Sequence[Span], layout: CacheLayout, device: torch.device | str) -> Prompt:
    """Describe a call over spans; one copy to the device."""
    lengths = np.array([len(span.tokens) for span in spans])
    start, slot, frozen = (np.array([getattr(span, name) for span in spans]) for name in ("start", "slot", "frozen"))
    owner = np.arange(len(spans)).repeat(lengths)
    begin = lengths.cumsum() - lengths
    positions = np.arange(lengths.sum()) - begin.repeat(lengths) + start.repeat(lengths)
    table = np.zeros((len(spans), max(len(span.pages) for span in spans)), np.int32)
    for row, span in zip(table, spans, strict=True):
        row[: len(span.pages)] = span.pages
    sizes = lengths + layout.config.sliding_window - 1
    blocks = [(b + i, min(QUERIES, n - i), j) for j, (b, n) in enumerate(zip(begin, lengths, strict=True))
              for i in range(0, n, QUERIES)]  # fmt: skip
    parts = [positions, slot[owner], start[owner], owner, table, frozen[owner], (start + lengths)[owner], start, slot,
             sizes.cumsum() - sizes, np.array(blocks)]  # fmt: skip
    ratios = sorted({ratio for ratio in layout.config.layer_ratios if ratio})
    for ratio in ratios:
        count = (start + lengths) // ratio
        ends = np.flatnonzero(((positions + 1) % ratio == 0) & (positions >= frozen[owner]))
        parts += [count.cumsum() - count, count, (positions + 1) // ratio, ends]
    flat = torch.from_numpy(np.concatenate([each.ravel() for each in parts]).astype(np.int32)).to(device)
    found = [each.view(part.shape) for each, part in zip(flat.split([p.size for p in parts]), parts, strict=True)]
    entries = {}
    for at, ratio in zip(range(11, len(parts), 4), ratios, strict=True):
        entries[ratio] = Entries(*found[at : at + 4], total=int(parts[at + 1].sum()), most=int(parts[at + 1].max()))
    end, start, slot, window = found[6:10]
    return Prompt(Rows(*found[:6]), end, start, slot, window, int(sizes.sum()), entries, found[10])


def cache_write(
    first: Tensor, wide: Tensor | None, call: Prompt, layout: CacheLayout, layer: int, pages: Tensor, slots: Tensor,
    weights: CacheWeights, turn: Tensor, entry_turn: Tensor | None,
) -> Keys:  # fmt: skip
    """Write what a prompt's rows leave in pages and slots, as `cache_write.cache_write` does; return what they attend.

    first (T, q_lora + C) bfloat16 and wide (T, >= the rest of `widths`) float32 are products of the normed input; turn
    and entry_turn as there. Raises ConfigError for other shapes. Source: inference/model.py Attention, Compressor.
    """
    config, place, tokens = layout.config, layout.layers[layer], len(call.rows.positions)
    latent, width, *rest = widths(config, place.ratio)
    half = config.qk_rope_head_dim // 2
    if layout.mode != "released":
        raise ConfigError(f"prefill_cache: layout of mode {layout.mode!r}, expected released")
    if rest and (wide is None or wide.dtype != torch.float32 or len(wide) != tokens or wide.shape[1] < sum(rest)):
        raise ConfigError(f"prefill_cache: wide is {wide if wide is None else tuple(wide.shape)}, expected float32 "
                          f"({tokens}, >= {sum(rest)})")  # fmt: skip
    if place.ratio and entry_turn is None:
        raise ConfigError("prefill_cache: entry_turn is None, expected one for a layer with a compressor")
    turns = {"turn": (turn, (tokens, 2, half)), "entry_turn": (entry_turn, (tokens, 2, half))}
    contract("prefill_cache", {"first": (first, (tokens, latent + width), torch.bfloat16), **turns})
    check_pools(call.rows, layout, pages, slots)
    inputs = (first, wide, call, layout, layer, pages, slots, weights, turn, entry_turn)
    return Keys(*select("prefill_cache", first).cache_write(*inputs))
