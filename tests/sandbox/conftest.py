"""Sandboxes that tests share or make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pelagos.sandbox import Sandbox, Store


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
