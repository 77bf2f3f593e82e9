"""From texts to a vocabulary, token shards, held-out text and one archive to carry to the training machine.

Samples are BOS text EOS, conversations as `pelagos.chat` renders them (loss on the assistant's words and EOS only),
and a few fill-in-the-middle snippets of code. Everything is a pure function of texts and tokenizer.
Texts from anywhere are streamed, one batch of documents in memory; nano's corpus is split, and talked about, whole.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pelagos.chat import Tokenizer, train_tokenizer
from pelagos.chat.tokens import ASSISTANT, BOS, END_THINK, EOS, FIM_BEGIN, FIM_END, FIM_HOLE
from pelagos.errors import DataError
from pelagos.train.corpus import TEXT_KINDS, Duplicates, Split, is_held_out, read_corpus, split
from pelagos.train.data import NO_LOSS, SPLITS, PackedBatches, ShardWriter, read_shard, write_meta
from pelagos.train.pairs import Conversation, conversations, pairs_of, small_talk
from pelagos.train.sources import BATCH, Document, paths_of, read_documents

if TYPE_CHECKING:
    import tokenizers

# As the released splits, but a line break takes the indentation after it along (and punctuation the line break):
# 6 % fewer tokens for Python, none more for prose.
CODE_SPLITS = (
    r"\p{N}{1,3}",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+(?:\r?\n[ \t]*)*|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+",
)
# Characters of each kind the vocabulary is learnt from: the corpus has 3.5 times as much code as documents.
VOCABULARY_CHARS = {"docs": 12_000_000, "code": 18_000_000, "books": 9_000_000}
PASSAGE_CHARS = 16_384
SMALL_TALK_REPEATS = 12
FIM_ONE_IN = 4  # one snippet from every fourth Python file
FIM_CHARS = 2_400


def prepare(
    corpus: Path, directory: Path, *, tokenizer_dir: Path, learn_vocab_size: int | None = None,
    heldout_text: bool = False, archive: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Split a corpus directory and write its shards; return their `meta.json`.

    `learn_vocab_size` first learns a tokenizer into `tokenizer_dir`; `heldout_text` also writes `heldout_KIND.jsonl`;
    `archive` packs the shards as one .tar.xz. Raises DataError for a corpus or tokenizer that cannot be read.
    """
    texts = split(read_corpus(corpus))
    if learn_vocab_size is not None:
        write_tokenizer(texts, tokenizer_dir, learn_vocab_size)
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise DataError(f"{tokenizer_dir / 'tokenizer.json'}: not found; learn one with --learn-tokenizer")
    meta = write_shards(texts, tokenizer_dir, directory)
    if heldout_text:
        write_heldout_text(texts, directory)
    if archive is not None:
        files = [file for entry in meta["splits"].values() for file in entry["files"]]
        _pack(directory, ["meta.json", *files], archive)
    return meta


