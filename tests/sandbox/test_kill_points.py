"""A sample of the kill points; `python -m benchmarks.sandbox kill` runs five hundred."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import sandbox as bench

from pelagos.sandbox import Image, Store


def test_killed_clients_and_keepers_change_nothing(store: Store) -> None:
    found = bench.kill(store, Image.host(store), kills=10, seed=5, commands=25, victims=("client", "keeper"))
    assert found["wrong"] == []
    assert min(found["kill_points"].values()) > 0, "only one kind of victim"


def test_killed_gateways_and_edges_change_nothing(tmp_path: Path) -> None:
    """The service as its processes are; it goes on from what an earlier call returned."""
    pytest.importorskip("uvicorn")
    store = Store(tmp_path / "pelagos" / "sandbox")
    image = Image.host(store)
    half = bench.kill(store, image, kills=4, seed=3, commands=20)
    found = bench.kill(store, image, kills=6, seed=3, commands=20, state=half)
    assert (found["wrong"], found["complete"], sum(found["kill_points"].values())) == ([], True, 6)
    assert list(store.boxes.iterdir()) == []


def test_forks_diverge_and_pack_to_the_same_bytes(store: Store) -> None:
    assert bench.fork(store, Image.host(store))["identical"] == 8


def test_many_in_a_row_leave_nothing(store: Store) -> None:
    found = bench.row(store, Image.host(store), 20)
    assert {name: found["left"][name] for name in ("mounts", "boxes")} == {"mounts": 0, "boxes": 0}
    assert found["left"]["groups"] <= bench.SPARE_GROUPS
