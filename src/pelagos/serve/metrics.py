"""What the server counts, as Prometheus text for `/metrics` and as JSON for `/stats`, and one log line a request."""

import collections
import contextlib
import dataclasses
import json
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pelagos.engine import EngineStats
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
    "state_bytes_cached disk bytes_planned"
).split()
M = TypeVar("M", Counter, Gauge, Histogram)
_log = logging.getLogger("pelagos.access")


class Metrics:
    """The counters of one server."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        """`stats` returns the engine's statistics, zeros while there is no engine."""
        self._stats, self._began = stats, time.monotonic()
        self._samples: deque[tuple[float, EngineStats]] = deque()
        self._totals: collections.Counter[str] = collections.Counter()
        self.registry = CollectorRegistry()

        def make(kind: type[M], name: str, about: str, *labels: str, **more: Any) -> M:
            return kind(f"pelagos_{name}", about, labels, registry=self.registry, **more)

        self._tokens = {
            "prompt": make(Counter, "prompt_tokens", "Tokens of prompts.", "api"),
            "cached": make(Counter, "cached_tokens", "Tokens of prompts that were not computed again.", "api"),
            "completion": make(Counter, "completion_tokens", "Tokens of answers.", "api"),
        }
        self._requests = make(Counter, "requests", "Requests that ended.", "api", "status")
        self._rejected = make(Counter, "rejected", "Requests refused with 429 or 503.", "status")
        self._gone = make(Counter, "disconnects", "Clients that left first.", "phase")
        self._in_flight = make(Gauge, "requests_in_flight", "Requests under way.")
        about = "Seconds from a request to its first token."
        self._first = make(Histogram, "first_token_seconds", about, "api", buckets=WAIT_SECONDS)
        about = "Seconds a token after the first, mean of an answer."
        self._each = make(Histogram, "token_seconds", about, "api", buckets=TOKEN_SECONDS)
        about = "Seconds from a request to its end."
        self._whole = make(Histogram, "request_seconds", about, "api", buckets=WAIT_SECONDS)
        ProcessCollector("pelagos", registry=self.registry)
        self.registry.register(self)

    def finish(self, exchange: Exchange) -> None:
        """Count an exchange that has ended and log it, without a word of what was said."""
        now, api, status = time.perf_counter(), exchange.kind, str(exchange.status)
        fields: dict[str, Any] = {
            "request_id": exchange.id, "api": api, "method": exchange.method, "status": exchange.status,
            "ms": round((now - exchange.began) * 1e3, 1), "key": exchange.key and exchange.key.name,
        }  # fmt: skip
        self._requests.labels(api, status).inc()
        if status in ("429", "503"):
            self._rejected.labels(status).inc()
            self._totals["rejected"] += 1
        if exchange.is_gone:
            self._gone.labels(exchange.phase).inc()
            self._totals["disconnects"] += 1
            fields["gone"] = exchange.phase
        if (answer := exchange.answer) is not None:
            fields |= {"model": exchange.model, "stream": exchange.streams, "finish_reason": answer.finish_reason}
            fields |= {"warnings": answer.warnings} if answer.warnings else {}
            for kind, counter in self._tokens.items():
                count = fields[f"{kind}_tokens"] = getattr(answer, f"{kind}_tokens")
                counter.labels(api).inc(count)
            self._whole.labels(api).observe(now - exchange.began)
            if exchange.first is not None:
                fields["first_token_ms"] = round((exchange.first - exchange.began) * 1e3, 1)
                self._first.labels(api).observe(exchange.first - exchange.began)
                self._each.labels(api).observe((now - exchange.first) / max(1, answer.completion_tokens - 1))
        level = logging.DEBUG if api in ("read", "page") and exchange.status < 400 else logging.INFO
        _log.log(level, "request", extra={"fields": fields})

    def text(self, in_flight: int) -> bytes:
        """Everything in the Prometheus text format."""
        self._in_flight.set(in_flight)
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's part of it, `pelagos_engine_*`, read when asked for."""
        for name, value in dataclasses.asdict(self._stats()).items():
            parts = {(key,): each for key, each in value.items()} if isinstance(value, dict) else {(): value}
            kind = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            about, labels = f"Engine: {name.replace('_', ' ')}.", ["part"] if isinstance(value, dict) else []
            family = kind(f"pelagos_engine_{name}", about, labels=labels)
            for part, each in parts.items():
                family.add_metric(part, each)
            yield family

    def report(self, in_flight: int) -> dict[str, Any]:
        """The engine's statistics and how fast they grow, a second, over the last seconds that were asked about."""
        now, stats, samples = time.monotonic(), self._stats(), self._samples
        while len(samples) > 1 and samples[1][0] < now - RATE_SECONDS:
            samples.popleft()
        if not samples or samples[-1][0] < now - 0.5:
            samples.append((now, stats))
        past, old = now - samples[0][0], samples[0][1]
        rates = {name: (getattr(stats, of) - getattr(old, of)) / past if past else 0.0 for name, of in RATES.items()}
        counts = {name: self._totals[name] for name in ("rejected", "disconnects")}
        now_here = {"uptime_seconds": now - self._began, "in_flight": in_flight, "rates": rates}
        return now_here | counts | dataclasses.asdict(stats)


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


@contextlib.contextmanager
def logging_to_stderr(level: str) -> Iterator[None]:
    """Send this process's log there as JSON lines: ours from `level` on, of libraries warnings only."""
    handler, ours = logging.StreamHandler(), logging.getLogger("pelagos")
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)
    ours.setLevel(level.upper())
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        ours.setLevel(logging.NOTSET)
