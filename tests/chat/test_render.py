import contextlib
import hashlib
import json
import random
import sys
from pathlib import Path

import deepseek_recipe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chat.conversations import some_body, special_ranges

from pelagos.chat import render, render_prompt
from pelagos.chat.tokens import SPECIAL_TOKENS, TASK_TOKENS
from pelagos.errors import ConfigError, MissingDependency, RequestError

GOLDEN = Path(__file__).parents[1] / "golden" / "encoding"
BOS, EOS, U, AS, D = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "｜DSML｜"
S = "You are a helpful assistant."
T = '{"name": "get_weather", "description": "Get weather", "parameters": {"type": "object", "properties": {"city": '
T += '{"type": "string"}}, "required": ["city"]}}'
TOOLS = [{"type": "function", "function": json.loads(T)}]
OFF = {"thinking": {"type": "disabled"}}
LOW, MAX = {"reasoning_effort": "low"}, {"reasoning_effort": "max"}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def call(identity, arguments):
    return {"id": identity, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def result(identity, content):
    return {"role": "tool", "tool_call_id": identity, "content": content}


def recipe_prompt(body):
    request = deepseek_recipe.ChatCompletionRequest({"model": "DeepSeek-V4-Pro", **body})
    conversation = request.convert(deepseek_recipe.ConversionOptions()).conversation
    return deepseek_recipe.DeepseekV4Encoding().render_conversation(conversation)


def between(text, before, after):
    return text[text.index(before) + len(before) : text.index(after)]


A = between(recipe_prompt({"messages": [user("x")]}).prompt, BOS, U)
B = between(recipe_prompt({"messages": [user("x")], **MAX}).prompt, BOS, U)
HEAD = between(recipe_prompt({"messages": [user("x")], "tools": TOOLS, **OFF}).prompt, BOS + "\n\n", T)
TAIL = between(recipe_prompt({"messages": [user("x")], "tools": TOOLS, **OFF}).prompt, T, U)


def test_the_released_sentences_are_the_published_ones():
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (("A", A), ("B", B), ("HEAD", HEAD))}
    assert digests == {
        "A": "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7",
        "B": "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c",
        "HEAD": "c7c9042638154a237b5d1bd48be772374a35a4d24c5cacfd1ffbd92703da329c",
    }
    assert (len(A), len(B), len(HEAD)) == (476, 526, 854)
    assert hashlib.sha256(TAIL.encode()).hexdigest()[:16] == "690702850fe25651"


BLOCK = (
    f'\n\n<{D}tool_calls>\n<{D}invoke name="get_weather">\n<{D}parameter name="city" string="true">Paris</{D}parameter>'
    f'\n<{D}parameter name="n" string="false">1</{D}parameter>\n</{D}invoke>\n<{D}invoke name="get_weather">\n'
    f"</{D}invoke>\n</{D}tool_calls>"
)
BAD_BLOCK = (
    f'\n\n<{D}tool_calls>\n<{D}invoke name="get_weather">\n<{D}parameter name="arguments" string="true">bad json'
    f"</{D}parameter>\n</{D}invoke>\n</{D}tool_calls>"
)
FIVE = [system(S), user("Q1"), assistant("A1", reasoning_content="R1"), user("Q2")]
SEVEN = [
    system(S),
    user("go"),
    assistant(
        "", reasoning_content="r", tool_calls=[call("call_00_b", '{"city": "Paris", "n": 1}'), call("call_01_a", "{}")]
    ),
    result("call_01_a", "two"),
    result("call_00_b", "one"),
    user("now?"),
]
FIFTEEN = [user("go"), assistant("", tool_calls=[call("x", "bad json")]), result("x", "one")]
REMINDED = [system(S), {"role": "latest_reminder", "content": "2026-02-21"}, user("z")]
JSON_TEXT = "You are a helpful assistant designed to output JSON.\n## Response Format:\n\nReply with JSON object ONLY."
WITH_TOOLS = f"{BOS}\n\n{HEAD}{T}{TAIL}{U}"

