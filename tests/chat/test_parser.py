import json
import random
import re
from pathlib import Path

import deepseek_recipe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chat.conversations import WORDS, some_arguments, some_text

from pelagos.chat import Event, Parser, render, render_prompt
from pelagos.chat.tokens import DSML, END_THINK, EOS, SPECIAL_TOKENS, THINK

GOLDEN = Path(__file__).parents[1] / "golden" / "encoding"
IDS = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
SPECIAL = {index: token for token, index in IDS.items()}
CUT = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
D = DSML
PROPERTIES = {"s": {"type": "string"}, "n": {"type": "array"}, "city": {"type": "string"}}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": PROPERTIES}}},
    {"type": "function", "function": {"name": "g"}},
]


def block(*invokes, wrapper="tool_calls"):
    return f"\n\n<{D}{wrapper}>\n" + "".join(invokes) + f"</{D}{wrapper}>"


def invoke(*parameters, name="f"):
    return f'<{D}invoke name="{name}">\n' + "".join(parameters) + f"</{D}invoke>\n"


def parameter(name, value, string="true"):
    return f'<{D}parameter name="{name}" string="{string}">{value}</{D}parameter>\n'


S, N = parameter("s", "x"), parameter("n", "[1,2]", "false")
C = block(invoke(S, N))
C_ARGUMENTS = '{"s": "x", "n": [1,2]}'


def tokens_of(raw):
    """Every character a token of its own, every spelling of a special token that special token."""
    for piece in CUT.split(raw):
        if piece in IDS:
            yield IDS[piece], piece
        else:
            yield from ((100 + ord(character) % 99, character) for character in piece)


def pieces_of(raw, rng):
    """Ordinary text in random pieces."""
    held = ""
    for index, text in tokens_of(raw):
        if held and (index < 100 or rng.random() < 0.3):
            yield 100, held
            held = ""
        if index < 100:
            yield index, text
        else:
            held += text
    if held:
        yield 100, held


def collect(events):
    answer = {"reasoning": "", "content": "", "calls": [], "finish": None}
    for event in events:
        assert answer["finish"] is None
        if event.kind == "tool_call":
            assert event.index == len(answer["calls"])
            answer["calls"].append([event.name, ""])
        elif event.kind == "arguments":
            assert event.text
            assert event.index == len(answer["calls"]) - 1
            answer["calls"][-1][1] += event.text
        elif event.kind == "finish":
            answer["finish"] = event.text
        else:
            assert event.text
            answer[event.kind] += event.text
    return answer["reasoning"], answer["content"], [tuple(call) for call in answer["calls"]], answer["finish"]


def parse_tokens(tokens, *, thinking=True, tools=TOOLS, reason="stop", **options):
    parser = Parser(thinking, tools, special_tokens=SPECIAL, rng=random.Random(1), **options)
    events = [event for index, text in tokens for event in parser.push(index, text)]
    return collect(events + parser.finish(reason))


def parse(raw, **options):
    """Parse at several splits of the raw text, which must agree."""
    results = [parse_tokens(tokens_of(raw), **options)]
    results += [parse_tokens(pieces_of(raw, random.Random(seed)), **options) for seed in range(8)]
    results.append(parse_tokens(((IDS.get(piece, 100), piece) for piece in CUT.split(raw) if piece), **options))
    assert all(result == results[0] for result in results), results
    return results[0]


