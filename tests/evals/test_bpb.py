"""Bits per byte: the code length itself, what a document is, what a bad file is told, and the command."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.small_tokens import TEXTS, config_for

from pelagos import cli
from pelagos.chat import Tokenizer, train_tokenizer
from pelagos.chat.tokens import BOS, EOS, SPECIAL_TOKENS
from pelagos.errors import ConfigError, DataError
from pelagos.evals.bpb import bits_per_byte, read_documents, score_documents
from pelagos.load import save_model
from pelagos.model import Transformer

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (3, 40, 44, 41, 150, 7, 900)  # of documents, in characters: alone, together, and over several forwards
DOCUMENTS = [(" ".join(TEXTS) * 40)[17 * i : 17 * i + size] for i, size in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evals") / "small"
    full = train_tokenizer(TEXTS, len(SPECIAL_TOKENS) + 256 + 60)
    torch.manual_seed(0)
    model = Transformer(config_for(Tokenizer(full)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    save_model(model, path)
    full.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def loaded(directory: Path) -> tuple[Transformer, Tokenizer]:
    from pelagos.load import load_model

    return load_model(directory), Tokenizer.load(directory)


def nats_by_hand(model: Transformer, tokenizer: Tokenizer, text: str, context: int | None = None) -> float:
    """-log p of the text and its end, each piece of `context` tokens in one forward without a cache."""
    ids = [tokenizer.id(BOS), *tokenizer.encode(text), tokenizer.id(EOS)]
    total, size = 0.0, context or len(ids)
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, size):
            inputs = ids[start : min(start + size, len(ids) - 1)]
            logprobs = model(torch.tensor([inputs]))[0].double().log_softmax(-1)
            following = torch.tensor(ids[start + 1 : start + 1 + len(inputs)])
            total -= float(logprobs.gather(1, following[:, None]).sum())
    return total


@pytest.mark.parametrize("context", [None, 33, 512])
def test_batches_and_chunks_code_what_each_document_costs_alone(
    loaded: tuple[Transformer, Tokenizer], context: int | None
) -> None:
    model, tokenizer = loaded
    parts = list(score_documents(model, tokenizer, DOCUMENTS, context=context))
    expected = sum(nats_by_hand(model, tokenizer, text, context) for text in DOCUMENTS)
    assert sum(part.nats for part in parts) == pytest.approx(expected, rel=1e-6)
    assert 1 < len(parts) < len(DOCUMENTS)  # some shared a batch, some did not
    assert sum(part.documents for part in parts) == len(DOCUMENTS)
    assert sum(part.bytes for part in parts) == sum(len(text.encode()) for text in DOCUMENTS)
    assert sum(part.tokens for part in parts) == sum(len(tokenizer.encode(text)) + 1 for text in DOCUMENTS)


def test_report_of_the_command(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "lines.jsonl.gz"
    lines.write_bytes(gzip.compress("\n\n".join(json.dumps({"text": text}) for text in DOCUMENTS).encode()))
    plain = tmp_path / "plain.md"
    plain.write_text(f"d\u00e9j\u00e0 vu\r\n{EOS}", encoding="utf-8", newline="")
    assert cli.main(["eval", "bpb", "--model", str(directory), "--json", str(lines), str(plain)]) == 0
    report = json.loads(capsys.readouterr().out)
    first, second = report["files"]
    assert (first["documents"], second["documents"], report["documents"]) == (len(DOCUMENTS), 1, len(DOCUMENTS) + 1)
    assert (second["bytes"], report["bytes"]) == (plain.stat().st_size, first["bytes"] + second["bytes"])
    model, tokenizer = directory, Tokenizer.load(directory)
    assert second["tokens"] == len(tokenizer.encode(plain.read_bytes().decode())) + 1  # the spelled EOS is mere text
    weighted = (first["bits_per_byte"] * first["bytes"] + second["bits_per_byte"] * second["bytes"]) / report["bytes"]
    assert report["bits_per_byte"] == pytest.approx(weighted)
    assert (report["mode"], report["context"], report["model"]) == ("reference", None, str(model))
    assert cli.main(["eval", "bpb", "--model", str(directory), str(plain)]) == 0
    assert f"{second['bits_per_byte']:.4f}" in capsys.readouterr().out


def test_sample_is_drawn_by_seed(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS), encoding="utf-8")
    scored = [bits_per_byte(directory, [file], sample=3, seed=seed) for seed in (1, 1, 2)]
    assert [each["documents"] for each in scored] == [3, 3, 3]
    assert scored[0]["bytes"] == scored[1]["bytes"] != scored[2]["bytes"]
    assert bits_per_byte(directory, [file], sample=99)["documents"] == len(DOCUMENTS)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "empty"),
        ("a.jsonl", b"\n \n", "empty"),
        ("a.txt", b"ab\xffcd", "not UTF-8 .byte 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 3}', "line 3: expected"),
        ("a.jsonl", b'{"text": ""}', "line 1: expected"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: expected"),
        ("a.jsonl", b'{"prompt": "a"}', "line 1: expected"),
        ("a.jsonl", b'["text"]', "line 1: expected"),
        ("a.jsonl", b"[" * 100_000, "line 1: expected"),
        ("a.txt.gz", b"plain", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"plain" * 99, mtime=0)[:-9], "cannot be read"),
    ],
)
def test_a_bad_file_is_one_error(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{file}: .*{said}|^{file}: {said}"):
        read_documents(file)


def test_errors_come_before_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.txt"
    assert cli.main(["eval", "bpb", "--model", "no-such-model", str(missing)]) == 1
    assert "none.txt: cannot be read" in capsys.readouterr().err
    for setting in ({"context": 0}, {"sample": -1}):
        with pytest.raises(ConfigError, match="expected a whole number >= 1"):
            bits_per_byte("nano", [missing], **setting)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "bpb"])
    assert stopped.value.code == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=5), packed=st.booleans())
def test_any_text_is_read_back(tmp_path: Path, texts: list[str], packed: bool) -> None:
    raw = b"\n".join(json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts)
    file = tmp_path / ("texts.jsonl.gz" if packed else "texts.jsonl")
    file.write_bytes(gzip.compress(raw) if packed else raw)
    assert read_documents(file) == texts


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(), name=st.sampled_from(["a.txt", "a.jsonl", "a.gz", "a.jsonl.gz"]))
def test_any_bytes_are_read_or_refused(tmp_path: Path, raw: bytes, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(raw)
    try:
        documents = read_documents(file)
    except DataError as error:
        refused = str(error)
    else:
        assert documents
        assert all(documents)
        return
    assert refused.startswith(str(file))


def test_help_needs_no_server() -> None:
    hide = "import sys; sys.modules['starlette'] = sys.modules['uvicorn'] = None; "
    start = "from pelagos.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", hide + start, "eval", "bpb", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "src", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--context" in done.stdout


def test_a_bit_is_a_bit(loaded: tuple[Transformer, Tokenizer]) -> None:
    """A model without an opinion needs log2(vocabulary) bits a token."""
    model, tokenizer = loaded
    flat = Transformer(model.config)
    for parameter in flat.parameters():
        torch.nn.init.zeros_(parameter)
    [part] = score_documents(flat, tokenizer, ["one text"])
    bits = part.tokens * math.log2(model.config.vocab_size)
    assert part.to_dict()["bits_per_byte"] == pytest.approx(bits / len("one text"))
