"""The parity suite against our own server over the scripted engine, and what would make the suite itself worthless."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from tests.api import run as suite

from pelagos.engine import LLM
from pelagos.serve import App, Card
from pelagos.serve.scripted import scripted_llm

CONTEXT = 65_536
SCRIPT = Path(__file__).parent / "script.json"
AREAS = (
    "chat completions count_tokens errors_lenient errors_strict fim json limits messages prompts responses sse stop "
    "thinking tools usage"
)


@contextmanager
def serving(llm: LLM, card: Card) -> Iterator[httpx.Client]:
    server = uvicorn.Server(uvicorn.Config(App(llm, card=card), port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            threading.Event().wait(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            while client.get("/ready").status_code != 200:
                threading.Event().wait(0.01)
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def clients() -> Iterator[tuple[httpx.Client, httpx.Client]]:
    with (
        serving(scripted_llm("nano", SCRIPT), Card(model="nano", context_length=CONTEXT)) as lenient,
        serving(scripted_llm("nano", SCRIPT), Card(model="nano", context_length=CONTEXT, strict=True)) as strict,
    ):
        yield lenient, strict


@pytest.mark.parametrize("case", suite.load(), ids=lambda case: case["id"])
def test_case(case: dict, clients: tuple[httpx.Client, httpx.Client]) -> None:
    suite.check(case, clients[bool(case.get("strict"))], "nano", CONTEXT)


def test_the_script_is_for_any_server(clients: tuple[httpx.Client, httpx.Client]) -> None:
    verdicts = Counter(verdict for _, verdict in suite.run(clients[0], None, "nano", context=CONTEXT, needs=set()))
    assert set(verdicts) == {"", "skipped"}
    assert verdicts[""] > 150


def test_the_suite_is_whole() -> None:
    cases = suite.load()
    areas = Counter(case["area"] for case in cases)
    assert sorted(areas) == AREAS.split()
    assert len(cases) >= 250
    assert len({case["id"] for case in cases}) == len(cases)
    assert all(case["source"] for case in cases)


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        ({"a": 1}, {"a": 2}), ({"a": 1}, {}), ({"a": {"$absent": True}}, {"a": None}), ([1], [1, 2]), (True, 1),
        ({"$re": "^b"}, "ab"), ({"$type": "integer"}, True), ({"$type": "string"}, None),
        ({"$each": {"$gte": 1}}, [1, 0]), (1, True),
        ({"$has": 3}, [1, 2]), ({"$json": {"a": 1}}, "{"), ({"$json": {"a": 1}}, '{"a": 2}'), ({"$not": 1}, 1),
        ({"$all": [{"$gte": 1}, {"$lte": 2}]}, 3), ({"$len": 2}, "abc"), ({"$in": [1, 2]}, 3), (None, 0), ("a", "b"),
        ({"$same": "x"}, 2),
    ],
)  # fmt: skip
def test_a_matcher_can_fail(expected: object, got: object) -> None:
    with pytest.raises(suite.Mismatch):
        suite.match(expected, got, "here", {"x": 1})


def test_events_are_matched_in_order_and_all() -> None:
    frames = suite.frames(': keep-alive\n\nevent: a\ndata: {"n": 1}\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n')
    assert [frame["event"] for frame in frames] == ["a", None, None]
    suite.match_events([{"+": {"data": {"n": {"$gte": 1}}}}, {"data": "[DONE]"}], frames, {})
    for steps in (
        [{"+": {"data": {"n": 1}}}, {"data": "[DONE]"}], [{"+": {"data": {"n": {"$gte": 1}}}}], [{"data": "[DONE]"}],
        [{"*": {"data": {"n": 3}}}, {"data": "[DONE]"}],
    ):  # fmt: skip
        with pytest.raises(suite.Mismatch):
            suite.match_events(steps, frames, {})
