"""The bench of decode steps: what it measures, how it fills caches, and the chart of its rows."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from pelagos import cost
from pelagos.cli.bench import main
from pelagos.config import preset
from pelagos.errors import ConfigError, KernelUnavailable
from pelagos.evals.roofline import draw
from pelagos.evals.step_bench import cut_config, fill_caches, step_rows
from pelagos.kernels.layout import CacheLayout
from pelagos.kernels.rows import LayerRows


def test_layers_are_cut_from_the_end() -> None:
    config = cut_config("flash", "39")
    assert config.layer_ratios == preset("flash").layer_ratios[:39]
    assert config.num_nextn_predict_layers == 0
    assert cut_config("flash", "2").num_hash_layers == 2
    assert cut_config("pro", "2:6").layer_ratios == (4, 128, 4, 128)
    assert cut_config("pro", "2:6").num_hash_layers == 1
    for wrong in ("44", "3:3", "x"):
        with pytest.raises(ConfigError, match="flash has 43"):
            cut_config("flash", wrong)


def test_floor_of_a_step_is_that_of_the_spec() -> None:
    """11.2 GB for one token of Flash at 8K, 86.5 for 32 of them (spec/kernels.md 3)."""
    assert cost.decode_step(preset("flash"), 8192, 1).moved == pytest.approx(11.2e9, rel=0.01)
    assert cost.decode_step(preset("flash"), 8192, 32).moved == pytest.approx(86.5e9, rel=0.01)


def test_caches_hold_finite_rows_around_one() -> None:
    layout = CacheLayout(cut_config("nano", None), "released", 0)
    pages = torch.zeros((3, layout.page_bytes), dtype=torch.uint8)
    slots = torch.zeros((2, layout.slot_bytes), dtype=torch.uint8)
    fill_caches(layout, pages, slots)
    every = torch.arange(3).unsqueeze(1)
    for index in range(len(layout.layers)):
        rows = LayerRows(layout, index, pages, slots)
        for found in (rows.main, rows.index):
            if found is not None:
                values = found.read(every, torch.arange(found.count))
                assert values.isfinite().all()
                assert 0.3 < values.std() < 6


def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(KernelUnavailable, match="no CUDA device"):
        next(step_rows("decode", "nano", layers=None, contexts=[128], batches=[1]))


def test_rows_become_a_chart(tmp_path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("the package matplotlib is not installed")
    rows = [
        {"bench": "ceilings", "device": "x", "gbps": 4000, "tflops": 1500, "bf16_tflops": 800},
        {"bench": "decode", "gbps": 2000, "tflops": 6.0},
        {"bench": "decode", "refused": "too large"},
    ]
    file, out = tmp_path / "rows.jsonl", tmp_path / "chart.png"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["plot", str(file), "--out", str(out)]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    file.write_text(json.dumps(rows[1]), encoding="utf-8")
    with pytest.raises(ConfigError, match="ceilings"):
        draw([file], out)
