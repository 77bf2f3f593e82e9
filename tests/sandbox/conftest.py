"""One store for the session under a directory that is gone afterwards, and nothing left running in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pelagos.sandbox import Sandbox, Store, doctor
from pelagos.sandbox.layers import remove_tree


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    if shutil.which("bwrap") is None:
        pytest.skip("bwrap (Debian package bubblewrap) is not installed")
    if (namespaces := doctor.host_facts()["user_namespaces"]) is not True:
        pytest.skip(f"this host gives no user namespaces: {namespaces}")
    root: Path = tmp_path_factory.mktemp("store")
    yield Store(root)
    left = [path.name for path in (root / "boxes").iterdir()]
    remove_tree(root)
    assert left == [], "a test left a sandbox"


@pytest.fixture(scope="module")
def box(store: Store) -> Iterator[Sandbox]:
    """A container shared by the tests of a module that leave it as they found it."""
    with Sandbox.create(store=store, ttl_s=120) as made:
        yield made


@pytest.fixture
def make(store: Store) -> Iterator[Any]:
    """Make sandboxes that are closed after the test."""
    made: list[Sandbox] = []

    def create(**options: Any) -> Sandbox:
        made.append(Sandbox.create(store=store, **({"ttl_s": 120} | options)))
        return made[-1]

    yield create
    for one in made:
        one.close()