VECTORS = {
    "1": ({"messages": [user("Hello")]}, f"{BOS}{A}{U}Hello{AS}<think>"),
    "2": ({"messages": [system(S), user("Hello")], **LOW}, f"{BOS}{S}{U}Hello{AS}<think>"),
    "3": ({"messages": [system(S), user("Hello")], **MAX}, f"{BOS}{B}{S}{U}Hello{AS}<think>"),
    "4": ({"messages": [user("Hello")], **OFF}, f"{BOS}{U}Hello{AS}</think>"),
    "5": ({"messages": FIVE, **LOW}, f"{BOS}{S}{U}Q1{AS}</think>A1{EOS}{U}Q2{AS}<think>"),
    "6": (
        {"messages": FIVE, "tools": TOOLS, **LOW},
        f"{BOS}{S}\n\n{HEAD}{T}{TAIL}{U}Q1{AS}<think>R1</think>A1{EOS}{U}Q2{AS}<think>",
    ),
    "7": (
        {"messages": SEVEN, "tools": TOOLS, **LOW},
        f"{BOS}{S}\n\n{HEAD}{T}{TAIL}{U}go{AS}<think>r</think>{BLOCK}{EOS}{U}<tool_result>one</tool_result>\n\n"
        f"<tool_result>two</tool_result>\n\nnow?{AS}<think>",
    ),
    "8": ({"messages": [user("q")], "tools": TOOLS, **OFF}, f"{WITH_TOOLS}q{AS}</think>"),
    "9": ({"messages": [user("a"), user("b")], **OFF}, f"{BOS}{U}a\n\nb{AS}</think>"),
    "10": ({"messages": REMINDED, **LOW}, f"{BOS}{S}<｜latest_reminder｜>2026-02-21{U}z{AS}<think>"),
    "11": (
        {"messages": [user("q")], "tools": TOOLS, "tool_choice": "required", **OFF},
        f"{WITH_TOOLS}q{AS}</think>\n\n<{D}tool_calls>\n",
    ),
    "12": ({"messages": [user("q")], "tools": TOOLS, "tool_choice": "none", **OFF}, f"{BOS}{U}q{AS}</think>"),
    "13 off": ({"messages": [user("x"), assistant("abc", prefix=True)], **OFF}, f"{BOS}{U}x{AS}</think>abc"),
    "13 low": ({"messages": [user("x"), assistant("abc", prefix=True)], **LOW}, f"{BOS}{U}x{AS}<think></think>abc"),
    "14": (
        {"messages": [user("x"), assistant("", reasoning_content="R", prefix=True)], **LOW},
        f"{BOS}{U}x{AS}<think>R",
    ),
    "15": (
        {"messages": FIFTEEN, "tools": TOOLS, **LOW},
        f"{WITH_TOOLS}go{AS}<think></think>{BAD_BLOCK}{EOS}{U}<tool_result>one</tool_result>{AS}<think>",
    ),
    "20": (
        {"messages": [system(S), user("give json")], "response_format": {"type": "json_object"}, **OFF},
        f"{BOS}{S}\n\n{JSON_TEXT}{U}give json{AS}</think>",
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vector(name):
    body, expected = VECTORS[name]
    assert render(body) == expected


def fixture(number):
    body = json.loads((GOLDEN / f"test_input_{number}.json").read_text("utf-8"))
    body = {"messages": body} if isinstance(body, list) else body
    return body | (OFF if number == 4 else {}), (GOLDEN / f"test_output_{number}.txt").read_text("utf-8")


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_released_fixture(number):
    body, expected = fixture(number)
    assert render(body, generation="preview") == expected
    assert render(body | (LOW if number != 4 else {}), generation="0731") == expected


def test_vectors_17_and_18_are_the_closed_fixtures():
    assert fixture(2)[1].endswith(
        f"The user asks about the capital of France. It is Paris.</think>The capital of France is Paris.{EOS}"
    )
    assert fixture(4)[1].endswith(f"{U}世界著名温泉有哪些{AS}</think><｜action｜>Search{EOS}")


@pytest.mark.parametrize(
    ("effort", "preview", "july"),
    [
        (None, "", A),
        ("minimal", "", ""),
        ("low", "", ""),
        ("medium", "", A),
        ("high", "", A),
        ("xhigh", A, A),
        ("max", A, B),
        ("ultra", A, B),
    ],
)
def test_each_generation_reads_an_effort_its_own_way(effort, preview, july):
    body = {"messages": [user("q")]} | ({"reasoning_effort": effort} if effort else {})
    assert render(body, generation="preview") == f"{BOS}{preview}{U}q{AS}<think>"
    assert render(body, generation="0731") == f"{BOS}{july}{U}q{AS}<think>"
    assert render({"messages": [user("q")], "chat_template_kwargs": {"reasoning_effort": effort}}) == render(body)


@pytest.mark.parametrize(
    ("asked", "thinks"),
    [
        ({"thinking": False}, False),
        ({"thinking": True}, True),
        ({"enable_thinking": False}, False),
        ({"think": False}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"thinking": False}, "thinking": {"type": "enabled"}}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "none", "thinking": {"type": "enabled"}}, True),
        ({"reasoning_effort": "max", "thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "adaptive"}}, True),
    ],
)
@pytest.mark.parametrize("generation", ["preview", "0731"])
def test_thinking_can_be_switched_in_every_known_way(asked, thinks, generation):
    prompt = render_prompt({"messages": [user("q")], **asked}, generation=generation)
    assert prompt.thinking is thinks
    assert prompt.start == ("reasoning" if thinks else "content")
    assert prompt.text.endswith(f"{AS}<think>" if thinks else f"{AS}</think>")
    effort_text = A if thinks and generation == "0731" else ""
    assert prompt.text.startswith(f"{BOS}{effort_text}{U}")


@pytest.mark.parametrize("task", TASK_TOKENS)
def test_quick_instruction_replaces_the_assistant_opening(task):
    for asked, tag in ((OFF, "</think>"), (LOW, "<think>")):
        prompt = render_prompt({"messages": [user("x", task=task)], **asked})
        opening = AS + tag if task == "action" else ""
        assert prompt.text == f"{BOS}{U}x{opening}{TASK_TOKENS[task]}"
        assert prompt.start == "content"
        assert prompt.pieces[-1] == (TASK_TOKENS[task], True)


@pytest.mark.parametrize("tools", [{}, {"tools": TOOLS}])
def test_the_answer_to_a_quick_instruction_has_no_reasoning(tools):
    messages = [user("x", task="query"), assistant("words", reasoning_content="no"), user("y"), assistant("z")]
    text = render({"messages": messages, **LOW, **tools})
    assert text.endswith(f"{U}x<｜query｜>words{EOS}{U}y{AS}<think></think>z{EOS}")


def test_title_follows_an_assistant_turn():
    messages = [user("x"), assistant("y", task="title")]
    assert render({"messages": messages, **OFF}) == f"{BOS}{U}x{AS}</think>y{EOS}<｜title｜>"
    titled = [*messages, assistant("Name")]
    assert render({"messages": titled, **OFF}) == f"{BOS}{U}x{AS}</think>y{EOS}<｜title｜>Name{EOS}"


def test_developer_is_a_user_and_may_carry_the_tools():
    assert (
        render({"messages": [{"role": "developer", "content": "d"}, user("q")], **OFF}) == f"{BOS}{U}d\n\nq{AS}</think>"
    )
    developer = {"role": "developer", "content": "d", "tools": TOOLS}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}
    text = render({"messages": [system(S), developer], "response_format": schema, **MAX})
    reply = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n" + '{"a": 1}'
    assert text == f"{BOS}{B}{S}{reply}{U}d\n\n{HEAD}{T}{TAIL}{AS}<think>"
    prompt = render_prompt({"messages": [developer], **OFF})
    assert [piece[0] for piece in prompt.pieces if piece[1]].count(D) == 9


