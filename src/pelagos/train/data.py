"""Token shards on disk and the packed batches training reads from them. Needs numpy only.

A shard directory holds `meta.json` and, for each split, `SPLIT.tokens` (little-endian uint16, for vocabularies over
32,768 uint32, samples end to end) and `SPLIT.index.npz` (offsets (N+1,) int64, kinds (N,) uint8, text_bytes (N,)
int32). The top bit of a token says: no loss on predicting it (a prompt). Files are checked by size and sha256; another
version or tokenizer is refused.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pelagos.errors import ConfigError, DataError

FORMAT_VERSION = 1
KINDS = ("docs", "code", "books", "chat", "fim")
SPLITS = ("train", "heldout")
NO_LOSS = 1 << 15
IGNORE = -100  # target of a position without loss
HELD_SAMPLES = 1024  # a writer holds before it writes them
ALIGN = 128  # samples start where every compressor closes a group: the least common multiple of 4 and 128


@dataclass(frozen=True, slots=True)
class Shard:
    """One split: tokens (T,) uint16 memory-mapped, offsets (N+1,) int64, kinds (N,) uint8, text_bytes (N,) int32."""

    tokens: np.ndarray
    offsets: np.ndarray
    kinds: np.ndarray
    text_bytes: np.ndarray
    meta: Mapping[str, Any]

    def of_kind(self, kind: str) -> np.ndarray:
        """Return which samples are of a kind, (N,) bool."""
        return self.kinds == self.meta["kinds"].index(kind)

    def bytes_of(self, kind: str) -> int:
        """Return the UTF-8 bytes of text behind all samples of a kind (0 for chat and fim)."""
        return int(self.text_bytes[self.of_kind(kind)].sum(dtype=np.int64))

    @property
    def no_loss(self) -> int:
        """The bit of a token that says: no loss on predicting it."""
        return 1 << (8 * self.tokens.itemsize - 1)


class Batch(NamedTuple):
    """Packed rows, all (B, S): ids int64 (0 where padded), positions int64 from 0 in each sample, segments int32
    (number of the sample in its row, -1 where padded), targets int64 (next token, IGNORE where no loss)."""

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    targets: np.ndarray


class Plan(NamedTuple):
    """Where one epoch's pieces go: row r holds pieces row_starts[r] : row_starts[r + 1]; sources index the tokens."""

    row_starts: np.ndarray
    sources: np.ndarray
    lengths: np.ndarray
    columns: np.ndarray


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hex; raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


class ShardWriter:
    """Writes one split sample by sample; tokens go to disk as they come. `wide` tokens have 32 bits, others 16."""

    def __init__(self, directory: Path, split: str, kinds: Sequence[str] = KINDS, *, wide: bool = False) -> None:
        self.dtype = np.dtype("<u4" if wide else "<u2")
        self._directory, self._split, self._kinds = directory, split, list(kinds)
        self._lengths, self._kind_ids, self._sizes = list[int](), list[int](), list[int]()
        self._held: list[bytes] = []
        self._path = directory / f"{split}.tokens"
        self._path.write_bytes(b"")

    def add(self, sample: np.ndarray, kind: str, text_bytes: int) -> None:
        """Append a sample (n,) of n >= 2 tokens, with the UTF-8 bytes of text behind it; raises DataError for less."""
        if sample.size < 2:
            raise DataError(f"{self._split}: expected samples of at least 2 tokens, got {sample.size}")
        self._held.append(sample.astype(self.dtype).tobytes())
        if len(self._held) >= HELD_SAMPLES:
            self._flush()
        self._lengths.append(sample.size)
        self._kind_ids.append(self._kinds.index(kind))
        self._sizes.append(text_bytes)

    def close(self) -> dict[str, Any]:
        """Write the index and return the split's entry for `meta.json`; raises DataError for a split of no samples."""
        self._flush()
        directory, split = self._directory, self._split
        if not self._lengths:
            raise DataError(f"{split}: no samples at all; expected some in each of {', '.join(SPLITS)}")
        lengths, sizes = np.array(self._lengths, dtype=np.int64), np.array(self._sizes, dtype=np.int64)
        kind_ids = np.array(self._kind_ids, dtype=np.uint8)
        index = {"offsets": np.append(0, np.cumsum(lengths)), "kinds": kind_ids, "text_bytes": sizes.astype(np.int32)}
        np.savez_compressed(directory / f"{split}.index.npz", **index)
        columns = {"samples": np.ones_like(sizes), "tokens": lengths, "bytes": sizes}
        summary = {
            kind: {name: int(column[kind_ids == number].sum()) for name, column in columns.items()}
            for number, kind in enumerate(self._kinds)
        }
        paths = (directory / f"{split}.tokens", directory / f"{split}.index.npz")
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
        return {"samples": len(lengths), "tokens": int(lengths.sum()), "kinds": summary, "files": files}

    def _flush(self) -> None:
        with self._path.open("ab") as file:
            file.write(b"".join(self._held))
        self._held.clear()


