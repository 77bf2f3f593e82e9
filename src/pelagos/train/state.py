"""The state of a run: every matrix and expert under its own name, whoever held it.

`state-STEP/` is a torch.distributed.checkpoint, complete once it has its `.metadata`, beside `run.pt` with what the run
is. A world of any size reads it.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pelagos.errors import CheckpointError
from pelagos.model import Transformer
from pelagos.train.optim import EXPERTS, Optimizer, first_expert
from pelagos.train.precision import Stored
from pelagos.train.ranks import Ranks, exchange

RUN_FORMAT = 4


def named(model: Transformer, optimizer: Optimizer, stored: Stored | None) -> dict[str, Tensor]:
    """Return this rank's tensors by names that are the same in every world; loading fills them in place."""
    found = {f"master/{name}": tensor for name, tensor in (stored.masters if stored else {}).items()}
    for name, tensor in model.state_dict().items():
        if EXPERTS in name:
            first = first_expert(model, name)
            found |= {f"model/{name}/{first + place}": expert for place, expert in enumerate(tensor)}
        else:
            found[f"model/{name}"] = tensor
    return found | optimizer.tensors()


def write(out: Path, facts: Mapping[str, Any], tensors: dict[str, Tensor], *, lead: bool) -> None:
    """Write a state; the one before goes when this is complete. Raises CheckpointError when a disk fails."""
    path = out / f"state-{facts['step']:08}"
    if newest(out) == path:
        return
    try:
        if lead:
            path.mkdir(exist_ok=True)
            torch.save({"format": RUN_FORMAT, **facts}, path / "run.pt")
        with _quietly():
            save(tensors, checkpoint_id=path)
    except (OSError, RuntimeError, CheckpointException) as error:
        shutil.rmtree(path, ignore_errors=True)
        raise CheckpointError(f"{path}: state of step {facts['step']} not written ({_line(error)})") from None
    if lead:
        for other in out.glob("state-*"):
            if other != path:
                shutil.rmtree(other, ignore_errors=True)


def newest(out: Path) -> Path | None:
    """Return the newest complete state of a run directory."""
    return max((path.parent for path in out.glob("state-*/.metadata")), default=None)


def facts_of(path: Path) -> dict[str, Any]:
    """Return what the run of a state is; raises CheckpointError for one that cannot be read."""
    try:
        facts = torch.load(path / "run.pt", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from None
    if not isinstance(facts, dict) or facts.get("format") != RUN_FORMAT:
        raise CheckpointError(f"{path}: not a run state of format {RUN_FORMAT}; choose another --out or delete it")
    return facts


def read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill this rank's tensors from a state; raises CheckpointError for one that is torn."""
    try:
        with _quietly():
            load(tensors, checkpoint_id=path)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise _unreadable(path, error) from None
    if dist.is_initialized():
        dist.barrier()


def released(model: Transformer, ranks: Ranks) -> Iterator[tuple[str, Tensor, str]]:
    """Yield, on the first rank alone, the whole model's `released_tensors`, one at a time, from whoever holds each.

    Every rank goes through it. A weight with an adapter is what both make.
    """
    own = {name: tensor.detach() for name, tensor, _ in model.released_tensors()}
    held: list[Any] = [set(own)] * ranks.size
    if ranks.size > 1:
        with exchange():
            dist.all_gather_object(held, set(own))
    for name, like, kind in Transformer(model.config, device="meta").released_tensors():
        holder = next((rank for rank, names in enumerate(held) if name in names), 0)
        if ranks.lead and holder:
            tensor = torch.empty_like(like, device=next(model.parameters()).device)
            with exchange():
                dist.recv(tensor, holder)
            yield name, tensor, kind
        elif ranks.lead:
            module, _, leaf = name.rpartition(".")
            yield name, own[name] if name in own else getattr(model.get_submodule(module), leaf).detach(), kind
        elif ranks.rank == holder:
            with exchange():
                dist.send(own[name].contiguous(), 0)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warning that one process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{path}: not a readable run state ({_line(error)}); delete it to start over")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if isinstance(error, CheckpointException) else 0]  # behind whose traceback the reason is