F = [("f", C_ARGUMENTS)]
ROWS = {
    # the recorded results of deepseek-recipe, as the recoveries amend them
    "no </think> before a call": ("thinking..." + C, {}, ("thinking...", "", F, "tool_calls")),
    "no </think> at all": (f"just text{EOS}", {}, ("just text", "", [], "stop")),
    "stray </think>": ("R</think>a</think>b", {}, ("R", "ab", [], "stop")),
    "wrapper toolcalls": ("R</think>" + block(invoke(S, N), wrapper="toolcalls"), {}, ("R", "", F, "tool_calls")),
    "wrapper tool_ccalls": ("R</think>" + block(invoke(S, N), wrapper="tool_ccalls"), {}, ("R", "", F, "tool_calls")),
    "wrapper function_calls": (
        "R</think>" + block(invoke(S, N), wrapper="function_calls"),
        {},
        ("R", "", F, "tool_calls"),
    ),
    "no wrapper": ("R</think>\n\n" + invoke(S, N), {}, ("R", "", F, "tool_calls")),
    "wrapper not closed": ("R</think>" + C.removesuffix(f"</{D}tool_calls>") + EOS, {}, ("R", "", F, "tool_calls")),
    "invoke not closed": (
        "R</think>" + block(f'<{D}invoke name="f">\n{S}{N}', invoke(name="g")),
        {},
        ("R", "", [*F, ("g", "{}")], "tool_calls"),
    ),
    "text after the block": (f"R</think>{C}\n\nbye{EOS}", {}, ("R", "", F, "tool_calls")),
    "cut inside a string": (
        C[: C.index("x</") + 1],
        {"thinking": False, "reason": "length"},
        ("", "", [("f", '{"s": "x')], "length"),
    ),
    "cut inside JSON": (
        C[: C.index(",2]")],
        {"thinking": False, "reason": "length"},
        ("", "", [("f", '{"s": "x", "n": [1')], "length"),
    ),
    "cut after the call": (C, {"thinking": False, "reason": "length"}, ("", "", F, "length")),
    "parameter not closed": (
        "R</think>" + block(invoke(S.replace(f"</{D}parameter>", ""), N)),
        {},
        ("R", "", F, "tool_calls"),
    ),
    "last parameter not closed": (
        "R</think>" + block(invoke(N, S.replace(f"</{D}parameter>", ""))),
        {},
        ("R", "", [("f", '{"n": [1,2], "s": "x"}')], "tool_calls"),
    ),
    "stopped inside a parameter": (
        f'R</think>\n\n<{D}tool_calls>\n<{D}invoke name="f">\n<{D}parameter name="s" string="true">x\n{EOS}',
        {},
        ("R", "", [("f", '{"s": "x"}')], "tool_calls"),
    ),
    "no string attribute, schema says string": (
        block(invoke(f'<{D}parameter name="city">12</{D}parameter>\n')),
        {"thinking": False},
        ("", "", [("f", '{"city": "12"}')], "tool_calls"),
    ),
    "no string attribute, schema says array": (
        block(invoke(f'<{D}parameter name="n">[1, 2]</{D}parameter>\n')),
        {"thinking": False},
        ("", "", [("f", '{"n": [1, 2]}')], "tool_calls"),
    ),
    "no string attribute, no schema": (
        block(
            invoke(
                *(
                    f'<{D}parameter name="{k}">{v}</{D}parameter>\n'
                    for k, v in zip("abc", ("7", "x y", "null"), strict=True)
                ),
                name="g",
            )
        ),
        {"thinking": False},
        ("", "", [("g", '{"a": 7, "b": "x y", "c": null}')], "tool_calls"),
    ),
    "broken JSON": (
        block(invoke(parameter("n", "[1, 2", "false"))),
        {"thinking": False},
        ("", "", [("f", '{"n": [1, 2]}')], "tool_calls"),
    ),
    "broken JSON, other ways": (
        block(
            invoke(
                parameter("a", '{"k": ["v', "false"),
                parameter("b", "[1]]", "false"),
                parameter("c", "NaN", "false"),
                parameter("d", "", "false"),
                parameter("e", '{"k": [1}', "false"),
                parameter("f", "[1,", "false"),
                name="g",
            )
        ),
        {"thinking": False},
        (
            "",
            "",
            [("g", '{"a": {"k": ["v"]}, "b": [1], "c": "NaN", "d": "", "e": {"k": [1]}, "f": [1]}')],
            "tool_calls",
        ),
    ),
    "no tools declared": (
        f"R</think>a{C}",
        {"tools": None},
        ("R", "a" + C, [], "stop"),
    ),
    "wrapped arguments": (
        block(invoke(parameter("arguments", '{"s": "x", "n": [1]}', "false"))),
        {"thinking": False},
        ("", "", [("f", '{"s": "x", "n": [1]}')], "tool_calls"),
    ),
    "wrapped input, as a string": (
        block(invoke(parameter("input", '{"s": "é"}'))),
        {"thinking": False},
        ("", "", [("f", '{"s": "é"}')], "tool_calls"),
    ),
    "a parameter named arguments": (
        block(invoke(parameter("arguments", '{"other": 1}', "false")), invoke(parameter("arguments", '{"s": 1}'), S)),
        {"thinking": False},
        (
            "",
            "",
            [("f", '{"arguments": {"other": 1}}'), ("f", '{"arguments": "{\\"s\\": 1}", "s": "x"}')],
            "tool_calls",
        ),
    ),
    "arguments without a schema": (
        block(invoke(parameter("arguments", "bad json"), name="g")),
        {"thinking": False},
        ("", "", [("g", '{"arguments": "bad json"}')], "tool_calls"),
    ),
    "a block without a call": (f"R</think>a{block('I cannot.')}b", {}, ("R", "aI cannot.b", [], "stop")),
    "a block that never closes and holds no call": (
        f"R</think>a\n\n<{D}tool_calls>\nI cannot.{EOS}",
        {},
        ("R", "aI cannot.", [], "stop"),
    ),
    "unknown tool": ("R</think>" + block(invoke(name="h")), {}, ("R", "", [("h", "{}")], "tool_calls")),
    "two calls": (
        "R</think>a" + block(invoke(S), invoke(name="g")),
        {},
        ("R", "a", [("f", '{"s": "x"}'), ("g", "{}")], "tool_calls"),
    ),
    "call without parameters, empty line": (
        "R</think>" + block(f'<{D}invoke name="g">\n\n</{D}invoke>\n'),
        {},
        ("R", "", [("g", "{}")], "tool_calls"),
    ),
    # what stays text and what is held back
    "spelled, not a token": ("R</thi\u200bnk>a", {}, ("R</thi\u200bnk>a", "", [], "stop")),
    "newlines around the parts": ("\n\nR\n\n</think>\n\na\n\nb\n", {}, ("R", "a\n\nb\n", [], "stop")),
    "chat mode": ("\n\na<b\n\n<", {"thinking": False}, ("", "a<b\n\n<", [], "stop")),
    "continued": ("\n\na", {"thinking": False, "continues": True}, ("", "\n\na", [], "stop")),
    "continued reasoning": ("\nR</think>\na", {"continues": True}, ("\nR", "a", [], "stop")),
    "reasoning ends in <": ("2 <", {}, ("2 <", "", [], "stop")),
    "other special tokens": (f"{THINK}R<｜User｜></think>{THINK}a<｜title｜>b{EOS}tail", {}, ("R", "ab", [], "stop")),
    "stray closing tag": (f"R</think>a\n</{D}tool_calls>b", {}, ("R", "ab", [], "stop")),
    "stray closing tag in reasoning": (f"R\n</{D}invoke>S</think>b", {}, ("RS", "b", [], "stop")),
    "DSML without <": (
        f'R</think>a {D}invoke name="f">{S}</{D}invoke>',
        {},
        ("R", "a ", [("f", '{"s": "x"}')], "tool_calls"),
    ),
    "values with < and > and newlines": (
        block(invoke(parameter("s", 'a < b 2>&1 </p> "q" \\ \n\n'))),
        {"thinking": False},
        ("", "", [("f", '{"s": "a < b 2>&1 </p> \\"q\\" \\\\ \\n\\n"}')], "tool_calls"),
    ),
    "a tag without >": (
        f'<{D}tool_calls\n<{D}invoke name="f"\n{S}</{D}invoke>',
        {"thinking": False},
        ("", "", [("f", '{"s": "x"}')], "tool_calls"),
    ),
    "a name that is cut": (
        f'\n\n<{D}tool_calls>\n<{D}invoke name="f',
        {"thinking": False, "reason": "length"},
        ("", "", [], "length"),
    ),
    "required": (
        invoke(S) + f"</{D}tool_calls>",
        {"thinking": False, "start": "tool_calls"},
        ("", "", [("f", '{"s": "x"}')], "tool_calls"),
    ),
    # options
    "stop text": (
        "R STOP</think>a\nSTO\nSTOP b" + C,
        {"stop": ["\nSTOP", "zzz", ""]},
        ("R STOP", "a\nSTO", [], "stop"),
    ),
    "stop text that does not come": ("R</think>a ST", {"stop": ["STOP"]}, ("R", "a ST", [], "stop")),
    "JSON mode": (
        'Here:\n```json\n{"a":1}\n```\nbye',
        {"json_output": True, "tools": None, "thinking": False},
        ("", ' {"a":1} ', [], "stop"),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    raw, options, expected = ROWS[name]
    assert parse(raw, **options) == expected


@pytest.mark.parametrize("name", ROWS)
def test_row_at_every_single_cut(name):
    raw, options, expected = ROWS[name]
    pieces = [piece for piece in CUT.split(raw) if piece]
    for at in range(len(raw)):
        tokens, position = [], 0
        for piece in pieces:
            inside = at - position
            if piece in IDS or not 0 < inside < len(piece):
                tokens.append((IDS.get(piece, 100), piece))
            else:
                tokens += [(100, piece[:inside]), (100, piece[inside:])]
            position += len(piece)
        assert parse_tokens(tokens, **options) == expected


@pytest.mark.parametrize("name", ROWS)
def test_row_through_the_tokenizer(name, tokenizer):
    raw, options, expected = ROWS[name]
    ids = []
    for piece in CUT.split(raw):
        ids += [tokenizer.id(piece)] if piece in IDS else tokenizer.encode(piece)
    stream = tokenizer.stream_decoder()
    parser = Parser(
        **{"thinking": True, "tools": TOOLS, **{k: v for k, v in options.items() if k != "reason"}},
        special_tokens=tokenizer.special_tokens,
    )
    events = [event for index in ids for event in parser.push(index, stream.push(index))]
    events += parser.push(None, stream.flush())
    assert collect(events + parser.finish(options.get("reason", "stop"))) == expected


def test_the_released_fixture_parses():
    raw = (GOLDEN / "test_output_1.txt").read_text("utf-8")
    raw = raw[raw.index("<think>The user") + len("<think>") : raw.index(EOS) + len(EOS)]
    reasoning = "The user wants to know the weather in Beijing. I should use the get_weather tool."
    calls = [("get_weather", '{"location": "Beijing", "unit": "celsius"}')]
    tools = json.loads((GOLDEN / "test_input_1.json").read_text("utf-8"))["tools"]
    assert parse(raw, tools=tools) == (reasoning, "", calls, "tool_calls")


SPELLINGS = st.sampled_from(
    ["", "\n", "\n\n", "<", "</", ">", " ", '"', *SPECIAL_TOKENS, "tool_calls>", 'invoke name="f">']
)
GARBAGE = st.lists(
    SPELLINGS
    | st.sampled_from(
        [f"<{D}", f"</{D}", S, N, invoke(S), C, 'parameter name="s" string="true">', "```json\n", '{"a": "']
    )
    | st.text(max_size=8),
    max_size=25,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(raw=GARBAGE, seed=st.integers(0, 99), thinking=st.booleans(), json_output=st.booleans(), length=st.booleans())
def test_garbage_never_raises_never_leaks_and_does_not_depend_on_the_split(raw, seed, thinking, json_output, length):
    options = {
        "thinking": thinking,
        "json_output": json_output,
        "reason": "length" if length else "stop",
        "stop": ["ab"],
    }
    whole = parse_tokens(((IDS.get(piece, 100), piece) for piece in CUT.split(raw) if piece), **options)
    assert parse_tokens(tokens_of(raw), **options) == whole
    assert parse_tokens(pieces_of(raw, random.Random(seed)), **options) == whole
    reasoning, content, calls, finish = whole
    for token in SPECIAL_TOKENS:  # here every spelling is the token, so none may come out
        assert token not in reasoning
        assert token not in content
    assert finish == ("length" if length else "tool_calls" if calls else "stop")
    if not length:
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.sampled_from([*WORDS, f"<{D}tool_calls>"]), max_size=12), thinking=st.booleans())
def test_spellings_in_ordinary_tokens_are_text(texts, thinking):
    raw = "x" + "".join(texts) + "y"
    expected = (raw, "", [], "stop") if thinking else ("", raw, [], "stop")
    assert parse_tokens([(100, text) for text in ["x", *texts, "y"]], thinking=thinking) == expected
    assert parse_tokens([(100, character) for character in raw], thinking=thinking) == expected


def test_only_what_must_be_held_is_held():
    parser = Parser(False, TOOLS, special_tokens=SPECIAL, stop=["END"])

    def shown(text, index=100):
        return "".join(event.text for event in parser.push(index, text))

    assert [shown(text) for text in ("a", " <b", " \n", "\n", "<", "x")] == ["a", " <b", " ", "", "", "\n\n<x"]
    assert [shown(text) for text in ("</", "p", "E", "N", "X", "2 <", "3")] == ["", "</p", "", "", "ENX", "2 ", "<3"]
    free = Parser(False, None, special_tokens=SPECIAL)
    assert [event.text for event in free.push(100, "a\n\n<")] == ["a\n\n<"]
    thinks = Parser(True, None, special_tokens=SPECIAL)
    assert [event.text for event in thinks.push(100, "a <\n")] == ["a <"]


def test_arguments_stream_as_they_come():
    parser = Parser(False, TOOLS, special_tokens=SPECIAL)
    events = []
    for index, text in tokens_of(C[: C.index("x</")]):
        events += parser.push(index, text)
    assert [(event.kind, event.name or event.text) for event in events] == [
        ("tool_call", "f"),
        ("arguments", '{"s": "'),
    ]
    assert parser.push(100, "abc") == [Event("arguments", "abc", 0)]
    assert parser.push(100, '"\n') == [Event("arguments", '\\"', 0)]
    assert not parser.done


def test_the_end_of_a_block_ends_the_answer():
    parser = Parser(False, TOOLS, special_tokens=SPECIAL)
    for index, text in tokens_of(C):
        assert not parser.done
        parser.push(index, text)
    assert parser.done
    assert parser.push(100, "more") == []


def test_a_broken_character_before_a_special_token_is_kept():
    parser = Parser(True, special_tokens=SPECIAL)
    events = parser.push(IDS[END_THINK], "\ufffd" + END_THINK) + parser.push(100, "a\ud800") + parser.finish("stop")
    assert collect(events) == ("\ufffd", "a\ufffd", [], "stop")


def test_other_reasons_pass_through():
    assert parse("R</think>a", reason="aborted") == ("R", "a", [], "aborted")


@pytest.mark.parametrize("thinking", [True, False])
def test_tool_call_ids_pass_the_checksum_of_deepseek_recipe(thinking):
    def ids(raw):
        parser = Parser(thinking, TOOLS, special_tokens=SPECIAL)
        return [event.id for index, text in tokens_of(raw) for event in parser.push(index, text) if event.id]

    first, second = ids(block(invoke(S), invoke(S)))
    mark = "ET_" if thinking else ""
    assert re.fullmatch(rf"call_00_{mark}[A-Za-z0-9]{{20}}\d{{4}}", first)
    assert re.fullmatch(rf"call_01_{mark}[A-Za-z0-9]{{20}}\d{{4}}", second)
    assert first != ids(block(invoke(S)))[0]
    if thinking:
        assert "ET_" not in ids("R" + C)[0]


@pytest.mark.parametrize(
    ("identity", "checksum"),
    [
        ("call_00_EmqLquIlALk9ycPX4X88", "9617"),
        ("call_00_oUnw55x00l5RoZEH0W9P", "8059"),
        ("call_01_qlL92l84iiE05SYFXA8D", "1597"),
        ("call_00_ET_DFLITgxXQOdMedgw9Nrq", "5635"),
    ],
)
def test_checksums_recorded_from_deepseek_recipe(identity, checksum):
    from pelagos.chat.parser import _xxh3_64

    assert f"{_xxh3_64(identity.replace('_', '').encode()) % 10_000:04}" == checksum


def test_random_calls_survive_rendering_and_parsing(tokenizer):
    rng = random.Random(11)
    for _ in range(300):
        called = [(rng.choice(("f", "g", "read-file")), some_arguments(rng)) for _ in range(rng.randint(1, 3))]
        calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in called]
        reasoning, content = some_text(rng).strip("\n"), some_text(rng).strip("\n")
        turn = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}
        question = [{"role": "user", "content": "q"}]
        body = {"messages": question, "tools": TOOLS, "thinking": rng.random() < 0.5}
        asked = tokenizer.encode_prompt(prompt := render_prompt(body))
        whole = tokenizer.encode_chat({**body, "messages": [*question, turn]})
        assert whole[: len(asked)] == asked
        parser, stream = Parser.for_prompt(prompt, tokenizer), tokenizer.stream_decoder()
        events = [event for index in whole[len(asked) :] for event in parser.push(index, stream.push(index))]
        got_reasoning, got_content, got_calls, finish = collect(events + parser.finish("stop"))
        assert (got_content, finish) == (content, "tool_calls")
        assert got_reasoning == (reasoning if body["thinking"] else "")
        assert [(name, json.loads(arguments)) for name, arguments in got_calls] == called


