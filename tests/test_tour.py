"""The tour runs: every block of docs/tour.md prints what the page says. Run this file to rewrite the outputs.

Numbers with a decimal point may differ by one in the last printed digit, everything else is compared to the letter.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "docs" / "tour.md"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n```text\n(?P<output>.*?)^```$", re.MULTILINE | re.DOTALL)
FLOAT = re.compile(r"-?\d+\.\d+")
LONGEST_BLOCK = 12


def blocks() -> list[tuple[str, str]]:
    """(code, printed output) of each block of the page."""
    return [(match["code"], match["output"]) for match in BLOCK.finditer(TOUR.read_text(encoding="utf-8"))]


def run_blocks() -> list[str]:
    """Run the page's code in one session and return what each block prints."""
    session: dict[str, object] = {"__name__": "tour"}
    grad, threads, printed = torch.is_grad_enabled(), torch.get_num_threads(), []
    torch.set_num_threads(1)  # sums in one order, whatever machine this is
    try:
        for number, (code, _) in enumerate(blocks()):
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                exec(compile(code, f"{TOUR.name}, block {number}", "exec"), session)
            printed.append(shown.getvalue())
    finally:
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)
    return printed


def difference(expected: str, got: str) -> str | None:
    """Say how two outputs differ beyond the stated precision; None when they agree."""
    if FLOAT.sub("#", expected) != FLOAT.sub("#", got):
        return f"text differs\nexpected:\n{expected}\ngot:\n{got}"
    for wanted, found in zip(FLOAT.findall(expected), FLOAT.findall(got), strict=True):
        places = len(wanted.partition(".")[2])
        if len(found.partition(".")[2]) != places or abs(Decimal(wanted) - Decimal(found)) > Decimal(1).scaleb(-places):
            return f"{found}, expected {wanted} within one in the last digit"
    return None


@pytest.fixture(scope="module")
def printed() -> list[str]:
    pytest.importorskip("deepseek_recipe", reason="deepseek-recipe has no wheel here: chat prompts cannot be rendered")
    return run_blocks()


@pytest.mark.parametrize("number", range(len(blocks())))
def test_block_prints_what_the_page_says(number: int, printed: list[str]) -> None:
    code, expected = blocks()[number]
    assert expected, "a block of the tour prints something"
    found = difference(expected, printed[number])
    assert found is None, f"{code}\n{found}\nafter a wanted change: python tests/test_tour.py"


def test_every_block_is_run_and_short() -> None:
    page = TOUR.read_text(encoding="utf-8")
    assert page.count("```python") == len(blocks()) >= 12
    assert page.count("```") == 4 * len(blocks())
    assert {code: lines for code, _ in blocks() if (lines := code.count("\n")) > LONGEST_BLOCK} == {}


def test_files_the_page_names_are_here() -> None:
    page = TOUR.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", page))
    roots = (ROOT, ROOT / "src" / "pelagos", ROOT / "src" / "pelagos" / "model")
    assert len(named) > 15
    assert [name for name in sorted(named) if not any((root / name).exists() for root in roots)] == []


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("0.50 of 12\n", "0.51 of 12\n", True),
        ("0.50 of 12\n", "0.52 of 12\n", False),
        ("0.50 of 12\n", "0.50 of 13\n", False),
        ("-1.9", "-2.0", True),
        ("-1.9", "1.9", False),
        ("1.0", "1.00", False),
        ("a 1.0", "b 1.0", False),
        ("1.0 2.0", "1.0", False),
    ],
)
def test_comparison_is_strict(expected: str, got: str, same: bool) -> None:
    assert (difference(expected, got) is None) == same


def rewrite() -> None:
    outputs = iter(run_blocks())
    page = BLOCK.sub(
        lambda m: f"```python\n{m['code']}```\n```text\n{next(outputs)}```", TOUR.read_text(encoding="utf-8")
    )
    TOUR.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    rewrite()
