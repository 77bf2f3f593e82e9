"""The disk cache returns what was written or nothing: across restarts, users, models, quotas, faults and processes."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelagos.engine import disk
from pelagos.engine.disk import DiskCache, StatePolicy, Ticket, parse_policy
from pelagos.engine.disk_file import CacheDirectory
from pelagos.errors import CacheError, ConfigError

PAGE = 1000
Open = Callable[..., DiskCache]


def key(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def chain(name: str, count: int, first: int = 0) -> list[tuple[bytes, bytes]]:
    keys = [key(name, i) for i in range(first, first + count)]
    return [(each, hashlib.shake_128(each).digest(PAGE)) for each in keys]


def keys_of(items: list[tuple[bytes, bytes]]) -> list[bytes]:
    return [each for each, _ in items]


def pages_of(ticket: Ticket) -> list[bytes]:
    assert ticket.wait(20)
    return [bytes(page) for page in ticket.pages]


def returns(cache: DiskCache, user: str, items: list[tuple[bytes, bytes]]) -> int:
    """How many leading pages come back; they must be the right ones."""
    found = pages_of(cache.read(user, keys_of(items)))
    assert found == [data for _, data in items[: len(found)]]
    return len(found)


def files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def opened(root: Path) -> Iterator[Open]:
    caches: list[DiskCache] = []

    def make(**options: Any) -> DiskCache:
        settings = {"fingerprint": b"model", "page_bytes": PAGE, "quota_bytes": 1 << 24} | options
        caches.append(DiskCache(root, **settings))
        return caches[-1]

    yield make
    for cache in caches:
        assert cache.close(20)


def test_what_was_written_comes_back_after_a_restart(opened: Open, root: Path) -> None:
    cache, items = opened(), chain("a", 20)
    cache.write_pages("u", items[:12])
    cache.write_pages("u", [(each, memoryview(bytearray(data))) for each, data in items[12:]], first=12)
    cache.write_state("u", items[-1][0], 7, key("s"), 20 * 128 + 7, b"state" * 99)
    assert cache.close(20)
    assert len(files(root)) == 3
    cache = opened()
    assert cache.known_pages("u", keys_of(items)) == 20
    assert cache.known_states("u", items[-1][0]) == [(7, key("s"))]
    ticket = cache.read("u", keys_of(items), key("s"))
    assert pages_of(ticket) == [data for _, data in items]
    assert ticket.state is not None
    assert bytes(ticket.state) == b"state" * 99
    stats = cache.stats()
    assert (stats["hits"], stats["misses"], stats["damaged"], stats["errors"]) == (21, 0, 0, 0)
    assert stats["bytes"] == sum(path.stat().st_size for path in files(root))


def test_a_chain_ends_at_the_first_page_that_is_missing(opened: Open) -> None:
    cache, items = opened(), chain("a", 9)
    cache.write_pages("u", items[:3])
    cache.write_pages("u", items[5:], first=5)
    assert cache.flush(20)
    assert cache.known_pages("u", keys_of(items)) == 3
    assert cache.known_pages("u", keys_of(items[5:])) == 4
    ticket = cache.read("u", keys_of(items), key("none"))
    assert len(pages_of(ticket)) == 3
    assert ticket.state is None
    assert (cache.stats()["hits"], cache.stats()["misses"]) == (3, 7)
    assert pages_of(cache.read("u", [])) == []


def test_reading_into_the_caller_s_buffers(opened: Open) -> None:
    cache, items = opened(), chain("a", 700)
    cache.write_pages("u", items)
    assert cache.flush(20)
    pool = bytearray(700 * PAGE)
    rows = [memoryview(pool)[i * PAGE : (i + 1) * PAGE] for i in range(700)][::-1]
    assert len(pages_of(cache.read("u", keys_of(items), into=rows))) == 700
    assert bytes(pool) == b"".join(data for _, data in reversed(items))
    for wrong in (rows[1:], [*rows[1:], memoryview(bytearray(PAGE - 1))], [memoryview(bytes(PAGE))] * 700):
        with pytest.raises(CacheError, match="expected 700 x 1000 bytes"):
            cache.read("u", keys_of(items), into=wrong)


def test_states_of_a_node_longest_first(opened: Open) -> None:
    cache = opened()
    for remainder in (3, 90, 0):
        cache.write_state("u", key("node"), remainder, key("s", remainder), 128 + remainder, b"x" * (1 + remainder))
    assert cache.flush(20)
    assert cache.known_states("u", key("node")) == [(r, key("s", r)) for r in (90, 3, 0)]
    assert cache.known_states("u", key("other")) == []
    ticket = cache.read("u", [], key("s", 90))
    assert ticket.wait(20)
    assert ticket.state == b"x" * 91


def test_what_is_there_is_not_written_again(opened: Open, root: Path) -> None:
    cache, items = opened(), chain("a", 6)
    cache.write_pages("u", items[:4])
    cache.write_pages("u", items)  # queued before the first is on disk
    assert cache.flush(20)
    cache.write_pages("u", items)
    cache.write_state("u", items[0][0], 0, key("s"), 128, b"s")
    assert cache.flush(20)
    cache.write_state("u", items[0][0], 0, key("s"), 128, b"s")
    assert cache.flush(20)
    assert (cache.stats()["written"], len(files(root))) == (7, 3)


def test_no_hit_across_users_models_and_sizes(opened: Open, root: Path) -> None:
    cache, items = opened(), chain("a", 4)
    cache.write_pages("u", items)
    cache.write_state("u", items[-1][0], 0, key("s"), 512, b"s")
    assert cache.flush(20)
    for other in ("", "U", "u ", "../u", "a/b", "\udcff", "u" * 5000):
        assert cache.known_pages(other, keys_of(items)) == 0
        assert cache.known_states(other, items[-1][0]) == []
        cache.write_pages(other, chain("b", 1))
    assert cache.flush(20)
    assert len(list(root.glob("*/*.pages1"))) == 8
    assert not list(root.parent.glob("*.pages1"))
    for options in ({"fingerprint": b"model2"}, {"page_bytes": PAGE + 1}, {"fingerprint": b"mode"}):
        stranger = opened(**options)
        assert stranger.known_pages("u", keys_of(items)) == 0
        assert stranger.known_states("u", items[-1][0]) == []
        assert stranger.stats()["bytes"] == cache.stats()["bytes"], "others' files count to the quota"
        assert stranger.stats()["damaged"] == 0


def test_a_file_in_another_user_s_folder_is_refused(opened: Open, root: Path) -> None:
    cache, items = opened(), chain("a", 4)
    cache.write_pages("alice", items)
    cache.write_pages("bob", chain("b", 1))
    assert cache.close(20)
    alice, bob = (root / CacheDirectory(root).tag(user) for user in ("alice", "bob"))
    [file] = alice.iterdir()
    os.rename(file, bob / file.name)
    cache = opened()
    assert cache.known_pages("bob", keys_of(items)) == 0
    assert cache.stats()["damaged"] == 1


def test_other_formats_are_left_alone(opened: Open, root: Path) -> None:
    cache, items = opened(), chain("a", 4)
    cache.write_pages("u", items)
    assert cache.close(20)
    [file] = files(root)
    newer = file.rename(file.with_suffix(".pages2"))
    cache = opened()
    assert cache.known_pages("u", keys_of(items)) == 0
    assert (cache.stats()["damaged"], cache.stats()["files"], newer.exists()) == (0, 1, True)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_or_cut_is_refused_and_counted(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    root = tmp_path_factory.mktemp("cache")
    items, options = chain("a", 5), {"fingerprint": b"m", "page_bytes": PAGE, "quota_bytes": 1 << 20}
    cache = DiskCache(root, **options)
    if kind := data.draw(st.sampled_from(["pages", "state"])) == "pages":
        cache.write_pages("u", items)
    else:
        cache.write_state("u", key("n"), 1, key("s"), 129, b"state" * 50)
    cache.close(20)
    [file] = files(root)
    raw = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << bit % 8
    else:
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))] + data.draw(st.sampled_from([b"", bytes(len(raw))]))
    file.write_bytes(raw)
    cache = DiskCache(root, **options)
    came = returns(cache, "u", items)
    ticket = cache.read("u", [], key("s"))
    assert ticket.wait(20)
    assert ticket.state is None
    assert came < (len(items) if kind else 1)
    assert cache.close(20)
    assert cache.stats()["damaged"] == 1
    assert not file.exists()


def test_a_damaged_file_that_cannot_be_removed_is_counted_once_and_stops_nobody(
    opened: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_TICK_S", 0.02)
    caches, real = [opened(), opened()], Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".pages1":
            raise OSError(errno.EROFS, "read-only file system")
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    caches[0].write_pages("u", chain("a", 2))
    assert caches[0].flush(20)
    os.truncate(files(root)[0], 500)
    caches.append(opened())  # finds it at start, the second when it has missed something of that user
    while not caches[1].stats()["damaged"]:
        assert returns(caches[1], "u", chain("a", 2)) == 0
        assert caches[1]._writer.is_alive()
    for number, cache in enumerate(caches[1:]):
        cache.write_pages("u", chain("b", 2, 2 * number))
        assert cache.flush(20)
        assert returns(cache, "u", chain("b", 2, 2 * number)) == 2
        assert (cache.stats()["damaged"], cache.stats()["error_EROFS"]) == (1, 1)


def test_intact_pages_before_the_damage_are_delivered(
    opened: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, items = opened(), chain("a", 9)
    cache.write_pages("u", items)
    assert cache.flush(20)
    [file] = files(root)
    raw = bytearray(file.read_bytes())
    raw[-3 * PAGE + 5] ^= 4
    file.write_bytes(raw)
    rows = [memoryview(bytearray(PAGE)) for _ in items]
    for into in (None, rows):
        monkeypatch.setattr(disk, "_PART_BYTES", 2 * PAGE)  # the readers of the pages behind it find them intact
        cache = opened()
        assert [bytes(page) for page in pages_of(cache.read("u", keys_of(items), into=into))] == [
            d for _, d in items[:6]
        ]
        assert cache.stats()["damaged"] == 1
        assert not file.exists()
        file.write_bytes(raw)


def test_nothing_behind_a_damaged_file_is_delivered(opened: Open, root: Path) -> None:
    cache, items = opened(), chain("a", 8)
    for at in (0, 4):
        cache.write_pages("u", items[at : at + 4], first=at)
        assert cache.flush(20)
    raw = bytearray(files(root)[0].read_bytes())
    raw[-3 * PAGE] ^= 1
    files(root)[0].write_bytes(raw)
    assert returns(cache, "u", items) == 1
    assert (cache.stats()["hits"], cache.stats()["misses"], len(files(root))) == (1, 7, 1)


def test_a_damaged_secret_makes_the_files_damaged_and_is_replaced(opened: Open, root: Path) -> None:
    cache, items = opened(), chain("a", 4)
    cache.write_pages("u", items)
    cache.write_pages("v", items)
    assert cache.close(20)
    raw = bytearray((root / "secret").read_bytes())
    raw[3] ^= 1
    (root / "secret").write_bytes(raw)
    cache = opened()
    assert cache.known_pages("u", keys_of(items)) == 0
    assert cache.stats()["damaged"] == 2
    cache.write_pages("u", items)
    assert cache.close(20)
    assert returns(opened(), "u", items) == 4


def test_a_torn_secret_is_made_again(opened: Open, root: Path) -> None:
    root.mkdir(mode=0o700)
    (root / "secret.tmp").write_bytes(b"half")
    opened()
    assert sorted(path.name for path in root.iterdir()) == ["lock", "secret"]


def test_everything_is_private(opened: Open, root: Path) -> None:
    before = os.umask(0)
    try:
        cache = opened()
        cache.write_pages("u", chain("a", 2))
        assert cache.flush(20)
    finally:
        os.umask(before)
    modes = {path.relative_to(root).parts[-1:]: stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*")}
    assert {stat.S_IMODE(root.stat().st_mode)} | {mode for name, mode in modes.items() if len(name[0]) == 32} == {0o700}
    assert {mode for name, mode in modes.items() if len(name[0]) != 32} == {0o600}


def test_an_open_directory_is_closed_or_refused(root: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir(mode=0o755)
    os.chmod(root, 0o755)
    opened()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    os.chmod(root, 0o777)
    opened()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    shared = root.parent / "shared"
    shared.mkdir()
    os.chmod(shared, 0o755)
    (shared / "thesis.txt").touch()
    with pytest.raises(CacheError, match="mode 0755 lets others in"):
        CacheDirectory(shared)
    for wrong in (shared / "thesis.txt", shared / "thesis.txt" / "cache"):
        with pytest.raises(CacheError, match="no cache directory can be had here"):
            CacheDirectory(wrong)
    empty = root.parent / "empty"
    empty.mkdir()
    os.chmod(empty, 0o755)
    for none in (shared.parent, shared, empty):
        with pytest.raises(CacheError, match="holds no prefix cache"):
            CacheDirectory(none, create=False)
    assert stat.S_IMODE(empty.stat().st_mode) == 0o755, "who only looks changes nothing"
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CacheError, match="expected uid 12345"):
        CacheDirectory(root)


def test_links_and_strangers_are_passed_over(opened: Open, root: Path) -> None:
    cache, items = opened(), chain("a", 3)
    cache.write_pages("u", items)
    assert cache.close(20)
    [file] = files(root)
    outside = root.parent / "outside"
    outside.mkdir()
    moved = outside / file.name
    os.rename(file, moved)
    file.symlink_to(moved)
    (root / ("0" * 32)).symlink_to(outside)
    (file.parent / "notes.txt").write_text("mine")
    os.mkfifo(file.with_name("f" * 32 + "." + "0" * 16 + ".pages1"))
    cache = opened(quota_bytes=10)
    assert cache.known_pages("u", keys_of(items)) == 0
    assert cache.stats()["files"] == 0
    assert cache.stats()["errors"] == 0
    assert (moved.exists(), file.is_symlink(), (file.parent / "notes.txt").exists()) == (True, True, True)


def test_least_recently_used_files_go_first(opened: Open, root: Path) -> None:
    cache = opened(quota_bytes=4 * 3224)
    chains = {name: chain(name, 3) for name in "abcdef"}
    for name in "abc":
        cache.write_pages(name, chains[name])
        assert cache.flush(20)
    assert cache.known_pages("a", keys_of(chains["a"])) == 3
    for name in "def":
        cache.write_pages(name, chains[name])
        assert cache.flush(20)
        assert sum(path.stat().st_size for path in root.glob("*/*")) <= 4 * 3224
    there = {name for name, items in chains.items() if cache.known_pages(name, keys_of(items))}
    assert there == set("adef")
    assert cache.stats()["evicted"] == 2
    cache.write_pages("a", chain("big", 20))
    assert cache.flush(20)
    assert (cache.stats()["dropped"], cache.stats()["evicted"]) == (20, 2)


def test_last_uses_outlive_the_process(opened: Open, root: Path) -> None:
    cache, chains = opened(), {name: chain(name, 3) for name in "abc"}
    for name in "abc":
        cache.write_pages(name, chains[name])
        assert cache.flush(20)
        time.sleep(0.02)  # file times are coarse
    assert returns(cache, "a", chains["a"]) == 3
    assert cache.close(20)
    cache = opened(quota_bytes=7000)
    assert [cache.known_pages(name, keys_of(items)) for name, items in chains.items()] == [3, 0, 3]
    assert cache.close(20)
    for path in files(root):  # a clock that was ahead
        os.utime(path, ns=(time.time_ns() + 10**15,) * 2)
    cache = opened(quota_bytes=7000)
    for name in "de":
        cache.write_pages(name, chain(name, 3))
        assert cache.flush(20)
    assert [cache.known_pages(name, keys_of(chain(name, 3))) for name in "abcde"] == [0, 0, 0, 3, 3]


def test_the_end_of_a_chain_goes_before_its_beginning(opened: Open) -> None:
    cache, items = opened(), chain("a", 9)
    for at in (6, 3, 0):  # the beginning was written last, but that is not its last use
        cache.write_pages("u", items[at : at + 3], first=at)
        assert cache.flush(20)
    cache.write_state("u", items[-1][0], 0, key("s"), 9 * 128, b"s" * 1000)
    assert cache.flush(20)
    ticket = cache.read("u", keys_of(items), key("s"))
    assert len(pages_of(ticket)) == 9
    assert cache.close(20)
    assert opened(quota_bytes=9999).known_pages("u", keys_of(items)) == 9
    assert opened(quota_bytes=9999).known_states("u", items[-1][0]) == []
    assert opened(quota_bytes=7000).known_pages("u", keys_of(items)) == 6


def test_one_user_s_quota_is_his_own_loss(opened: Open) -> None:
    cache = opened(user_quota_bytes=7000)
    cache.write_pages("v", chain("v", 5))
    for name in "abcd":
        cache.write_pages("u", chain(name, 3))
        assert cache.flush(20)
    assert [cache.known_pages("u", keys_of(chain(name, 3))) for name in "abcd"] == [0, 0, 3, 3]
    assert cache.known_pages("v", keys_of(chain("v", 5))) == 5


def test_a_lower_quota_of_a_user_holds_from_the_start(opened: Open) -> None:
    cache = opened()
    for name in "abc":
        cache.write_pages("u", chain(name, 3))
        cache.write_pages("v", chain(name, 1))
        assert cache.flush(20)
    assert cache.close(20)
    cache = opened(user_quota_bytes=7000)
    assert [cache.known_pages("u", keys_of(chain(name, 3))) for name in "abc"] == [0, 3, 3]
    assert [cache.known_pages("v", keys_of(chain(name, 1))) for name in "abc"] == [1, 1, 1]


def test_what_the_queue_has_no_room_for_is_dropped(opened: Open) -> None:
    cache = opened(queue_bytes=5 * PAGE)
    cache.write_pages("u", chain("a", 9))
    assert cache.flush(20)
    assert (cache.stats()["written"], cache.stats()["dropped"]) == (5, 4)
    assert cache.known_pages("u", keys_of(chain("a", 9))) == 5


def test_long_runs_are_split(opened: Open, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_RUN_BYTES", 4 * PAGE)
    monkeypatch.setattr(disk, "_PART_BYTES", 3 * PAGE)
    cache, items = opened(), chain("a", 18)
    cache.write_pages("u", items)
    assert cache.flush(20)
    assert sorted(path.stat().st_size // PAGE for path in files(root)) == [2, 4, 4, 4, 4]
    assert returns(cache, "u", items) == 18


@pytest.mark.parametrize("call", ["write", "rename", "fsync", "open"])
def test_a_failed_write_leaves_nothing_and_writing_pauses(
    call: str, opened: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, items = opened(), chain("a", 4)
    cache.write_pages("u", chain("before", 2))
    assert cache.flush(20)
    real = getattr(os, call)

    def fail(first: Any, *args: Any, **kwargs: Any) -> Any:
        if call == "open" and not str(first).endswith(".tmp"):
            return real(first, *args, **kwargs)
        if call == "write":
            real(first, args[0][: len(args[0]) // 2])
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        cache.write_pages("u", items)
        assert cache.flush(20)
    cache.write_pages("u", items)
    assert cache.flush(20)
    stats = cache.stats()
    assert (stats["errors"], stats["error_ENOSPC"], stats["dropped"], stats["written"]) == (1, 1, 8, 2)
    assert len(files(root)) == stats["files"] == 1
    assert returns(cache, "u", chain("before", 2)) == 2
    cache._paused_until = 0.0
    cache.write_pages("u", items)
    assert cache.flush(20)
    assert returns(cache, "u", items) == 4


def test_a_file_that_has_its_name_when_writing_fails_is_counted(
    opened: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, items, real = opened(), chain("a", 4), os.fsync

    def fail(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "input/output error")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        cache.write_pages("u", items)
        assert cache.flush(20)
    assert (cache.stats()["error_EIO"], cache.stats()["files"], len(files(root))) == (1, 1, 1)
    assert returns(cache, "u", items) == 4


def test_a_file_that_cannot_be_read_is_a_miss(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, items = opened(), chain("a", 4)
    cache.write_pages("u", items)
    assert cache.flush(20)

    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        assert returns(cache, "u", items) == 0
    stats = cache.stats()
    assert (stats["error_EIO"], stats["damaged"], stats["misses"], stats["files"]) == (1, 0, 4, 1)
    assert cache.known_pages("u", keys_of(items)) == 0


def test_torn_files_are_swept_unless_somebody_writes_them(opened: Open, root: Path) -> None:
    cache = opened()
    cache.write_pages("u", chain("a", 1))
    assert cache.close(20)
    torn = files(root)[0].with_suffix(".pages1.tmp")
    torn.write_bytes(b"half")
    with CacheDirectory(root).locked(1) as held:  # a writer at work
        assert held
        opened()
        assert torn.exists()
    opened()
    assert not torn.exists()


def test_two_caches_on_one_directory_see_each_other(opened: Open, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_TICK_S", 0.05)
    one, two, items = opened(quota_bytes=4000), opened(quota_bytes=4000), chain("a", 3)
    one.write_pages("u", items)
    assert one.flush(20)
    deadline = time.monotonic() + 20
    while two.known_pages("u", keys_of(items)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert returns(two, "u", items) == 3
    two.write_pages("v", chain("b", 3))  # evicts what one wrote
    assert two.flush(20)
    assert [two.stats()["evicted"], two.known_pages("u", keys_of(items))] == [1, 0]
    assert returns(one, "u", items) == 0
    stats = one.stats()
    assert (stats["errors"], stats["damaged"], stats["misses"]) == (0, 0, 3)
    one.write_pages("u", items)  # and the other way round, by what it sees under the lock
    assert one.flush(20)
    assert sum(path.stat().st_size for path in files(root)) <= 4000
    assert one.known_pages("u", keys_of(items)) == 3


def test_eviction_heeds_uses_by_other_processes(opened: Open) -> None:
    one, two, chains = opened(quota_bytes=9000), opened(), {name: chain(name, 2) for name in "abcde"}
    for name in "abc":
        one.write_pages(name, chains[name])
        assert one.flush(20)
    two.write_pages("d", chains["d"])
    assert two.flush(20)
    assert [two.known_pages(name, keys_of(chains[name])) for name in "cba"] == [2, 2, 2]
    assert two.close(20)  # writes its uses down
    one.write_pages("e", chains["e"])
    assert one.flush(20)
    assert {name for name, items in chains.items() if one.known_pages(name, keys_of(items))} == set("abce")


def test_a_cancelled_read_ends_and_delivers_no_more(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_PART_BYTES", PAGE)
    cache, items = opened(), chain("a", 50)
    cache.write_pages("u", items)
    assert cache.flush(20)
    gate, real = threading.Event(), CacheDirectory.read

    def wait(*args: Any) -> None:
        assert gate.wait(20)
        real(*args)

    monkeypatch.setattr(CacheDirectory, "read", wait)
    ticket = cache.read("u", keys_of(items))
    assert not ticket.done()
    ticket.cancel()
    gate.set()
    assert len(pages_of(ticket)) <= 4
    assert cache.stats()["damaged"] == 0


def test_after_close_nothing_is_taken_or_given(opened: Open) -> None:
    cache, items = opened(), chain("a", 3)
    cache.write_pages("u", items)
    assert cache.close(20)
    assert cache.close(20)
    cache.write_pages("u", chain("b", 3))
    ticket = cache.read("u", keys_of(items))
    assert (ticket.done(), ticket.pages, cache.stats()["dropped"]) == (True, [], 3)


def test_storm_of_threads(opened: Open) -> None:
    cache = opened(quota_bytes=60_000, user_quota_bytes=40_000)
    wrong: list[object] = []

    def storm(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(60):
                user, items = f"u{draw.randrange(3)}", chain(f"c{draw.randrange(6)}", draw.randint(1, 9))
                if draw.random() < 0.5:
                    cache.write_pages(user, items)
                else:
                    returns(cache, user, items)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=storm, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cache.flush(20)
    stats = cache.stats()
    assert (stats["damaged"], stats["errors"], stats["queued_bytes"]) == (0, 0, 0)
    assert (
        stats["bytes"] == sum(file.size for place in cache._users.values() for file in place.files.values()) <= 60_000
    )


@pytest.mark.parametrize("wrong", [0, -1, 1.5, float("nan"), True, None])
@pytest.mark.parametrize("name", ["page_bytes", "quota_bytes", "user_quota_bytes", "queue_bytes"])
def test_sizes_are_checked(name: str, wrong: Any, opened: Open, root: Path) -> None:
    if (name, wrong) == ("user_quota_bytes", None):
        return
    with pytest.raises(ConfigError, match="expected a whole number of bytes > 0"):
        opened(**{name: wrong})
    assert not root.exists()


def test_wrong_payloads_and_keys_are_errors(opened: Open) -> None:
    cache = opened()
    with pytest.raises(CacheError, match="write of 999 bytes: expected page_bytes=1000"):
        cache.write_pages("u", [(key(1), bytes(999))])
    with pytest.raises(CacheError, match="cache key of 3 bytes: expected 16"):
        cache.write_pages("u", [(b"abc", bytes(PAGE))])
    with pytest.raises(CacheError, match="write of 0 bytes"):
        cache.write_state("u", key(1), 0, key(2), 0, b"")
    assert cache.stats()["queued_bytes"] == 0


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", StatePolicy("full", 128)),
        (" periodic( 1024 ) ", StatePolicy("periodic", 1024)),
        ("periodic", StatePolicy("periodic", 1024)),
        ("zero", StatePolicy("zero")),
        ("turns", StatePolicy("turns")),
    ],
)
def test_policies(text: str, policy: StatePolicy) -> None:
    assert parse_policy(text, 128) == policy


@pytest.mark.parametrize(
    "text", ["", "Full", "periodic 256", "periodic()", "periodic(0)", "periodic(100)", "periodic(-128)"]
)
def test_wrong_policies(text: str) -> None:
    with pytest.raises(ConfigError, match=r"disk_policy='.*': expected"):
        parse_policy(text, 128)


@given(
    st.sampled_from(["full", "periodic(256)", "zero", "turns"]),
    st.integers(0, 2000),
    st.integers(0, 2000),
    st.lists(st.integers(0, 4000)),
)
def test_positions_are_what_the_policy_keeps(text: str, begin: int, length: int, cuts: list[int]) -> None:
    policy, end = parse_policy(text, 128), begin + length
    kinds = dict.fromkeys(range(begin + 1, end + 1), "interior")
    kinds |= {position: "cut" for position in cuts if begin < position <= end} | ({end: "end"} if length else {})
    kept = [position for position, kind in sorted(kinds.items()) if policy.keeps(position, kind)]
    assert policy.positions(begin, end, cuts) == kept
    expected = {"full": end // 128 - begin // 128, "periodic(256)": end // 256 - begin // 256, "zero": 0}
    assert len(kept) == expected.get(text, len({p for p in (*cuts, end) if begin < p <= end}))
