"""The forward of a ragged batch of spans over the paged cache: decode, verification and prefill in one call.

Everything a token does alone (norms, projections, hyper-connections, experts, head) runs once over the flat tokens of
all spans, through the modules of the `Transformer`; the attention site runs over blocks of queries cut at a grid of
absolute positions, key tile by key tile. With `exact` a position's logits have the same bits whatever the batch, the
chunks, the pages and the slot: docs/numerics.md says by which rules. Source: technical report 2 and 6.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pelagos.errors import ConfigError
from pelagos.kernels.layout import CacheLayout, Output, Span
from pelagos.kernels.ragged import Batch, Group, at_once, call_bytes, picks_of, select, turns
from pelagos.kernels.ref import hyper_connection as hc
from pelagos.kernels.ref.tiles import TILE, TiledAttention
from pelagos.kernels.rows import LayerRows, Rows
from pelagos.model.attention import Attention, Compressor, Indexer, Step, Table
from pelagos.model.decode import Decoder
from pelagos.model.exactness import exact_rows, keeps_rows
from pelagos.model.streaming import store_of
from pelagos.model.transformer import Block, Collapse, MTPBlock, Transformer

FEW, SHORT = 32, 4  # tokens, and of one span, that the decoder takes faster than the batch does


class _Batch(Batch):
    """A ragged batch and what the modules share of it."""

    def __init__(self, spans: Sequence[Span], layout: CacheLayout, device: torch.device, multiple: int) -> None:
        super().__init__(spans, layout, device, multiple)
        self.step = Step(layout.config, self.ids, 0, self.positions)
        self._tables: dict[int, Table] = {}

    def entry_table(self, ratio: int, first: Tensor) -> Table:
        """Rotary table of the entries of one ratio, whose windows begin at `first` (1, N)."""
        if ratio not in self._tables:
            self._tables[ratio] = self.step.table_at(first, True)
        return self._tables[ratio]


class PagedForward:
    """One model over two pools: pages (num_pages, page_bytes), slots (num_slots, slot_bytes) uint8, zeroed at first.

    `exact` keeps a position's bits independent of its company; where the `Decoder` covers the model and keeps its rows'
    bits here, generated tokens are then its alone (`two_kinds`). The model's device is where it computes and where the
    pools lie. Raises ConfigError for pools or a mode that the layout does not fit,
    and with `exact` where the library's products depend on their company (`exactness.exact_rows`).
    """

    draws = False

    def __init__(
        self, model: Transformer, layout: CacheLayout, pages: Tensor, slots: Tensor, *, exact: bool = True
    ) -> None:
        device = model.embed.weight.device
        for name, pool, size in (("pages", pages, layout.page_bytes), ("slots", slots, layout.slot_bytes)):
            if pool.dim() != 2 or pool.shape[1] != size or pool.dtype != torch.uint8 or pool.device != device:
                raise ConfigError(
                    f"{name}: expected uint8 (number, {size}) on {device}, got {pool.dtype} {tuple(pool.shape)} on "
                    f"{pool.device}; build the pools from the same CacheLayout"
                )
        if layout.mode != model.mode or layout.config != model.config:
            raise ConfigError(
                f"cache layout of mode {layout.mode!r} for a {model.mode!r} model: expected one of this model"
            )
        self._multiple = exact_rows(model) if exact else 1
        self.model, self.layout, self.exact, self._at_once = model, layout, exact, at_once(device)
        self._layers = [LayerRows(layout, index, pages, slots) for index in range(len(layout.layers))]
        self._decoder = None
        if Decoder.covers(model):
            with torch.inference_mode(model.embed.weight.is_inference()), torch.no_grad():
                self._decoder = Decoder(model, self._layers, layout)
        self.two_kinds = exact and self._decoder is not None and keeps_rows(self._decoder, pages, slots)
        self._store = store_of(model)
        gates = [block.ffn.gate for block in model.blocks]
        self._tables = {i: gate.tid2eid.numpy() for i, gate in enumerate(gates) if gate.tid2eid is not None}
        self.weight_bytes = 0 if self._store is None else sum(each.nbytes for each in self._store.stacked[1:])

    def scratch_bytes(self, tokens: int) -> int:
        """Bound of the bytes that a call over `tokens` tokens takes for a moment; calls of any length need no more."""
        return call_bytes(self.model.config, min(tokens, self._at_once)) * (2 if self.model.mode == "released" else 1)

    @property
    def numeric_path(self) -> str:
        """Name what decides a logit's last bits besides the weights: device, library, carrier, number mode."""
        device, model = self.model.embed.weight.device, self.model
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        kind = f"{torch.get_num_threads()} threads {f'exact {self._multiple} rows' if self.exact else 'fast'}"
        rows = f" numpy {np.__version__}" if self.two_kinds else ""
        return f"torch {torch.__version__}{rows} {device.type} {name} {model.carrier} {model.mode} {kind}"

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Output:
        """Append the spans' tokens to their sequences; return the logits and streams they ask for, in span order."""
        sizes = [len(span.tokens) for span in spans]
        few = not self.exact and sum(sizes) <= FEW and max(sizes) <= max(SHORT, self.layout.rewind + 1)
        kinds = [self._decoder is not None and (few or (self.two_kinds and span.decode)) for span in spans]
        order = sorted(range(len(spans)), key=kinds.__getitem__)
        ordered = [spans[which] for which in order]
        outputs = [self._backbone(part) for part in turns(ordered[: kinds.count(False)], self._at_once)]
        if self._decoder is not None and any(kinds):
            self._read_ahead(generated := ordered[kinds.count(False) :])
            outputs.append(self._decoder.forward(generated))
        output = _joined(outputs)
        if len(set(kinds)) == 1:
            return output
        back = np.argsort(order)
        ends = np.cumsum([(span.logits, span.streams) for span in ordered], 0)[:-1].T
        logits, streams = (np.split(rows, cuts) for rows, cuts in zip(output[:2], ends, strict=True))
        return _joined([Output(logits[which], streams[which]) for which in back])

    @torch.inference_mode()
    def draft(self, spans: Sequence[Span], streams: np.ndarray) -> Output:
        """Run the MTP block: tokens are the NEXT ids, streams (sum S, n, D) float32 those before them.

        Writes only the draft layer's window. Raises ConfigError for a model without an MTP block.
        """
        if not len(self.model.mtp):
            raise ConfigError("this model has no MTP block (num_nextn_predict_layers=0)")
        outputs, at = [], 0
        for part in turns(spans, self._at_once):
            size = sum(len(span.tokens) for span in part)
            outputs.append(self._draft(part, streams[at : at + size]))
            at += size
        return _joined(outputs)

    def _batch(self, spans: Sequence[Span]) -> _Batch:
        return _Batch(spans, self.layout, self.model.embed.weight.device, self._multiple)

    def _backbone(self, spans: Sequence[Span]) -> Output:
        batch, model = self._batch(spans), self.model
        self._read_ahead(spans)
        embedded = model.embed(batch.step.ids).to(model.carrier)
        streams = embedded.unsqueeze(2).repeat(1, 1, self.layout.config.hc_mult, 1)
        for block, rows in zip(model.blocks, self._layers, strict=False):
            streams = self._block(block, streams, rows, batch)
        return self._output(model, streams[0], spans)

    def _read_ahead(self, spans: Sequence[Span]) -> None:
        if self._store is not None:
            self._store.stacked[0].begin(self._tables, np.concatenate([span.tokens for span in spans]))

    def _draft(self, spans: Sequence[Span], streams: np.ndarray) -> Output:
        batch, model, block = self._batch(spans), self.model, self.model.mtp[0]
        assert isinstance(block, MTPBlock)
        past = functional.pad(torch.tensor(streams), (0, 0, 0, 0, 0, batch.step.length - batch.total))
        past = past.to(batch.device, model.carrier).unsqueeze(0)
        entered = block.enter(model.embed(batch.step.ids).to(model.carrier), past)
        return self._output(block, self._block(block, entered, self._layers[-1], batch)[0], spans)

    def _output(self, head: Collapse, streams: Tensor, spans: Sequence[Span]) -> Output:
        """Return what spans ask for of streams (T, n, D)."""
        ends = np.cumsum([len(span.tokens) for span in spans])
        wanted = [np.arange(end - span.logits, end) for span, end in zip(spans, ends, strict=True)]
        kept = [np.arange(end - span.streams, end) for span, end in zip(spans, ends, strict=True)]
        rows, rest = (torch.from_numpy(np.concatenate(each)).to(streams.device) for each in (wanted, kept))
        logits = streams.new_empty((0, self.layout.config.vocab_size))
        if count := len(rows):
            rows = functional.pad(rows, (0, -count % self._multiple))
            logits = self.model.logits(head.collapse(streams[rows].unsqueeze(0), self.layout.config))[0, :count]
        return Output(logits.float().cpu().numpy(), streams[rest].float().cpu().numpy())

    def _block(self, block: Block, streams: Tensor, rows: LayerRows, batch: _Batch) -> Tensor:
        """Return the streams (1, T, n, D) after a layer."""
        x, post, comb = block.site_input(streams, "attn", None)
        streams = hc.hc_post(self._attention(block.attn, block.attn_norm(x), rows, batch), streams, post, comb)
        return block.expert_site(streams, batch.step.ids, None, self._multiple)

    def _attention(self, attn: Attention, x: Tensor, rows: LayerRows, batch: _Batch) -> Tensor:
        """Return the site's output (1, T, D) for x (1, T, D); writes the window ring, tails and entries."""
        step, indexer = batch.step, attn.indexer
        latent, q, kv = attn.inputs(x, step)
        keys = _window_rows(kv[0, : batch.total], rows.window, batch)
        if attn.compressor is not None:
            assert rows.main is not None
            assert rows.main_tail is not None
            _append(attn.compressor, x, rows.main_tail, rows.main, batch, None)
        index_q = None
        if indexer is not None:
            assert rows.index is not None
            assert rows.index_tail is not None
            _append(indexer.compressor, x, rows.index_tail, rows.index, batch, indexer)
            if any((group.last + 1) // rows.ratio > indexer.topk for group in batch.groups):
                index_q = indexer.queries(x, latent, step)
        return attn.output(attended(attn, q[0], keys, rows.main, rows.index, batch, index_q).unsqueeze(0), step)


def attended(
    attn: Attention, q: Tensor, near: Tensor | Rows, main: Rows | None, index: Rows | None, batch: Batch,
    index_q: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Return what queries q (T, H, C) of a batch attend, (T, H, C): one function for serving and quantised training.

    `near` are window rows as `Group.rows` counts them, or the ring; `main` entries, `index` their keys, of which those
    chosen by `index_q` count where more are visible than the indexer picks (None: all).
    """
    found, wide = [], attn.simulate and q.dtype == torch.float32
    for group in batch.groups:
        tiles = TiledAttention(select(q, group.places), attn.attn_sink, wide=wide, multiple=batch.multiple)
        keys = near.read(group.slots, group.rows) if isinstance(near, Rows) else select(near, group.rows)
        tiles.add(keys, group.row_mask)
        if main is not None:
            _add_entries(tiles, attn, main, index, group, batch, index_q)
        found.append(tiles.result().flatten(0, 1).to(q.dtype))
    out = found[0] if len(found) == 1 else torch.cat(found)
    return out.index_select(0, batch.order)


def _window_rows(kv: Tensor, ring: Rows, batch: _Batch) -> Tensor | Rows:
    """Put new window rows (T, C) into the ring; return the W rows before every span and then the new, as stored.

    A short batch finds all it attends in the ring.
    """
    old = None if batch.short else ring.read(batch.slot[:, None], batch.old)
    parts = ring.encode(kv)
    places, slots, at = batch.written(ring)
    ring.write(slots, at, tuple(part.index_select(0, places) for part in parts))
    return ring if old is None else torch.cat((old.flatten(0, 1), ring.decode(parts)))


def _append(
    compressor: Compressor, x: Tensor, rings: tuple[Rows, Rows], entries: Rows, batch: _Batch, indexer: Indexer | None
) -> None:
    """Put the rows of x (1, T, D) into the tail rings, and the entries they complete into the pages."""
    fresh = [rows[0, : batch.total] for rows in compressor.rows(x, batch.step.positions[0])]
    ratio, overlap = compressor.ratio, compressor.overlap
    windows = batch.windows(ratio, overlap)
    if windows is not None:
        values, scores = (
            select(torch.cat((ring.read(windows.unit, windows.past).flatten(0, 1), new)), windows.slots)
            for ring, new in zip(rings, fresh, strict=True)
        )
        if overlap:
            values, scores = (
                torch.cat((rows[:, :ratio, : compressor.width], rows[:, ratio:, compressor.width :]), 1)
                for rows in (values, scores)
            )
        values = values.masked_fill(windows.hidden, 0).unsqueeze(0)
        scores = scores.masked_fill(windows.hidden, -torch.inf).unsqueeze(0)
        pooled = compressor.pool(values, scores, batch.entry_table(ratio, windows.first), x.dtype)[0]
        if indexer is not None:
            pooled = indexer.prepare(pooled)
        entries.write(windows.page, windows.row, entries.encode(pooled[windows.new]))
    for ring, new in zip(rings, fresh, strict=True):
        places, slots, row = batch.written(ring)
        ring.write(slots, row, (new.index_select(0, places),))


def _add_entries(
    tiles: TiledAttention, attn: Attention, main: Rows, index: Rows | None, group: Group, batch: Batch,
    index_q: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Attend the visible entries, or those picked by the indexer where more are visible than it picks."""
    most, indexer = (group.last + 1) // attn.ratio, attn.indexer
    if indexer is None or index_q is None or most <= indexer.topk:
        for low in range(0, most, TILE):
            page, row, mask = batch.tile(group, attn.ratio, low)
            tiles.add(main.read(page, row), mask)
        return
    assert index is not None
    visible = (group.positions + 1) // attn.ratio  # (B, Q)
    q, weights = (select(part[0], group.places) for part in index_q)
    picks = picks_of(q, weights, index, group, batch, visible, most, indexer.topk)
    picks = functional.pad(picks, (0, -picks.shape[2] % TILE), value=-1)
    for tile in picks.split(TILE, 2):
        keys = main.read(*batch.entry(group, tile.flatten(1), main.count))
        tiles.add(keys.unflatten(1, tile.shape[1:]), tile >= 0)


def _joined(outputs: list[Output]) -> Output:
    if len(outputs) == 1:
        return outputs[0]
    logits, streams = zip(*(output[:2] for output in outputs), strict=True)
    return Output(np.concatenate(logits), np.concatenate(streams))
