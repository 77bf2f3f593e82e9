"""From the parameters of one DSML tool call to its arguments as JSON text, repaired where they must be."""

import json
from collections.abc import Mapping
from typing import Any

_CLOSERS = {"{": "}", "[": "]"}


class Arguments:
    """The arguments of one call; every method returns the JSON text it adds."""

    def __init__(self, schema: Any = None) -> None:
        """schema: the tool's JSON schema; without one a value of unknown type is JSON if it parses as such."""
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        self._properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self._begun = False
        self._name: str | None = None  # of the parameter in hand, or of a wrapper that waits for the end of the call
        self._is_string: bool | None = None  # what its tag says, None when it says nothing
        self._streams = self._wraps = False
        self._text = ""

    def open(self, name: str, is_string: bool | None) -> str:
        """Begin a parameter; strings stream, other values and possible wrappers of the real arguments wait."""
        added = self._settle()
        known = not self._properties or name in self._properties
        self._wraps = name in ("arguments", "input") and not known and not self._begun
        self._name, self._is_string, self._text = name, is_string, ""
        self._streams = bool(is_string) and not self._wraps
        return added + self._key() + '"' if self._streams else added

    def push(self, text: str) -> str:
        """Take a part of the value."""
        if self._streams:
            return _quoted(text)[1:-1]
        self._text += text
        return ""

    def close(self) -> str:
        """End the parameter."""
        return "" if self._wraps else self._settle()

    def end(self) -> str:
        """End the call."""
        inner = _parsed(self._text) if self._wraps and self._name and not self._begun else None
        if isinstance(inner, dict) and inner and inner.keys() <= self._properties.keys():
            return json.dumps(inner, ensure_ascii=False)
        added = self._settle()
        return added + "}" if self._begun else "{}"

    def cut(self) -> str:
        """Break off where the output was cut: the JSON stays open."""
        if self._name is None or self._streams:
            return ""
        return self._key() + (_quoted(self._text)[:-1] if self._is_string else self._text)

    def _settle(self) -> str:
        if self._name is None:
            return ""
        added = '"' if self._streams else self._key() + self._value(self._properties.get(self._name))
        self._name, self._streams = None, False
        return added

    def _key(self) -> str:
        lead, self._begun = ", " if self._begun else "{", True
        return f"{lead}{_quoted(self._name)}: "

    def _value(self, schema: Any) -> str:
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        is_string = kind == "string" if self._is_string is None and kind is not None else self._is_string
        if not is_string:
            text = self._text.strip()
            for candidate in (text, _close_brackets(text)) if is_string is False else (text,):
                if _parsed(candidate) is not None or candidate == "null":
                    return candidate
        return _quoted(self._text)


def _quoted(text: str | None) -> str:
    return json.dumps(text, ensure_ascii=False)


def _parsed(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def _close_brackets(text: str) -> str:
    """Add the quotes and brackets that are missing, drop closing ones that close nothing."""
    kept, expected = "", ""
    in_string = escaped = False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character in "}]":
            inner, found, outer = expected.partition(character)
            kept += inner + found
            expected = outer if found else expected
            continue
        else:
            in_string = character == '"'
            expected = _CLOSERS.get(character, "") + expected
        kept += character
    return (kept + '"' * in_string).rstrip().removesuffix(",") + expected
