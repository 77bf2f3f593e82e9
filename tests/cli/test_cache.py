"""`pelagos cache`: the listing adds up, verify finds what is damaged, purge removes whom it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pelagos import cli
from pelagos.engine.disk import DiskCache
from pelagos.engine.disk_file import CacheDirectory

PAGE = 100


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = tmp_path / "pelagos" / "prefix"
    cache = DiskCache(root, fingerprint=b"m", page_bytes=PAGE, quota_bytes=1 << 20)
    for user, count in (("alice", 9), ("bob", 2)):
        cache.write_pages(user, [(bytes([i]) * 16, bytes([i]) * PAGE) for i in range(count)], first=4)
        cache.write_state(user, bytes([count]) * 16, 5, b"s" * 16, 128 * count + 5, b"state of " + user.encode())
    assert cache.close(20)
    return root


def show(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    got = cli.main(["cache", *map(str, args)])
    shown = capsys.readouterr()
    assert got == code, shown.err
    return shown.err if code and not shown.out else shown.out


def report(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> dict[str, Any]:
    return json.loads(show(capsys, *args, "--json", code=code))


def test_list_adds_up(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = CacheDirectory(root, create=False)
    found = report(capsys, "list")
    users = {user["user"]: user for user in found["users"]}
    alice, bob = users[directory.tag("alice")], users[directory.tag("bob")]
    assert (found["dir"], len(users)) == (str(root), 2)
    assert found["bytes"] == sum(path.stat().st_size for path in root.glob("*/*")) == alice["bytes"] + bob["bytes"]
    assert [(user["pages"], user["states"], user["positions"]) for user in (alice, bob)] == [
        (9, 1, [9 * 128 + 5]),
        (2, 1, [2 * 128 + 5]),
    ]
    assert sorted(file["positions"] for file in bob["files"]) == [[4, 5], [261]]
    assert {"alice", "bob"} & set(json.dumps(found).split('"')) == set()
    shown = show(capsys, "list", "--user", "alice", "--dir", root)
    assert alice["user"] in shown
    assert bob["user"] not in shown
    assert "pages 4 5 6 7 8 9 and 3 more" in shown
    assert show(capsys, "list", "--user", "nobody").count("\n") == 3


def test_verify_finds_and_deletes_what_is_damaged(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(capsys, "verify") == {
        "dir": str(root), "intact": 4, "other_format": 0, "gone": 0, "deleted": 0, "damaged": [],
    }  # fmt: skip
    pages, state = (max(root.glob(f"*/*.{kind}1"), key=lambda path: path.stat().st_size) for kind in ("pages", "state"))
    raw = pages.read_bytes()
    pages.write_bytes(raw[:-1] + b"?")
    state.rename(state.with_suffix(".state2"))
    found = report(capsys, "verify", code=1)
    assert [found[name] for name in ("intact", "other_format", "deleted")] == [2, 1, 0]
    assert [each["file"] for each in found["damaged"]] == [pages.name]
    assert pages.exists()
    assert "record 8 of 9 fails its checksum" in show(capsys, "verify", "--delete", code=1)
    assert not pages.exists()
    assert "2 intact, 1 other format, 0 gone, 0 damaged" in show(capsys, "verify")
    other = state.with_suffix(".state2").name
    files = [file for user in report(capsys, "list")["users"] for file in user["files"]]
    assert {file["file"] for file in files if "format 2, this build reads 1" in file.get("error", "")} == {other}


def test_purge(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ([], ["--all", "--user", "bob"]):
        assert "expected either --user ID or --all" in show(capsys, "purge", *wrong, code=1)
    assert report(capsys, "purge", "--user", "bob")["removed"] == 2
    assert [user["pages"] for user in report(capsys, "list")["users"]] == [9]
    next(root.glob("*/*.pages1")).with_suffix(".pages1.tmp").touch()
    mine = next(root.glob("*/*.pages1")).with_name("notes.txt")
    mine.touch()
    assert "2 files removed" in show(capsys, "purge", "--all")
    assert list(mine.parent.iterdir()) == [mine]
    mine.unlink()
    assert "0 files removed" in show(capsys, "purge", "--all")
    assert sorted(path.name for path in root.iterdir()) == ["lock", "secret"]
    assert report(capsys, "list")["users"] == []


def test_a_user_is_found_by_the_key_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = DiskCache(root, fingerprint=b"m", page_bytes=PAGE, quota_bytes=1 << 20)
    for user in ("team\0bob", "team\0"):  # as the server has it, whose tests see the same
        cache.write_pages(user, [(b"k" * 16, b"p" * PAGE)])
    assert cache.close(20)
    assert [user["pages"] for user in report(capsys, "list", "--user", "bob", "--key", "team")["users"]] == [1]
    for user, removed in ((["--user", "bob", "--key", "team"], 1), (["--key", "team"], 1), (["--user", "bob"], 2)):
        assert report(capsys, "purge", *user)["removed"] == removed


def test_a_directory_without_a_cache_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in (tmp_path / "none", tmp_path):
        assert f"pelagos: {directory}: " in show(capsys, "list", "--dir", directory, code=1)
    assert list(tmp_path.iterdir()) == []
