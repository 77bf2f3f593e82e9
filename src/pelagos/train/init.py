"""Random initialisation of a V4-architecture model for training from zero."""

import torch
from torch import Tensor

from pelagos.model import Transformer

EMBED_STD = 0.5
STREAM_BIAS = 4.0  # comb starts near the identity: softmax of (4, 0, 0, 0) keeps 95 % of a stream in place


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Fill every parameter and routing table in place, the same for a seed on every device.

    Projections get N(0, 1/fan_in), those that write to the streams a third of that; streams start nearly
    separate; hash tables hold distinct experts a token.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(_values(name, parameter, model, generator))
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            scores = torch.rand(buffer.shape[0], model.config.n_routed_experts, generator=generator)
            buffer.copy_(scores.topk(buffer.shape[1], -1).indices)
        elif name.endswith("gate.bias"):
            buffer.zero_()


def _values(name: str, parameter: Tensor, model: Transformer, generator: torch.Generator) -> Tensor:
    shape, leaf, n = parameter.shape, name.rsplit(".", 1)[-1], model.config.hc_mult
    normal = torch.randn(shape, generator=generator)
    if leaf.endswith("_fn"):
        return normal * shape[-1] ** -0.5
    if leaf.endswith("_scale"):
        return torch.full(shape, 0.1)
    if leaf == "hc_head_base":
        return torch.zeros(shape)
    if leaf.endswith("_base"):
        comb = STREAM_BIAS * torch.eye(n).flatten()
        return torch.cat((torch.linspace(-1, 1, n).roll(_layer(name)), torch.zeros(n), comb))
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if leaf in ("attn_sink", "ape"):
        return torch.zeros(shape)
    if name == "embed.weight":
        return normal * EMBED_STD
    if name == "head.weight":
        return normal * 0.02
    writes = ".wo_b." in name or leaf == "w2" or ".w2." in name
    return normal * shape[-1] ** -0.5 / (3.0 if writes else 1.0)


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else 0
