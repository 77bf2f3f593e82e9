"""The forward on CUDA: prompts by their own kernels, decode and verification of up to 64 rows as one captured graph.

A graph per bucket of rows and kind of context (whether every row sees no more entries than the indexer picks), another
for the draft layer. One copy of a pinned buffer tells a graph its rows; page tables stay on the device. Lengths are
read there, so that one graph serves every context planned for, and no host waits inside.
Source: docs/log/0006-captured-step.md; technical report 2.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pelagos import numerics
from pelagos.errors import CapacityError, ConfigError, RequestError
from pelagos.kernels import cache_write, decode_attention, fp4_experts, indexer, query, router, sampling, skinny_gemm
from pelagos.kernels.batch_rows import Halves, Mixing, Parts, Rows
from pelagos.kernels.layout import CacheLayout, Drawn, Output, Span
from pelagos.kernels.ragged import turns
from pelagos.kernels.ref.norm_rope import rms_norm
from pelagos.kernels.site import site
from pelagos.model.attention import CSA_RATIO, frequencies
from pelagos.model.cuda_prefill import Prefill, prompt_bytes
from pelagos.model.cuda_weights import Fp8, LayerWeights, SiteWeights, Weights

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
KEPT_ROWS = 1  # up to here the merged product writes the cache too
PROMPT_TOKENS = 8192  # of a call of the prompt kernels; longer ones run in turns, which changes no bit
_FIELDS = 5  # ids, positions, slots, first, frozen
_DRAWS = 2 * sampling.FIELDS  # words of 32 bits that say how a row's token is drawn
_NONE = (np.empty((2, 0), np.int64),) * 2  # nothing asked for


# What one site hands to the next: its output, the streams, and how the one enters the others.
_State = tuple[Tensor | Parts | None, Tensor, Tensor | None, Tensor | None]
_Found = tuple[list[Any], list[Any], list[Drawn]]  # what a span gets: rows of logits and of streams, and picks


class _Step(NamedTuple):
    """What all layers of one call share."""

    rows: Rows
    ids: Tensor
    turns: Sequence[Tensor]
    dense: bool  # every visible entry is attended
    chosen: list[Tensor]  # each layer's experts


@dataclass(slots=True)
class _Call:
    """A graph with the tensors it reads and leaves."""

    graph: torch.cuda.CUDAGraph | None
    logits: Tensor
    streams: Tensor
    picks: Tensor  # (T, 2) float64 of `sampling.pick`
    chosen: Tensor | None = None  # (layers, T, K) int32 experts, where they lie in blocks

    def run(self) -> None:
        """Run the graph once more on the rows it was told of."""
        if self.graph is not None:
            self.graph.replay()


class Told(NamedTuple):
    """What N spans say, as arrays: what is cut into calls, and what one rank tells another."""

    fields: np.ndarray  # (9, N) int64: tokens, start, slot, frozen, logits, streams, draws, decode, pages
    tokens: np.ndarray  # (sum of tokens,) int64
    draws: np.ndarray  # (sum of draws, FIELDS) int64 of `sampling.packed`
    pages: Sequence[Any]  # each span's

    def span(self, which: int) -> tuple[Span, np.ndarray]:
        """Return a span without its draws, and those."""
        size, start, slot, frozen, logits, streams, draws, decode, _ = self.fields[:, which].tolist()
        end, last = self.fields[[0, 6], : which + 1].sum(1).tolist()
        tokens = self.tokens[end - size : end]
        span = Span(tokens, start, slot, self.pages[which], frozen, logits, streams, bool(decode))
        return span, self.draws[last - draws : last]

    def news(self, known: Mapping[int, np.ndarray]) -> Told:
        """Leave out pages that are known of a span's slot, the first ones or all."""
        pages = [None if known.get(slot) is own else (first := agreed(known.get(slot), own), own[first:])
                 for slot, own in zip(self.fields[2].tolist(), self.pages, strict=True)]  # fmt: skip
        return self._replace(pages=pages)

    def whole(self, known: Mapping[int, np.ndarray]) -> Told:
        """Undo `news`."""
        pages = [known[slot] if new is None else np.concatenate((known.get(slot, new[1])[: new[0]], new[1]))
                 for slot, new in zip(self.fields[2].tolist(), self.pages, strict=True)]  # fmt: skip
        return self._replace(pages=pages)


