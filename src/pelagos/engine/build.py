"""From a model and options to a running engine: plan the memory, then allocate exactly that."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from pelagos.chat.tokenizer import Tokenizer
from pelagos.engine.api import MAX_DRAFT, PROMPT_LOGPROB_TOKENS, EngineOptions
from pelagos.engine.disk import QUEUE_BYTES, DiskCache, parse_policy
from pelagos.engine.local import WRITE_PAGES, LocalEngine
from pelagos.engine.memory import plan_memory
from pelagos.engine.runner import Pools, available_bytes, device_of, fingerprint, make_forward, weight_bytes
from pelagos.engine.tiers import Tiers, staging_bytes
from pelagos.errors import CapacityError
from pelagos.kernels.layout import CacheLayout
from pelagos.model import Transformer
from pelagos.model.cuda_weights import Weights

LAYOUT_VERSION = b"pages-1"
T = TypeVar("T")


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
        config, options, mode=model.mode, rewind=drafts, weight_bytes=weights, host_available=host_free, apart=apart,
        available=None if free is None else free + weights,
    )  # fmt: skip
    pools = Pools(layout, pages=plan.pages, slots=plan.slots, device=device)
    forward = aside(lambda: make_forward(model, pools, exact=options.exact, native=options.native))
    name = aside(lambda: fingerprint(model))
    tokens = options.chunk_tokens + options.max_requests * (1 + drafts)
    if isinstance(model, Transformer):
        weights += forward.weight_bytes
    scored = (PROMPT_LOGPROB_TOKENS + options.max_requests) * config.vocab_size * 4  # on its way to the host
    queue = max(2 * WRITE_PAGES * layout.page_bytes, min(QUEUE_BYTES, plan.kv_bytes // 4))  # of writes
    scratch = forward.scratch_bytes(tokens) + scored + (staging_bytes(layout) if plan.host_pages else 0)
    scratch += queue if options.disk_dir is not None and pools.on_cpu else 0
    plan = dataclasses.replace(plan, weight_bytes=weights, scratch_bytes=scratch)
    free = available_bytes(device)
    backed = 0 if not pools.on_cpu else plan.kv_bytes + plan.host_bytes  # a device has backed its pools already
    if free is not None and plan.scratch_bytes + backed > free:
        raise CapacityError(
            f"caches of {plan.kv_bytes:,} and scratch of {plan.scratch_bytes:,} bytes do not fit the {free:,} there "
            "are: lower kv_bytes, max_requests or chunk_tokens"
        )
    salt = b"|".join((name, model.mode.encode(), str(model.carrier).encode(), forward.numeric_path.encode()))
    tiers = Tiers(pools, plan.host_pages)
    if options.disk_dir is not None:
        tiers.disk = DiskCache(
            Path(options.disk_dir), fingerprint=LAYOUT_VERSION + salt, page_bytes=layout.page_bytes,
            quota_bytes=options.disk_bytes, user_quota_bytes=options.user_disk_bytes, queue_bytes=queue,
        )  # fmt: skip
    engine = LocalEngine(
        config, options, tiers=tiers, forward=forward, plan=plan, salt=salt,
        disk_policy=policy, decoder=None if tokenizer is None else tokenizer.stream_decoder,
    )  # fmt: skip
    if tiers.disk is not None:  # its writer's thread would keep it for ever
        weakref.finalize(engine, tiers.disk.close, 30).atexit = False
    return engine
