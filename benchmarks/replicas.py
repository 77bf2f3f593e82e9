"""Replicas behind one front door: prefix hits kept, a replica killed in mid load, what the way through it costs.

python -m benchmarks.replicas [--parts hits kill way] [--json benchmarks/results/replicas.json]

`hits` replays one load (users with a system prompt of their own, conversations of several turns, each turn sent with
the answers before it, no pauses) on nano: to `pelagos serve`, to the front with one replica, with two, and with two and
a router that remembers nothing. Hits are the engines' own counts, in tokens; answers are greedy and must be the same
everywhere. `kill` ends one of two replicas with SIGKILL while streams run. `way` sends short requests and paced streams
with an engine that plays a script, to the server and to the front, and counts processor time of all processes.
Needs Ray: pip install 'ray[serve]'.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from benchmarks.serve_load import Client

from pelagos.evals.engine_bench import stamp

ROOT = Path(__file__).resolve().parents[1]
CHAT = "/v1/chat/completions"
SEED = 20261122
KEPT = 0.95  # of the hits of one engine, that two must have
USERS, CONVERSATIONS, TURNS, ANSWER = 8, 3, 6, 48
WORDS = (ROOT / "README.md").read_text(encoding="utf-8").split()
ENGINE = ("--model", "nano", "--max-requests", "8", "--kv-bytes", "1500000000", "--log-level", "error")
SERVER = ("-m", "pelagos", "serve")
FRONT = ("-m", "deploy.replicas")


class Running:
    """A server or a front in processes of its own."""

    def __init__(self, module: Sequence[str], *flags: str, replicas: int = 1) -> None:
        """Start it and wait until all of it is there."""
        self.began = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        environment.pop("OMP_NUM_THREADS", None)  # one engine takes all processors, each of two its share
        command = [sys.executable, *module, "--port", "0", *flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        said = ""
        while not (found := re.search(r"at (http://127.0.0.1:\d+)", said)):
            line = self.process.stderr.readline()
            if not line:
                raise RuntimeError(f"{' '.join(command)} ended: {said}")
            said += line
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.url = found[1]
        self.client = httpx.Client(base_url=self.url, timeout=120, trust_env=False)
        while self.client.get("/ready").status_code != 200 or self.running() < replicas:
            time.sleep(0.1)
        self.start_s = time.perf_counter() - self.began

    def running(self) -> int:
        """Replicas that answer; a server is one."""
        return self.client.get("/health").json().get("replicas", {"RUNNING": 1}).get("RUNNING", 0)

    def stats(self) -> dict[str, Any]:
        """What the engines counted, added up."""
        return self.client.get("/stats").json()

    def cpu_s(self) -> float:
        """Processor seconds of the process and of all that it started."""
        times: dict[int, tuple[int, float]] = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                times[int(folder.name)] = int(fields[1]), used

        def is_ours(pid: int) -> bool:
            return pid == self.process.pid or (pid in times and is_ours(times[pid][0]))

        return sum(used for pid, (_, used) in times.items() if is_ours(pid))

    def close(self) -> None:
        """Tell it to end and wait."""
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def main() -> int:
    """Measure, print one JSON object; the exit code says whether every bound held."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--json", type=Path, help="also write the result here; other parts that are there are kept")
    args = parser.parse_args()
    command = " ".join(["python -m benchmarks.replicas", *sys.argv[1:]])
    result = {part: {"stamp": stamp(command)} | PARTS[part]() for part in args.parts}
    if args.json is not None:
        before = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {}
        args.json.write_text(json.dumps(before | result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))
    return 0 if all(part["ok"] for part in result.values()) else 1


def text(pick: random.Random, words: int) -> str:
    """Some words."""
    return " ".join(pick.choices(WORDS, k=words))


