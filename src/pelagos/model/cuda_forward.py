"""The forward on CUDA: prompts by their own kernels, decode and verification of up to 64 rows as one captured graph.

A graph per bucket of rows and kind of context (whether every row sees no more entries than the indexer picks), another
for the draft layer. One copy of a pinned buffer tells a graph its rows; it reads lengths on the device, so that one
serves every context planned for, and no host waits inside. Source: docs/log/0006-captured-step.md; technical report 2.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
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
from pelagos.kernels.layout import CacheLayout, Draw, Drawn, Output, Span
from pelagos.kernels.ragged import turns
from pelagos.kernels.ref.norm_rope import rms_norm
from pelagos.kernels.site import site
from pelagos.model.attention import CSA_RATIO, frequencies
from pelagos.model.cuda_prefill import Prefill, prompt_bytes
from pelagos.model.cuda_weights import Fp8, LayerWeights, SiteWeights, Weights

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
KEPT_ROWS = 1  # up to here the merged product writes the cache too
PROMPT_TOKENS = 8192  # of a call of the prompt kernels; longer ones run in turns, which changes no bit
_FIELDS = 6  # ids, positions, slots, first, owner, frozen
_HEAD = (_FIELDS + 2 * sampling.FIELDS) * BUCKETS[-1]  # with the draws, all words of 32 bits


# What one site hands to the next: its output, the streams, and how the one enters the others.
_State = tuple[Tensor | Parts | None, Tensor, Tensor | None, Tensor | None]
_Part = list[tuple[int, int, int]]  # what a call computes: which span, and its rows from begin to end
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


class Staged(NamedTuple):
    """A call under way, and the (span, row) that were asked for: of logits, of streams and of picks."""

    call: _Call
    wanted: list[tuple[int, int]]
    kept: list[tuple[int, int]]
    drawn: list[tuple[int, int]]


class CudaForward:
    """One model over two pools on a device, in released mode; implements `engine.runner.Forward`.

    `positions` is the longest context planned for; a page table a row holds as many. Raises ConfigError for a layout of
    another mode or model. On a CPU (tests) the same calls run eagerly through the references.
    """

    draws = two_kinds = True  # prompts have kernels of their own
    ranks = 1  # that share the rows of a call
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
        size = _HEAD + most * self._width
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=self._cuda)
        self._rows = torch.zeros(size, dtype=torch.int32, device=device)
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
        return step_bytes(self.layout, rows, self.positions) + prompt

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Output:
        """Append the spans' tokens to their sequences; return the logits and streams they ask for, in span order.

        Raises CapacityError for spans longer than planned, RequestError for token ids outside the vocabulary.
        """
        return self._run(spans, None)

    @torch.inference_mode()
    def draft(self, spans: Sequence[Span], streams: np.ndarray) -> Output:
        """Run the draft layer: tokens are the ids that follow, streams (sum S, n, D) float32 those at its positions.

        Raises ConfigError for a model without one.
        """
        if self.weights.draft is None:
            raise ConfigError("this model has no MTP block (num_nextn_predict_layers=0)")
        return self._run(spans, streams)

    def launch(self, spans: Sequence[Span], past: np.ndarray | None = None) -> Iterator[Staged]:
        """Start one call after another of those that the spans take; what a call leaves is there until the next one."""
        begins = list(itertools.accumulate((len(span.tokens) for span in spans), initial=0))
        streams = None if past is None else torch.from_numpy(np.ascontiguousarray(past))
        pages = self._placed(spans)
        for part in self._parts(spans):
            yield self._launch(spans, pages, *self._divided(spans, part), streams, begins)

    def _run(self, spans: Sequence[Span], past: np.ndarray | None) -> Output:
        c, found = self.weights.config, self._found(spans, past)

        def flat(at: int, *shape: int) -> np.ndarray:
            rows = [row for each in found for row in each[at]]
            return np.stack(rows) if rows else np.empty((0, *shape), np.float32)

        picks = {which: each[2] for which, each in enumerate(found) if each[2]}
        return Output(flat(0, c.vocab_size), flat(1, c.hc_mult, c.hidden_size), picks)

    def _found(self, spans: Sequence[Span], past: np.ndarray | None) -> list[_Found]:
        """Run all spans; return what each one gets."""
        found: list[_Found] = [([], [], []) for _ in spans]
        if past is None:
            self._prompts(spans, found)
        decoding = [which for which, span in enumerate(spans) if span.decode or past is not None]
        for call, *asked, drawn in self.launch([spans[which] for which in decoding], past):
            for at, (rows, results) in enumerate(zip(asked, (call.logits, call.streams), strict=True)):
                if rows:
                    index = torch.tensor([row for _, row in rows], device=self._device)
                    values = results.index_select(0, index).float().cpu().numpy()
                    for (which, _), value in zip(rows, values, strict=True):
                        found[decoding[which]][at].append(value)
            if drawn:
                values = call.picks.tolist()
                for which, row in drawn:
                    found[decoding[which]][2].append(Drawn(int(values[row][0]), values[row][1]))
        return found

    def _prompts(self, spans: Sequence[Span], found: list[_Found]) -> None:
        """Run what was given through the prompt kernels, and hand each span its rows, or what is picked from them."""
        given = [(which, span) for which, span in enumerate(spans) if not span.decode]
        self._placed(spans)
        self._checked(spans, [(which, 0, len(span.tokens)) for which, span in given], paged=True)
        parts = [
            (logits, streams.float().cpu())
            for logits, streams in map(self.prefill.run, turns([span for _, span in given], PROMPT_TOKENS * self.ranks))
        ]
        if not parts:
            return
        logits, streams = (torch.cat(each) for each in zip(*parts, strict=True))
        cuts = [span.logits for _, span in given], [span.streams for _, span in given]
        for (which, span), own, kept in zip(given, logits.split(cuts[0]), streams.split(cuts[1]), strict=True):
            found[which][1].extend(kept.numpy())
            if span.logits and span.draws:
                draws = torch.from_numpy(sampling.packed(span.draws)).to(self._device)
                found[which][2].extend(Drawn(int(token), p) for token, p in sampling.pick(own.float(), draws).tolist())
            else:
                found[which][0].extend(own.float().cpu().numpy())

    def _parts(self, spans: Sequence[Span]) -> Iterator[_Part]:
        """Cut spans into calls of (which, begin, end): at most 64 rows, a sequence's at most what its rings take."""
        longest, done = self.layout.rewind + 1, [0] * len(spans)
        left = sum(len(span.tokens) for span in spans)
        while left:
            part: _Part = []
            room = [BUCKETS[-1]] * self.ranks
            for which, span in enumerate(spans):
                owner = span.slot % self.ranks
                count = min(len(span.tokens) - done[which], longest, room[owner])
                if count > 0:
                    part.append((which, done[which], done[which] + count))
                    done[which], room[owner], left = done[which] + count, room[owner] - count, left - count
            yield part

    def _divided(self, spans: Sequence[Span], part: _Part) -> tuple[_Part, int, int]:
        """Return a rank's rows of a call, and the least bucket and last position that all ranks agree on."""
        return part, 1, 0

    def _launch(
        self, spans: Sequence[Span], tables_of: Sequence[np.ndarray], part: _Part, bucket: int, last: int,
        past: Tensor | None, begins: list[int],
    ) -> Staged:  # fmt: skip
        """Tell one graph its rows and run it."""
        if self._cuda:
            torch.cuda.current_stream().synchronize()  # the pinned buffer may still be on its way
        self._learn()
        bucket = max(bucket, bucket_of(sum(end - begin for _, begin, end in part)))
        head, draws, tables = (each.numpy() for each in self._sections(self._host))
        head[:], head[1], draws[:] = 0, -1, 0  # unused places of tables keep old pages
        wanted: list[tuple[int, int]] = []
        drawn: list[tuple[int, int]] = []
        kept: list[tuple[int, int]] = []
        picked: list[tuple[int, Draw]] = []
        ids = self._checked(spans, part, paged=past is None)
        at = 0
        for owner, (which, begin, end) in enumerate(part):
            span = spans[which]
            total, behind = len(span.tokens), at - begin
            pages = min(self.layout.pages_for(span.start + end), len(span.pages))
            tables[owner, :pages] = tables_of[which][:pages]
            asked = range(max(begin, total - span.logits), end)
            (drawn if span.draws else wanted).extend((which, behind + i) for i in asked)
            if span.draws:
                picked += ((behind + i, span.draws[i - total]) for i in asked)
            if span.streams:
                kept += [(which, behind + i) for i in range(max(begin, total - span.streams), end)]
            if past is not None:
                rows = slice(begins[which] + begin, begins[which] + end)
                self._past[at : at + end - begin] = past[rows].to(self._device, torch.bfloat16)
            at += end - begin
        if part:
            own = [spans[which] for which, _, _ in part]
            begin, counts = np.array([(begin, end - begin) for _, begin, end in part]).T
            each = np.array([(span.slot // self.ranks, span.start, 0, span.frozen) for span in own]).T
            each[1] += begin
            each[2] = np.arange(len(part))
            head[0, :at], head[2:, :at] = ids, np.repeat(each, counts, 1)
            head[1, :at] = head[3, :at] + np.arange(at) - np.repeat(np.cumsum(counts) - counts, counts)
            last = max(last, int(head[1, :at].max()) + 1)
        if picked:
            draws[[row for row, _ in picked]] = sampling.packed([draw for _, draw in picked])
        dense = past is not None or last // CSA_RATIO <= self.weights.config.index_topk
        call = self._replay(bucket, dense, past is not None)
        if call.chosen is not None:
            into = self._routes[: call.chosen.numel()].view_as(call.chosen)
            into.copy_(call.chosen, non_blocking=True)
            self._routed = 0 if past is None else len(self.weights.layers), at, into
        return Staged(call, wanted, kept, drawn)

    def _sections(self, words: Tensor) -> tuple[Tensor, ...]:
        """Views of a buffer: rows' fields (6, 64), their draws (64, FIELDS) int64, page tables (64, P)."""
        head, draws, tables = words.split((_FIELDS * BUCKETS[-1], _HEAD - _FIELDS * BUCKETS[-1], len(words) - _HEAD))
        return head.view(_FIELDS, -1), draws.view(torch.int64).view(-1, sampling.FIELDS), tables.view(-1, self._width)

    def _learn(self) -> None:
        """Between two calls tell the blocks of experts what the last one chose, and let them change places."""
        if self.weights.blocks is not None:
            if self._routed is not None:
                first, rows, chosen = self._routed
                self.weights.blocks.note(first, chosen[:, :rows].numpy())
            self._routed = None
            self.weights.blocks.turn()

    def _placed(self, spans: Sequence[Span]) -> Sequence[np.ndarray]:
        """Return spans' pages as the rank numbers them that has them; CapacityError for those it does not have."""
        return [span.pages for span in spans]

    def _checked(self, spans: Sequence[Span], part: _Part, *, paged: bool) -> np.ndarray:
        """Return the token ids of a call's rows, all of which were planned for."""
        vocabulary, ids = self.weights.config.vocab_size, [spans[which].tokens[begin:end] for which, begin, end in part]
        for which, _, end in part:
            span = spans[which]
            pages, slot = self.layout.pages_for(span.start + end), span.slot // self.ranks
            if pages > self._width or (paged and pages > len(span.pages)) or not 0 <= slot < len(self.slots):
                raise CapacityError(
                    f"span {which}: slot {slot} of {len(self.slots)}, {pages} pages for positions up to "
                    f"{span.start + end}, of which it has {len(span.pages)} and the step was planned for {self._width}"
                )
        found = np.concatenate(ids) if ids else np.empty(0, np.int64)
        if len(found) and not 0 <= found.min() <= found.max() < vocabulary:
            odd = next(at for at, own in enumerate(ids) if own.min() < 0 or own.max() >= vocabulary)
            raise RequestError(f"span {part[odd][0]}: token ids outside 0..{vocabulary - 1}")
        return found

    def _replay(self, bucket: int, dense: bool, drafts: bool) -> _Call:
        """Run the graph of a bucket on what the host buffer holds, captured at its first use."""
        key, size = (bucket, dense, drafts, self._owner), _HEAD + self._width * bucket
        if self._cuda and key not in self._calls:
            self._calls[key] = self._capture(bucket, dense, drafts)
        self._rows[:size].copy_(self._host[:size], non_blocking=True)
        if not self._cuda:
            return _Call(None, *self._step(bucket, dense, drafts))
        self._calls[key].run()
        return self._calls[key]

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
        head, draws, tables = self._sections(self._rows)
        ids, positions, slots, first, owner, frozen = head[:, :bucket].unbind(0)
        rows = Rows(positions, slots, first, owner, tables[:bucket], frozen)
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


def step_bytes(layout: CacheLayout, rows: int, positions: int) -> int:
    """Bound of a step's bytes beside weights and pools: static buffers and what kernels hold for a moment."""
    c = layout.config
    static = 4 * BUCKETS[-1] * (_FIELDS + layout.pages_for(positions) + indexer.COUNTS)
    static += 2 * BUCKETS[-1] * c.hc_mult * c.hidden_size
    picks, inner = c.num_experts_per_tok, c.moe_intermediate_size
    row = 12 * c.vocab_size + 2 * c.hidden_size * (6 * c.hc_mult + 8) + 4 * picks * (4 * inner + 2 * c.hidden_size)
    row += c.num_attention_heads * c.head_dim * 16 + 4 * 40 * c.hidden_size // 128
    return static + rows * row
