"""What `kernels.mhc` computes, by the functions of the model: the site before leaves, this one enters."""

from __future__ import annotations

import torch

from pelagos.kernels.ref import hyper_connection as hc

# (tokens, width): tiles of 16 and 32 tokens and their edges, one and more blocks of channels.
CASES = ((1, 64), (15, 64), (33, 128), (64, 192), (70, 256), (300, 512), (1025, 768), (4096, 1024))
SMALL = 3  # of CASES, from the front, that an interpreter can run
OPTIONS = {"iters": 20, "eps": 1e-6, "norm_eps": 1e-6}


def make_inputs(tokens: int, width: int, *, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.bfloat16):
    """Return random (y, streams, post, comb, fn, base, scale) as `kernels.mhc.site` takes them."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(tokens, width, generator=generator).to(dtype)
    streams = torch.randn(tokens, 4, width, generator=generator).to(dtype) * 2
    post = 2 * torch.rand(tokens, 4, generator=generator)
    comb = hc.sinkhorn(torch.randn(tokens, 4, 4, generator=generator), 20, 1e-6)
    fn = torch.randn(24, 4 * width, generator=generator) * (4 * width) ** -0.5
    base, scale = torch.randn(24, generator=generator), 0.5 + torch.rand(3, generator=generator)
    return tuple(each.to(device) for each in (y, streams, post, comb, fn, base, scale))
