"""The captured step over the references on a CPU, and as graphs on the device, against the model's own forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pelagos import LLM, cost
from pelagos.chat import Tokenizer
from pelagos.checkpoint import resolve_model
from pelagos.config import preset
from pelagos.engine import EngineOptions, build_engine
from pelagos.engine.runner import fingerprint
from pelagos.engine.sampler import SamplingParams
from pelagos.errors import CapacityError, CheckpointError, ConfigError, RequestError
from pelagos.kernels import sampling
from pelagos.kernels.layout import CacheLayout, Draw, Output, Span
from pelagos.load import load_model, load_weights
from pelagos.model import Transformer
from pelagos.model.cuda_forward import BUCKETS, CudaForward, agreed, tell
from pelagos.model.cuda_weights import Weights
from pelagos.model.paged import PagedForward

# Logits of nano in released mode, relative to their norm. With a BF16 carrier the model's own forward is 0.06 away from
# its float32 carrier on the same random tokens: values fall to the other side of an FP8 or FP4 rounding.
LOGITS = 0.12
POSITIONS, REWIND = 512, 4


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_model("nano", mode="released")


def layout_of(model: Transformer) -> CacheLayout:
    return CacheLayout(model.config, "released", REWIND)


def pools_of(layout: CacheLayout, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    sizes = (16, layout.page_bytes), (4, layout.slot_bytes)
    return torch.zeros(sizes[0], dtype=torch.uint8, device=device), torch.zeros(
        sizes[1], dtype=torch.uint8, device=device
    )


def step_of(model: Transformer, device: str = "cpu") -> CudaForward:
    layout = layout_of(model)
    weights = Weights(model.config, torch.device(device)).fill((n, t) for n, t, _ in model.released_tensors())
    return CudaForward(weights, layout, *pools_of(layout, device), positions=POSITIONS)


@pytest.fixture(scope="module")
def step(model: Transformer) -> CudaForward:
    return step_of(model)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, count)


def span(ids: np.ndarray, start: int, slot: int = 0, *, first_page: int = 0, streams: int = 0) -> Span:
    return Span(
        ids, start, slot, np.arange(first_page, first_page + 4, dtype=np.int32), logits=len(ids), streams=streams
    )


def off(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def paged(model: Transformer) -> PagedForward:
    layout = layout_of(model)
    return PagedForward(model, layout, *pools_of(layout), exact=False)


def test_the_step_computes_the_model(model: Transformer, step: CudaForward) -> None:
    ids, reference = tokens(140), paged(model)
    got, want = (each.forward([span(ids, 0, streams=2)]) for each in (step, reference))
    assert got.logits.shape == want.logits.shape == (140, 4096)
    assert off(got.logits, want.logits) < LOGITS
    assert off(got.streams, want.streams) < 2 * LOGITS
    last = span(tokens(2, 1), 138)
    assert off(step.draft([last], want.streams).logits, reference.draft([last], want.streams).logits) < LOGITS


def test_spans_come_back_in_order(model: Transformer, step: CudaForward) -> None:
    """Several sequences, cut into calls by what their rings take, give what each gives by itself."""
    spans = [span(tokens(7, 2), 0, 1, first_page=4), span(tokens(3, 3), 0, 2, first_page=8)]
    together = step.forward(spans)
    alone = [step.forward([each]) for each in spans]
    assert off(together.logits, np.concatenate([each.logits for each in alone])) < LOGITS
    fewer = step.forward([spans[0]._replace(logits=2), spans[1]._replace(logits=0)])
    assert off(fewer.logits, together.logits[5:7]) < LOGITS


def test_prompts_and_decoding_share_a_call(model: Transformer, step: CudaForward) -> None:
    """Given tokens take the prompt kernels, generated ones the step; both see one cache, and rows keep their order."""
    first, second = tokens(9, 4), tokens(130, 5)
    prompt = span(first, 0, 1, first_page=4, streams=1)._replace(decode=False, logits=2)
    reference = paged(model)
    assert off(step.forward([prompt]).logits, reference.forward([prompt]).logits) < LOGITS
    spans = [
        span(second, 0, 2, first_page=8, streams=2)._replace(decode=False, logits=3),
        span(tokens(2), 9, 1, first_page=4),
    ]
    for order in (spans, spans[::-1]):
        got, want = step.forward(order), reference.forward(order)
        assert off(got.logits, want.logits) < LOGITS
        assert got.streams.shape == want.streams.shape


def test_what_a_step_brings_to_the_device_does_not_grow_with_the_context(
    model: Transformer, step: CudaForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the call, and of page tables what is new."""
    layout, copied, copy = layout_of(model), [], torch.Tensor.copy_
    results = torch.zeros(1, 4096), torch.zeros(1, 4, 256), torch.zeros(1, 2, dtype=torch.float64), None
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, *a, **k: copied.append(to.numel()) or copy(to, *a, **k))
    found = []
    for count in (8, 8192):
        forward = CudaForward(step.weights, layout, *pools_of(layout), positions=(count + 1) * layout.page_tokens)
        monkeypatch.setattr(forward, "_step", lambda *given: results)
        tables = [np.arange(count + more, dtype=np.int32) for more in (0, 1)]
        last = count * layout.page_tokens - 2
        counts = []
        for at, table in ((0, 0), (1, 0), (2, 1), (3, 1)):
            copied.clear()
            forward.forward([Span(tokens(1), last + at, 2, tables[table], decode=True, draws=(Draw(),))])
            counts.append(sum(copied))
        assert forward._tables[2].tolist() == tables[1].tolist()
        assert not forward._tables[[0, 1, 3]].any()
        assert counts[0] == counts[1] + count
        found.append(counts[1:])
    assert found[0] == found[1]
    assert found[0][1] == found[0][0] + 1


