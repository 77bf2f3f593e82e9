"""Tool markup that leaks: fuzzed outputs cut every which way, and calls sampled from a model under its grammar.

python -m benchmarks.leaks [--chunkings 1000000] [--calls 10000] [--model nano] [--processes 2] [--json FILE]

Chunkings: valid and damaged outputs, spelled markers among them, each pushed through the parser in many cuts. A
canary stands in every tag that the DSML token opens: it may come out nowhere. All cuts of one output must say the same,
valid outputs exactly what was written; every 20th output also goes through the writers of all protocols. Calls: a
model answers short prompts at temperature 1 with forced and free tool calls; completed calls must be valid JSON in
their schema (judged by jsonschema-rs), cut ones end with `length`, and content is free of markup. Finished parts are
kept in FILE; a run that is broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pelagos.chat.parser import Event, Parser
from pelagos.chat.tokens import DSML, END_THINK, EOS, SPECIAL_TOKENS
from pelagos.engine.api import Step, Stream

CANARY = "\u2003"  # a blank, so that a tag with it still reads as the same tag
OUTPUTS_PER_BLOCK, CUTS = 250, 8
IDS = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
NAMES = {index: token for token, index in IDS.items()}
ORDINARY = 1000
# One character stands for each special token in an output that is being made up.
D, T, E = "\U000f0000", "\U000f0001", "\U000f0002"
MARKS = {D: DSML, T: END_THINK, E: EOS}
WORDS = (
    *(
        "hello",
        " ",
        "\n",
        "\n\n",
        "<",
        "</",
        ">",
        "x < y > z",
        "2>&1",
        "你好",
        "\U0001f600",
        "```json\n",
        '{"a": [1]}',
        "]}",
    ),
    *(
        DSML,
        END_THINK,
        "<think>",
        f"<{DSML}tool_calls>\n",
        f"</{DSML}parameter>",
        f'<{DSML}invoke name="f">',
        EOS,
        "</s>",
    ),
)
SCHEMA = {"type": "object", "properties": {"s": {"type": "string"}, "n": {"type": "array"}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g")]


def prose(rng: random.Random, most: int = 8) -> str:
    """Text with spelled markers in it."""
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))


def valid(rng: random.Random, thinking: bool) -> tuple[str, dict[str, Any]]:
    """An output in the taught form, and what it says."""
    reasoning, content = prose(rng) if thinking else "", prose(rng)
    calls: list[tuple[str, dict[str, Any]]] = []
    text = f"{reasoning}{T}{content}" if thinking else content
    if rng.random() < 0.7:
        text += f"\n\n<{D}tool_calls>\n"
        for _ in range(rng.randint(1, 3)):
            given: dict[str, Any] = {}
            text += f'<{D}invoke name="{(name := rng.choice("fg"))}">\n'
            if rng.random() < 0.8:
                given["s"] = prose(rng)
                text += f'<{D}parameter name="s" string="true">{given["s"]}</{D}parameter>\n'
            if rng.random() < 0.5:
                given["n"] = [rng.randint(0, 99), prose(rng, 2)]
                value = json.dumps(given["n"], ensure_ascii=rng.random() < 0.5)
                text += f'<{D}parameter name="n" string="false">{value}</{D}parameter>\n'
            text += f"</{D}invoke>\n"
            calls.append((name, given))
        text += f"</{D}tool_calls>"
        content = content.rstrip("\n")
    said = {"reasoning": reasoning.strip("\n"), "content": content.lstrip("\n"), "calls": calls}
    return text, said


def damaged(rng: random.Random, text: str) -> str:
    """The output with some of what models get wrong."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(8)
        if kind == 0:
            text = text[:at] + rng.choice((D, T, f"<{D}", f"</{D}", f"<{D}tool_calls>\n")) + text[at:]
        elif kind == 1:  # a special token is lost
            places = [place for place, letter in enumerate(text) if letter in MARKS]
            at = rng.choice(places) if places else at
            text = text[:at] + text[at + 1 :]
        elif kind == 2:
            text = text[:at] + text[at + rng.randint(1, 12) :]
        elif kind == 3:
            word = rng.choice(("toolcalls", "function_calls", "calls", "tool_ccalls", ""))
            text = text.replace("tool_calls", word, rng.randint(1, 2))
        elif kind == 4:
            text = text.replace(rng.choice((' string="true"', ' string="false"', '">', ">\n", '"')), "", 1)
        elif kind == 5:
            text = text[:at] + text[max(0, at - 30) :]  # a stretch comes twice
        elif kind == 6:
            text = text[:at]
        else:
            text += prose(rng)
    return text


