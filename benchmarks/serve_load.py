"""The server under load: many streams beside a bare server of the same framework, and clients that drop.

python -m benchmarks.serve_load [--streams 256] [--drops N] [--rounds 3] [--json FILE]

Both servers run in a process of their own, on the same uvicorn, and send as many tokens: ours reads the request,
renders, tokenises, runs the scripted engine, parses its tokens and writes chat completion chunks, several tokens in one
where they come faster than they go; the bare one sends prepared text through a StreamingResponse, a chunk a token.
`requests_s` is measured with tokens that take no time, `overhead_ms` (what a token takes beyond its pace, as a client
sees it) with tokens that come every --pace-ms. --drops instead opens that many connections and drops each somewhere
between its first byte and its last token, then counts what is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from pelagos.evals.engine_bench import stamp
from pelagos.serve import App, Settings
from pelagos.serve.run import Server, load_llm

WORDS = "the sea is wide and the ship goes on "
PATH = "/v1/chat/completions"
LIMITS = {"requests_s": 2.0, "overhead_ms_p99": 2.0}  # times the bare server's
SEED = 20261122
PHASES = ("head", "body", "queue", "answer", "whole")


def main() -> int:
    """Measure, print one JSON object; the exit code says whether every bound held."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_load", description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256, help="streams at a time")
    parser.add_argument("--tokens", type=int, default=64, help="tokens an answer has, about")
    parser.add_argument("--pace-ms", type=float, default=100.0, help="milliseconds between the tokens of a stream")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each server, in turns")
    parser.add_argument("--drops", type=int, default=0, help="connections to drop, in place of the streams")
    parser.add_argument("--json", type=Path, help="also write the result here; what it has of the other kind is kept")
    parser.add_argument("--serve", choices=("ours", "bare"), help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--chunks", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return _serve(args)
    result = _drops(args) if args.drops else _streams(args)
    text = json.dumps(result, indent=1)
    if args.json is not None:
        before = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {}
        args.json.write_text(
            json.dumps(before | {"drops" if args.drops else "streams": result}, indent=1) + "\n", "utf-8"
        )
    print(text)
    return 0 if result["ok"] else 1


def _stamp() -> dict[str, Any]:
    return stamp(" ".join(["python -m benchmarks.serve_load", *sys.argv[1:]]))


def _serve(args: argparse.Namespace) -> int:
    if args.serve == "ours":
        reply = (WORDS * (args.tokens // 8 + 1)).strip()
        rules = [{"when": f"pace {pace}", "reply": reply, "token_delay_ms": ms} for pace, ms in _paces(args).items()]
        with tempfile.NamedTemporaryFile("w", suffix=".json") as script:
            json.dump({"rules": rules}, script)
            script.flush()
            settings = Settings(engine=f"scripted:{script.name}", log_level="warning", max_queued=1 << 20)
            llm = load_llm(settings)
        server: uvicorn.Server = Server(App(llm, settings=settings))
    else:
        server = uvicorn.Server(
            uvicorn.Config(_bare(args), log_level="warning", access_log=False, http="h11", ws="none")
        )
    server.config.port = 0

    async def run() -> None:
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        await serving

    asyncio.run(run())
    return 0


def _paces(args: argparse.Namespace) -> dict[str, float]:
    return {"none": 0.0, "slow": args.pace_ms}


def _bare(args: argparse.Namespace) -> Starlette:
    frame = {
        "id": "0" * 36, "created": 0, "model": "nano", "system_fingerprint": "fp_pelagos",
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"content": "token"}, "finish_reason": None, "logprobs": None}],
    }  # fmt: skip
    chunk = f"data: {json.dumps(frame)}\n\n"

    async def chunks(seconds: float) -> AsyncIterator[str]:
        for _ in range(args.chunks):
            if seconds:
                await asyncio.sleep(seconds)
            yield chunk
        yield "data: [DONE]\n\n"

    async def endpoint(request: Request) -> StreamingResponse:
        pace = "slow" if b"pace slow" in await request.body() else "none"
        return StreamingResponse(chunks(_paces(args)[pace] / 1e3), media_type="text/event-stream")

    return Starlette(routes=[Route(PATH, endpoint, methods=["POST"])])


