"""Token-level parser of what the model writes: reasoning, answer, tool calls in DSML.

Markup is recognised by special token ids alone, never by spelling, and no piece of it reaches the caller. Damaged
markup is recovered where its meaning is plain. Grammar: released encoder; recoveries: what servers meet in practice.
"""

import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple, Self

from pelagos.chat.arguments import Arguments
from pelagos.chat.json_output import JsonOutput
from pelagos.chat.render import Prompt
from pelagos.chat.tokenizer import Tokenizer
from pelagos.chat.tokens import DSML, END_THINK, EOS, MARKS

_DSML, _END_THINK = MARKS[DSML], MARKS[END_THINK]
_SURROGATES = re.compile("[\ud800-\udfff]")
_TAG = re.compile(f'((?:[^">{_DSML}]|"[^"{_DSML}]*")*)>')
_LONGEST_TAG = 4096
_NAME = re.compile(r'name\s*=\s*"([^"]*)')
_STRING = re.compile(r'string\s*=\s*"?(true|false)')
# The first 32 bytes of XXH3's secret and its constants (xxHash specification): enough for inputs of 17 to 32 bytes.
_SECRET = bytes.fromhex("b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f")
_PRIME, _AVALANCHE, _MASK = 0x9E3779B185EBCA87, 0x165667919E3779F9, (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Event:
    """One step of an answer; texts of the same kind (and call) in a row belong together."""

    kind: Literal["reasoning", "content", "tool_call", "arguments", "finish"]
    text: str = ""  # delta; of `finish` the reason
    index: int | None = None  # which call, for `tool_call` and `arguments`
    id: str | None = None
    name: str | None = None


class _Mark(NamedTuple):
    """A special token in the buffer, from the newlines and the `<` or `</` before it to its end."""

    begin: int
    newlines: int
    is_closer: bool
    end: int


def _find(buffer: str, mark: str) -> _Mark | None:
    at = buffer.find(mark)
    stem = _without_opening(buffer[:at]) if mark == _DSML else buffer[:at]
    begin = len(stem.rstrip("\n"))
    return None if at < 0 else _Mark(begin, len(stem) - begin, buffer.endswith("</", 0, at), at + 1)


def _without_opening(text: str) -> str:
    return text[:-2] if text.endswith("</") else text.removesuffix("<")


@dataclass(eq=False)
class Parser:
    """Push token ids and their text, pull events; see `push` and `finish`."""

    thinking: bool
    tools: Sequence[Mapping[str, Any]] | None = None  # declared: OpenAI tools, or functions {"name", "parameters"}
    _: KW_ONLY
    special_tokens: Mapping[int, str]  # names of special ids: `Tokenizer.special_tokens`
    start: Literal["reasoning", "content", "tool_calls"] | None = None  # what the model writes first
    continues: bool = False  # the prompt ends inside the message: leading newlines belong to it
    json_output: bool = False  # prose around JSON becomes spaces
    stop: Sequence[str] = ()  # texts that end the answer, looked for in content only
    mute: bool = False  # none of the tools that were spoken of may be called: calls are dropped
    rng: random.Random | None = None  # source of tool-call ids

    def __post_init__(self) -> None:
        functions = [tool.get("function", tool) for tool in self.tools or ()]
        self._schemas = {function["name"]: function.get("parameters") for function in functions}
        self._marks = self.mute or bool(self._schemas)  # whether markup of calls is known
        starts = {"reasoning": self._reasoning, "content": self._content, "tool_calls": self._block}
        # A state takes what it can from the buffer and returns whether to go on.
        self._state: Callable[[], bool] = starts[self.start or ("reasoning" if self.thinking else "content")]
        self._buffer = ""  # text, and MARKS for special tokens
        self._events: list[Event] = []
        self._json = JsonOutput() if self.json_output else None
        self._reasoned: list[str] = []
        self._fresh = not self.continues  # leading newlines are dropped
        self._closing = False  # no more input: nothing is held back
        self._truncated = False  # the input was cut off: what is open stays open
        self._loose = ""  # text in a block that so far has no call
        self._outside: Callable[[], bool] | None = None  # where the tag being read was met, None inside a block
        self._is_closer = False  # the tag being read began with </
        self._newline = ""  # a newline between a value and the tag being read
        self._calls = 0
        self._arguments: Arguments | None = None  # of the open call
        self._in_value = False
        self.stopped_by: str | None = None  # which of the stop texts ended the answer
        self.done = False  # nothing that could still come will be used: generation can stop

    @classmethod
    def for_prompt(cls, prompt: Prompt, tokenizer: Tokenizer, **options: Any) -> Self:
        """Return the parser of the answer to a rendered prompt; options are the fields a prompt does not decide."""
        fixed = {"start": prompt.start, "continues": prompt.continues, "json_output": prompt.json_output}
        return cls(prompt.thinking, prompt.tools, special_tokens=tokenizer.special_tokens, **fixed, **options)

    def push(self, token_id: int | None, text: str) -> list[Event]:
        """Take one token and the text it completes (`StreamDecoder.push`; None with `StreamDecoder.flush`)."""
        if self.done:
            return []
        name = "" if token_id is None else self.special_tokens.get(token_id, "")
        text = text.removesuffix(name)
        self._buffer += text if text.isascii() else _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)
        if name == DSML:
            self._buffer += _DSML if self._marks else DSML
        elif name == END_THINK:
            self._buffer += _END_THINK
        self.done = name == EOS
        while self._state():
            pass
        return self._take()

    def finish(self, reason: str) -> list[Event]:
        """End the answer for the engine's reason (`stop`, `length`, ...); the last event is `finish`.

        The reason of a stopped answer with at least one call becomes `tool_calls`; an answer cut off in the middle
        of a call keeps `length` and half the call's JSON.
        """
        self.done, self._closing, self._truncated = True, True, reason != "stop"
        while self._state():
            pass
        self._close_call()
        self._release_loose()
        if self._json is not None:
            self._add("content", self._json.push("", closing=True))
        is_call = reason == "stop" and self._calls and not self.mute
        return [*self._take(), Event("finish", "tool_calls" if is_call else reason)]

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return [each for each in events if each.kind not in ("tool_call", "arguments")] if self.mute else events

    def _add(self, kind: Literal["reasoning", "content", "arguments"], text: str) -> None:
        index = self._calls - 1 if kind == "arguments" else None
        if text and self._events and (self._events[-1].kind, self._events[-1].index) == (kind, index):
            text = self._events.pop().text + text
        if text:
            self._events.append(Event(kind, text, index))

    def _consume(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _strip_fresh(self) -> None:
        if self._fresh:
            self._buffer = self._buffer.lstrip("\n")
            self._fresh = not self._buffer

    def _unheld(self, stops: Sequence[str] = ()) -> int:
        """Count the characters in the buffer that no later token can make part of markup or of a stop text."""
        if self._closing:
            return len(self._buffer)
        stem = _without_opening(self._buffer) if self._marks else self._buffer
        unheld = len(stem.rstrip("\n")) if self._marks or self._state == self._reasoning else len(stem)
        for stop in stops:
            lengths = range(min(len(stop) - 1, len(self._buffer)), 0, -1)
            held = next((length for length in lengths if self._buffer.endswith(stop[:length])), 0)
            unheld = min(unheld, len(self._buffer) - held)
        return unheld

    def _reasoning(self) -> bool:
        self._strip_fresh()
        marks = [mark for mark in (_find(self._buffer, _END_THINK), _find(self._buffer, _DSML)) if mark]
        mark = min(marks, key=lambda mark: mark.end, default=None)
        self._reasoned.append(self._consume(mark.begin if mark else self._unheld()))
        self._add("reasoning", self._reasoned[-1])
        if mark is None:
            return False
        if self._buffer[mark.end - mark.begin - 1] == _DSML:
            return self._enter_tag(mark, outside=self._state)
        self._consume(mark.end - mark.begin)
        self._state, self._fresh = self._content, True
        return True

    def _content(self) -> bool:
        self._buffer = self._buffer.replace(_END_THINK, "")
        self._strip_fresh()
        mark = _find(self._buffer, _DSML)
        limit = mark.begin if mark else len(self._buffer)
        found = [(self._buffer.find(stop, 0, limit), stop) for stop in self.stop if stop]
        at, stop = min((each for each in found if each[0] >= 0), default=(-1, None))
        if stop is not None:
            self._add_content(self._consume(at))
            self._buffer, self.done, self.stopped_by = "", True, stop
            return False
        self._add_content(self._consume(limit if mark else self._unheld(self.stop)))
        return mark is not None and self._enter_tag(mark, outside=self._state)

    def _add_content(self, text: str) -> None:
        self._add("content", self._json.push(text) if self._json is not None else text)

    def _enter_tag(self, mark: _Mark, *, outside: Callable[[], bool] | None = None) -> bool:
        """Go on behind a DSML token; the text before it has been consumed."""
        self._consume(self._buffer.index(_DSML) + 1)
        self._is_closer, self._outside, self._state = mark.is_closer, outside, self._tag
        return True

    def _read_tag(self) -> str | None:
        """Take the inside of a tag up to its `>`, or what there is of it if another tag comes first."""
        whole = _TAG.match(self._buffer, 0, _LONGEST_TAG)
        if whole is not None:
            return self._consume(whole.end())[:-1]
        following = _find(self._buffer[:_LONGEST_TAG], _DSML)
        if following is None and len(self._buffer) < _LONGEST_TAG and not (self._closing and ">" in self._buffer):
            return None
        length = following.begin if following else min(len(self._buffer), _LONGEST_TAG)
        at = self._buffer.find(">", 0, length)
        return self._consume(at + 1)[:-1] if at >= 0 else self._consume(length)

    def _tag(self) -> bool:
        tag = self._read_tag()
        if tag is None:
            return False
        if self._is_closer and self._outside is not None:  # it closes what was never open
            self._state = self._outside
            return True
        self._state = self._block
        word, name = tag.strip().lower(), _NAME.search(tag)
        is_invoke, is_parameter = word.startswith("inv"), word.startswith("par")
        is_wrapper = "call" in word and not is_parameter
        if self._in_value:
            self._end_value(self._newline if self._is_closer and not is_invoke and not is_wrapper else "")
        if self._is_closer and is_invoke:
            self._close_call()
        elif self._is_closer and is_wrapper:
            self._end_block()
        elif is_invoke and name and name[1]:
            self._close_call()
            self._open_call(name[1])
        elif is_parameter and name and self._arguments is not None and not self._is_closer:
            string = _STRING.search(tag)
            self._add("arguments", self._arguments.open(name[1], None if string is None else string[1] == "true"))
            self._in_value, self._state, self._newline = True, self._value, ""
        return True

    def _block(self) -> bool:
        mark = _find(self._buffer, _DSML)
        self._loose += self._consume(mark.begin if mark else self._unheld()).replace(_END_THINK, "")
        return mark is not None and self._enter_tag(mark)

    def _value(self) -> bool:
        assert self._arguments is not None
        self._buffer = self._buffer.replace(_END_THINK, "")
        mark = _find(self._buffer, _DSML)
        stem = self._buffer if self._closing else _without_opening(self._buffer)
        stem = self._buffer[: mark.begin + mark.newlines] if mark else stem
        newline = stem.endswith("\n") and not (self._closing and self._truncated)
        self._add("arguments", self._arguments.push(self._consume(len(stem) - newline)))
        self._newline = "\n" * newline if mark else ""
        return mark is not None and self._enter_tag(mark)

    def _open_call(self, name: str) -> None:
        empty_reasoning = self.thinking and not self.continues and not any(self._reasoned)
        rng = self.rng or random.SystemRandom()
        identity = new_tool_call_id(self._calls, empty_reasoning=empty_reasoning, rng=rng)
        self._events.append(Event("tool_call", index=self._calls, id=identity, name=name))
        self._calls += 1
        self._arguments = Arguments(self._schemas.get(name))

    def _end_value(self, newline: str) -> None:
        assert self._arguments is not None
        self._add("arguments", self._arguments.push(newline) + self._arguments.close())
        self._in_value = False

    def _close_call(self) -> None:
        if self._arguments is not None:
            if self._in_value and not self._truncated:
                self._end_value(self._newline if self._is_closer else "")
            self._add("arguments", self._arguments.cut() if self._truncated else self._arguments.end())
        self._arguments = None

    def _end_block(self) -> None:
        self._close_call()
        self._release_loose()
        self._state = self._content
        if self._calls:
            self._buffer, self.done = "", True

    def _release_loose(self) -> None:
        """Give the text of a block without any call as content."""
        self._add_content("" if self._calls else self._loose.strip())
        self._loose = ""


def new_tool_call_id(index: int, *, empty_reasoning: bool, rng: random.Random) -> str:
    """Return an id like `call_00_...`; `ET_` marks a thinking turn with empty reasoning. Source: deepseek-recipe."""
    letters = "".join(rng.choices(string.ascii_letters + string.digits, k=20))
    stem = f"call_{index:02}_{'ET_' if empty_reasoning else ''}{letters}"
    return f"{stem}{_xxh3_64(stem.replace('_', '').encode()) % 10_000:04}"


def _xxh3_64(data: bytes) -> int:
    total = len(data) * _PRIME
    for lane, secret in ((data[:16], _SECRET[:16]), (data[-16:], _SECRET[16:])):
        mixed = int.from_bytes(lane, "little") ^ int.from_bytes(secret, "little")
        product = (mixed & _MASK) * (mixed >> 64)
        total += (product & _MASK) ^ (product >> 64)
    total &= _MASK
    total = (total ^ (total >> 37)) * _AVALANCHE & _MASK
    return total ^ (total >> 32)