def write_tokenizer(texts: Split, directory: Path, vocab_size: int) -> None:
    """Learn a vocabulary from the training text; write `tokenizer.json` and a `tokenizer_config.json` as released."""
    tokenizer = train_tokenizer(_vocabulary_sample(texts.train), vocab_size, splits=CODE_SPLITS)
    config: dict[str, Any] = {"add_bos_token": False, "add_eos_token": False}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    for name, token in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", EOS)):
        config[name] = {"__type": "AddedToken", "content": token, **flags}
    config |= {
        "clean_up_tokenization_spaces": False, "model_max_length": 1048576, "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def write_shards(texts: Split, tokenizer_dir: Path, directory: Path) -> dict[str, Any]:
    """Tokenise both splits into shards (see train/data.py) and return `meta.json`.

    Raises DataError for a vocabulary too large for tokens of 15 bits.
    """
    encoder = Encoder(tokenizer_dir)
    if encoder.wide:
        raise DataError(
            f"{tokenizer_dir}: {encoder.chat.vocab_size} tokens; shards hold vocabularies of at most {NO_LOSS}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, documents in zip(SPLITS, (texts.train, texts.heldout), strict=True):
        writer = ShardWriter(directory, name)
        for document, sample in encoder.texts(documents):
            writer.add(sample, document.kind, len(document.text.encode()))
        for talk in _conversations(documents, with_small_talk=name == "train"):
            writer.add(_chat_sample(encoder.chat, talk), "chat", 0)
        for document in documents if name == "train" else ():
            if document.kind == "code" and (piece := encoder.fim(document)) is not None:
                writer.add(piece, "fim", 0)
        entries[name] = writer.close()
    provenance: dict[str, Any] = {"near_duplicates_moved": texts.moved, "licences": {}, "sources": {}}
    for kind in TEXT_KINDS:
        of_kind = [d for d in (*texts.train, *texts.heldout) if d.kind == kind]
        provenance["licences"][kind] = dict(Counter(d.licence for d in of_kind))
        provenance["sources"][kind] = sorted({d.source.split("/")[0] for d in of_kind})
    return write_meta(directory, tokenizer_dir / "tokenizer.json", entries, provenance)


def tokenise(
    sources: Sequence[tuple[str, str]], directory: Path, tokenizer_dir: Path, *, near_duplicates: bool = False,
    fim: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write the shards of (kind, pattern) sources and return `meta.json`; kinds in `fim` add fill-in-the-middle pieces.

    Raises DataError for sources or a tokenizer that cannot be read, and for a split that stays empty.
    """
    files = [(kind, path) for kind, pattern in sources for path in paths_of(pattern)]
    kinds = list(dict.fromkeys([kind for kind, _ in sources] + ["fim"] * bool(fim)))
    encoder = Encoder(tokenizer_dir)
    directory.mkdir(parents=True, exist_ok=True)
    writers = {split: ShardWriter(directory, split, kinds, wide=encoder.wide) for split in SPLITS}
    seen = Duplicates(near=near_duplicates)
    licences: dict[str, dict[str, None]] = {kind: {} for kind in kinds}
    for number, (kind, path) in enumerate(files, 1):
        fresh = itertools.chain.from_iterable(map(seen.fresh, _batched(read_documents(kind, path))))
        for document, sample in encoder.texts(fresh):
            split = "heldout" if is_held_out(document.source) else "train"
            writers[split].add(sample, kind, len(document.text.encode()))
            if kind in fim and split == "train" and (piece := encoder.fim(document)) is not None:
                writers[split].add(piece, "fim", 0)
            licences[kind][document.licence] = None
        if sys.stderr.isatty():
            print(f"\rtokenising: {number:,} of {len(files):,} files", end="", file=sys.stderr, flush=True)
    entries = {split: writer.close() for split, writer in writers.items()}
    found = {"sources": dict(sources), "licences": {k: list(v) for k, v in licences.items()}}
    found |= {"duplicates": {"exact": seen.exact, "near": seen.near if near_duplicates else None}}
    return write_meta(directory, tokenizer_dir / "tokenizer.json", entries, found, kinds=kinds, wide=encoder.wide)


def write_heldout_text(texts: Split, directory: Path) -> None:
    """Write `heldout_KIND.jsonl` ({"source", "licence", "text"} a line), what `pelagos eval bpb` scores."""
    directory.mkdir(parents=True, exist_ok=True)
    for kind in TEXT_KINDS:
        with (directory / f"heldout_{kind}.jsonl").open("w", encoding="utf-8") as file:
            for d in texts.heldout:
                if d.kind == kind:
                    row = {"source": d.source, "licence": d.licence, "text": d.text}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def report(directory: Path, row_tokens: int) -> str:
    """Return a table of a shard directory: samples, tokens, bytes and the padding of rows of `row_tokens`, by kind."""
    lines = [f"{'split':8}{'kind':7}{'samples':>9}{'tokens':>12}{'bytes':>12}{'bytes/token':>13}{'padding':>9}"]
    shards = {name: read_shard(directory, name) for name in SPLITS}
    for name, shard in shards.items():
        for kind, entry in shard.meta["splits"][name]["kinds"].items():
            if not entry["samples"]:
                continue
            rate = f"{entry['bytes'] / entry['tokens']:.3f}" if entry["bytes"] else "-"
            batches = PackedBatches(shard, batch_rows=1, row_tokens=row_tokens, repeats={kind: 1}, seed=0)
            lines.append(
                f"{name:8}{kind:7}{entry['samples']:9,}{entry['tokens']:12,}{entry['bytes']:12,}{rate:>13}"
                f"{batches.padding_frac(0):9.1%}"
            )
    meta = shards["train"].meta
    if "near_duplicates_moved" in meta:
        lines.append(f"near-duplicates moved to train: {len(meta['near_duplicates_moved'])}")
    if "duplicates" in meta:
        exact, near = meta["duplicates"]["exact"], meta["duplicates"]["near"]
        lines.append(f"duplicates dropped: {exact:,} exact, {'not sought:' if near is None else near} near")
    return "\n".join(lines)


def _vocabulary_sample(documents: Sequence[Document]) -> list[str]:
    sample = []
    for kind, wanted in VOCABULARY_CHARS.items():
        texts = [document.text for document in documents if document.kind == kind]
        passages = [text[i : i + PASSAGE_CHARS] for text in texts for i in range(0, len(text), PASSAGE_CHARS)]
        random.Random(kind).shuffle(passages)
        ends = np.cumsum([len(passage) for passage in passages])
        sample += passages[: int(np.searchsorted(ends, wanted)) + 1]
    return sample


def _conversations(documents: Iterable[Document], *, with_small_talk: bool) -> list[Conversation]:
    groups = [pairs_of(document) for document in documents]
    if with_small_talk:
        groups += [[pair] for pair in small_talk()] * SMALL_TALK_REPEATS
    return conversations(groups, random.Random(0))


def text_encoder(directory: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a directory for plain text: what spells a special token gets ordinary tokens."""
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    encoder.encode_special_tokens = True
    return encoder


class Encoder:
    """Makes samples of documents; `wide` ones have tokens of 32 bits."""

    def __init__(self, directory: Path) -> None:
        self.chat, self._plain = Tokenizer.load(str(directory)), text_encoder(directory)
        self.wide = self.chat.vocab_size > NO_LOSS
        self._dtype = np.dtype("<u4" if self.wide else "<u2")

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def texts(self, documents: Iterable[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        """Yield each document with its sample."""
        bos, eos = self.chat.id(BOS), self.chat.id(EOS)
        for batch in _batched(documents):
            for document, ids in zip(batch, self._ids([d.text for d in batch]), strict=True):
                yield document, np.array([bos, *ids, eos], dtype=self._dtype)

    def fim(self, document: Document) -> np.ndarray | None:
        """Return a fill-in-the-middle sample (n,) of a document, loss on the middle only, or None for most of them."""
        rng = random.Random(document.source)
        if rng.randrange(FIM_ONE_IN):
            return None
        bos, eos, begin, hole, end = (self.chat.id(token) for token in (BOS, EOS, FIM_BEGIN, FIM_HOLE, FIM_END))
        start = rng.randrange(max(len(document.text) - FIM_CHARS, 1))
        snippet = document.text[start : start + FIM_CHARS]
        first, last = sorted(rng.sample(range(len(snippet) + 1), 2))
        before, after, middle = self._ids([snippet[:first], snippet[last:], snippet[first:last]])
        prompt = np.array([bos, begin, *before, hole, *after, end], dtype=self._dtype)
        no_loss = self._dtype.type(1 << (8 * self._dtype.itemsize - 1))
        return np.concatenate([prompt | no_loss, np.array([*middle, eos], dtype=self._dtype)])


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    documents = iter(documents)
    while batch := list(itertools.islice(documents, BATCH)):
        yield batch


def _chat_sample(chat: Tokenizer, talk: Conversation) -> np.ndarray:
    """Return the ids of prompt and reply; loss on what follows an assistant marker and its thinking tag, up to EOS."""
    ids = list(chat.encode_chat(talk.body, generation="0731"))
    if talk.thinking is not None:
        ids += [*chat.encode(talk.thinking), chat.id(END_THINK)]
    ids += [*chat.encode(talk.answer), chat.id(EOS)]
    sample = np.array(ids, dtype=np.uint16)
    trained = np.zeros(sample.size, dtype=bool)
    ends = np.append(np.flatnonzero(sample == chat.id(EOS)), sample.size)
    for start in np.flatnonzero(sample == chat.id(ASSISTANT)) + 2:  # the token after the role opens or closes thinking
        trained[start : ends[np.searchsorted(ends, start)] + 1] = True
    sample[~trained] |= NO_LOSS
    return sample


def _pack(directory: Path, names: Iterable[str], archive: Path) -> None:
    partial = archive.with_name(archive.name + ".part")
    with tarfile.open(partial, "w:xz", preset=6) as tar:
        for name in names:
            tar.add(directory / name, arcname=f"{directory.name}/{name}")
    shutil.move(partial, archive)
