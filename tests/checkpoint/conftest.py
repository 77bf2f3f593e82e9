"""A small set of tensors that has every format of the release."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def tensors() -> list[tuple[str, Tensor, str]]:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        ("embed.weight", normal(128, 64).bfloat16(), "bf16"),
        ("norm.weight", normal(64).bfloat16(), "bf16"),
        ("hc_head_scale", normal(1), "f32"),
        ("layers.0.attn.attn_sink", normal(4), "f32"),
        ("layers.0.attn.wq_a.weight", normal(24, 64), "fp8"),
        ("layers.0.attn.wq_b.weight", normal(130, 200), "fp8"),
        ("layers.0.ffn.gate.tid2eid", torch.randint(0, 8, (128, 2), generator=generator), "i64"),
        ("layers.0.ffn.experts.0.w1.weight", normal(32, 64), "fp4"),
        ("layers.0.ffn.experts.0.w2.weight", normal(64, 32), "fp4"),
        ("layers.0.ffn.experts.1.w1.weight", normal(32, 64), "fp8"),
    ]