def write_meta(
    directory: Path, tokenizer: Path, splits: Mapping[str, Any], provenance: Mapping[str, Any], *,
    kinds: Sequence[str] = KINDS, wide: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write and return `meta.json`, the last file of shards: version, tokenizer, splits, where the texts are from."""
    meta = {
        "format": "pelagos shards", "version": FORMAT_VERSION, "tokenizer_sha256": sha256_of(tokenizer),
        "kinds": list(kinds), "token_bytes": 4 if wide else 2, "splits": dict(splits), **provenance,
    }  # fmt: skip
    (directory / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return meta


def read_shard(directory: Path, split: str, *, tokenizer: Path | None = None) -> Shard:
    """Open one split after checking version, sizes and checksums, and the tokenizer when its file is given.

    Raises DataError naming file, expected and got for anything missing, truncated, damaged or made for another
    tokenizer.
    """
    path = directory / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version, kinds, files = meta["version"], meta["kinds"], meta["splits"][split]["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: no token shards with a {split!r} split here ({error!r}); run `pelagos data`"
        ) from None
    if version != FORMAT_VERSION or not isinstance(kinds, list):
        raise DataError(f"{path}: format {version}, this build reads {FORMAT_VERSION}; run `pelagos data` again")
    if tokenizer is not None and sha256_of(tokenizer) != meta["tokenizer_sha256"]:
        raise DataError(f"{path}: shards were made with another tokenizer than {tokenizer}; run `pelagos data` again")
    for name, expected in files.items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else 0
        if size != expected["bytes"]:
            raise DataError(f"{file}: {size} bytes, expected {expected['bytes']}; copy or make it again")
        if sha256_of(file) != expected["sha256"]:
            raise DataError(f"{file}: damaged (sha256 differs from meta.json); copy or make it again")
    tokens = np.memmap(directory / f"{split}.tokens", dtype=f"<u{meta.get('token_bytes', 2)}", mode="r")
    try:
        with np.load(directory / f"{split}.index.npz", allow_pickle=False) as index:
            shard = Shard(tokens, index["offsets"], index["kinds"], index["text_bytes"], meta)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{directory / split}.index.npz: not an index of token shards: {error!r}") from None
    if shard.offsets[-1] != tokens.size or not len(shard.kinds) == len(shard.text_bytes) == len(shard.offsets) - 1:
        raise DataError(f"{directory / split}.index.npz: does not describe the {tokens.size} tokens beside it")
    return shard


class PackedBatches:
    """Endless (B, S) batches of whole samples, each starting at a multiple of ALIGN in its row.

    A sample longer than `row_tokens` is cut, elsewhere each epoch (the token after a cut stays a target), or left out
    if the shards call its kind `whole`. `repeats` says how often a kind is seen per epoch (0.5: every other one). The
    order depends on `seed`, the epoch and `repeats` alone; `state` and `restore` resume it to the row.
    """

    def __init__(self, shard: Shard, *, batch_rows: int, row_tokens: int, repeats: Mapping[str, float], seed: int):
        """Raise ConfigError for a row that is no multiple of ALIGN, an unknown kind, or a mixture without samples."""
        if row_tokens < ALIGN or row_tokens % ALIGN or batch_rows < 1:
            raise ConfigError(f"{batch_rows} rows of {row_tokens} tokens: expected >= 1 rows of a multiple of {ALIGN}")
        kinds = shard.meta["kinds"]
        if unknown := {kind for kind in repeats if kind not in kinds and repeats[kind] and kind not in KINDS}:
            raise ConfigError(f"unknown kinds {sorted(unknown)} in the mixture; known: {', '.join(kinds)}")
        self.shard, self.batch_rows, self.row_tokens, self.seed = shard, batch_rows, row_tokens, seed
        per_kind = np.array([repeats.get(kind, 0.0) for kind in kinds], dtype=np.float64)
        self._repeats = per_kind[shard.kinds]  # (N,)
        whole = np.isin(shard.kinds, [kinds.index(kind) for kind in shard.meta.get("whole", ())])
        self._repeats[whole & (np.diff(shard.offsets) - 1 > row_tokens)] = 0
        if per_kind.min() < 0 or not self._repeats.any():
            raise ConfigError(f"mixture {dict(repeats)} selects no sample: expected repeats >= 0 of kinds that exist")
        self._phase = np.random.default_rng(seed).random(self._repeats.size)  # (N,)
        self._epoch, self._cursor, self._plan = 0, 0, self.plan(0)

    @property
    def state(self) -> dict[str, int]:
        """Return {"epoch", "cursor"}: the epoch and its next row."""
        return {"epoch": self._epoch, "cursor": self._cursor}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue as the instance whose `state` this is; raises ConfigError for a row that is not in that epoch."""
        plan = self.plan(state["epoch"])
        if not 0 <= state["cursor"] <= len(plan.row_starts) - 1:
            raise ConfigError(f"data state {dict(state)}: that epoch has {len(plan.row_starts) - 1} rows")
        self._epoch, self._cursor, self._plan = state["epoch"], state["cursor"], plan

    def next(self, rows: int | None = None) -> Batch:
        """Return the next `rows` rows (default `batch_rows`), running on into the next epoch."""
        parts, missing = list[Batch](), self.batch_rows if rows is None else rows
        while missing:
            stop = min(self._cursor + missing, len(self._plan.row_starts) - 1)
            if stop > self._cursor:
                parts.append(self.rows(self._plan, self._cursor, stop))
                missing -= stop - self._cursor
                self._cursor = stop
            if missing:
                self._epoch, self._cursor = self._epoch + 1, 0
                self._plan = self.plan(self._epoch)
        return parts[0] if len(parts) == 1 else Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """Yield one epoch and stop; the last batch may have fewer rows. Leaves `state` alone."""
        plan = self.plan(epoch)
        num_rows = len(plan.row_starts) - 1
        for start in range(0, num_rows, self.batch_rows):
            yield self.rows(plan, start, min(start + self.batch_rows, num_rows))

    def plan(self, epoch: int) -> Plan:
        """Choose, cut, pack (best fit, largest first) and shuffle one epoch; a pure function of its arguments."""
        rng = np.random.default_rng((self.seed, epoch))
        seen = np.floor(epoch * self._repeats + self._phase)
        copies = (np.floor((epoch + 1) * self._repeats + self._phase) - seen).astype(np.int64)
        samples = rng.permutation(np.repeat(np.arange(copies.size), copies))
        inputs = np.diff(self.shard.offsets)[samples] - 1  # the last token of a sample is only a target
        size = self.row_tokens
        first = np.where(inputs > size, ALIGN * rng.integers(1, size // ALIGN + 1, samples.size), inputs)
        num_pieces = 1 + -(-(inputs - first) // size)
        number = np.arange(num_pieces.sum()) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        piece_first, piece_inputs = np.repeat(first, num_pieces), np.repeat(inputs, num_pieces)
        begin = np.where(number == 0, 0, piece_first + (number - 1) * size)
        lengths = np.minimum(np.where(number == 0, piece_first, size), piece_inputs - begin)
        sources = np.repeat(self.shard.offsets[samples], num_pieces) + begin
        blocks = -(-lengths // ALIGN)
        order = np.argsort(size - blocks, kind="stable")  # largest first
        rows, columns = _best_fit(blocks[order], size // ALIGN)
        num_rows = rows.max(initial=-1) + 1
        rows = rng.permutation(num_rows)[rows]
        by_row = np.argsort(rows, kind="stable")
        order = order[by_row]
        row_starts = np.searchsorted(rows[by_row], np.arange(num_rows + 1))
        return Plan(row_starts, sources[order], lengths[order], columns[by_row] * ALIGN)

    def padding_frac(self, epoch: int) -> float:
        """Return the share of an epoch's positions that hold padding."""
        plan = self.plan(epoch)
        return 1 - float(plan.lengths.sum()) / ((len(plan.row_starts) - 1) * self.row_tokens)

    def rows(self, plan: Plan, start: int, stop: int) -> Batch:
        """Build rows start:stop of a plan."""
        shape = (stop - start, self.row_tokens)
        pieces = slice(plan.row_starts[start], plan.row_starts[stop])
        lengths = plan.lengths[pieces]
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)  # position in the piece
        per_row = np.diff(plan.row_starts[start : stop + 1])
        row = np.repeat(np.arange(stop - start), per_row)
        segment = np.arange(row.size) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        to = np.repeat(row * self.row_tokens + plan.columns[pieces], lengths) + within
        source = np.repeat(plan.sources[pieces], lengths) + within
        following = self.shard.tokens[source + 1]
        batch = Batch(
            np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -1, np.int32),
            np.full(shape, IGNORE, np.int64),
        )  # fmt: skip
        no_loss = self.shard.no_loss
        batch.ids.ravel()[to] = self.shard.tokens[source] & (no_loss - 1)
        batch.positions.ravel()[to] = within
        batch.segments.ravel()[to] = np.repeat(segment, lengths)
        batch.targets.ravel()[to] = np.where(following & no_loss, IGNORE, following.astype(np.int64))
        return batch


def _best_fit(blocks: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put pieces of `blocks` (P,) into rows of `capacity`, each where it leaves least; return row and first block."""
    rows, columns = np.empty_like(blocks), np.empty_like(blocks)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by blocks left
    num_rows = 0
    for piece, size in enumerate(blocks.tolist()):
        left = next((room for room in range(size, capacity) if open_rows[room]), capacity)
        if left == capacity:
            row, num_rows = num_rows, num_rows + 1
        else:
            row = open_rows[left].pop()
        rows[piece], columns[piece] = row, capacity - left
        if left > size:
            open_rows[left - size].append(row)
    return rows, columns
