"""The legend names config keys that exist and sizes that are true."""

from __future__ import annotations

import re
from pathlib import Path

from pelagos.config import flash, nano

LEGEND = Path(__file__).resolve().parents[1] / "docs" / "notation.md"


def test_sizes_in_the_legend_are_the_presets() -> None:
    checked = 0
    for line in LEGEND.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or not cells[4].strip("- ") or cells[0] == "letter":
            continue
        keys = re.findall(r"`(\w+)`", cells[2])
        for key, small, large in zip(keys, cells[3].split(", "), cells[4].split(", "), strict=True):
            assert (key, small) == (key, str(getattr(nano(), key))), f"{LEGEND.name} and the nano preset differ"
            assert (key, large) == (key, str(getattr(flash(), key)))
            checked += 1
    assert checked == 13
