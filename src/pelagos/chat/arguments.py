"""From the parameters of one DSML tool call to its arguments as JSON text, repaired where they must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_WRAPPERS = ("arguments", "input")  # parameters that some outputs wrap around the real ones
_CLOSERS = {"{": "}", "[": "]"}


class Arguments:
    """The arguments of one call; every method returns the JSON text it adds."""

    def __init__(self, schema: Any = None) -> None:
        """schema: the tool's JSON schema; without one a value of unknown type is JSON if it parses as such."""
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        self._properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self._begun = False
        self._name: str | None = None  # of the parameter in hand
        self._is_string: bool | None = None  # what its tag says, None when it says nothing
        self._streams = False
        self._text = ""

    def open(self, name: str, is_string: bool | None) -> str:
        """Begin a parameter; strings stream, other values wait for their end."""
        added = self._settle()
        wraps = not self._begun and name in _WRAPPERS and self._properties and name not in self._properties
        self._name, self._is_string, self._text = name, is_string, ""
        self._streams = bool(is_string) and not wraps
        return added + self._key() + '"' if self._streams else added

    def push(self, text: str) -> str:
        """Take a part of the value."""
        if self._streams:
            return _quoted(text)[1:-1]
        self._text += text
        return ""

    def close(self) -> str:
        """End the parameter; a possible wrapper waits to see whether it is the only one."""
        if self._streams:
            self._name, self._streams = None, False
            return '"'
        return "" if self._may_unwrap() else self._settle()

    def end(self) -> str:
        """End the call."""
        if self._may_unwrap():
            inner = _parsed(self._text)
            if isinstance(inner, dict) and inner and inner.keys() <= self._properties.keys():
                return json.dumps(inner, ensure_ascii=False)
        added = self._settle()
        return added + "}" if self._begun else "{}"

    def cut(self) -> str:
        """Break off where the output was cut: the JSON stays open."""
        if self._name is None or self._streams:
            return ""
        return self._key() + (_quoted(self._text)[:-1] if self._is_string else self._text)

    def _may_unwrap(self) -> bool:
        return (
            not self._begun
            and self._name in _WRAPPERS
            and bool(self._properties)
            and self._name not in self._properties
        )

    def _settle(self) -> str:
        """Write the value that waits, if one does."""
        if self._name is None:
            return ""
        added = self._key() + self._value(self._properties.get(self._name))
        self._name = None
        return added

    def _key(self) -> str:
        assert self._name is not None
        lead, self._begun = ", " if self._begun else "{", True
        return f"{lead}{_quoted(self._name)}: "

    def _value(self, schema: Any) -> str:
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        is_string = kind == "string" if self._is_string is None and kind is not None else self._is_string
        text = self._text.strip()
        if not is_string:
            if _is_json(text):
                return text
            if (is_string is False) and _is_json(repaired := _close_brackets(text)):
                return repaired
        return _quoted(self._text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _parsed(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def _is_json(text: str) -> bool:
    return text == "null" or _parsed(text) is not None


def _close_brackets(text: str) -> str:
    """Add the quotes and brackets that are missing at the end, drop closing ones that close nothing."""
    kept: list[str] = []
    expected: list[str] = []
    in_string = escaped = False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        elif character in _CLOSERS:
            expected.append(_CLOSERS[character])
        elif character in _CLOSERS.values():
            if character not in expected:
                continue
            while expected[-1] != character:
                kept.append(expected.pop())
            expected.pop()
        kept.append(character)
    body = "".join(kept) + ('"' if in_string else "")
    return body.rstrip().removesuffix(",") + "".join(reversed(expected))
