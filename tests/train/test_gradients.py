"""Gradients of every parameter: against `transformers`, finite differences and hand-made formulas; known peer bugs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.model.test_transformers_parity import load_oracle, make_case, quiet, randomise  # noqa: F401
from tests.train.small import packed, small_config
from torch import Tensor
from torch.nn import functional

from pelagos.checkpoint import open_checkpoint
from pelagos.load import save_model
from pelagos.model import FullSequence, Transformer
from pelagos.train.forward import Forward, Marks, Samples, attention, sample_bounds
from pelagos.train.init import initialise
from pelagos.train.objective import LossWeights, losses, prepare
from pelagos.train.optim import Optimizer
from pelagos.train.precision import set_precision

RELATIVE = 1e-4  # L2 a tensor, issue 7
FLOOR = 1e-5  # of the largest gradient norm: below it a tensor is compared absolutely


def drawn_model(**changes) -> Transformer:
    model = Transformer(small_config(**changes))
    randomise(model, 5)
    return model


def gradients(model: Transformer, weights: LossWeights, *, dense: bool, rows=((128, 100),)) -> dict[str, Tensor | None]:
    model.zero_grad()
    losses(model, *packed([list(r) for r in rows], 128 * len(rows[0])), weights, dense=dense).total.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    floor = FLOOR * max(float(g.norm()) for g in want.values())
    off = {n: float((got[n] - g).norm()) / max(float(g.norm()), floor) for n, g in want.items()}
    worst = max(off, key=off.__getitem__)
    assert off[worst] <= RELATIVE, f"{worst}: {off[worst]:.2e}"


@pytest.mark.parametrize("seed", [3, 5, 6, 9])
def test_gradients_are_those_of_transformers(tmp_path: Path, seed: int) -> None:
    """Next-token loss in float32: our gradients travel to their names as the weights of a checkpoint.

    Of two experts a token or more: the weight of a single one is constant, its router's gradient mere rounding.
    """
    case = make_case(seed)
    config = dataclasses.replace(case.config, num_nextn_predict_layers=0)
    model = Transformer(config)
    randomise(model, seed)
    save_model(model, tmp_path / "weights", exact=True)
    oracle = load_oracle(tmp_path / "weights")
    ids = torch.randint(config.vocab_size, (1, 150), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].flatten()
    functional.cross_entropy(oracle(ids, use_cache=False).logits[0, :-1], targets).backward()
    place, segments = torch.arange(150)[None], torch.zeros(1, 150, dtype=torch.int32)
    step = prepare(model, ids, place, segments, ids, dense=False).step
    streams = Forward(model).run(step, FullSequence(config.sliding_window), [])
    functional.cross_entropy(model.logits(model.collapse(streams, config))[0, :-1], targets).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    save_model(model, tmp_path / "gradients", exact=True)
    ours = dict(load_oracle(tmp_path / "gradients").named_parameters())
    theirs = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None and "indexer" not in n}
    assert len(theirs) > 20
    assert_close({n: ours[n].detach() for n in theirs}, theirs)


@pytest.mark.parametrize("dense", [True, False])
def test_no_parameter_is_without_gradient(dense: bool) -> None:
    """Of a whole step: the next token, MTP, the balance and the indexer's own loss reach every tensor."""
    found = gradients(drawn_model(), LossWeights(), dense=dense)
    assert [n for n, g in found.items() if g is None or not g.any()] == []
    assert all(g.isfinite().all() for g in found.values() if g is not None)


def test_gradients_by_finite_differences() -> None:
    """Each tensor along a direction of its own; dense, so that no choice jumps; the indexer by its own loss alone."""
    model = drawn_model(num_hidden_layers=2, compress_ratios=(4, 8, 0), num_hash_layers=2, n_routed_experts=2)
    named = dict(model.named_parameters())
    for only, weights in ((False, LossWeights(balance=0, indexer=0)), (True, LossWeights(main=0, mtp=0, balance=0))):
        found = gradients(model, weights, dense=True, rows=((100,),))
        for index, (name, parameter) in enumerate(named.items()):
            if (".indexer." in name) is not only:
                continue
            gradient = found[name]
            assert gradient is not None, name
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            direction = gradient / gradient.norm() + 0.3 * noise / noise.norm()
            size = 4e-3 * float(parameter.detach().norm()) / float(direction.norm()) + 1e-3
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(direction, alpha=sign * size)
                    ends.append(losses(model, *packed([[100]], 128), weights, dense=True).total.double())
                    parameter.add_(direction, alpha=-sign * size)
            measured = float(ends[0] - ends[1]) / (2 * size)
            expected = float((gradient * direction).sum())
            assert measured == pytest.approx(expected, rel=0.05, abs=2e-4), name