def hits() -> dict[str, Any]:
    """The same load on one engine and on two."""
    setups = {
        "server": (SERVER, (), 1),
        "one": (FRONT, ("--replicas", "1"), 1),
        "two": (FRONT, ("--replicas", "2"), 2),
        "two_without_map": (FRONT, ("--replicas", "2", "--entries", "1"), 2),
    }
    figures: dict[str, dict[str, Any]] = {}
    answers: dict[str, dict[str, list[str]]] = {}
    for name, (module, flags, replicas) in setups.items():
        running = Running(module, *flags, *ENGINE, replicas=replicas)
        try:
            figures[name], answers[name] = _replay(running)
        finally:
            running.close()
    kept = {
        name: {kind: round(each[kind] / figures["one"][kind], 4) for kind in ("hit_tokens", "cached_tokens")}
        for name, each in figures.items()
    }
    same = {name: each == answers["server"] for name, each in answers.items()}
    return {
        "users": USERS, "conversations": CONVERSATIONS, "turns": TURNS, "setups": figures, "kept_of_one": kept,
        "answers_same_as_server": same,
        "ok": min(kept["two"].values()) >= KEPT and all(same.values()),
    }  # fmt: skip


def _replay(running: Running) -> tuple[dict[str, Any], dict[str, list[str]]]:
    before, used = running.stats(), running.cpu_s()
    said: dict[str, list[str]] = {}
    first: list[float] = []

    def converse(user: int, conversation: int) -> None:
        pick = random.Random(f"{SEED} {user} {conversation}")
        messages = [{"role": "system", "content": text(random.Random(f"{SEED} {user}"), 150)}]
        ours = said[f"{user}.{conversation}"] = []
        for _ in range(TURNS):
            messages.append({"role": "user", "content": text(pick, pick.randrange(20, 120))})
            body = {
                "messages": messages, "user": f"user {user}", "max_tokens": ANSWER, "temperature": 0, "stream": True,
                "thinking": {"type": "disabled"},
            }  # fmt: skip
            began, answer = time.perf_counter(), ""
            with running.client.stream("POST", CHAT, json=body) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        delta = json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                        if delta and not answer:
                            first.append(time.perf_counter() - began)
                        answer += delta
            messages.append({"role": "assistant", "content": answer})
            ours.append(answer)

    def run(user: int) -> None:
        for conversation in range(CONVERSATIONS):
            converse(user, conversation)

    began = time.perf_counter()
    with ThreadPoolExecutor(USERS) as threads:
        for future in [threads.submit(run, user) for user in range(USERS)]:
            future.result()
    seconds, after = time.perf_counter() - began, running.stats()
    counted = {
        name: after[name] - before[name]
        for name in ("prompt_tokens", "hit_tokens", "cached_tokens", "computed_tokens", "generated_tokens")
    }
    shares = [each["stats"]["prompt_tokens"] for each in after.get("by_replica", ())]
    figures = counted | {
        "hit_share": round(counted["cached_tokens"] / counted["prompt_tokens"], 4),
        "seconds": round(seconds, 2), "generated_tokens_s": round(counted["generated_tokens"] / seconds, 1),
        "first_token_ms_p50": round(statistics.median(first) * 1e3, 1), "cpu_s": round(running.cpu_s() - used, 1),
        "prompt_tokens_by_replica": shares, "start_s": round(running.start_s, 1),
    }  # fmt: skip
    return figures, said


