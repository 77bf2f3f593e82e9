"""`transformers` on the weights of a released checkpoint, as the other side of speed benches."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
Step = Callable[[torch.Tensor], torch.Tensor]


def decode(step: Step, prompt: torch.Tensor, count: int) -> tuple[float, list[int]]:
    """Prefill outside the clock, then time `count` greedy steps."""
    token = step(prompt).argmax(-1, keepdim=True)
    tokens = []
    started = time.perf_counter()
    for _ in range(count):
        token = step(token).argmax(-1, keepdim=True)
        tokens.append(int(token))
    return time.perf_counter() - started, tokens


def their_step(oracle: Any, implementation: str) -> Step:
    """A fresh sequence on the other side, with one of its experts implementations."""
    import transformers

    oracle.set_experts_implementation(implementation)
    past = transformers.DynamicCache(config=oracle.config)
    return lambda ids: oracle(ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1]


def load_oracle(path: Path) -> Any:
    """Load the same file in transformers, every weight expanded to float32."""
    import transformers
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

    settings = transformers.FineGrainedFP8Config(dequantize=True)
    oracle = DeepseekV4ForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=settings)
    return oracle.float().eval()
