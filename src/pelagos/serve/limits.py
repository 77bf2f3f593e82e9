"""How much is let in: requests in all and by key, and what a refused client is told."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from pelagos.serve.keys import Key

RETRY_SECONDS = 2  # after which a client may ask again where nothing says when there is room


@dataclass(slots=True)
class _Use:
    """What one key has under way, and how many requests it may still begin at `since`."""

    running: int = 0
    left: float = 0.0
    since: float = 0.0


class Traffic:
    """Requests under way, counted; `draining` refuses new ones."""

    def __init__(self, most: int) -> None:
        """Let in `most` requests at a time."""
        self.most, self.in_flight, self.draining = most, 0, False
        self._uses: dict[str, _Use] = {}

    @contextlib.contextmanager
    def admitted(self, key: Key | None) -> Iterator[None]:
        """Count one request in and out; raises HTTPException 429 or 503, with Retry-After, for one too many."""
        use = self._admit(key)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            if use is not None:
                use.running -= 1

    def _admit(self, key: Key | None) -> _Use | None:
        if self.draining:
            raise refusal(503, "the server is ending and takes no more requests", RETRY_SECONDS)
        if self.in_flight >= self.most:
            raise refusal(429, f"{self.in_flight} requests are under way, which is the limit", RETRY_SECONDS)
        if key is None:
            return None
        use = self._uses.setdefault(key.name, _Use(left=key.per_minute or 0, since=time.monotonic()))
        if key.concurrency is not None and use.running >= key.concurrency:
            raise refusal(429, f"this key may have {key.concurrency} requests at a time", RETRY_SECONDS)
        if key.per_minute is not None:
            now = time.monotonic()
            use.left = min(key.per_minute, use.left + (now - use.since) * key.per_minute / 60)
            use.since = now
            if use.left < 1:
                wait = math.ceil((1 - use.left) * 60 / key.per_minute)
                raise refusal(429, f"this key may begin {key.per_minute} requests a minute", wait)
            use.left -= 1
        use.running += 1
        return use


def refusal(status: int, message: str, retry_after: int | None = None) -> HTTPException:
    """An error for the client, with a Retry-After header where waiting helps."""
    return HTTPException(status, message, None if retry_after is None else {"Retry-After": str(retry_after)})
