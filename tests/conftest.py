"""One thread for the whole suite, set before torch is imported: for models this small a second one only waits."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pelagos.sandbox import Store

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Where sandboxes of all tests live; gone afterwards, and nothing may be left running in it."""
    from pelagos.sandbox import Store, doctor
    from pelagos.sandbox.layers import remove_tree

    if shutil.which("bwrap") is None:
        pytest.skip("bwrap (Debian package bubblewrap) is not installed")
    if (namespaces := doctor.host_facts()["user_namespaces"]) is not True:
        pytest.skip(f"this host gives no user namespaces: {namespaces}")
    root = tmp_path_factory.mktemp("store")
    yield Store(root)
    left = [path.name for path in (root / "boxes").iterdir()]
    for _ in range(600):  # a spare keeper may just be beginning there
        with contextlib.suppress(OSError):
            remove_tree(root)
        if not root.exists():
            break
        time.sleep(0.1)
    assert not root.exists()
    assert left == [], "a test left a sandbox"
