"""One safetensors file: its header checked entry by entry, its tensors read and written one at a time.

Parsed here and not by the safetensors library because damage has to be reported by tensor, file, expected and got,
and because a plain read never holds more than one tensor. Source: the safetensors format description.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from pelagos.errors import CheckpointError

DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit; a larger number is a damaged length
_LFS_POINTER = b"version "


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies: file, name in the file, dtype and shape as written, and its range of bytes."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def place(self) -> str:
        """How errors call this tensor."""
        return f"tensor {self.key!r} in {self.file}"


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Say of a system's error what cannot be read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: cannot be read ({error.strerror or error})") from None


def read_header(file: Path) -> list[Stored]:
    """Return the tensors of a safetensors file in the order of their bytes, after checking every entry.

    Raises CheckpointError for a truncated file, a damaged header, or a dtype the released format does not use.
    """
    with reading(file), file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == _LFS_POINTER:
            raise CheckpointError(f"{file}: a Git LFS pointer, not the weights; run `git lfs pull`")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file}: header of {length} bytes expected, file has {size} bytes; truncated or not safetensors"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: header is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header is a JSON {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    entries = sorted((_entry(file, key, value, 8 + length) for key, value in header.items()), key=lambda e: e.begin)
    position = 8 + length
    for entry in entries:
        if entry.begin != position:
            raise CheckpointError(f"{entry.place}: begins at byte {entry.begin}, expected {position}; damaged header")
        if entry.end > size:
            raise CheckpointError(
                f"{entry.place}: ends at byte {entry.end}, the file has {size} bytes; truncated, copy it again"
            )
        position = entry.end
    if position != size:
        raise CheckpointError(f"{file}: tensors end at byte {position}, the file has {size} bytes; damaged")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _entry(file: Path, key: str, value: object, origin: int) -> Stored:
    place = f"tensor {key!r} in {file}"
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{place}: header entry {value!r}, expected dtype, shape and data_offsets")
    if dtype not in DTYPES:
        raise CheckpointError(f"{place}: dtype {dtype}, expected one of {', '.join(DTYPES)}")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(f"{place}: {end - begin} bytes, expected {expected} for {dtype} {shape}")
    return Stored(file, key, dtype, tuple(shape), origin + begin, origin + end)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def read_tensor(stream: BufferedReader, stored: Stored) -> Tensor:
    """Return one tensor in its stored dtype and shape, in memory of its own; raises CheckpointError when cut short."""
    data = torch.empty(stored.end - stored.begin, dtype=torch.uint8)
    with reading(stored.place):
        stream.seek(stored.begin)
        got = stream.readinto(data.numpy().data)
    if got != data.numel():
        raise CheckpointError(f"{stored.place}: {got} bytes, expected {data.numel()}; the file changed while open")
    return data.view(DTYPES[stored.dtype]).reshape(stored.shape)


def write_shard(file: Path, tensors: Sequence[tuple[str, Tensor]]) -> int:
    """Write named CPU tensors as one safetensors file, flushed to the disk; return the bytes of tensor data."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Wide items first keeps every tensor aligned to its own width.
    ordered = sorted(tensors, key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, tensor in ordered:
        begin, position = position, position + tensor.nbytes
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, position]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
    return position
