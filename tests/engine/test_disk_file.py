"""docs/cache_format.md is enough to read a file; what the header promises is checked; buffers are filled in order."""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pelagos.engine import disk_file
from pelagos.engine.disk import DiskCache
from pelagos.engine.disk_file import CacheDirectory, DamagedFile, Record

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cache_format.md"
ROW = re.compile(r"\| (\d+) \| (\d+) \| (bytes|u32|u64) \| (\w+) \|")


def fields(heading: str) -> dict[str, tuple[int, int, str]]:
    """name -> (offset, bytes, type) of the document's table under a heading."""
    section = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {name: (int(offset), int(size), kind) for offset, size, kind, name in ROW.findall(section)}


def take(raw: bytes, table: dict[str, tuple[int, int, str]], at: int = 0) -> dict[str, Any]:
    pieces = {name: (raw[at + offset : at + offset + size], kind) for name, (offset, size, kind) in table.items()}
    return {
        name: piece if kind == "bytes" else int.from_bytes(piece, "little") for name, (piece, kind) in pieces.items()
    }


def size_of(table: dict[str, tuple[int, int, str]]) -> int:
    """Bytes of a table's fields, which must lie end to end."""
    end = 0
    for offset, size, kind in table.values():
        assert offset == end
        assert kind == "bytes" or size == {"u32": 4, "u64": 8}[kind]
        end += size
    return end


def test_the_document_parses_a_file(tmp_path: Path) -> None:
    header, record = fields("Header"), fields("Table")
    pages = [(bytes([i]) * 16, os.urandom(777)) for i in range(5)]
    cache = DiskCache(tmp_path / "c", fingerprint=b"who", page_bytes=777, quota_bytes=1 << 20)
    cache.write_pages("user", pages, first=3)
    cache.write_state("user", pages[-1][0], 9, b"k" * 16, 8 * 128 + 9, b"state")
    assert cache.close(20)

    secret = (tmp_path / "c" / "secret").read_bytes()
    assert secret[32:] == hashlib.blake2b(secret[:32], digest_size=16).digest()
    secret = secret[:32]
    tag = hashlib.blake2b(b"user", key=secret, digest_size=16, person=b"user")
    identity = (3).to_bytes(8, "little") + b"who" + (3).to_bytes(8, "little") + b"777"
    model = hashlib.blake2b(identity, digest_size=16, person=b"model")
    signing = hashlib.blake2b(tag.digest(), key=secret, digest_size=32, person=b"header").digest()
    by_kind = {path.suffix: path for path in (tmp_path / "c" / tag.hexdigest()).iterdir()}
    for suffix, kind, data in ((".pages1", 1, [page for _, page in pages]), (".state1", 2, [b"state"])):
        assert re.fullmatch(model.hexdigest() + r"\.[0-9a-f]{16}\.(pages|state)1", by_kind[suffix].name)
        raw = by_kind[suffix].read_bytes()
        found = take(raw, header)
        begin = size_of(header) + found["count"] * size_of(record)
        assert found == {
            "magic": b"PELAGOSC", "version": 1, "kind": kind, "fingerprint": model.digest(), "user": tag.digest(),
            "count": len(data), "length": len(data[0]), "digest": found["digest"],
        }  # fmt: skip
        signed = raw[: header["digest"][0]] + raw[size_of(header) : begin]
        assert found["digest"] == hashlib.blake2b(signed, digest_size=16, key=signing).digest()
        assert len(raw) == begin + found["count"] * found["length"]
        for i, payload in enumerate(data):
            assert raw[begin + i * found["length"] :][: found["length"]] == payload
            crc = zlib.crc32(payload)
            each = take(raw, record, size_of(header) + i * size_of(record))
            if kind == 1:
                assert each == {"key": pages[i][0], "node": bytes(16), "position": 3 + i, "remainder": 0, "crc": crc}
            else:
                assert each == {"key": b"k" * 16, "node": pages[-1][0], "position": 1033, "remainder": 9, "crc": crc}


def test_the_numbers_in_the_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert (
        f"`{disk_file.HEADER.size + disk_file.DIGEST_BYTES} + count * ({disk_file.RECORD.size} + length)` bytes" in text
    )
    assert f"`VERSION` the format version in decimal: {disk_file.VERSION}." in text


def test_verify_reads_every_byte(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "c", fingerprint=b"who", page_bytes=50, quota_bytes=1 << 20)
    cache.write_pages("user", [(bytes([i]) * 16, bytes([i]) * 50) for i in range(3)])
    assert cache.close(20)
    directory = CacheDirectory(tmp_path / "c", create=False)
    [tag] = directory.tags()
    [listed] = directory.list_files(tag)
    assert [record.position for record in directory.read_table(tag, listed, whole=True).records] == [0, 1, 2]
    path = tmp_path / "c" / tag / listed.name
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        with pytest.raises(DamagedFile):
            directory.read_table(tag, listed, whole=True)
    directory.close()


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(0, 30), st.integers(0, 40))
def test_reading_fills_buffers_in_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], offset: int, missing: int
) -> None:
    directory = CacheDirectory(tmp_path_factory.getbasetemp() / "buffers")
    data = os.urandom(offset + sum(sizes))
    (directory.root / "data").write_bytes(data[: max(0, len(data) - missing)])
    buffers = [memoryview(bytearray(size)) for size in sizes]
    directory.read(".", "data", buffers, offset)
    directory.close()
    there = data[offset : max(offset, len(data) - missing)]
    assert b"".join(buffers) == there + bytes(sum(sizes) - len(there))


def test_a_file_is_not_opened_through_a_link(tmp_path: Path) -> None:
    directory = CacheDirectory(tmp_path / "c")
    (tmp_path / "c" / directory.tag("u")).symlink_to(tmp_path)
    (tmp_path / "c" / "link").symlink_to(tmp_path / "c" / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        directory.read(".", "link", [], 0)
    with directory.locked(1), pytest.raises(OSError, match="Not a directory"):
        directory.publish(directory.tag("u"), disk_file.STATE, bytes(16), [Record(bytes(16), bytes(16), 0, 0)], [b"x"])
    directory.close()


def test_the_lock_tells_who_was_there(tmp_path: Path) -> None:
    one, two = CacheDirectory(tmp_path / "c"), CacheDirectory(tmp_path / "c")
    for holder, other in ((one, two), (two, one)):
        with holder.locked(1) as held, other.locked(0.01) as also_held:
            assert (held, also_held) == (True, False)
            assert holder.was_alone == (holder is one)  # the first one made the secret, under the lock
        with holder.locked(1):
            assert holder.was_alone
        assert (holder.is_alone(), other.is_alone()) == (True, False)
    one.close()
    two.close()
