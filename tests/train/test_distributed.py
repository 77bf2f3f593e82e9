"""Several processes train as one: deals and rounding alone, then two processes over gloo."""

from __future__ import annotations

import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from benchmarks import distributed as bench
from hypothesis import given
from hypothesis import strategies as st
from tests.train.small import packed, run_config, small_model, write_shards

from pelagos.errors import CheckpointError, ConfigError
from pelagos.load import load_model
from pelagos.model.experts import Experts
from pelagos.train.objective import LossWeights, losses
from pelagos.train.optim import EXPERTS, OptimConfig, Optimizer, cut, trained
from pelagos.train.owners import ORDER, Owners, knapsack
from pelagos.train.ranks import Ranks, data_ranks, stochastic_bf16
from pelagos.train.waves import Waves

SETTINGS = {"steps": 3, "row_tokens": 128, "accumulate": 2, "quantise_from": 0.5}  # dense, dense, sparse and quantised


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_a_knapsack_deals_every_piece_and_evenly(sizes: list[int], owners: int) -> None:
    dealt = knapsack(sizes, owners)
    held = [sum(size for size, owner in zip(sizes, dealt, strict=True) if owner == o) for o in range(owners)]
    assert sum(held) == sum(sizes)
    assert max(held) <= sum(sizes) / owners + max(sizes)


def test_every_weight_has_one_owner_and_no_matrix_is_cut() -> None:
    model = small_model()
    whole = {one.name: one for one in trained(model, OptimConfig())}
    pieces = {k: (one, part) for one in whole.values() for k, part in cut(one, one.value.detach(), model).items()}
    for _, part in pieces.values():
        part.add_(1)
    fresh = small_model()
    for (name, parameter), (_, before) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(parameter, before + 1), name
    assert len(pieces) == sum(len(cut(one, one.value, model)) for one in whole.values())
    owners = Owners(model, OptimConfig(), Ranks(run_config(), torch.device("cpu"), alone=True), run_config())
    leaves = [key.rpartition(".")[2] for key in owners.own if EXPERTS in key]
    assert leaves == sorted(leaves, key=list(ORDER).index)  # all down, then up, then gate
    assert sum(p.value.numel() for p in owners.own.values()) == sum(part.numel() for _, part in pieces.values())
    assert {one.key for one in owners.own.values() if EXPERTS not in one.key} == {k for k in pieces if EXPERTS not in k}
    assert owners.tensors().keys() == Optimizer(model).tensors().keys()
    shapes = {part.shape for one, part in pieces.values() if EXPERTS in one.name}
    assert shapes == {torch.Size((64, 32)), torch.Size((32, 64))}


def test_experts_gradients_leave_in_the_backward_and_add_up_to_autograds(monkeypatch) -> None:
    """Last layer first, each as soon as both its gradients are there; nothing is left for `collect` to send."""
    model, plain = small_model(), small_model()
    owners = Owners(model, OptimConfig(), Ranks(run_config(), torch.device("cpu"), alone=True), run_config())
    sent, send = [], owners._shares[1].send
    monkeypatch.setattr(owners._shares[1], "send", lambda part, *rest: (sent.append(part), send(part, *rest))[1])
    for seed in (1, 2):
        batch = packed([[100], [60]], 128, seed=seed)
        for each in (model, plain):
            losses(each, *batch, LossWeights(), dense=True).total.backward()
        assert not owners._waiting
        owners.collect()
    assert sent == 2 * [f"{name}.ffn.experts" for name in ("mtp.0", "layers.2", "layers.1", "layers.0")]
    norm = owners.clip(1e9)
    found = {p.key: owners._shares[1].sums[p.key] for p in owners._shares[1].own if p.key.endswith(".w2")}
    assert norm == Optimizer(plain).clip(1e9)
    assert all(
        torch.equal(total, plain.get_parameter(f"{key.rsplit('.', 2)[0]}.w2").grad) for key, total in found.items()
    )


