"""The CPU decoder of one token equals the forward, follows its parameters, and leaves them trainable."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from pelagos.config import ModelConfig, tiny
from pelagos.errors import CapacityError
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.ref.hyper_connection import sinkhorn, sinkhorn4
from pelagos.model import ContiguousCache, Transformer
from pelagos.model.paged import PagedForward
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


def difference(model: Transformer, ids: torch.Tensor, prefill: int, scattered: bool = False) -> float:
    """Largest difference between the whole forward and prefill followed by single tokens over the pools."""
    layout = CacheLayout(model.config)
    count = layout.pages_for(ids.shape[1])
    pages = torch.zeros(2 * count + 3, layout.page_bytes, dtype=torch.uint8)
    slots = torch.zeros(2, layout.slot_bytes, dtype=torch.uint8)
    table = np.arange(2 * count, dtype=np.int32)[::2] if scattered else np.arange(3, 3 + count, dtype=np.int32)
    with torch.inference_mode():
        whole = model(ids)[0].numpy()
    paged, tokens, worst = PagedForward(model, layout, pages, slots, exact=False), ids[0].numpy(), 0.0
    for begin, end in ((0, prefill), *((t, t + 1) for t in range(prefill, ids.shape[1]))):
        out = paged.forward([Span(tokens[begin:end], begin, 1, table, 0, end - begin, 1)])
        worst = max(worst, float(np.abs(out.logits - whole[begin:end]).max()))
        assert out.streams.shape == (1, model.config.hc_mult, model.config.hidden_size)
    return worst


@pytest.mark.parametrize("prefill", [1, 17])
@pytest.mark.parametrize("name", CONFIGS)
def test_single_tokens_equal_the_forward(name: str, prefill: int) -> None:
    config = CONFIGS[name]
    ids = torch.randint(config.vocab_size, (1, 90), generator=torch.Generator().manual_seed(3))
    assert difference(random_model(config), ids, prefill) < 2e-5


def test_long_text_over_many_pages() -> None:
    config = CONFIGS["tiny"]
    ids = torch.randint(config.vocab_size, (1, 2200), generator=torch.Generator().manual_seed(4))
    assert difference(random_model(config), ids, 2100) < 5e-5
    assert difference(random_model(config), ids[:, :300], 200, scattered=True) < 5e-5


def test_the_parameters_stay_trainable() -> None:
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
    assert difference(model, torch.arange(12).unsqueeze(0), 6) < 2e-5
