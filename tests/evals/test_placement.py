"""Plans of serving on several GPUs: bytes are the cost model's, the fitted times give the measured steps back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pelagos import cost
from pelagos.cli import main
from pelagos.config import preset
from pelagos.errors import ConfigError
from pelagos.evals.placement import LINK, NODE, balance, plan, plan_rows, prefill, width_parts

FLASH, PRO = preset("flash"), preset("pro")
PLANS = [
    (config, gpus, attention)
    for config in (FLASH, PRO)
    for gpus in (1, 4, 8, 16)
    for attention in ("sequence", "context")
]


@pytest.mark.parametrize(("batch", "measured_ms"), [(1, 5.461), (8, 12.5), (32, 28.6), (128, 83.8)])
def test_the_line_goes_through_what_was_measured(batch: int, measured_ms: float) -> None:
    config = dataclasses.replace(FLASH, num_hidden_layers=39, compress_ratios=FLASH.compress_ratios[:39])
    took = plan(config, 1, "sequence", context=8192, batch=batch).step_s
    assert took * 1e3 == pytest.approx(measured_ms, rel=0.06)
    assert 1 / prefill(config, 1, 8192)[0] == pytest.approx(20_900, rel=0.01)


@pytest.mark.parametrize(("batch", "measured_ms"), [(1, 5.38), (8, 9.91), (128, 38.67)])
def test_two_gpus_are_near_what_was_measured(batch: int, measured_ms: float) -> None:
    found = plan(FLASH, 2, "sequence", context=8192, batch=batch)
    assert found.step_s * 1e3 == pytest.approx(measured_ms, rel=0.1)
    assert found.prefill_tok_s == pytest.approx(29_230, rel=0.02)
    assert found.weight_bytes + cost.weights_bytes(FLASH) - cost.weights_bytes(FLASH, draft=False) > 83_762_280_184


def test_one_gpu_holds_all_weights_once() -> None:
    for config in (FLASH, PRO):
        for attention in ("sequence", "context"):
            assert plan(config, 1, attention, context=8192, batch=1).weight_bytes == cost.weights_bytes(
                config, draft=False
            )


@pytest.mark.parametrize(("config", "gpus", "attention"), PLANS)
def test_nothing_is_lost_and_caches_are_never_held_twice(config, gpus: int, attention: str) -> None:
    found = plan(config, gpus, attention, context=1 << 20, batch=32)
    whole = cost.weights_bytes(config, draft=False)
    assert whole <= found.weight_bytes * gpus
    each = cost.sequence_bytes(config, 1 << 20)
    assert found.sequences * each <= max(0, found.room_bytes) * gpus
    assert (found.exchange_s > 0) == (gpus > 1)


def test_widths_are_cut_in_whole_blocks() -> None:
    assert [width_parts(FLASH, gpus) for gpus in (4, 8, 16)] == [4, 8, 16]
    assert [width_parts(PRO, gpus) for gpus in (4, 8, 16)] == [4, 8, 8]
    assert "2 groups" in plan(PRO, 16, "context", context=8192, batch=1).experts


def test_which_way_pays() -> None:
    """One sequence gains from all GPUs' bandwidth, many from fewer exchanges."""
    took = {(batch, attention): plan(FLASH, 4, attention, context=8192, batch=batch).step_s
            for batch in (1, 128) for attention in ("sequence", "context")}  # fmt: skip
    assert took[1, "context"] < took[1, "sequence"]
    assert took[128, "context"] > took[128, "sequence"]


def test_the_balance_rule() -> None:
    assert balance(FLASH, NODE)["limit_2d"] == 4096
    assert balance(PRO, NODE) == {"c_over_b": round(1.484e15 / LINK), "limit_2d": 6144}
    assert balance(FLASH, 16)["c_over_b"] > 4096


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 GPUs"):
        plan(FLASH, 0, "sequence", context=8192, batch=1)
    with pytest.raises(ConfigError, match="places V4 models"):
        next(plan_rows("v3.2", gpus=[4], context=8192, batch=1))


def test_the_command_prints_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "--model", "pro", "--dry-run", "4,8", "--context", "8K", "--batch", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("simulated")
    assert printed.count("do not fit") == 2
    assert main(["cost", "--dry-run", "8", "--json"]) == 0
    assert [row["simulated"] for row in json.loads(capsys.readouterr().out)] == [True, True]