def test_an_optimizer_that_is_let_go_of_takes_its_weights_with_it() -> None:
    model = small_model()
    held = weakref.ref(model)
    owners = Owners(model, OptimConfig(), Ranks(run_config(), torch.device("cpu"), alone=True), run_config())
    del model, owners
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("value", [1.0 + 3 / 512, -(1.0 + 1 / 512), 3.7e-12, 1.0 + 2**-20, -0.75])
def test_stochastic_rounding_is_unbiased(value: float) -> None:
    count, x = 200_000, torch.tensor(value)
    low = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)  # towards zero
    high = ((x.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    p = float((x - low).double() / (high - low).double())
    rounded = stochastic_bf16(x.expand(count), torch.Generator().manual_seed(1)).float()
    assert set(rounded.tolist()) <= {float(low), float(high)}
    far = int((rounded != low).sum()) if p else 0
    assert abs(far - count * p) <= 5 * math.sqrt(count * p * (1 - p))  # five sigma of a binomial
    assert bool((rounded == low).all()) is (p == 0)


def test_worlds_that_do_not_divide_a_run_are_refused() -> None:
    assert data_ranks(run_config(accumulate=4, cp=2), 8) == 4
    for changes, size, said in (
        ({"cp": 2}, 3, "cp x pp = 2 x 1"), ({"ep": 2, "accumulate": 3}, 3, "ep=2 does not divide"),
        ({"accumulate": 3}, 2, "3 micro-batches for 2"), ({"pp": 4}, 4, "pp=4 stages need as many"),
        ({"pp": 2, "accumulate": 2, "indexer_steps": 1}, 2, "no gradient"),
        ({"anticipate": 2, "accumulate": 2}, 2, "one process as yet"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            data_ranks(run_config(**changes), size)
    with pytest.raises(ConfigError, match="takes whole rows"):
        Ranks(run_config(cp=2), torch.device("cuda"))
    experts = next(m for m in small_model().modules() if isinstance(m, Experts))
    with pytest.raises(ConfigError, match="8 experts over ep=2"):
        Waves(experts, SimpleNamespace(size=2, rank=0), waves=3, overlap=True, ordered=True)  # pyright: ignore


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes make of small cases, and one process of the same; then borders."""
    scratch = tmp_path_factory.mktemp("distributed")
    data = str(write_shards(scratch / "shards"))
    cases = {
        "owners": SETTINGS, "experts": {**SETTINGS, "ep": 2, "waves": 2},
        "context": {**SETTINGS, **bench.ROUNDED, "cp": 2}, "stochastic": {**SETTINGS, "grad_sync": "bf16_stochastic"},
    }  # fmt: skip
    specs = [{"settings": settings, "distributed": True, "world": 2, "data": data, "out": str(scratch / name)}
             for name, settings in cases.items()]  # fmt: skip
    specs.append({"kind": "border", "lengths": [60, 64], "world": 2, "distributed": True})
    specs[-1]["out"] = str(scratch / "border")
    specs.append({"kind": "live", "settings": {**SETTINGS, "pp": 2}, "distributed": True, "world": 2, "data": data})
    specs[-1] |= {"run": str(scratch / "stages-run"), "out": str(scratch / "stages")}
    specs.append({"kind": "live", "settings": {**SETTINGS, "ep": 2, "save_every": 1}, "distributed": True, "world": 2})
    specs[-1] |= {"data": data, "run": str(scratch / "run"), "out": str(scratch / "killed"), "die_at": 2, "seed": 3}
    code, said = bench.launch(specs, 2, scratch, restarts=1, timeout=120)
    assert code == 0, said[-3000:]
    one = {"settings": SETTINGS, "distributed": False, "data": data}
    rounded = {"settings": {**SETTINGS, **bench.ROUNDED}, "distributed": False, "data": data}
    return {
        "one": bench.train(one), "rounded": bench.train(rounded),
        **{name: torch.load(scratch / name, weights_only=True) for name in (*cases, "border", "stages", "killed")},
        "said": said, "data": data, "run": scratch / "run",
    }  # fmt: skip


@pytest.mark.parametrize("case", ["owners", "experts"])
def test_two_processes_have_the_bits_of_one(found, case) -> None:
    row = bench.compare(found[case], found["one"])
    assert row["bits"], row


def test_two_stages_have_the_bits_of_one(found) -> None:
    assert bench._apart(found["stages"], found["one"])["bits"]


def test_parts_of_rows_agree_to_rounding(found) -> None:
    row = bench.compare(found["context"], found["rounded"])
    assert row["loss"] <= 1e-5, row
    assert row["master"] <= 1e-5, row
    assert row["codes_equal"] >= 0.999, row
    assert not row["bits"]  # if they ever were, the case would not have been cut


def test_stochastic_gradients_train_alike_and_not_the_same(found) -> None:
    row = bench.compare(found["stochastic"], found["one"])
    assert 0 < row["loss"] < 0.02, row


def test_a_border_of_m_tokens_does_for_whole_windows_only(found) -> None:
    """The technical report names m tokens; a window that lies across a border reads up to 2m - 1 before it."""
    border = found["border"]
    for case in ("64 exact", "64 m", "60 exact"):
        assert abs(border[case][0]) < 1e-5, case
        assert border[case][1] < 1e-3, case
    assert border["60 m"][1] > 1e-2


def test_a_part_of_rows_has_the_bits_of_whole_rows_when_quantised(found) -> None:
    """Attention comes in tiles of positions, wherever the border lies: streams and drafts."""
    assert found["border"]["quantised"] == [True, True]


def test_a_lost_rank_stops_all_and_the_restarted_run_is_the_same(found) -> None:
    """Rank 1 or 0 is killed in its third step; torchrun starts both again, and they continue from the second."""
    assert found["killed"]["attempt"] == 1
    assert found["killed"]["resumed"] == 2
    assert found["said"].count("another rank is lost") == 1
    assert "what was saved last stays and the same command continues from it" in found["said"]
    assert bench._apart(found["killed"], found["one"])["bits"]


def test_a_state_of_two_ranks_is_read_by_one(found, tmp_path) -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        spec = {"settings": {**SETTINGS, "save_every": 1}, "distributed": True, "data": found["data"]}
        trainer = bench.trainer_of(spec, found["run"])
        assert trainer.resume()
        assert trainer.step == SETTINGS["steps"]
        assert bench._apart(bench.weights_of(trainer), found["one"])["bits"]
        trainer.export(tmp_path / "model")
        again = load_model(tmp_path / "model")
        stored = {n: p.bfloat16().float() for n, p in trainer.model.named_parameters() if n.endswith("gate.weight")}
        assert stored.items()
        assert all(torch.equal(p, again.get_parameter(n)) for n, p in stored.items())
        other = bench.trainer_of({**spec, "settings": {**SETTINGS, "lr": 0.5}}, found["run"])
        with pytest.raises(CheckpointError, match="setting lr was"):
            other.resume()
    finally:
        torch.distributed.destroy_process_group()