class Process:
    """One of the servers, started; `port` is where it listens."""

    def __init__(self, kind: str, args: argparse.Namespace, chunks: int = 0) -> None:
        command = [sys.executable, "-m", "benchmarks.serve_load", "--serve", kind, "--chunks", str(chunks)]
        command += ["--tokens", str(args.tokens), "--pace-ms", str(args.pace_ms)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()

    def cpu_seconds(self) -> float:
        """Processor time it has used; other work on the machine does not count."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stats(self) -> dict[str, Any]:
        """What it says of itself."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats") as answer:
            return json.load(answer)

    def held(self) -> dict[str, int]:
        """File descriptors and resident bytes of the process."""
        root = Path(f"/proc/{self.process.pid}")
        pages = int((root / "statm").read_text().split()[1])
        return {"descriptors": len(list((root / "fd").iterdir())), "resident_bytes": pages * os.sysconf("SC_PAGESIZE")}


class Client(asyncio.Protocol):
    """One connection that asks again and again; notes when frames came."""

    def __init__(self, request: bytes, times: int) -> None:
        self.request, self.left = request, times
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.frames = 0
        self.gaps: list[float] = []
        self._last: float | None = None
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Count what came; after the end mark ask again, or stop."""
        now = time.perf_counter()
        if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(RuntimeError(data.decode()))
            self.transport.abort()
        if came := data.count(b"data: {"):
            self.frames += came
            if self._last is not None:
                self.gaps += [now - self._last, *[0.0] * (came - 1)]
            self._last = now
        tail = self._tail + data
        if tail.endswith(b"\r\n0\r\n\r\n"):
            self.left -= 1
            self._last, tail = None, b""
            if self.left:
                self.transport.write(self.request)
            else:
                self.transport.close()
        self._tail = tail[-16:]

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of it, or a failure."""
        if not self.done.done():
            self.done.set_result(None) if not self.left else self.done.set_exception(exc or EOFError("cut"))


def _request(pace: str, **more: Any) -> bytes:
    body = {
        "messages": [{"role": "user", "content": f"pace {pace}"}], "stream": True, "max_tokens": 4096,
        "thinking": {"type": "disabled"}, **more,
    }  # fmt: skip
    raw = json.dumps(body).encode()
    return f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw


async def _load(port: int, streams: int, pace: str, times: int, spread_s: float) -> tuple[float, list[Client]]:
    """Run `streams` connections of `times` requests each; seconds taken, and the clients."""
    loop, request, pick = asyncio.get_running_loop(), _request(pace), random.Random(SEED)
    clients: list[Client] = []

    async def one(wait: float) -> None:
        await asyncio.sleep(wait)
        _, client = await loop.create_connection(lambda: Client(request, times), "127.0.0.1", port)
        clients.append(client)
        await asyncio.wait_for(client.done, 120)

    began = time.perf_counter()
    await asyncio.gather(*(one(pick.uniform(0, spread_s)) for _ in range(streams)))
    return time.perf_counter() - began, clients


def _measure(server: Process, args: argparse.Namespace) -> dict[str, float]:
    before = server.cpu_seconds()
    seconds, _ = asyncio.run(_load(server.port, args.streams, "none", 4, 0.0))
    figures = {"requests_s": args.streams * 4 / seconds}
    figures["cpu_ms_a_request"] = (server.cpu_seconds() - before) / (args.streams * 4) * 1e3
    _, clients = asyncio.run(_load(server.port, args.streams, "slow", 1, args.pace_ms / 1e3))
    # The frames that open and close an answer come with their neighbours: gaps of nothing, of no token.
    over = sorted(max(0.0, gap * 1e3 - args.pace_ms) for client in clients for gap in client.gaps[1:-1])
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        figures[f"overhead_ms_{name}"] = over[int(part * (len(over) - 1))]
    return figures


