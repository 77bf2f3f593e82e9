"""The agent against a server that says what the test wrote down: tools, errors, death in the middle, replay."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelagos.agent import Agent, Model, replay
from pelagos.agent.loop import read_transcript
from pelagos.errors import DataError, RequestError
from pelagos.sandbox import Sandbox, Store


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {
        "id": f"c{abs(hash(name)) % 99}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    }


def said(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "tool_calls": list(calls) or None}
    return {
        "choices": [{"message": message, "finish_reason": "tool_calls" if calls else "stop"}],
        "usage": {"total_tokens": 7},
    }


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Model, list[Any]]]]:
    """A server that gives these answers in turn (a number is a status), and the bodies it was asked."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(*answers: Any) -> tuple[Model, list[Any]]:
        asked: list[Any] = []
        left = list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = left.pop(0)
                body = b"no" if isinstance(answer, int) else json.dumps(answer).encode()
                self.send_response(answer if isinstance(answer, int) else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return Model(url=f"http://127.0.0.1:{servers[-1].server_port}/v1", timeout_s=60), asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_agent_works_and_its_transcript_replays(serve: Any, store: Store, tmp_path: Path) -> None:
    script = [
        said(call("bash", command="ls; echo oops >&2; exit 3")),
        said(call("edit", path="a.py", old="", new="print(1)\n"), call("bash", command="python3 a.py")),
        said(call("edit", path="a.py", old="1", new="2"), call("edit", path="a.py", old="nowhere", new="x")),
        said(
            call("dance"),
            call("bash", cmd="x"),
            call("bash", command=5),
            {"id": "x", "function": {"name": "bash", "arguments": "{"}},
        ),
        said(content="All done."),
    ]
    model, asked = serve(*script)
    path = tmp_path / "t.jsonl"
    with Sandbox.create(store=store) as box:
        outcome = Agent(box, path).run("Print 2.", model)
        assert (outcome.ended, outcome.turns, outcome.answer, outcome.tokens) == ("done", 5, "All done.", 35)
        assert box.files.read("a.py") == b"print(2)\n"
    results = [m["content"] for m in asked[-1]["messages"] if m["role"] == "tool"]
    assert results[0] == "\n[stderr]\noops\n\n[exit code 3]"
    assert results[2] == "1\n\n[exit code 0]"
    assert "occurs 0 times" in results[4]
    assert all(text.startswith("error:") for text in results[4:])
    assert [tool["function"]["name"] for tool in asked[0]["tools"]] == ["bash", "edit"]
    with Sandbox.create(store=store) as other:
        again = replay(path, other)
        assert [r["content"] for turn in again[1:] for r in turn["results"]] == results
        assert other.files.read("a.py") == b"print(2)\n"


def test_killed_agent_goes_on_and_runs_nothing_twice(serve: Any, store: Store, tmp_path: Path) -> None:
    script = [said(call("bash", command=f"echo {n} >> trace")) for n in range(4)] + [said(content="ok")]
    path = tmp_path / "t.jsonl"
    with Sandbox.create(store=store) as box:

        def stop(turn: dict[str, Any]) -> None:
            if turn["turn"] == 2:
                raise KeyboardInterrupt

        model, _ = serve(*script)
        with pytest.raises(KeyboardInterrupt):
            Agent(box, path).run("go", model, on_turn=stop)
        with path.open("ab") as file:
            file.write(b'{"turn": 3, "mess')  # a torn line
        rest, asked = serve(*script[3:])
        assert Agent(box, path).run("go", rest).turns == 5
        assert len(asked) == 2
        assert box.files.read("trace") == b"0\n1\n2\n3\n"
        with pytest.raises(DataError, match="another run"):
            Agent(box, path).run("something else", rest)


def test_servers_that_fail(serve: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    model, asked = serve(503, said(content="late"))
    assert model.complete([], [])["message"]["content"] == "late"
    assert len(asked) == 2
    for answers, word in (
        ([400], "400: no"),
        ([{"x": 1}], "no chat completion"),
        ([503] * 4, "503"),
        ([[]], "no chat"),
    ):
        model, _ = serve(*answers)
        with pytest.raises(RequestError, match=word):
            model.complete([], [])
    with pytest.raises(RequestError, match="refused"):
        Model(url="http://127.0.0.1:9/v1").complete([], [])
    with pytest.raises(RequestError, match="http"):
        Model(url="file:///etc").complete([], [])
    endless, _ = serve(*[said(call("bash", command="true"))] * 3)
    with Sandbox.create(store=store) as box:
        assert Agent(box, tmp_path / "t.jsonl", max_turns=3).run("go", endless).ended == "turns"


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=80))
def test_any_bytes_are_a_transcript_or_an_error(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError):
        read_transcript(path)
