"""Several processes as one: which this is, memory that each may write into, and small exchanges between them.

On CUDA memory is torch's symmetric memory, and an exchange one launch of `kernels.triton.exchange`, which a graph may
hold; on CPUs memory is shared by files and exchanges go over gloo. NVLink multicast is not used. Source:
docs/log/0009-placement.md.
"""

from __future__ import annotations

import datetime
import itertools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pelagos.errors import ConfigError

TIMEOUT = datetime.timedelta(seconds=120)  # of every exchange over the hosts: a lost rank ends the others
SIGNAL_MS = 120_000  # of a wait on the device, which then traps


class Group:
    """The processes that `torchrun` started, joined; `most_bytes` is the most one sends another in an exchange.

    All take part in every call, in the same order. Raises ConfigError where they cannot be joined.
    """

    def __init__(self, device: torch.device, most_bytes: int) -> None:
        cuda = device.type == "cuda"
        if not dist.is_initialized():
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
            except ValueError as error:
                raise ConfigError(f"several processes: {error}; start them with torchrun") from None
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        host = dist.new_group(backend="gloo", timeout=TIMEOUT) if cuda else dist.group.WORLD
        orders = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=365))  # may be long in coming
        assert isinstance(host, dist.ProcessGroup)
        assert isinstance(orders, dist.ProcessGroup)
        self._host, self._orders = host, orders
        self._cuda, self._index, self._files = cuda, 0, itertools.count()
        self._kept: list[Any] = []  # handles of memory; tokens on their way
        if cuda:
            from pelagos.kernels.triton.exchange import PLACES

            self._room = -(-most_bytes // 64) * 16
            boxes = self.memory((PLACES, self.size, self._room), torch.int64)
            boxes[self.rank].zero_()
            self._boxes = torch.tensor([each.data_ptr() for each in boxes], device=device)
            self._number = torch.ones(1, dtype=torch.int32, device=device)
            torch.cuda.synchronize()
            dist.barrier(self._host)

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Return tensors of one shape on all ranks, by rank, of which each may be read and written here."""
        size = math.prod(shape) * dtype.itemsize
        if self._cuda:
            import torch.distributed._symmetric_memory as symmetric

            assert dist.group.WORLD is not None
            own = symmetric.empty(max(size, 1), dtype=torch.uint8, device=self.device)
            handle = symmetric.rendezvous(own, dist.group.WORLD.group_name)
            self._kept.append(handle)
            every = [own if r == self.rank else handle.get_buffer(r, (max(size, 1),), torch.uint8)
                     for r in range(self.size)]  # fmt: skip
        else:
            with tempfile.TemporaryDirectory() as folder:
                names = self.gather(str(Path(folder) / str(next(self._files))))
                torch.from_file(names[self.rank], shared=True, size=max(size, 1), dtype=torch.uint8)
                dist.barrier()
                every = [torch.from_file(name, shared=True, size=max(size, 1), dtype=torch.uint8) for name in names]
                dist.barrier()
        return [each[:size].view(dtype).view(tuple(shape)) for each in every]

    def every_row(self, x: Tensor) -> Tensor:
        """Return the rows (T, D) bfloat16 of all ranks, (R * T, D) in the order of ranks."""
        if not self._cuda:
            return torch.cat(self._all(x))
        out = x.new_empty((self.size * len(x), x.shape[1]))
        self._exchange(x, out, total=x.numel() // 2, out_rank=x.numel() // 2)
        return out

    def own_sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks of this rank's part of the rows (R * T, D) bfloat16 that each brings: (T, D)."""
        if not self._cuda:
            return self.sum(x).chunk(self.size)[self.rank].contiguous()
        out = x.new_empty((len(x) // self.size, x.shape[1]))
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
        rows, width = x.shape[0], x.shape[1] // self.size
        if not self._cuda:
            whole = x.contiguous().clone()
            dist.broadcast(whole, source)
            return whole.chunk(self.size, 1)[self.rank].contiguous()
        out = x.new_empty((rows, width))
        self._exchange(x, out, total=rows * width // 2, width=width // 2, send_rank=width // 2,
                       send_row=x.shape[1] // 2, source=source)  # fmt: skip
        return out

    def finish(self) -> None:
        """End what a graph holds: its next run exchanges under numbers of its own."""
        if self._cuda:
            self._number.add_(self._index)
        self._index = 0

    def signal(self, rank: int, channel: int) -> None:
        """Tell a rank, in the order of the current stream, that what was written before is there."""
        if self._cuda:
            self._kept[0].put_signal(rank, channel, SIGNAL_MS)
        else:
            self._kept = [each for each in self._kept if not each[0].is_completed()]
            token = torch.zeros(1)
            self._kept.append((dist.isend(token, rank, tag=channel), token))

    def wait(self, rank: int, channel: int) -> None:
        """Let the current stream wait for a rank's signal."""
        if self._cuda:
            self._kept[0].wait_signal(rank, channel, SIGNAL_MS)
        else:
            dist.recv(torch.zeros(1), rank, tag=channel)

    def meet(self, channel: int) -> None:
        """Let the current streams of all ranks wait for each other."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            self.signal(rank, channel)
        for rank in others:
            self.wait(rank, channel)

    def gather(self, thing: Any) -> list[Any]:
        """Return what each rank brought, on every rank; through the hosts."""
        found = [None] * self.size
        dist.all_gather_object(found, thing, self._host)
        return found

    def told(self, thing: Any = None) -> Any:
        """Return what rank 0 brought, on every rank, whenever it does."""
        found = [thing]
        dist.broadcast_object_list(found, 0, self._orders)
        return found[0]

    def close(self) -> None:
        """Part, when all have come so far."""
        dist.barrier(self._host)
        dist.destroy_process_group()

    def _all(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return parts

    def _exchange(self, x: Tensor, out: Tensor, *, total: int, **sizes: Any) -> None:
        from pelagos.kernels.triton.exchange import exchange

        if total > self._room:
            raise ConfigError(f"exchange: {4 * total:,} bytes between two ranks, planned for {4 * self._room:,}")
        words, into = (each.view(-1).view(torch.int32) for each in (x, out))
        sizes = {"width": total, "send_rank": 0, "send_row": 0} | sizes
        exchange(words, into, self._boxes, self._number, self._index, self.rank, self._room, total=total, **sizes)
        self._index += 1
