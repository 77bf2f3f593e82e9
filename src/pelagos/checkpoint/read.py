"""Find and read a checkpoint: which tensors it holds in which formats, then their values, one in memory at a time.

The format of a tensor is what its dtype says, never what `config.json` promises. Source: architecture of the
released checkpoint (names, dtypes, scales) and the Base builds (float32 scales, FP8 experts).
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import BufferedReader
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from pelagos.checkpoint.names import released_name, stacked_parts
from pelagos.checkpoint.shard import DTYPES, Stored, read_header, read_tensor, reading
from pelagos.config import HUB_ID, ModelConfig, bundled_model_dir, hub_snapshot
from pelagos.errors import CheckpointError
from pelagos.numerics import FP4_GROUP, FP8_BLOCK, decode_weight

INDEX_NAME = "model.safetensors.index.json"
_FORMATS = {
    "F8_E4M3": "fp8", "I8": "fp4", "BF16": "bf16", "F16": "f16", "F32": "f32", "I64": "i64", "I32": "i64",
}  # fmt: skip
_QUANTISED = ("fp8", "fp4")
_BUNDLED_NAME = re.compile(r"\w[\w-]*")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor under its released name: the shape of its values, its format, and where it and its scale lie."""

    name: str
    shape: tuple[int, ...]
    format: str
    stored: Stored
    scale: Stored | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, scale included."""
        parts = (self.stored, self.scale) if self.scale else (self.stored,)
        return sum(part.end - part.begin for part in parts)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: headers read and checked, no values yet.

    `draft` is "mtp" (preview builds), "dspark" (GA builds) or None, told by tensor names.
    """

    path: Path
    config: ModelConfig
    draft: str | None
    tensors: dict[str, TensorInfo]

    def stream(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor, str]]:
        """Yield (name, values, format) file by file, for all tensors or the named ones; holds one tensor at a time.

        FP8 and FP4 come decoded to float32, integers as int64, the rest in the stored dtype.
        Raises CheckpointError for a name that is absent, a file that changed, NaN values, or a hash table
        (`tid2eid`) that names an expert outside the model.
        """
        wanted = list(self.tensors if names is None else names)
        absent = [name for name in wanted if name not in self.tensors]
        if absent:
            raise CheckpointError(f"{self.path}: holds no tensor {absent[0]!r} ({len(absent)} names are absent)")
        chosen = sorted((self.tensors[n] for n in set(wanted)), key=lambda t: (t.stored.file, t.stored.begin))
        for file, group in groupby(chosen, key=lambda t: t.stored.file):
            with _open(file) as stream:
                for info in group:
                    yield info.name, self._values(stream, info), info.format

    def _values(self, stream: BufferedReader, info: TensorInfo) -> Tensor:
        values = read_tensor(stream, info.stored)
        if info.scale is not None:
            same = info.scale.file == info.stored.file
            with nullcontext(stream) if same else _open(info.scale.file) as other:
                values = decode_weight(values, read_tensor(other, info.scale), info.format)
        if info.format == "i64":
            values = values.to(torch.int64)
            if info.name.endswith(".tid2eid") and values.numel():
                low, high = (int(v) for v in values.aminmax())
                if low < 0 or high >= self.config.n_routed_experts:
                    raise CheckpointError(
                        f"{info.stored.place}: expert ids {low}..{high}, "
                        f"expected 0..{self.config.n_routed_experts - 1} (n_routed_experts)"
                    )
        elif bool(values.isnan().any()):
            count = f"{int(values.isnan().sum())} of {values.numel()}"
            raise CheckpointError(f"{info.stored.place}: {count} values are NaN (weight or scale), expected none")
        return values


def resolve_model(name_or_path: str | Path) -> Path:
    """Return the checkpoint directory of a bundled name, a directory or a hub id, looked up in that order.

    A hub id `org/name` is found in the local hub cache at the revision of `refs/main`; nothing is downloaded.
    Raises CheckpointError listing what was tried and the bundled names.
    """
    text = str(name_or_path)
    tried: list[str] = []
    try:
        for place, told in _places(text):
            if isinstance(place, Path) and (place / "config.json").is_file():
                return place
            tried.append(told)
    except (OSError, ValueError, RuntimeError) as error:  # a path the system refuses: too long, no such home
        tried.append(f"path ({error})"[:200])
    names = sorted(file.parent.name for file in bundled_model_dir("any").parent.glob("*/config.json"))
    raise CheckpointError(
        f"model {text[:200]!r}: not found; tried {'; '.join(tried)}. Bundled models: {', '.join(names) or 'none'}"
    )


def _places(text: str) -> Iterator[tuple[Path | str, str]]:
    """Yield each place to look at, and what to tell of it where there is no model."""
    if _BUNDLED_NAME.fullmatch(text):
        yield bundled_model_dir(text), f"bundled model {bundled_model_dir(text)}"
    directory = Path(text).expanduser()
    reason = "has no config.json" if directory.is_dir() else "is a file" if directory.exists() else "not there"
    yield directory, f"directory {directory} ({reason})"
    if HUB_ID.fullmatch(text):
        snapshot = hub_snapshot(text)
        yield snapshot, f"hub cache {snapshot}"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint directory: read `config.json`, the index if there is one, and every file's header.

    Accepts the released names and those `transformers` writes. Raises CheckpointError (or ConfigError for
    `config.json`) naming tensor, file, expected and got.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a directory; a checkpoint is one with config.json and *.safetensors")
    config = ModelConfig.load(path)
    stored: dict[str, Stored] = {}
    for entry in _entries(path):
        for name, part in _released(entry):
            if name in stored:
                raise CheckpointError(f"{part.place}: {name!r} is also {stored[name].place}; expected it once")
            stored[name] = part
    tensors = _pair_scales(stored)
    draft = None
    if any(name.startswith("mtp.") for name in tensors):
        kinds = {"mtp.0.e_proj.weight": "mtp", "mtp.0.main_proj.weight": "dspark"}
        found = [kind for name, kind in kinds.items() if name in tensors]
        if len(found) != 1:
            raise CheckpointError(f"{path}: draft tensors mtp.* with {len(found)} of {', '.join(kinds)}, expected one")
        draft = found[0]
    return Checkpoint(path, config, draft, tensors)


