"""The trajectory log under truncation, flipped bits, kill -9 and programs that come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pelagos.errors import SandboxError, TrajectoryError, UnknownOutcome
from pelagos.sandbox import log as logs
from pelagos.sandbox.log import Begun, Stored, TrajectoryLog


def run(log: TrajectoryLog, request: str, text: str, *, data: bytes = b"", pure: bool = False) -> Begun:
    begun = log.begin(request, "exec", {"argv": ["echo", text], "data": data}, pure=pure)
    assert isinstance(begun, Begun)
    log.finish(begun, "ok", {"exit_code": 0}, {"stdout": text.encode() + data})
    return begun


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Header, a finished request, a pure one, a big one, and an intent without a result."""
    log = TrajectoryLog.create(tmp_path / "box", {"id": "box"})
    run(log, "1", "one")
    run(log, "2", "two", pure=True)
    run(log, "3", "three", data=bytes(range(256)) * 40)
    log.event("pause")
    log.begin("4", "exec", {"argv": ["four"]})
    log.close()
    return tmp_path / "box"


def rewrite(path: Path, data: bytes) -> None:
    """As a new file: some file systems flush one that is cut and written again, and there are thousands of cases."""
    path.unlink()
    path.write_bytes(data)


def reopened(directory: Path) -> TrajectoryLog:
    log = TrajectoryLog.open(directory)
    log.close()
    return log


def test_same_request_gets_the_stored_result(small: Path) -> None:
    log = TrajectoryLog.open(small)
    for request, text, data in (("1", "one", b""), ("3", "three", bytes(range(256)) * 40)):
        stored = log.begin(request, "exec", {"argv": ["echo", text], "data": data})
        assert stored == Stored("ok", {"exit_code": 0}, {"stdout": text.encode() + data})
    assert isinstance(log.begin("2", "exec", {"argv": ["echo", "two"], "data": b""}, pure=True), Stored)
    log.close()


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("exec", {"argv": ["echo", "other"], "data": b""}),
        ("write", {"argv": ["echo", "one"], "data": b""}),
        ("exec", {"argv": ["echo", "one"], "data": b"x"}),
        ("exec", {"argv": ["echo", "one"]}),
    ],
)
def test_divergence_is_an_error(small: Path, op: str, args: dict[str, object]) -> None:
    log = TrajectoryLog.open(small)
    with pytest.raises(TrajectoryError, match="diverges"):
        log.begin("1", op, args)
    log.close()


def test_intent_without_result_is_unknown_until_resolved(small: Path) -> None:
    log = TrajectoryLog.open(small)
    assert log.unknown() == ["4"]
    with pytest.raises(UnknownOutcome, match="may have run"):
        log.begin("4", "exec", {"argv": ["four"]})
    with pytest.raises(SandboxError, match="expected 'rerun' or 'abandon'"):
        log.resolve("4", "ignore")
    log.resolve("4", "rerun")
    log.resolve("4", "rerun")  # as who was killed before it was told would
    log.close()
    log = TrajectoryLog.open(small)
    again = log.begin("4", "exec", {"argv": ["four"]})
    assert isinstance(again, Begun)
    with pytest.raises(SandboxError, match="is running"):
        log.begin("4", "exec", {"argv": ["four"]})
    log.close()
    log = TrajectoryLog.open(small)
    log.resolve("4", "abandon")
    log.resolve("4", "abandon")
    log.close()
    log = TrajectoryLog.open(small)
    stored = log.begin("4", "exec", {"argv": ["four"]})
    assert isinstance(stored, Stored)
    assert stored.status == "abandoned"
    with pytest.raises(SandboxError, match="nothing to resolve"):
        log.resolve("4", "rerun")
    log.close()


