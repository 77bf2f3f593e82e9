"""Token-level parser of what the model writes: reasoning, answer, tool calls in DSML.

Markup is recognised by special token ids alone, never by spelling, and no piece of it reaches the caller. Damaged
markup is recovered where its meaning is plain. Grammar: released encoder; recoveries: what servers meet in practice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pelagos.chat.arguments import Arguments
from pelagos.chat.json_output import JsonOutput
from pelagos.chat.render import Prompt
from pelagos.chat.tokenizer import Tokenizer
from pelagos.chat.tokens import DSML, END_THINK, EOS
from pelagos.chat.tool_call_id import new_tool_call_id

# Special tokens travel through the text buffer as unpaired surrogates, which decoded text cannot contain.
_THINK_MARK, _DSML_MARK = "\ud800", "\ud801"
_SURROGATES = re.compile("[\ud800-\udfff]")
_TAG = re.compile(f'((?:[^">{_DSML_MARK}]|"[^"{_DSML_MARK}]*")*)>')
_LONGEST_TAG = 4096
_NAME = re.compile(r'name\s*=\s*"([^"]*)')
_STRING = re.compile(r'string\s*=\s*"?(true|false)')

Part = Literal["reasoning", "content", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Event:
    """One step of an answer; texts of the same kind (and call) in a row belong together."""

    kind: Literal["reasoning", "content", "tool_call", "arguments", "finish"]
    text: str = ""  # delta; of `finish` the reason
    index: int | None = None  # which call, for `tool_call` and `arguments`
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class _Mark:
    """A special token in the buffer with what belongs to it: newlines and, of a tag, its `<` or `</`."""

    begin: int
    newlines: int
    is_closer: bool
    is_think: bool
    end: int


def _find_mark(buffer: str, marks: str) -> _Mark | None:
    at = min((at for at in map(buffer.find, marks) if at >= 0), default=-1)
    if at < 0:
        return None
    is_think = buffer[at] == _THINK_MARK
    stem = buffer[:at] if is_think else _without_opening(buffer[:at])
    begin = len(stem.rstrip("\n"))
    return _Mark(begin, len(stem) - begin, not is_think and buffer.endswith("</", 0, at), is_think, at + 1)


def _without_opening(text: str) -> str:
    return text[:-2] if text.endswith("</") else text.removesuffix("<")


class Parser:
    """Push token ids and their text, pull events; see `push` and `finish`."""

    def __init__(
        self,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        special_tokens: Mapping[int, str],
        start: Part | None = None,
        continues: bool = False,
        json_output: bool = False,
        stop: Sequence[str] = (),
        mirror_reasoning: bool = False,
        max_block_tokens: int | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """Parse one answer.

        thinking and tools (OpenAI tools, or functions {"name", "parameters"}) are those of the prompt. special_tokens
        names special ids (`Tokenizer.special_tokens`). start: what the model writes first. continues: the prompt ends
        inside the message, so leading newlines belong to it. stop: texts that end the answer, looked for in content
        only. mirror_reasoning: an answer that never left its reasoning is given as content too.
        max_block_tokens: a tool block longer than this ends the answer. rng: source of tool-call ids.
        """
        self._special = special_tokens
        functions = [tool.get("function", tool) for tool in tools or ()]
        self._schemas = {function["name"]: function.get("parameters") or {} for function in functions}
        self._declared = bool(functions)
        self._thinking = thinking
        self._continues = continues
        self._stop = [text for text in stop if text]
        self._mirror: list[str] | None = [] if mirror_reasoning else None
        self._max_block_tokens = max_block_tokens
        self._rng = rng or random.SystemRandom()
        self._json = JsonOutput() if json_output else None

        starts = {"reasoning": self._reasoning, "content": self._content, "tool_calls": self._block}
        self._state = starts[start or ("reasoning" if thinking else "content")]
        self._resume = self._content  # where a stray closing tag returns to
        self._buffer = ""
        self._events: list[Event] = []
        self._fresh = not continues  # leading newlines are dropped
        self._closing = False  # no more input: nothing is held back
        self._truncated = False  # the input was cut off: what is open stays open
        self._reasoned = continues
        self._block_tokens = 0
        self._loose = ""  # text in a block that so far has no call
        self._is_closer = False  # the tag being read began with </
        self._newline = ""  # a newline between a value and the tag being read
        self._calls = 0
        self._arguments: Arguments | None = None  # of the open call
        self._in_value = False
        self.done = False  # nothing that could still come will be used: generation can stop

    @classmethod
    def for_prompt(cls, prompt: Prompt, tokenizer: Tokenizer, **options: Any) -> Parser:
        """Return the parser of the answer to a rendered prompt; options as in the constructor."""
        return cls(
            prompt.thinking,
            prompt.tools,
            special_tokens=tokenizer.special_tokens,
            start=prompt.start,
            continues=prompt.continues,
            json_output=prompt.json_output,
            **options,
        )

    def push(self, token_id: int | None, text: str) -> list[Event]:
        """Take one token and the text it completes (`StreamDecoder.push`; None with `StreamDecoder.flush`)."""
        if self.done:
            return []
        name = self._special.get(token_id) if token_id is not None else None
        if name is not None:
            text = text.removesuffix(name)
        self._buffer += text if text.isascii() else _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)
        if name == END_THINK:
            self._buffer += _THINK_MARK
        elif name == DSML:
            self._buffer += _DSML_MARK if self._declared else DSML
        elif name == EOS:
            self.done = True
        self._run()
        if self._state in (self._block, self._tag, self._value):
            self._block_tokens += 1
            if self._max_block_tokens is not None and self._block_tokens > self._max_block_tokens:
                self.done = self._truncated = True
        return self._take()

    def finish(self, reason: str) -> list[Event]:
        """End the answer for the engine's reason (`stop`, `length`, ...); the last event is `finish`.

        The reason of a stopped answer with at least one call becomes `tool_calls`; an answer cut off in the middle
        of a call keeps `length` and half the call's JSON.
        """
        self.done = self._closing = True
        if self._truncated:
            reason = "length"
        self._truncated = reason != "stop"
        self._run()
        self._close_call()
        if not self._calls:
            self._release_loose()
        if self._json is not None:
            self._add("content", self._json.flush())
        if self._mirror and self._state == self._reasoning and reason == "stop":
            self._add("content", "".join(self._mirror))
        if reason == "stop" and self._calls:
            reason = "tool_calls"
        return [*self._take(), Event("finish", reason)]

    def _run(self) -> None:
        while self._state():
            pass

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _add(self, kind: Literal["reasoning", "content", "arguments"], text: str) -> None:
        if not text:
            return
        index = self._calls - 1 if kind == "arguments" else None
        if self._events and (self._events[-1].kind, self._events[-1].index) == (kind, index):
            text = self._events.pop().text + text
        self._events.append(Event(kind, text, index))

    def _consume(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _strip_fresh(self) -> None:
        if self._fresh:
            self._buffer = self._buffer.lstrip("\n")
            self._fresh = not self._buffer

    # Each state takes what it can from the buffer and returns whether another state (or the same) may go on.

    def _reasoning(self) -> bool:
        self._strip_fresh()
        mark = _find_mark(self._buffer, _THINK_MARK + _DSML_MARK)
        text = self._consume(mark.begin if mark else self._unheld())
        self._reasoned |= bool(text)
        if self._mirror is not None:
            self._mirror.append(text)
        self._add("reasoning", text)
        if mark is None:
            return False
        if not mark.is_think:
            return self._enter_tag(mark.end - mark.begin, mark.is_closer)
        self._consume(mark.end - mark.begin)
        self._state, self._fresh = self._content, True
        return True

    def _content(self) -> bool:
        self._buffer = self._buffer.replace(_THINK_MARK, "")
        self._strip_fresh()
        mark = _find_mark(self._buffer, _DSML_MARK)
        limit = mark.begin if mark else len(self._buffer)
        found = [self._buffer.find(stop, 0, limit) for stop in self._stop]
        at = min((at for at in found if at >= 0), default=-1)
        if at >= 0:
            self._add_content(self._consume(at))
            self._state, self.done = self._discard, True
            return True
        self._add_content(self._consume(limit if mark else self._unheld(self._stop)))
        return mark is not None and self._enter_tag(mark.end - mark.begin, mark.is_closer)

    def _add_content(self, text: str) -> None:
        self._add("content", self._json.push(text) if self._json is not None else text)

    def _unheld(self, stops: Sequence[str] = ()) -> int:
        """Count the characters in the buffer that no later token can make part of markup or of a stop text."""
        if self._closing:
            return len(self._buffer)
        stem = _without_opening(self._buffer) if self._declared else self._buffer
        ends_in_markup = self._declared or self._state == self._reasoning
        unheld = len(stem.rstrip("\n")) if ends_in_markup else len(stem)
        for stop in stops:
            lengths = range(min(len(stop) - 1, len(self._buffer)), 0, -1)
            held = next((length for length in lengths if self._buffer.endswith(stop[:length])), 0)
            unheld = min(unheld, len(self._buffer) - held)
        return unheld

    def _enter_tag(self, length: int, is_closer: bool) -> bool:
        """Go on behind a DSML token; a tag that closes what was never open is skipped."""
        self._consume(length)
        self._is_closer = is_closer
        self._resume, self._state = self._state, self._stray if is_closer else self._tag
        return True

    def _stray(self) -> bool:
        if self._read_tag() is None:
            return False
        self._state = self._resume
        return True

    def _read_tag(self) -> str | None:
        """Take the inside of a tag up to its `>`, or what there is of it if another tag comes first."""
        whole = _TAG.match(self._buffer, 0, _LONGEST_TAG)
        if whole is not None:
            return self._consume(whole.end())[:-1]
        following = _find_mark(self._buffer[:_LONGEST_TAG], _DSML_MARK)
        if following is None and len(self._buffer) < _LONGEST_TAG and not (self._closing and ">" in self._buffer):
            return None
        length = following.begin if following else min(len(self._buffer), _LONGEST_TAG)
        at = self._buffer.find(">", 0, length)
        return self._consume(at + 1)[:-1] if at >= 0 else self._consume(length)

    def _tag(self) -> bool:
        tag = self._read_tag()
        if tag is None:
            return False
        self._state = self._block
        word, name = tag.strip().lower(), _NAME.search(tag)
        is_invoke, is_wrapper = word.startswith("inv"), "call" in word and not word.startswith("par")
        if self._in_value:
            self._end_value(self._newline if self._is_closer and not is_invoke and not is_wrapper else "")
        if self._is_closer:
            if is_invoke:
                self._close_call()
            elif is_wrapper:
                self._end_block()
        elif is_invoke and name and name[1]:
            self._close_call()
            self._open_call(name[1])
        elif word.startswith("par") and name and self._arguments is not None:
            string = _STRING.search(tag)
            self._add("arguments", self._arguments.open(name[1], None if string is None else string[1] == "true"))
            self._in_value, self._state = True, self._value
            self._newline, self._is_closer = "", False
        return True

    def _block(self) -> bool:
        mark = _find_mark(self._buffer, _DSML_MARK)
        text = self._consume(mark.begin if mark else self._unheld())
        if not self._calls:
            self._loose += text.replace(_THINK_MARK, "")
        if mark is None:
            return False
        self._is_closer = mark.is_closer
        self._consume(mark.end - mark.begin)
        self._state = self._tag
        return True

    def _value(self) -> bool:
        assert self._arguments is not None
        self._buffer = self._buffer.replace(_THINK_MARK, "")
        mark = _find_mark(self._buffer, _DSML_MARK)
        stem = self._buffer[: mark.begin + mark.newlines] if mark else _without_opening(self._buffer)
        if mark is None and self._closing:
            stem = self._buffer
        newline = stem.endswith("\n") and not (self._closing and self._truncated)
        self._add("arguments", self._arguments.push(self._consume(len(stem) - newline)))
        if mark is None:
            return False
        self._newline, self._is_closer = "\n" * newline, mark.is_closer
        self._consume(mark.end - len(stem) + newline)
        self._state = self._tag
        return True

    def _discard(self) -> bool:
        self._buffer = ""
        return False

    def _open_call(self, name: str) -> None:
        empty_reasoning = self._thinking and not self._reasoned
        identity = new_tool_call_id(self._calls, empty_reasoning=empty_reasoning, rng=self._rng)
        self._events.append(Event("tool_call", index=self._calls, id=identity, name=name))
        self._calls += 1
        self._arguments = Arguments(self._schemas.get(name))

    def _end_value(self, newline: str) -> None:
        assert self._arguments is not None
        self._add("arguments", self._arguments.push(newline) + self._arguments.close())
        self._in_value = False

    def _close_call(self) -> None:
        if self._arguments is None:
            return
        if self._truncated:
            self._add("arguments", self._arguments.cut())
        else:
            if self._in_value:
                self._end_value(self._newline if self._is_closer else "")
            self._add("arguments", self._arguments.end())
        self._arguments = None

    def _end_block(self) -> None:
        self._close_call()
        if self._calls:
            self._state, self.done = self._discard, True
            return
        self._release_loose()
        self._state = self._content

    def _release_loose(self) -> None:
        """Give the text of a block without any call as content."""
        self._add_content(self._loose.strip())
        self._loose = ""
