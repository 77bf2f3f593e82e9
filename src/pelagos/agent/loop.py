"""The loop: ask the model, do what it asks with two tools in a sandbox, tell it what came of it, until it is done.

Every turn is a line of the transcript before the next one begins. What a tool did is in the sandbox's own log under the
turn's request id, so an agent that was killed goes on from its transcript and runs nothing twice.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pelagos.agent.model import Model
from pelagos.errors import DataError, SandboxError, UnknownOutcome
from pelagos.sandbox import Sandbox

SHOWN_BYTES = 16_000  # of what a command said: its head and its tail
TIMEOUT_S, MOST_S = 120.0, 600.0
FORMAT = 1
SYSTEM = (
    "You are a coding agent in a Linux sandbox without network. Your files are in /workspace, where commands start. "
    "Use the tools to look, change and check; state does not carry over between commands but in files. "
    "When the task is done, answer in words without calling a tool."
)
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {
        "name": "bash", "description": "Run a shell command in /workspace; returns what it printed and its exit code.",
        "parameters": {"type": "object", "required": ["command"], "properties": {
            "command": {"type": "string"}, "timeout": {"type": "number", "description": "seconds, at most 600"}}}}},
    {"type": "function", "function": {
        "name": "edit", "description": "Replace `old`, which must occur exactly once in the file, by `new`; "
                                       "an empty `old` writes `new` as the whole file.",
        "parameters": {"type": "object", "required": ["path", "old", "new"], "properties": {
            "path": {"type": "string"}, "old": {"type": "string"}, "new": {"type": "string"}}}}},
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended: "done", "turns" (too many) or "length" (the model's own limit), and what it cost."""

    ended: str
    turns: int
    answer: str
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return dataclasses.asdict(self)


class Agent:
    """One task in one sandbox; `transcript` is a JSONL file that says all that was said and done."""

    def __init__(self, box: Sandbox, transcript: Path, *, max_turns: int = 50) -> None:
        self._box, self._path, self._most = box, transcript, max_turns

    def run(
        self, instruction: str, model: Model, *, on_turn: Callable[[dict[str, Any]], None] | None = None
    ) -> Outcome:
        """Work until the model calls no tool; a transcript that exists is gone on with, if it is of this run."""
        past = read_transcript(self._path) if self._path.exists() else []
        head = {"format": FORMAT, "instruction": instruction, "model": model.name, "sandbox": self._box.id}
        if past and past[0] != head:
            raise DataError(f"{self._path}: a transcript of another run ({past[0]}); choose another file")
        if not past:
            self._append(head)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": instruction}]
        told, tokens = past[1:], 0
        for turn in range(self._most):
            record = told[turn] if turn < len(told) else None
            if record is None:
                record = {"turn": turn, **model.complete(messages, TOOLS)}
                self._append(record)
            messages.append(record["message"])
            tokens += int((record.get("usage") or {}).get("total_tokens", 0))
            calls = record["message"].get("tool_calls") or []
            results = [self._call(f"turn{turn}.{n}", call) for n, call in enumerate(calls)]
            messages += results
            if on_turn is not None:
                on_turn({**record, "results": results})
            if not calls:
                ended = "length" if record.get("finish_reason") == "length" else "done"
                said = record["message"].get("content") or ""
                return Outcome(ended=ended, turns=turn + 1, answer=said, tokens=tokens)
        return Outcome(ended="turns", turns=self._most, answer="", tokens=tokens)

    def _append(self, record: dict[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _call(self, request: str, call: Any) -> dict[str, Any]:
        """Do one tool call; whatever is wrong with it is told to the model."""
        name, text = "", ""
        try:
            function = call["function"]
            name, arguments = function["name"], json.loads(function["arguments"] or "{}")
            if name == "bash":
                text = self._bash(request, **arguments)
            elif name == "edit":
                text = self._edit(request, **arguments)
            else:
                text = f"error: there is no tool {name!r}; there are bash and edit"
        except UnknownOutcome:
            # It began before a crash: it may have run, so it is not run again and the model is told to look.
            self._box.resolve(next(iter(self._box.info()["unknown"])), "abandon")
            text = "error: interrupted; the command may have run in part or whole. Look before you go on."
        except (KeyError, TypeError, ValueError, AttributeError, SandboxError) as error:
            text = f"error: {error}"
        identity = call.get("id", request) if isinstance(call, dict) else request
        return {"role": "tool", "tool_call_id": identity, "content": text}

    def _bash(self, request: str, command: str, timeout: float = TIMEOUT_S) -> str:
        if not isinstance(command, str) or not isinstance(timeout, (int, float)):
            raise TypeError("bash takes a text `command` and a number `timeout`")
        done = self._box.exec(["bash", "-c", command], timeout=min(float(timeout), MOST_S), request_id=request)
        out = _shown(done.stdout) + (("\n[stderr]\n" + _shown(done.stderr)) if done.stderr else "")
        notes = [f"exit code {done.exit_code}"]
        notes += ["output cut"] * done.truncated + ["timed out and killed"] * done.timed_out
        notes += [f"killed: over its {done.killed_by} limit"] if done.killed_by else []
        return f"{out}\n[{', '.join(notes)}]"

    def _edit(self, request: str, path: str, old: str, new: str) -> str:
        if not all(isinstance(word, str) for word in (path, old, new)):
            raise TypeError("edit takes the texts `path`, `old` and `new`")
        if old:
            text = self._box.files.read(path, request_id=f"{request}.read").decode("utf-8")
            if (count := text.count(old)) != 1:
                return f"error: `old` occurs {count} times in {path}; it must occur once"
            new = text.replace(old, new)
        self._box.files.write(path, new, request_id=request)
        return f"wrote {path} ({len(new)} characters)"


def replay(transcript: Path, box: Sandbox) -> list[dict[str, Any]]:
    """Do a transcript's tool calls again in another sandbox, no model asked; return the results turn by turn."""
    head, *turns = read_transcript(transcript)
    agent = Agent(box, transcript)
    told = [{"instruction": head["instruction"]}]
    for record in turns:
        if calls := record["message"].get("tool_calls") or []:
            results = [agent._call(f"turn{record['turn']}.{n}", call) for n, call in enumerate(calls)]
            told.append({"turn": record["turn"], "results": results})
    return told


def read_transcript(path: Path) -> list[dict[str, Any]]:
    """Read a transcript; a torn last line was never acted on and is dropped. DataError for anything else."""
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()
    try:
        records = [json.loads(line) for line in lines]
        if not records or records[0]["format"] != FORMAT or any(r["turn"] != n for n, r in enumerate(records[1:])):
            raise ValueError(f"expected a head of format {FORMAT} and turns in order")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no transcript this build reads ({error})") from None
    if torn:
        path.write_bytes(b"\n".join(lines) + b"\n")
    return records


def _shown(data: bytes) -> str:
    text = data.decode("utf-8", "replace")
    if len(text) <= SHOWN_BYTES:
        return text
    half = SHOWN_BYTES // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
