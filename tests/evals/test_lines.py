"""Completion of JSONL: results in order, bad lines reported and passed over."""

from __future__ import annotations

from tests.engine.scripted import scripted_llm

from pelagos.evals.lines import complete_lines


def test_lines_go_on_after_a_bad_one() -> None:
    llm = scripted_llm("Hello")
    lines = [
        '{"messages": [{"role": "user", "content": "Hi"}], "thinking": {"type": "disabled"}, "id": "a"}',
        "not json",
        "",
        '{"prompt": "x", "messages": []}',
        '{"prompt": 5}',
        '{"prompt": "\\ud800"}',
        '{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 0}',
        b'{"prompt": "\xff"}',
    ]
    results = list(complete_lines(llm, lines, defaults={"max_tokens": 3, "temperature": 0}))  # type: ignore[arg-type]
    assert results[0] == {
        "line": 1,
        "id": "a",
        "message": {"role": "assistant", "content": "Hello"},
        "finish_reason": "stop",
    }
    assert [each["line"] for each in results] == [1, 2, 4, 5, 6, 7, 8]
    assert all(set(each) == {"line", "error"} for each in results[1:])
    assert "max_tokens=0" in results[5]["error"]
