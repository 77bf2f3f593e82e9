"""Completion of JSONL: one request a line in, one result a line out, a bad line reported and passed over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pelagos.engine.llm import LLM
from pelagos.engine.turn import sampling_params
from pelagos.errors import RequestError


def complete_lines(
    llm: LLM, lines: Iterable[str] | Iterable[bytes], *, defaults: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield one result for every line that is not blank, in order.

    A line is an object with `prompt` (text or token ids) or `messages` (and the rest of a chat body); its own
    max_tokens, temperature, top_p, top_k, seed and stop go before `defaults`. A result holds `line` (from 1), the
    line's `id` if it has one, and `text`, `token_ids`, `finish_reason`, or `message`, `finish_reason`, or `error`.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        result: dict[str, Any] = {"line": number}
        try:
            record = _parse(line)
            if "id" in record:
                result["id"] = record["id"]
            yield result | _complete(llm, {**defaults, **record})
        except RequestError as error:
            yield result | {"error": str(error)}


def _parse(line: str | bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not valid JSON text ({error})") from None
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise RequestError('expected an object with either "prompt" or "messages"')
    return record


def _complete(llm: LLM, record: dict[str, Any]) -> dict[str, Any]:
    if "messages" in record:
        turn = llm.chat(record)
        message = turn.run()
        return {"message": message, "finish_reason": turn.finish_reason}
    prompt = record["prompt"]
    if not isinstance(prompt, (str, list)):
        raise RequestError(f"prompt is a {type(prompt).__name__}: expected text or a list of token ids")
    [done] = llm.generate([prompt], sampling_params(record))
    return {"text": done.text, "token_ids": done.token_ids, "finish_reason": done.finish_reason}