def test_a_slot_of_another_sequence_has_its_pages(step: CudaForward) -> None:
    """A table that is another array, changed in its middle, shorter or longer."""
    for pages in ([1, 2], [1, 2, 3], [1, 5, 3], [4], [4, 9, 3]):
        step._tell_pages(tell([span(tokens(1), 0)._replace(pages=np.array(pages, np.int32), decode=True)]))
        assert step._tables[0, : len(pages)].tolist() == pages
    for known, pages, same in ((None, [0, 1], 0), ([0, 1, 2], [0, 1], 2), ([0, 1], [1, 1, 1], 0), ([], [1], 0)):
        assert agreed(None if known is None else np.array(known), np.array(pages)) == same


def test_weights_hold_the_release_and_nothing_else(model: Transformer, step: CudaForward) -> None:
    names = {name for name, _, _ in model.released_tensors()}
    assert set(step.weights.places) == names
    planned = cost.weights_bytes(model.config)
    assert planned <= step.weights.bytes < 1.03 * planned  # nano pads 8 rows to 64 and 20 experts to 64
    flash = Weights(preset("flash"), torch.device("meta"))
    assert abs(flash.bytes / cost.weights_bytes(preset("flash")) - 1) < 1e-3


def test_a_checkpoint_fills_the_same_weights(step: CudaForward) -> None:
    loaded = load_weights("nano", "cpu")
    for name, place in step.weights.places.items():
        assert torch.equal(loaded.places[name].values, place.values), name
        if place.scales is not None:
            assert torch.equal(loaded.places[name].scales, place.scales), name


