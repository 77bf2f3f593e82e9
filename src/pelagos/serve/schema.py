"""From JSON schemas to the Lark dialect of llguidance: tool blocks in DSML, and JSON or regex answers.

A parameter of a string type is raw text up to its closing tag, any other is JSON (`string="true|false"`); a schema
that allows both gives both forms. What would let one request stall the server is refused before it is compiled.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any
from urllib.parse import unquote

TEXT = "TEXT: /(?s:.*)/\n"  # the terminal of free text
MAX_TEXT = 2048  # characters of one literal, name or pattern, and least length of a text: they are forced on a step
MAX_REPEATS = 20_000  # product of the counts in one pattern
MAX_NODES = 50_000
MAX_FREE_ORDER = 60  # properties that may come in any order (bits of a rule's parameter); more keep the schema's
_SPACE = r"\x20|\n\x20{0,48}|\n\t{0,16}"  # between JSON tokens: no endless blanks
_SILENT = {"description", "title", "$comment", "default", "examples", "$schema", "$id", "strict"}
_TOP = _SILENT | {"type", "properties", "required", "additionalProperties", "$defs", "$def", "definitions"}
_STRING = _SILENT | {"type", "pattern", "format", "minLength", "maxLength"}
_OTHERS = ("object", "array", "number", "boolean", "null")
_HEX, _BYTE = "[0-9a-fA-F]{1,4}", "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_FORMATS = {
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"(?:{_BYTE}\.){{3}}{_BYTE}",
    "ipv6": "|".join(
        [f"(?:{_HEX}:){{7}}{_HEX}", f"(?:{_HEX}:){{1,7}}:", f":(?::{_HEX}){{1,7}}", "::"]
        + [f"(?:{_HEX}:){{1,{7 - n}}}(?::{_HEX}){{1,{n}}}" for n in range(1, 7)]
    ),
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,3}}",
    "email": rf"[a-zA-Z0-9_+-]{{1,32}}(?:\.[a-zA-Z0-9_+-]{{1,16}}){{0,2}}@{_LABEL}(?:\.{_LABEL}){{1,3}}",
}
_REGEX_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()|]|.", re.DOTALL)
_COUNTS = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_REFERENCES = re.compile(r'"\$ref": "#/?([^/"]*)')
Test = Callable[[str], object]


class Unsupported(Exception):
    """A schema, or a part of one, that no grammar here can express; the message names the keyword."""


def json_form(schema: Any, *, strict: bool) -> str:
    """Return the Lark expression of JSON text that follows a schema, None for any object; raises Unsupported."""
    check(schema)
    schema = {"type": "object"} if schema is None else dict(schema) if isinstance(schema, Mapping) else {}
    options = {"whitespace_pattern": _SPACE, "lenient": not strict}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def regex_form(pattern: Any) -> str:
    """Return the Lark expression of text that matches a regular expression as a whole; raises Unsupported."""
    return _pattern(pattern, whole=True)


def call_rules(functions: Iterable[str], dsml: str, *, many: bool) -> str:
    """Return the rules `block`, `calls` and what they need, over the rules of functions; dsml is its token's name."""
    rules = list(functions)
    heads = " | ".join(f"f{index}" for index in range(len(rules)))
    return (
        f'block: "tool_calls>\\n" calls\ncalls: call{"+" if many else ""} "</" {dsml} "tool_calls>"\n'
        f'call: "<" {dsml} ({heads})\n{TEXT}' + "".join(rules)
    )


def function_rules(index: int, function: Mapping[str, Any], dsml: str, *, strict: bool, test: Test) -> str:
    """Return the rules of one function, named f{index}.

    `test` is given the rules of each value and raises Unsupported where they do not compile. Where a value or the
    whole schema is unsupported, a lenient function takes anything, and a strict one raises Unsupported.
    """
    try:
        return _function_rules(index, function["name"], function["parameters"], dsml, strict, test)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        if strict:
            raise Unsupported(f"the schema is malformed ({type(error).__name__}: {error})") from None
    except Unsupported:
        if strict:
            raise
    return _function_rules(index, function["name"], {}, dsml, False, test)


