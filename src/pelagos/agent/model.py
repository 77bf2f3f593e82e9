"""What the agent asks: one chat completion at a time from an OpenAI-compatible server, with patience for a busy one."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pelagos.errors import RequestError

ANSWER_BYTES = 32 << 20
RETRY_CODES = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Where to ask and how; `options` go into every request (temperature, max_tokens, seed ...)."""

    url: str = "http://127.0.0.1:8000/v1"
    name: str = "default"
    key: str | None = None
    timeout_s: float = 600.0
    attempts: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)

    def complete(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `{"message", "finish_reason", "usage"}`; RequestError with what the server said, or why it did not."""
        body = {"model": self.name, "messages": list(messages), "tools": list(tools), **self.options}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        place = f"{self.url.rstrip('/')}/chat/completions"
        if not place.startswith(("http://", "https://")):
            raise RequestError(f"{self.url!r}: expected an http(s) address of a server, up to its /v1")
        wait, said = 1.0, ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(wait)
                wait *= 2
            try:
                request = urllib.request.Request(place, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                    data = answer.read(ANSWER_BYTES + 1)
                return _read(data)
            except urllib.error.HTTPError as error:
                with error:
                    said = f"{error.code}: {error.read(2000).decode('utf-8', 'replace')}"
                if error.code not in RETRY_CODES:
                    break
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException) as error:
                said = f"{type(error).__name__}: {error}"
        raise RequestError(f"{place}: {said}")


def _read(data: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        message = choice["message"]
        kept = {name: message[name] for name in ("content", "reasoning_content", "tool_calls") if message.get(name)}
        return {
            "message": {"role": "assistant", "content": None, **kept},
            "finish_reason": choice.get("finish_reason"), "usage": answer.get("usage"),
        }  # fmt: skip
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise RequestError(f"the server's answer is no chat completion ({error!r}): {data[:200]!r}") from None


def _seconds(text: str | None) -> float:
    return min(60.0, float(text)) if text and text.isdigit() else 0.0
