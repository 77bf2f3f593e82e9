"""Simulated layouts: bytes by arithmetic of our own, and what must grow and shrink."""

from __future__ import annotations

import pytest

from pelagos import cli, cost
from pelagos.config import preset
from pelagos.errors import ConfigError
from pelagos.train.dry_run import layout, layouts, simulated

OPTIONS = {"tokens": 1 << 22, "row": 4096}


def test_one_device_holds_sixteen_bytes_a_weight_and_what_is_on_its_way() -> None:
    config = preset("nano")
    one = layout(config, 1, 1, 1, 1, **OPTIONS)
    parts = cost.parameters_by_part(config, draft=True)
    routed = sum(g.parameters for g in cost.inventory(config, draft=True) if ".experts." in g.name)
    smaller = min(parts["embedding"], parts["head"])  # they lie on two ends: a stage counts one
    assert one.weights == 4 * (sum(parts.values()) - smaller)
    assert one.gradients == 2 * one.weights - 4 * routed
    assert one.optimizer == 12 * (one.weights // 4 - routed) + 8 * routed
    assert (one.bubble, one.seen_s, one.stages_s) == (0, 0, 0)
    assert one.fits


def test_what_each_dimension_saves_and_costs() -> None:
    config = preset("flash")
    base = layout(config, 128, 4, 8, 1, **OPTIONS)
    experts, stages, context = (layout(config, 128, *sizes, **OPTIONS) for sizes in ((4, 16, 1), (8, 8, 1), (4, 8, 2)))
    assert experts.weights < base.weights
    assert experts.experts_s > 5 * base.experts_s  # beyond a node
    assert stages.weights < base.weights
    assert stages.bubble > base.bubble
    assert context.activations == pytest.approx(base.activations / 2, rel=1e-3)
    assert context.micro_batches == 2 * base.micro_batches
    assert base.step_s >= base.compute_s
    assert all(one.fits or one.bytes > 0 for one in layouts(config, 128, **OPTIONS))
    with pytest.raises(ConfigError, match="do not divide"):
        layout(config, 128, 3, 8, 1, **OPTIONS)


def test_the_command_says_that_it_simulates(capsys) -> None:
    assert cli.main(["train", "--dry-run", "--model", "flash", "--gpus", "256"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("simulated, nothing here was run: flash on 256 H200")
    assert "taken: 256 GPUs" in said
    assert "layout of Megatron-Bridge" in said
    assert "why: the quickest of" in said
    assert "none fits" in simulated("pro", preset("pro"), 8)