def _function_rules(index: int, name: str, schema: Any, dsml: str, strict: bool, test: Test) -> str:
    schema = _resolved(schema, schema)
    if strict:
        _refuse(schema.keys() - _TOP)
    properties = schema.get("properties")
    extra = schema.get("additionalProperties", properties is None)
    given = {key: each for key, each in dict(properties or {}).items() if '"' not in key}
    if strict and len(given) < len(properties or {}):
        raise Unsupported("properties: a name with a quote in it cannot be written in a tag")
    required = [key for key in dict.fromkeys(schema.get("required") or ()) if key in given]
    order = [*required, *(key for key in given if key not in required)]
    if any(len(key) > MAX_TEXT for key in order):
        raise Unsupported("a name is too long")

    def value(place: str, head: str, about: Any, *key: str) -> list[str]:
        try:
            rules = [*key, *_parameter(f"{index}_{place}", head, _forms(about, schema, strict), dsml)]
            test(f"start: q{index}_{place}\n{TEXT}" + "\n".join(rules))
            return rules
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError, Unsupported):
            if strict:
                raise
        return [*key, *_parameter(f"{index}_{place}", head, _forms({}, {}, False), dsml)]

    head = _literal(f'invoke name="{name}">\n')
    is_free = 0 < len(order) <= MAX_FREE_ORDER
    rules = [f'f{index}: {head} p{index}{"::0" if is_free else ""} "</" {dsml} "invoke>\\n"']
    for place, key in enumerate(order):
        rules += value(str(place), _literal(f'parameter name="{key}" string="')[:-1], given[key])
    more = None
    if extra is not False:
        others = " | ".join(map(_literal, order))
        key = f"K{index}: /[a-zA-Z0-9_.-]{{1,64}}/" + (f" & ~({others})" if order else "")
        rules += value("more", f'"parameter name=\\"" K{index} "\\" string=\\"', extra, key)
        more = f"q{index}_more"
    if is_free:
        end = f'"" %if is_ones([0:{len(required)}])' if required else '""'
        turns = [f"q{index}_{bit} p{index}::set_bit({bit}) %if bit_clear({bit})" for bit in range(len(order))]
        rules.append(f"p{index}::_: " + " | ".join([end, *turns, *([f"{more} p{index}::_"] if more else [])]))
    else:
        turns = [f"q{index}_{place}{'' if key in required else '?'}" for place, key in enumerate(order)]
        rules.append(f"p{index}: " + " ".join([*turns, *([f"{more}*"] if more else [])] or ['""']))
    return "\n".join(rules) + "\n"


def _parameter(name: str, head: str, forms: tuple[list[str], list[Any]], dsml: str) -> list[str]:
    """The rule q{name} of a parameter; head is the open literal of its tag up to the quote after `string=`."""
    texts, others = forms
    rules, ways = [], []
    if texts:
        rules.append(f'V{name.upper()}: ({" | ".join(texts)}) "</"')
        ways.append(f'{head}true\\">" V{name.upper()}')
    if others:
        ways.append(f'{head}false\\">" ({" | ".join(others)}) "</"')
    return [*rules, f'q{name}: "<" {dsml} ({" | ".join(ways)}) {dsml} "parameter>\\n"']


def _forms(schema: Any, root: Mapping[str, Any], strict: bool, depth: int = 0) -> tuple[list[str], list[str]]:
    """Return terminals for what may be written raw and expressions for what may be written as JSON."""
    if depth > 16:
        raise Unsupported("$ref: it goes in circles")
    if not isinstance(schema, Mapping):
        schema = {}
    schema = _resolved(schema, root)
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    for key in ("const", "enum"):
        if key in schema:
            values = [schema[key]] if key == "const" else schema[key]
            others = [value for value in values if not isinstance(value, str)]
            check(values)
            texts = [_literal(value) for value in values if isinstance(value, str)]
            return texts, [_json({"enum": others}, root, strict)] if others else []
    if strict:
        _refuse(schema.keys() & {"oneOf", "allOf", "not", "if"})
    is_text = kinds is None or "string" in kinds
    for key in ("anyOf", "oneOf"):
        if is_text and isinstance(schema.get(key), list):
            base = {name: each for name, each in schema.items() if name != key}
            found = [_forms({**base, **each}, root, strict, depth + 1) for each in schema[key] if each]
            texts, others = zip(*found, strict=True)
            return list(dict.fromkeys(itertools.chain(*texts))), list(dict.fromkeys(itertools.chain(*others)))
    if kinds is None:
        kinds = ["string", *_OTHERS]
    others = [kind for kind in kinds if kind != "string"]
    texts = [_text(schema, strict)] if "string" in kinds else []
    return texts, [_json({**schema, "type": others}, root, strict)] if others else []


