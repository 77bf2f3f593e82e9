"""Several processes as one: which this is, memory that each may write into, signals, and words between the hosts.

On CUDA memory is torch's symmetric memory, on CPUs shared by files; the hosts speak over gloo. NVLink multicast is not
used. Source: docs/log/0009-placement.md.
"""

from __future__ import annotations

import datetime
import math
import pickle
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pelagos.errors import ConfigError

TIMEOUT = datetime.timedelta(seconds=120)  # of every exchange over the hosts: a lost rank ends the others
ORDER = 1 << 15  # bytes of an order that take one broadcast
SIGNAL_MS = 120_000  # of a wait on the device, which then traps


class Group:
    """The processes that `torchrun` started, joined.

    All take part in every call, in the same order. Raises ConfigError where they cannot be joined.
    """

    def __init__(self, device: torch.device) -> None:
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
        self._cuda = cuda
        self._kept: list[Any] = []  # handles of memory; tokens on their way
        if cuda:
            self.memory((1,), torch.uint8)  # whose signals are used

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
                names, options = self.gather(f"{folder}/memory"), {"size": max(size, 1), "dtype": torch.uint8}
                torch.from_file(names[self.rank], shared=True, **options)
                dist.barrier()
                every = [torch.from_file(name, shared=True, **options) for name in names]
                dist.barrier()
        return [each[:size].view(dtype).view(tuple(shape)) for each in every]

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
        """Return what rank 0 brought, on every rank, whenever it does; quickest in less than ORDER bytes."""
        packed = b"" if self.rank else pickle.dumps(thing, 5)
        sent, size, begin = len(packed).to_bytes(8, "little") + packed, ORDER, 0
        found = bytearray()
        while begin < size:  # the first bytes say how many there are
            part = bytearray(sent[begin:size].ljust(size - begin, b"\0"))
            dist.broadcast(torch.frombuffer(part, dtype=torch.uint8), 0, self._orders)
            found += part
            begin, size = size, 8 + int.from_bytes(found[:8], "little")
        return pickle.loads(memoryview(found)[8:size]) if self.rank else thing

    def close(self) -> None:
        """Part, when all have come so far."""
        dist.barrier(self._host)
        dist.destroy_process_group()
