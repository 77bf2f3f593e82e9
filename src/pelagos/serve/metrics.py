"""What the server counts, as Prometheus text for `/metrics` and as JSON for `/stats`, and one log line a request."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from pelagos.engine import EngineStats

if TYPE_CHECKING:
    from pelagos.serve.exchange import Exchange

TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
WAIT_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
RATES = {
    "generated_tokens": "generated_tokens", "prompt_tokens": "prompt_tokens", "steps": "steps",
    "requests": "requests_done", "accepted_drafts": "accepted_drafts",
}  # fmt: skip
RATE_SECONDS = 10.0
# What the engine has at a moment; all else in its statistics only grows.
_GAUGES = (
    "requests_running requests_waiting pages_total pages_in_use pages_cached slots_total slots_in_use states_cached "
    "state_bytes_cached"
).split()
_log = logging.getLogger("pelagos.access")


class Metrics:
    """The counters of one server."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        """`stats` returns the engine's statistics, zeros while there is no engine."""
        self._stats, self.began = stats, time.monotonic()
        self._samples: deque[tuple[float, EngineStats]] = deque()
        self.registry = registry = CollectorRegistry()
        kinds = (("prompt", "of prompts"), ("cached", "of prompts not computed again"), ("completion", "of answers"))
        self._tokens = {
            kind: Counter(f"pelagos_{kind}_tokens", f"Tokens {what}, by protocol.", ["api"], registry=registry)
            for kind, what in kinds
        }
        self._requests = Counter("pelagos_requests", "Requests that ended.", ["api", "status"], registry=registry)
        self._rejected = Counter("pelagos_rejected", "Requests refused with 429 or 503.", ["status"], registry=registry)
        self._gone = Counter("pelagos_disconnects", "Clients that left first.", ["phase"], registry=registry)
        self._in_flight = Gauge("pelagos_requests_in_flight", "Requests under way.", registry=registry)
        about = "Seconds from a request to its first token."
        self._first = Histogram("pelagos_first_token_seconds", about, ["api"], buckets=WAIT_SECONDS, registry=registry)
        about = "Seconds a token after the first, mean of an answer."
        self._each = Histogram("pelagos_token_seconds", about, ["api"], buckets=TOKEN_SECONDS, registry=registry)
        about = "Seconds from a request to its end."
        self._whole = Histogram("pelagos_request_seconds", about, ["api"], buckets=WAIT_SECONDS, registry=registry)
        ProcessCollector("pelagos", registry=registry)
        registry.register(_EngineCollector(stats))

    def finish(self, exchange: Exchange) -> None:
        """Count an exchange that has ended and log it, without a word of what was said."""
        now, api, status = time.perf_counter(), exchange.kind, str(exchange.status)
        self._requests.labels(api, status).inc()
        if status in ("429", "503"):
            self._rejected.labels(status).inc()
        if exchange.is_gone:
            self._gone.labels(exchange.phase).inc()
        fields: dict[str, Any] = {
            "request_id": exchange.id, "api": api, "method": exchange.method, "status": exchange.status,
            "ms": round((now - exchange.began) * 1e3, 1), "key": exchange.key and exchange.key.name,
        }  # fmt: skip
        if exchange.is_gone:
            fields["gone"] = exchange.phase
        if (answer := exchange.answer) is not None:
            tokens = {
                "prompt": answer.prompt_tokens,
                "cached": answer.cached_tokens,
                "completion": answer.completion_tokens,
            }
            for kind, count in tokens.items():
                self._tokens[kind].labels(api).inc(count)
            self._whole.labels(api).observe(now - exchange.began)
            fields |= {f"{kind}_tokens": count for kind, count in tokens.items()}
            fields |= {"model": exchange.model, "stream": exchange.streams, "finish_reason": answer.finish_reason}
            if exchange.first is not None:
                fields["first_token_ms"] = round((exchange.first - exchange.began) * 1e3, 1)
                self._first.labels(api).observe(exchange.first - exchange.began)
                if tokens["completion"] > 1:
                    self._each.labels(api).observe((now - exchange.first) / (tokens["completion"] - 1))
        level = logging.DEBUG if api in ("read", "page") and exchange.status < 400 else logging.INFO
        if _log.isEnabledFor(level):
            _log.log(level, "request", extra={"fields": fields})

    def text(self, in_flight: int) -> bytes:
        """Everything in the Prometheus text format."""
        self._in_flight.set(in_flight)
        return generate_latest(self.registry)

    def report(self, in_flight: int) -> dict[str, Any]:
        """The engine's statistics and how fast they grow, a second, over the last seconds that were asked about."""
        now, stats = time.monotonic(), self._stats()
        while len(self._samples) > 1 and self._samples[1][0] < now - RATE_SECONDS:
            self._samples.popleft()
        if not self._samples or self._samples[-1][0] < now - 0.5:
            self._samples.append((now, stats))
        then, old = self._samples[0]
        past = now - then
        rates = {name: (getattr(stats, of) - getattr(old, of)) / past if past else 0.0 for name, of in RATES.items()}
        counts = {"rejected": self._rejected, "disconnects": self._gone}
        return {
            "uptime_seconds": now - self.began, "in_flight": in_flight, "rates": rates,
            **{name: _total(counter) for name, counter in counts.items()}, **dataclasses.asdict(stats),
        }  # fmt: skip


def _total(counter: Counter) -> int:
    [family] = counter.collect()
    return int(sum(sample.value for sample in family.samples if sample.name.endswith("_total")))


class _EngineCollector:
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """`pelagos_engine_*`, read when asked for."""
        stats = self._stats()
        for field in dataclasses.fields(EngineStats):
            value, name, words = (
                getattr(stats, field.name),
                f"pelagos_engine_{field.name}",
                field.name.replace("_", " "),
            )
            if isinstance(value, dict):
                label = "counter" if field.name == "disk" else "part"
                family = GaugeMetricFamily(name, f"Engine: {words}.", labels=[label])
                for key, each in value.items():
                    family.add_metric([key], each)
                yield family
            elif field.name in _GAUGES:
                yield GaugeMetricFamily(name, f"Engine: {words}.", value=value)
            else:
                yield CounterMetricFamily(name, f"Engine: {words}.", value=value)


class JsonLines(logging.Formatter):
    """One JSON object a line; of an exception its type and where it was raised, as its words may quote a prompt."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of one record."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            line["traceback"] = traceback.format_tb(record.exc_info[2])
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr(level: str) -> None:
    """Send this process's log there as JSON lines: ours from `level` on, of libraries warnings only."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pelagos").setLevel(level.upper())
