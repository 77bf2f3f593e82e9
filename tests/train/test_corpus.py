import gzip
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelagos.errors import DataError
from pelagos.train.corpus import TEXT_KINDS, is_held_out, minhash, near_duplicates, read_corpus, split
from pelagos.train.sources import Document

WORDS = [f"w{i}" for i in range(2000)]
HELD = [name for name in (f"s{i}" for i in range(400)) if is_held_out(name)]
KEPT = [name for name in (f"s{i}" for i in range(400)) if not is_held_out(name)]


def text_of(seed: int, changed: int = 0) -> str:
    words = list(np.random.default_rng(seed).choice(WORDS, 400))
    for i in range(changed):
        words[i * 7 % 400] = f"x{i}"
    return " ".join(words)


def document(source: str, text: str, kind: str = "docs") -> Document:
    return Document(kind, source, "MIT", text)


def test_hash_rule_is_the_whole_digest_modulo_20():
    assert len(HELD) > 5
    for source in HELD + KEPT:
        assert is_held_out(source) == (int.from_bytes(hashlib.sha256(source.encode()).digest(), "big") % 20 == 0)


def test_near_duplicates_of_training_text_move_to_training():
    documents = [
        document(KEPT[0], text_of(1)),
        document(HELD[0], text_of(1, changed=5)),  # Jaccard about (396 - 25) / (396 + 25)
        document(HELD[1], text_of(1, changed=60)),  # far below 0.7
        document(HELD[2], text_of(2)),
    ]
    parts = split(documents)
    assert parts.moved == [HELD[0]]
    assert [d.source for d in parts.heldout] == [HELD[1], HELD[2]]
    assert [d.source for d in parts.train] == [KEPT[0], HELD[0]]


def test_duplicates_of_moved_documents_move_too():
    texts = [text_of(3), text_of(3, changed=12), text_of(3, changed=24)]
    signatures = minhash(texts)
    assert (signatures[0] == signatures[2]).mean() < 0.7
    assert near_duplicates(signatures, np.array([False, True, True])).tolist() == [False, True, True]
    assert near_duplicates(signatures[[0, 2]], np.array([False, True])).tolist() == [False, False]


@pytest.mark.parametrize("changed", [0, 10, 40])
def test_minhash_estimates_jaccard_of_five_word_shingles(changed):
    a, b = text_of(5), text_of(5, changed)
    shingles = [{tuple(t.split()[i : i + 5]) for i in range(396)} for t in (a, b)]
    exact = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    signatures = minhash([a, b])
    assert abs((signatures[0] == signatures[1]).mean() - exact) < 0.15
    assert changed or exact == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_minhash_takes_any_text_and_depends_on_nothing_else(texts):
    together = minhash(texts)
    assert together.dtype == np.uint32
    for row, text in zip(together, texts, strict=True):
        assert (minhash([text])[0] == row).all()


def test_books_lose_their_last_twentieth():
    parts = split([document(HELD[0], "".join(map(chr, range(1000, 2010))), "books")])
    assert len(parts.heldout[0].text) == 50
    assert parts.train[0].text + parts.heldout[0].text == "".join(map(chr, range(1000, 2010)))


def write_corpus(directory, rows):
    for kind in TEXT_KINDS:
        with gzip.open(directory / f"{kind}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(row + "\n" for row in rows)


def test_reads_what_was_written(tmp_path):
    write_corpus(tmp_path, [json.dumps({"source": "a", "licence": "MIT", "text": "é\u2028"})])
    assert read_corpus(tmp_path) == [Document(kind, "a", "MIT", "é\u2028") for kind in TEXT_KINDS]


@pytest.mark.parametrize("row", ["{", "[1]", "3", '{"source": "a"}'])
def test_bad_rows_name_file_and_line(tmp_path, row):
    write_corpus(tmp_path, [json.dumps({"source": "a", "licence": "MIT", "text": "t"}), row])
    with pytest.raises(DataError, match=r"docs.jsonl.gz: line 2"):
        read_corpus(tmp_path)


def test_truncated_and_missing_files_are_refused(tmp_path):
    write_corpus(tmp_path, [json.dumps({"source": "a", "licence": "MIT", "text": text_of(1)})])
    path = tmp_path / "code.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"code\.jsonl\.gz"):
        read_corpus(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="not found"):
        read_corpus(tmp_path)