def test_for_prompt_starts_where_the_prompt_ends(tokenizer):
    def answer(body, raw):
        parser = Parser.for_prompt(
            render_prompt({"messages": [{"role": "user", "content": "json"}], **body}), tokenizer
        )
        events = [
            e for index, text in tokens_of(raw) for e in parser.push(tokenizer.id(text) if index < 100 else None, text)
        ]
        return collect(events + parser.finish("stop"))

    off = {"thinking": False}
    assert answer({}, "\nR</think>a") == ("R", "a", [], "stop")
    assert answer(off, "\na") == ("", "a", [], "stop")
    assert answer({"tools": TOOLS, "tool_choice": "required", **off}, invoke(S))[2] == [("f", '{"s": "x"}')]
    assert answer({"tools": TOOLS, "tool_choice": "none", **off}, C)[2] == []
    assert answer({"response_format": {"type": "json_object"}, **off}, 'x {"a":1}')[1] == ' {"a":1}'
    prefixed = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c", "prefix": True}]}
    assert answer(prefixed, "\na") == ("", "\na", [], "stop")
    task = {"messages": [{"role": "user", "content": "q", "task": "query"}]}
    assert answer(task, "words") == ("", "words", [], "stop")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ('{"a":1}', '{"a":1}'),
        ('\n {"a":1}\n', ' {"a":1}\n'),
        ('prose {"a":1} more', ' {"a":1} more'),
        ("no json", " "),
        ("```\n[1,2]\n```", "[1,2]"),
        ('{"a":1', '{"a":1'),
        ("```python\nx={}\n```", " {}"),
        ('{"a": "```"} z', '{"a": "```"} z'),
        ('a```json\n{"a":"b```\\"c"}\n```\n```json\n{"b":1}\n```', ' {"a":"b```\\"c"} '),
        ("`x` ``y`` {", " {"),
        ("```", ""),
    ],
)
def test_json_mode_shows_the_object_alone(raw, expected):
    assert parse(raw, thinking=False, tools=None, json_output=True)[1] == expected


