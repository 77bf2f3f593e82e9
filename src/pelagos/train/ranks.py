"""The processes of one training run: who computes what, and every exchange between them.

Data ranks take micro-batches in turn; each hands its share of a row to `cp` ranks and its layers to `pp` stages. Sums
are made in the order of ranks, so that every rank has the same bits. Source: technical report 3.4.1, 3.4.3.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from pelagos.errors import ConfigError, TrainingError
from pelagos.train.objective import Losses
from pelagos.train.recipe import TrainConfig

TIMEOUT = datetime.timedelta(minutes=10)  # of every exchange


class Line:
    """The ranks along one dimension of a mesh. Every exchange raises TrainingError when one of them is lost."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def swap(self, parts: Tensor) -> Tensor:
        """Send parts[i] to rank i; return what each sent here, (size, ...) in their order."""
        if self.size == 1:
            return parts
        got = torch.empty_like(parts)
        with exchange():
            dist.all_to_all_single(got, parts.contiguous(), group=self.group)
        return got

    def send(self, rows: Tensor, to: Sequence[int], of: Sequence[int]) -> tuple[Tensor, Any]:
        """Start to send consecutive rows, to[i] to rank i; return where of[i] from each arrive, and the work."""
        got = rows.new_empty((sum(of), *rows.shape[1:]))
        with exchange():
            return got, dist.all_to_all_single(got, rows, list(of), list(to), self.group, async_op=True)

    def wait(self, work: Any) -> None:
        """Wait for what `send` started."""
        with exchange():
            work.wait()

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts of all ranks, (size, ...); they bring the same shape."""
        if self.size == 1:
            return part.unsqueeze(0)
        got = [torch.empty_like(part) for _ in range(self.size)]
        with exchange():
            dist.all_gather(got, part.contiguous(), group=self.group)
        return torch.stack(got)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks, added in their order."""
        if self.size == 1:
            return x
        total, *rest = self.gather(x).unbind(0)
        for part in rest:
            total = total + part
        return total


class Ranks:
    """The processes that torchrun started, joined and ordered as (pp, dp, cp); experts as (pp, replica, ep).

    Raises ConfigError where they cannot be joined or do not divide the run.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        if config.cp > 1 and device.type == "cuda":
            raise ConfigError(f"cp={config.cp}: on CPUs as yet, attention's kernel takes whole rows; set cp=1")
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            try:
                with exchange():
                    dist.init_process_group(backend, timeout=TIMEOUT)
            except ValueError as error:
                raise ConfigError(f"several processes: {error}; start them with torchrun") from None
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.dp = data_ranks(config, self.size)
        data, kind = self.dp * config.cp, device.type
        whole = init_device_mesh(kind, (config.pp, data), mesh_dim_names=("pp", "data"))
        rows = init_device_mesh(kind, (config.pp, self.dp, config.cp), mesh_dim_names=("pp", "dp", "cp"))
        parts = (config.pp, data // config.ep, config.ep)
        experts = init_device_mesh(kind, parts, mesh_dim_names=("pp", "replica", "ep"))
        owners = min(config.owners or data, data)
        capped = init_device_mesh(kind, (config.pp, data // owners, owners), mesh_dim_names=("pp", "copy", "owner"))
        assert dist.group.WORLD is not None
        self.world = Line(dist.group.WORLD)
        self.data, self.pp, self.cp = (Line(m.get_group(n)) for m, n in ((whole, "data"), (whole, "pp"), (rows, "cp")))
        self.ep, self.replicas = (Line(experts.get_group(name)) for name in ("ep", "replica"))
        self.owners = Line(capped.get_group("owner"))
        self.place = rows.get_local_rank("dp")
        self.lead = self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether this rank takes part in micro-batch `number` of a step."""
        return number % self.dp == self.place

    def agree(self, terms: Losses, load: Tensor, stop: bool) -> tuple[Losses, Tensor, bool]:
        """Return a step's terms (of its last micro-batch), load (of all) and whether any rank is asked to stop."""
        names = ("total", "next_token", "mtp", "balance", "indexer")
        own = torch.stack([getattr(terms, name).detach().float() for name in names])
        own[0] = self.cp.sum(own[0])
        last, loads = self.world.gather(own)[-1], self.data.gather(self.cp.sum(terms.load))[-1]
        stops = self.world.sum(torch.tensor(int(stop), device=load.device))
        found = dict(zip(names, last.unbind(0), strict=True))
        return Losses(**found, load=loads, recall=terms.recall), self.data.sum(load), bool(stops)


@contextmanager
def exchange() -> Iterator[None]:
    """Raise TrainingError for what goes wrong between processes."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        here = f"rank {dist.get_rank()} of {dist.get_world_size()}" if dist.is_initialized() else "joining"
        raise TrainingError(
            f"{here}: another rank is lost ({reason}); all stop, what was saved last stays and the same command "
            "continues from it"
        ) from None


def stochastic_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to BF16, up or down with the probability that makes the mean x; source: report 3.4.1."""
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def data_ranks(config: TrainConfig, size: int) -> int:
    """Return the data ranks in a world of `size` processes; raises ConfigError for one that does not divide the run."""
    if size % (config.cp * config.pp):
        raise ConfigError(f"{size} processes: expected a multiple of cp x pp = {config.cp} x {config.pp}")
    dp = size // (config.cp * config.pp)
    for name, parts in (("ep", config.ep), ("owners", config.owners or 1)):
        if dp * config.cp % parts:
            raise ConfigError(f"{name}={parts} does not divide dp x cp = {dp} x {config.cp}")
    for step in range(config.steps):
        if (count := len(config.rows_at(step))) % dp:
            raise ConfigError(
                f"step {step} has {count} micro-batches for {dp} data ranks: choose accumulate as a multiple of {dp} "
                "(a step is accumulate x batch_rows rows in every world), and ramp_from_frac=1"
            )
        if config.pp > 1 and (count // dp < config.pp or len(set(config.rows_at(step))) > 1):
            raise ConfigError(
                f"step {step}: pp={config.pp} stages need as many micro-batches of equal rows on each of {dp} data "
                f"ranks, here are {count // dp}; raise accumulate"
            )
    if config.pp > 1 and config.indexer_steps:
        raise ConfigError(
            f"indexer_steps={config.indexer_steps}: with pp={config.pp} the first stages would have no gradient"
        )
    for name, value in (("anticipate", config.anticipate), ("lora_rank", config.lora_rank)):
        if value and size > 1:
            raise ConfigError(f"{name}={value}: for one process as yet, here are {size}")
    return dp
