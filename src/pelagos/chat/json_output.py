"""JSON mode: the object in an answer goes through, the prose and the code fence around it become single spaces."""

from __future__ import annotations

import re

_PROSE = re.compile(r"[^{\[`]+")
_FENCE_HEAD = re.compile(r"```(?:json)?\s*")
_FENCE_HEAD_BEGUN = re.compile(r"(?:`{1,2}|```(?:j|js|jso))\Z")
_FENCE_END = re.compile(r"\n*(`{0,3})")


class JsonOutput:
    """Filter of content in JSON mode: one run of prose, however it is split, becomes one space."""

    def __init__(self) -> None:
        self._buffer = ""
        self._phase = "before"  # before -> json -> after
        self._fenced = False
        self._spaced = False  # the prose in hand has had its space
        self._in_string = self._escaped = False

    def push(self, text: str) -> str:
        """Take content, return what of it may be shown now."""
        self._buffer += text
        return self._run(closing=False)

    def flush(self) -> str:
        """Return what was held back at the end."""
        return self._run(closing=True)

    def _run(self, *, closing: bool) -> str:
        shown = ""
        while self._buffer:
            text, wait = {"before": self._before, "json": self._json, "after": self._after}[self._phase](closing)
            shown += text
            if wait:
                break
        return shown

    def _space(self) -> str:
        space = "" if self._spaced else " "
        self._spaced = True
        return space

    def _before(self, closing: bool) -> tuple[str, bool]:
        if self._buffer[0] in "{[":
            self._phase, self._spaced = "json", False
            return "", False
        prose = _PROSE.match(self._buffer)
        if prose is not None:
            self._buffer = self._buffer[prose.end() :]
            return self._space(), False
        head = _FENCE_HEAD.match(self._buffer)
        if not closing and (_FENCE_HEAD_BEGUN.match(self._buffer) or (head and head.end() == len(self._buffer))):
            return "", True
        if head is not None:
            self._fenced = not self._fenced
        self._buffer = self._buffer[head.end() if head else 1 :]
        return "" if head else self._space(), False

    def _json(self, closing: bool) -> tuple[str, bool]:
        at, wait = (0, False) if self._fenced else (len(self._buffer), False)
        while at < len(self._buffer):
            character = self._buffer[at]
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character in "\n`":
                ticks = _FENCE_END.match(self._buffer, at)
                assert ticks is not None
                if ticks[1] == "```":
                    self._phase = "after"
                    shown, self._buffer = self._buffer[:at], self._buffer[ticks.end() :]
                    return shown, False
                if ticks.end() == len(self._buffer) and not closing:
                    wait = True
                    break
                at = ticks.end() - 1
            else:
                self._in_string = character == '"'
            at += 1
        shown, self._buffer = self._buffer[:at], self._buffer[at:]
        return shown, wait

    def _after(self, closing: bool) -> tuple[str, bool]:
        self._buffer = ""
        return self._space(), False