def test_tools_on_a_system_message_are_the_tools_of_the_request():
    body = {"messages": [{**system(S), "tools": TOOLS}, user("q")]}
    assert render(body) == render({"messages": [system(S), user("q")], "tools": TOOLS})
    with pytest.raises(RequestError, match="declare them once"):
        render({**body, "tools": TOOLS})


def test_an_unanswered_call_at_the_end_closes_the_prompt():
    turn = assistant("t", reasoning_content="R", tool_calls=[call("x", {"city": "Paris", "n": 1}), call("y", None)])
    for asked in ({}, {"tools": TOOLS}):
        assert render({"messages": [user("q"), turn], **asked, **LOW}).endswith(f"{AS}<think>R</think>t{BLOCK}{EOS}")


def test_histories_without_ids_and_with_other_arguments_are_read():
    function = {"name": "get_weather", "arguments": {"city": "Paris", "n": 1}}
    calls = [{"function": function}, {"type": "function", "function": {**function, "arguments": ""}}]
    messages = [
        user("go"),
        assistant(None, tool_calls=calls),
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
    ]
    text = render({"messages": messages, **OFF})
    results = "<tool_result>one</tool_result>\n\n<tool_result>two</tool_result>"
    assert text == f"{BOS}{U}go{AS}</think>{BLOCK}{EOS}{U}{results}{AS}</think>"