def _streams(args: argparse.Namespace) -> dict[str, Any]:
    ours = Process("ours", args)
    asyncio.run(_load(ours.port, 1, "none", 1, 0.0))
    tokens = ours.stats()["generated_tokens"]
    bare = Process("bare", args, tokens)
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "bare": []}
    try:
        for server in (ours, bare):
            asyncio.run(_load(server.port, args.streams, "none", 1, 0.0))  # warm
        for _ in range(args.rounds):
            for name, server in (("ours", ours), ("bare", bare)):
                rounds[name].append(_measure(server, args))
        left = ours.stats()
    finally:
        ours.close()
        bare.close()
    middle = {
        name: {key: round(statistics.median(each[key] for each in figures), 3) for key in figures[0]}
        for name, figures in rounds.items()
    }
    ratios = {
        "requests_s": middle["bare"]["requests_s"] / middle["ours"]["requests_s"],
        "cpu_ms_a_request": middle["ours"]["cpu_ms_a_request"] / middle["bare"]["cpu_ms_a_request"],
        "overhead_ms_p99": middle["ours"]["overhead_ms_p99"] / middle["bare"]["overhead_ms_p99"],
    }
    return {
        "stamp": _stamp(), "streams": args.streams, "pace_ms": args.pace_ms,
        "tokens_an_answer": tokens, **middle, "times_worse": {k: round(v, 3) for k, v in ratios.items()},
        "rounds": rounds, "left_running": left["requests_running"],
        "ok": all(ratios[name] <= LIMITS[name] for name in LIMITS) and left["requests_running"] == 0,
    }  # fmt: skip


async def _drop(port: int, phase: str, pick: random.Random) -> None:
    """Open one connection and leave it in a phase of its request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = _request("slow", stream=phase != "whole")
    head = raw.index(b"\r\n\r\n") + 4
    try:
        if phase == "head":
            writer.write(raw[: pick.randrange(head)])
        elif phase == "body":
            writer.write(raw[: pick.randrange(head, len(raw))])
        else:
            writer.write(raw)
            if phase == "answer":
                await reader.readuntil(b"data: {")
        await writer.drain()
        await asyncio.sleep(pick.uniform(0, 0.05))
        writer.transport.abort() if pick.random() < 0.5 else writer.close()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass


def _drops(args: argparse.Namespace) -> dict[str, Any]:
    server, pick = Process("ours", args), random.Random(SEED)
    phases = [pick.choice(PHASES) for _ in range(args.drops)]

    async def run(some: list[str]) -> None:
        gate = asyncio.Semaphore(args.streams)

        async def one(phase: str) -> None:
            async with gate:
                await _drop(server.port, phase, pick)

        await asyncio.gather(*map(one, some))

    try:
        asyncio.run(run([phase for phase in PHASES for _ in range(40)]))  # warm: threads, pools, caches of code
        before = _quiet(server)
        began = time.perf_counter()
        asyncio.run(run(phases))
        seconds = time.perf_counter() - began
        after = _quiet(server)
    finally:
        server.close()
    clean = after["in_flight"] == after["requests_running"] == 0 and after["descriptors"] <= before["descriptors"]
    return {
        "stamp": _stamp(), "drops": args.drops, "phases": Counter(phases), "seconds": round(seconds, 1),
        "before": before, "after": after, "ok": clean,
    }  # fmt: skip


def _quiet(server: Process) -> dict[str, int]:
    """What the server holds once nothing has changed for a while."""
    for _ in range(100):
        time.sleep(0.2)
        stats = server.stats()
        held = server.held() | {name: stats[name] for name in ("in_flight", "requests_running", "disconnects")}
        if not held["in_flight"] and not held["requests_running"]:
            time.sleep(1.0)
            return server.held() | {
                name: server.stats()[name] for name in ("in_flight", "requests_running", "disconnects")
            }
    return held


if __name__ == "__main__":
    sys.exit(main())
