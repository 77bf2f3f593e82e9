"""What an answer may say: tool calls by their schemas, JSON modes, forced calls, a budget of thinking.

A `TurnGrammar` follows an answer token by token. Reasoning and plain content stay free (no mask, no cost); from the
token that opens a tool block on, or from the end of thinking where an answer's form is prescribed, llguidance says
which tokens may come. Structure of a block: released encoder.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pelagos.chat.tokens import BOS, DSML, END_THINK, EOS
from pelagos.errors import MissingDependency, RequestError
from pelagos.serve.schema import Unsupported, call_rules, function_rules, json_form, regex_form

if TYPE_CHECKING:
    import llguidance

    from pelagos.chat.render import Prompt
    from pelagos.chat.tokenizer import Tokenizer

MAX_GRAMMAR_BYTES = 2 << 20
ISOLATE_SECONDS = 1.0  # for finding out which schemas do not compile
_REASONING, _CONTENT, _MATCHED = range(3)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the grammars of one kind of turn share; a matcher in it is only ever copied."""

    start: str  # of the prompt: reasoning, content or tool_calls
    end_think: int
    dsml: int
    eos: int
    vocab_size: int
    block: llguidance.LLMatcher | None = None  # what follows the token that opens a tool block
    answer: llguidance.LLMatcher | None = None  # all that may follow thinking, None for anything
    budget: int | None = None  # reasoning tokens after which thinking ends


