"""The forward says the same whatever the chunks, the batch, the neighbours in a packed row and what comes later."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from drawn import TINY, TRUE, drawn, ids_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pelagos.config import ModelConfig
from pelagos.errors import CapacityError, ConfigError, RequestError
from pelagos.model import ContiguousCache, FullSequence, Transformer

MODES = ("reference", "released")
CONFIGS = {"tiny": (TINY, 61), "true": (TRUE, 391)}
CUTS = {
    "tiny": ((1, 2, 3, 61), (15, 16, 17, 33, 61), tuple(range(1, 62))),
    "true": ((3, 127, 130, 391), (128, 256, 391)),
}
CLOSE = {"rtol": 0.0, "atol": 1e-4}  # float32, another order of sums
SAME = {"rtol": 0.0, "atol": 1e-5}  # the released mode orders its sums: only the vocabulary head is left to the BLAS


def tolerance(mode: str) -> dict[str, float]:
    return SAME if mode == "released" else CLOSE


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """One thread for these small products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], Transformer]:
    return {(name, mode): drawn(config, 5, mode) for name, (config, _) in CONFIGS.items() for mode in MODES}


def in_chunks(model: Transformer, ids: Tensor, cuts: tuple[int, ...]) -> Tensor:
    cache = ContiguousCache(model.config)
    parts = [model(ids[:, begin:end], cache) for begin, end in zip((0, *cuts), cuts, strict=False)]
    assert cache.position == ids.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "cuts"), [(name, cuts) for name, all_cuts in CUTS.items() for cuts in all_cuts])
@torch.no_grad()
def test_any_chunking(models: dict[tuple[str, str], Transformer], name: str, mode: str, cuts: tuple[int, ...]) -> None:
    config, length = CONFIGS[name]
    ids = ids_of(config, 2, length)
    model = models[name, mode]
    torch.testing.assert_close(in_chunks(model, ids, cuts), model(ids), **tolerance(mode))