def with_canaries(text: str) -> str:
    """A canary behind each DSML token and before the end of its tag."""
    head, *tags = text.split(D)
    for tag in tags:
        inside, end, rest = tag.partition(">")
        closed = end and T not in inside and inside.count('"') % 2 == 0
        head += D + CANARY + (f"{inside}{CANARY}>{rest}" if closed else tag)
    return head


def cut(rng: random.Random, text: str) -> Iterator[tuple[int, str]]:
    """Token ids and their texts: special tokens alone, the rest in random pieces."""
    rate = rng.choice((0.9, 0.5, 0.2, 0.05))
    held = ""
    for letter in text:
        if letter in MARKS:
            if held:
                yield ORDINARY, held
            held = ""
            yield IDS[MARKS[letter]], MARKS[letter]
        else:
            held += letter
            if rng.random() < rate:
                yield ORDINARY, held
                held = ""
    if held:
        yield ORDINARY, held


def fold(events: Iterable[Event]) -> dict[str, Any]:
    """What events say together."""
    said: dict[str, Any] = {"reasoning": "", "content": "", "calls": [], "reason": None}
    for event in events:
        if event.kind == "tool_call":
            said["calls"].append([event.name, ""])
        elif event.kind == "arguments":
            said["calls"][event.index][1] += event.text
        elif event.kind == "finish":
            said["reason"] = event.text
        else:
            said[event.kind] += event.text
    return said


def parsed(pieces: Sequence[tuple[int, str]], thinking: bool, *, ended: bool) -> dict[str, Any]:
    """One cut of an output through the parser."""
    parser = Parser(thinking, TOOLS, special_tokens=NAMES, rng=random.Random(0))
    events: list[Event] = []
    for index, text in pieces:
        events += parser.push(index, text)
    return fold(events + parser.finish("stop" if ended else "length"))


def check_output(seed: int, writers: Writers | None = None) -> tuple[int, list[str]]:
    """Make up one output, push it through in many cuts; how many, and what is wrong."""
    rng = random.Random(seed)
    thinking, is_valid = rng.random() < 0.5, rng.random() < 0.4
    text, meant = valid(rng, thinking)
    if not is_valid:
        text = with_canaries(damaged(rng, text))
    ended = is_valid or rng.random() < 0.7
    text += E if ended else ""
    first, wrong = None, []
    for _ in range(CUTS):
        pieces = list(cut(rng, text))
        said = parsed(pieces, thinking, ended=ended)
        shown = said["reasoning"], said["content"], *(arguments for _, arguments in said["calls"])
        if any(CANARY in each for each in shown):
            wrong.append(f"seed {seed}: markup leaks: {said}")
        first = first or said
        if said != first:
            wrong.append(f"seed {seed}: two cuts differ: {said} {first}")
    assert first is not None
    if is_valid:
        calls = [(name, json.loads(arguments)) for name, arguments in first["calls"]]
        if {**first, "calls": calls, "reason": None} != {**meant, "reason": None}:
            wrong.append(f"seed {seed}: a valid output is changed: {first} {meant}")
        if first["reason"] != ("tool_calls" if calls else "stop"):
            wrong.append(f"seed {seed}: it ended with {first['reason']}")
    if writers is not None:
        wrong += writers.check(seed, list(cut(rng, text)), thinking, first)
    return CUTS, wrong


class Writers:
    """The writers of all protocols, over an engine that is fed by hand."""

    def __init__(self) -> None:
        from pelagos.chat import Tokenizer, train_tokenizer
        from pelagos.config import tiny
        from pelagos.serve import Card
        from pelagos.serve.protocols import APIS

        self._tokenizer = Tokenizer(train_tokenizer(["tools"], len(SPECIAL_TOKENS) + 256))
        self._apis = [api for api in APIS if "/v1/completions" not in api.paths]
        self._card = Card(model="nano")
        submit = lambda *_, **__: self._stream  # noqa: E731
        self._llm: Any = SimpleNamespace(
            tokenizer=self._tokenizer, config=tiny(), generation="0731", submit=submit, engine=None
        )
        self._loop: Any = SimpleNamespace(call_soon_threadsafe=lambda *_: None)
        from pelagos.serve.answer import Shared

        self._shared = Shared()

    def check(self, seed: int, pieces: list[tuple[int, str]], thinking: bool, said: dict[str, Any]) -> list[str]:
        """Write one answer in every protocol, streamed and whole; what is wrong."""
        wrong: list[str] = []
        for api in self._apis:
            frames, whole = self._write(api, pieces, thinking)
            name = type(api).__name__
            for text in (frames, whole):
                if CANARY in text or "\\u2003" in text:
                    wrong.append(f"seed {seed}: markup leaks in {name}: {text}")
            streamed = "".join(_content(json.loads(line[6:])) for line in frames.splitlines() if line[:7] == "data: {")
            if streamed != said["content"]:
                wrong.append(f"seed {seed}: {name} streamed {streamed!r} for {said['content']!r}")
        return wrong

    def _write(self, api: Any, pieces: list[tuple[int, str]], thinking: bool) -> tuple[str, str]:
        from pelagos.serve.answer import Answer

        ask = api.read(_request(api.paths[0], thinking), self._card)
        self._stream = Stream("fed")
        ordinary = self._tokenizer.encode("x")[0]
        for index, text in pieces:
            ended = "stop" if index == IDS[EOS] else None
            token = ordinary if index == ORDINARY else self._tokenizer.id(NAMES[index])
            self._stream.put(Step(token, "" if ended else text, 0.0, ended))
        is_cut = not pieces or pieces[-1][0] != IDS[EOS]
        if is_cut:
            self._stream.put(Step(ordinary, "", 0.0, "length"))
        self._stream.close("length" if is_cut else "stop")
        answer = Answer(self._llm, ask, self._card, self._loop, self._shared)
        writer = api.writer(ask, answer, self._card)
        events = answer.drain()
        frames = [
            *writer.open(),
            *(frame for event in events if event.kind != "finish" for frame in writer.push(event)),
        ]
        frames += writer.close()
        return "".join(frames), json.dumps(api.writer(ask, answer, self._card).whole(), ensure_ascii=False)


