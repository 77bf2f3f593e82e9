"""Where the two cache pools keep what: byte offsets of pages and state slots, and the bytes that matter at a position.

A page holds what `page_tokens` positions leave behind for good (compressed entries and index keys of every layer);
a slot holds one running sequence's window rings and compressor tails. Rows are float32 in `reference` mode and
packed as released in `released` mode: FP8 nope, BF16 rope and scale bytes; FP4 index keys and scale bytes.
Source: technical report 6.1; released cache layouts (584 and 68 bytes for Flash and Pro).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from pelagos.config import ModelConfig
from pelagos.errors import CacheError, ConfigError

PAGE_TOKENS = 128
OVERLAP_RATIO = 4  # the ratio whose windows overlap and whose entries have index keys
_SCALE_BYTES, _SCALED_CHANNELS = 8, 512  # main rows carry 8 scale bytes for every 512 nope channels or part of them
_FP4_GROUP = 32
Bytes = np.ndarray  # uint8


@dataclass(frozen=True, slots=True)
class Section:
    """`rows` rows of one kind: part 0 of all rows from `offset`, then part 1 of all rows; `parts` in bytes a row."""

    offset: int
    rows: int
    width: int  # channels
    parts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole section."""
        return self.rows * sum(self.parts)

    def part(self, index: int) -> int:
        """Byte offset of part `index` of row 0."""
        return self.offset + self.rows * sum(self.parts[:index])


@dataclass(frozen=True, slots=True)
class Tail:
    """The rings of a compressor's projected tokens (kv, and score with ape added), float32, row p % rows."""

    ratio: int
    overlap: bool
    kv: Section
    score: Section

    def first_needed(self, position: int) -> int:
        """The oldest position whose row a window that ends at or after `position` still reads."""
        begin = position - position % self.ratio
        return max(0, begin - self.ratio) if self.overlap else begin


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where one layer lives: entries and index keys in a page, window ring and tails in a slot."""

    ratio: int
    main: Section | None
    index: Section | None
    window: Section
    main_tail: Tail | None
    index_tail: Tail | None


class Draw(NamedTuple):
    """How a token is picked from its logits where nothing but these counts; key is a 64-bit word of seed and position.

    temperature 0 takes the likeliest, top_k 0 keeps all; see `engine.sampler.Sampler`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    key: int = 0


class Drawn(NamedTuple):
    """A picked token, -1 where the logits held NaN or infinity, and the model's own log-probability of it."""

    token: int
    logprob: float


class Span(NamedTuple):
    """Consecutive tokens of one sequence in one forward.

    tokens (S,) int64 from position `start`; `pages` (P,) int32, the page of every page_tokens positions up to the last
    token: the same array says that nothing is new. Entries of windows that end before `frozen` are there already.
    `logits` and `streams` say how many of the last tokens want logits and their final streams. `decode` says that the
    tokens were generated, not given, which matters to a forward of two kinds. With `draws`, one for each of the
    logits, a forward may pick the tokens itself and keep the logits.
    """

    tokens: np.ndarray
    start: int
    slot: int
    pages: np.ndarray
    frozen: int = 0
    logits: int = 1
    streams: int = 0
    decode: bool = False
    draws: tuple[Draw, ...] = ()


class Output(NamedTuple):
    """logits (sum of span.logits, V) and streams (sum of span.streams, n, D), float32.

    `picks` are what the forward picked for spans with draws, by index of span; their logits are then left out.
    """

    logits: np.ndarray
    streams: np.ndarray
    picks: Mapping[int, Sequence[Drawn]] = MappingProxyType({})


