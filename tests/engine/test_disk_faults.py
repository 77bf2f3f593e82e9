"""A seeded sample of `python -m benchmarks.disk_faults`: real writer processes, hurt while they write."""

from __future__ import annotations

import pytest
from benchmarks import disk_faults

KINDS = sorted(set(disk_faults.KINDS))


@pytest.mark.parametrize(("kind", "seed"), [(kind, 1000 + i) for i, kind in enumerate(KINDS)] + [
    ("kill at a call", 2001), ("kill at a call", 2002), ("kill at a moment", 2003), ("flip", 2004),
])  # fmt: skip
def test_nothing_wrong_comes_back(kind: str, seed: int) -> None:
    record = disk_faults.run(kind, seed)
    assert record["ok"], record


def test_the_judge_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = disk_faults.page_content
    monkeypatch.setattr(disk_faults, "page_content", lambda key: right(key)[:-1] + b"?")
    record = disk_faults.run("kill at a moment", 7)
    assert (record["ok"], record["error"]) == (False, "something wrong was returned")
