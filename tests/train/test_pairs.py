import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelagos.train.pairs import MODES, conversations, pairs_of, small_talk
from pelagos.train.sources import Document

TLDR = """# tar

> Archiving utility. Often combined with a compression method.
> More information: <https://www.gnu.org/software/tar>.

- [c]reate an archive and write it to a [f]ile:

`tar cf {{path/to/target.tar}} {{path/to/file1 path/to/file2 ...}}`

- E[x]tract an archive verbosely:

`tar {{[-x|--extract]}} --file {{path/to/source.tar}}`

- Print with `awk`:

`tar a`
"""
PEP = """PEP: 8
Title: Style Guide for Python Code
Author: A. Person <a@example.org>
Status: Active
Type: Process
Created: 05-Jul-2001


Introduction
============

This document gives :pep:`style guidelines <7>` for ``code`` [2]_.  It is short.
It has three sentences.

More
"""
CODE = '''"""A module."""

def clean(text, *, upper=False) -> str:
    """Remove spaces from both ends of the text."""
    text = text.strip()
    return text.upper() if upper else text


class Box:
    """A box that holds any number of things."""


def _private():
    """Nobody should ask about this one, ever."""


def odd():
    """No full stop at the end of this text"""
'''


def of(source: str, text: str, kind: str = "docs") -> list:
    return pairs_of(Document(kind, source, "MIT", text))


def test_tldr_commands_lose_their_placeholders_and_keep_long_options():
    pairs = of("tldr/pages/common/tar.md", TLDR)
    assert pairs[0].answer == "`tar`: Archiving utility. Often combined with a compression method."
    (extract,) = (pair for pair in pairs if "extract" in pair.answer)
    assert "`tar --extract --file path/to/source.tar`" in extract.answer
    assert "extract an archive verbosely" in extract.question
    assert all("{" not in pair.answer + pair.question + pair.thinking for pair in pairs)
    assert not any("awk" in pair.question for pair in pairs)


def test_pep_headers_and_first_sentences():
    pairs = of("peps/peps/pep-0008.rst", PEP)
    assert pairs[0].answer == (
        'PEP 8 is "Style Guide for Python Code". This document gives style guidelines for `code`. It is short.'
    )
    answers = {pair.question: pair.answer for pair in pairs}
    assert answers["When was PEP 8 created?"].endswith("was created on 05-Jul-2001.")
    assert "Active" in answers["What is the status of PEP 8?"]
    assert of("peps/peps/conf.py", PEP) == []


def test_python_pairs_quote_docstrings_and_code():
    pairs = of("python-stdlib/text/clean.py", CODE, "code")
    text = " ".join(pair.question + pair.answer for pair in pairs)
    assert len(pairs) == 3
    assert "_private" not in text
    assert "odd" not in text
    assert "text.clean." in text
    codes = [p for p in pairs if p.answer.startswith("```")]
    for pair in codes:
        assert "clean(text, *, upper=False)" in pair.question
        assert pair.answer.startswith("```python\ndef clean(text, *, upper=False) -> str:\n    text = text.strip()\n")
    assert of("click/tests/test_x.py", CODE, "code") == []
    assert of("click/bad.py", "def f(:", "code") == []


def test_small_talk_says_what_it_is():
    answers = {pair.question: pair.answer for pair in small_talk()}
    assert "nano" in answers["Who are you?"]
    assert "Hello" in answers
    assert all(pair.question and pair.answer and "|" not in pair.answer for pair in small_talk())


@pytest.mark.parametrize("seed", range(3))
def test_conversations_use_every_pair_at_most_once_in_every_mode(seed):
    groups = [of(f"tldr/{i}", TLDR.replace("tar", f"tool{i}")) for i in range(300)] + [[pair] for pair in small_talk()]
    talks = conversations(groups, random.Random(seed))
    assert talks == conversations(groups, random.Random(seed))
    users = [m["content"] for talk in talks for m in talk.body["messages"] if m["role"] == "user"]
    known = [pair.question for group in groups for pair in group]
    assert set(users) <= set(known)
    assert len(known) * 0.9 <= len(users) <= len(known)
    modes = {(talk.body["thinking"]["type"] == "enabled", talk.body.get("reasoning_effort")) for talk in talks}
    assert modes == {(thinks, effort) for thinks, effort, _ in MODES}
    lengths = {sum(m["role"] == "user" for m in talk.body["messages"]) for talk in talks}
    assert lengths == {1, 2, 3, 4}
    for talk in talks:
        assert talk.body["messages"][-1]["role"] == "user"
        assert (talk.thinking is None) == (talk.body["thinking"]["type"] == "disabled")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.sampled_from(["tldr/a", "peps/peps/pep-1.rst", "x/y.py"]))
def test_any_text_gives_pairs_or_none(text, source):
    for body in (text, f"# {text}\n\n> {text}\n\n- {text}:\n\n`{text}`\n", PEP[:120] + text, CODE + text):
        for pair in of(source, body, "code" if source.endswith("py") else "docs"):
            assert pair.question
            assert pair.answer
