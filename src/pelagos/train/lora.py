"""Low-rank adapters on the dense parts: attention projections and shared experts; everything else is frozen.

The adapted weight is W + B A / rank x ALPHA: the forward, its quantisation and the export see one weight, as ever.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pelagos.model import Transformer
from pelagos.model.layers import Linear

DENSE = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "shared_experts.w1", "shared_experts.w2",
         "shared_experts.w3")  # fmt: skip
ALPHA = 16.0


class LowRank(nn.Module):
    """Adds a trained product of two thin matrices to a frozen weight (O, I)."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        down = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        self.lora_down = nn.Parameter(down.to(weight.device))
        self.lora_up = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.lora_up @ self.lora_down) * (ALPHA / self.lora_down.shape[0])


def attach(model: Transformer, rank: int, seed: int) -> None:
    """Freeze a model but for new adapters of its dense projections."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for module in [m for n, m in model.named_modules() if isinstance(m, Linear) and n.endswith(DENSE)]:
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, generator))