def test_every_truncation_keeps_what_was_whole_and_goes_on(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # thousands of files: what is on disk is not asked here
    path = small / logs.NAME
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(ends[0], len(whole) + 1):
        rewrite(path, whole[:cut])
        log = TrajectoryLog.open(small)
        kept = sum(end <= cut for end in ends)
        assert path.read_bytes() == whole[: ends[kept - 1]]
        # records: header, intent 1, result 1, result 2 (pure), intent 3, result 3, event, intent 4
        assert log.unknown() == {2: ["1"], 5: ["3"], 8: ["4"]}.get(kept, [])
        if kept == 3:
            run(log, "2", "two")
            assert logs.verify(small)[0] == 5
        log.close()
    for cut in range(ends[0]):
        rewrite(path, whole[:cut])
        with pytest.raises(TrajectoryError, match="no header"):
            TrajectoryLog.open(small)


def test_every_flipped_bit_is_refused(small: Path) -> None:
    path = small / logs.NAME
    whole = path.read_bytes()
    records = list(logs.read_records(small))
    for place in range(len(whole)):
        for bit in (place % 8,) if place % 7 else range(8):
            rewrite(path, whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(TrajectoryError):
                reopened(small) if place % 7 == 0 else list(logs.read_records(small))
    path.write_bytes(whole)
    assert list(logs.read_records(small)) == records


def test_damaged_or_missing_blob_is_refused(small: Path) -> None:
    (blob,) = {
        record["blobs"]["stdout"]["sha"]
        for record in logs.read_records(small)
        if record.get("request") == "3" and "blobs" in record
    }
    path = small / "blobs" / blob
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    log = TrajectoryLog.open(small)
    with pytest.raises(TrajectoryError, match="does not match its hash"):
        log.begin("3", "exec", {"argv": ["echo", "three"], "data": bytes(range(256)) * 40})
    log.close()
    path.unlink()
    with pytest.raises(TrajectoryError, match="names this blob"):
        logs.verify(small)


def test_head_notices_a_log_cut_at_a_record(small: Path) -> None:
    count, head = logs.verify(small)
    assert logs.verify(small, head=head) == (8, head)
    path = small / logs.NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(TrajectoryError, match="cut or replaced"):
        logs.verify(small, head=head)
    assert logs.verify(small, head=lines[2][:64].decode())[0] == count - 1


def test_records_of_another_log_do_not_fit(small: Path, tmp_path: Path) -> None:
    other = TrajectoryLog.create(tmp_path / "other", {"id": "other"})
    run(other, "1", "one")
    other.close()
    mine, theirs = ((d / logs.NAME).read_bytes().splitlines(keepends=True) for d in (small, tmp_path / "other"))
    (small / logs.NAME).write_bytes(b"".join(mine[:2] + theirs[2:]))
    with pytest.raises(TrajectoryError, match="does not verify"):
        reopened(small)


def test_one_writer_and_no_second_log(small: Path) -> None:
    log = TrajectoryLog.open(small)
    with pytest.raises(TrajectoryError, match="one keeper at a time"):
        TrajectoryLog.open(small)
    log.close()
    with pytest.raises(TrajectoryError, match="log already"):
        TrajectoryLog.create(small, {})
    with pytest.raises(TrajectoryError, match="sandbox directory"):
        TrajectoryLog.open(small / "nowhere")
    with pytest.raises(TrajectoryError, match="closed to writing"):
        log.event("late")


def test_full_disk_closes_the_log(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TrajectoryLog.open(small)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
    with pytest.raises(TrajectoryError, match="cannot append"):
        log.begin("5", "exec", {})
    monkeypatch.undo()
    with pytest.raises(TrajectoryError, match="closed to writing"):
        log.begin("6", "exec", {})
    log.close()
    log = TrajectoryLog.open(small)
    assert isinstance(log.begin("5", "exec", {}), Begun)
    log.close()


def test_export_is_whole_and_the_same_twice(small: Path, tmp_path: Path) -> None:
    with (small / logs.NAME).open("ab") as file:
        file.write(b"torn")
    heads = {logs.export(small, tmp_path / name) for name in ("a.tar", "b.tar")}
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # not in every 3.11
        tar.extractall(tmp_path / "copy")
    assert {logs.verify(tmp_path / "copy")[1]} == heads == {logs.verify(small)[1]}


def test_provenance_names_the_request(small: Path) -> None:
    assert [line["request"] for line in logs.provenance(small)] == ["1", "2", "3"]
    sha = logs.provenance(small)[2]["blobs"]["stdout"]
    assert [line["request"] for line in logs.provenance(small, blob=sha)] == ["3"]
    assert [line["request"] for line in logs.provenance(small, path="two")] == ["2"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abcd"), st.text(max_size=5), st.binary(max_size=9), st.booleans(), st.booleans()),
        max_size=12,
    )
)
def test_any_program_resumed_anywhere_gets_its_results(steps: list, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against a dict: each id keeps its first meaning and its result, whenever the log is closed and opened again."""
    directory = tmp_path_factory.mktemp("log") / "box"
    log = TrajectoryLog.create(directory, {})
    model: dict[str, tuple] = {}
    for request, text, data, pure, reopen in steps:
        if reopen:
            log.close()
            log = TrajectoryLog.open(directory)
        args = {"text": text, "data": data}
        if request in model and model[request] != (text, data):
            with pytest.raises(TrajectoryError, match="diverges"):
                log.begin(request, "op", args, pure=pure)
            continue
        begun = log.begin(request, "op", args, pure=pure)
        if request in model:
            assert begun == Stored("ok", {"text": text}, {"out": data})
        else:
            assert isinstance(begun, Begun)
            log.finish(begun, "ok", {"text": text}, {"out": data})
            model[request] = (text, data)
    log.close()
    assert len({r["request"] for r in logs.read_records(directory) if r["kind"] == "result"}) == len(model)


WRITER = """
import sys
from pathlib import Path
from pelagos.sandbox.log import Begun, TrajectoryLog
log = TrajectoryLog.open(Path(sys.argv[1]))
for name in log.unknown():
    log.resolve(name, "rerun")
for n in range(1000):
    begun = log.begin(str(n), "exec", {"n": n, "data": b"x" * (n * 97 % 9000)})
    if isinstance(begun, Begun):
        log.finish(begun, "ok", {"n": n}, {"stdout": b"y" * (n * 89 % 9000)})
        print(n, flush=True)
"""


def test_kill_nine_loses_nothing_that_was_told(tmp_path: Path) -> None:
    """A writer killed again and again: all it told is stored, at most one request is unknown, the chain holds."""
    TrajectoryLog.create(tmp_path / "box", {}).close()
    told: set[int] = set()
    for after in (1, 7, 4, 12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "box")], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(Path(logs.__file__).parents[2])},
        )  # fmt: skip
        assert writer.stdout is not None
        for _ in range(after):
            told.add(int(writer.stdout.readline()))
        writer.send_signal(signal.SIGKILL)
        told |= {int(line) for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")}
        writer.wait()
        writer.stdout.close()
        log = TrajectoryLog.open(tmp_path / "box")
        assert len(log.unknown()) <= 1
        stored = {
            n
            for n in range(60)
            if n in told and isinstance(log.begin(str(n), "exec", {"n": n, "data": b"x" * (n * 97 % 9000)}), Stored)
        }
        assert stored == {n for n in told if n < 60}
        log.close()
    assert len(told) >= 24
    requests = [r["request"] for r in logs.read_records(tmp_path / "box") if r["kind"] == "result"]
    assert len(requests) == len(set(requests))
    assert json.dumps(sorted(map(int, requests))) == json.dumps(list(range(len(requests))))
