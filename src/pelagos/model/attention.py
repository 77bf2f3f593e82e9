"""The attention site: sliding window, compressor, lightning indexer, sink, grouped output projection.

Source: technical report 2.3; inference/model.py Attention, Compressor, Indexer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from pelagos import numerics
from pelagos.config import ModelConfig
from pelagos.kernels import compressor
from pelagos.kernels.norm_rope import apply_rope, rms_norm
from pelagos.kernels.ref import compress
from pelagos.kernels.ref.attention import sparse_attention, window_mask
from pelagos.kernels.ref.gemm import grouped_projection
from pelagos.kernels.ref.norm_rope import rope_frequencies, rope_table
from pelagos.model.cache import FullSequence, LayerCache
from pelagos.model.layers import Linear, RMSNorm

CSA_RATIO = 4  # the one ratio whose windows overlap and whose entries are picked by the indexer
SCORE_ELEMENTS = 1 << 24  # indexer logits held at once outside training: 64 MB in float32

Table = tuple[Tensor, Tensor]


@dataclass
class Step:
    """What all layers of one forward share: token ids, positions, rotary tables and masks."""

    config: ModelConfig
    ids: Tensor  # (B, S) int64
    start: int  # position of the first token; all sequences of the batch agree
    positions: Tensor  # (B or 1, S) int64, restarting with each packed sample
    segments: Tensor | None = None  # (B, S) int, packed sample of each token
    dense: bool = False  # training before sparsity: every visible entry is attended
    whole: tuple[Tensor, Tensor] | None = None  # positions and segments of the rows that packed samples are a part of
    _tables: dict[bool, Table] = field(default_factory=dict)
    _visible: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _entry_tables: dict[tuple[int, int, int], Table] = field(default_factory=dict)
    _window: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens a sequence in this forward."""
        return self.ids.shape[1]

    @property
    def rows(self) -> tuple[Tensor, Tensor | None]:
        """Positions and segments of whole rows."""
        return self.whole or (self.positions, self.segments)

    def table(self, compressed: bool) -> Table:
        """Rotary table (B or 1, S, width) of this forward's positions; layers with a compressor have their own."""
        if compressed not in self._tables:
            self._tables[compressed] = self.table_at(self.positions, compressed)
        return self._tables[compressed]

    def entry_table(self, ratio: int, begin: int, count: int) -> Table:
        """Rotary table (B or 1, count, width) of entries from `begin`: the position of their window's first token."""
        key = (ratio, begin, count)
        if key not in self._entry_tables:
            if self.segments is not None:
                positions = self.rows[0][:, begin * ratio : (begin + count) * ratio : ratio]
            else:
                positions = torch.arange(begin, begin + count, device=self.ids.device).unsqueeze(0) * ratio
            self._entry_tables[key] = self.table_at(positions, True)
        return self._entry_tables[key]

    def table_at(self, positions: Tensor, compressed: bool) -> Table:
        """Rotary table (..., width) at positions (...)."""
        freqs = frequencies(self.config, compressed, positions.device)
        return rope_table(positions, freqs, max(self.config.head_dim, self.config.index_head_dim))

    def entry_segments(self, ratio: int, begin: int, count: int) -> Tensor | None:
        """(B, count + 1): the packed sample of the entry before `begin` (-2: none) and of `count` from there on."""
        segments = self.rows[1]
        if segments is None:
            return None
        return functional.pad(segments[:, : (begin + count) * ratio : ratio], (1, 0), value=-2)[:, begin:]

    def window_mask(self) -> Tensor:
        """The sliding-window mask, shared by all layers."""
        if self._window is None:
            size, segments = self.config.sliding_window, self.rows[1]
            near = None if segments is None else segments[:, max(0, self.start - size) : self.start + self.length]
            self._window = window_mask(self.start, self.length, size, near, self.ids.device)
        return self._window

    def visible(self, ratio: int, entries: int) -> Tensor:
        """(B or 1, S, M) bool: the entries each query may see."""
        key = (ratio, entries)
        if key not in self._visible:
            mask = compress.visible_entries(self.start, self.length, ratio, entries, self.ids.device).unsqueeze(0)
            segments = self.rows[1]
            if segments is not None and self.segments is not None:
                mask = mask & (segments[:, : entries * ratio : ratio].unsqueeze(1) == self.segments.unsqueeze(2))
            self._visible[key] = mask
        return self._visible[key]


