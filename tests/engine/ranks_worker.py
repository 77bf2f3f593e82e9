"""One of two ranks of an engine. Started by test_ranks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pelagos.config import preset
from pelagos.engine.api import MAX_DRAFT, EngineOptions
from pelagos.engine.over_ranks import engine_over
from pelagos.engine.sampler import SamplingParams
from pelagos.errors import CapacityError, ConfigError, RequestError
from pelagos.kernels.layout import CacheLayout
from pelagos.model import cuda_weights
from pelagos.model.cuda_group import cut_width
from pelagos.model.cuda_weights import Weights
from pelagos.parallel import Group


def main() -> None:
    torch.set_num_threads(1)
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
