"""The CPU decoder of one token equals the forward, follows its parameters, and leaves them trainable."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from pelagos.config import ModelConfig, tiny
from pelagos.errors import CapacityError
from pelagos.kernels.ref.hyper_connection import sinkhorn
from pelagos.model import ContiguousCache, Transformer
from pelagos.model.decode import sinkhorn4
from pelagos.train.init import initialise

CONFIGS = {
    "tiny": tiny(),
    "pro-like": dataclasses.replace(tiny(), compress_ratios=(8, 8, 4, 8, 4, 8, 0), index_topk=3),
    "window only": dataclasses.replace(tiny(), compress_ratios=(0,) * 7, num_hash_layers=0, rope_scaling=None),
    "topk beyond the text": dataclasses.replace(tiny(), index_topk=64, swiglu_limit=0.5),
}


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or name.endswith("ape"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def difference(model: Transformer, ids: torch.Tensor, prefill: int) -> float:
    """Largest difference between the whole forward and prefill followed by single tokens."""
    with torch.no_grad():
        whole, cache = model(ids), ContiguousCache(model.config)
        worst = float((model(ids[:, :prefill], cache) - whole[:, :prefill]).abs().max())
        for t in range(prefill, ids.shape[1]):
            worst = max(worst, float((model(ids[:, t : t + 1], cache)[:, 0] - whole[:, t]).abs().max()))
    return worst


@pytest.mark.parametrize("prefill", [1, 17])
@pytest.mark.parametrize("name", CONFIGS)
def test_single_tokens_equal_the_forward(name: str, prefill: int) -> None:
    config = CONFIGS[name]
    ids = torch.randint(config.vocab_size, (1, 90), generator=torch.Generator().manual_seed(3))
    assert difference(random_model(config), ids, prefill) < 2e-5


def test_long_text_moves_the_cache_buffers() -> None:
    config = CONFIGS["tiny"]
    ids = torch.randint(config.vocab_size, (1, 1200), generator=torch.Generator().manual_seed(4))
    assert difference(random_model(config), ids, 30) < 5e-5


def test_it_follows_updates_moves_and_training() -> None:
    config, ids = CONFIGS["tiny"], torch.arange(40).unsqueeze(0)
    model = random_model(config)
    assert difference(model, ids, 3) < 2e-5
    model.load_state_dict(random_model(config, seed=5).state_dict())
    assert difference(model, ids, 3) < 2e-5
    model(ids).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert difference(model, ids, 3) < 2e-5
    assert difference(copy.deepcopy(model), ids, 3) < 2e-5
    model.to(torch.float64).to(torch.float32)
    assert difference(model, ids, 3) < 2e-5


def test_inference_mode_does_not_spoil_the_parameters() -> None:
    model, ids = random_model(CONFIGS["tiny"]), torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        model(ids[:, :1])
    model(ids).mean().backward()
    assert model.layers[0].attn.wq_a.weight.grad is not None


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
def test_unrolled_sinkhorn_equals_the_reference(spread: float) -> None:
    logits = spread * torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = sinkhorn(logits, 20, 1e-6).numpy()
    for matrix, reference in zip(logits.numpy(), expected, strict=True):
        assert np.abs(sinkhorn4(matrix, 20, 1e-6) - reference).max() < 2e-6


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_full_cache_refuses_before_it_appends(tokens: int) -> None:
    model, ids = random_model(CONFIGS["tiny"]), torch.arange(30).unsqueeze(0)
    cache = ContiguousCache(model.config, capacity=10)
    with torch.no_grad():
        model(ids[:, :10], cache)
        with pytest.raises(CapacityError, match=rf"10 tokens held \+ {tokens} new"):
            model(ids[:, 10 : 10 + tokens], cache)
    assert cache.position == 10


def test_a_model_made_in_inference_mode_decodes() -> None:
    with torch.inference_mode():
        model = random_model(CONFIGS["tiny"])
    ids = torch.arange(12).unsqueeze(0)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            cache, whole = ContiguousCache(model.config), model(ids)
            model(ids[:, :11], cache)
            assert float((model(ids[:, 11:], cache)[:, 0] - whole[:, 11]).abs().max()) < 2e-5