def recipe_parse(raw, tokenizer_text, tokenizer, body):
    recipe = deepseek_recipe
    request = recipe.ChatCompletionRequest({"model": "DeepSeek-V4-Pro", **body}).convert(recipe.ConversionOptions())
    generator = recipe.ChatCompletionRequest.chunk_generator(request, "id", "m")
    stream = recipe.StreamProcessor(generator, request.parsing_options, recipe.Tokenizer.from_str(tokenizer_text))
    ids = [i for piece in CUT.split(raw) for i in ([tokenizer.id(piece)] if piece in IDS else tokenizer.encode(piece))]
    chunks = stream.push(recipe.InferenceChunk.ready()) + stream.push(recipe.InferenceChunk.tokens(ids))
    chunks += stream.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop)) + stream.finish()
    reasoning, content, calls, finish = "", "", [], None
    for choice in (choice for chunk in chunks for choice in json.loads(chunk.to_json())["choices"]):
        delta = choice["delta"]
        reasoning += delta.get("reasoning_content") or ""
        content += delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            if call.get("id"):
                calls.append([call["function"]["name"], ""])
            calls[-1][1] += call["function"].get("arguments") or ""
        finish = choice["finish_reason"] or finish
    return reasoning, content, [tuple(call) for call in calls], finish