def test_the_engine_runs_over_packed_weights(step: CudaForward) -> None:
    """Prompts, drafts and generated tokens of several requests, on a CPU by the references."""
    weights, tokenizer = load_weights("nano", "cpu"), Tokenizer.load(resolve_model("nano"))
    engine = build_engine(weights, tokenizer, EngineOptions(max_requests=2, speculation=2))
    llm = LLM.over(engine, weights.config, tokenizer)
    assert engine.stats().bytes_planned["weight_bytes"] == weights.bytes
    assert fingerprint(weights) == fingerprint(step.weights)
    weights.head[0, 0] += 1
    assert fingerprint(weights) != fingerprint(step.weights)
    weights.head[0, 0] -= 1
    with pytest.raises(ConfigError, match="packed weights"):
        _ = llm.model
    with pytest.raises(ConfigError, match="native=True"):
        build_engine(weights, tokenizer, EngineOptions(native=True))
    prompts = [[0, 377, 953, 1806, 29, 305, 766, 443], [7, 300, 12]]
    results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    assert [len(each.token_ids) for each in results] == [10, 10]
    assert (
        llm.generate(prompts[:1], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))[0].cached_tokens >= 0
    )
    assert "captured step" in llm.engine.numeric_path


def test_other_weights_are_refused(model: Transformer) -> None:
    weights = Weights(model.config, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="not a tensor"):
        weights.fill([("layers.9.x", torch.zeros(1))])
    with pytest.raises(CheckpointError, match=r"expected \(128, 256\)"):
        weights.fill([("layers.0.attn.wq_a.weight", torch.zeros(128, 255))])
    with pytest.raises(CheckpointError, match="does not hold"):
        weights.fill([("layers.0.attn.wq_a.weight", torch.rand(128, 256))])
    with pytest.raises(CheckpointError, match="missing"):
        weights.fill([])
    with pytest.raises(ConfigError, match="multiples of 128"):
        Weights(preset("tiny"), torch.device("meta"))


def test_random_weights_are_finite(model: Transformer) -> None:
    step = step_of(model)
    step.weights.fill_random()
    assert np.isfinite(step.forward([span(tokens(3), 0)]).logits).all()


def test_what_was_not_planned_is_refused(model: Transformer, step: CudaForward) -> None:
    with pytest.raises(CapacityError, match="planned for 4"):
        step.forward([span(tokens(1), POSITIONS)])
    with pytest.raises(CapacityError, match="slot 4 of 4"):
        step.forward([span(tokens(1), 0, 4)])
    with pytest.raises(RequestError, match="outside"):
        step.forward([span(np.array([4096]), 0)])
    with pytest.raises(ConfigError, match="released"):
        CudaForward(step.weights, CacheLayout(model.config), step.pages, step.slots, positions=POSITIONS)


@pytest.mark.gpu
def test_the_captured_step_on_the_device(model: Transformer) -> None:
    """nano, 64 greedy tokens: logits within tolerance of the CPU's and the same tokens.

    Both carriers of the CPU's forward go on alike from this prompt, the two best logits 0.3 apart at the least.
    """
    device, reference = step_of(model, "cuda"), paged(model)
    prompt = np.array([0, 377, 953, 1806, 29, 305, 766, 443])  # "def add(a, b):\n    return"
    results: list[Output] = [each.forward([span(prompt, 0)._replace(logits=1)]) for each in (device, reference)]
    found: list[int] = []
    for position in range(len(prompt), len(prompt) + 64):
        assert off(results[0].logits, results[1].logits) < LOGITS
        assert results[0].logits.argmax() == results[1].logits.argmax()
        found.append(int(results[1].logits.argmax()))
        results = [each.forward([span(np.array(found[-1:]), position)]) for each in (device, reference)]
    assert len(set(found)) > 5


@pytest.mark.gpu
@pytest.mark.parametrize("batch", BUCKETS[1:])
def test_a_row_has_its_bits_in_every_bucket(model: Transformer, batch: int) -> None:
    layout = layout_of(model)
    pages = torch.zeros((2 * batch, layout.page_bytes), dtype=torch.uint8, device="cuda")
    slots = torch.zeros((batch, layout.slot_bytes), dtype=torch.uint8, device="cuda")
    weights = Weights(model.config, torch.device("cuda")).fill((n, t) for n, t, _ in model.released_tensors())
    step = CudaForward(weights, layout, pages, slots, positions=256)
    tables = torch.randperm(2 * batch, generator=torch.Generator().manual_seed(0)).int().view(batch, 2).numpy()
    prompts = [tokens(1 + 2 * i % 11, i) for i in range(batch)]
    for together in (True, False):
        spans = [Span(ids, 0, i, tables[i], decode=True) for i, ids in enumerate(prompts)]
        parts = [spans] if together else [[each] for each in spans]
        first = np.concatenate([step.forward(part).logits for part in parts])
        spans = [Span(np.array([9]), len(ids), i, tables[i], decode=True) for i, ids in enumerate(prompts)]
        parts = [spans] if together else [[each] for each in spans]
        got = np.concatenate([step.forward(part).logits for part in parts])
        if together:
            kept = first, got
    assert np.array_equal(kept[0], first)
    assert np.array_equal(kept[1], got)


