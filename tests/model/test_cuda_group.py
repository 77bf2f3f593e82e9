"""Two ranks over gloo give what one gives, whoever holds which sequence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pelagos.config import preset
from pelagos.errors import ConfigError
from pelagos.model.cuda_group import cut_width

ROOT = Path(__file__).resolve().parents[2]


def test_two_ranks_are_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(Path(__file__).with_name("group_worker.py"))]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"rank {rank} of 2:" in done.stdout for rank in range(2))


def test_widths_that_cannot_be_cut_are_refused() -> None:
    assert cut_width(preset("flash"), 16).moe_intermediate_size == 128
    with pytest.raises(ConfigError, match="3072 in 16 parts"):
        cut_width(preset("pro"), 16)
