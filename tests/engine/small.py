"""A small real engine for tests: the tiny model with random weights, no tokenizer, stepped by hand or threaded."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from pelagos.config import ModelConfig, tiny
from pelagos.engine import EngineOptions, LocalEngine, SamplingParams, Stream, build_engine
from pelagos.engine.memory import MemoryPlan, plan_memory
from pelagos.kernels.native import build
from pelagos.model import Transformer

HELPER = build().path is not None
VOCAB = tiny().vocab_size


@functools.cache
def tiny_model(**changes: Any) -> Transformer:
    """The tiny model, or one with another config, its weights drawn at random."""
    torch.manual_seed(11)
    model = Transformer(dataclasses.replace(tiny(), **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        for block in (*model.blocks, *model.mtp):
            if block.ffn.gate.tid2eid is not None:
                block.ffn.gate.tid2eid.random_(tiny().n_routed_experts)
    return model.eval()


def engine_of(**options: Any) -> LocalEngine:
    """An engine with small pools, unless told otherwise; without a thread the test calls `step`."""
    given = {"chunk_tokens": 128, "max_requests": 4, "kv_bytes": 8 << 20} | options
    return build_engine(tiny_model(), None, EngineOptions(**given))


def plan_of(config: ModelConfig, *, swap: bool = True, chunk_tokens: int = 1024, **given: Any) -> MemoryPlan:
    """`plan_memory` with options and what is known of the machine in one call."""
    named = {each.name: given.pop(each.name) for each in dataclasses.fields(EngineOptions) if each.name in given}
    options = EngineOptions(chunk_tokens=chunk_tokens, preemption="swap" if swap else "recompute", **named)
    return plan_memory(config, options, **given)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def finish(engine: LocalEngine, *streams: Stream, most: int = 10_000) -> list[list[int]]:
    """Step a hand-driven engine until the streams have ended; their tokens."""
    for _ in range(most):
        if all(stream.finish_reason is not None for stream in streams):
            break
        with torch.inference_mode():
            engine.step()
    return [[step.token_id for step in stream] for stream in streams]


def params(count: int = 16, **changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": count, "temperature": 0, "ignore_eos": True} | changes))
