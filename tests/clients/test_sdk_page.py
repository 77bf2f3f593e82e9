"""The programs on the page of the SDKs run as they stand."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from tests.clients.program import DOC_KEY, DOC_URL, block, serving
from tests.engine.scripted import scripted_llm

from pelagos.serve.keys import KeyFile

TITLES = {"Chat completions": "openai", "Responses": "openai", "Messages": "anthropic"}


@pytest.mark.parametrize("title", TITLES)
def test_a_program_of_the_page_prints_the_answer(title: str, tmp_path: Path) -> None:
    pytest.importorskip(TITLES[title])
    keys = KeyFile(tmp_path / "keys.json")
    secret, printed = keys.add("page"), io.StringIO()
    with (
        serving(scripted_llm("Short.</think>Hello!"), keys=keys) as (url, recorded),
        contextlib.redirect_stdout(printed),
    ):
        exec(compile(block("sdks", f"{title}, with").replace(DOC_URL, url).replace(DOC_KEY, secret), title, "exec"), {})
    assert "Hello!" in printed.getvalue()
    assert [one.status for one in recorded.exchanges] == [200] * len(recorded.exchanges)
    assert "</think>" not in printed.getvalue()
    if title != "Responses":
        assert "Short." in printed.getvalue()
        assert "tokens" in printed.getvalue()