def test_training_forward_is_the_models_bitwise() -> None:
    """Values and gradients of the joined forward, with and without recomputation, against `Transformer.run`."""
    model = drawn_model()
    ids, positions, segments, _ = packed([[128, 100]], 256)
    results = []
    for which in ("model", "joined", "recomputed"):
        model.zero_grad()
        step = prepare(model, ids, positions, segments, ids, dense=False).step
        cache = FullSequence(model.config.sliding_window)
        forward = Forward(model, recompute=which == "recomputed")
        streams = model.run(step, cache, []) if which == "model" else forward.run(step, cache, [])
        drafted = (model if which == "model" else forward).draft(streams, ids, step, cache, {})
        out = torch.cat([model.collapse(streams, model.config), drafted])
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    assert all(map(torch.equal, results[1], results[2]))  # recomputation changes no bit


@pytest.mark.parametrize("dense", [True, False])
def test_attention_of_the_device_path_is_the_models(dense: bool) -> None:
    """What CUDA runs, here by its kernels' reference: loss terms and gradients of packed rows, dense and picked."""
    model, found = drawn_model(), []
    batch, weights = packed([[128, 100], [90, 60]], 256), LossWeights()
    for patched in (False, True):
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            if patched:
                patch.setattr(Forward, "_attend", lambda self, *given: attention(*given, self._bounds))
            terms = losses(model, *batch, weights, dense=dense)
        terms.total.backward()
        values = torch.stack([terms.next_token, terms.mtp, terms.indexer, terms.balance])
        found.append((values, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-5, atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    assert_close(found[1][1], found[0][1])


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_quantised_attention_attends_in_tiles_and_learns_as_the_model_does(layer: int, dense: bool) -> None:
    """Values a rounding from the model's own, gradients of every tensor of a site and of its input: autograd's."""
    model, found = drawn_model(), []
    set_precision(model, "released")
    attn, (ids, positions, segments, _) = model.layers[layer].attn, packed([[128, 100], [250]], 256)
    step = prepare(model, ids, positions, segments, ids, dense=dense).step
    draw = torch.Generator().manual_seed(layer)
    x, above = torch.randn(2, 2, 256, model.config.hidden_size, generator=draw).unbind(0)
    above, samples = above * (segments >= 0).unsqueeze(2), Samples(step, sample_bounds(step))
    for tiled in (True, False):
        attn.zero_grad()
        given, notes, cache = x.clone().requires_grad_(), {}, FullSequence(model.config.sliding_window)
        out = samples.attend(attn, given, step, cache, notes) if tiled else attn(given, step, cache, notes)
        (out * above).sum().backward()
        grads = {n: p.grad.clone() for n, p in attn.named_parameters() if ".indexer." not in n and p.grad is not None}
        found.append((out.detach(), notes, {**grads, "x": given.grad}))
    (got, noted, ours), (want, notes, theirs) = found
    real = segments >= 0
    assert float((got - want)[real].norm() / want[real].norm()) < 1e-3  # an FP8 border here and there
    assert noted.keys() == notes.keys() - {"index_keys"}
    assert ours.keys() == theirs.keys()
    assert len(ours) > 6
    assert_close(ours, theirs)


def test_a_marked_tensor_is_made_again_once() -> None:
    """Two products want a marked tensor and one a view of it; autograd keeps none of the three, only how to make it."""
    made = []

    def double(x: Tensor) -> Tensor:
        made.append(None)
        return x.sin() * 2

    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def use(out: Tensor) -> Tensor:
        return (out @ weight).sum() + (out * out).sum() + (out.view(4, 6).T @ weight.exp()).sum()

    use(x.sin() * 2).backward()
    want = [x.grad.clone(), weight.grad.clone()]
    x.grad = weight.grad = None
    marks = Marks()
    kept = marks.keep(double)
    with marks:
        total = use(kept(x))
    assert len(made) == 1
    assert marks._made == {}
    total.backward()
    assert len(made) == 3  # once for those that read it, once for the gradient of its inside
    assert all(map(torch.equal, (x.grad, weight.grad), want))


def test_peer_bug_frozen_indexer() -> None:
    """One trainer shipped an indexer without gradient: ours has one in every phase, and an update moves all of it."""
    for dense in (True, False):
        for kind in ("bf16", "fp8", "released"):
            model = drawn_model(num_hash_layers=1)
            set_precision(model, kind)
            before = {n: p.detach().clone() for n, p in model.named_parameters() if ".indexer." in n}
            gradients(model, LossWeights(), dense=dense)
            Optimizer(model).step(0.01)
            assert len(before) == 6
            for name, old in before.items():
                assert not torch.equal(model.get_parameter(name), old), (dense, kind, name)


def test_peer_bug_zero_tid2eid(tmp_path: Path) -> None:
    """One trainer pushed an all-zero routing table, a buffer being no parameter: ours is drawn, saved and exported."""
    model = Transformer(small_config())
    initialise(model, 0)
    name = "layers.0.ffn.gate.tid2eid"
    table = model.get_buffer(name)
    assert table.flatten().bincount().min() > 0
    assert (table.sort(-1).values.diff(dim=-1) > 0).all()
    assert torch.equal(model.state_dict()[name], table)
    save_model(model, tmp_path)
    assert torch.equal({n: v for n, v, _ in open_checkpoint(tmp_path).stream()}[name], table)
