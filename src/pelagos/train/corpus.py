"""Text documents and their split into training and held-out text.

A document is held out when sha256(source) % 20 == 0; of each book the last twentieth is held out. A held-out document
that nearly repeats a training document moves to training, so held-out figures measure no recall. Only numpy.
"""

import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pelagos.errors import DataError
from pelagos.train.sources import Document, read_documents

TEXT_KINDS = ("docs", "code", "books")
HELD_OUT_ONE_IN = 20
SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
NEAR_DUPLICATE = 0.7  # estimated Jaccard similarity of two documents' word shingles
BANDS = 16  # of 8 values: two documents of similarity 0.7 share one with probability 0.61, of 0.85 with 0.99
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Split:
    """Training and held-out documents, and the sources that moved to training as near-duplicates."""

    train: list[Document]
    heldout: list[Document]
    moved: list[str]


def read_corpus(directory: Path) -> list[Document]:
    """Read `docs`, `code` and `books` `.jsonl.gz` of a directory; raises DataError naming file and line."""
    paths = {kind: directory / f"{kind}.jsonl.gz" for kind in TEXT_KINDS}
    for path in paths.values():
        if not path.is_file():
            raise DataError(f"{path}: not found; expected {', '.join(f'{k}.jsonl.gz' for k in TEXT_KINDS)}")
    return [document for kind, path in paths.items() for document in read_documents(kind, str(path))]


def is_held_out(source: str) -> bool:
    """Say whether a document (not a book) is held out: sha256 of its source, as one integer, % 20 == 0."""
    return int(hashlib.sha256(source.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def split(documents: Sequence[Document]) -> Split:
    """Split documents into training and held-out text; the same documents always give the same split."""
    train: list[Document] = []
    heldout: list[Document] = []
    whole: list[Document] = []
    for document in documents:
        if document.kind != "books":
            whole.append(document)
            continue
        cut = len(document.text) - len(document.text) // HELD_OUT_ONE_IN
        train.append(Document(document.kind, document.source, document.licence, document.text[:cut]))
        heldout.append(Document(document.kind, document.source, document.licence, document.text[cut:]))
    held = np.array([is_held_out(document.source) for document in whole], dtype=bool)
    moves = near_duplicates(minhash([document.text for document in whole]), held)
    for index, document in enumerate(whole):
        (heldout if held[index] and not moves[index] else train).append(document)
    return Split(train, heldout, [whole[i].source for i in np.flatnonzero(moves)])


def minhash(texts: Sequence[str]) -> np.ndarray:
    """Return (N, NUM_PERMUTATIONS) uint32 MinHash signatures of the texts' sets of 5-word shingles.

    A word is a run of letters, digits and underscores; a text of fewer than 5 words is one shingle.
    """
    random = np.random.default_rng(0)
    factors = random.integers(0, 1 << 63, NUM_PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = random.integers(0, 1 << 63, NUM_PERMUTATIONS, dtype=np.uint64)
    word_ids: dict[str, int] = {}
    signatures = np.full((len(texts), NUM_PERMUTATIONS), np.iinfo(np.uint32).max, dtype=np.uint32)
    for row, text in enumerate(texts):
        words = _WORD.findall(text)
        for word in words:
            if word not in word_ids:
                word_ids[word] = zlib.crc32(word.encode())
        hashes = np.fromiter(map(word_ids.__getitem__, words), dtype=np.uint64, count=len(words))
        width = min(SHINGLE_WORDS, len(words))
        shingles = np.zeros(max(len(words) - width + 1, 1), dtype=np.uint64)
        for i in range(width):
            shingles = _mix(shingles + hashes[i : i + shingles.size])
        shingles = np.unique(shingles)
        for start in range(0, shingles.size, 4096):  # a (4096, P) block stays in the cache
            values = shingles[start : start + 4096, None] * factors + offsets  # (n, P), modulo 2**64
            low = (values.min(axis=0) >> np.uint64(32)).astype(np.uint32)
            np.minimum(signatures[row], low, out=signatures[row])
    return signatures


def near_duplicates(signatures: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Return (N,) bool: held-out rows whose estimated Jaccard similarity to a training row is > NEAR_DUPLICATE.

    A row that moves counts as training for the rows left, until no row moves. signatures (N, P) uint32, held (N,) bool.
    """
    moves = np.zeros_like(held)
    fresh = ~held
    while fresh.any():
        against = signatures[fresh]
        fresh = np.zeros_like(held)
        for row in np.flatnonzero(held & ~moves):
            fresh[row] = ((against == signatures[row]).mean(axis=1) > NEAR_DUPLICATE).any()
        moves |= fresh
    return moves


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


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 values one to one (splitmix64), so that shingles of like words share no bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