def test_an_empty_argument_text_is_no_argument():
    texts = [
        render({"messages": [user("q"), assistant(None, tool_calls=[call("x", arguments)]), result("x", "y")]})
        for arguments in ("", None, {}, "{}")
    ]
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: expected a list"),
        ({"messages": "hi"}, "messages: expected a list"),
        ({"messages": ["hi"]}, "messages: expected a list"),
        ({"messages": []}, "Empty input messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown variant `robot`"),
        ({"messages": [result("x", "y")]}, "must be a response to a preceding message"),
        ({"messages": [user("q")], "tools": TOOLS, "tool_choice": "required"}, "does not support this tool_choice"),
        ({"messages": [user("q")], "reasoning_effort": "huge"}, "unknown variant `huge`"),
        ({"messages": [user("q")], "response_format": {"type": "json_object"}}, "must contain the word 'json'"),
        ({"messages": [user("q", task="dance")]}, r"messages\[0\].task='dance': expected one of action"),
        ({"messages": [system("s") | {"task": "query"}, user("q")]}, r"messages\[0\].task: only a user"),
        ({"messages": [user("q", task="query"), user("r")]}, r"messages\[0\].task: expected the last message"),
        ({"messages": [user(7, task="query")]}, r"messages\[0\].content: expected text at the end"),
        ({"messages": [user("a\ud800")]}, "surrogates not allowed"),
        ({"messages": [user("q"), assistant("", reasoning_content="\ud805")], **LOW}, "surrogates not allowed"),
        ({"messages": [assistant("", tool_calls=[call("x", {1, 2})])]}, "not JSON"),
        ({"messages": [user(-(2**63) - 1)]}, "beyond 64 bits"),
    ],
)
def test_a_bad_body_is_a_request_error(body, message):
    with pytest.raises(RequestError, match=message):
        render(body)


def test_deep_nesting_is_refused_and_not_followed():
    deep = []
    for _ in range(50_000):
        deep = [deep]
    for content in (deep, [{"type": "text", "text": deep}]):
        with pytest.raises(RequestError):
            render({"messages": [user(content)]})
    while deep:  # unwound by hand: a plain delete would recurse
        deep = deep.pop()


JSON_KEYS = st.sampled_from(
    "role content task prefix wo_eos tools tool_calls id type function name arguments text thinking tool_call_id "
    "reasoning_content".split()
)
JSON_LEAVES = st.sampled_from(
    [None, True, 1, "", "user", "assistant", "tool", "developer", "system", "text", "query", "action", "function"]
)
JSON = st.recursive(
    JSON_LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_KEYS, inner, max_size=5)
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "developer", "system"]), "content": JSON},
    optional={"task": JSON, "tool_calls": JSON, "tools": JSON, "prefix": JSON, "tool_call_id": JSON},
)


@settings(max_examples=300, deadline=None)
@given(messages=st.lists(MESSAGE | JSON, max_size=4), asked=st.dictionaries(JSON_KEYS, JSON, max_size=3))
def test_any_json_renders_or_is_a_request_error(messages, asked):
    with contextlib.suppress(RequestError):
        prompt = render_prompt({**asked, "messages": messages})
        assert prompt.pieces[0] == (BOS, True)
        assert [text for text, special in prompt.pieces if special].count(BOS) == 1


def test_an_unknown_generation_is_refused():
    with pytest.raises(ConfigError, match="preview, 0731"):
        render({"messages": [user("q")]}, generation="4.1")


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepseek_recipe", None)
    with pytest.raises(MissingDependency, match=r"pip install deepseek-recipe==0.2.0.*raw completion"):
        render({"messages": [user("q")]})


def test_the_body_is_left_as_it_was():
    body = {
        "messages": [user([{"type": "text", "text": "a"}], task="query"), assistant(None, wo_eos=True)],
        "tools": None,
    }
    before = json.dumps(body)
    assert render({**body, **OFF}) == f"{BOS}{U}a<｜query｜>"
    assert json.dumps(body) == before


def compare_with_recipe(seed, count):
    rng = random.Random(seed)
    exceptions = 0
    for _ in range(count):
        body = some_body(rng)
        theirs, ours = recipe_prompt(body), render_prompt(body)
        last = body["messages"][-1]
        if last["role"] == "assistant" and not last.get("prefix"):  # exception 1 of docs/prompt_exceptions.md
            exceptions += 1
            assert ours.text.endswith(last["content"] + EOS)
            assert ours.text != theirs.prompt
        else:
            assert ours.text == theirs.prompt
            assert special_ranges(ours) == theirs.special_ranges
        assert "".join(text for text, _ in ours.pieces) == ours.text
        assert all(text in SPECIAL_TOKENS for text, special in ours.pieces if special)
    return exceptions


def test_ten_thousand_prompts_equal_deepseek_recipe_but_for_the_listed_exceptions():
    assert 0 < compare_with_recipe(seed=1, count=10_000) <= 200
