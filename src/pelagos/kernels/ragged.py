"""Where the tokens of a ragged batch of spans lie and what each of them attends: index arrays, made once a forward.

Queries are cut into blocks at a grid of absolute positions and window keys come in one tile a block, so that the tile
of a query depends on its position alone. Source: technical report 6.1; docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pelagos.config import ModelConfig
from pelagos.kernels.layout import OVERLAP_RATIO, CacheLayout, Span
from pelagos.kernels.ref.experts import FEW_ROWS
from pelagos.kernels.ref.tiles import TILE, best, tile_scores
from pelagos.kernels.rows import Rows

TOKENS, TOKENS_ON_CUDA = 1024, 8192  # computed at once; longer calls run in turns, which changes no bit
SPANS = 64  # spans computed at once
QUERIES = 256  # queries attended at once
KEYS = 512  # index keys scored at once, a multiple of TILE
SIZES = (1, 8, TILE)  # queries a block


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks of at most Q consecutive queries; a block with fewer repeats its last one."""

    spans: Tensor  # (B, 1) place of the span in the batch
    slots: Tensor  # (B, 1) its slot
    positions: Tensor  # (B, Q)
    places: Tensor  # (B, Q) in the flat tokens
    rows: Tensor  # (B, K) of the window tile: of the ring if the batch is short, else of the old rows and then the new
    row_mask: Tensor  # (B, Q, K)
    last: int  # the largest position


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of one ratio that a batch completes, N with the last repeated up to a multiple, and their rows."""

    unit: Tensor  # (n, 1) slots of the spans that complete any
    past: Tensor  # (n, keep) ring rows of the positions before those spans
    slots: Tensor  # (N, slots) in the past rows and then the new rows
    hidden: Tensor  # (N, slots, 1) bool: before the sequence
    first: Tensor  # (1, N) first position
    new: Tensor  # (k,) those not frozen, and where they go
    page: Tensor
    row: Tensor


class Batch:
    """What every layer of a forward shares: flat tokens, the last repeated up to a `multiple`, and index arrays."""

    def __init__(self, spans: Sequence[Span], layout: CacheLayout, device: torch.device, multiple: int) -> None:
        self.layout, self.device, self.multiple = layout, device, multiple
        self.window = layout.config.sliding_window
        lengths = np.array([len(span.tokens) for span in spans])
        self.start = np.array([span.start for span in spans])
        self.end = self.start + lengths
        self.begin = np.cumsum(lengths) - lengths
        self.frozen = np.array([span.frozen for span in spans])
        self.total = int(lengths.sum())
        pad = -self.total % multiple
        self.owner = np.repeat(np.arange(len(spans)), lengths)
        positions = np.arange(self.total) + np.repeat(self.start - self.begin, lengths)
        self.slot = self._put([span.slot for span in spans])
        tables = np.zeros((len(spans), max(len(span.pages) for span in spans)), np.int64)
        for table, span in zip(tables, spans, strict=True):
            table[: len(span.pages)] = span.pages
        self.pages = self._put(tables)
        tokens = np.concatenate([span.tokens for span in spans])
        self.ids, self.positions = (  # (1, T)
            self._put(np.pad(each, (0, pad), mode="edge")).unsqueeze(0) for each in (tokens, positions)
        )
        old = (self.start[:, None] - np.arange(self.window, 0, -1)).clip(0) % (self.window + layout.rewind)
        self.old = self._put(old)  # (n, W) ring rows of the positions before every span
        # A ring has room for the rows that a short span takes back, so all that it attends is in the ring at once.
        self.short = int(lengths.max()) <= layout.rewind + 1
        self._order, self._queries = np.zeros(self.total + pad, np.int64), 0
        self.groups = list(self._groups())
        self._order[self.total :] = self._order[self.total - 1]
        self.order = self._put(self._order)  # (T,) place of each token among the queries of all groups
        self._windows: dict[int, Windows | None] = {}
        self._written: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._tiles: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._positions = positions

    def _put(self, values: np.ndarray | list[int]) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(self.device)

    def _groups(self) -> Iterator[Group]:
        blocks = [
            (i, at, min(end, at - at % TILE + TILE))
            for i, (start, end) in enumerate(zip(self.start.tolist(), self.end.tolist(), strict=True))
            for at in (start, *range(start - start % TILE + TILE, end, TILE))
        ]
        for low, size in zip((0, *SIZES), SIZES, strict=False):
            chosen = [block for block in blocks if low < block[2] - block[1] <= size]
            step = max(1, QUERIES // size)
            yield from (self._group(np.array(chosen[i : i + step]), size) for i in range(0, len(chosen), step))

    def _group(self, blocks: np.ndarray, size: int) -> Group:
        span, first, end = blocks.T[:, :, None]
        offset = np.arange(size)[None]
        positions = np.minimum(first + offset, end - 1)
        width = self.window + TILE + -self.window % 16
        keys = first - first % TILE + TILE - width + np.arange(width)[None]  # (B, K)
        back = positions[:, :, None] - keys[:, None]
        mask = (back >= 0) & (back < self.window) & (keys[:, None] >= 0)
        keys = keys.clip(np.maximum(first - self.window + 1, 0), end - 1)
        past, start = len(self.start) * self.window, self.start[span]
        ring = keys % (self.window + self.layout.rewind)
        rows = (
            ring
            if self.short
            else np.where(
                keys < start, span * self.window + keys - start + self.window, past + self.begin[span] + keys - start
            )
        )
        places = self.begin[span] + positions - start
        real = np.flatnonzero(first + offset < end)  # the others are repeated
        self._order[places.ravel()[real]] = self._queries + real
        self._queries += places.size
        spans = self._put(span)
        return Group(
            spans=spans, slots=self.slot[spans], positions=self._put(positions), rows=self._put(rows),
            places=self._put(places), row_mask=torch.from_numpy(mask).to(self.device), last=int(positions.max()),
        )  # fmt: skip

    def written(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return (places in the flat tokens, slots, ring rows), (k,) each, of the tokens that stay in a ring."""
        if rows.count not in self._written:
            stay = np.flatnonzero(self._positions >= self.end[self.owner] - rows.count)
            slots, at = self.slot[self._put(self.owner[stay])], self._put(self._positions[stay] % rows.count)
            self._written[rows.count] = self._put(stay), slots, at
        return self._written[rows.count]

    def tile(self, group: Group, ratio: int, low: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (page, row in it) (B, TILE) of the entries from `low` on, and which are visible (B, Q, TILE)."""
        key = (id(group), ratio, low)
        if key in self._tiles:
            return self._tiles[key]
        visible = (group.positions + 1) // ratio
        index = torch.arange(low, low + TILE, device=self.device)
        page, row = self.entry(group, index.minimum(visible[:, -1:] - 1), self.layout.page_tokens // ratio)
        if low < KEYS:  # what is kept must not grow with the context
            self._tiles[key] = page, row, index < visible.unsqueeze(2)
        return page, row, index < visible.unsqueeze(2)

    def entry(self, group: Group, index: Tensor, per_page: int) -> tuple[Tensor, Tensor]:
        """Return (page, row in it), (B, N) each, of entries `index` (B, N) of each block's sequence.

        A negative index gives any.
        """
        index = index.clamp_min(0)
        return self.pages[group.spans, index // per_page], index % per_page

    def windows(self, ratio: int, overlap: bool) -> Windows | None:
        """Return the windows of a ratio that end within the batch, None if there are none."""
        if ratio not in self._windows:
            self._windows[ratio] = self._find_windows(ratio, overlap)
        return self._windows[ratio]

    def _find_windows(self, ratio: int, overlap: bool) -> Windows | None:
        ends = np.flatnonzero((self._positions + 1) % ratio == 0)
        count = len(ends)
        if count == 0:
            return None
        ends = np.pad(ends, (0, -count % self.multiple), mode="edge")
        span, last = self.owner[ends], self._positions[ends]
        having, rank = np.unique(span, return_inverse=True)
        keep = ratio * (1 + overlap)
        at = last[:, None] - np.arange(keep - 1, -1, -1)  # (N, slots)
        start = self.start[span][:, None]
        slots = np.where(
            at < start,
            rank[:, None] * keep + at - start + keep,
            len(having) * keep + self.begin[span][:, None] + at - start,
        )
        past = (self.start[having][:, None] - np.arange(keep, 0, -1)).clip(0) % (keep + self.layout.rewind)
        new = np.flatnonzero(last[:count] >= self.frozen[span[:count]])
        entry, per_page = last[new] // ratio, self.layout.page_tokens // ratio
        return Windows(
            unit=self.slot[self._put(having)][:, None], past=self._put(past), slots=self._put(slots.clip(0)),
            hidden=torch.from_numpy(at < 0).to(self.device).unsqueeze(-1),
            first=self._put(last - ratio + 1).unsqueeze(0), new=self._put(new),
            page=self.pages[self._put(span[new]), self._put(entry // per_page)], row=self._put(entry % per_page),
        )  # fmt: skip


def select(rows: Tensor, places: Tensor) -> Tensor:
    """Return rows[places] (*places, ...) of rows (R, ...); one copy a row, which indexing is not."""
    return rows.index_select(0, places.flatten()).view(*places.shape, *rows.shape[1:])


def picks_of(
    q: Tensor, weights: Tensor, keys: Rows, group: Group, batch: Batch, visible: Tensor, most: int, topk: int
) -> Tensor:
    """Return the picked entries (B, Q, topk) int64, ascending, then -1 where fewer are visible (B, Q)."""
    scores = q.new_empty((*q.shape[:2], 0), dtype=torch.float32)
    found = visible.new_empty((*q.shape[:2], 0))
    for low in range(0, most, KEYS):
        index = torch.arange(low, min(low + KEYS, most + -most % TILE), device=q.device)
        tile = keys.read(*batch.entry(group, index.minimum(visible[:, -1:] - 1), keys.count)).to(q.dtype)
        fresh = tile_scores(q, tile, weights, multiple=batch.multiple).masked_fill(
            index >= visible.unsqueeze(2), -torch.inf
        )
        scores, found = torch.cat((scores, fresh), 2), torch.cat((found, index.expand(fresh.shape)), 2)
        if scores.shape[2] > topk:
            places = best(scores, topk)
            scores, found = scores.gather(2, places), found.gather(2, places)
    return found.masked_fill(scores == -torch.inf, -1)


def at_once(device: torch.device) -> int:
    """Return how many tokens a forward on a device computes at once."""
    return TOKENS_ON_CUDA if device.type == "cuda" else TOKENS


def turns(spans: Sequence[Span], tokens: int) -> Iterator[list[Span]]:
    """Cut spans into batches of at most `tokens` tokens and SPANS spans that follow one another."""
    part: list[Span] = []
    room = tokens
    for span in spans:
        size, at = len(span.tokens), 0
        while at < size:
            end = min(size, at + room)
            logits, streams = (max(0, min(end - at, wanted - (size - end))) for wanted in (span.logits, span.streams))
            part.append(
                span._replace(tokens=span.tokens[at:end], start=span.start + at, logits=logits, streams=streams)
            )
            room, at = room - (end - at), end
            if room == 0 or len(part) == SPANS:
                yield part
                part, room = [], tokens
    if part:
        yield part


def call_bytes(config: ModelConfig, tokens: int) -> int:
    """Bound of the bytes that a turn of `tokens` tokens takes for a moment in float32."""
    spans = min(tokens, SPANS)
    streams = tokens * config.hc_mult * config.hidden_size * (2 * config.hc_mult + 8)
    heads, width, index_heads = config.num_attention_heads, config.head_dim, config.index_n_heads
    tile, queries = config.sliding_window + TILE + 16, min(QUERIES, 8 * tokens)
    blocks = min(spans + QUERIES // SIZES[1], queries)
    near = 8 * tokens * heads * width + 3 * (spans * config.sliding_window + tokens) * width
    attended = 2 * blocks * tile * width + queries * (heads * (6 * tile + 8 * width) + 3 * TILE * width)
    index = KEYS * (2 * blocks * config.index_head_dim + 4 * queries * index_heads)
    index += queries * KEYS // TILE * index_heads * config.index_head_dim
    pools = [
        8 * (tokens + spans * ratio * (1 + overlap)) * width * (1 + overlap)
        for ratio in config.layer_ratios
        for overlap in (ratio == OVERLAP_RATIO,)
    ]
    rows = tokens * config.num_experts_per_tok + FEW_ROWS * config.n_routed_experts
    experts = rows * (3 * config.hidden_size + 10 * config.moe_intermediate_size)
    head = 2 * tokens * config.vocab_size
    return 4 * (streams + max(near + max(attended + index, *pools), experts, head))