def _request(path: str, thinking: bool) -> dict[str, Any]:
    """The same request in each protocol."""
    base: dict[str, Any] = {"model": "nano", "stream": True}
    mode = {"type": "enabled" if thinking else "disabled"}
    user = [{"role": "user", "content": "Hi"}]
    if path.endswith("/messages"):
        tools = [{"name": tool["function"]["name"], "input_schema": SCHEMA} for tool in TOOLS]
        return base | {"messages": user, "max_tokens": 9000, "thinking": mode, "tools": tools}
    if path.endswith("/responses"):
        tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
        return base | {"input": "Hi", "tools": tools, "reasoning": {"effort": "high" if thinking else "none"}}
    return base | {"messages": user, "tools": TOOLS, "thinking": mode}


def _content(data: dict[str, Any]) -> str:
    """The content in one frame of any protocol."""
    if data.get("type") == "response.output_text.delta":
        return data["delta"]
    if data.get("type") == "content_block_delta":
        return data["delta"].get("text", "")
    return "".join(choice["delta"].get("content") or "" for choice in data.get("choices", ()))


def fuzz_block(block: int) -> dict[str, Any]:
    """Check the outputs of one block of seeds."""
    from_seed = block * OUTPUTS_PER_BLOCK
    writers = Writers()
    chunkings, wrong = 0, []
    for seed in range(from_seed, from_seed + OUTPUTS_PER_BLOCK):
        count, found = check_output(seed, writers if seed % 20 == 0 else None)
        chunkings, wrong = chunkings + count, wrong + found
    return {"chunkings": chunkings, "wrong": wrong[:20]}


# Calls sampled from a model.


