"""Several processes as one: which this is, and sums of a tensor over all of them.

On CPUs over gloo, in the order of ranks, so that every rank has the same bits; on CUDA in torch's symmetric memory, one
launch a sum, which a graph may hold. NVLink multicast is not used. Source: docs/log/0009-placement.md.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pelagos.errors import ConfigError

TIMEOUT = datetime.timedelta(seconds=120)  # of every exchange: a lost rank ends the others


class Group:
    """The processes that `torchrun` started, joined; `most_bytes` is the largest tensor that is summed on CUDA.

    Raises ConfigError where they cannot be joined.
    """

    def __init__(self, device: torch.device, most_bytes: int) -> None:
        cuda = device.type == "cuda"
        if not dist.is_initialized():
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
            except ValueError as error:
                raise ConfigError(f"several processes: {error}; start them with torchrun") from None
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._host = dist.new_group(backend="gloo", timeout=TIMEOUT) if cuda else dist.group.WORLD
        self._shared: Tensor | None = None
        if cuda:
            import torch.distributed._symmetric_memory as symmetric

            assert dist.group.WORLD is not None
            self._name = dist.group.WORLD.group_name
            self._shared = symmetric.empty(most_bytes, dtype=torch.uint8, device=device)
            symmetric.rendezvous(self._shared, self._name)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over all ranks, which bring the same shape and dtype; the same bits on each."""
        if self._shared is None:
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x.contiguous())
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return total
        if x.nbytes > self._shared.numel():
            raise ConfigError(f"sum over ranks: {x.nbytes:,} bytes, planned for {self._shared.numel():,}")
        shared = self._shared[: x.nbytes].view(x.dtype)
        shared.copy_(x.flatten())
        return torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", self._name).view(x.shape)

    def gather(self, thing: Any) -> list[Any]:
        """Return what each rank brought, on every rank; through the hosts."""
        found = [None] * self.size
        dist.all_gather_object(found, thing, self._host)
        return found

    def close(self) -> None:
        """Part."""
        dist.destroy_process_group()