def _open(file: Path) -> BufferedReader:
    with reading(file):
        return file.open("rb")


def _entries(path: Path) -> Iterator[Stored]:
    """Yield every stored tensor of the directory; files and names must be those of the index where there is one."""
    index = path / INDEX_NAME
    if not index.exists():
        for file in _files_without_index(path):
            yield from read_header(file)
        return
    weight_map = _weight_map(index)
    absent = dict(weight_map)
    for shard in sorted(set(weight_map.values())):
        file = path / shard
        if not file.is_file():
            names = sorted(name for name, where in weight_map.items() if where == shard)
            raise CheckpointError(f"{file}: missing; {INDEX_NAME} puts {len(names)} tensors there ({names[0]!r} first)")
        for entry in read_header(file):
            if absent.pop(entry.key, None) != shard:
                said = weight_map.get(entry.key, "no file at all")
                raise CheckpointError(f"{entry.place}: expected only tensors of this file, {INDEX_NAME} says {said}")
            yield entry
    for name, shard in absent.items():
        raise CheckpointError(
            f"tensor {name!r}: {INDEX_NAME} puts it in {path / shard}, "
            f"the file has no such tensor ({len(absent)} absent in all)"
        )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        raw = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not readable as JSON ({error})") from None
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map, expected an object from tensor name to file name")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: tensor {name!r} is in {shard!r}, expected a .safetensors file beside it")
    return weight_map


def _files_without_index(path: Path) -> list[Path]:
    single = path / "model.safetensors"
    files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: no *.safetensors and no {INDEX_NAME}; expected the weights here")
    for file in files:
        numbered = re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", file.name)
        if numbered:
            stem, digits, total = numbered.groups()
            for i in range(1, int(total) + 1):
                sibling = path / f"{stem}-{i:0{len(digits)}d}-of-{total}.safetensors"
                if not sibling.is_file():
                    raise CheckpointError(f"{sibling}: missing; {file.name} says there are {int(total)} files")
    return files


def _released(entry: Stored) -> Iterator[tuple[str, Stored]]:
    """Yield what a stored tensor is under the released names: itself, or one part per matrix of stacked experts."""
    name = released_name(entry.key)
    stacked = stacked_parts(name)
    if stacked is None:
        yield name, entry
        return
    prefix, parts = stacked
    if len(entry.shape) != 3 or entry.shape[1] % len(parts):
        raise CheckpointError(f"{entry.place}: shape {list(entry.shape)}, expected [experts, rows, columns]")
    experts, rows, columns = entry.shape
    rows //= len(parts)
    size = rows * columns * DTYPES[entry.dtype].itemsize
    for i in range(experts * len(parts)):
        begin = entry.begin + i * size
        part = replace(entry, shape=(rows, columns), begin=begin, end=begin + size)
        yield f"{prefix}.{i // len(parts)}.{parts[i % len(parts)]}.weight", part


def _pair_scales(stored: dict[str, Stored]) -> dict[str, TensorInfo]:
    """Join quantised weights with their `.scale`; a `.scale` without a quantised partner stays a tensor."""
    tensors: dict[str, TensorInfo] = {}
    scales: set[str] = set()
    for name, entry in stored.items():
        if _FORMATS.get(entry.dtype) not in _QUANTISED:
            continue
        scale_name = name.removesuffix("weight") + "scale"
        scale = stored.get(scale_name)
        if not name.endswith(".weight") or scale is None:
            raise CheckpointError(f"{entry.place}: {entry.dtype} needs its scale {scale_name!r}, which is missing")
        tensors[name] = _quantised(name, entry, scale)
        scales.add(scale_name)
    for name, entry in stored.items():
        if name in tensors or name in scales:
            continue
        if entry.dtype == "F8_E8M0":
            raise CheckpointError(f"{entry.place}: F8_E8M0 is for scales, but there is no FP8 or FP4 weight beside it")
        tensors[name] = TensorInfo(name, entry.shape, _FORMATS[entry.dtype], entry)
    return {name: tensors[name] for name in stored if name in tensors}


def _quantised(name: str, entry: Stored, scale: Stored) -> TensorInfo:
    kind = _FORMATS[entry.dtype]
    packed = 2 if kind == "fp4" else 1  # values a byte
    if len(entry.shape) != 2 or (kind == "fp4" and entry.shape[1] * packed % FP4_GROUP):
        raise CheckpointError(
            f"{entry.place}: {entry.dtype} {list(entry.shape)}, expected a matrix"
            + (f" with a multiple of {FP4_GROUP // packed} bytes a row" if kind == "fp4" else "")
        )
    shape = (entry.shape[0], entry.shape[1] * packed)
    block = FP8_BLOCK if kind == "fp8" else (1, FP4_GROUP)
    expected = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    if scale.dtype not in ("F8_E8M0", "F32") or scale.shape != expected:
        raise CheckpointError(
            f"{scale.place}: {scale.dtype} {list(scale.shape)}, expected F8_E8M0 or F32 {list(expected)} "
            f"for {entry.dtype} {list(entry.shape)}"
        )
    return TensorInfo(name, shape, kind, entry, scale)
