"""Write a checkpoint in the released format: numbered shards, an index, `config.json`; all of it or nothing.

A write fills a directory beside the target and then takes its place, so a full disk or a kill leaves the old
checkpoint whole. Source: released index layout (`metadata.total_size`, `weight_map`).
"""

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pelagos.checkpoint.read import INDEX_NAME
from pelagos.checkpoint.shard import write_shard
from pelagos.config import ModelConfig
from pelagos.errors import CheckpointError
from pelagos.numerics import FP8_BLOCK, encode_weight

SHARD_BYTES = 4 * 2**30
_PLAIN = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "i64": torch.int64}
FORMATS = ("fp8", "fp4", *_PLAIN)
_QUANTIZATION = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(FP8_BLOCK),
    "scale_fmt": "ue8m0",
}  # fmt: skip
_SHARD_NAME = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_ENTRY_BYTES = 128  # bound on a header entry besides its name, so that shard_bytes bounds the whole file
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_checkpoint(
    path: str | Path, tensors: Iterable[tuple[str, Tensor, str]], config: ModelConfig, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write (released name, values, format) triples as a checkpoint directory, replacing one that is there.

    `format` is fp8, fp4, bf16, f16, f32 or i64; fp8 and fp4 take float values and add the `.scale`. No file is larger
    than `shard_bytes` unless one tensor alone is; one shard is in memory at a time. Other files of a replaced
    directory (tokenizer, README) stay. Raises CheckpointError for a value the format cannot hold or a failed write;
    the old directory is then untouched.
    """
    if shard_bytes <= 0:
        raise CheckpointError(f"shard_bytes={shard_bytes}: expected a number of bytes > 0")
    target = Path(path).resolve()
    try:
        with _replacing(target) as work:
            formats = _write_files(work, tensors, config, shard_bytes)
            _write_json(work / "config.json", _config_json(config, formats))
    except OSError as error:
        raise CheckpointError(f"{target}: not written, nothing was replaced ({error.strerror or error})") from error


def _write_files(
    work: Path, tensors: Iterable[tuple[str, Tensor, str]], config: ModelConfig, shard_bytes: int
) -> set[tuple[str, str]]:
    """Write shards and index; return each (format, "experts" or "rest") that occurred."""
    shards: list[list[str]] = []
    pending: list[tuple[str, Tensor]] = []
    pending_bytes = total_bytes = 0
    seen: set[str] = set()
    formats: set[tuple[str, str]] = set()

    def flush() -> None:
        nonlocal pending_bytes, total_bytes
        shards.append([name for name, _ in pending])
        total_bytes += write_shard(work / f"{len(shards)}.part", pending)
        pending.clear()
        pending_bytes = 0

    for name, values, format in tensors:
        if name in seen:
            raise CheckpointError(f"tensor {name!r} is given twice, expected once")
        seen.add(name)
        formats.add((format, "experts" if ".ffn.experts." in name else "rest"))
        encoded = _encode(name, values, format)
        size = sum(tensor.nbytes + len(key.encode()) + _ENTRY_BYTES for key, tensor in encoded)
        if pending and pending_bytes + size > shard_bytes:
            flush()
        pending.extend(encoded)
        pending_bytes += size
    if pending:
        flush()
    if not shards:
        raise CheckpointError(f"{work}: no tensors given, expected at least one")
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (work / f"{i}.part").rename(work / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(work / INDEX_NAME, index)
    return formats


def _encode(name: str, values: Tensor, format: str) -> list[tuple[str, Tensor]]:
    values = values.detach()
    if format not in FORMATS:
        raise CheckpointError(f"tensor {name!r}: format {format!r}, expected one of {', '.join(FORMATS)}")
    if (format == "i64") == values.is_floating_point():
        raise CheckpointError(f"tensor {name!r}: {values.dtype} values, which format {format} cannot hold")
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise CheckpointError(f"tensor {name!r}: NaN or infinite values, expected finite ones; not written")
    if format in _PLAIN:
        plain = values.to(_PLAIN[format])
        if plain.is_floating_point() and not bool(plain.isfinite().all()):
            largest = float(values.abs().max())
            raise CheckpointError(f"tensor {name!r}: a value of {largest:g} is too large for {format}")
        return [(name, plain.cpu())]
    if values.ndim != 2 or not name.endswith(".weight"):
        raise CheckpointError(f"tensor {name!r} {list(values.shape)}: {format} is for matrices named *.weight")
    try:
        codes, scale = encode_weight(values, format)
    except CheckpointError as error:
        raise CheckpointError(f"tensor {name!r} {list(values.shape)}: {error}") from None
    return [(name, codes.cpu()), (name.removesuffix("weight") + "scale", scale.cpu())]


def _config_json(config: ModelConfig, formats: set[tuple[str, str]]) -> dict[str, Any]:
    result = config.to_dict()
    kinds = {format for format, _ in formats}
    result["torch_dtype"] = "float32" if kinds <= {"f32", "i64"} else "bfloat16"
    result.pop("quantization_config", None)
    if kinds & {"fp8", "fp4"}:
        result["quantization_config"] = _QUANTIZATION
        result["expert_dtype"] = "fp4" if ("fp4", "experts") in formats else "fp8"
    # transformers knows no compress_ratios besides 0, 4 and 128; it reads other ratios from these two keys.
    heavy = {ratio for ratio in config.layer_ratios if ratio not in (0, 4)}
    if len(heavy) == 1 and heavy != {128}:
        names = {0: "sliding_attention", 4: "compressed_sparse_attention"}
        result["layer_types"] = [names.get(ratio, "heavily_compressed_attention") for ratio in config.layer_ratios]
        result["compress_rates"] = {"compressed_sparse_attention": 4, "heavily_compressed_attention": heavy.pop()}
    return result


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Give a directory to fill; when the block ends well it becomes `target`, otherwise it goes away."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file, expected a directory or a new path")
    if Path.cwd().is_relative_to(target):
        raise CheckpointError(f"{target}: holds the working directory, which cannot be replaced; write to another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    work.mkdir()
    try:
        yield work
        if target.exists():
            _carry_over(target, work)
        _sync_directory(work)
        if target.exists():
            _exchange(work, target)
        else:
            work.rename(target)
        _sync_directory(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _carry_over(old: Path, new: Path) -> None:
    """Bring everything that is not part of the old checkpoint into the new directory, by hard link where possible."""

    def is_checkpoint(directory: str, names: list[str]) -> set[str]:
        if Path(directory) != old:
            return set()
        return {name for name in names if name in ("config.json", INDEX_NAME) or _SHARD_NAME.fullmatch(name)}

    shutil.copytree(old, new, ignore=is_checkpoint, copy_function=_link_or_copy, symlinks=True, dirs_exist_ok=True)


def _link_or_copy(source: str, destination: str) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _exchange(work: Path, target: Path) -> None:
    """Swap two directories: in one step on Linux, elsewhere in two renames, the first undone when the second fails."""
    if sys.platform == "linux":
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is not None:
            paths = os.fsencode(work), os.fsencode(target)
            if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
                return
            code = ctypes.get_errno()
            if code not in (errno.EINVAL, errno.ENOSYS):  # those two: this file system cannot exchange
                raise OSError(code, os.strerror(code))
    aside = work.with_suffix(".old")
    target.rename(aside)
    try:
        work.rename(target)
    except OSError:
        aside.rename(target)
        raise
    aside.rename(work)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
