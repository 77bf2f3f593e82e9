"""The `released` number mode against vectors recorded from the released inference code (tests/golden/released)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pelagos.load import load_model
from pelagos.model import ContiguousCache, FullSequence, Transformer
from pelagos.model.attention import Attention, Indexer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "released"
MEDIAN, NEAR, NEAR_SHARE = 1e-5, 1e-3, 0.95  # how to compare: README.md beside the vectors
PICKS_SHARE, ROWS_SHARE = 0.99, 0.999
PREFILL = 137


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """One thread, no gradient."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_model(GOLDEN, mode="released")


class Entries(FullSequence):
    """No past; remembers the entries of one layer."""

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.seen: dict[str, Tensor] = {}

    def entries(self, name: str, new: Tensor) -> Tensor:
        self.seen[name] = new[0]
        return new


class Layers(FullSequence):
    """No past; a memory for each layer."""

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.layers: dict[int, Entries] = {}

    def layer(self, index: int) -> Entries:
        return self.layers.setdefault(index, Entries(128))


@dataclass
class Run:
    """One prefill of the whole prompt and what was seen on its way."""

    logits: Tensor
    mtp_logits: Tensor
    streams: dict[int, Tensor]
    picks: dict[int, Tensor] = field(default_factory=dict)
    cached: dict[str, Tensor] = field(default_factory=dict)


@pytest.fixture(scope="module")
def run(model: Transformer, golden: dict[str, Tensor]) -> Run:
    streams: dict[int, Tensor] = {}
    picks: dict[int, Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.layers):
        hooks.append(layer.register_forward_hook(lambda _, __, out, index=index: streams.update({index: out[0]})))
    with pytest.MonkeyPatch.context() as patch:
        original = Indexer.picks
        owner = {id(layer.attn.indexer): index for index, layer in enumerate(model.layers)}

        def spy(self: Indexer, *arguments: object) -> Tensor:
            picks[owner[id(self)]] = chosen = original(self, *arguments)  # pyright: ignore[reportArgumentType]
            return chosen

        patch.setattr(Indexer, "picks", spy)
        step, cache = model.step(golden["ids"]), Layers(model.config.sliding_window)
        out = model.run(step, cache)
        drafted = model.draft(out, golden["mtp_next_ids"], step, cache)
    for hook in hooks:
        hook.remove()
    logits = model.logits(model.collapse(out, model.config))[0]
    return Run(logits, model.logits(drafted)[0], streams, {k: v[0] for k, v in picks.items()}, cache.layers[3].seen)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """The comparison of README.md: flips of values on a rounding border are allowed in a few positions."""
    difference = (got - wanted).abs()
    near = (difference.flatten(1).amax(1) <= NEAR).float().mean().item()
    assert difference.median().item() <= MEDIAN
    assert near >= NEAR_SHARE


def test_prefill(run: Run, golden: dict[str, Tensor]) -> None:
    assert_close(run.logits, golden["logits"])


def test_mtp(run: Run, golden: dict[str, Tensor]) -> None:
    assert_close(run.mtp_logits, golden["mtp_logits"])


@pytest.mark.parametrize("layer", [0, 1, 2, 4])
def test_streams(run: Run, golden: dict[str, Tensor], layer: int) -> None:
    assert_close(run.streams[layer][-8:], golden[f"streams_after_layer{layer}_last8"])


@pytest.mark.parametrize("layer", [1, 3])
def test_picks(run: Run, golden: dict[str, Tensor], layer: int) -> None:
    wanted = golden[f"picks_layer{layer}"].long().sort(-1).values
    assert run.picks[layer].shape == wanted.shape
    assert (run.picks[layer].sort(-1).values == wanted).float().mean() >= PICKS_SHARE


@pytest.mark.parametrize(("name", "recorded"), [("main", "layer3_compressed_kv"), ("index", "layer3_index_keys")])
def test_cached_rows(run: Run, golden: dict[str, Tensor], name: str, recorded: str) -> None:
    """Nope channels are e4m3 values times a power of two, so equal means equal; the rotated 64 are float32."""
    got, wanted = run.cached[name], golden[recorded].float()
    assert got.shape == wanted.shape
    assert torch.isclose(got, wanted, rtol=1e-5, atol=1e-6).float().mean() >= ROWS_SHARE


@pytest.mark.parametrize("cuts", [(PREFILL, *range(PREFILL + 1, 301)), (3, 4, 130, 259, 300), (1, 2, 128, 256, 300)])
def test_any_chunking(model: Transformer, run: Run, golden: dict[str, Tensor], cuts: tuple[int, ...]) -> None:
    """Decoding one by one and odd chunks agree with the recording, and with one prefill far closer than a flip."""
    cache, parts, begin = ContiguousCache(model.config), [], 0
    for end in cuts:
        parts.append(model(golden["ids"][:, begin:end], cache)[0])
        begin = end
    got = torch.cat(parts)
    assert_close(got, golden["logits"])
    assert_close(got[PREFILL:], golden["decode_logits"])
    torch.testing.assert_close(got, run.logits, rtol=0, atol=1e-5)


def test_threads(model: Transformer, run: Run, golden: dict[str, Tensor]) -> None:
    torch.set_num_threads(2)
    got = model(golden["ids"])[0]
    torch.set_num_threads(1)
    torch.testing.assert_close(got, run.logits, rtol=0, atol=1e-5)


def test_for_scale_quantisation_matters(run: Run, golden: dict[str, Tensor]) -> None:
    """Without KV and indexer quantisation the logits move by about a fifth, so the comparison above can fail."""
    model = load_model(GOLDEN, mode="released")
    for module in model.modules():
        if isinstance(module, (Attention, Indexer)):
            module.simulate = False
    got = model(golden["ids"])[0]
    assert 0.1 < ((got - golden["logits"]).norm() / golden["logits"].norm()).item() < 0.4
    with pytest.raises(AssertionError):
        assert_close(got, golden["logits"])
