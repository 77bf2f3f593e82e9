"""The captured step over several GPUs: sequences are divided, experts cut by width.

A sequence's cache is on one rank, that of its slot, and nowhere else; attention reads weights of its own there. Every
expert, routed or shared, is on all ranks, with a part of its width on each: rows are brought together before the expert
site, and its partial results summed after it. Prompts take the same steps. Meaning: docs/log/0009-placement.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pelagos.config import ModelConfig
from pelagos.errors import CapacityError, ConfigError
from pelagos.kernels.layout import CacheLayout, Drawn, Span
from pelagos.kernels.prefill_products import quantise
from pelagos.model.cuda_forward import BUCKETS, CudaForward, Staged, bucket_of
from pelagos.model.cuda_weights import LayerWeights, Weights
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
    be on the same rank. `pages` and `slots` are this rank's. Raises ConfigError for weights that are not cut.
    """

    def __init__(
        self, weights: Weights, layout: CacheLayout, pages: Tensor, slots: Tensor, group: Group, *, positions: int
    ) -> None:
        super().__init__(weights, layout, pages, slots, positions=positions)
        self.two_kinds = False
        self._group, self.ranks = group, group.size
        self._everyone = torch.zeros(BUCKETS[-1], dtype=torch.int32, device=weights.device)  # token ids, rank by rank

    def launch(self, spans: Sequence[Span], past: np.ndarray | None = None) -> Iterator[Staged]:
        """Start one call after another as the base does; each rank its own rows, all ranks in step."""
        ranks, rank = self.ranks, self._group.rank
        local = [self._local(which, span) for which, span in enumerate(spans)]
        begins = np.cumsum([0, *(len(span.tokens) for span in spans)]).tolist()
        streams = None if past is None else torch.from_numpy(np.ascontiguousarray(past))
        for part in self._parts(spans):
            rows = [[each for each in part if spans[each[0]].slot % ranks == r] for r in range(ranks)]
            counts = [sum(end - begin for _, begin, end in own) for own in rows]
            bucket = bucket_of(max(counts))
            ids = np.zeros((ranks, bucket), np.int32)
            for r, own in enumerate(rows):
                if own:
                    ids[r, : counts[r]] = np.concatenate([spans[which].tokens[begin:end] for which, begin, end in own])
            self._everyone[: ids.size].copy_(torch.from_numpy(ids.ravel()))
            last = max(spans[which].start + end for which, _, end in part)
            yield self._launch(local, rows[rank], streams, begins, (bucket, last))

    def _local(self, which: int, span: Span) -> Span:
        ranks = self.ranks
        if (span.pages % ranks != span.slot % ranks).any():
            raise CapacityError(f"span {which}: slot {span.slot} is of rank {span.slot % ranks}, a page of it is not")
        return span._replace(slot=span.slot // ranks, pages=span.pages // ranks)

    def _found(
        self, spans: Sequence[Span], past: np.ndarray | None
    ) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]], dict[int, list[Drawn]]]:
        every = self._group.gather(super()._found(spans, past))
        owners = [span.slot % self._group.size for span in spans]
        logits, kept = ([every[owner][at][which] for which, owner in enumerate(owners)] for at in (0, 1))
        return logits, kept, {which: picks for _, _, found in every for which, picks in found.items()}

    def _mixture(
        self, index: int, layer: LayerWeights, normed: Tensor, codes: Tensor, scales: Tensor, ids: Tensor,
        chosen: list[Tensor],
    ) -> Tensor:  # fmt: skip
        """Bring the rows of all ranks together, add the parts of the experts' widths, return this rank's rows."""
        count, own = len(normed), slice(self._group.rank * len(normed), (self._group.rank + 1) * len(normed))
        wide = normed.new_zeros((count * self._group.size, normed.shape[1]))
        wide[own] = normed
        wide = self._group.sum(wide)
        codes, scales = quantise(wide)
        y = super()._mixture(index, layer, wide, codes, scales, self._everyone[: len(wide)], chosen)
        return self._group.sum(y)[own].contiguous()
