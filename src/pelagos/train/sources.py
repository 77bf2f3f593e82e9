"""Texts from anywhere, streamed into token shards: plain files, JSON lines and Parquet, local or by any fsspec URL.

One batch of documents in memory. Exact duplicates are dropped by hash, near ones, when asked, by MinHash in bands.
"""

import glob
import gzip
import hashlib
import importlib
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pelagos.chat import Tokenizer
from pelagos.chat.tokens import BOS, EOS
from pelagos.errors import DataError, MissingDependency
from pelagos.train.corpus import NUM_PERMUTATIONS, Document, is_held_out, minhash
from pelagos.train.data import NO_LOSS, SPLITS, ShardWriter, write_meta
from pelagos.train.prepare import fim_sample, text_encoder

BATCH = 256
BANDS = 16  # of 8 values: two documents of similarity 0.7 share one with probability 0.61, of 0.85 with 0.99


def paths_of(pattern: str) -> list[str]:
    """Return the files a path, a directory, a glob or an fsspec URL stands for, sorted; raises DataError for none."""
    if "://" in pattern:
        found = [f"{pattern.partition('://')[0]}://{p}" for p in _fsspec().core.url_to_fs(pattern)[0].glob(pattern)]
    elif Path(pattern).is_dir():
        found = [str(p) for p in Path(pattern).rglob("*") if p.is_file()]
    else:
        found = glob.glob(pattern, recursive=True)
    if not found:
        raise DataError(f"{pattern}: no such file; expected a path, a directory, a glob or a URL that fsspec knows")
    return sorted(found)


def read_documents(kind: str, path: str, *, empty: bool = True) -> Iterator[Document]:
    """Yield the documents of one file: a row of .jsonl or .parquet with a `text`, any other file whole; .gz is undone.

    Empty texts are passed over, without `empty` refused. Raises DataError naming file and line, MissingDependency for
    Parquet without pyarrow or URLs without fsspec.
    """
    place = path
    try:
        with _opened(path) as raw:
            for number, found in enumerate(_rows(raw, path), 1):
                place, given = found
                row = json.loads(given) if isinstance(given, bytes) else given
                text = row["text"]
                if not isinstance(text, str):
                    raise TypeError(f"text is {text!r:.40}")
                if not text and not empty:
                    raise ValueError("it is empty")
                text.encode("utf-8")
                source = str(row.get("source") or f"{Path(path).name}:{number}")
                licence = str(row.get("licence") or row.get("license") or "unknown")
                if text:
                    yield Document(kind, source, licence, text)
    except UnicodeDecodeError as error:
        said = f"not UTF-8 (byte {error.start}: {error.reason})"
        raise DataError(f"{place}: {said}; expected UTF-8 text, .jsonl or .parquet") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{place}: expected an object with a string `text` ({error!r:.120})") from None


class Duplicates:
    """What has been seen: `exact` and `near` count the documents that `fresh` turned away."""

    def __init__(self, *, near: bool) -> None:
        self.exact = self.near = 0
        self._hashes: set[bytes] = set()
        self._bands: set[bytes] | None = set() if near else None

    def fresh(self, documents: Sequence[Document]) -> list[Document]:
        """Return the documents that repeat none before them."""
        kept = []
        for document in documents:
            key = hashlib.blake2b(document.text.strip().encode(), digest_size=12).digest()
            if key in self._hashes:
                self.exact += 1
            else:
                self._hashes.add(key)
                kept.append(document)
        if self._bands is None or not kept:
            return kept
        signatures = minhash([d.text for d in kept]).reshape(len(kept), BANDS, NUM_PERMUTATIONS // BANDS)
        unlike = []
        for document, bands in zip(kept, signatures, strict=True):
            keys = [hashlib.blake2b(bytes((i,)) + b.tobytes(), digest_size=12).digest() for i, b in enumerate(bands)]
            if self._bands.isdisjoint(keys):
                unlike.append(document)
            else:
                self.near += 1
            self._bands.update(keys)
        return unlike


def tokenise(
    sources: Sequence[tuple[str, str]],
    directory: Path,
    tokenizer_dir: Path,
    *,
    near_duplicates: bool = False,
    fim: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the shards of (kind, pattern) sources and return `meta.json`; kinds in `fim` add fill-in-the-middle pieces.

    Raises DataError for sources or a tokenizer that cannot be read, and for a split that stays empty.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    files = [(kind, path) for kind, pattern in sources for path in paths_of(pattern)]
    kinds = list(dict.fromkeys([kind for kind, _ in sources] + ["fim"] * bool(fim)))
    chat = Tokenizer.load(str(tokenizer_dir))
    encoder = text_encoder(tokenizer_dir)
    directory.mkdir(parents=True, exist_ok=True)
    wide = chat.vocab_size > NO_LOSS
    writers = {split: ShardWriter(directory, split, kinds, wide=wide) for split in SPLITS}
    seen = Duplicates(near=near_duplicates)
    licences: dict[str, dict[str, None]] = {kind: {} for kind in kinds}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} files"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("tokenising", total=len(files))
        for kind, path in files:
            for batch in _batched(read_documents(kind, path)):
                fresh = seen.fresh(batch)
                encoded = encoder.encode_batch_fast([d.text for d in fresh], add_special_tokens=False)
                for document, encoding in zip(fresh, encoded, strict=True):
                    held = is_held_out(document.source)
                    writer = writers["heldout" if held else "train"]
                    sample = np.array([chat.id(BOS), *encoding.ids, chat.id(EOS)], dtype=writer.dtype)
                    writer.add(sample, kind, len(document.text.encode()))
                    piece = fim_sample(document, encoder, chat, writer.dtype) if kind in fim and not held else None
                    if piece is not None:
                        writer.add(piece, "fim", 0)
                    licences[kind][document.licence] = None
            progress.advance(task)
    entries = {split: writer.close() for split, writer in writers.items()}
    found = {"sources": dict(sources), "licences": {k: list(v) for k, v in licences.items()}}
    found |= {"duplicates": {"exact": seen.exact, "near": seen.near if near_duplicates else None}}
    return write_meta(directory, tokenizer_dir / "tokenizer.json", entries, found, kinds=kinds, wide=wide)


def _batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(documents, BATCH)):
        yield batch


def _fsspec() -> Any:
    try:
        import fsspec
    except ModuleNotFoundError:
        raise MissingDependency("URLs need fsspec; `pip install fsspec` and the package of the scheme") from None
    return fsspec


def _opened(path: str) -> Any:
    if "://" in path:
        return _fsspec().open(path, "rb", compression="infer")
    return gzip.open(path, "rb") if path.endswith(".gz") else Path(path).open("rb")


def _rows(raw: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of a file; a row of JSON as its bytes, and a file that holds no rows as one."""
    name = path.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(_parquet_rows(raw, path), 1))
    elif name.endswith((".jsonl", ".ndjson")):
        yield from ((f"{path}: line {number}", line) for number, line in enumerate(raw, 1) if line.strip())
    else:
        yield path, {"text": raw.read().decode()}


def _parquet_rows(raw: Any, path: str) -> Iterator[Any]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        broken = importlib.import_module("pyarrow").lib.ArrowException
    except ModuleNotFoundError:
        raise MissingDependency(f"{path}: Parquet needs pyarrow; `pip install pyarrow`") from None
    try:
        table = parquet.ParquetFile(raw)
        wanted = [name for name in ("text", "source", "licence", "license") if name in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=BATCH, columns=wanted):
            yield from batch.to_pylist()
    except (broken, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from None
