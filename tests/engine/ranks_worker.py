"""One of two ranks of an engine: random weights on a CPU; nano's own with `cuda`, or `cpu`. Started by test_ranks."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pelagos.checkpoint import open_checkpoint, resolve_model
from pelagos.config import preset
from pelagos.engine.api import MAX_DRAFT, EngineOptions
from pelagos.engine.over_ranks import engine_over
from pelagos.engine.sampler import SamplingParams
from pelagos.errors import CapacityError, ConfigError, RequestError
from pelagos.kernels.layout import CacheLayout
from pelagos.model import cuda_weights
from pelagos.model.cuda_group import _EXPERT, cut_tensors, cut_width
from pelagos.model.cuda_weights import Weights
from pelagos.parallel import Group


def widened(tensors: Any, ranks: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Experts of 128 as of 128 a rank: a part of each and zeros behind it, which add nothing."""
    for name, values, _ in tensors:
        if found := _EXPERT.search(name):
            dim = int(found[2] == "w2")
            parts = values.chunk(ranks, dim)
            whole = torch.cat([each for part in parts for each in (part, torch.zeros_like(part))], dim)
            yield name, whole
        else:
            yield name, values


def bits_of_nano(device: torch.device) -> None:
    """Requests together, one by one and in other chunks give the same tokens and log-probabilities, drafts on."""
    group, checkpoint = Group(device), open_checkpoint(resolve_model("nano"))
    config = dataclasses.replace(checkpoint.config, moe_intermediate_size=128 * group.size)
    config = dataclasses.replace(config, max_position_embeddings=4096)
    weights = Weights(cut_width(config, group.size), device)
    tensors = widened(checkpoint.stream(list(checkpoint.tensors)), group.size)
    weights.fill(cut_tensors(tensors, group.rank, group.size))
    lengths, tokens = ((700, 40, 300, 129, 5, 1000), 32) if device.type == "cuda" else ((140, 5, 40), 12)
    ids = [np.random.default_rng(length).integers(3, 4096, length).tolist() for length in lengths]
    params = [SamplingParams(max_tokens=tokens, temperature=at % 2, seed=at, ignore_eos=True, logprobs=True)
              for at in range(len(ids))]  # fmt: skip
    found: list[list[Any]] = []
    for chunk, together in ((2048, True), (2048, False), (256, True)):
        options = EngineOptions(kv_bytes=64 << 20, max_requests=8, prefix_cache=False, preemption="recompute",
                                chunk_tokens=chunk, exact=True)  # fmt: skip
        with engine_over(weights, None, options, group) as engine:
            if engine is None:
                continue
            begun, streams, steps = time.perf_counter(), [], []
            for each, asked in zip(ids, params, strict=True):
                streams.append(engine.submit(each, asked))
                if not together:
                    steps.append([(step.token_id, step.logprob) for step in streams[-1]])
            found.append(steps or [[(step.token_id, step.logprob) for step in stream] for stream in streams])
            took, stats = time.perf_counter() - begun, engine.stats()
            how, counts = "together" if together else "one by one", (stats.drafted_tokens, stats.accepted_drafts)
            print(f"chunks of {chunk}, {how}: {took:.2f} s, drafted and accepted {counts}", flush=True)
    if group.rank == 0:
        differ = [sum(a != b for a, b in zip(run, found[0], strict=True)) for run in found]
        print(f"requests of {len(ids)} that differ from the first run: {differ}", flush=True)
        assert device.type == "cpu" or not any(differ)
    print(f"rank {group.rank} of {group.size}: done", flush=True)
    group.close()


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:]:
        device = torch.device(sys.argv[1])
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        return bits_of_nano(device)
    cuda_weights._RANDOM_BLOCK = 1 << 20  # pyright: ignore[reportPrivateUsage]
    config = dataclasses.replace(
        preset("nano"), num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1, vocab_size=512,
        moe_intermediate_size=256, n_routed_experts=8, max_position_embeddings=512,
    )  # fmt: skip
    cpu = torch.device("cpu")
    group = Group(cpu)
    weights = Weights(cut_width(config, group.size), cpu).fill_random()
    layout = CacheLayout(weights.config, "released", MAX_DRAFT)
    kv_bytes = 2 * layout.slot_bytes + 3 * layout.page_bytes
    options = EngineOptions(
        kv_bytes=kv_bytes, max_requests=4, prefix_cache=False, preemption="recompute", chunk_tokens=256
    )
    cached = dataclasses.replace(options, prefix_cache=True)
    with pytest.raises(ConfigError, match="prefix_cache=False"), engine_over(weights, None, cached, group):
        pass
    greedy = dataclasses.replace(options, kv_bytes=1 << 50)
    with pytest.raises(CapacityError, match="ask for at most"), engine_over(weights, None, greedy, group):
        pass
    with engine_over(weights, None, options, group) as engine:
        if engine is not None:
            ids = [np.random.default_rng(seed).integers(0, 512, 40 + 60 * seed).tolist() for seed in range(5)]
            params = SamplingParams(max_tokens=6, temperature=0.0)
            streams = [engine.submit(each, params) for each in ids]
            tokens = [[step.token_id for step in stream] for stream in streams]
            assert [len(each) for each in tokens] == [6] * 5, tokens
            assert (engine.plan.pages, engine.plan.slots, engine.plan.positions) == (6, 4, 384)
            with pytest.raises((RequestError, CapacityError), match=r"has 3 on each of 2 ranks"):
                engine.submit([1] * 384, params)  # which no rank holds by itself
            print(engine.stats(), flush=True)
    print(f"rank {group.rank} of {group.size}: done", flush=True)
    group.close()


if __name__ == "__main__":
    main()