def kill() -> dict[str, Any]:
    """Streams on two replicas, one of which is killed."""
    running = Running(FRONT, "--replicas", "2", *ENGINE, replicas=2)
    stop, killed_at = threading.Event(), 0.0
    ends: list[dict[str, Any]] = []

    def ask(user: int) -> None:
        pick = random.Random(f"{SEED} {user}")
        while not stop.is_set():
            body = {"prompt": text(pick, 60), "max_tokens": 250, "user": f"user {user}", "stream": True}
            began = time.perf_counter()
            end: dict[str, Any] = {"began": began, "replica": None}
            try:
                with running.client.stream("POST", "/v1/completions", json=body) as response:
                    said = response.read().decode()
                    end |= {"status": response.status_code, "replica": response.headers.get("x-pelagos-replica")}
                error = re.search(r'"error": {"message": "([^"]*)"', said)
                end |= {"error": error and error[1], "whole": '"finish_reason": "' in said and error is None}
            except httpx.HTTPError as problem:
                end |= {"status": 0, "error": type(problem).__name__, "whole": False}
            ends.append(end | {"ended": time.perf_counter()})

    try:
        with ThreadPoolExecutor(USERS) as threads:
            asked = [threads.submit(ask, user) for user in range(USERS)]
            time.sleep(5)
            victim = running.stats()["by_replica"][0]
            os.kill(victim["pid"], signal.SIGKILL)
            killed_at = time.perf_counter()
            noticed = back = None
            while back is None and time.perf_counter() - killed_at < 90:
                count, now = running.running(), time.perf_counter() - killed_at
                noticed = noticed or (now if count < 2 else None)
                back = now if noticed and count == 2 else None
                time.sleep(0.1)
            time.sleep(5)
            stop.set()
            for future in asked:
                future.result()
        names = {each["replica"] for each in running.stats()["by_replica"]}
    finally:
        stop.set()
        running.close()
    lost = [end for end in ends if not end["whole"]]
    there = [end for end in ends if end["began"] < killed_at < end["ended"]]
    others = [end for end in there if end["replica"] != victim["replica"]]
    meanwhile = [end for end in ends if killed_at < end["began"] < killed_at + (back or 90)]
    new = [end for end in ends if end["replica"] in names and end["replica"] not in {e["replica"] for e in there}]
    return {
        "requests": len(ends), "under_way_at_the_kill": len(there), "of_the_killed_one": len(there) - len(others),
        "lost": len(lost), "lost_of_others": sum(not end["whole"] for end in others),
        "what_the_lost_were_told": Counter(str(end["error"]) for end in lost),
        "noticed_after_s": noticed and round(noticed, 1), "back_after_s": back and round(back, 1),
        "answered_meanwhile": sum(end["whole"] for end in meanwhile), "failed_meanwhile": sum(
            not end["whole"] for end in meanwhile
        ), "answered_by_the_new_one": len(new),
        "ok": bool(lost) and all(end["replica"] == victim["replica"] and "ask again" in end["error"] for end in lost)
        and len(lost) == len(there) - len(others) and back is not None and bool(new),
    }  # fmt: skip


def way() -> dict[str, Any]:
    """What a request and a token cost on their way through the front."""
    rules = [{"when": "pace", "reply": "word " * 99 + "word", "token_delay_ms": 50}, {"when": "", "reply": "Hello"}]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.json"
        script.write_text(json.dumps({"rules": rules}))
        flags = ("--engine", f"scripted:{script}", "--log-level", "error")
        setups = {"server": (SERVER, (), 1), "two": (FRONT, ("--replicas", "2"), 2)}
        figures: dict[str, Any] = {}
        for name, (module, more, replicas) in setups.items():
            running = Running(module, *more, *flags, replicas=replicas)
            try:
                asyncio.run(_load(running, "short", 16, 4))  # warm
                used, began = running.cpu_s(), time.perf_counter()
                asyncio.run(_load(running, "short", 16, 40))
                seconds, used = time.perf_counter() - began, running.cpu_s() - used
                alone = asyncio.run(_load(running, "short", 1, 60))
                before = running.cpu_s()
                paced = asyncio.run(_load(running, "pace", 16, 1))
                tokens_s = running.cpu_s() - before
            finally:
                running.close()
            over = sorted(max(0.0, gap * 1e3 - 50) for client in paced for gap in client.gaps[1:-1])
            figures[name] = {
                "requests_s": round(640 / seconds, 1), "cpu_ms_a_request": round(used / 640 * 1e3, 2),
                "cpu_ms_a_frame": round(tokens_s / sum(client.frames for client in paced) * 1e3, 3),
                "alone_ms_a_request": round(alone[0].seconds / 60 * 1e3, 2),
                "over_pace_ms_p50": round(over[len(over) // 2], 2),
                "over_pace_ms_p99": round(over[len(over) * 99 // 100], 2),
            }  # fmt: skip
    return {"streams": 16, "pace_ms": 50, **figures, "ok": True}


class Timed(Client):
    """A client that knows how long it took."""

    seconds = 0.0


async def _load(running: Running, kind: str, streams: int, times: int) -> list[Timed]:
    body = {"messages": [{"role": "user", "content": kind}], "stream": True, "thinking": {"type": "disabled"}}
    raw = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
    port = int(running.url.rpartition(":")[2])

    async def one() -> Timed:
        began = time.perf_counter()
        _, client = await asyncio.get_running_loop().create_connection(
            lambda: Timed(head + raw, times), "127.0.0.1", port
        )
        await asyncio.wait_for(client.done, 120)
        client.seconds = time.perf_counter() - began
        return client

    return list(await asyncio.gather(*(one() for _ in range(streams))))


PARTS = {"hits": hits, "kill": kill, "way": way}

if __name__ == "__main__":
    sys.exit(main())