def _json(schema: dict[str, Any], root: Mapping[str, Any], strict: bool) -> str:
    # A reference starts at the parameters' own root, wherever the value it is about stands.
    if '"$ref"' in json.dumps(schema):
        used = set(_REFERENCES.findall(json.dumps(root)))  # first steps of all references; "" is the root itself
        schema = {**schema, "$defs": {"root": root if "" in used else {key: root[key] for key in used & root.keys()}}}
        return json_form(schema, strict=strict).replace('"$ref": "#', '"$ref": "#/$defs/root')
    return json_form(schema, strict=strict)


def _text(schema: Mapping[str, Any], strict: bool) -> str:
    least, most = schema.get("minLength") or 0, schema.get("maxLength")
    check(schema)
    parts = [_pattern(schema["pattern"], whole=False)] if "pattern" in schema else []
    if schema.get("format") in _FORMATS:
        parts.append(f"/{_FORMATS[schema['format']]}/")
    elif strict and "format" in schema:
        raise Unsupported(f"format {schema['format']!r}")
    if most is not None and not least <= most <= MAX_TEXT:  # longer ones cost too much memory
        if strict or most < least:
            raise Unsupported(f"maxLength {most!r}: expected minLength to {MAX_TEXT}")
        most = None
    if least or most is not None:
        parts.append(f"/(?s:.{{{least},{'' if most is None else most}}})/")
    if strict:
        _refuse(schema.keys() - _STRING)
    return f"({' & '.join(parts)})" if parts else "TEXT"


def _pattern(pattern: Any, *, whole: bool) -> str:
    """Return a Lark regex for an ECMA pattern; anchors only at the ends of its outermost alternatives."""
    from llguidance import regex_to_lark

    check({"pattern": pattern})
    ways, depth = [""], 0
    for part in _REGEX_PARTS.findall(pattern):
        depth += (part == "(") - (part == ")")
        if part == "|" and not depth:
            ways.append("")
        else:
            ways[-1] += part
    return f"/{regex_to_lark('|'.join(_unanchored(way, whole=whole) for way in ways), 'dw')}/"


def _unanchored(way: str, *, whole: bool) -> str:
    core = way.removeprefix("^")
    is_end = core.endswith("$") and (len(core) - len(core[:-1].rstrip("\\"))) % 2 == 1
    head = "" if whole or core != way else "(?s:.*)"
    tail = "" if whole or is_end else "(?s:.*)"
    return f"(?:{head}(?:{core[:-1] if is_end else core}){tail})"


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow `$ref` inside the root; what stands beside it wins."""
    for _ in range(16):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if reference is None:
            return schema
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise Unsupported(f"$ref {reference!r}: only references inside the schema")
        target: Any = root
        for step in unquote(reference[1:]).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            target = target.get(step) if isinstance(target, Mapping) else None
        if not isinstance(target, Mapping):
            raise Unsupported(f"$ref {reference!r}: nothing is there")
        schema = {**target, **{key: each for key, each in schema.items() if key != "$ref"}}
    raise Unsupported("$ref: it goes in circles")


def check(schema: Any) -> None:
    """Raise Unsupported for a schema whose grammar could stall a step of the engine."""
    left: list[tuple[str, Any]] = [("", schema)]
    nodes = 0
    while left:
        key, value = left.pop()
        nodes += 1
        if nodes > MAX_NODES:
            raise Unsupported(f"a schema of more than {MAX_NODES} parts")
        if isinstance(value, Mapping):
            if any(len(name) > MAX_TEXT for name in value):
                raise Unsupported("a name is too long")
            left += [(name, each) for name, each in value.items() if name not in _SILENT or isinstance(each, Mapping)]
        elif isinstance(value, list):
            left += [(key, each) for each in value]
        elif isinstance(value, str):
            if len(value) > MAX_TEXT:
                raise Unsupported(f"{key or 'a literal'}: a text of {len(value)} characters")
            counts = [int(most or least) for least, most in _COUNTS.findall(value)] if key == "pattern" else ()
            if math.prod(max(1, count) for count in counts) > MAX_REPEATS:
                raise Unsupported(f"pattern {value!r}: its counts are too high")
        elif key == "minLength" and isinstance(value, (int, float)) and value > MAX_TEXT:
            raise Unsupported(f"minLength {value}: at most {MAX_TEXT}")
        elif key == "pattern":
            raise Unsupported(f"pattern {value!r}: expected a text")


def _refuse(keywords: Set[str]) -> None:
    if keywords:
        raise Unsupported(f"{min(keywords)} is not supported here")


def _literal(text: str) -> str:
    return json.dumps(text).replace("\x7f", "\\u007f")
