"""Who is let in and how much: hosts and origins, keys, requests in all and by key."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.exceptions import HTTPException

from pelagos.serve.exchange import Exchange
from pelagos.serve.keys import Key, KeyFile
from pelagos.serve.settings import Settings

READING = ("GET", "HEAD", "OPTIONS")
RETRY_SECONDS = 2  # after which a client may ask again where nothing says when there is room


def refusal(status: int, message: str, retry_after: int = RETRY_SECONDS) -> HTTPException:
    """An error for a client that should come back later."""
    return HTTPException(status, message, {"Retry-After": str(retry_after)})


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is of this machine alone."""
    return host in ("localhost", "::1") or host.startswith("127.")


def hostname(host: str) -> str:
    """Return the name in a Host header or an origin, without scheme and port."""
    host = host.rpartition("://")[2].lower()
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def check_origin(exchange: Exchange, settings: Settings) -> None:
    """Refuse what a foreign web page sends: by another name of this address, or from another origin."""
    host, origin = (exchange.headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
    ours = ["localhost", "127.0.0.1", "[::1]"] if is_loopback(settings.host) else []
    names = {*ours, *map(hostname, settings.allowed_hosts)}
    if names and host and hostname(host) not in names:
        raise HTTPException(403, f"Host {host!r} is not served here; allowed_hosts in the settings adds names")
    if origin and (origin in settings.cors_origins or "*" in settings.cors_origins):
        asked = exchange.headers.get(b"access-control-request-headers", b"authorization, content-type, x-api-key")
        exchange.more_headers += [
            (b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin"),
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"), (b"access-control-allow-headers", asked),
            (b"access-control-expose-headers", b"x-request-id, retry-after, x-pelagos-warning"),
        ]  # fmt: skip
    elif origin and exchange.method not in READING and origin.rpartition("://")[2].lower() != host.lower():
        raise HTTPException(403, f"origin {origin!r} may not call; cors_origins in the settings adds some")


def find_key(exchange: Exchange, keys: KeyFile | None) -> Key | None:
    """Return whose request it is, None where nobody needs a key; HTTPException 401 without a valid one."""
    if keys is None or not keys.is_needed():
        return None
    kind, _, token = exchange.headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    given = exchange.headers.get(b"x-api-key", b"").decode("latin-1")
    for secret in (token.strip() if kind.lower() == "bearer" else "", given):
        if secret and (key := keys.find(secret)):
            return key
    said = "Authentication failed: give a valid API key as `Authorization: Bearer KEY` or in `x-api-key`"
    raise HTTPException(401, said, {"WWW-Authenticate": "Bearer"})


@dataclass(slots=True)
class _Use:
    """What one key has under way, and how many requests it may still begin at `since`."""

    running: int = 0
    left: float = math.inf
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
        if self.draining:
            raise refusal(503, "the server is ending and takes no more requests")
        if self.in_flight >= self.most:
            raise refusal(429, f"{self.in_flight} requests are under way, which is the limit")
        use = _Use() if key is None else self._uses.setdefault(key.name, _Use())
        if key is not None:
            _check_key(key, use, time.monotonic())
        self.in_flight += 1
        use.running += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            use.running -= 1


def _check_key(key: Key, use: _Use, now: float) -> None:
    if key.concurrency is not None and use.running >= key.concurrency:
        raise refusal(429, f"this key may have {key.concurrency} requests at a time")
    if key.per_minute is not None:
        use.left = min(key.per_minute, use.left + (now - use.since) * key.per_minute / 60)
        use.since = now
        if use.left < 1:
            wait = math.ceil((1 - use.left) * 60 / key.per_minute)
            raise refusal(429, f"this key may begin {key.per_minute} requests a minute", wait)
        use.left -= 1
