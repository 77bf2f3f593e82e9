"""Replicas behind one front door: what the router knows, and the whole of it with engines that play a script."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from deploy.replicas.affinity import BLOCK_BYTES, Hasher, Known, Map, Point, choose
from hypothesis import given, settings
from hypothesis import strategies as st

from pelagos.chat.tokens import DSML
from pelagos.serve.ask import Ask, Card
from pelagos.serve.protocols import APIS

ROOT = Path(__file__).resolve().parents[2]
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
HASHER = Hasher(b"secret")
FAST = settings(max_examples=60, deadline=None)
TEXTS = st.text(max_size=40) | st.integers(1, 3).map(lambda blocks: "x" * (blocks * BLOCK_BYTES - 13))
MESSAGE_LISTS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": TEXTS}), max_size=6
)


def points(messages: list[dict[str, Any]], user: str = "", key: str = "", **body: Any) -> tuple[Point, ...]:
    return HASHER.points(Ask(body={"messages": messages, **body}, user_id=user), key)


def keys(of: tuple[Point, ...]) -> list[bytes]:
    return [point.key for point in of]


@FAST
@given(MESSAGE_LISTS, MESSAGE_LISTS)
def test_what_goes_on_begins_alike(begun: list[dict[str, Any]], more: list[dict[str, Any]]) -> None:
    short, long = points(begun), points(begun + more)
    assert keys(long)[: len(short)] == keys(short)
    assert len(set(keys(long))) == len(long)
    assert not long or long[-1].reach == max(point.reach for point in long)


@FAST
@given(MESSAGE_LISTS, MESSAGE_LISTS)
def test_a_point_stands_for_all_before_it(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    shared = set(keys(points(one))) & set(keys(points(other)))
    beyond = 0 if same == min(len(one), len(other)) else 3  # of the first message that differs: its whole blocks
    assert len(points(one[:same])) <= len(shared) <= len(points(one[:same])) + beyond


@FAST
@given(MESSAGE_LISTS.filter(bool), st.text(max_size=5), st.text(max_size=5), st.text(max_size=5), st.text(max_size=5))
def test_users_share_no_point(messages: list[dict[str, Any]], user: str, key: str, other: str, next_key: str) -> None:
    ours, theirs = keys(points(messages, user, key)), keys(points(messages, other, next_key))
    assert bool(set(ours) & set(theirs)) == ((user, key) == (other, next_key))
    assert not set(ours) & set(keys(Hasher().points(Ask(body={"messages": messages}, user_id=user), key)))


def test_a_long_text_has_points_inside_and_tools_come_first() -> None:
    message = {"role": "user", "content": "x" * 5 * BLOCK_BYTES}
    other = {"role": "user", "content": message["content"] + "and then?"}
    assert len(set(keys(points([message]))) & set(keys(points([other])))) == 5
    assert not set(keys(points([message]))) & set(keys(points([message], tools=[{"name": "f"}])))
    text, tokens = (HASHER.points(Ask(prompt=prompt)) for prompt in ("a b", [1, 2]))
    assert len(text) == len(tokens) == 1
    assert keys(text) != keys(tokens)


def test_the_answer_counts_as_known_where_the_conversation_goes_on() -> None:
    begun = [{"role": "user", "content": "Write much"}]
    answer, more = {"role": "assistant", "content": "much " * 500}, {"role": "user", "content": "More"}
    known = Map[str](100)
    known.learn(points(begun), "a")
    found = known.find(points([*begun, answer, more]))["a"]
    assert found.continues
    assert 2500 < found.reach < points([*begun, answer, more])[-1].reach


def test_marks_of_what_to_cache_do_not_matter() -> None:
    """Claude Code moves its cache_control to the last message with every turn."""
    [api] = [api for api in APIS if MESSAGES in api.paths]
    marked = [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]
    first = {"messages": [{"role": "user", "content": marked}], "system": "s", "max_tokens": 9}
    plain = [{"type": "text", "text": "Hi"}]
    turns = [{"role": "user", "content": plain}, {"role": "assistant", "content": "Yes"}]
    second = first | {"messages": [*turns, {"role": "user", "content": marked}]}
    one, two = (HASHER.points(api.read(body, Card(model="nano"))) for body in (first, second))
    assert keys(two)[: len(one)] == keys(one)


@FAST
@given(st.lists(st.tuples(MESSAGE_LISTS, st.sampled_from("abc")), max_size=8), st.integers(1, 12))
def test_the_map_is_bounded_and_forgets(sent: list[tuple[list[dict[str, Any]], str]], most: int) -> None:
    known = Map[str](most)
    for messages, replica in sent:
        known.learn(points(messages), replica)
        assert len(known) <= most
        if 0 < len(points(messages)) <= most:
            assert known.find(points(messages))[replica].reach == points(messages)[-1].reach
    known.forget("a")
    assert all("a" not in known.find(points(messages)) for messages, _ in sent)
    for replica in "bc":
        known.forget(replica)
    assert len(known) == 0


def test_the_beginning_of_a_conversation_is_kept_longest() -> None:
    known = Map[str](3)
    parts = points([{"role": "user", "content": str(each)} for each in range(5)])
    known.learn(parts, "a")
    assert known.find(parts) == {"a": Known(parts[2].reach, False)}


@pytest.mark.parametrize(
    ("known", "loads", "order", "why"),
    [
        ({}, {"a": 1, "b": 0}, "ba", "load"),
        ({}, {"b": 0, "a": 0}, "ba", "load"),  # the first of equals: chosen longest ago
        ({"a": Known(60)}, {"a": 3, "b": 0}, "ab", "prefix"),
        ({"a": Known(40)}, {"a": 1, "b": 0}, "ba", "load"),  # too little of it
        ({"a": Known(40)}, {"b": 0, "a": 0}, "ab", "load"),  # but of equals
        ({"a": Known(1, True)}, {"a": 3, "b": 0}, "ab", "prefix"),  # its own conversation
        ({"a": Known(60), "b": Known(70)}, {"a": 0, "b": 3}, "ba", "prefix"),
        ({"a": Known(60), "b": Known(60)}, {"a": 2, "b": 1}, "ba", "prefix"),
        ({"a": Known(99, True)}, {"a": 8, "b": 4}, "ab", "prefix"),  # the other is nearly as full
        ({"a": Known(99, True)}, {"a": 8, "b": 3}, "ba", "shed"),
        ({"a": Known(99, True)}, {"a": 7, "b": 0}, "ab", "prefix"),  # computed at once
        ({"a": Known(99)}, {}, "", "load"),
    ],
)
def test_who_is_chosen(known: dict[str, Known], loads: dict[str, float], order: str, why: str) -> None:
    there = {replica: each for replica, each in known.items() if replica in loads}
    choice = choose(there, loads, 100, 8)
    assert ("".join(choice.order), choice.why) == (order, why)


# The whole of it.

# Spelled as no renderer spells it: with many blanks in the JSON.
CALL = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="o" string="false">{{"k":   [1,    2.50]}}'
    f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>"
)
RULES = [
    {"when": "look", "reply": f"I look.{CALL}"},
    {"when": "long (\\w+)", "reply": "word " * 200, "token_delay_ms": 20},
    {"when": "brief", "reply": "word " * 40, "token_delay_ms": 20},
    {"when": "much", "reply": "word " * 20_000},
    {"when": "", "reply": "Hello"},
]


@dataclass
class Front:
    """A front with its replicas, in processes of their own."""

    process: subprocess.Popen[str]
    port: int
    client: httpx.Client

    def replicas(self) -> list[dict[str, Any]]:
        return self.client.get("/stats").json()["by_replica"]

    def running(self) -> int:
        return self.client.get("/health").json()["replicas"].get("RUNNING", 0)

    def has_back(self, killed: str) -> bool:
        """Whether there are two replicas again, one in place of the killed."""
        names = {each["replica"] for each in self.replicas()}
        return self.running() == len(names) == 2 and killed not in names

    def is_quiet(self) -> bool:
        stats = self.client.get("/stats").json()
        idle = stats["in_flight"] == stats["requests_running"] == 0
        return idle and all(each["stats"]["in_flight"] == 0 for each in stats["by_replica"])


@contextlib.contextmanager
def front(folder: Path, *flags: str, script: bool = True, ready: int = 2) -> Iterator[Front]:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[serve]'")
    (folder / "script.json").write_text(json.dumps({"rules": RULES}))
    command = [sys.executable, "-m", "deploy.replicas", "--replicas", "2", "--port", "0", "--log-level", "error"]
    command += ["--keys-file", str(folder / "keys.json"), *flags]
    command += ["--engine", f"scripted:{folder / 'script.json'}"] if script else []
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said: list[str] = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"listens at http://127.0.0.1:(\d+)", line):
                    break
            else:
                raise AssertionError("".join(said))
            threading.Thread(target=process.stderr.read, daemon=True).start()
            with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=60, trust_env=False) as client:
                here = Front(process, int(found[1]), client)
                wait_until(lambda: here.running() >= ready, 60)
                yield here
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.1)


def say(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 300, **more}


def test_two_replicas_answer_as_one(tmp_path: Path) -> None:
    with front(tmp_path) as here:
        client = here.client
        assert client.get("/ready").json()["replicas"] == {"RUNNING": 2}
        bodies = {CHAT: say("Hi"), "/completions": {"prompt": "Hi"}, "/responses": {"input": "Hi"}}
        for path, body in (bodies | {MESSAGES: say("Hi")}).items():
            whole = client.post(path, json=body)
            assert whole.status_code == 200, whole.text
            assert "Hello" in whole.text
            streamed = client.post(path, json=body | {"stream": True})
            assert "Hello" in streamed.text
            assert streamed.headers["content-type"].startswith("text/event-stream")
            assert whole.headers["x-pelagos-replica"] == streamed.headers["x-pelagos-replica"]
        # One conversation stays where it is; users spread.
        places: dict[str, set[str]] = {}
        for turn in range(4):
            for user in "abcd":
                said = [{"role": r, "content": f"{user} {t}"} for t in range(turn) for r in ("user", "assistant")]
                body = {"messages": [*said, {"role": "user", "content": f"{user} {turn}"}], "user": user}
                places.setdefault(user, set()).add(client.post(CHAT, json=body).headers["x-pelagos-replica"])
        assert all(len(each) == 1 for each in places.values())
        assert len(set.union(*places.values())) == 2
        # What is wrong is said as one server says it; garbage is no 5xx.
        assert client.post(CHAT, content=b"\xff{").status_code == 400
        assert client.post(MESSAGES, json={"messages": 3}).json()["type"] == "error"
        assert client.get("/nothing").status_code == 404
        assert client.delete(CHAT).status_code == 405
        assert client.get("/v1/models").json()["data"][0]["id"] == "nano"
        assert "<title>" in client.get("/").text
        # Each replica's metrics under its name, the statistics added up.
        metrics = client.get("/metrics").text
        names = {each["replica"] for each in here.replicas()}
        assert {*re.findall(r'pelagos_engine_requests_done_total{replica="(\w+)"}', metrics)} == names
        assert 'pelagos_front_routed_total{why="prefix"}' in metrics
        stats = client.get("/stats").json()
        assert stats["requests_done"] == sum(each["stats"]["requests_done"] for each in stats["by_replica"]) >= 24
        # Told to end, it finishes what runs.
        with client.stream("POST", CHAT, json=say("brief end", stream=True)) as answer:
            lines = answer.iter_lines()
            next(lines)
            here.process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/ready").status_code == 503)
            assert client.post(CHAT, json=say("Hi")).status_code == 503
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert here.process.wait(30) == 0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    flags = ("--head-s", "1", "--body-s", "1", "--write-s", "6", "--max-requests", "4", "--max-queued", "8")
    with front(tmp_path_factory.mktemp("front"), *flags) as here:
        yield here


@pytest.mark.slow
def test_a_killed_replica_loses_its_own_requests_and_comes_back(shared: Front) -> None:
    wait_until(lambda: shared.running() == 2, 60)

    def ask(each: int) -> tuple[str, str, str]:
        path, field = [(CHAT, "user"), (MESSAGES, "metadata")][each % 2]
        user: Any = f"killed {each}" if path == CHAT else {"user_id": f"killed {each}"}
        answer = shared.client.post(path, json=say(f"long {each}", stream=True) | {field: user})
        return path, answer.headers["x-pelagos-replica"], answer.text

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask, each) for each in range(8)]
        time.sleep(1.5)
        before = shared.replicas()
        assert [each["stats"]["requests_running"] for each in before] == [4, 4]
        os.kill(before[0]["pid"], signal.SIGKILL)
        ends = [each.result() for each in asked]
    for path, replica, text in ends:
        is_whole = "message_stop" in text if path == MESSAGES else '"finish_reason": "stop"' in text
        assert is_whole == (replica != before[0]["replica"]), (path, replica)
        if not is_whole:
            assert "ended before it was complete; ask again" in text
            assert text.endswith("\n\n")
            assert ("event: error" in text) == (path == MESSAGES)
    assert sum(replica == before[0]["replica"] for _, replica, _ in ends) == 4
    assert shared.client.post(CHAT, json=say("Hi", user="killed 0")).status_code == 200
    wait_until(lambda: shared.has_back(before[0]["replica"]), 60)
    assert "pelagos_front_lost_total 4.0" in shared.client.get("/metrics").text


@pytest.mark.slow
def test_turns_with_calls_are_replayed_by_whichever_replica_is_left(shared: Front) -> None:
    wait_until(lambda: shared.running() == 2 and len(shared.replicas()) == 2, 60)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"o": {}}}}}]
    body = say("look", tools=tools, thinking={"type": "disabled"})
    first = shared.client.post(CHAT, json=body | {"user": "caller"})
    message = first.json()["choices"][0]["message"]
    [call] = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "done"}
    more = body | {"messages": [*body["messages"], message, result]}

    def prompt_tokens(user: str) -> int:
        return shared.client.post(CHAT, json=more | {"user": user}).json()["usage"]["prompt_tokens"]

    written, rendered = prompt_tokens("caller"), prompt_tokens("somebody")
    assert written > rendered
    owner = first.headers["x-pelagos-replica"]
    os.kill(next(each["pid"] for each in shared.replicas() if each["replica"] == owner), signal.SIGKILL)
    assert (prompt_tokens("caller"), prompt_tokens("somebody")) == (written, rendered)
    assert shared.client.post(CHAT, json=more | {"user": "caller"}).headers["x-pelagos-replica"] != owner
    wait_until(lambda: shared.has_back(owner), 60)


@pytest.mark.slow
def test_what_is_too_much_for_one_goes_to_the_other_and_then_is_refused(shared: Front) -> None:
    wait_until(lambda: shared.running() == 2 and shared.is_quiet(), 60)
    first = shared.client.post(CHAT, json=say("long start", user="crowd", max_tokens=1))
    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(lambda _: shared.client.post(CHAT, json=say("long start", user="crowd")), range(40)))
    assert {each.status_code for each in answers} == {200, 429}
    assert all("retry-after" in each.headers for each in answers if each.status_code == 429)
    placed = [each.headers["x-pelagos-replica"] for each in answers if each.status_code == 200]
    assert len(placed) == 24
    assert 6 <= placed.count(first.headers["x-pelagos-replica"]) <= 18
    assert 'routed_total{why="shed"}' in shared.client.get("/metrics").text


@pytest.mark.slow
def test_dropped_connections_end_their_requests_on_the_replicas(shared: Front) -> None:
    wait_until(lambda: shared.running() == 2 and shared.is_quiet(), 60)
    raw = json.dumps(say("long drop", stream=True)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(raw)
    descriptors = Path(f"/proc/{shared.process.pid}/fd")
    before = len(list(descriptors.iterdir()))
    for round_ in range(40):
        held = [socket.create_connection(("127.0.0.1", shared.port)) for _ in range(5)]
        for at, connection in enumerate(held):
            sent = (head + raw)[: len(head + raw) * (at + 1) // 4]  # a part of the head, of the body, all of it
            connection.sendall(sent)
            if at == 4:
                connection.settimeout(0.05 * (round_ % 4) + 0.01)
                with contextlib.suppress(OSError):
                    connection.recv(100)
        for connection in held:
            connection.close()
    wait_until(shared.is_quiet, 20)
    wait_until(lambda: len(list(descriptors.iterdir())) <= before + 5, 20)


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [b"\x00\x01\xff\r\n\r\n", b"POST / HTTP/9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n" * 3])
def test_garbage_is_refused_or_cut(shared: Front, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", shared.port)) as raw:
        raw.sendall(garbage)
        raw.shutdown(socket.SHUT_WR)
        raw.settimeout(10)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := raw.recv(65536):
                answer += part
    assert not answer.startswith(b"HTTP/1.1 5")
    assert shared.client.get("/ready").status_code == 200


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([CHAT, MESSAGES, "/v1/completions", "/v1/responses", "/v1/messages/count_tokens", "/v1/nothing"]),
    st.binary(max_size=30)
    | st.dictionaries(
        st.sampled_from(["messages", "input", "prompt", "tools", "user", "metadata", "stream", "max_tokens"]),
        st.recursive(
            st.none() | st.booleans() | st.integers(0, 20) | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
            max_leaves=6,
        ),
    ).map(lambda body: json.dumps(body).encode()),
)
def test_no_body_is_a_5xx(shared: Front, path: str, body: bytes) -> None:
    answer = shared.client.post(path, content=body)
    assert answer.status_code < 500, (path, body, answer.text)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut_off_and_one_that_reads_slowly_is_not(shared: Front) -> None:
    wait_until(lambda: shared.running() == 2 and shared.is_quiet(), 60)
    raw = json.dumps(say("much", stream=True, logprobs=True, max_tokens=100_000)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % len(raw)
    before = resident(shared.process.pid)
    with socket.socket() as stuck, socket.socket() as slow:
        for connection in (stuck, slow):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", shared.port))
            connection.sendall(head + b"Connection: close\r\n\r\n" + raw)
        end, size, began = b"", 0, time.monotonic()
        while part := slow.recv(16384):
            end, size = (end + part)[-40:], size + len(part)
            if size < 400_000:
                time.sleep(0.01)
        assert time.monotonic() - began > 0.5
        assert b"data: [DONE]" in end
        assert size > 4_000_000
        wait_until(shared.is_quiet, 20)
        assert resident(shared.process.pid) - before < 5 * size, (
            before,
            resident(shared.process.pid),
            size,
        )  # what two answers wait in, Ray's books included


@pytest.mark.slow
def test_a_replica_that_dies_while_it_loads_is_started_again(tmp_path: Path) -> None:
    with front(tmp_path, ready=0) as here:
        wait_until(lambda: bool(processes(here.process.pid, "ray::ServeReplica")), 60)
        os.kill(processes(here.process.pid, "ray::ServeReplica")[0], signal.SIGKILL)
        wait_until(lambda: here.running() >= 1, 60)
        assert here.client.post(CHAT, json=say("Hi")).status_code == 200  # one is enough
        wait_until(lambda: here.running() == 2, 60)


@pytest.mark.slow
def test_a_model_that_is_not_there_ends_it_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no-such-model"), front(tmp_path, "--model", "no-such-model"):
        pass


@pytest.mark.slow
def test_keys_are_walls_and_bounds_hold_over_all_replicas(tmp_path: Path) -> None:
    from pelagos.serve.keys import KeyFile

    file = KeyFile(tmp_path / "keys.json")
    one, two = file.add("one", concurrency=2), file.add("two")
    with front(tmp_path) as here:
        assert here.client.post(CHAT, json=say("Hi")).status_code == 401
        assert here.client.get("/metrics").status_code == 401
        assert here.client.get("/health").status_code == 200

        def ask(secret: str, text: str) -> httpx.Response:
            return here.client.post(CHAT, json=say(text), headers={"Authorization": f"Bearer {secret}"})

        question = "Hi " * 400
        assert ask(one, question).json()["usage"]["prompt_cache_hit_tokens"] == 0
        assert ask(one, question).json()["usage"]["prompt_cache_hit_tokens"] > 0
        assert ask(two, question).json()["usage"]["prompt_cache_hit_tokens"] == 0
        with ThreadPoolExecutor(4) as threads:
            codes = [each.status_code for each in threads.map(lambda _: ask(one, "long wait"), range(4))]
        assert sorted(codes) == [200, 200, 429, 429]


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def processes(ancestor: int, title: str) -> list[int]:
    """Processes of that title below another."""
    parents: dict[int, int] = {}
    titled: list[int] = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titled += [pid] if (folder / "cmdline").read_bytes().startswith(title.encode()) else []

    def is_below(pid: int) -> bool:
        return pid == ancestor or (pid in parents and is_below(parents[pid]))

    return [pid for pid in titled if is_below(pid)]
