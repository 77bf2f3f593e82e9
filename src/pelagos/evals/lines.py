"""Completion of JSONL: one request a line in, one result a line out, a bad line reported and passed over."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from pelagos.engine.llm import LLM
from pelagos.engine.turn import sampling_params
from pelagos.errors import CapacityError, PelagosError, RequestError

Finish = Callable[[], dict[str, Any]]


def complete_lines(
    llm: LLM, lines: Iterable[str] | Iterable[bytes], *, defaults: Mapping[str, Any], ahead: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield one result for every line that is not blank, in order; up to `ahead` lines run side by side.

    A line is an object with `prompt` (text or token ids) or `messages` (and the rest of a chat body); its own
    sampling keys (see `sampling_params`) go before `defaults`. A result holds `line` (from 1), the line's `id` if it
    has one, and `text`, `token_ids`, `finish_reason`, or `message`, `finish_reason`, or `error`.
    """
    begun: deque[tuple[dict[str, Any], Finish]] = deque()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        result: dict[str, Any] = {"line": number}
        begun.append((result, _begin(llm, line, result, defaults)))
        while len(begun) >= ahead:
            yield _finish(*begun.popleft())
    while begun:
        yield _finish(*begun.popleft())


def _begin(llm: LLM, line: str | bytes, result: dict[str, Any], defaults: Mapping[str, Any]) -> Finish:
    try:
        record = _parse(line)
        if "id" in record:
            result["id"] = record["id"]
        return _submit(llm, {**defaults, **record})
    except PelagosError as error:
        return partial(_raise, error)


def _finish(result: dict[str, Any], finish: Finish) -> dict[str, Any]:
    try:
        return result | finish()
    except (RequestError, CapacityError) as error:
        return result | {"error": str(error)}


def _raise(error: PelagosError) -> dict[str, Any]:
    raise error


def _parse(line: str | bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not valid JSON text ({error})") from None
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise RequestError('expected an object with either "prompt" or "messages"')
    return record


def _submit(llm: LLM, record: dict[str, Any]) -> Finish:
    if "messages" in record:
        turn = llm.chat(record)
        return lambda: {"message": turn.run(), "finish_reason": turn.finish_reason}
    prompt = record["prompt"]
    if not isinstance(prompt, (str, list)):
        raise RequestError(f"prompt is a {type(prompt).__name__}: expected text or a list of token ids")
    stream = llm.submit(prompt, sampling_params(record))

    def finish() -> dict[str, Any]:
        steps = list(stream)
        text = "".join(step.text for step in steps)
        return {"text": text, "token_ids": [step.token_id for step in steps], "finish_reason": stream.finish_reason}

    return finish
