"""Exchanges of a step between ranks: rows brought together, partial results added, columns handed out.

On CUDA one launch each (`kernels.triton.exchange`), which a graph may hold; on CPUs over gloo. Sums are float32 in the
order of ranks, so that every rank has the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pelagos.errors import ConfigError
from pelagos.parallel import Group


class Exchanges:
    """What a step exchanges, at most `most_bytes` from one rank to another; all take part, in the same order."""

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
        if not self._cuda:
            return torch.cat(self._all(x))
        out = x.new_empty((self._ranks * len(x), x.shape[1]))
        self._exchange(x, out, total=x.numel() // 2, out_rank=x.numel() // 2)
        return out

    def own_sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks of this rank's part of the rows (R * T, D) bfloat16 that each brings: (T, D)."""
        if not self._cuda:
            return self.sum(x).chunk(self._ranks)[self._rank].contiguous()
        out = x.new_empty((len(x) // self._ranks, x.shape[1]))
        self._exchange(x, out, total=out.numel() // 2, send_rank=out.numel() // 2, add=True)
        return out

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks of x (T, D) bfloat16, added in float32 in their order: the same bits on each."""
        if not self._cuda:
            first, *others = (part.float() for part in self._all(x))
            return sum(others, first).to(x.dtype)
        out = torch.empty_like(x)
        self._exchange(x, out, total=x.numel() // 2, add=True)
        return out

    def columns(self, x: Tensor, source: int) -> Tensor:
        """Return this rank's part (T, W / R) of the columns of x (T, W) bfloat16 as rank `source` has it."""
        rows, width = x.shape[0], x.shape[1] // self._ranks
        if not self._cuda:
            whole = x.contiguous().clone()
            dist.broadcast(whole, source)
            return whole.chunk(self._ranks, 1)[self._rank].contiguous()
        out = x.new_empty((rows, width))
        self._exchange(x, out, total=rows * width // 2, width=width // 2, send_rank=width // 2,
                       send_row=x.shape[1] // 2, source=source)  # fmt: skip
        return out

    def finish(self) -> None:
        """End what a graph holds: its next run exchanges under numbers of its own."""
        if self._cuda:
            self._number.add_(self._index)
        self._index = 0

    def _all(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self._ranks)]
        dist.all_gather(parts, x.contiguous())
        return parts

    def _exchange(self, x: Tensor, out: Tensor, *, total: int, **sizes: Any) -> None:
        from pelagos.kernels.triton.exchange import exchange

        if total > self._room:
            raise ConfigError(f"exchange: {4 * total:,} bytes between two ranks, planned for {4 * self._room:,}")
        words, into = (each.view(-1).view(torch.int32) for each in (x, out))
        sizes = {"width": total, "send_rank": 0, "send_row": 0} | sizes
        exchange(words, into, self._boxes, self._number, self._index, self._rank, self._room, total=total, **sizes)
        self._index += 1
