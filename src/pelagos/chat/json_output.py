"""JSON mode: the JSON in an answer goes through, the prose and the code fence around it become single spaces."""

import re

_PROSE = re.compile(r"[^{\[`]+|`")
_FENCE_HEAD = re.compile(r"```(?:json)?\s*")
_FENCE_HEAD_BEGUN = re.compile(r"`{1,2}|```(?:j|js|jso|(?:json)?\s*)")
_FENCE_END = re.compile(r"\n*```")
_FENCE_END_BEGUN = re.compile(r"\n+`{0,2}|`{1,2}")
_JSON_RUN = re.compile(r'[^"\\\n`]+')


class JsonOutput:
    """Filter of content in JSON mode; a run of prose becomes one space, however it is split."""

    def __init__(self) -> None:
        self._buffer = ""
        self._step = self._before
        self._fenced = self._spaced = self._in_string = self._escaped = False

    def push(self, text: str, *, closing: bool = False) -> str:
        """Take content, return what of it may be shown now; closing gives out what was held back."""
        self._buffer += text
        shown = ""
        while self._buffer and (closing or not self._must_wait()):
            shown += self._step()
        return shown

    def _must_wait(self) -> bool:
        if self._step == self._before:
            return _FENCE_HEAD_BEGUN.fullmatch(self._buffer) is not None
        in_fence = self._step == self._json and self._fenced and not self._in_string
        return in_fence and _FENCE_END_BEGUN.fullmatch(self._buffer) is not None

    def _consume(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _before(self) -> str:
        if self._buffer[0] in "{[":
            self._step, self._spaced = self._json, False
            return ""
        head = _FENCE_HEAD.match(self._buffer)
        if head is not None:
            self._fenced = not self._fenced
            self._consume(head.end())
            return ""
        return self._prose()

    def _prose(self) -> str:
        prose = _PROSE.match(self._buffer)
        self._consume(prose.end() if prose else 1)
        space, self._spaced = "" if self._spaced else " ", True
        return space

    def _json(self) -> str:
        if not self._fenced:
            return self._consume(len(self._buffer))
        end = None if self._in_string else _FENCE_END.match(self._buffer)
        if end is not None:
            self._consume(end.end())
            self._step = self._prose
            return ""
        run = None if self._escaped else _JSON_RUN.match(self._buffer)
        text = self._consume(run.end() if run else 1)
        if text == '"' and not self._escaped:
            self._in_string = not self._in_string
        self._escaped = text == "\\" and self._in_string and not self._escaped
        return text
