"""The CPU decoder equals the forward, gives a row the same bits in any company, and leaves its parameters trainable."""

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from pelagos.config import ModelConfig, tiny
from pelagos.errors import CapacityError
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.ref.hyper_connection import sinkhorn, sinkhorn4
from pelagos.model import ContiguousCache, Transformer, decode
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


class Answers:
    """Sequences over pools of their own: prompts as one kind, then answers of a token or a few of them a call."""

    def __init__(self, config: ModelConfig, lengths: Sequence[int], *, rewind: int = 4, seed: int = 0) -> None:
        self.layout = CacheLayout(config, rewind=rewind)
        rng, count = np.random.default_rng(seed), self.layout.pages_for(max(lengths) + ANSWER + rewind)
        slots = torch.zeros(len(lengths) + 2, self.layout.slot_bytes, dtype=torch.uint8)
        pages = torch.zeros(len(lengths) * count + 2, self.layout.page_bytes, dtype=torch.uint8)
        self.forward = PagedForward(random_model(config), self.layout, pages, slots)
        assert self.forward.two_kinds
        self.slots = rng.permutation(len(slots))
        self.tables = rng.permutation(len(pages)).astype(np.int32)[: len(lengths) * count].reshape(-1, count)
        text = np.random.default_rng(7)
        self.ids = [text.integers(config.vocab_size, size=length + ANSWER) for length in lengths]
        self.at = list(lengths)
        for which, length in enumerate(lengths):
            self.forward.forward([self.span(which, 0, self.ids[which][:length])])

    def span(self, which: int, start: int, tokens: np.ndarray, *, decode: bool = False) -> Span:
        wanted = len(tokens) if decode else 0
        return Span(
            tokens, start, int(self.slots[which]), self.tables[which], logits=wanted, streams=wanted, decode=decode
        )

    def alone(self, which: int) -> np.ndarray:
        """Logits of an answer, token by token."""
        ids, at = self.ids[which], self.at[which]
        spans = [self.span(which, p, ids[p : p + 1], decode=True) for p in range(at, at + ANSWER)]
        return np.concatenate([self.forward.forward([span]).logits for span in spans])


ANSWER = 24
COMPANY = {  # lengths of the prompts
    "tiny": (5, 90, 17, 33, 60, 61, 7, 128, 40, 131, 3),
    "pro-like": (130, 9, 75),
    "window only": (1, 12, 100),
    "topk beyond the text": (64, 127, 30, 31),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_have_their_bits_in_any_company(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, or drawn together with others, prompts, wrong drafts taken back, other pages, slots, rings and tiles."""
    config, lengths = CONFIGS[name], COMPANY[name]
    plain = Answers(config, lengths, rewind=0)
    expected = [plain.alone(which) for which in range(len(lengths))]
    monkeypatch.setattr(decode, "ROWS", 9)
    served, rng = Answers(config, lengths, seed=1), np.random.default_rng(2)
    done = [0] * len(lengths)
    while min(done) < ANSWER:
        calls: list[tuple[int, int, Span]] = []  # who, how many tokens are right, what
        for which in rng.permutation(len(lengths)).tolist():
            size = min(int(rng.choice([0, 1, 1, 1, 2, 4, 5, 11])), ANSWER - done[which])
            if size:
                start = served.at[which] + done[which]
                tokens, right = served.ids[which][start : start + size].copy(), size
                if 1 < size <= 5 and rng.random() < 0.5:
                    right = int(rng.integers(1, size))
                    tokens[right:] = rng.integers(config.vocab_size, size=size - right)
                calls.append((which, right, served.span(which, start, tokens, decode=True)))
        given = served.span(0, 0, served.ids[0][: lengths[0]])._replace(slot=int(served.slots[-1]), frozen=lengths[0])
        spans = [span for _, _, span in calls]
        output = served.forward.forward([*spans[:1], given, *spans[1:]])
        row = 0
        for which, right, span in calls:
            wanted = expected[which][done[which] : done[which] + right]
            assert np.array_equal(output.logits[row : row + right], wanted)
            row, done[which] = row + len(span.tokens), done[which] + right
        assert row == len(output.logits) == len(output.streams)


def test_tiles_and_blocks_change_the_order_of_sums_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Answers(CONFIGS["tiny"], (400,)).alone(0)
    monkeypatch.setattr(decode, "ENTRIES", 7)
    monkeypatch.setattr(decode, "PAGES", 1)
    tiled = Answers(CONFIGS["tiny"], (400,)).alone(0)
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=2e-5)
    assert not np.array_equal(tiled, whole)


def test_a_product_that_sees_its_company_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers then go through the batch, whose rule holds."""
    plain, config = decode._product, CONFIGS["tiny"]
    monkeypatch.setattr(decode, "_product", lambda weight, x: plain(weight, x) * np.float32(1 + 1e-6 * (len(x) > 1)))
    layout = CacheLayout(config)
    pools = (torch.zeros(4, size, dtype=torch.uint8) for size in (layout.page_bytes, layout.slot_bytes))
    forward = PagedForward(random_model(config), layout, *pools)
    assert not forward.two_kinds
    span = Span(np.arange(3), 0, 0, np.zeros(1, np.int32), decode=True)
    assert np.array_equal(forward.forward([span]).logits, forward.forward([span._replace(decode=False)]).logits)


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
    expected = sinkhorn(logits, 20, 1e-6).numpy().swapaxes(1, 2)
    together = sinkhorn4(logits.numpy(), 20, 1e-6)
    assert np.abs(together - expected).max() < 2e-6
    few = [sinkhorn4(part, 20, 1e-6) for part in (logits.numpy()[:1], logits.numpy()[1:8])]
    assert np.array_equal(np.concatenate(few), together[:8])


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
