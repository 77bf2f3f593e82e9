"""Completion of JSONL: one request a line in, one result a line out, a bad line reported and passed over."""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pelagos.engine.llm import LLM
from pelagos.engine.turn import sampling_params
from pelagos.errors import CapacityError, RequestError


def complete_lines(
    llm: LLM, lines: Iterable[str] | Iterable[bytes], *, defaults: Mapping[str, Any], ahead: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield one result for every line that is not blank, in order; up to `ahead` lines run side by side.

    A line is an object with `prompt` (text or token ids) or `messages` (and the rest of a chat body); its own
    sampling keys (see `sampling_params`) go before `defaults`. A result holds `line` (from 1), the line's `id` if it
    has one, and `text`, `token_ids`, `finish_reason`, or `message`, `finish_reason`, or `error`.
    """
    begun: deque[tuple[dict[str, Any], Iterator[dict[str, Any]]]] = deque()
    for number, line in enumerate(lines, 1):
        if line.strip():
            work = _complete(llm, number, line, defaults)
            begun.append((next(work), work))
        while len(begun) >= ahead:
            done, work = begun.popleft()
            yield done or next(work)
    for done, work in begun:
        yield done or next(work)


def _complete(llm: LLM, number: int, line: str | bytes, defaults: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield nothing once a line has been submitted, then its result."""
    result: dict[str, Any] = {"line": number}
    try:
        record = _parse(line)
        result |= {"id": record["id"]} if "id" in record else {}
        if "messages" in record:
            turn = llm.chat({**defaults, **record})
            yield {}
            result |= {"message": turn.run(), "finish_reason": turn.finish_reason}
        else:
            stream = llm.submit(record["prompt"], sampling_params({**defaults, **record}))
            yield {}
            steps = list(stream)
            result |= {"text": "".join(step.text for step in steps), "token_ids": [step.token_id for step in steps]}
            result["finish_reason"] = stream.finish_reason
    except (RequestError, CapacityError) as error:
        result["error"] = str(error)
    yield result


def _parse(line: str | bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not valid JSON text ({error})") from None
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise RequestError('expected an object with either "prompt" or "messages"')
    if not isinstance(record.get("prompt", ""), str | list):
        raise RequestError(f"prompt is a {type(record['prompt']).__name__}: expected text or a list of token ids")
    return record