@pytest.mark.gpu
def test_the_engine_generates_on_the_device() -> None:
    """Twice the same text, alone or among others; what is computed by prompt kernels may be shared, the rest is not."""
    llm = LLM("nano", mode="released", device="cuda", exact=True)
    prompts = [[7, 300 + i, 12, 900, 44] * (5 + 40 * (i % 3)) for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=40)
    together = [each.token_ids for each in llm.generate(prompts, params)]
    alone = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert together == alone
    assert "captured step" in llm.engine.numeric_path


def picks_of(step: CudaForward) -> None:
    """Spans with draws get what is picked from the logits that they get without, prompts, steps and drafts alike."""
    draw = (Draw(1.0, 0.9, 0.0, 40, 77), Draw(key=78), Draw(1.0, key=79))
    for spans in (
        [span(tokens(9), 0, 0), span(tokens(5, 1), 0, 1, first_page=4)],
        [span(tokens(2, 2), 9, 0), span(tokens(1, 3), 5, 1, first_page=4)],
    ):
        decode = spans[0].start > 0
        spans = [each._replace(logits=min(each.logits, 3), decode=decode) for each in spans]
        want = step.forward(spans).logits
        drawn = [spans[0], spans[1]._replace(draws=draw[: spans[1].logits])]
        for asked in (drawn, [each._replace(draws=draw[: each.logits]) for each in spans]):
            out = step.forward(asked)
            left, at = [], 0
            for index, each in enumerate(asked):
                rows, at = torch.from_numpy(want[at : at + each.logits]), at + each.logits
                if each.draws:
                    found = sampling.pick(rows, torch.from_numpy(sampling.packed(each.draws)))
                    assert [pick.token for pick in out.picks[index]] == found[:, 0].tolist()
                    assert np.allclose([pick.logprob for pick in out.picks[index]], found[:, 1], atol=1e-5)
                else:
                    left.append(rows)
            assert np.array_equal(out.logits, np.concatenate(left) if left else np.empty((0, want.shape[1])))


def test_spans_with_draws_are_picked_from(step: CudaForward) -> None:
    picks_of(step)


@pytest.mark.gpu
def test_spans_with_draws_are_picked_from_on_the_device(model: Transformer) -> None:
    picks_of(step_of(model, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize(("positions", "most"), [(8192, 12 + 11), (16384, 12 + 11), (1 << 20, 13 + 11)])
def test_launches_of_two_layers(positions: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token: what a CSA and an HCA layer of Flash launch, up to the last product of experts."""
    from triton.runtime.jit import JITFunction

    from pelagos.evals.step_bench import cut_config

    config = cut_config("flash", "2:4")
    assert sorted(config.layer_ratios) == [4, 128]
    layout, device = CacheLayout(config, "released", 0), torch.device("cuda")
    pools = (torch.zeros(1, size, dtype=torch.uint8, device=device) for size in (layout.page_bytes, layout.slot_bytes))
    step = CudaForward(Weights(config, device).fill_random(), layout, *pools, positions=positions)
    names, run = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: names.append(self.__name__) or run(self, *a, **k))
    with torch.inference_mode():
        step._rows.zero_()
        step._step(1, False, False)
    last = max(at for at, name in enumerate(names) if name == "_product_kernel")
    assert last + 1 <= most, names
    torch.cuda.synchronize()