def frequencies(config: ModelConfig, compressed: bool, device: torch.device | None) -> Tensor:
    """Return the rotary frequencies (rope / 2,) float32; layers with a compressor have their own."""
    width, scaling = config.qk_rope_head_dim, config.rope_scaling
    theta = config.compress_rope_theta if compressed else config.rope_theta
    if not compressed or scaling is None:
        return rope_frequencies(width, theta, device=device)
    return rope_frequencies(
        width, theta, factor=scaling.factor, original=scaling.original_max_position_embeddings,
        beta_fast=scaling.beta_fast, beta_slow=scaling.beta_slow, device=device,
    )  # fmt: skip


def last_channels(table: Table, width: int, *, heads: bool = False) -> Table:
    """Cut a rotary table to its last `width` channels, for rows with `heads` before them or without."""
    cos, sin = table[0][..., -width:], table[1][..., -width:]
    return (cos.unsqueeze(-2), sin.unsqueeze(-2)) if heads else (cos, sin)


class Compressor(nn.Module):
    """Pool every `ratio` tokens into one entry (overlapping the previous window when the ratio is 4)."""

    def __init__(self, config: ModelConfig, ratio: int, width: int) -> None:
        super().__init__()
        self.ratio, self.width, self.eps = ratio, width, config.rms_norm_eps
        self.overlap = ratio == CSA_RATIO
        span = width * (1 + self.overlap)
        self.wkv = Linear(config.hidden_size, span, "bf16")
        self.wgate = Linear(config.hidden_size, span, "bf16")
        self.ape = nn.Parameter(torch.empty(ratio, span))
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, cache: LayerCache, name: str) -> Tensor:
        """Append the windows that x (B, S, D) completes; return them (B, N, width), normed and rotated, N >= 0."""
        whole = type(cache) is FullSequence and step.segments is not None
        if whole and x.is_cuda and x.dtype == torch.bfloat16 and torch.is_grad_enabled():
            return self._pool_rows(x, step, step.length // self.ratio)
        kv, score = self.rows(x, torch.arange(step.start, step.start + step.length, device=x.device))
        keep = self.ratio * (1 + self.overlap)
        kv, score = cache.tail(name, kv, score, keep)
        begin = step.start // self.ratio
        count = (step.start + step.length) // self.ratio - begin
        if count == 0:
            return x.new_empty((x.shape[0], 0, self.width))
        first = keep + begin * self.ratio - step.start
        if self.overlap:
            layout = {"dim": self.width, "first": first, "count": count, "ratio": self.ratio}
            values, scores = (compress.overlap_slots(rows, **layout) for rows in (kv, score))
            samples = step.entry_segments(self.ratio, begin, count)
            if samples is not None:  # a window that opens a packed sample has no previous window
                opens = samples[:, 1:] != samples[:, :-1]  # (B, N)
                previous = torch.arange(2 * self.ratio, device=scores.device) < self.ratio
                scores = scores.masked_fill((opens.unsqueeze(-1) & previous).unsqueeze(-1), -torch.inf)
        else:
            span = slice(first, first + count * self.ratio)
            values, scores = (rows[:, span].unflatten(1, (count, self.ratio)) for rows in (kv, score))
        return self.pool(values, scores, step.entry_table(self.ratio, begin, count), x.dtype)

    def _pool_rows(self, x: Tensor, step: Step, count: int) -> Tensor:
        """The same for packed rows in training."""
        samples = step.entry_segments(self.ratio, 0, count)
        assert samples is not None
        weights = (self.wkv.weight, self.wgate.weight, self.ape, samples[:, 1:] != samples[:, :-1])
        pooled = compressor.pool(x, *weights, ratio=self.ratio, width=self.width)
        return apply_rope(self.norm(pooled), last_channels(step.entry_table(self.ratio, 0, count), self.width))

    def rows(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return what tokens x (B, S, D) at positions (S,) leave for pooling: kv and score (B, S, channels) float32."""
        wide = x.float()
        return self.wkv(wide), self.wgate(wide) + self.ape[positions % self.ratio]

    def pool(self, values: Tensor, scores: Tensor, table: Table, dtype: torch.dtype) -> Tensor:
        """Return the entries (B, N, width) in `dtype` of values and scores (B, N, slots, width), normed and rotated."""
        pooled = compress.pool_windows(values, scores).to(dtype)
        return apply_rope(self.norm(pooled), last_channels(table, self.width))


class Indexer(nn.Module):
    """Score compressed entries for each query with a few small heads and pick the best `index_topk`.

    It learns from its own loss alone (technical report 3), so all its inputs are detached.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.width, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width, "fp8")
        self.weights_proj = Linear(config.hidden_size, self.heads, "bf16")
        self.compressor = Compressor(config, CSA_RATIO, self.width)
        self.simulate = False

    def keys(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """Append this forward's index keys; return all of them (B, M, width)."""
        return cache.entries("index", self.prepare(self.compressor(x.detach(), step, cache, "index")))

    def scores(self, x: Tensor, latent: Tensor, keys: Tensor, step: Step) -> Tensor:
        """Return index scores (B, S, M) float32 of attention input x (B, S, D) with query latent (B, S, q_lora)."""
        q, weights = self.queries(x, latent, step)
        return compress.index_scores(q, keys, weights)

    def picks(self, x: Tensor, latent: Tensor, keys: Tensor, step: Step) -> Tensor:
        """Return the entries each query attends, (B, S, min(topk, M)) int64 ascending, -1 where fewer are visible."""
        q, weights = self.queries(x, latent, step)
        visible = step.visible(CSA_RATIO, keys.shape[1])
        chunk = max(1, SCORE_ELEMENTS // (q.shape[0] * self.heads * keys.shape[1]))
        chunks = zip(*(each.split(chunk, 1) for each in (q, weights, visible)), strict=True)
        return torch.cat(
            [
                compress.index_topk(compress.index_scores(part, keys, own), seen, self.topk)
                for part, own, seen in chunks
            ],
            1,
        )

    def queries(self, x: Tensor, latent: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return index queries (B, S, heads, width) and the scaled weights of the heads (B, S, heads)."""
        q = self.wq_b(latent.detach()).unflatten(-1, (self.heads, self.width))
        q = self.prepare(apply_rope(q, last_channels(step.table(True), self.width, heads=True)))
        return q, self.weights_proj(x.detach()) * (self.width**-0.5 * self.heads**-0.5)

    def prepare(self, x: Tensor) -> Tensor:
        """In released mode rotate by Hadamard, then simulate FP4: both sides alike."""
        return numerics.fake_quant_fp4(numerics.hadamard(x)) if self.simulate else x


class Attention(nn.Module):
    """One attention site. The ratio decides its kind: 0 window only, 4 CSA, anything else HCA."""

    def __init__(self, config: ModelConfig, ratio: int) -> None:
        super().__init__()
        self.ratio, self.heads, self.width = ratio, config.num_attention_heads, config.head_dim
        self.nope = config.head_dim - config.qk_rope_head_dim
        self.groups, self.eps, self.window_size = config.o_groups, config.rms_norm_eps, config.sliding_window
        inner = self.heads * self.width
        self.wq_a = Linear(config.hidden_size, config.q_lora_rank, "fp8")
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = Linear(config.q_lora_rank, inner, "fp8")
        self.wkv = Linear(config.hidden_size, self.width, "fp8")
        self.kv_norm = RMSNorm(self.width, config.rms_norm_eps)
        self.attn_sink = nn.Parameter(torch.empty(self.heads))
        self.wo_a = Linear(inner // self.groups, self.groups * config.o_lora_rank, "fp8", simulate_input=False)
        self.wo_b = Linear(self.groups * config.o_lora_rank, config.hidden_size, "fp8")
        self.compressor = Compressor(config, ratio, self.width) if ratio else None
        self.indexer = Indexer(config) if ratio == CSA_RATIO else None
        self.simulate = False

    def forward(self, x: Tensor, step: Step, cache: LayerCache, aux: dict[str, Tensor] | None = None) -> Tensor:
        """Attend x (B, S, D), already normed; return (B, S, D). `aux` collects what losses and traces need."""
        latent, q, kv = self.inputs(x, step)
        rows = cache.window(self._store(kv))
        entries, mask = self._entries(x, latent, step, cache, aux)
        out, weights = self._attend(q, rows, step, entries, mask)
        if aux is not None and weights is not None:
            aux["entry_weights"] = weights
        return self.output(out, step)

    def inputs(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query latent (B, S, q_lora), queries (B, S, H, C) and window rows (B, S, C) of x (B, S, D)."""
        latent = self.q_norm(self.wq_a(x))
        q = rms_norm(self.wq_b(latent).unflatten(-1, (self.heads, self.width)), None, self.eps)
        table = step.table(self.ratio > 0)
        q = apply_rope(q, last_channels(table, self.width, heads=True))
        return latent, q, apply_rope(self.kv_norm(self.wkv(x)), last_channels(table, self.width))

    def _store(self, kv: Tensor) -> Tensor:
        """In released mode the nope channels of whatever is cached pass through FP8, blocks of 64."""
        if not self.simulate:
            return kv
        nope = numerics.fake_quant_fp8(kv[..., : self.nope], numerics.KV_BLOCK)
        return torch.cat((nope, kv[..., self.nope :]), -1)

    def _entries(
        self, x: Tensor, latent: Tensor, step: Step, cache: LayerCache, aux: dict[str, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Append this forward's compressed entries; return those to attend, shared or picked, and their mask."""
        if self.compressor is None:
            return None, None
        entries = cache.entries("main", self._store(self.compressor(x, step, cache, "main")))
        count = entries.shape[1]
        keys = self.indexer.keys(x, step, cache) if self.indexer is not None else None
        if count == 0:
            return None, None
        visible = step.visible(self.ratio, count)
        if self.indexer is None or keys is None:
            return entries, visible
        if aux is not None:
            aux["index_keys"], aux["index_scores"] = keys, (scores := self.indexer.scores(x, latent, keys, step))
            if count <= self.indexer.topk or step.dense:
                return entries, visible
            picks = compress.index_topk(scores.detach(), visible, self.indexer.topk)
            return entries, visible & _picked_mask(picks, count)
        if count <= self.indexer.topk:
            return entries, visible
        picks = self.indexer.picks(x, latent, keys, step)
        index = picks.clamp_min(0).flatten(1).unsqueeze(-1).expand(-1, -1, entries.shape[2])
        return entries.gather(1, index).unflatten(1, picks.shape[1:]), picks >= 0

    def _attend(
        self, q: Tensor, rows: Tensor, step: Step, entries: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend in the carrier; in released mode with a float32 one, sum in float64 and round (see gemm.py)."""
        if not self.simulate or q.dtype != torch.float32:
            return sparse_attention(q, rows, step.window_mask(), entries, mask, self.attn_sink, window=self.window_size)
        wide = None if entries is None else entries.double()
        out, weights = sparse_attention(
            q.double(), rows.double(), step.window_mask(), wide, mask, self.attn_sink, window=self.window_size
        )
        return out.float(), weights

    def output(self, out: Tensor, step: Step) -> Tensor:
        """Turn attended values (B, S, H, C) back; project heads in consecutive groups by slices of wo_a, then wo_b."""
        out = apply_rope(out, last_channels(step.table(self.ratio > 0), self.width, heads=True), inverse=True)
        grouped = out.flatten(2).unflatten(2, (self.groups, -1))  # (B, S, G, H*C/G)
        weight = self.wo_a.effective_weight(out.dtype).unflatten(0, (self.groups, -1))  # (G, R, H*C/G)
        return self.wo_b(grouped_projection(grouped, weight, ordered=self.simulate).flatten(2))


def _picked_mask(picks: Tensor, entries: int) -> Tensor:
    """Turn picks (B, S, K) into (B, S, entries) bool."""
    mask = torch.zeros((*picks.shape[:2], entries + 1), dtype=torch.bool, device=picks.device)
    return mask.scatter(2, picks.where(picks >= 0, entries), True)[..., :entries]
