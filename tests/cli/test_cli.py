"""The command line as a person meets it: real processes over a tiny untrained checkpoint, and the dispatch."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.scripted import scripted_llm
from tests.engine.small_tokens import TEXTS, config_for

from pelagos import cli
from pelagos.chat import Tokenizer, train_tokenizer
from pelagos.chat.tokens import SPECIAL_TOKENS
from pelagos.cli.chat import Talk, printable
from pelagos.engine import Step, Stream
from pelagos.errors import RequestError
from pelagos.load import save_model
from pelagos.model import Transformer

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "small"
    full = train_tokenizer(TEXTS, len(SPECIAL_TOKENS) + 256 + 60)
    torch.manual_seed(0)
    made = Transformer(config_for(Tokenizer(full)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.05)
    save_model(made, path)
    full.save(str(path / "tokenizer.json"))
    return str(path)


def run(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "pelagos", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)


def test_help_lists_the_commands_that_are_here() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    for name in ("chat", "generate", "serve"):
        assert re.search(rf"^  {name} ", shown.stdout, re.MULTILINE)
    wrong = run("chta")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "no such command 'chta'" in wrong.stderr


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[object, str, str]:
    """A command line in this process: exit code, stdout, stderr."""
    try:
        code: object = cli.main(args)
    except SystemExit as stopped:
        code = stopped.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_an_error_of_ours_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text("{}", encoding="utf-8")
    for command in (["chat"], ["serve", "--port", "0"], ["generate", str(lines)]):
        code, out, err = call(capsys, *command, "--model", str(tmp_path / "none"))
        assert (code, out) == (1, "")
        assert re.fullmatch(r"pelagos: .*none.*not found.*\n", err), err
    code, out, err = call(capsys, "serve", "--host", "256.1.1.1")
    assert (code, out) == (1, "")
    assert err.startswith("pelagos: cannot listen on 256.1.1.1:8000")


def test_files_that_cannot_be_opened_are_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing, lines = str(tmp_path / "none" / "x"), tmp_path / "in.jsonl"
    lines.write_text('{"prompt": "a"}', encoding="utf-8")

    def draw(files: list[Path], _: Path) -> None:
        files[0].open()

    monkeypatch.setattr("pelagos.evals.roofline.draw", draw)
    for command in (["generate", str(lines), "--model", model, "--out", missing], ["bench", "plot", missing]):
        code, out, err = call(capsys, *command)
        assert (code, out) == (2, "")
        assert err.endswith(f"{missing}: No such file or directory\n")


@pytest.mark.parametrize("args", [["--help"], ["cost", "--help"], ["cost"]])
@pytest.mark.parametrize("buffered", [True, False])
def test_nobody_reads(args: list[str], buffered: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *([] if buffered else ["-u"]), "-m", "pelagos", *args]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    os.close(writer)
    assert ended.stderr == ""
    assert ended.returncode in (141, 0)  # argparse's own help hears of no error


def test_any_other_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pelagos.cli.train.main", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_train_runs_where_little_is_installed() -> None:
    code = (
        "import contextlib, sys; gone = ('starlette', 'tokenizers', 'deepseek_recipe')\n"
        "sys.modules.update(dict.fromkeys(gone))\n"
        "from pelagos.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['train', '--help'])\n"
        "print('and', file=sys.stderr)\n"
        "sys.exit(main(['chat']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1
    assert done.stdout.startswith("usage: pelagos train")
    assert re.fullmatch(r"and\npelagos: .*tokenizers.*\n", done.stderr)


def test_generate_lines(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = '{"prompt": "Hello", "max_tokens": 3, "id": "x"}\nbad\n{"messages": [{"role": "user", "content": "Hi"}]}\n'
    options = ("--model", model, "--max-tokens", "4", "--temperature", "0")
    piped = run("generate", "-", *options, stdin=lines)
    first, second, third = map(json.loads, piped.stdout.splitlines())
    assert (first["line"], first["id"], len(first["token_ids"])) == (1, "x", 3)
    assert set(second) == {"line", "error"}
    assert third["message"]["role"] == "assistant"
    assert piped.returncode == 1
    assert re.fullmatch(r"line 2: not valid JSON.*\npelagos: 1 of 3 lines failed\n", piped.stderr)

    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines, encoding="utf-8")
    assert call(capsys, "generate", str(source), *options, "--out", str(out)) == (1, "", piped.stderr)
    assert out.read_text(encoding="utf-8") == piped.stdout
    _, strict, _ = call(capsys, "generate", str(source), *options, "--strict")
    assert len(strict.splitlines()) == 2
    source.write_text(lines.splitlines()[0], encoding="utf-8")
    assert call(capsys, "generate", str(source), *options) == (0, piped.stdout.splitlines(True)[0], "")


def test_bench_engine_writes_a_line_a_figure(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    options = ("--contexts", "256", "--batches", "2", "--tokens", "8", "--no-native", "--no-speculation")
    code, shown, said = call(capsys, "bench", "engine", "--model", model, *options, "--out", str(out))
    assert (code, shown) == (0, "")
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["case"] for row in rows] == ["prefill", "hit_ram", "decode", "hit_ssd"]
    assert len(said.splitlines()) == 1 + len(rows)
    for wrong in (("--tokens", "0"), ("--mode", "x"), ("--out", str(tmp_path))):
        code, _, said = call(capsys, "bench", "engine", *wrong)
        assert (code, wrong[0] in said.splitlines()[-1]) == (2, True)
    code, _, said = call(capsys, "bench", "engine", "--contexts", "0.3")
    assert (code, said) == (1, "pelagos: contexts='0.3': expected a whole number, such as 4096, 128K or 1M\n")


def test_chat_from_a_pipe(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Hello\n/think off\nHello\n/think most\n/what\n/exit\nnot read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    code, out, err = call(capsys, "chat", "--model", model, "--max-tokens", "5", "--seed", "1")
    assert code in (0, None)
    assert "thinking: off" in err
    assert "thinking effort 'most': expected off, low, high, max" in err
    assert err.count("/think [off|low|high|max]") == 1
    assert len(out) > 2  # the first answer never left its thinking, the second is all answer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[Talk, list[dict[str, Any]]]:
    llm = scripted_llm(lambda prompt: "Hm.</think>Yes!" if prompt.endswith("<think>") else "No!")
    bodies: list[dict[str, Any]] = []
    chat = llm.chat
    monkeypatch.setattr(llm, "chat", lambda body: bodies.append(body) or chat(body))
    return Talk(llm, {"max_tokens": 9}, system="Be kind.", effort="high"), bodies


def test_a_conversation_keeps_its_history(
    asked: tuple[Talk, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    talk, bodies = asked
    for line in ("Hi", "/think off", "Again", "/think max", "/clear", "New"):
        talk.take(line)
    shown = capsys.readouterr()
    assert shown.out == "Yes!\nNo!\nYes!\n"
    assert shown.err.count("Hm.") == 2
    assert bodies[0]["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert bodies[0]["reasoning_effort"] == "high"
    assert [each["role"] for each in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert bodies[1]["messages"][2]["reasoning_content"] == "Hm."
    assert bodies[1]["thinking"] == {"type": "disabled"}
    assert (len(bodies[2]["messages"]), bodies[2]["reasoning_effort"]) == (2, "max")


def test_ctrl_c_stops_the_answer_not_the_program(
    asked: tuple[Talk, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk, bodies = asked
    wait = Stream.wait
    calls = iter(range(100))

    def interrupted(stream: Stream, timeout: float | None = None) -> Step | None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return wait(stream, timeout)

    monkeypatch.setattr(Stream, "wait", interrupted)
    talk.take("Hi")
    assert "[stopped]" in capsys.readouterr().err
    talk.take("Again")
    assert capsys.readouterr().out.endswith("Yes!\n")
    assert [each["role"] for each in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]


def test_a_request_that_cannot_be_served_leaves_the_conversation_open(
    asked: tuple[Talk, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk, _ = asked

    def refuse(body: dict[str, Any]) -> None:
        raise RequestError("too long")

    with monkeypatch.context() as patch:
        patch.setattr(talk._llm, "chat", refuse)
        talk.take("Hi")
    assert "too long" in capsys.readouterr().err
    talk.take("Hi")
    assert capsys.readouterr().out == "Yes!\n"


def test_model_text_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[31m\tb\n\x07\x9b") == "a\ufffd[31m\tb\n\ufffd\ufffd"


def test_serve_says_where_it_is_and_stops_on_ctrl_c(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "pelagos", "serve", "--model", model, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        assert server.stderr is not None
        banner = "".join(iter(server.stderr.readline, "Ctrl-C stops the server.\n"))
        try:
            [url] = re.findall(r"serves small at (http://127\.0\.0\.1:\d+)", banner)
            with urllib.request.urlopen(f"{url}/ready", timeout=60) as ready:
                assert json.load(ready)["model"] == "small"
            [data] = re.findall(r"-d '(.*)'", banner)
            request = urllib.request.Request(f"{url}/v1/chat/completions", data.encode())
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["object"] == "chat.completion"
            code, _, err = call(capsys, "serve", "--model", model, "--port", url.rpartition(":")[2])
            assert code == 1
            assert re.fullmatch(r"pelagos: cannot listen on .* in use.*\n", err)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
    assert server.returncode in (0, 130, -signal.SIGINT)
