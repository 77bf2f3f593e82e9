"""Texts from anywhere: plain files, JSON lines and Parquet, local or by any fsspec URL."""

import glob
import gzip
import importlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pelagos.errors import DataError, MissingDependency

BATCH = 256  # documents in memory


@dataclass(frozen=True, slots=True)
class Document:
    """One text with where it came from and under what licence."""

    kind: str
    source: str
    licence: str
    text: str


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
