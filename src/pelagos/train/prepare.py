"""From the corpus to a vocabulary, token shards, held-out text and one archive to carry to the training machine.

Samples are BOS text EOS, conversations as `pelagos.chat` renders them (loss on the assistant's words and EOS only),
and a few fill-in-the-middle snippets of code. Everything is a pure function of corpus and tokenizer.
"""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pelagos.chat import Tokenizer, train_tokenizer
from pelagos.chat.tokens import ASSISTANT, BOS, END_THINK, EOS, FIM_BEGIN, FIM_END, FIM_HOLE
from pelagos.errors import DataError
from pelagos.train.corpus import TEXT_KINDS, Document, Split, read_corpus, split
from pelagos.train.data import NO_LOSS, SPLITS, PackedBatches, ShardWriter, read_shard, write_meta
from pelagos.train.pairs import Conversation, conversations, pairs_of, small_talk

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
_BATCH = 256


def prepare(
    corpus: Path,
    directory: Path,
    *,
    tokenizer_dir: Path,
    learn_vocab_size: int | None = None,
    heldout_text: bool = False,
    archive: Path | None = None,
) -> dict[str, Any]:
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
    for name, token in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", EOS)):
        config[name] = {
            "__type": "AddedToken", "content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False,
        }  # fmt: skip
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
    chat = Tokenizer.load(str(tokenizer_dir))
    if chat.vocab_size > NO_LOSS:
        raise DataError(f"{tokenizer_dir}: {chat.vocab_size} tokens; shards hold vocabularies of at most {NO_LOSS}")
    directory.mkdir(parents=True, exist_ok=True)
    encoder, entries = text_encoder(tokenizer_dir), {}
    for name in SPLITS:
        writer = ShardWriter(directory, name)
        for sample in _samples(texts, name == "train", chat, encoder):
            writer.add(*sample)
        entries[name] = writer.close()
    provenance: dict[str, Any] = {"near_duplicates_moved": texts.moved, "licences": {}, "sources": {}}
    for kind in TEXT_KINDS:
        of_kind = [d for d in (*texts.train, *texts.heldout) if d.kind == kind]
        provenance["licences"][kind] = dict(Counter(d.licence for d in of_kind))
        provenance["sources"][kind] = sorted({d.source.split("/")[0] for d in of_kind})
    return write_meta(directory, tokenizer_dir / "tokenizer.json", entries, provenance)


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


def _samples(
    texts: Split, is_train: bool, chat: Tokenizer, encoder: tokenizers.Tokenizer
) -> Iterator[tuple[np.ndarray, str, int]]:
    """Yield (sample, kind, bytes of text) of a split: its documents, conversations, and pieces to fill in."""
    documents = texts.train if is_train else texts.heldout
    for start in range(0, len(documents), _BATCH):
        batch = documents[start : start + _BATCH]
        encodings = encoder.encode_batch_fast([d.text for d in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            sample = np.array([chat.id(BOS), *encoding.ids, chat.id(EOS)], dtype=np.uint16)
            yield sample, document.kind, len(document.text.encode())
    for talk in _conversations(documents, with_small_talk=is_train):
        yield _chat_sample(chat, talk), "chat", 0
    for document in documents if is_train else ():
        piece = fim_sample(document, encoder, chat, np.dtype("<u2")) if document.kind == "code" else None
        if piece is not None:
            yield piece, "fim", 0


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


def fim_sample(
    document: Document, tokenizer: tokenizers.Tokenizer, chat: Tokenizer, dtype: np.dtype
) -> np.ndarray | None:
    """Return one fill-in-the-middle sample (n,) of a document, loss on the middle only, or None for most documents."""
    rng = random.Random(document.source)
    if rng.randrange(FIM_ONE_IN):
        return None
    bos, eos, begin, hole, end = (chat.id(token) for token in (BOS, EOS, FIM_BEGIN, FIM_HOLE, FIM_END))
    start = rng.randrange(max(len(document.text) - FIM_CHARS, 1))
    snippet = document.text[start : start + FIM_CHARS]
    first, last = sorted(rng.sample(range(len(snippet) + 1), 2))
    parts = [e.ids for e in tokenizer.encode_batch_fast([snippet[:first], snippet[last:], snippet[first:last]])]
    prompt = np.array([bos, begin, *parts[0], hole, *parts[1], end], dtype=dtype)
    no_loss = dtype.type(1 << (8 * dtype.itemsize - 1))
    return np.concatenate([prompt | no_loss, np.array([*parts[2], eos], dtype=dtype)])


def _pack(directory: Path, names: Iterable[str], archive: Path) -> None:
    partial = archive.with_name(archive.name + ".part")
    with tarfile.open(partial, "w:xz", preset=6) as tar:
        for name in names:
            tar.add(directory / name, arcname=f"{directory.name}/{name}")
    shutil.move(partial, archive)