@given(st.sets(st.integers(1, 60), max_size=6), st.sampled_from(MODES))
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_drawn_chunkings(models: dict[tuple[str, str], Transformer], cuts: set[int], mode: str) -> None:
    model, ids = models["tiny", mode], ids_of(TINY, 1, 61, seed=len(cuts))
    torch.testing.assert_close(in_chunks(model, ids, (*sorted(cuts), 61)), model(ids), **tolerance(mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_what_follows_changes_nothing(models: dict[tuple[str, str], Transformer], name: str, mode: str) -> None:
    config, length = CONFIGS[name]
    ids, model = ids_of(config, 1, length), models[name, mode]
    whole = model(ids)
    for end in (1, 4, 17, length // 2, length - 1):
        torch.testing.assert_close(model(ids[:, :end]), whole[:, :end], **tolerance(mode))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_batch_rows_are_independent(models: dict[tuple[str, str], Transformer], mode: str) -> None:
    ids, model = ids_of(TINY, 3, 45), models["tiny", mode]
    together = model(ids)
    assert together.shape == (3, 45, TINY.vocab_size)
    assert together.dtype == torch.float32
    for row in range(3):
        torch.testing.assert_close(model(ids[row : row + 1])[0], together[row], **tolerance(mode))
    torch.testing.assert_close(model(ids, last_only=True), together[:, -1:], **tolerance(mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "lengths"), [("tiny", (24, 8, 40)), ("true", (128, 256))])
@torch.no_grad()
def test_packed_samples_do_not_see_each_other(
    models: dict[tuple[str, str], Transformer], name: str, mode: str, lengths: tuple[int, ...]
) -> None:
    """Samples of whole windows in one row, drafts included, equal the samples alone."""
    config, model = CONFIGS[name][0], models[name, mode]
    samples = [ids_of(config, 1, length, seed=length) for length in lengths]
    following = [ids_of(config, 1, length, seed=1 + length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    segments = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])[None]

    def both(ids: Tensor, next_ids: Tensor, **packing: Tensor) -> tuple[Tensor, Tensor]:
        step, cache = model.step(ids, **packing), FullSequence(config.sliding_window)
        streams = model.run(step, cache)
        draft = model.draft(streams, next_ids, step, cache)
        return model.logits(model.collapse(streams, config)), model.logits(draft)

    packed = both(torch.cat(samples, 1), torch.cat(following, 1), positions=positions, segments=segments)
    begin = 0
    for sample, after in zip(samples, following, strict=True):
        alone = both(sample, after)
        for got, wanted in zip(packed, alone, strict=True):
            torch.testing.assert_close(got[:, begin : begin + sample.shape[1]], wanted, **tolerance(mode))
        begin += sample.shape[1]


@torch.no_grad()
def test_modes_differ() -> None:
    """The released mode is not the reference by another name."""
    model, ids = drawn(TINY, 5), ids_of(TINY, 1, 61)
    plain = model(ids)
    model.set_mode("released")
    moved = (model(ids) - plain).norm() / plain.norm()
    assert 0.005 < float(moved) < 1
    model.set_mode("reference")
    torch.testing.assert_close(model(ids), plain, rtol=0, atol=0)


@torch.no_grad()
def test_draft_reads_one_token_ahead(models: dict[tuple[str, str], Transformer]) -> None:
    model, ids = models["tiny", "reference"], ids_of(TINY, 2, 30)
    step, cache = model.step(ids), FullSequence(TINY.sliding_window)
    streams, following = model.run(step, cache), ids.roll(-1, 1)
    draft = model.draft(streams, following, step, cache)
    assert draft.shape == (2, 30, TINY.hidden_size)
    assert model.logits(draft).shape == (2, 30, TINY.vocab_size)
    later = following.clone()
    later[:, 20:] = (later[:, 20:] + 1) % TINY.vocab_size
    moved = (model.draft(streams, later, step, cache) - draft).abs().amax((0, 2))
    assert float(moved[:20].max()) < 1e-5
    assert float(moved[20:].min()) > 1e-3
    bare = Transformer(dataclasses.replace(TINY, num_nextn_predict_layers=0))
    with pytest.raises(ConfigError, match="no MTP block"):
        bare.draft(streams, following, step, cache)


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(1, 0, dtype=torch.int64),
        torch.zeros(1, 4, dtype=torch.int32),
        torch.zeros(1, 4),
        torch.tensor([[0, -1]]),
        torch.tensor([[0, TINY.vocab_size]]),
    ],
)
def test_bad_ids(models: dict[tuple[str, str], Transformer], ids: Tensor) -> None:
    with pytest.raises(RequestError, match="ids: expected"):
        models["tiny", "reference"](ids)


def test_bad_mode() -> None:
    with pytest.raises(ConfigError, match="mode='fp4': expected one of reference, released"):
        Transformer(TINY, mode="fp4", device="meta")


@pytest.mark.parametrize("size", [16, 96])
def test_index_keys_that_fp4_cannot_hold(size: int) -> None:
    config = dataclasses.replace(TINY, index_head_dim=size)
    with pytest.raises(ConfigError, match=f"index_head_dim={size}: released mode .* power of two >= 32"):
        Transformer(config, mode="released", device="meta")
    Transformer(dataclasses.replace(config, compress_ratios=(0, 8) * 3), mode="released", device="meta")


def test_cache_capacity(models: dict[tuple[str, str], Transformer]) -> None:
    cache = ContiguousCache(TINY, capacity=10)
    with torch.no_grad():
        models["tiny", "reference"](ids_of(TINY, 1, 8), cache)
    cache.check_room(2)
    with pytest.raises(CapacityError, match=r"8 tokens held \+ 3 new is more than the capacity of 10"):
        cache.check_room(3)


@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_learns(mode: str) -> None:
    """The loss on tokens and drafts reaches all but the indexer, whose own scores reach all of it and nothing else."""
    model = drawn(TINY, 5)
    model.set_mode(mode, master_weights=mode == "released")
    ids = ids_of(TINY, 4, 64)
    step, cache, aux = model.step(ids), FullSequence(TINY.sliding_window), []
    streams = model.run(step, cache, aux)
    draft = model.draft(streams, ids.roll(-1, 1), step, cache)
    logits = torch.stack((model.logits(model.collapse(streams, TINY)), model.logits(draft)))
    torch.nn.functional.cross_entropy(logits.flatten(0, 2), ids.roll(-1, 1).repeat(2, 1).flatten()).backward(
        retain_graph=True
    )
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    names = {name for name, _ in model.named_parameters()}
    indexers = {name for name in names if ".indexer." in name}
    assert learning == names - indexers
    assert len(indexers) == 2 * 6
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    model.zero_grad()
    scores = [notes["index_scores"] for notes in aux if "index_scores" in notes]
    torch.stack([each.square().sum() for each in scores]).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == indexers


def test_aux_changes_nothing(models: dict[tuple[str, str], Transformer]) -> None:
    """Asking for what losses need takes another path through the attention, not another result."""
    config: ModelConfig = TINY
    for mode in MODES:
        model, ids = models["tiny", mode], ids_of(config, 2, 61)
        with torch.no_grad():
            plain = model.run(model.step(ids), FullSequence(config.sliding_window))
            asked = model.run(model.step(ids), FullSequence(config.sliding_window), [])
        torch.testing.assert_close(asked, plain, **CLOSE)
