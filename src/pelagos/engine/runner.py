"""The two pools as memory, and which forward runs over them.

Pages and slots are two uint8 buffers laid out by `CacheLayout`; on a CPU they are numpy arrays that every path reads
in place. The forward is the compiled helper where it covers the model, else torch.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pelagos.config import ModelConfig
from pelagos.errors import CheckpointError, ConfigError, MissingDependency
from pelagos.kernels.layout import CacheLayout, Output, Span
from pelagos.kernels.native import NativeForward
from pelagos.model import Transformer
from pelagos.model.cuda_forward import CudaForward
from pelagos.model.cuda_weights import Weights
from pelagos.model.paged import PagedForward
from pelagos.model.streaming import store_of

_log = logging.getLogger(__name__)
_WHOLE_BYTES, _ROW_BYTES = 1 << 20, 4096
_CGROUPS = Path("/sys/fs/cgroup")  # by hierarchy ("" is version 2): limit, usage, start of memory.stat's fields
_LIMITS = {"": ("max", "current", ""), "memory": ("limit_in_bytes", "usage_in_bytes", "total_")}


class Forward(Protocol):
    """A model over the pools; see `Span` and `Output`. `draws`: it picks tokens itself where spans say how.

    two_kinds: generated tokens (`Span.decode`) are computed by other kernels than a prompt's, to other last bits. What
    they leave behind then stays with their request: as a part of a later prompt they are computed anew.
    """

    two_kinds: bool
    draws: bool

    @property
    def numeric_path(self) -> str:
        """What decides the last bits besides the weights."""
        ...

    @property
    def weight_bytes(self) -> int:
        """What it keeps of the weights beside the model's own."""
        ...

    def scratch_bytes(self, tokens: int) -> int:
        """Bound of what a call over that many tokens takes for a moment."""
        ...

    def forward(self, spans: Sequence[Span]) -> Output:
        """Run the backbone over all spans as one batch."""
        ...

    def draft(self, spans: Sequence[Span], streams: np.ndarray) -> Output:
        """Run the draft layer: span.tokens are the ids that follow, streams (sum S, n, D) those at its positions."""
        ...


class Pools:
    """The bytes of all pages and slots."""

    def __init__(self, layout: CacheLayout, *, pages: int, slots: int, device: torch.device | str = "cpu") -> None:
        """Allocate both pools, zeroed; the system backs them as they are first touched."""
        self.layout = layout
        self.on_cpu = torch.device(device).type == "cpu"
        if self.on_cpu:
            self.page_bytes = np.zeros((pages, layout.page_bytes), np.uint8)
            self.slot_bytes = np.zeros((slots, layout.slot_bytes), np.uint8)
            self.pages, self.slots = torch.from_numpy(self.page_bytes), torch.from_numpy(self.slot_bytes)
        else:
            self.pages = torch.zeros((pages, layout.page_bytes), dtype=torch.uint8, device=device)
            self.slots = torch.zeros((slots, layout.slot_bytes), dtype=torch.uint8, device=device)

    def clear(self, slot: int) -> None:
        """Zero a slot, wherever it is."""
        self.slots[slot].zero_()


def device_of(model: Transformer | Weights) -> torch.device:
    """Where a model's weights are."""
    return model.device if isinstance(model, Weights) else model.embed.weight.device