def tell(spans: Sequence[Span] | Told) -> Told:
    """Return spans as arrays."""
    if isinstance(spans, Told):
        return spans
    tokens, starts, slots, pages, frozen, logits, streams, decode, draws = zip(*spans, strict=True)
    sizes, drawn, counts = ([*map(len, each)] for each in (tokens, draws, pages))
    fields = np.array([sizes, starts, slots, frozen, logits, streams, drawn, decode, counts], np.int64)
    return Told(fields, np.concatenate(tokens), sampling.packed([draw for each in draws for draw in each]), pages)


class Staged(NamedTuple):
    """A call under way, and what was asked for of its results: spans and rows, (2, N)."""

    call: _Call
    wanted: np.ndarray  # of logits
    kept: np.ndarray  # of streams
    drawn: np.ndarray  # of picks


class CudaForward:
    """One model over two pools on a device, in released mode; implements `engine.runner.Forward`.

    `positions` is the longest context planned for; a page table a row holds as many. Raises ConfigError for a layout of
    another mode or model. On a CPU (tests) the same calls run eagerly through the references.
    """

    draws = two_kinds = True  # prompts have kernels of their own
    ranks, _rank = 1, 0  # that share the rows of a call, and which of them this is
    left = True  # sums go to the launches that read them
    fused = True  # the launch behind a site finishes it, and keeps one row's cache
    _owner: int | None = None  # the only one of several ranks that has rows in a call

    def __init__(self, weights: Weights, layout: CacheLayout, pages: Tensor, slots: Tensor, *, positions: int) -> None:
        if layout.mode != "released" or layout.config != weights.config:
            raise ConfigError(f"captured step: cache layout of mode {layout.mode!r}: expected this model's, released")
        config, device = weights.config, weights.device
        self.weights, self.layout, self.pages, self.slots = weights, layout, pages, slots
        self.weight_bytes = weights.bytes
        self._device, self._cuda = device, device.type == "cuda"
        self._width = layout.pages_for(positions)
        most = BUCKETS[-1]
        size = (_FIELDS + _DRAWS + self.ranks * (self.ranks > 1)) * most
        self._rows = torch.zeros(size, dtype=torch.int32, device=device)
        # Two, so that one call is prepared while another's is on its way, with what says that it has arrived.
        words = [torch.zeros(size, dtype=torch.int32, pin_memory=self._cuda) for _ in range(2)]
        views = [[part.numpy() for part in self._sections(each)] for each in words]
        self._hosts = [*zip(words, views, [torch.cuda.Event() if self._cuda else None for _ in words], strict=True)]
        # Page tables by slot stay on the device: a call brings what is new. Known are those of all ranks.
        self._tables = torch.zeros((len(slots), self._width), dtype=torch.int32, device=device)
        self.known: dict[int, np.ndarray] = {}
        self._past = torch.zeros((most, config.hc_mult, config.hidden_size), dtype=torch.bfloat16, device=device)
        self._arrived = torch.zeros(skinny_gemm.COUNTERS, dtype=torch.int32, device=device)
        self._counts = torch.zeros((most, indexer.COUNTS), dtype=torch.int32, device=device)
        # Angles of rows with plain frequencies, with those of compressed layers, and of the entries of every ratio.
        ratios = sorted({ratio for ratio in config.layer_ratios if ratio})
        self._turns = {kind: at for at, kind in enumerate((0, -1, *ratios))}
        freqs = [frequencies(config, kind != 0, device) for kind in self._turns]
        self._freqs = torch.stack(freqs).unsqueeze(1)  # (N, 1, rope / 2)
        back = [[max(0, kind - 1)] for kind in self._turns]
        self._back = torch.tensor(back, dtype=torch.int32, device=device)
        self.prefill = Prefill(weights, layout, pages, slots)
        self._calls: dict[tuple[int, bool, bool, int | None], _Call] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._cuda else None
        # What the last call chose: its first layer, its rows, and where it is copied to.
        self._routes = torch.empty(
            (config.num_hidden_layers + 1) * most * config.num_experts_per_tok, dtype=torch.int32, pin_memory=self._cuda
        )
        self._routed: tuple[int, int, Tensor] | None = None
        self._left: Mixing | None = None  # by the site before

    @property
    def numeric_path(self) -> str:
        """What decides a logit's last bits besides the weights."""
        name = torch.cuda.get_device_name(self._device) if self._cuda else "cpu"
        return f"captured step {_build()}, torch {torch.__version__} {name} released"

    @property
    def positions(self) -> int:
        """The longest context planned for."""
        return self._width * self.layout.page_tokens

    def scratch_bytes(self, tokens: int) -> int:
        """Bound of what calls take beside weights and pools, static buffers included."""
        rows = bucket_of(min(tokens, BUCKETS[-1]))
        prompt = prompt_bytes(self.layout, min(tokens, PROMPT_TOKENS), self.positions)
        return step_bytes(self.layout, rows, self.positions, len(self.slots)) + prompt

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span] | Told) -> Output:
        """Append the spans' tokens to their sequences; return the logits and streams they ask for, in span order.

        Raises CapacityError for spans longer than planned, RequestError for token ids outside the vocabulary.
        """
        return self._run(tell(spans), None)

    @torch.inference_mode()
    def draft(self, spans: Sequence[Span] | Told, streams: np.ndarray) -> Output:
        """Run the draft layer: tokens are the ids that follow, streams (sum S, n, D) float32 those at its positions.

        Raises ConfigError for a model without one.
        """
        if self.weights.draft is None:
            raise ConfigError("this model has no MTP block (num_nextn_predict_layers=0)")
        return self._run(tell(spans), streams)

    def launch(self, spans: Sequence[Span] | Told, past: np.ndarray | None = None) -> Iterator[Staged]:
        """Start one call after another of those that the spans take; what a call leaves is there until the next one."""
        told, drafts = tell(spans), past is not None
        self._check(told, paged=not drafts)
        if not drafts:
            self._tell_pages(told)
        prepared = (self._prepared(told, *rows, drafts=drafts) for rows in self._calls_of(told, drafts=drafts))
        ready = next(prepared, None)
        while ready is not None:
            staged = self._start(past, *ready)
            ready = next(prepared, None)  # while the device computes
            yield staged

    def _run(self, told: Told, past: np.ndarray | None) -> Output:
        c, found = self.weights.config, self._found(told, past)

        def flat(at: int, *shape: int) -> np.ndarray:
            rows = [row for each in found for row in each[at]]
            return np.stack(rows) if rows else np.empty((0, *shape), np.float32)

        picks = {which: each[2] for which, each in enumerate(found) if each[2]}
        return Output(flat(0, c.vocab_size), flat(1, c.hc_mult, c.hidden_size), picks)

    def _found(self, told: Told, past: np.ndarray | None) -> list[_Found]:
        """Run all spans; return what each one gets."""
        found: list[_Found] = [([], [], []) for _ in told.pages]
        if past is None:
            self._prompts(told, found)
        for call, *asked, drawn in self.launch(told, past):
            for at, ((spans, rows), results) in enumerate(zip(asked, (call.logits, call.streams), strict=True)):
                if len(rows):
                    values = results.index_select(0, torch.from_numpy(rows).to(self._device)).float().cpu().numpy()
                    for which, value in zip(spans.tolist(), values, strict=True):
                        found[which][at].append(value)
            if drawn.size:
                values = call.picks.tolist()
                for which, row in drawn.T.tolist():
                    found[which][2].append(Drawn(int(values[row][0]), values[row][1]))
        return found

    def _prompts(self, told: Told, found: list[_Found]) -> None:
        """Run what was given through the prompt kernels, and hand each span its rows, or what is picked from them."""
        given = {which: told.span(which) for which in np.flatnonzero(told.fields[7] == 0).tolist()}
        if not given:
            return
        self._check(told, paged=True)
        spans = [span for span, _ in given.values()]
        ran = map(self.prefill.run, turns(spans, PROMPT_TOKENS * self.ranks))
        parts = [(logits, streams.float().cpu()) for logits, streams in ran]
        logits, streams = (torch.cat(each) for each in zip(*parts, strict=True))
        cuts = [span.logits for span in spans], [span.streams for span in spans]
        rows = zip(logits.split(cuts[0]), streams.split(cuts[1]), strict=True)
        for (which, (_, draws)), (own, kept) in zip(given.items(), rows, strict=True):
            found[which][1].extend(kept.numpy())
            if len(own) and len(draws):
                picks = sampling.pick(own.float(), torch.from_numpy(draws).to(self._device))
                found[which][2].extend(Drawn(int(token), chance) for token, chance in picks.tolist())
            else:
                found[which][0].extend(own.float().cpu().numpy())

    def _check(self, told: Told, *, paged: bool) -> None:
        """Raise unless all spans are of what was planned for."""
        size, start, slot = told.fields[:3]
        pages, own = -(-(start + size) // self.layout.page_tokens), told.fields[8]
        odd = (pages > (np.minimum(own, self._width) if paged else self._width)) | (slot < 0)
        odd |= slot >= len(self.slots) * self.ranks
        if odd.any():
            which = int(odd.argmax())
            raise CapacityError(
                f"span {which}: slot {slot[which] // self.ranks} of {len(self.slots)}, {pages[which]} pages up to "
                f"{start[which] + size[which]}, of which it has {own[which]} and the step was planned for {self._width}"
            )
        odd = (told.tokens < 0) | (told.tokens >= self.weights.config.vocab_size)
        if odd.any():
            which = int(np.searchsorted(size.cumsum(), odd.argmax(), "right"))
            raise RequestError(f"span {which}: token ids outside 0..{self.weights.config.vocab_size - 1}")

    def _tell_pages(self, told: Told) -> None:
        """Bring what is new of generating sequences' pages to the device."""
        for which, (slot, decode, pages) in enumerate(zip(*told.fields[[2, 7]].tolist(), told.pages, strict=True)):
            known, owner = self.known.get(slot), slot % self.ranks
            if known is pages or not decode:
                continue
            first = agreed(known, pages)
            own, rank = np.divmod(pages[first : self._width], self.ranks)
            if (rank != owner).any():
                raise CapacityError(f"span {which}: slot {slot} is of rank {owner}, a page of it is not")
            if owner == self._rank:
                into = self._tables[slot // self.ranks, first : first + len(own)]
                into.copy_(torch.from_numpy(own), non_blocking=True)
            self.known[slot] = pages

    def _calls_of(self, told: Told, *, drafts: bool) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Cut spans into calls of at most 64 rows of a rank, a sequence's at most what its rings take.

        Of each row its span, its place in that, and that of the span's first row in the call.
        """
        left, rank = told.fields[0] if drafts else told.fields[0] * told.fields[7], told.fields[2] % self.ranks
        done = np.zeros_like(left)
        if len(left) and (left == 1).all() and np.bincount(rank).max() <= BUCKETS[-1]:
            yield np.arange(len(left)), done, done
            return
        while left.any():
            count = np.minimum(left, self.layout.rewind + 1)
            for each in range(self.ranks):
                own = count * (rank == each)
                count -= own - np.minimum(own, np.maximum(0, BUCKETS[-1] - own.cumsum() + own))
            span = np.repeat(np.arange(len(count)), count)
            first = done[span]
            yield span, np.arange(len(span)) - (count.cumsum() - count)[span] + first, first
            left, done = left - count, done + count

    def _divided(
        self, rank: np.ndarray, ids: np.ndarray, everyone: np.ndarray, shared: bool
    ) -> tuple[np.ndarray | slice, np.ndarray, int]:
        """Return which rows of a call are computed here, where all rows' picks will be, and the bucket.

        `rank` is who has a row, `everyone` a place for all ranks' ids; `shared` says that more than picks is asked for.
        """
        return slice(None), np.arange(len(rank)), bucket_of(len(rank))

    def _prepared(
        self, told: Told, span: np.ndarray, place: np.ndarray, first: np.ndarray, /, *, drafts: bool
    ) -> tuple[Any, ...]:
        """Write a call's rows into a host buffer; return what `_start` takes."""
        self._hosts.reverse()
        _, (head, words, everyone), sent = self._hosts[0]
        if sent is not None:
            sent.synchronize()
        size, start, slot, frozen, logits, streams, draws, *_ = told.fields[:, span]
        token = (told.fields[0].cumsum() - told.fields[0])[span] + place
        left, ids, positions = size - place, told.tokens[token], start + place
        asked, kept = left <= logits, left <= streams
        drawn = asked & (draws > 0)
        wanted = asked ^ drawn
        shared = bool((wanted | kept).any())
        own, results, bucket = self._divided(slot % self.ranks, ids, everyone, shared)
        fields = np.array((ids, positions, slot // self.ranks, start + first, frozen))[:, own]
        rows, drawing = fields.shape[1], drawn[own]
        head[:, :rows], head[:, rows:], head[1, rows:], words[:] = fields, 0, -1, 0
        words[:rows][drawing] = told.draws[(told.fields[6].cumsum()[span] - left)[own][drawing]]
        dense = drafts or int(positions.max() + 1) // CSA_RATIO <= self.weights.config.index_topk
        more = [np.array((span[own], np.arange(rows)))[:, each[own]] for each in (wanted, kept)] if shared else _NONE
        return bucket, dense, token[own], (*more, np.array((span, results))[:, drawn])

    def _start(
        self, past: np.ndarray | None, bucket: int, dense: bool, tokens: np.ndarray, asked: tuple[np.ndarray, ...], /
    ) -> Staged:
        """Tell one graph the rows of the host buffer and run it, captured at its first use."""
        drafts = past is not None
        if self.weights.blocks is not None:
            self._learn()
        if past is not None:
            self._past[: len(tokens)] = torch.from_numpy(past[tokens]).to(self._device, torch.bfloat16)
        key = (bucket, dense, drafts, self._owner)
        if self._cuda and key not in self._calls:
            self._calls[key] = self._capture(bucket, dense, drafts)
        self._rows.copy_(self._hosts[0][0], non_blocking=True)
        if (sent := self._hosts[0][2]) is not None:
            sent.record()
        call = self._calls[key] if self._cuda else _Call(None, *self._step(bucket, dense, drafts))
        call.run()
        if call.chosen is not None:
            into = self._routes[: call.chosen.numel()].view_as(call.chosen)
            into.copy_(call.chosen, non_blocking=True)
            self._routed = len(self.weights.layers) if drafts else 0, len(tokens), into
        return Staged(call, *asked)

    def _sections(self, words: Tensor) -> tuple[Tensor, ...]:
        """Views of a buffer: rows' fields (5, 64), their draws (64, FIELDS) int64, and all ranks' ids."""
        most = BUCKETS[-1]
        head, draws, everyone = words.split((_FIELDS * most, _DRAWS * most, len(words) - (_FIELDS + _DRAWS) * most))
        return head.view(_FIELDS, -1), draws.view(torch.int64).view(-1, sampling.FIELDS), everyone

    def _learn(self) -> None:
        """Between two calls tell the blocks of experts what the last one chose, and let them change places."""
        assert self.weights.blocks is not None
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        if self._routed is not None:
            first, rows, chosen = self._routed
            self.weights.blocks.note(first, chosen[:, :rows].numpy())
        self._routed = None
        self.weights.blocks.turn()

    def _capture(self, bucket: int, dense: bool, drafts: bool) -> _Call:
        self._rows.zero_()
        self._rows[BUCKETS[-1] : 2 * BUCKETS[-1]] = -1  # the first run, which compiles, must write nothing
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(bucket, dense, drafts)
        torch.cuda.synchronize()
        # Threads that copy beside the steps may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            results = self._step(bucket, dense, drafts)
        return _Call(graph, *results)

    def _step(self, bucket: int, dense: bool, drafts: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Compute logits (T, V) float32, streams (T, n, D) and picks (T, 2) of the static buffer's rows, and routes."""
        head, draws, _ = self._sections(self._rows)
        ids, positions, slots, first, frozen = head[:, :bucket].unbind(0)
        rows = Rows(positions, slots, first, slots, self._tables, frozen)
        turns = query.angles(positions - self._back, self._freqs).unbind(0)
        weights, config = self.weights, self.weights.config
        embedded = weights.embed.index_select(0, ids)
        if drafts:
            assert weights.draft is not None
            streams, head_site = self._enter(embedded, bucket), weights.draft.head_site
            layers = [(config.num_hidden_layers, weights.draft.layer)]
        else:
            streams = embedded.unsqueeze(1).repeat(1, config.hc_mult, 1)
            layers, head_site = list(enumerate(weights.layers)), weights.head_site
        state, step = (None, streams, None, None), _Step(rows, ids, turns, dense, [])
        for index, layer in layers:
            state = self._layer(state, index, layer, step)
        streams, _, _, normed, _, _ = self._site(state, head_site)
        logits = skinny_gemm.merged(None, None, normed, None, None, weights.head, self._arrived)
        picks = sampling.pick(logits, draws[:bucket])
        return logits, streams, picks, None if weights.blocks is None else torch.stack(step.chosen)

    def _site(self, state: _State, weights: SiteWeights) -> tuple[Tensor, ...]:
        c = self.weights.config
        options = {"iters": c.hc_sinkhorn_iters, "eps": c.hc_eps, "norm_eps": c.rms_norm_eps}
        found = site(*state, *weights, **options, leave=self.fused, arrived=self._arrived)
        self._left = found[6] if self.fused else None
        return found[:6]

    def _layer(self, state: _State, index: int, layer: LayerWeights, step: _Step) -> _State:
        streams, post, comb, *x = self._site(state, layer.attn_site)
        y = self._output(index, layer, self._attend(index, layer, step, *x))
        streams, post, comb, *x = self._site((y, streams, post, comb), layer.ffn_site)
        return self._mixture(layer, step, *x), streams, post, comb

    def _attend(
        self, index: int, layer: LayerWeights, step: _Step, normed: Tensor, codes: Tensor, scales: Tensor
    ) -> Tensor | Halves:
        """Write what the rows leave in the cache; return what they attend (T, H * C) bfloat16."""
        c, layout, arrived = self.weights.config, self.layout, self._arrived
        rows, turn = step.rows, step.turns[self._turns[-1 if layer.ratio else 0]]
        entry_turn = step.turns[self._turns[layer.ratio]] if layer.ratio else None
        pools = (layout, index, self.pages, self.slots)
        cache = (rows, *pools, layer.cache, turn, entry_turn)
        more = (layer.first_wide, arrived, self._left)
        if self.fused and len(normed) <= KEPT_ROWS:
            found = skinny_gemm.kept(codes, scales, normed, *layer.first, *more, cache)
        else:
            found = cache_write.cache_write(skinny_gemm.merged(codes, scales, normed, *layer.first, *more), *cache)
        codes, scales, head_weights = found
        index_shape = (c.index_n_heads, c.index_head_dim) if layer.ratio == CSA_RATIO else (0, 0)
        q, index_q, norm_eps = self._queries(codes, scales, layer, turn, index_shape)
        picks, most = None, self.positions // layer.ratio if layer.ratio else 0
        if layer.ratio == CSA_RATIO:
            if step.dense:
                most = min(most, c.index_topk)
            else:
                assert index_q is not None
                assert head_weights is not None
                picks = indexer.pick(index_q, head_weights, rows, layout, index, self.pages, self._counts, most)
        options = {"whole": not self.left, "arrived": arrived, "norm_eps": norm_eps}
        return decode_attention.attend(q, rows, *pools, layer.sink, picks, turn, most, **options)

    def _queries(
        self, codes: Tensor, scales: Tensor, layer: LayerWeights, turn: Tensor, index_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None, float | None]:
        """Return q (T, H, C), index queries, and the epsilon of the norm that q still lacks."""
        c = self.weights.config
        shape = (c.num_attention_heads, c.head_dim)
        if not self._cuda:
            product = skinny_gemm.product(codes, scales, *layer.second, self._arrived)
            return *query.query(product, turn, *shape, *index_shape, eps=c.rms_norm_eps), None
        from pelagos.kernels.triton import query as kernel
        from pelagos.kernels.triton.skinny_gemm import queried

        if index_shape[0]:
            found = queried(codes, scales, *layer.second, turn, *index_shape)
            if found is not None:
                return found[0].unflatten(1, shape), found[1], c.rms_norm_eps
        product = skinny_gemm.product(codes, scales, *layer.second, self._arrived)
        found = kernel.forward(product, turn, *shape, *index_shape, eps=c.rms_norm_eps, index_only=True)
        return *found, c.rms_norm_eps

    def _output(self, index: int, layer: LayerWeights, attended: Tensor | Halves) -> Tensor | Parts:
        """Return the attention's output (T, D) bfloat16."""
        rows = attended if isinstance(attended, Halves) else (attended, None)
        own = skinny_gemm.quantised_product(*rows, *layer.wo_a, self._arrived, groups=self.weights.config.o_groups)
        # Of several ranks whoever attends rows of its own has its own site behind them.
        product = skinny_gemm.left_product if self.left or self.ranks > 1 else skinny_gemm.product
        return product(*own, *layer.wo_b, self._arrived)

    def _mixture(
        self, layer: LayerWeights, step: _Step, normed: Tensor, codes: Tensor, scales: Tensor
    ) -> Tensor | Parts:
        """Return the expert site's output (T, D) bfloat16."""
        c = self.weights.config
        routed = router.route(
            normed, codes, scales, layer.gate, layer.bias, layer.table, step.ids, *layer.shared13, self._arrived,
            experts=c.n_routed_experts, picks=c.num_experts_per_tok, scaling=c.routed_scaling_factor, left=self._left,
        )  # fmt: skip
        step.chosen.append(routed.chosen)  # kept, so that the graph gives its memory to nothing else
        return fp4_experts.site(
            codes, scales, routed, *layer.w13, *layer.w2, *layer.shared2, float(c.swiglu_limit), layer.place, self.left,
            self._arrived,
        )  # fmt: skip

    def _enter(self, embedded: Tensor, bucket: int) -> Tensor:
        """Join next-token embeddings (T, D) with the backbone's streams: (T, n, D)."""
        draft, c = self.weights.draft, self.weights.config
        assert draft is not None
        past = rms_norm(self._past[:bucket], draft.hnorm, c.rms_norm_eps).flatten(0, 1)
        own = self._product(rms_norm(embedded, draft.enorm, c.rms_norm_eps), draft.e_proj)
        parts = [self._product(each.contiguous(), draft.h_proj) for each in past.split(skinny_gemm.MAX_ROWS)]
        return own.unsqueeze(1) + torch.cat(parts).unflatten(0, (bucket, c.hc_mult))

    def _product(self, x: Tensor, weight: Fp8) -> Tensor:
        codes, scales = (each.view(torch.uint8) for each in numerics.encode_fp8(x, numerics.ACT_BLOCK))
        return skinny_gemm.product(codes, scales, *weight, self._arrived)


@functools.cache
def _build() -> str:
    """A digest of the compiler's version and of every source that can decide a bit."""
    folder = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    if find_spec("triton") is not None:
        digest.update(version("triton").encode())
    for path in sorted([*(folder.parent / "kernels").rglob("*.py"), *folder.glob("cuda_*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def bucket_of(rows: int) -> int:
    """Return the least bucket that holds so many rows."""
    return next(bucket for bucket in BUCKETS if bucket >= rows)


def agreed(known: np.ndarray | None, pages: np.ndarray) -> int:
    """Return how many of a sequence's pages are those that were known before."""
    if known is None or not (least := min(len(known), len(pages))):
        return 0
    differ = known[:least] != pages[:least]
    return int(differ.argmax()) if differ.any() else least


def step_bytes(layout: CacheLayout, rows: int, positions: int, slots: int = BUCKETS[-1]) -> int:
    """Bound of a step's bytes beside weights and pools: static buffers and what kernels hold for a moment."""
    c = layout.config
    static = 4 * BUCKETS[-1] * (_FIELDS + _DRAWS + indexer.COUNTS) + 4 * slots * layout.pages_for(positions)
    static += 2 * BUCKETS[-1] * c.hc_mult * c.hidden_size
    picks, inner = c.num_experts_per_tok, c.moe_intermediate_size
    row = 12 * c.vocab_size + 2 * c.hidden_size * (6 * c.hc_mult + 8) + 4 * picks * (4 * inner + 2 * c.hidden_size)
    row += c.num_attention_heads * c.head_dim * 16 + 4 * 40 * c.hidden_size // 128
    return static + rows * row
