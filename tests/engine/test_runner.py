"""What tells one model's weights from another's: nothing cached may be shared by two that differ in a byte."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tests.engine.small import engine_of, finish, params, prompt

from pelagos.config import tiny
from pelagos.engine import runner
from pelagos.engine.runner import available_bytes, fingerprint


def named(*tensors: torch.Tensor) -> bytes:
    released = [(f"w{number}", tensor, None) for number, tensor in enumerate(tensors)]
    return fingerprint(cast(Any, SimpleNamespace(config=tiny(), released_tensors=lambda: released)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_every_byte_of_a_large_tensor_counts(dtype: torch.dtype) -> None:
    base = torch.arange(1_500_003).remainder(251).to(dtype)
    names = {named(base), named(base.clone()[:-1]), named(base.view(3, -1))}
    for at in (0, 1, 777_777, 1_048_577, 1_499_999, 1_500_002):
        other = base.clone()
        other[at] += 1
        names.add(named(other))
    swapped = base.clone()
    swapped[[70_000, 900_000]] = base[[900_000, 70_000]] + torch.tensor([1, 1]).to(dtype)
    assert named(swapped) not in names
    assert len(names) == 9
    behind = torch.cat((base[:1], base))[1:]  # the same content off the words' boundary
    assert named(behind) == named(base)


@pytest.mark.parametrize("exact", [True, False])
def test_without_the_helper_answers_are_shared_only_where_bits_may_differ(exact: bool) -> None:
    engine = engine_of(native=False, exact=exact, speculation=False, threaded=False)
    given = prompt(300, 1)
    [said] = finish(engine, engine.submit(given, params(150)))
    stream = engine.submit([*given, *said, 3], params(2))
    finish(engine, stream)
    assert stream.cached_tokens > 0
    assert (stream.cached_tokens > len(given)) != exact
    engine.close()


def test_a_limit_of_a_control_group_bounds_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_CGROUPS", tmp_path)
    host = available_bytes(torch.device("cpu"))
    assert host is not None
    (tmp_path / "memory").mkdir()
    for folder, names, prefix in (
        (tmp_path, ("max", "current"), ""),
        (tmp_path / "memory", ("limit_in_bytes", "usage_in_bytes"), "total_"),
    ):
        for name, value in zip(names, ("max", "900"), strict=True):
            (folder / f"memory.{name}").write_text(f"{value}\n", encoding="ascii")
        stat = f"file 999\n{prefix}inactive_file 70\n{prefix}active_file 5\n"
        (folder / "memory.stat").write_text(stat, encoding="ascii")
    assert available_bytes(torch.device("cpu")) == pytest.approx(host, rel=0.2), "no limit"
    for folder, name in ((tmp_path, "max"), (tmp_path / "memory", "limit_in_bytes")):
        limit = folder / f"memory.{name}"
        limit.write_text("1000\n", encoding="ascii")
        assert available_bytes(torch.device("cpu")) == 1000 - 900 + 75
        limit.write_text("800\n", encoding="ascii")
        assert available_bytes(torch.device("cpu")) == 0
        limit.unlink()
