"""Simulated layouts: bytes by arithmetic of our own, and what must grow and shrink."""

from __future__ import annotations

import dataclasses

import pytest

from pelagos import cli, cost
from pelagos.config import preset
from pelagos.errors import ConfigError
from pelagos.train.dry_run import kept, layout, layouts, simulated

OPTIONS = {"tokens": 1 << 22, "row": 4096}


def test_one_device_holds_weights_gradients_and_momentum() -> None:
    config = preset("nano")
    one = layout(config, 1, 1, 1, 1, **OPTIONS)
    parts = cost.parameters_by_part(config, draft=True)
    assert one.weights == one.gradients == 4 * sum(parts.values())
    assert one.optimizer == one.weights + 4 * (parts["embedding"] + parts["head"])  # second moments of AdamW
    assert (one.bubble, one.seen_s, one.stages_s, one.sync_s) == (0, 0, 0, 0)
    assert one.fits


def test_replicas_share_what_they_own_and_send_a_layer_at_a_time() -> None:
    """Of two ranks each holds half of momentum and sums; ordered sums hide their way, but not the copies."""
    config = preset("nano")
    one, two, once = (layout(config, gpus, 1, 1, 1, ordered=ordered, **OPTIONS)
                      for gpus, ordered in ((1, True), (2, True), (2, False)))  # fmt: skip
    assert two.weights == one.weights
    assert two.optimizer == pytest.approx(one.optimizer / 2, rel=1e-6)
    assert two.activations == one.activations
    assert once.gradients == pytest.approx(1.5 * one.weights, rel=1e-6)
    assert one.weights / 2 < two.gradients < once.gradients
    assert two.compute_s == one.compute_s / 2
    assert two.sync_s > once.sync_s > 0


def test_what_a_forward_keeps_is_what_autograd_held() -> None:
    """On one H200, size M in rows of 2,048: 60,708,766,208 bytes after 65,536 tokens, 16,402,754,560 after 16,384."""
    config = dataclasses.replace(
        preset("nano"), vocab_size=16384, hidden_size=768, num_hidden_layers=12, q_lora_rank=256, n_routed_experts=64,
        num_experts_per_tok=6, moe_intermediate_size=384, compress_ratios=(0, 4, *(128, 4) * 5, 0),
    )  # fmt: skip
    assert kept(config, 2048) == pytest.approx((60_708_766_208 - 16_402_754_560) / (65_536 - 16_384), rel=5e-3)


def test_what_each_dimension_saves_and_costs() -> None:
    config = preset("flash")
    base = layout(config, 128, 4, 8, 1, **OPTIONS)
    experts, stages, context = (layout(config, 128, *sizes, **OPTIONS) for sizes in ((4, 16, 1), (8, 8, 1), (4, 8, 2)))
    assert experts.weights < base.weights
    assert experts.experts_s > 5 * base.experts_s  # beyond a node
    assert stages.weights < base.weights
    assert stages.bubble > base.bubble
    assert base.activations / 2 < context.activations < base.activations  # weights are cast for a part of a row too
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
