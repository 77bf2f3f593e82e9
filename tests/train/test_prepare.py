import contextlib
import gzip
import io
import json
import re
import tarfile

import numpy as np
import pytest

from pelagos import cli
from pelagos.chat import Tokenizer
from pelagos.chat.tokens import ASSISTANT, BOS, END_THINK, EOS, FIM_END, SPECIAL_TOKENS, THINK, USER
from pelagos.errors import DataError
from pelagos.train.corpus import TEXT_KINDS, is_held_out, read_corpus, split
from pelagos.train.data import KINDS, NO_LOSS, SPLITS, read_shard
from pelagos.train.prepare import prepare, write_tokenizer

NUM_TLDR = 120
PAGE = "# tool{0}\n\n> Tool number {0} does things.\n\n- Show all {0} things:\n\n`tool{0} --all`\n"
CODE = 'def f{0}(x):\n    """Return x and {0} more."""\n    y = x + {0}\n    return y\n'

TOKEN_MASK = NO_LOSS - 1


def run(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert cli.main(arguments) == 0
    return shown.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    rows = {
        "docs": [(f"tldr/p{i}.md", PAGE.format(i)) for i in range(NUM_TLDR)] + [("x", f"{USER}forged{EOS} {THINK}")],
        "code": [(f"pkg/m{i}.py", CODE.format(i) * 3) for i in range(60)],
        "books": [("book", "It was a dark and stormy night; é. " * 200)],
    }
    for kind in TEXT_KINDS:
        with gzip.open(directory / f"{kind}.jsonl.gz", "wt", encoding="utf-8") as file:
            for source, text in rows[kind]:
                file.write(json.dumps({"source": source, "licence": "MIT", "text": text}) + "\n")
    return directory


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("shards")
    arguments = [
        "data",
        str(corpus),
        str(directory / "out"),
        "--tokenizer",
        str(directory / "tok"),
        "--learn-tokenizer",
    ]
    arguments += ["--vocab-size", "420", "--heldout-text", "--archive", str(directory / "out.tar.xz")]
    run(*arguments)
    return directory


def samples_of(made, name, kind):
    shard = read_shard(made / "out", name, tokenizer=made / "tok" / "tokenizer.json")
    for i in np.flatnonzero(shard.kinds == KINDS.index(kind)):
        yield np.asarray(shard.tokens[shard.offsets[i] : shard.offsets[i + 1]])


def test_text_samples_decode_to_the_documents_and_forge_nothing(corpus, made):
    chat = Tokenizer.load(made / "tok")
    special = {chat.id(token) for token in SPECIAL_TOKENS}
    parts = split(read_corpus(corpus))
    for name, documents in (("train", parts.train), ("heldout", parts.heldout)):
        for kind in TEXT_KINDS:
            samples = list(samples_of(made, name, kind))
            texts = [d.text for d in documents if d.kind == kind]
            assert [chat.decode(sample[1:-1].tolist()) for sample in samples] == texts
            for sample in samples:
                assert (sample[0], sample[-1]) == (chat.id(BOS), chat.id(EOS))
                assert not special & set(sample[1:-1].tolist())


def test_chat_samples_train_the_assistant_only(made):
    chat = Tokenizer.load(made / "tok")
    samples = list(samples_of(made, "train", "chat"))
    assert len(samples) > NUM_TLDR
    for sample in samples:
        ids, trained = sample & TOKEN_MASK, sample < NO_LOSS
        expected, inside = [], False
        for before, now in zip([0, 0, *ids[:-2]], [0, *ids[:-1]], strict=True):
            if before == chat.id(ASSISTANT):
                assert now in (chat.id(THINK), chat.id(END_THINK))
                inside = True
            inside = inside and now != chat.id(EOS)
            expected.append(inside)
        assert trained.tolist() == expected
        assert ids[-1] == chat.id(EOS)
        assert trained[-1]


def test_fim_samples_train_the_middle_only(made):
    chat = Tokenizer.load(made / "tok")
    samples = list(samples_of(made, "train", "fim"))
    assert samples
    for sample in samples:
        end = int(np.flatnonzero((sample & TOKEN_MASK) == chat.id(FIM_END))[0])
        assert (sample[: end + 1] >= NO_LOSS).all()
        assert (sample[end + 1 :] < NO_LOSS).all()


def test_pairs_stay_on_the_side_of_their_document(made):
    chat = Tokenizer.load(made / "tok")
    for name in SPLITS:
        text = "".join(chat.decode((s & TOKEN_MASK).tolist()) for s in samples_of(made, name, "chat"))
        tools, functions = (set(re.findall(pattern, text)) for pattern in (r"tool(\d+)", r"\bf(\d+)\b"))
        assert tools
        assert functions
        assert {is_held_out(f"tldr/p{i}.md") for i in tools} == {name == "heldout"}
        assert {is_held_out(f"pkg/m{i}.py") for i in functions} == {name == "heldout"}


def test_making_shards_again_gives_the_same_files(corpus, made, tmp_path):
    meta = prepare(corpus, tmp_path, tokenizer_dir=made / "tok")
    assert meta == json.loads((made / "out" / "meta.json").read_text(encoding="utf-8"))
    write_tokenizer(split(read_corpus(corpus)), tmp_path, 420)
    assert (tmp_path / "tokenizer.json").read_bytes() == (made / "tok" / "tokenizer.json").read_bytes()


def test_archive_and_heldout_text(corpus, made, tmp_path):
    with tarfile.open(made / "out.tar.xz") as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # not in every 3.11
        tar.extractall(tmp_path)
    for name in SPLITS:
        assert read_shard(tmp_path / "out", name).meta["licences"]["code"] == {"MIT": 60}
    parts = split(read_corpus(corpus))
    for kind in TEXT_KINDS:
        lines = (made / "out" / f"heldout_{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["text"] for line in lines] == [d.text for d in parts.heldout if d.kind == kind]


def test_report_and_json(corpus, made, tmp_path):
    arguments = ["data", str(corpus), str(tmp_path), "--tokenizer", str(made / "tok")]
    table = run(*arguments)
    assert all(kind in table for kind in KINDS)
    assert json.loads(run(*arguments, "--json"))["splits"]["train"]["kinds"]["books"]["samples"] == 1


def test_tokenizer_config_loads_in_transformers(made):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(made / "tok")
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (BOS, EOS, EOS)
    assert theirs.model_max_length == 1048576
    assert theirs("a b")["input_ids"] == Tokenizer.load(made / "tok").encode("a b")


def test_bundled_tokenizer_keeps_indentation_together():
    chat = Tokenizer.load("nano")
    assert chat.vocab_size == 4096
    assert len(chat.encode("):\n        return")) == 2


def test_missing_tokenizer_is_one_clear_error(corpus, tmp_path):
    with pytest.raises(DataError, match="learn one"):
        prepare(corpus, tmp_path, tokenizer_dir=tmp_path / "none")
