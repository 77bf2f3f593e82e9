"""The processes of one training run: who computes what, and every exchange between them.

Data ranks take micro-batches in turn; each hands its share of a row to `cp` ranks and its layers to `pp` stages. Sums
are made in the order of ranks, so that every rank has the same bits. Source: technical report 3.4.1, 3.4.3.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pelagos.errors import ConfigError, TrainingError
from pelagos.train.objective import Losses
from pelagos.train.recipe import TrainConfig

TIMEOUT = datetime.timedelta(minutes=10)  # of every exchange


class Line:
    """The ranks along one dimension of a mesh. Every exchange raises TrainingError when one of them is lost."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = (group.rank(), group.size()) if group else (0, 1)

    def swap(self, parts: Tensor) -> Tensor:
        """Send parts[i] to rank i; return what each sent here, (size, ...) in their order."""
        if self.size == 1:
            return parts
        got = torch.empty_like(parts)
        with exchange():
            dist.all_to_all_single(got, parts.contiguous(), group=self.group)
        return got

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts of all ranks, (size, ...); they bring the same shape."""
        if self.size == 1:
            return part.unsqueeze(0)
        got = part.new_empty((self.size, *part.shape))
        with exchange():
            dist.all_gather([*got.unbind()], part.contiguous(), group=self.group)
        return got

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks, added in their order."""
        return x if self.size == 1 else functools.reduce(torch.add, self.gather(x).unbind(0))


class Trip:
    """Rows (R, ...) that go to other ranks, to[i] consecutive ones to rank i, of[i] from each; gradients come back.

    `leave` starts them, and `arrive` returns, for what `leave` gave, those that came: what is computed between hides
    the way, in the backward too, where what was made later runs earlier.
    """

    def __init__(self, line: Line, to: Sequence[int], of: Sequence[int]) -> None:
        self._line, self._to, self._of = line, list(to), list(of)

    def leave(self, rows: Tensor) -> Tensor:
        """Start to send; return a token of the rows' shape."""
        return _Way.apply(self, rows, True)

    def arrive(self, token: Tensor) -> Tensor:
        """Wait, and return what came."""
        return _Way.apply(self, token, False)

    def start(self, rows: Tensor, *, back: bool = False) -> Tensor:
        """Start one of the two ways; return where rows arrive."""
        to, of = (self._of, self._to) if back else (self._to, self._of)
        got = rows.new_empty((sum(of), *rows.shape[1:]))
        with exchange():
            work: Any = dist.all_to_all_single(got, rows.contiguous(), of, to, self._line.group, async_op=True)
        self._way = work, got
        return got

    def wait(self) -> Tensor:
        """Wait for the way that was started; return what came, which nothing here holds on to."""
        work, got = self._way
        del self._way
        with exchange():
            work.wait()
        return got


class _Way(torch.autograd.Function):
    """Either end of a trip; the backward comes from the other one."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, rows: Tensor, leaves: bool) -> Tensor:
        ctx.trip, ctx.leaves = trip, leaves
        if not leaves:
            return trip.wait()
        trip.start(rows)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, ctx.trip.wait() if ctx.leaves else ctx.trip.start(grad, back=True), None


class Ranks:
    """The processes that torchrun started, joined and ordered as (pp, dp, cp); experts as (pp, replica, ep).

    `alone` is one process that torchrun did not start. Raises ConfigError where they cannot be joined or do not divide
    the run.
    """

    def __init__(self, config: TrainConfig, device: torch.device, *, alone: bool = False) -> None:
        if config.cp > 1 and device.type == "cuda":
            raise ConfigError(f"cp={config.cp}: on CPUs as yet, attention's kernel takes whole rows; set cp=1")
        if not alone and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            try:
                with exchange():
                    dist.init_process_group(backend, timeout=TIMEOUT)
            except ValueError as error:
                raise ConfigError(f"several processes: {error}; start them with torchrun") from None
        self.world = Line(None if alone else dist.group.WORLD)
        self.rank, self.size, self.lead = self.world.rank, self.world.size, self.world.rank == 0
        self.dp, self.place = data_ranks(config, self.size), 0
        self.data = self.pp = self.cp = self.ep = self.replicas = self.owners = self.world
        if self.size == 1:
            return
        data = self.dp * config.cp
        owners = min(config.owners or data, data)

        def mesh(**sizes: int) -> DeviceMesh:
            return init_device_mesh(device.type, (config.pp, *sizes.values()), mesh_dim_names=("pp", *sizes))

        whole, rows = mesh(data=data), mesh(dp=self.dp, cp=config.cp)
        experts = mesh(replica=data // config.ep, ep=config.ep)
        capped = mesh(copy=data // owners, owner=owners)
        self.data, self.pp, self.cp = (Line(m.get_group(n)) for m, n in ((whole, "data"), (whole, "pp"), (rows, "cp")))
        self.ep, self.replicas = (Line(experts.get_group(name)) for name in ("ep", "replica"))
        self.owners, self.place = Line(capped.get_group("owner")), rows.get_local_rank("dp")

    def mine(self, number: int) -> bool:
        """Whether this rank takes part in micro-batch `number` of a step."""
        return number % self.dp == self.place

    def agree(self, terms: Losses, load: Tensor, stop: bool) -> tuple[Losses, Tensor, bool]:
        """Return a step's terms (of its last micro-batch), load (of all) and whether any rank is asked to stop."""
        if self.size == 1:
            return terms, load, stop
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
    for step in range(config.steps if size > 1 else 0):
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
