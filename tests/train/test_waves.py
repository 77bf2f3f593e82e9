"""Experts that are divided over ranks against whole ones: here by a world of one, whose rows all go to itself."""

from __future__ import annotations

import pytest
import torch
from tests.train.small import small_config, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from pelagos.load import load_model, save_model
from pelagos.model import Transformer
from pelagos.model.experts import Experts
from pelagos.train.init import initialise
from pelagos.train.precision import set_precision
from pelagos.train.ranks import Line
from pelagos.train.stages import cut_layers
from pelagos.train.waves import Waves, divide_experts


@pytest.fixture(scope="module")
def line():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield Line(torch.distributed.group.WORLD)
    torch.distributed.destroy_process_group()


def experts_of(kind: str) -> Experts:
    model = small_model()
    set_precision(model, kind)
    return next(module for module in model.modules() if isinstance(module, Experts))


@pytest.mark.parametrize("kind", ["bf16", "fp8", "released"])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("waves", "overlap"), [(1, True), (2, True), (4, False), (8, True)])
def test_rows_that_travel_have_the_bits_of_those_that_stay(line, kind, ordered, waves, overlap) -> None:
    """Values and all gradients; an expert that nobody chose is a wave without rows."""
    draw = torch.Generator().manual_seed(waves)
    x = torch.randn(100, 64, generator=draw, requires_grad=True)
    weights = torch.rand(100, 2, generator=draw, requires_grad=True)
    chosen = torch.rand(100, 8, generator=draw).index_fill(1, torch.tensor(3), 0).topk(2).indices
    whole, parts = experts_of(kind), experts_of(kind)
    site = Waves(parts, line, waves=waves, overlap=overlap, ordered=ordered)
    found = []
    for experts, forward in ((whole, whole), (parts, site)):
        out = forward(x, chosen, weights)
        inputs = (x, weights, experts.w13, experts.w2)
        grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
        found.append((out, *(site.sources[0] if forward is site and ordered else grads[2:]), *grads[:2]))
    assert len(site.sources) == ordered
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("waves", [1, 4])
def test_a_forward_asks_its_device_once(line, monkeypatch, waves) -> None:
    """How many rows go where is read in one go; nothing else has a size that only the device knows."""
    asked, read = [], torch.Tensor.tolist

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            open_size = func is torch.ops.aten.repeat_interleave.Tensor and not (kwargs or {}).get("output_size")
            if open_size or func.overloadpacket.__name__ in (
                "bincount",
                "nonzero",
                "_local_scalar_dense",
                "unique_dim",
            ):
                asked.append(func)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append("tolist") or read(tensor))
    monkeypatch.setattr("pelagos.kernels.ref.experts.mixture", lambda x, chosen, weights, *_, **__: x * weights)
    site = Waves(experts_of("bf16"), line, waves=waves, overlap=True, ordered=True)
    inputs = torch.randn(40, 64), torch.rand(40, 8).topk(2).indices, torch.rand(40, 2)
    with Watched():
        site(*inputs)
    assert asked == ["tolist"]


def part_of(model: Transformer, rank: int, stage: int) -> None:
    """Leave rank `rank` of two its experts, of two stages one."""
    cut_layers(model, stage, 2)
    line = Line()
    line.rank, line.size = rank, 2
    divide_experts(model, line, waves=1, overlap=False, ordered=True)


@pytest.mark.parametrize(("rank", "stage"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_part_of_a_model_has_its_values_and_no_others_memory(tmp_path, rank, stage) -> None:
    """Drawn by itself, and read from a checkpoint by itself, each tensor is what the whole model has there."""
    whole = small_model(3)
    save_model(whole, tmp_path / "model", exact=True)
    drawn = Transformer(small_config(), device="meta")
    part_of(drawn, rank, stage)
    initialise(drawn.to_empty(device="cpu"), 3)
    read = load_model(tmp_path / "model", part=lambda model: part_of(model, rank, stage))
    expected = {name: tensor for name, tensor, _ in whole.released_tensors()}
    for model in (drawn, read):
        found = {name: tensor for name, tensor, _ in model.released_tensors()}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        experts = {name for name in found if ".ffn.experts." in name}
        numbers = {int(name.split(".experts.")[1].split(".")[0]) for name in experts}
        assert numbers == set(range(4 * rank, 4 * rank + 4))
        layers = {name.split(".")[1] for name in experts if name.startswith("layers.")}
        assert layers == ({"0", "1"} if stage == 0 else {"2"})
        assert sum(p.numel() for p in model.parameters()) < 0.45 * sum(p.numel() for p in whole.parameters())
