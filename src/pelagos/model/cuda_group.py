"""The captured step over several GPUs: sequences are divided, experts cut by width.

A sequence's cache is on one rank, that of its slot, and nowhere else. Every expert, routed or shared, is on all ranks,
with a part of its width on each. Where several ranks have rows in a call, each attends its own, with weights of its
own; rows are brought together before the expert site and its partial results summed after it. Where one rank has them
all, the others follow: all carry the streams, the owner attends, and the two products behind the attention are cut by
heads. Prompts: `model.cuda_group_prefill`. Meaning: docs/log/0009-placement.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pelagos.config import ModelConfig
from pelagos.errors import ConfigError
from pelagos.kernels import fp4_experts, router, skinny_gemm
from pelagos.kernels.batch_rows import Halves, Parts, Rows
from pelagos.kernels.layout import CacheLayout, Drawn, Span
from pelagos.kernels.prefill_products import quantise
from pelagos.model.cuda_forward import BUCKETS, PROMPT_TOKENS, CudaForward, Staged, _Call, bucket_of, step_bytes
from pelagos.model.cuda_group_prefill import GroupPrefill, own_span
from pelagos.model.cuda_prefill import prompt_bytes
from pelagos.model.cuda_weights import Fp8, LayerWeights, Weights
from pelagos.model.exchanges import Exchanges
from pelagos.parallel import Group

BLOCK = 128
_EXPERT = re.compile(r"\.ffn\.(experts\.\d+|shared_experts)\.(w[123])\.weight$")


def cut_width(config: ModelConfig, ranks: int) -> ModelConfig:
    """Return the config of one rank's weights; ConfigError where a width has no equal parts of whole blocks."""
    width = config.moe_intermediate_size
    if width % (ranks * BLOCK):
        raise ConfigError(f"moe_intermediate_size={width} in {ranks} parts: expected multiples of {BLOCK} each")
    return dataclasses.replace(config, moe_intermediate_size=width // ranks)


def cut_tensors(tensors: Iterable[tuple[str, Tensor]], rank: int, ranks: int) -> Iterator[tuple[str, Tensor]]:
    """Yield a rank's part of each named tensor: rows of experts' w1 and w3, columns of w2, all of the others."""
    for name, values in tensors:
        found = _EXPERT.search(name)
        yield name, values.chunk(ranks, int(found[2] == "w2"))[rank] if found else values


class GroupForward(CudaForward):
    """`CudaForward` on one of several ranks, all of which are called with the same spans and return the same.

    Slot s of a span is the sequence of rank s % ranks, there slot s // ranks; its pages are numbered alike and have to
    be on the same rank. `pages` and `slots` are those of all ranks (`Group.memory`), alike in size. With `follow`
    ranks without rows help the only one that has any: quicker, but a row's bits then depend on whether others have
    rows too. Raises ConfigError for weights that are not cut.
    """

    left = False  # sums are whole where they are exchanged

    def __init__(
        self, weights: Weights, layout: CacheLayout, pages: Sequence[Tensor], slots: Sequence[Tensor], group: Group, *,
        positions: int, follow: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(weights, layout, pages[group.rank], slots[group.rank], positions=positions)
        self._group, self.ranks, config = group, group.size, weights.config
        widest = max(config.hidden_size, config.num_attention_heads * config.head_dim // group.size)
        self.exchanges = Exchanges(group, 2 * BUCKETS[-1] * widest)
        self.prefill = GroupPrefill(self.prefill, pages, slots, group, PROMPT_TOKENS * group.size)
        self._follow = follow and config.o_groups % group.size == 0
        self._everyone = torch.zeros(  # token ids, rank by rank
            BUCKETS[-1] * group.size, dtype=torch.int32, device=weights.device
        )
        layers = [*weights.layers, *([] if weights.draft is None else [weights.draft.layer])]
        self._halves = [self._cut(layer) for layer in layers] if self._follow else []
        self._owner: int | None = None  # the only rank with rows in the call
        self._by_owner: dict[int | None, dict[tuple[int, bool, bool], _Call]] = {}
        self._apart = False  # whether a call left results on one rank only

    def scratch_bytes(self, tokens: int) -> int:
        return group_bytes(self.layout, self.ranks, self.positions)

    def launch(self, spans: Sequence[Span], past: np.ndarray | None = None) -> Iterator[Staged]:
        """Start one call after another as the base does; each rank its own rows, all ranks in step."""
        ranks, rank = self.ranks, self._group.rank
        local = [self._own(which, span) for which, span in enumerate(spans)]
        begins = np.cumsum([0, *(len(span.tokens) for span in spans)]).tolist()
        streams = None if past is None else torch.from_numpy(np.ascontiguousarray(past))
        for part in self._parts(spans):
            rows = [[each for each in part if spans[each[0]].slot % ranks == r] for r in range(ranks)]
            holders = [r for r in range(ranks) if rows[r]]
            self._owner = holders[0] if self._follow and len(holders) == 1 else None
            counts = [sum(end - begin for _, begin, end in own) for own in rows]
            bucket = bucket_of(max(counts))
            ids = np.zeros((ranks, bucket), np.int32)
            for r, own in enumerate(rows):
                if own:
                    ids[r, : counts[r]] = np.concatenate([spans[which].tokens[begin:end] for which, begin, end in own])
            if self._owner is None:
                self._apart = True
                self._everyone[: ids.size].copy_(torch.from_numpy(ids.ravel()))
            last = max(spans[which].start + end for which, _, end in part)
            mine = rows[rank if self._owner is None else self._owner]
            yield self._launch(local, mine, streams, begins, (bucket, last))

    def _found(
        self, spans: Sequence[Span], past: np.ndarray | None
    ) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]], dict[int, list[Drawn]]]:
        self._apart = False
        found = super()._found(spans, past)
        if not self._apart:
            return found
        every = self._group.gather(found)
        owners = [span.slot % self._group.size for span in spans]
        logits, kept = ([every[owner][at][which] for which, owner in enumerate(owners)] for at in (0, 1))
        picks = {which: every[owner][2][which] for which, owner in enumerate(owners) if which in every[owner][2]}
        return logits, kept, picks

    def _own(self, which: int, span: Span) -> Span:
        return own_span(which, span, self.ranks)

    def _replay(self, bucket: int, dense: bool, drafts: bool) -> _Call:
        self._calls = self._by_owner.setdefault(self._owner, {})
        return super()._replay(bucket, dense, drafts)

    def _step(self, bucket: int, dense: bool, drafts: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        found = super()._step(bucket, dense, drafts)
        self.exchanges.finish()
        return found

    def _attend(
        self, index: int, layer: LayerWeights, rows: Rows, turns: Sequence[Tensor], dense: bool,
        normed: Tensor, codes: Tensor, scales: Tensor,
    ) -> Tensor | Halves:  # fmt: skip
        if self._owner in (None, self._group.rank):
            return super()._attend(index, layer, rows, turns, dense, normed, codes, scales)
        c = self.weights.config
        return normed.new_empty((len(normed), c.num_attention_heads * c.head_dim))

    def _output(self, index: int, layer: LayerWeights, attended: Tensor | Halves) -> Tensor | Parts:
        if self._owner is None:
            return super()._output(index, layer, attended)
        assert isinstance(attended, Tensor)
        (wo_a, wo_b), groups = self._halves[index], self.weights.config.o_groups // self.ranks
        own = self.exchanges.columns(attended, self._owner)
        own = skinny_gemm.quantised_product(own, None, *wo_a, self._arrived, groups=groups)
        return self.exchanges.sum(skinny_gemm.product(*own, *wo_b, self._arrived))

    def _mixture(
        self, index: int, layer: LayerWeights, normed: Tensor, codes: Tensor, scales: Tensor, ids: Tensor,
        chosen: list[Tensor],
    ) -> Tensor:  # fmt: skip
        """Add the parts of the experts' widths; rows that are apart are first brought together."""
        if self._owner is not None:
            y = super()._mixture(index, layer, normed, codes, scales, ids, chosen)
            assert isinstance(y, Tensor)
            return self.exchanges.sum(y)
        normed = self.exchanges.every_row(normed)
        codes, scales = quantise(normed)
        ids = self._everyone[: len(normed)]
        if len(normed) <= skinny_gemm.MAX_ROWS:
            y = super()._mixture(index, layer, normed, codes, scales, ids, chosen)
            assert isinstance(y, Tensor)
            return self.exchanges.own_sum(y)
        c = self.weights.config
        parts = [
            router.route(
                x, own_codes, own_scales, layer.gate, layer.bias, layer.table, own_ids, *layer.shared13, self._arrived,
                experts=c.n_routed_experts, picks=c.num_experts_per_tok, scaling=c.routed_scaling_factor,
            )
            for x, own_codes, own_scales, own_ids in zip(
                *(each.split(skinny_gemm.MAX_ROWS) for each in (normed, codes, scales, ids)), strict=True
            )
        ]  # fmt: skip
        routed = router.joined(parts, c.n_routed_experts)
        y = fp4_experts.site(codes, scales, routed, *layer.w13, *layer.w2, *layer.shared2, float(c.swiglu_limit))
        assert isinstance(y, Tensor)
        return self.exchanges.own_sum(y)

    def _cut(self, layer: LayerWeights) -> tuple[Fp8, Fp8]:
        """This rank's groups of wo_a and the columns of wo_b that read them."""
        rank, ranks = self._group.rank, self.ranks
        wo_a, wo_b = ([each.chunk(ranks, dim)[rank].contiguous() for each in weight]
                      for dim, weight in enumerate((layer.wo_a, layer.wo_b)))  # fmt: skip
        return Fp8(*wo_a), Fp8(*wo_b)


def group_bytes(layout: CacheLayout, ranks: int, positions: int) -> int:
    """Bound of what a rank holds beside weights (config cut) and pools: copies, exchanged rows, calls' own bytes."""
    c, tokens = layout.config, PROMPT_TOKENS * ranks
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    copies = 3 * c.hidden_size * c.moe_intermediate_size * ranks + c.hidden_size * c.o_groups * c.o_lora_rank // ranks
    rows = tokens * (3 * c.hidden_size + c.hidden_size // BLOCK + 8 * c.num_experts_per_tok)
    return layers * copies + rows + step_bytes(layout, BUCKETS[-1] * ranks, positions) + prompt_bytes(
        layout, tokens, positions
    )  # fmt: skip