def weight_bytes(model: Transformer | Weights) -> int:
    """Bytes of a model's parameters and tables where they are."""
    if isinstance(model, Weights):
        return model.bytes
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def available_bytes(device: torch.device) -> int | None:
    """Bytes a device can still give beside what is allocated there now; None when it cannot be told.

    Of the host the least of what the system has and what the limits of this process's control groups leave.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    return min((*found, *_group_room()), default=None)


def _group_room() -> Iterator[int]:
    """What each memory limit on the way to the root leaves; what is cached of files would be given back."""
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines() if _CGROUPS.is_dir() else ()
    for _, kind, path in (line.split(":", 2) for line in lines):
        own = _CGROUPS / kind / path.strip("/")  # in a container its own group may be the root
        for folder in (own, *own.parents) if kind in _LIMITS else ():
            with suppress(OSError, ValueError, KeyError):  # no such group, or no limit
                *names, prefix = _LIMITS[kind]
                most, used = (int((folder / f"memory.{name}").read_text(encoding="ascii")) for name in names)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
                yield max(0, most - used + sum(int(stat[f"{prefix}{age}active_file"]) for age in ("", "in")))


@torch.inference_mode()
def make_forward(model: Transformer | Weights, pools: Pools, *, exact: bool | None, native: bool | None) -> Forward:
    """Choose the forward: the captured step on CUDA in released mode, else by `native` (the compiled helper: None
    where it can run, False never, True insists), else torch.

    `exact` None is exact where this host's library can keep it, and else says in a warning that it does not; the
    captured step always is. Raises ConfigError when it is insisted on and cannot be had, saying why.
    """
    if isinstance(model, Weights):
        if native:
            raise ConfigError(f"native=True: the compiled helper runs on a CPU, these weights are on {model.device}")
        return CudaForward(model, pools.layout, pools.pages, pools.slots, positions=_positions(model.config, pools))
    if not native and (found := _captured(model, pools)) is not None:
        return found
    reason = "" if native is False else _uncovered(model)
    if native is not False and not reason:
        tensors = {name: tensor.detach().numpy() for name, tensor, _ in model.released_tensors(streamed=False)}
        buffers = (pools.page_bytes, pools.slot_bytes)
        try:
            threads, store = torch.get_num_threads(), store_of(model)
            return NativeForward(tensors, model.config, pools.layout, *buffers, threads=threads, store=store)
        except (MissingDependency, ConfigError) as error:
            reason = str(error)
    if native:
        raise ConfigError(f"native=True: the compiled helper cannot run this model here: {reason}")
    buffers = (model, pools.layout, pools.pages, pools.slots)
    if exact is not False:
        try:
            return PagedForward(*buffers, exact=True)
        except ConfigError as error:
            if exact:
                raise
            _log.warning("logits depend on their batch in the last bits, as with exact=False: %s", error)
    return PagedForward(*buffers, exact=False)


def _captured(model: Transformer, pools: Pools) -> Forward | None:
    """The captured step over kernels of CUDA, for a model in released mode whose shapes they take."""
    device = model.embed.weight.device
    if device.type != "cuda" or model.mode != "released":
        return None
    tensors = ((name, tensor) for name, tensor, _ in model.released_tensors())
    positions = _positions(model.config, pools)
    try:
        weights = Weights(model.config, device).fill(tensors)
        return CudaForward(weights, pools.layout, pools.pages, pools.slots, positions=positions)
    except (ConfigError, CheckpointError) as error:
        _log.warning("the captured step does not take this model, it runs in torch: %s", error)
        return None


def _positions(config: ModelConfig, pools: Pools) -> int:
    return min(len(pools.pages) * pools.layout.page_tokens, config.max_position_embeddings)


def _uncovered(model: Transformer) -> str:
    device = model.embed.weight.device.type
    if device == "cpu" and model.mode == "reference" and model.carrier == torch.float32:
        return ""
    return f"it covers float32 in reference mode on a CPU, not {model.carrier} in {model.mode} mode on {device}"


@torch.inference_mode()
def fingerprint(model: Transformer | Weights) -> bytes:
    """Return 16 bytes that name these weights: every small tensor whole, large ones by sums that every byte is in."""
    digest = hashlib.blake2b(repr(sorted(model.config.to_dict().items())).encode(), digest_size=16)
    packed = isinstance(model, Weights)
    tensors = enumerate(model.tensors()) if packed else ((name, each) for name, each, _ in model.released_tensors())
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().contiguous().view(torch.uint8).flatten()
        digest.update(_summed(flat).cpu().numpy().tobytes())
    return digest.digest()


def _summed(flat: Tensor) -> Tensor:
    """Return bytes that stand for flat (N,) uint8: itself, or sums of its words along rows and columns and the rest."""
    whole = flat.numel() // _ROW_BYTES * _ROW_BYTES
    if flat.numel() <= _WHOLE_BYTES:
        return flat
    aligned = flat.clone() if flat.storage_offset() % 8 else flat
    words = aligned[:whole].view(torch.int64).view(-1, _ROW_BYTES // 8)
    return torch.cat([words.sum(1).view(torch.uint8), words.sum(0).view(torch.uint8), flat[whole:]])