class TurnGrammar:
    """Where one answer stands in its rules; see `engine.sampler.Grammar`."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._trail = bytearray()  # the phase before each accepted token
        self._matcher: llguidance.LLMatcher | None = None
        self._phase = _REASONING if rules.start == "reasoning" else self._enter_answer()

    def mask(self) -> np.ndarray | None:
        """Return which tokens may come next, bool (V,), None for all; RequestError where a schema proves too much."""
        rules = self._rules
        if self._phase == _REASONING:
            if rules.budget is not None and len(self._trail) >= rules.budget:
                return _one(rules.vocab_size, rules.end_think, allowed=True)
            # A prescribed answer must come: the end token does not end the reasoning.
            return None if rules.answer is None else _one(rules.vocab_size, rules.eos, allowed=False)
        if self._matcher is None:
            return None
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RequestError(f"the schema is too much for its grammar: {_reason(self._matcher)}")
        return np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: rules.vocab_size].view(bool)

    def accept(self, token: int) -> None:
        """Go on by one token that the mask allowed."""
        rules, phase = self._rules, self._phase
        self._trail.append(phase)
        if phase == _MATCHED:
            assert self._matcher is not None
            self._matcher.consume_token(token)
        elif token == rules.dsml and rules.block is not None:
            self._phase, self._matcher = _MATCHED, rules.block.deep_copy()
        elif phase == _REASONING and token == rules.end_think:
            self._phase = self._enter_answer()

    def rollback(self, count: int) -> None:
        """Undo the last `count` accepted tokens."""
        matched = 0
        for _ in range(count):
            before = self._trail.pop()
            matched += before == _MATCHED
            if before != self._phase:
                self._phase, self._matcher, matched = before, None, 0
        if matched and self._matcher is not None:
            self._matcher.rollback(matched)

    def fork(self) -> TurnGrammar:
        """Return an independent copy at the same state."""
        copy = TurnGrammar(self._rules)
        copy._trail, copy._phase = self._trail[:], self._phase
        copy._matcher = None if self._matcher is None else self._matcher.deep_copy()
        return copy

    def _enter_answer(self) -> int:
        if self._rules.answer is None:
            return _CONTENT
        self._matcher = self._rules.answer.deep_copy()
        return _MATCHED


def _one(size: int, token: int, *, allowed: bool) -> np.ndarray:
    mask = np.full(size, not allowed)
    mask[token] = allowed
    return mask


def _reason(matcher: llguidance.LLMatcher) -> str:
    first, *more = matcher.get_error().splitlines()
    return " ".join([first.partition("): ")[2] or first, *(line for line in more if line.startswith("error:"))])[:300]


class Grammars:
    """Compiles what requests prescribe and keeps the last `capacity` results; one serves all threads of a server."""

    def __init__(self, *, capacity: int = 64) -> None:
        self._compiled = functools.lru_cache(capacity)(_compile_turn)
        self._vocabulary = functools.lru_cache(1)(_vocabulary)
        self._has_warned = False

    def turn(
        self, tokenizer: Tokenizer, prompt: Prompt, body: Mapping[str, Any], *, budget: int | None = None
    ) -> TurnGrammar | None:
        """Return the grammar of the answer to a rendered body, None where anything may be said.

        Reads tools (`strict`), tool_choice, parallel_tool_calls and response_format of the body; `budget` bounds the
        reasoning tokens. Raises RequestError for a schema that cannot be held to, naming the keyword, and
        MissingDependency where a form is prescribed and llguidance is not installed.
        """
        choice, form, tools = body.get("tool_choice"), body.get("response_format") or {}, list(prompt.tools or ())
        if isinstance(choice, Mapping):
            tools = [tool for tool in tools if tool["name"] == choice["function"]["name"]]
        is_forced = bool(tools) and (choice == "required" or isinstance(choice, Mapping))
        declared = [tool.get("function", tool) for tool in body.get("tools") or ()]
        strict = {function["name"] for function in declared if function.get("strict") is True}
        has_form = form.get("type", "text") != "text" and not is_forced
        block = answer = None
        if tools or has_form:
            many = body.get("parallel_tool_calls") is not False
            asked = (tools, sorted(strict), many, prompt.start, is_forced, form if has_form else None)
            try:
                vocabulary = self._vocabulary(tokenizer)
                block, answer = self._compiled(vocabulary, f"<[{tokenizer.id(DSML)}]>", json.dumps(asked))
            except (RecursionError, Unsupported) as error:
                raise RequestError(f"the schemas make no grammar: {error}") from None
            except ImportError as error:
                if is_forced or has_form or strict:
                    raise MissingDependency(
                        f"prescribed answers need llguidance: `pip install llguidance` ({error}); "
                        "free text, and calls without tool_choice and strict, work without it"
                    ) from None
                if not self._has_warned:
                    _log.warning("llguidance is not installed: tool calls are not held to their schemas (%s)", error)
                self._has_warned = True
        if block is None and answer is None and (budget is None or prompt.start != "reasoning"):
            return None
        ids = {"end_think": tokenizer.id(END_THINK), "dsml": tokenizer.id(DSML), "eos": tokenizer.id(EOS)}
        size = tokenizer.vocab_size
        return TurnGrammar(Rules(prompt.start, **ids, vocab_size=size, block=block, answer=answer, budget=budget))


def _compile_turn(vocabulary: Any, dsml: str, asked: str) -> tuple[Any, Any]:
    """Return the matchers of a tool block and of the whole answer, None for what is not prescribed."""
    tools, strict, many, start, is_forced, form = json.loads(asked)
    rules = _block_rules(vocabulary, tools, strict, dsml, many) if tools else ""
    opening = f'"\\n\\n<" {dsml} block'
    block = _compile(vocabulary, f"start: block\n{rules}") if tools else None
    if start == "tool_calls":
        return block, _compile(vocabulary, f"start: calls\n{rules}")
    if is_forced:
        return block, _compile(vocabulary, f"start: {opening}\n{rules}")
    if form is None:
        return block, None
    ways = f"form | {opening}" if tools else "form"
    given = form.get("json_schema") or {}
    is_strict = given.get("strict") is True
    try:
        is_regex = form["type"] == "regex"
        made = regex_form(form["regex"]) if is_regex else json_form(given.get("schema"), strict=is_strict)
        return block, _compile(vocabulary, f"start: {ways}\nform: {made}\n{rules}")
    except Unsupported as error:
        if is_strict or form["type"] == "regex":
            raise RequestError(f"response_format: {error}") from None
    return block, _compile(vocabulary, f"start: {ways}\nform: {json_form(None, strict=True)}\n{rules}")


def _block_rules(vocabulary: Any, tools: Sequence[Mapping[str, Any]], strict: list[str], dsml: str, many: bool) -> str:
    """Return the rules of a tool block; what does not compile of lenient schemas is free."""
    deadline = time.monotonic() + ISOLATE_SECONDS

    def alone(lark: str) -> None:
        if time.monotonic() > deadline:
            raise Unsupported("the schemas take too long to compile")
        _compile(vocabulary, lark)

    def made(test: Callable[[str], object]) -> str:
        parts: list[str] = []
        for index, tool in enumerate(tools):
            try:
                parts.append(function_rules(index, tool, dsml, strict=tool["name"] in strict, test=test))
            except Unsupported as error:
                raise RequestError(f"tools: the strict function {tool['name']!r}: {error}") from None
        return call_rules(parts, dsml, many=many)

    try:
        rules = made(lambda _: None)
        _compile(vocabulary, f"start: block\n{rules}")
        return rules
    except Unsupported:
        return made(alone)


def _compile(vocabulary: Any, lark: str) -> Any:
    import llguidance

    if len(lark) > MAX_GRAMMAR_BYTES:
        raise RequestError(f"the schemas make a grammar of {len(lark)} bytes: expected at most {MAX_GRAMMAR_BYTES}")
    limits = llguidance.LLParserLimits(verbose_errors=False)
    matcher = llguidance.LLMatcher(vocabulary, lark, log_level=0, limits=limits)
    if matcher.is_error():
        raise Unsupported(_reason(matcher))
    return matcher


def _vocabulary(tokenizer: Tokenizer) -> Any:
    import llguidance

    class Vocabulary:
        """What llguidance asks of a tokenizer; it marks the special ones itself."""

        is_tokenizer_wrapper = True
        eos_token_id, bos_token_id = tokenizer.id(EOS), tokenizer.id(BOS)
        tokens = [tokenizer.spell(index) for index in range(tokenizer.vocab_size)]  # noqa: RUF012
        special_token_ids = list(tokenizer.special_tokens)  # noqa: RUF012

        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode(text)

    return llguidance.LLTokenizer(Vocabulary())  # type: ignore[arg-type]