def _object(required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    closed = {"type": "object", "properties": properties, "additionalProperties": False}
    return closed | ({"required": list(required)} if required else {})


PLACE = _object(
    ("lat",), lat={"type": "number", "minimum": -90, "maximum": 90}, name={"type": "string", "maxLength": 9}
)
CALLABLE: dict[str, dict[str, Any]] = {
    "get_weather": _object(("city",), city={"type": "string"}, unit={"enum": ["celsius", "fahrenheit"]}),
    "read_file": _object(("path",), path={"type": "string", "pattern": "^/[a-z/]{1,20}$"}, lines={"type": "integer"}),
    "add": _object(("a", "b"), a={"type": "integer"}, b={"type": ["integer", "null"]}, exact={"type": "boolean"}),
    "search": _object(("query",), query={"type": "string"}, tags={"type": "array", "items": {"enum": ["x", "y", 3]}}),
    "move": _object(("to",), to=PLACE, mode={"const": "walk"}, note={"anyOf": [{"type": "string"}, {"type": "null"}]}),
    "stop": _object(),
}
QUESTIONS = (
    "What is the weather in Paris?",
    "Read /etc/hosts.",
    "What is 2 + 3?",
    "Find the word cat.",
    "Go home.",
    "Stop.",
)


def sample_batch(llm: Any, shared: Any, batch: int, size: int = 16) -> dict[str, Any]:
    """Answer `size` short prompts at once and judge every call."""
    import asyncio

    from jsonschema_rs import validator_for

    from pelagos.serve import Card
    from pelagos.serve.answer import Answer
    from pelagos.serve.ask import Ask

    card = Card(model="nano")
    tools = [
        {"type": "function", "function": {"name": name, "description": "", "parameters": schema}}
        for name, schema in CALLABLE.items()
    ]
    counts: Counter[str] = Counter()
    wrong: list[str] = []

    async def one(index: int) -> None:
        seed = batch * size + index
        kind = ("forced", "forced", "thinking", "free")[seed % 4]
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": QUESTIONS[seed // 4 % len(QUESTIONS)]}], "tools": tools,
            "temperature": 1, "seed": seed, "max_tokens": 192, "reasoning_effort": "low",
            "thinking": {"type": "enabled" if kind == "thinking" else "disabled"},
        }  # fmt: skip
        if kind != "free":
            body["tool_choice"] = "required"
        ask = Ask(body=body, thinking_budget=10 if kind == "thinking" else None)
        answer = Answer(llm, ask, card, asyncio.get_running_loop(), shared)
        async for _ in answer.events(keep_alive=600):
            pass
        message, ids, tokenizer = answer.message, answer.output_ids, llm.tokenizer
        counts[f"{kind}: {answer.finish_reason}"] += 1
        # Content is what was written before the first DSML token, and nothing else; forced calls leave no place for it.
        has_block = tokenizer.id(DSML) in ids
        text = tokenizer.decode(ids[: ids.index(tokenizer.id(DSML))] if has_block else ids, skip_special=True)
        text = (text.removesuffix("<").rstrip("\n") if has_block else text).lstrip("\n")
        if message["content"] != (text if kind == "free" else ""):
            wrong.append(f"seed {seed}: content {message['content']!r} for {text!r}")
        if kind != "free" and answer.finish_reason not in ("tool_calls", "length"):
            wrong.append(f"seed {seed}: ended with {answer.finish_reason}")
        calls = message.get("tool_calls", [])
        whole = calls if answer.finish_reason == "tool_calls" else calls[:-1]
        for call in whole:
            function = call["function"]
            try:
                good = validator_for(CALLABLE[function["name"]]).is_valid(json.loads(function["arguments"]))
            except (KeyError, ValueError):
                good = False
            counts["calls"] += 1
            if not good:
                wrong.append(f"seed {seed}: {function}")
        counts["cut calls"] += len(calls) - len(whole)
        counts["tokens"] += len(ids)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(index) for index in range(size)))

    asyncio.run(all_of_them())
    return {"counts": dict(counts), "wrong": wrong}


def fuzz(chunkings: int, processes: int, kept: dict[str, Any], save: Any) -> None:
    """Go on with blocks of outputs until so many chunkings are done."""
    state = kept.setdefault("chunkings", {"done": 0, "blocks": 0, "wrong": [], "seconds": 0.0})
    todo = range(state["blocks"], -(-chunkings // (OUTPUTS_PER_BLOCK * CUTS)))
    start, before = time.monotonic(), state["seconds"]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for result in pool.imap(fuzz_block, todo):
            state["done"] += result["chunkings"]
            state["blocks"] += 1
            state["wrong"] += result["wrong"]
            state["seconds"] = round(before + time.monotonic() - start, 1)
            save()


def sample(calls: int, model: str, kept: dict[str, Any], save: Any) -> None:
    """Go on with batches until so many calls are complete."""
    from pelagos.engine import LLM
    from pelagos.serve.answer import Shared

    state = kept.setdefault("calls", {"model": model, "batches": 0, "counts": {}, "wrong": [], "seconds": 0.0})
    if state["counts"].get("calls", 0) >= calls:
        return
    llm, shared = LLM(model), Shared()
    start, before = time.monotonic(), state["seconds"]
    while state["counts"].get("calls", 0) < calls:
        result = sample_batch(llm, shared, state["batches"])
        state["counts"] = dict(Counter(state["counts"]) + Counter(result["counts"]))
        state["batches"] += 1
        state["wrong"] += result["wrong"]
        state["seconds"] = round(before + time.monotonic() - start, 1)
        save()
    llm.close()


def main() -> int:
    """Run what is left, print what was found; exit code 1 for any leak."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--chunkings", type=int, default=1_000_000)
    arguments.add_argument("--calls", type=int, default=10_000)
    arguments.add_argument("--model", default="nano")
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    kept: dict[str, Any] = {}
    if given.json and given.json.exists():
        kept = json.loads(given.json.read_text(encoding="utf-8"))

    def save() -> None:
        if given.json:
            part = given.json.with_suffix(".part")
            part.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            part.replace(given.json)

    if given.chunkings:
        fuzz(given.chunkings, given.processes, kept, save)
    if given.calls:
        sample(given.calls, given.model, kept, save)
    print(json.dumps(kept, indent=1, ensure_ascii=False))
    return int(any(part["wrong"] for part in kept.values()))


if __name__ == "__main__":
    sys.exit(main())
