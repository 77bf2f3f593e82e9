"""A sample of the kill points; `python -m benchmarks.sandbox kill` runs five hundred."""

from __future__ import annotations

from benchmarks import sandbox as bench

from pelagos.sandbox import Image, Store


def test_killed_clients_and_keepers_change_nothing(store: Store) -> None:
    found = bench.kill(store, Image.host(store), kills=10, seed=5, commands=25)
    assert found["wrong"] == []
    assert min(found["kill_points"].values()) > 0, "only one kind of victim"


def test_forks_diverge_and_pack_to_the_same_bytes(store: Store) -> None:
    assert bench.fork(store, Image.host(store))["identical"] == 8


def test_many_in_a_row_leave_nothing(store: Store) -> None:
    found = bench.row(store, Image.host(store), 20)
    assert {name: found["left"][name] for name in ("mounts", "boxes")} == {"mounts": 0, "boxes": 0}
    assert found["left"]["groups"] <= bench.SPARE_GROUPS
