"""Run the open parity suite against a server: `python tests/api/run.py URL [--strict-url URL]`.

Needs httpx and nothing of Pelagos. The case format stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

CASES = Path(__file__).parent / "cases"
Json = Any


class Mismatch(AssertionError):
    """Where an answer differs from what a case expects, and how."""


def load(folder: Path = CASES) -> list[dict[str, Json]]:
    """Return every case of a folder, each with its area and `id` ("area/name")."""
    cases = []
    for file in sorted(folder.glob("*.json")):
        listed = json.loads(file.read_text(encoding="utf-8"))
        for case in listed["cases"]:
            shared = listed.get("path") if "steps" not in case else None
            cases.append({"path": shared, **case, "area": file.stem, "id": f"{file.stem}/{case['name']}"})
    return cases


def match(expected: Json, got: Json, place: str, known: dict[str, Json]) -> None:
    """Raise Mismatch unless `got` is as `expected`; objects may have more keys than named."""
    if isinstance(expected, dict) and len(expected) == 1 and next(iter(expected)).startswith("$"):
        [(operator, operand)] = expected.items()
        return _operate(operator, operand, got, place, known)
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            raise Mismatch(f"{place}: {_short(got)} is no object")
        for key, value in expected.items():
            if value == {"$absent": True}:
                if key in got:
                    raise Mismatch(f"{place}.{key}: {_short(got[key])} should not be there")
            elif key not in got:
                raise Mismatch(f"{place}.{key}: missing")
            else:
                match(value, got[key], f"{place}.{key}", known)
        return None
    if isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            raise Mismatch(f"{place}: {_short(got)} is no list of {len(expected)}")
        for index, (one, other) in enumerate(zip(expected, got, strict=True)):
            match(one, other, f"{place}[{index}]", known)
        return None
    if (type(expected) is not type(got) and not _both_numbers(expected, got)) or expected != got:
        raise Mismatch(f"{place}: {_short(got)}, expected {_short(expected)}")
    return None


def _both_numbers(one: Json, other: Json) -> bool:
    return type(one) in (int, float) and type(other) in (int, float)


def _short(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 200 else f"{text[:200]}..."


def _operate(operator: str, operand: Json, got: Json, place: str, known: dict[str, Json]) -> None:
    """Apply a matcher of the form {"$operator": operand}."""
    kinds = {
        "string": str, "object": dict, "array": list, "boolean": bool, "null": type(None), "number": (int, float),
        "integer": int,
    }  # fmt: skip
    if operator == "$all":
        for each in operand:
            match(each, got, place, known)
        return
    if operator == "$each":
        for index, each in enumerate(got if isinstance(got, list) else [_fail(place, got, "a list")]):
            match(operand, each, f"{place}[{index}]", known)
        return
    if operator == "$json":
        try:
            return match(operand, json.loads(got), f"{place}(json)", known)
        except (TypeError, ValueError):
            raise Mismatch(f"{place}: {_short(got)} is not JSON") from None
    if operator == "$same":  # equal to what the same name stood for before; the first time it takes any value
        return match(known.setdefault(operand, got), got, place, known)
    checks = {
        "$any": lambda: True,
        "$type": lambda: isinstance(got, kinds[operand]) and (operand == "boolean" or type(got) is not bool),
        "$re": lambda: isinstance(got, str) and re.search(operand, got) is not None,
        "$in": lambda: got in operand,
        "$gte": lambda: type(got) in (int, float) and got >= operand,
        "$lte": lambda: type(got) in (int, float) and got <= operand,
        "$len": lambda: isinstance(got, (str, list)) and len(got) == operand,
        "$has": lambda: isinstance(got, list) and any(_matches(operand, each, known) for each in got),
        "$not": lambda: not _matches(operand, got, known),
    }
    if operator not in checks:
        raise ValueError(f"{operator}: no such matcher")
    if not checks[operator]():
        _fail(place, got, _short({operator: operand}))


def _fail(place: str, got: Json, expected: str) -> Json:
    raise Mismatch(f"{place}: {_short(got)}, expected {expected}")


def _matches(expected: Json, got: Json, known: dict[str, Json]) -> bool:
    try:
        match(expected, got, "", dict(known))
    except Mismatch:
        return False
    return True


def frames(text: str) -> list[dict[str, Json]]:
    """Return the server-sent events of a body as {"event", "data"}; comments are left out."""
    found = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            fields = [line.partition(":")[::2] for line in lines]
            data = "\n".join(value.removeprefix(" ") for name, value in fields if name == "data")
            event = next((value.strip() for name, value in fields if name == "event"), None)
            found.append({"event": event, "data": data if data == "[DONE]" else json.loads(data)})
    return found


def match_events(steps: list[Json], got: list[dict[str, Json]], known: dict[str, Json]) -> None:
    """Match frames against steps in order; a step {"+": m} stands for one or more frames, {"*": m} for any number."""
    at = 0
    for number, step in enumerate(steps):
        least, most, wanted = 1, 1, step
        if isinstance(step, dict) and len(step) == 1 and next(iter(step)) in ("+", "*"):
            [(sign, wanted)] = step.items()
            least, most = (1 if sign == "+" else 0), len(got)
        taken = 0
        while taken < most and at < len(got) and (taken < least or _matches(wanted, got[at], known)):
            match(wanted, got[at], f"event {at} (step {number})", known)
            at, taken = at + 1, taken + 1
        if taken < least:
            raise Mismatch(f"the stream ended after {at} events, before step {number}: {_short(wanted)}")
    if at < len(got):
        raise Mismatch(f"event {at}: {_short(got[at])} is one too many")


def _pick(value: Json, path: str) -> Json:
    """Return the value at a dotted path, or None."""
    for key in path.split("."):
        if isinstance(value, list) and key.isdigit():
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def _check_sums(sums: list[list[str]], body: Json, known: dict[str, Json]) -> None:
    for total, *parts in sums:
        numbers = [known[path[1:]] if path.startswith("$") else _pick(body, path) for path in (total, *parts)]
        if None in numbers or numbers[0] != sum(numbers[1:]):
            raise Mismatch(f"{total} = {numbers[0]}, but {' + '.join(parts)} = {numbers[1:]}")


def check(case: dict[str, Json], client: httpx.Client, model: str, context: int = 1 << 20) -> None:
    """Send a case's requests and raise Mismatch for the first answer that is not as it says."""
    known: dict[str, Json] = {"model": model, "context": context, "run": uuid.uuid4().hex}
    for step in case.get("steps") or [case]:
        _check_step(step, client, known)


