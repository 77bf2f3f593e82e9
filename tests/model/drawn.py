"""Small models with random weights in which no mechanism is switched off."""

import dataclasses

import torch

from pelagos.config import ModelConfig, tiny
from pelagos.model import Transformer

# Every boundary within a few dozen tokens; the released mode wants index dimensions in groups of 32.
TINY = tiny()
# The released ratios and window; three windows of 128 tokens cross all of them.
TRUE = dataclasses.replace(
    TINY, sliding_window=128, compress_ratios=(0, 4, 128, 4, 128, 0, 0), index_topk=24, hidden_size=32, head_dim=16
)


def drawn(config: ModelConfig, seed: int, mode: str = "reference") -> Transformer:
    """Return a model whose tensors are all random: sinks, biases and scales too."""
    model = Transformer(config, mode=mode)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor, _ in model.released_tensors():
            noise = torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else None
            if noise is None:
                order = torch.rand(len(tensor), config.n_routed_experts, generator=generator).argsort(-1)
                tensor.copy_(order[:, : tensor.shape[1]])
            elif name.endswith(("_base", "attn_sink", ".ape", "gate.bias")):
                tensor.copy_(0.4 * noise)
            elif name.endswith(("_scale", "norm.weight")):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
    return model.eval()


def ids_of(config: ModelConfig, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return random ids (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)
