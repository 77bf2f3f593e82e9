"""The state of a run over several processes: every matrix and expert under its own name, whoever held it.

`state-STEP/` is a torch.distributed.checkpoint, complete once it has its `.metadata`, beside `run.pt` with what the run
is. A world of any size reads it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
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
from pelagos.train.owners import EXPERTS, Owners
from pelagos.train.ranks import Ranks


def named(model: Transformer, owners: Owners, ranks: Ranks, masters: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return this rank's tensors by names that are the same in every world; loading fills them in place."""
    found: dict[str, Tensor] = {f"master/{name}": tensor for name, tensor in (masters or {}).items()}
    for name, tensor in model.state_dict().items():
        if EXPERTS in name:
            first = ranks.ep.rank * len(tensor)
            found |= {f"model/{name}/{first + place}": expert for place, expert in enumerate(tensor)}
        else:
            found[f"model/{name}"] = tensor
    return found | owners.tensors()


def write(out: Path, facts: Mapping[str, Any], tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Write a state; the one before goes when this is complete. Raises CheckpointError when a disk fails."""
    path = out / f"state-{facts['step']:08}"
    if newest(out) == path:
        return
    try:
        if ranks.lead:
            path.mkdir(exist_ok=True)
            torch.save(dict(facts), path / "run.pt")
        save(tensors, checkpoint_id=path)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(f"{path}: state of step {facts['step']} not written ({_line(error)})") from None
    if ranks.lead:
        for other in out.glob("state-*"):
            if other != path:
                shutil.rmtree(other, ignore_errors=True)


def newest(out: Path) -> Path | None:
    """Return the newest complete state of a run directory."""
    return max((path.parent for path in out.glob("state-*/.metadata")), default=None)


def facts_of(path: Path) -> dict[str, Any]:
    """Return what the run of a state is; raises CheckpointError for one that cannot be read."""
    try:
        return torch.load(path / "run.pt", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable run state ({_line(error)}); delete it to start over") from None


def read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill this rank's tensors from a state; raises CheckpointError for one that is torn."""
    try:
        load(tensors, checkpoint_id=path)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(f"{path}: not a readable run state ({_line(error)}); delete it to start over") from None
    dist.barrier()


def whole(model: Transformer, owners: Owners, ranks: Ranks) -> Transformer:
    """Return a model that holds the experts and layers of all ranks; every rank calls it."""
    plain = Transformer(model.config, device=next(model.parameters()).device)
    own = {name: owners.whole(name, parameter) for name, parameter in model.named_parameters()}
    own |= dict(model.named_buffers())
    every = [*plain.named_parameters(), *plain.named_buffers()]
    held = ranks.pp.gather(torch.tensor([name in own for name, _ in every], device=every[0][1].device)).int()
    with torch.no_grad():
        for (name, tensor), stage in zip(every, held.argmax(0).tolist(), strict=True):
            tensor.copy_(ranks.pp.gather(own[name] if name in own else tensor.detach())[stage])
    return plain


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
