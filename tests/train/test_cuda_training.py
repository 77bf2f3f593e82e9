"""Training on a CUDA device: gradients beside the CPU's, and a stopped run that goes on with the same bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.train.small import packed, run_config, small_config, small_model, write_shards

from pelagos.train.guard import routed
from pelagos.train.objective import LossWeights, losses
from pelagos.train.trainer import Trainer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dense", [True, False])
def test_gradients_beside_those_of_the_cpu(dense):
    """BFloat16 kernels against float32 autograd, with the CPU's choice of experts: within BFloat16's error."""
    batch = packed([[100, 128], [250]], 256)
    model = small_model(hidden_size=128)
    notes: list[dict] = []
    want = losses(model, *batch, LossWeights(), dense=dense, notes=notes)
    want.total.backward()
    exact = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.cuda().carrier = torch.bfloat16
    with routed(model, [note["chosen"].cuda() for note in notes]):
        got = losses(model, *(t.cuda() for t in batch), LossWeights(), dense=dense)
    got.total.backward()
    assert float(got.next_token) == pytest.approx(float(want.next_token), rel=5e-3)
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == exact.keys()
    learnt = [name for name in exact if ".indexer." not in name or dense]  # other picks, another lesson
    off = {n: float((found[n] - exact[n]).norm() / exact[n].norm().clamp_min(1e-3)) for n in learnt}
    worst = max(off, key=lambda name: off[name])
    assert off[worst] < 0.2, (worst, off[worst])
    whole = [torch.cat([grads[n].flatten() for n in learnt]) for grads in (found, exact)]
    assert float((whole[0] - whole[1]).norm() / whole[1].norm()) < 0.05


def test_gradients_have_the_same_bits_every_time():
    """Ten times the same packed rows, sparse: no race of copies and products, no order of threads."""
    batch = [t.cuda() for t in packed([[1000, 900], [2000]], 2048)]
    model = small_model(hidden_size=256, index_topk=64).cuda()
    model.carrier = torch.bfloat16
    found = []
    for _ in range(10):
        model.zero_grad()
        losses(model, *batch, LossWeights(), dense=False).total.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_stopped_run_goes_on_bitwise(tmp_path, precision):
    """Dense, sparse and quantised steps; stopped after each of them and begun anew."""
    data = write_shards(tmp_path / "data")
    config = run_config(precision=precision, accumulate=2)
    model = dataclasses.replace(small_config(), hidden_size=512, moe_intermediate_size=128)

    def begin(name):
        trainer = Trainer(model, config, data=data, out=tmp_path / name, device="cuda")
        trainer.resume()
        return trainer

    whole = begin("whole")
    assert whole.run()
    part = begin("parts")
    while part.step < config.steps:
        part.stop()
        part.run()
        part = begin("parts")
    assert part.step == config.steps
    assert part.scores == whole.scores  # of the last check
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[name]), name
    held = part.optimizer.tensors()
    assert all(torch.equal(value, held[name]) for name, value in whole.optimizer.tensors().items())
