"""One thread for the whole suite, set before torch is imported: for models this small a second one only waits."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pelagos.sandbox import Store

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Sandboxes of one test at a time, of all processes that test: some count mounts and groups of the whole host."""
    if "sandbox" not in item.path.parts and "store" not in getattr(item, "fixturenames", ()):
        return (yield)
    import fcntl

    with Path(tempfile.gettempdir(), f"pelagos-tests-{os.getuid()}.lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        return (yield)


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
