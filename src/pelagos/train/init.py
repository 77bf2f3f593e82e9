"""Random initialisation of a V4-architecture model for training from zero."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pelagos.model import Transformer

EMBED_STD = 0.5
STREAM_BIAS = 4.0  # comb starts near the identity: softmax of (4, 0, 0, 0) keeps 95 % of a stream in place


def initialise(model: Transformer, seed: int) -> None:
    """Fill every parameter and routing table in place, the same for a seed on every device, and in a part of a model.

    Each tensor is drawn by its released name, each expert apart. Projections get N(0, 1/fan_in), those that write to
    the streams a third of that; streams start nearly separate; hash tables hold distinct experts a token.
    """

    def fill(name: str, tensor: Tensor) -> None:
        draw = np.random.default_rng((seed, *name.encode()))
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # whose caller's modes a thread has not
            tensor.copy_(_values(name, tensor.shape, model.config.hc_mult, model.config.n_routed_experts, draw))

    with ThreadPoolExecutor() as pool:
        for drawn in [pool.submit(fill, name, tensor) for name, tensor, _ in model.released_tensors()]:
            drawn.result()


def _values(name: str, shape: torch.Size, n: int, experts: int, draw: np.random.Generator) -> Tensor:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "tid2eid":
        return torch.from_numpy(draw.random((shape[0], experts), np.float32)).topk(shape[1], -1).indices
    if leaf.endswith("_scale"):
        return torch.full(shape, 0.1)
    if leaf in ("hc_head_base", "attn_sink", "ape", "bias"):
        return torch.zeros(shape)
    if leaf.endswith("_base"):
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        comb = STREAM_BIAS * torch.eye(n).flatten()
        return torch.cat((torch.linspace(-1, 1, n).roll(layer), torch.zeros(n), comb))
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name == "embed.weight":
        std = EMBED_STD
    elif name == "head.weight":
        std = 0.02
    else:
        std = shape[-1] ** -0.5 / (3.0 if ".wo_b." in name or ".w2." in name else 1.0)
    return torch.from_numpy(draw.standard_normal(shape, np.float32)) * std