def _check_step(step: dict[str, Json], client: httpx.Client, known: dict[str, Json]) -> None:
    method, content, headers = step.get("method", "POST"), step.get("raw"), {**step.get("headers", {})}
    path = step["path"].replace("$MODEL", known["model"])
    if "body" in step:
        content = json.dumps(step["body"]).replace('"$MODEL"', json.dumps(known["model"])).replace("$RUN", known["run"])
        content = re.sub(
            r'"\$repeat (\d+|context) ([^"]*)"',
            lambda found: json.dumps(found[2] * (known["context"] if found[1] == "context" else int(found[1]))),
            content,
        )
        headers.setdefault("content-type", "application/json")
    answer = client.request(method, path, content=content, headers=headers)
    if answer.status_code != step.get("status", 200):
        raise Mismatch(f"status {answer.status_code}, expected {step.get('status', 200)}: {answer.text[:300]}")
    for name, value in step.get("headers_out", {}).items():
        match(value, answer.headers.get(name), f"header {name}", known)
    if "text" in step:
        match(step["text"], answer.text, "body", known)
    last: Json = None
    if "events" in step or "joined" in step:
        got = frames(answer.text)
        if "events" in step:
            match_events(step["events"], got, known)
        for field, expected in step.get("joined", {}).items():
            pieces = [_pick(frame["data"], field) for frame in got if isinstance(frame["data"], dict)]
            match(expected, "".join(piece for piece in pieces if isinstance(piece, str)), f"joined {field}", known)
        objects = [frame["data"] for frame in got if isinstance(frame["data"], dict)]
        last = next((each for each in reversed(objects) if each.get("usage") or each.get("response")), None)
    elif answer.content and answer.headers.get("content-type", "").startswith("application/json"):
        last = answer.json()
    if "expect" in step:
        match(step["expect"], last, "body", known)
    _check_sums(step.get("sums", []), last, known)
    for name, field in step.get("keep", {}).items():
        known[name] = _pick(last, field)


def run(
    client: httpx.Client, strict: httpx.Client | None, model: str, *, context: int, needs: set[str]
) -> Iterator[tuple[dict[str, Json], str]]:
    """Yield each case with "" where it passed, "skipped", or how it failed."""
    for case in load():
        target = strict if case.get("strict") else client
        if target is None or not needs >= set(case.get("needs", [])):
            yield case, "skipped"
            continue
        try:
            check(case, target, model, context)
        except (Mismatch, httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            yield case, f"{error}" if isinstance(error, Mismatch) else f"{type(error).__name__}: {error}"
        else:
            yield case, ""


def main() -> int:
    """Run the suite and print its score by area; the exit code is 1 when a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of a server, with or without /v1")
    parser.add_argument("--strict-url", help="of one that refuses what the official API refuses")
    parser.add_argument("--model", help="the name to ask for (default: the first of /v1/models)")
    parser.add_argument("--context", type=int, help="tokens of its context (default: what /v1/models says, or 1048576)")
    parser.add_argument("--key", help="sent as a bearer token")
    parser.add_argument("--any-model", action="store_true", help="the server does not follow script.json: shapes only")
    asked = parser.parse_args()
    headers = {"authorization": f"Bearer {asked.key}"} if asked.key else {}
    urls = [url and url.rstrip("/").removesuffix("/v1") for url in (asked.url, asked.strict_url)]
    clients = [httpx.Client(base_url=url, timeout=120, headers=headers) if url else None for url in urls]
    assert clients[0] is not None
    listed = clients[0].get("/v1/models").json()["data"][0]
    model, context = asked.model or listed["id"], asked.context or listed.get("context_length") or 1 << 20
    scores: dict[str, Counter[str]] = {}
    needs = set() if asked.any_model else {"script"}
    for case, verdict in run(clients[0], clients[1], model, context=context, needs=needs):
        kind = {"": "passed", "skipped": "skipped"}.get(verdict, "failed")
        scores.setdefault(case["area"], Counter())[kind] += 1
        if kind == "failed":
            print(f"FAILED {case['id']}: {verdict}")
    total: Counter[str] = sum(scores.values(), Counter())
    for area, score in [*scores.items(), ("total", total)]:
        ran = score["passed"] + score["failed"]
        skipped = f"  ({score['skipped']} skipped)" if score["skipped"] else ""
        print(f"{area:16} {score['passed']:4} / {ran:<4}{skipped}")
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
