"""The bench of the KV tiers on a CPU: all of it goes through, and what it says of bits holds; rates mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks import kv_tiers

CPU = torch.device("cpu")


def test_copies_alone_bring_every_byte_back_beside_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_tiers, "DECODED", 256)
    monkeypatch.setattr(kv_tiers.OneLayersExperts, "_first", None)
    host, ssd, beside = kv_tiers.copy_rows("nano", CPU, 1024, 2, 2, tmp_path)
    assert (host["what"], ssd["what"], host["pages"]) == ("host", "ssd", 8)
    assert host["same_bytes"]
    assert ssd["same_bytes"]
    assert min(*host["restore_ms"], *ssd["restore_ms"]) > 0
    assert beside["steps"] == 6  # a restore is finished behind each round of them, if in none


def test_prefixes_of_an_engine_come_back_with_their_bits(tmp_path: Path) -> None:
    rows = {row["what"]: row for row in kv_tiers.rate_rows("tiny", None, 1024, 2, 2, tmp_path)}
    assert set(rows) == {"cold", "host", "ssd", "steps beside restores", "end"}
    for source in ("host", "ssd"):
        assert rows[source]["same_bits"]
        assert rows[source]["cached"] == 1024
    assert rows["end"]["in_use"] == (0, 0, 0)
    assert rows["end"]["damaged"] == rows["end"]["host"]["failed"] == 0
