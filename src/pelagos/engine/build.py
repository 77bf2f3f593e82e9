"""From a model and options to a running engine: plan the memory, then allocate exactly that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from pelagos.chat.tokenizer import Tokenizer
from pelagos.engine.disk import DiskCache, parse_policy
from pelagos.engine.local import LocalEngine
from pelagos.engine.memory import plan_memory
from pelagos.engine.runner import Pools, available_bytes, device_of, fingerprint, make_forward, weight_bytes
from pelagos.engine.speculation import FixedDepth, MTPDrafter
from pelagos.engine.tiers import Tiers, staging_bytes
from pelagos.errors import CapacityError, ConfigError
from pelagos.kernels.layout import CacheLayout
from pelagos.model import Transformer
from pelagos.model.cuda_weights import Weights

MAX_DRAFT = 4  # drafted tokens a step may verify; state slots have room to take as many back
LAYOUT_VERSION = b"pages-1"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How an engine serves; see `LLM` for each."""

    chunk_tokens: int = 512
    max_requests: int = 16
    kv_bytes: int | None = None
    host_kv_bytes: int | None = None
    prefix_cache: bool = True
    disk_dir: str | Path | None = None
    disk_policy: str = "turns"
    disk_bytes: int = 8 << 30
    user_disk_bytes: int | None = None
    speculation: bool | int = True  # a number drafts that many tokens at every step, whether it pays or not
    exact: bool | None = None
    native: bool | None = None
    preemption: str = "swap"
    threaded: bool = True

    def __post_init__(self) -> None:
        if self.preemption not in ("swap", "recompute"):
            raise ConfigError(f"preemption={self.preemption!r}: expected swap or recompute")
        if type(self.speculation) not in (bool, int) or not 0 <= self.speculation <= MAX_DRAFT:
            raise ConfigError(f"speculation={self.speculation!r}: expected true, false or a depth to {MAX_DRAFT}")
        for name, also in (("prefix_cache", False), ("exact", None), ("native", None)):
            if type(value := getattr(self, name)) is not bool and value is not also:
                raise ConfigError(f"{name}={value!r}: expected true or false")
        if self.disk_dir is not None and not self.prefix_cache:
            raise ConfigError("disk_dir is given with prefix_cache=False: the disk holds prefixes, so switch it on")


def aside(make: Callable[[], T]) -> T:
    """Return make(), called on a thread that ends.

    OpenMP keeps workers for every thread that ever computed, and lets them sleep between operators once they outnumber
    the processors: with a caller's and the engine's own a step of small operators took 2.5 times as long.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def build_engine(model: Transformer | Weights, tokenizer: Tokenizer | None, options: EngineOptions) -> LocalEngine:
    """Plan memory, allocate the pools and start an engine over a loaded model.

    Raises CapacityError when the plan does not fit the device's memory, ConfigError for options that mean nothing.
    """
    config, device, weights = model.config, device_of(model), weight_bytes(model)
    drafts = MAX_DRAFT if options.speculation and config.num_nextn_predict_layers else 0
    layout = CacheLayout(config, model.mode, drafts)
    policy = parse_policy(options.disk_policy, layout.page_tokens)
    free, host_free, apart = available_bytes(device), available_bytes(torch.device("cpu")), device.type != "cpu"
    if not apart and host_free is not None:
        host_free -= options.kv_bytes or 0
    plan = plan_memory(
        config, mode=model.mode, kv_bytes=options.kv_bytes, max_requests=options.max_requests,
        chunk_tokens=options.chunk_tokens, rewind=drafts, prefix_cache=options.prefix_cache,
        swap=options.preemption == "swap", weight_bytes=weights, available=None if free is None else free + weights,
        host_kv_bytes=options.host_kv_bytes, host_available=host_free, apart=apart,
    )  # fmt: skip
    pools = Pools(layout, pages=plan.pages, slots=plan.slots, device=device)
    forward = aside(lambda: make_forward(model, pools, exact=options.exact, native=options.native))
    name = aside(lambda: fingerprint(model))
    tokens = options.chunk_tokens + options.max_requests * (1 + drafts)
    if isinstance(model, Transformer):
        weights += forward.weight_bytes
    scratch = forward.scratch_bytes(tokens) + (staging_bytes(layout) if plan.host_pages else 0)
    plan = dataclasses.replace(plan, weight_bytes=weights, scratch_bytes=scratch)
    free = available_bytes(device)
    backed = 0 if not pools.on_cpu else plan.kv_bytes + plan.host_bytes  # a device has backed its pools already
    needed = plan.scratch_bytes + backed
    if free is not None and needed > free:
        raise CapacityError(
            f"caches of {plan.kv_bytes:,} and scratch of {plan.scratch_bytes:,} bytes do not fit the {free:,} there "
            "are: lower kv_bytes, max_requests or chunk_tokens"
        )
    salt = b"|".join((name, model.mode.encode(), str(model.carrier).encode(), forward.numeric_path.encode()))
    tiers, disk = Tiers(pools, plan.host_pages) if plan.host_pages else None, None
    if options.disk_dir is not None:
        disk = DiskCache(
            Path(options.disk_dir), fingerprint=LAYOUT_VERSION + salt, page_bytes=layout.page_bytes,
            quota_bytes=options.disk_bytes, user_quota_bytes=options.user_disk_bytes,
        )  # fmt: skip
        if tiers is not None:
            tiers.disk = disk
    window = config.sliding_window
    drafter = MTPDrafter(forward.draft, window=window, max_depth=drafts, draws=forward.draws) if drafts else None
    return LocalEngine(
        config, pools=pools, forward=forward, plan=plan, chunk_tokens=options.chunk_tokens, salt=salt,
        decoder=None if tokenizer is None else tokenizer.stream_decoder, prefix_cache=options.prefix_cache,
        disk=disk, disk_policy=policy, tiers=tiers, drafter=drafter, swap=options.preemption == "swap",
        depth=FixedDepth(int(options.speculation)) if options.speculation is not True else None,
        threaded=options.threaded,
    )  # fmt: skip
