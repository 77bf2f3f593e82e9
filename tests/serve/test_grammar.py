"""Grammars: what may be sampled, against the parser and an independent reading of the schema."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import numpy as np
import pytest
from tests.engine.small_tokens import small_tokenizer
from tests.serve.answers import OFF, tool

from pelagos.chat.parser import Event, Parser
from pelagos.chat.render import render_prompt
from pelagos.chat.tokens import DSML, END_THINK, EOS
from pelagos.engine import SamplingParams
from pelagos.engine.sampler import Grammar, Sampler
from pelagos.errors import MissingDependency, RequestError
from pelagos.serve.answer import render_ask
from pelagos.serve.ask import Ask
from pelagos.serve.grammar import Grammars, TurnGrammar

TOKENIZER = small_tokenizer()
D, THINKS, END = (TOKENIZER.id(name) for name in (DSML, END_THINK, EOS))
GRAMMARS = Grammars()
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
MANY = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "n": {"type": "integer", "minimum": 3, "maximum": 40},
        "unit": {"enum": ["c", "f</", 3]},
        "code": {"type": "string", "pattern": "^[a-z]{2,4}$"},
        "tree": {"$ref": "#/$defs/Tree"},
        "maybe": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
        'say "it"': {"type": "string"},
    },
    "required": ["text", "tree"],
    "$defs": {"Tree": {"type": "object", "properties": {"x": {"$ref": "#/$defs/Tree"}}, "additionalProperties": False}},
}


def grammar(*, budget: int | None = None, grammars: Grammars = GRAMMARS, **body: Any) -> TurnGrammar | None:
    full = {"messages": [{"role": "user", "content": "json"}], **body}

    class Model:
        tokenizer, generation = TOKENIZER, "0731"

    return grammars.turn(TOKENIZER, render_ask(Model(), Ask(body=full)), full, budget=budget)  # type: ignore[arg-type]


def spell(text: str) -> list[int]:
    ids: list[int] = []
    for at, part in enumerate(text.split(DSML)):
        ids += [D] * (at > 0)
        for more, each in enumerate(part.split(END_THINK)):
            ids += [THINKS] * (more > 0) + TOKENIZER.encode(each)
    return ids


def takes(rules: TurnGrammar | None, text: str, *, end: bool = True) -> bool:
    """Whether the text may be written, and may end there."""
    assert rules is not None
    state = rules.fork()
    for token in [*spell(text), *([END] if end else [])]:
        mask = state.mask()
        if mask is not None and not mask[token]:
            return False
        state.accept(token)
    return True


def call(name: str, *parameters: tuple[str, str, Any]) -> str:
    inner = "".join(
        f'<{DSML}parameter name="{key}" string="{kind}">{value}</{DSML}parameter>\n' for key, kind, value in parameters
    )
    return f'<{DSML}invoke name="{name}">\n{inner}</{DSML}invoke>\n'


def block(*calls: str) -> str:
    return f"<{DSML}tool_calls>\n{''.join(calls)}</{DSML}tool_calls>"


def test_without_tools_and_forms_there_is_no_grammar() -> None:
    assert grammar() is None
    assert grammar(tools=[tool("f")], tool_choice="none", **OFF) is None
    assert grammar(response_format={"type": "text"}) is None


def test_text_is_free_until_a_block_opens() -> None:
    rules = grammar(tools=[tool("f", CITY)])
    assert isinstance(rules, Grammar)
    for token in [*spell("I think <f> </"), THINKS, *spell('Say {"a": 1}\n\n<')]:
        assert rules.mask() is None
        rules.accept(token)
    rules.accept(D)
    mask = rules.mask()
    assert mask is not None
    assert not mask[[END, D, THINKS]].any()
    for token in spell("tool_calls>\n" + call("f", ("city", "true", "Paris"))):
        assert rules.mask()[token]  # type: ignore[index]
        rules.accept(token)


GOOD = ("text", "true", "a </ <b> 2>&1 </parameter> \n\n"), ("tree", "false", '{"x": {"x":{}}}')


@pytest.mark.parametrize(
    ("parameters", "good"),
    [
        (GOOD, True),
        (GOOD[::-1], True),  # in any order
        ((*GOOD, ("n", "false", 40), ("unit", "true", "f</"), ("code", "true", "abcd")), True),
        ((*GOOD, ("unit", "false", 3), ("maybe", "true", "abc")), True),
        ((*GOOD, ("maybe", "false", "null")), True),
        (GOOD[:1], False),  # a required one is missing
        ((*GOOD, GOOD[0]), False),  # twice
        ((*GOOD, ("n", "false", 41)), False),
        ((*GOOD, ("n", "true", "4")), False),
        ((*GOOD, ("unit", "true", "k")), False),
        ((*GOOD, ("code", "true", "abcde")), False),
        ((*GOOD, ("maybe", "true", "abcd")), False),
        ((*GOOD, ("maybe", "false", '"abc"')), False),
        ((*GOOD, ("other", "true", "x")), False),
        ((("text", "false", '"a"'), GOOD[1]), False),
        ((GOOD[0], ("tree", "false", '{"y": 1}')), False),
        ((GOOD[0], ("tree", "true", "{}")), False),
    ],
)
def test_calls_follow_their_schema(parameters: tuple[tuple[str, str, Any], ...], good: bool) -> None:
    rules = grammar(tools=[tool("f", CITY), tool("g", MANY)], **OFF)
    assert takes(rules, f"Look:\n\n{block(call('g', *parameters))}") is good


def test_the_structure_of_a_block() -> None:
    rules = grammar(tools=[tool("f", CITY), tool("none", {"type": "object", "properties": {}})], **OFF)
    city = call("f", ("city", "true", "x"))
    assert takes(rules, block(city, call("none"), city))
    assert not takes(rules, block(call("h")))  # not declared
    assert not takes(rules, block())
    assert not takes(rules, block(city) + " and more")
    assert not takes(rules, block(city)[:-3])  # the end token cannot come before the block is closed
    one = grammar(tools=[tool("f", CITY)], parallel_tool_calls=False, **OFF)
    assert takes(one, block(city))
    assert not takes(one, block(city, city))


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ({"type": "object"}, [("anything", True)]),
        (CITY, [("other", False)]),
        ({**CITY, "additionalProperties": True}, [("other", True)]),
        ({**CITY, "additionalProperties": {"type": "string"}}, [("other", True)]),
    ],
)
def test_names_that_are_not_declared(schema: Any, names: list[tuple[str, bool]]) -> None:
    rules = grammar(tools=[tool("f", schema)], **OFF)
    city = [("city", "true", "x")] if schema.get("required") else []
    for name, good in names:
        assert takes(rules, block(call("f", *city, (name, "true", "y")))) is good


def test_many_properties_keep_the_order_of_the_schema() -> None:
    properties = {f"p{index}": {"type": "boolean"} for index in range(80)}
    rules = grammar(tools=[tool("f", {"type": "object", "properties": properties, "required": ["p7"]})], **OFF)
    assert takes(rules, block(call("f", ("p7", "false", "true"), ("p70", "false", "false"))))
    assert not takes(rules, block(call("f", ("p70", "false", "false"))))


def test_a_forced_call_comes_right_after_thinking() -> None:
    tools = [tool("f", CITY), tool("g", CITY)]
    named = {"type": "function", "function": {"name": "g"}}
    f, g = (block(call(name, ("city", "true", "x"))) for name in "fg")
    for thinks in ("", f"Why not?{END_THINK}"):
        mode = {} if thinks else OFF
        rules, only_g = (grammar(tools=tools, tool_choice=choice, **mode) for choice in ("required", named))
        head = f"<{DSML}tool_calls>\n" if not thinks else ""  # the prompt ends behind it already
        for text, good in ((f, (True, False)), (g, (True, True)), ("No.", (False, False))):
            answer = thinks + (f"\n\n{text}" if thinks else text.removeprefix(head))
            assert (takes(rules, answer), takes(only_g, answer)) == good
    assert not takes(rules, "Let me", end=True)  # neither may thinking end the answer
    assert takes(rules, f"Let me\n\n{f}")  # a block ends thinking, too


@pytest.mark.parametrize("thinks", ["", f"Hm.{END_THINK}"])
@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"type": "json_object"}, '{"a": [1, "</"],\n "b": null}', "[1]"),
        ({"type": "json_schema", "json_schema": {"name": "c", "schema": CITY}}, '{"city": "x"}', '{"city": 1}'),
        ({"type": "regex", "regex": "^[ab]{2}$|c/d"}, "ab", "abab"),
        ({"type": "regex", "regex": "^[ab]{2}$|c/d"}, "c/d", ""),
    ],
)
def test_prescribed_forms(thinks: str, form: Any, good: str, bad: str) -> None:
    mode = {} if thinks else OFF
    for tools in ({}, {"tools": [tool("f", CITY)]}):
        rules = grammar(response_format=form, **mode, **tools)
        assert takes(rules, thinks + good)
        assert not takes(rules, thinks + bad)
        assert not takes(rules, f"{thinks}Sure: {good}")
        assert takes(rules, thinks + "\n\n" + block(call("f", ("city", "true", "x")))) is bool(tools)


def test_a_budget_ends_thinking_and_nothing_else() -> None:
    rules = grammar(budget=3)
    assert rules is not None
    for token in spell("abc")[:3]:
        assert rules.mask() is None
        rules.accept(token)
    assert np.flatnonzero(rules.mask()).tolist() == [THINKS]  # type: ignore[arg-type]
    rules.accept(THINKS)
    for token in spell("and so on and on"):
        assert rules.mask() is None
        rules.accept(token)
    assert grammar(budget=3, **OFF) is None


def test_any_rollback_is_as_if_nothing_had_been() -> None:
    rules = grammar(tools=[tool("f", CITY), tool("g", MANY)], tool_choice="required", budget=9)
    assert rules is not None
    ids = [*spell(f"Hm.{END_THINK}\n\n{block(call('g', *GOOD), call('f', ('city', 'true', 'x')))}")]
    masks, state = [], rules.fork()
    for token in ids:
        masks.append(state.mask())
        state.accept(token)
    masks.append(state.mask())
    rng = np.random.default_rng(0)
    for _ in range(60):
        count = int(rng.integers(1, len(ids) + 1))
        other = state.fork()
        other.rollback(count)
        assert same(other.mask(), masks[len(ids) - count])
        for token in ids[len(ids) - count :]:
            other.accept(token)
        assert same(other.mask(), masks[-1])
    assert same(state.mask(), masks[-1])


def same(left: np.ndarray | None, right: np.ndarray | None) -> bool:
    return (left is None) == (right is None) and (left is None or np.array_equal(left, right))  # type: ignore[arg-type]


def sampled(seed: int, tools: list[Any], *, limit: int = 800) -> list[Event]:
    """Draw an answer from noise under the grammar; tags close now and then."""
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools, "tool_choice": "required", **OFF}
    prompt = render_prompt(body)
    rules = GRAMMARS.turn(TOKENIZER, prompt, body)
    sampler = Sampler(SamplingParams(seed=seed, grammar=rules), TOKENIZER.vocab_size)
    parser, decoder = Parser.for_prompt(prompt, TOKENIZER), TOKENIZER.stream_decoder()
    logits = np.zeros(TOKENIZER.vocab_size, np.float32)
    logits[[D, *spell("</}")]] = 6, 3, 4, 4
    events: list[Event] = []
    for position in range(limit):
        token = sampler.pick(logits, position).token
        events += parser.push(token, decoder.push(token))
        if token == END:
            return events + parser.finish("stop")
    return events + parser.finish("length")


def test_whatever_is_sampled_is_a_call_in_its_schema() -> None:
    done = 0
    for seed in range(40):
        events = sampled(seed, [tool("g", MANY), tool("f", CITY)])
        assert not [event for event in events if event.kind == "content"]
        if events[-1].text != "tool_calls":
            continue
        names = {event.index: event.name for event in events if event.kind == "tool_call"}
        for index, name in names.items():
            text = "".join(event.text for event in events if event.kind == "arguments" and event.index == index)
            arguments = json.loads(text)
            if name == "f":
                assert list(arguments) == ["city"]
                continue
            assert {"text", "tree"} <= arguments.keys() <= {"text", "n", "unit", "code", "tree", "maybe"}
            assert 3 <= arguments.get("n", 3) <= 40
            assert arguments.get("unit", 3) in ("c", "f</", 3)
            assert len(arguments.get("code", "abc")) in (2, 3, 4)
            assert len(arguments.get("maybe") or "") <= 3
            done += 1
    assert done >= 3


UNSUPPORTED = [
    ({"type": "string", "pattern": "(?=x)y"}, "look-around"),
    ({"not": {"type": "null"}}, "not"),
    ({"type": "string", "contentMediaType": "x", "if": {}}, "if"),
    ({"type": "string", "format": "iri"}, "iri"),
    ({"$ref": "#/nowhere"}, "nothing is there"),
    ({"$ref": "https://example.com"}, "only references inside"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "string", "pattern": "((a{100}){100}){100}"}, "counts"),
    ({"type": "object", "properties": {"x": {"type": "string", "pattern": "(a{999}){999}"}}}, "counts"),
    ({"type": "string", "pattern": "a*", "minLength": 10**6}, "minLength"),
    ({"const": "x" * 5000}, "5000 characters"),
    ({"type": "string", "pattern": 5}, "pattern"),
    ({"enum": 5}, "malformed"),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "allOf"),
]


@pytest.mark.parametrize(("schema", "words"), UNSUPPORTED, ids=[str(each[0])[:40] for each in UNSUPPORTED])
def test_what_no_grammar_can_say(schema: Any, words: str) -> None:
    parameters = {"type": "object", "properties": {"odd": schema, "n": {"type": "integer"}}, "required": ["n", "odd"]}
    free = for_parameters(parameters)
    n, ways = ("n", "false", 1), [("false", "[1]"), ("false", "1"), ("false", "{}"), ("true", "x")]
    assert any(takes(free, block(call("f", n, ("odd", *way)))) for way in ways)
    # The others are still held to theirs.
    assert not any(takes(free, block(call("f", ("odd", *way), ("n", "true", "1")))) for way in ways)
    with pytest.raises(RequestError, match=words):
        for_parameters(parameters, strict=True)


def for_parameters(parameters: Any, *, strict: bool = False) -> TurnGrammar | None:
    """The grammar for a schema that the renderer might refuse."""
    prompt = render_prompt({"messages": [{"role": "user", "content": "x"}], "tools": [tool("f")], **OFF})
    prompt.tools[0]["parameters"] = parameters  # type: ignore[index]
    return Grammars().turn(TOKENIZER, prompt, {"tools": [tool("f", strict=strict)]})


@pytest.mark.parametrize("schema", [5, "x", [], {"properties": 3}, {"required": 4, "properties": {"a": {}}}, None])
def test_malformed_schemas_are_free_or_refused(schema: Any) -> None:
    rules = for_parameters(schema)
    assert takes(rules, block(call("f"))) or takes(rules, block(call("f", ("a", "true", "x"))))


def test_references_start_at_the_root_of_the_parameters() -> None:
    defs = {"A": {"type": "array", "items": {"$ref": "#/definitions/B"}}, "B": {"type": "boolean"}}
    properties = {
        f"p{index}": {"type": "object", "properties": {"a": {"$ref": "#/definitions/A"}}} for index in range(40)
    }
    properties["same"] = {"type": "array", "items": {"$ref": "#/properties/last"}}
    properties["last"] = {"type": "integer"}
    schema = {"type": "object", "properties": properties, "definitions": defs}
    rules = grammar(tools=[tool("f", schema)], **OFF)
    assert takes(rules, block(call("f", ("p7", "false", '{"a": [true]}'), ("same", "false", "[1, 2]"))))
    assert not takes(rules, block(call("f", ("p7", "false", '{"a": [1]}'))))
    assert not takes(rules, block(call("f", ("same", "false", "[true]"))))
    tree = {
        "type": "object",
        "properties": {"left": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["left"],
    }
    rules = grammar(tools=[tool("f", tree)], **OFF)
    assert takes(rules, block(call("f", ("left", "false", '{"left": {"left": null}}'))))
    assert not takes(rules, block(call("f", ("left", "false", '{"left": {}}'))))


def test_a_hostile_schema_takes_little_time() -> None:
    wide = {f"p{i}": {"type": "string", "pattern": f"(x|y)*{i}(x|y){{30}}(?=a)"} for i in range(300)}
    deep: Any = {"type": "integer"}
    for _ in range(90):
        deep = {"type": "array", "items": deep, "minItems": 2}
    huge = {"enum": [f"{i}-{'z' * 30}" for i in range(30_000)]}
    for properties in (wide, {"deep": deep}, {"huge": huge}):
        tools = [tool(f"f{i}", {"type": "object", "properties": properties}) for i in range(1)]
        start = time.process_time()
        assert grammar(tools=tools, grammars=Grammars(), **OFF) is not None
        assert time.process_time() - start < 6
    with pytest.raises(RequestError, match="bytes"):
        grammar(tools=[tool(f"f{i:03}", MANY) for i in range(3000)], **OFF)
    start = time.process_time()
    many = {f"p{i}": {"enum": [f"{i}-{j}" for j in range(9)]} for i in range(800)}
    with contextlib.suppress(RequestError):  # a grammar or a refusal, in little time
        grammar(tools=[tool("f", {"type": "object", "properties": many})], grammars=Grammars(), **OFF)
    assert time.process_time() - start < 6


def test_results_are_kept_and_bounded() -> None:
    grammars = Grammars(capacity=2)
    for index in (1, 2, 3, 1):
        assert grammar(tools=[tool(f"f{index}", CITY)], grammars=grammars, **OFF) is not None
        assert grammars._compiled.cache_info().currsize <= 2
    assert grammars._compiled.cache_info().hits == 0
    grammar(tools=[tool("f1", CITY)], grammars=grammars, **OFF)
    assert grammars._compiled.cache_info().hits == 1


def test_without_the_library_only_prescribed_forms_are_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars()
    for _ in range(2):
        assert grammar(tools=[tool("f", CITY)], grammars=grammars) is None
    assert len([record for record in caplog.records if "llguidance" in record.message]) == 1
    for forced in ({"tool_choice": "required"}, {"response_format": {"type": "json_object"}}):
        with pytest.raises(MissingDependency, match="pip install llguidance"):
            grammar(tools=[tool("f", CITY)], grammars=grammars, **forced)
    assert grammar(budget=3, grammars=grammars) is not None