def test_well_formed_answers_parse_as_deepseek_recipe_parses_them(tokenizer, tokenizer_file):
    rng, text = random.Random(12), tokenizer_file.read_text("utf-8")
    clean = [word for word in WORDS if word not in IDS and D not in word]
    for _ in range(200):
        values = ["".join(rng.choices(clean, k=rng.randint(0, 4))) for _ in range(3)]
        parts = [parameter("k", values[0]), parameter("m", rng.choice(("[1, 2]", "null", '{"a": "b"}')), "false")]
        invokes = [invoke(*parts[: rng.randint(0, 2)], name=rng.choice("fg")) for _ in range(rng.randint(0, 2))]
        raw = values[1] + "</think>" + values[2] + (block(*invokes) if invokes else "")
        body = {"messages": [{"role": "user", "content": "q"}], "tools": TOOLS[1:]}
        assert parse(raw + EOS, tools=TOOLS[1:]) == recipe_parse(raw, text, tokenizer, body)


def test_rendered_history_equals_what_was_parsed(tokenizer):
    question = [{"role": "user", "content": "q"}]
    call = {"id": "call_00", "type": "function", "function": {"name": "f", "arguments": C_ARGUMENTS}}
    turn = {"role": "assistant", "content": "a", "reasoning_content": "R", "tool_calls": [call]}
    prompt = render({"messages": question, "tools": TOOLS})
    whole = render({"messages": [*question, turn], "tools": TOOLS})
    assert parse(whole.removeprefix(prompt)) == ("R", "a", [("f", '{"s": "x", "n": [1, 2]}')], "tool_calls")
