"""The captured step and prompts over several GPUs: sequences are divided, experts cut by width.

A sequence's cache is on one rank, that of its slot, and nowhere else. Every expert, routed or shared, is on all ranks,
with a part of its width on each. Where several ranks have rows in a step, each attends its own, with weights of its
own; rows are brought together before the expert site and its partial results summed after it. Where one rank has them
all, the others follow: all carry the streams, the owner attends, and the two products behind the attention are cut by
heads.

Of a prompt a rank computes consecutive rows. Pools are memory of all ranks: what a row leaves goes straight into the
owner's, and a rank decodes what its rows attend from there, layer by layer behind the ranks that have earlier rows. For
the experts codes of all rows are brought together, beside the router and the first product of the shared expert, of
which every rank has the whole; partial results are sent back beside the sum of a rank's own and the second product. A
row's bits do not depend on who computes it. Meaning: docs/log/0009-placement.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pelagos.config import ModelConfig
from pelagos.errors import CapacityError, ConfigError
from pelagos.kernels import prefill_cache, prefill_experts, skinny_gemm
from pelagos.kernels import prefill_products as products
from pelagos.kernels.batch_rows import Halves, Parts, sum_of
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.prefill_products import BLOCK, quantise
from pelagos.kernels.ragged import turns
from pelagos.model.cuda_forward import BUCKETS, PROMPT_TOKENS, CudaForward, Told, _Found, _Step, bucket_of, step_bytes
from pelagos.model.cuda_prefill import Prefill, prompt_bytes, scaled
from pelagos.model.cuda_weights import Fp8, LayerWeights, Weights
from pelagos.parallel import Group

ALIGN = 128  # rows of a rank come in multiples of it, the last one's apart
_KEYS, _ROWS, _PARTS, _CALL = range(4)  # channels
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


def own_span(which: int, span: Span, ranks: int) -> Span:
    """Return a span as its rank numbers slot and pages; CapacityError where its pages are on another."""
    if (span.pages % ranks != span.slot % ranks).any():
        raise CapacityError(f"span {which}: slot {span.slot} is of rank {span.slot % ranks}, a page of it is not")
    return span._replace(slot=span.slot // ranks, pages=span.pages // ranks)


class GroupPrefill(Prefill):
    """`Prefill` on all ranks together, each called with the same spans; `tokens` are the most of a call.

    pages and slots are the pools of all ranks, by rank (`Group.memory`).
    """

    def __init__(
        self, alone: Prefill, pages: Sequence[Tensor], slots: Sequence[Tensor], group: Group, tokens: int
    ) -> None:
        self.weights, self.layout, self._freqs = alone.weights, alone.layout, alone._freqs
        config, self._pools, self._group = self.weights.config, list(zip(pages, slots, strict=True)), group
        self.late = group.rank > 0
        d, k, each = config.hidden_size, config.num_experts_per_tok, -(-tokens // (group.size * ALIGN)) * ALIGN
        # All rows' codes and scales, chosen experts and their weights: of each what every rank has.
        self._codes = [group.memory((tokens, size), torch.uint8) for size in (d, d // BLOCK)]
        self._chosen = [group.memory((tokens, k), dtype) for dtype in (torch.int32, torch.float32)]
        self._parts = group.memory((group.size, each, d), torch.bfloat16)  # of this rank's rows, by who computed them
        cuda = self.weights.device.type == "cuda"
        # First in line: a signal must not wait until all of a product's programs have begun.
        self._side = torch.cuda.Stream(self.weights.device, priority=-1) if cuda else None
        self._bounds: list[tuple[int, int]] = []
        self._layers = [self._whole(*each) for each in zip(alone.weights.layers, alone._layers, strict=True)]

    @torch.inference_mode()
    def run(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Append the spans' tokens; return logits and streams as `Prefill.run` does, the same on every rank."""
        ranks, device = self._group.size, self.weights.device
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for owner in sorted({span.slot % ranks for span in spans}):
            own = [which for which, span in enumerate(spans) if span.slot % ranks == owner]
            self.pages, self.slots = self._pools[owner]
            asked = [spans[which] for which in own]
            logits, streams = self._divided([own_span(*each, ranks) for each in zip(own, asked, strict=True)])
            rows = logits.split([span.logits for span in asked]), streams.split([span.streams for span in asked])
            found |= dict(zip(own, zip(*rows, strict=True), strict=True))
        logits, streams = (torch.cat([found[which][at] for which in range(len(spans))]).to(device) for at in (0, 1))
        return logits, streams

    def _divided(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Compute spans of one owner; return what they ask for, on the host."""
        group, config, total = self._group, self.weights.config, sum(len(span.tokens) for span in spans)
        share = -(-total // (group.size * ALIGN)) * ALIGN
        self._bounds = [(min(total, r * share), min(total, (r + 1) * share)) for r in range(group.size)]
        group.meet(_CALL)
        own = next(itertools.islice(turns(spans, share), group.rank, None), [])
        found = (torch.empty(0, config.vocab_size),
                 torch.empty(0, config.hc_mult, config.hidden_size, dtype=torch.bfloat16))  # fmt: skip
        if own:
            found = super().run(own)
        else:
            for layer in self._layers:
                self._experts(layer, None)
        if not any(span.logits or span.streams for span in spans):
            return found[0].cpu()[:0], found[1].cpu()[:0]
        every = group.gather([found[0].cpu().numpy(), found[1].cpu().view(torch.int16).numpy()])  # tensors take longer
        logits, streams = (torch.from_numpy(np.concatenate(each)) for each in zip(*every, strict=True))
        return logits, streams.view(torch.bfloat16)

    def _keys(self, *inputs: Any) -> prefill_cache.Keys:
        """Write behind the ranks with earlier rows, for what a row attends may be theirs."""
        rank = self._group.rank
        if rank:
            self._group.wait(rank - 1, _KEYS)
        keys = super()._keys(*inputs)
        if rank + 1 < self._group.size and self._bounds[rank + 1][0] < self._bounds[rank + 1][1]:
            self._group.signal(rank + 1, _KEYS)
        return keys

    def _feed(self, state: list[Tensor | None], layer: LayerWeights, ids: Tensor) -> None:
        normed, *quantised = self._site(state, layer.ffn_site)
        self._spread(self._codes, quantised)
        chosen = self._choose(layer, normed, ids)  # kept, like the codes, until it has been copied
        self._spread(self._chosen, chosen, last=True)
        del normed
        state[0] = self._experts(layer, self._hidden(layer, *quantised))

    def _spread(self, memories: list[list[Tensor]], values: Sequence[Tensor], *, last: bool = False) -> None:
        """Give every rank this one's rows, beside what is computed next; tell the others of the `last`."""
        rows = slice(*self._bounds[self._group.rank])
        with self._beside():
            for rank in self._others():
                for memory, each in zip(memories, values, strict=True):
                    self._copy(memory[rank][rows], each)
                if last:
                    self._group.signal(rank, _ROWS)
            for memory, each in zip(memories, values, strict=True):
                self._copy(memory[self._group.rank][rows], each)

    def _experts(self, layer: LayerWeights, hidden: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """Compute this rank's part of the experts of all rows, send it; return the sum of this rank's rows.

        The others' rows are added up first, so that they are on their way beside this rank's own and the second product
        of the shared expert, of which `hidden` is the operand.
        """
        group, total = self._group, self._bounds[-1][1]
        filled = [rank for rank in self._others() if self._bounds[rank][0] < self._bounds[rank][1]]
        self._join()
        for rank in filled:
            group.wait(rank, _ROWS)
        assert layer.bases is not None
        limit = float(self.weights.config.swiglu_limit)
        codes, scales, chosen, weights = (each[group.rank][:total] for each in (*self._codes, *self._chosen))
        added = prefill_experts.apart(codes, scales, chosen, weights, *layer.w13, *layer.w2, layer.bases, limit)
        sent = []  # whose memory is theirs until it has been copied
        for rank in filled:
            begin, end = self._bounds[rank]
            sent.append(added(slice(begin, end)))
            with self._beside():
                self._copy(self._parts[rank][group.rank, : end - begin], sent[-1])
                group.signal(rank, _PARTS)
        if hidden is None:
            return self._join()
        begin, end = self._bounds[group.rank]
        own = added(slice(begin, end))
        shared = products.product(*hidden, *layer.shared2)
        for rank in self._others():
            group.wait(rank, _PARTS)
        self._join()
        parts = self._parts[group.rank][:, : end - begin].unbind(0)
        return sum_of((*(own if rank == group.rank else part for rank, part in enumerate(parts)), shared))

    def _copy(self, into: Tensor, values: Tensor) -> None:
        into.copy_(values)

    def _others(self) -> list[int]:
        """The other ranks, the next one first, so that no two send to one at once."""
        rank, size = self._group.rank, self._group.size
        return [(rank + step) % size for step in range(1, size)]

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Copy on a stream of its own, behind what was launched so far; `_join` ends it."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield

    def _join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)

    def _whole(self, layer: LayerWeights, alone: LayerWeights) -> LayerWeights:
        """A rank's layer of prompts with its shared expert uncut."""
        tall, wide = ([self._group.gather(each.cpu()) for each in weight] for weight in (layer.shared13, layer.shared2))
        halves = [zip(*(part.chunk(2) for part in parts), strict=True) for parts in tall]  # of all w1, then of all w3
        shared = [torch.cat([*itertools.chain(*each)]) for each in halves], [torch.cat(parts, 1) for parts in wide]
        first, second = (Fp8(*(part.to(layer.sink.device) for part in weight)) for weight in shared)
        return scaled(dataclasses.replace(alone, shared13=first, shared2=second), "shared13", "shared2")


class Exchanges:
    """What a step exchanges, at most `most_bytes` from one rank to another; all take part, in the same order.

    On CUDA one launch each (`kernels.triton.exchange`), which a graph may hold; on CPUs over gloo.
    """

    def __init__(self, group: Group, most_bytes: int) -> None:
        self._rank, self._ranks, self._cuda, self._index = group.rank, group.size, group.device.type == "cuda", 0
        if self._cuda:
            from pelagos.kernels.triton.exchange import PLACES

            self._room = -(-most_bytes // 64) * 16
            boxes = group.memory((PLACES, group.size, self._room), torch.int64)
            boxes[group.rank].zero_()
            self._boxes = torch.tensor([each.data_ptr() for each in boxes], device=group.device)
            self._number = torch.ones(1, dtype=torch.int32, device=group.device)
            torch.cuda.synchronize()
            group.gather(None)

    def every_row(self, x: Tensor) -> Tensor:
        """Return the rows (T, D) bfloat16 of all ranks, (R * T, D) in the order of ranks."""
        out = x.new_empty((self._ranks * len(x), x.shape[1]))
        return self._exchange(x, out, total=x.numel() // 2, out_rank=x.numel() // 2)

    def own_sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks of this rank's part of the rows (R * T, D) bfloat16 that each brings: (T, D)."""
        out = x.new_empty((len(x) // self._ranks, x.shape[1]))
        return self._exchange(x, out, total=out.numel() // 2, send_rank=out.numel() // 2, add=True)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks of x (T, D) bfloat16, added in float32 in their order: the same bits on each."""
        return self._exchange(x, torch.empty_like(x), total=x.numel() // 2, add=True)

    def columns(self, x: Tensor, source: int) -> Tensor:
        """Return this rank's part (T, W / R) of the columns of x (T, W) bfloat16 as rank `source` has it."""
        out = x.new_empty((x.shape[0], x.shape[1] // self._ranks))
        width = out.shape[1] // 2
        return self._exchange(x, out, total=out.numel() // 2, width=width, send_rank=width, send_row=x.shape[1] // 2,
                              source=source)  # fmt: skip

    def finish(self) -> None:
        """End what a graph holds: its next run exchanges under numbers of its own."""
        if self._cuda:
            self._number.add_(self._index)
        self._index = 0

    def _exchange(self, x: Tensor, out: Tensor, *, total: int, **given: Any) -> Tensor:
        """Fill `out` as `kernels.triton.exchange` does, sizes in words of 32 bits."""
        sizes: dict[str, Any] = {"width": total, "send_rank": 0, "send_row": 0} | given
        if not self._cuda:
            every = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self._ranks)]
            dist.all_gather(every, x.contiguous())
            width, part, row = (2 * sizes[name] for name in ("width", "send_rank", "send_row"))
            place = (2 * total // width, width), (row, 1), self._rank * part
            sent = [each.view(-1).as_strided(*place) for each in every]
            if given.get("source") is not None:
                sent = [sent[given["source"]]]
            whole = sum_of(each.float() for each in sent) if given.get("add") else torch.cat(sent)
            return out.copy_(whole.view(out.shape))
        from pelagos.kernels.triton.exchange import exchange

        if total > self._room:
            raise ConfigError(f"exchange: {4 * total:,} bytes between two ranks, planned for {4 * self._room:,}")
        words, into = (each.view(-1).view(torch.int32) for each in (x, out))
        exchange(words, into, self._boxes, self._number, self._index, self._rank, self._room, total=total, **sizes)
        self._index += 1
        return out


class GroupForward(CudaForward):
    """`CudaForward` on one of several ranks, all of which are called with the same spans and return the same.

    Slot s of a span is the sequence of rank s % ranks, there slot s // ranks; its pages are numbered alike and have to
    be on the same rank. `pages` and `slots` are those of all ranks (`Group.memory`), alike in size. With `follow`
    ranks without rows help the only one that has any: quicker, but a row's bits then depend on whether others have
    rows too. Raises ConfigError for weights that are not cut.
    """

    left = False  # sums are whole where they are exchanged
    fuses = True  # whether the launches of a followed step are `fused`

    def __init__(
        self, weights: Weights, layout: CacheLayout, pages: Sequence[Tensor], slots: Sequence[Tensor], group: Group, *,
        positions: int, follow: bool = True,
    ) -> None:  # fmt: skip
        self._group, self._rank, self.ranks, config = group, group.rank, group.size, weights.config
        super().__init__(weights, layout, pages[group.rank], slots[group.rank], positions=positions)
        widest = max(config.hidden_size, config.num_attention_heads * config.head_dim // group.size)
        self.exchanges = Exchanges(group, 2 * BUCKETS[-1] * widest)
        self.prefill = GroupPrefill(self.prefill, pages, slots, group, PROMPT_TOKENS * group.size)
        self._follow = follow and config.o_groups % group.size == 0
        self._everyone = self._sections(self._rows)[2]  # token ids, rank by rank
        layers = [*weights.layers, *([] if weights.draft is None else [weights.draft.layer])]
        self._halves = [self._cut(layer) for layer in layers] if self._follow else []
        self._apart = False  # whether a call left results that were asked for on one rank only

    def scratch_bytes(self, tokens: int) -> int:
        return group_bytes(self.layout, self.ranks, self.positions)

    def _divided(
        self, rank: np.ndarray, ids: np.ndarray, everyone: np.ndarray, shared: bool
    ) -> tuple[np.ndarray | slice, np.ndarray, int]:
        """Choose who attends, each rank its own rows or one all, and tell every rank the ids of all rows."""
        counts = np.bincount(rank, minlength=self.ranks)
        holders, bucket = np.flatnonzero(counts), bucket_of(int(counts.max()))
        self._owner = int(holders[0]) if self._follow and len(holders) == 1 else None
        self.fused = self.fuses and self._owner is not None  # apart the router's rows are not the site's
        if self._owner is not None:
            return slice(None), np.arange(len(rank)), bucket
        self._apart |= shared
        place = np.empty_like(rank)
        for each in holders:
            own = rank == each
            place[own] = each * bucket + np.arange(counts[each])
        everyone[:] = 0
        everyone[place] = ids
        return np.flatnonzero(rank == self._rank), place, bucket

    def _found(self, told: Told, past: np.ndarray | None) -> list[_Found]:
        self._apart = False
        found = super()._found(told, past)
        if not self._apart:
            return found
        every, ranks = self._group.gather([each[:2] for each in found]), (told.fields[2] % self.ranks).tolist()
        return [(*every[rank][which], found[which][2]) for which, rank in enumerate(ranks)]

    def _step(self, bucket: int, dense: bool, drafts: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        logits, streams, picks, chosen = super()._step(bucket, dense, drafts)
        if self._owner is None:  # words that travel like any others
            picks = self.exchanges.every_row(picks.view(torch.bfloat16)).view(picks.dtype)
        self.exchanges.finish()
        return logits, streams, picks, chosen

    def _attend(
        self, index: int, layer: LayerWeights, step: _Step, normed: Tensor, codes: Tensor, scales: Tensor
    ) -> Tensor | Halves:
        if self._owner in (None, self._group.rank):
            return super()._attend(index, layer, step, normed, codes, scales)
        if self._left is not None:  # by the site, and there is no launch behind it here
            wide = layer.gate[: skinny_gemm.TALL]
            skinny_gemm.merged(None, None, normed, None, None, wide, self._arrived, self._left)
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

    def _mixture(self, layer: LayerWeights, step: _Step, normed: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """Add the parts of the experts' widths; rows that are apart are first brought together."""
        if self._owner is None:
            normed = self.exchanges.every_row(normed)
            codes, scales = quantise(normed)
            step = step._replace(ids=self._everyone[: len(normed)])
        y = super()._mixture(layer, step, normed, codes, scales)
        assert isinstance(y, Tensor)
        return self.exchanges.own_sum(y) if self._owner is None else self.exchanges.sum(y)

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