@dataclass(frozen=True)
class CacheLayout:
    """The byte plan of one model's pools; `mode` as the model's, `rewind` the drafted tokens a step may take back."""

    config: ModelConfig
    mode: str = "reference"
    rewind: int = 0
    page_tokens: int = field(init=False)
    page_bytes: int = field(init=False)
    slot_bytes: int = field(init=False)
    layers: tuple[LayerPlace, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.mode not in ("reference", "released") or self.rewind < 0:
            raise ConfigError(f"cache layout mode={self.mode!r} rewind={self.rewind}: expected a number mode and >= 0")
        config = self.config
        whole = math.lcm(*(m for m in config.layer_ratios if m))
        tokens = whole * math.ceil(PAGE_TOKENS / whole)
        page = slot = 0
        places = []
        for ratio in (*config.layer_ratios, *(0,) * config.num_nextn_predict_layers):
            main = index = main_tail = index_tail = None
            window = Section(slot, config.sliding_window + self.rewind, config.head_dim, self._main_parts())
            slot += window.size
            if ratio:
                main = Section(page, tokens // ratio, config.head_dim, self._main_parts())
                page += main.size
                main_tail = self._tail(slot, ratio, config.head_dim)
                slot += 2 * main_tail.kv.size
            if ratio == OVERLAP_RATIO:
                index = Section(page, tokens // ratio, config.index_head_dim, self._index_parts())
                page += index.size
                index_tail = self._tail(slot, ratio, config.index_head_dim)
                slot += 2 * index_tail.kv.size
            places.append(LayerPlace(ratio, main, index, window, main_tail, index_tail))
        for name, value in (("page_tokens", tokens), ("page_bytes", page), ("slot_bytes", slot)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "layers", tuple(places))

    def _main_parts(self) -> tuple[int, ...]:
        width, rope = self.config.head_dim, self.config.qk_rope_head_dim
        if self.mode == "reference":
            return (4 * width,)
        return (width - rope + 2 * rope, _SCALE_BYTES * max(1, math.ceil((width - rope) / _SCALED_CHANNELS)))

    def _index_parts(self) -> tuple[int, ...]:
        width = self.config.index_head_dim
        return (4 * width,) if self.mode == "reference" else (math.ceil(width / 2), math.ceil(width / _FP4_GROUP))

    def _tail(self, offset: int, ratio: int, width: int) -> Tail:
        overlap = ratio == OVERLAP_RATIO
        rows, channels = ratio * (1 + overlap) + self.rewind, width * (1 + overlap)
        kv = Section(offset, rows, channels, (4 * channels,))
        return Tail(ratio, overlap, kv, Section(offset + kv.size, rows, channels, (4 * channels,)))

    @property
    def recompute_tokens(self) -> int:
        """Positions before a point whose recomputation restores the window state at it exactly, all layers deep."""
        return (self.config.sliding_window - 1) * self.config.num_hidden_layers

    def pages_for(self, positions: int) -> int:
        """Pages that `positions` positions take."""
        return -(-positions // self.page_tokens)

    def state_runs(self, position: int) -> list[tuple[int, int]]:
        """(offset, length) of the slot bytes that a sequence going on at `position` reads: rings and tails."""
        runs: list[tuple[int, int]] = []
        for place in self.layers:
            runs += _ring_runs(place.window, max(0, position - self.config.sliding_window + 1), position)
            for tail in (place.main_tail, place.index_tail):
                if tail is not None:
                    first = tail.first_needed(position)
                    runs += _ring_runs(tail.kv, first, position) + _ring_runs(tail.score, first, position)
        return runs

    def state_size(self, position: int) -> int:
        """Bytes of `pack_state` at a position, the open page included."""
        part = self.page_bytes if position % self.page_tokens else 0
        return sum(length for _, length in self.state_runs(position)) + part

    def _state(self, slot: Bytes, page: Bytes | None, position: int) -> list[Bytes]:
        """The parts of a slot and an open page that are the state at a position."""
        parts = [slot[offset : offset + length] for offset, length in self.state_runs(position)]
        return [*parts, page] if page is not None and position % self.page_tokens else parts

    def pack_state(self, slot: Bytes, page: Bytes | None, position: int) -> Bytes:
        """Copy out what a sequence needs to go on at `position`: slot (slot_bytes,) uint8, and its open page if any.

        page (page_bytes,) uint8 is the page of `position`, None exactly when the position opens a new one.
        """
        packed = np.concatenate([slot[:0], *self._state(slot, page, position)])
        assert packed.size == self.state_size(position)
        return packed

    def unpack_state(self, packed: Bytes, slot: Bytes, page: Bytes | None, position: int) -> None:
        """Undo `pack_state` into a slot (its other bytes become zero) and an open page.

        Raises CacheError when `packed` has not the size of this position.
        """
        if packed.size != self.state_size(position):
            raise CacheError(
                f"state at position {position}: got {packed.size} bytes, expected {self.state_size(position)}; "
                "it was written by another layout"
            )
        slot[:] = 0
        for part in self._state(slot, page, position):
            part[:], packed = packed[: part.size], packed[part.size :]
        assert packed.size == 0


def _ring_runs(ring: Section, first: int, end: int) -> list[tuple[int, int]]:
    """The bytes of rows first..end-1 of a ring, at most two runs a part."""
    low = first % ring.rows
    upper = min(end - first, ring.rows - low)
    pieces = [(row, count) for row, count in ((low, upper), (0, end - first - upper)) if count > 0]
    return [(ring.part(i) + row * size, n * size) for i, size in enumerate(ring.parts) for row, n in pieces]
