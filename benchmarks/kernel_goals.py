"""The table of docs/kernels.md: what the recorded rows of one and of two H200 say beside the goals set for them.

python -m benchmarks.kernel_goals rewrites the table; a test checks that it is up to date. Goals are shares of the floor
that the device's measured ceilings allow, or times. A figure that nobody has recorded is shown as missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.readme import RESULTS, ROOT, rewrite

PAGE = ROOT / "docs" / "kernels.md"
MARKS = "<!-- goals -->\n", "<!-- /goals -->\n"
Row = dict[str, Any]


class Goal(NamedTuple):
    """A figure that is asked for, and the recorded row it is read from; `least`: more is better."""

    what: str
    asked: float
    least: bool
    unit: str
    bench: str
    case: str
    read: Callable[[Row], float]
    file: str = "nvidia-h200"


def share(what: str, asked: float, bench: str, case: str) -> Goal:
    """A goal in percent of the floor."""
    return Goal(what, asked, True, " %", f"kernels.{bench}", f"flash {case}", lambda row: 100 * row["floor_frac"])


def micros(what: str, asked: float, bench: str, case: str) -> Goal:
    """A goal in microseconds."""
    return Goal(what, asked, False, " us", f"kernels.{bench}", f"flash {case}", lambda row: row["us"])


def _ms(row: Row) -> float:
    return row["us"] / 1e3


GOALS = (
    share("sparse decode attention, 128 sequences at 8K", 60, "attention", "ratio=4 context=8192 T=128"),
    micros("the same, one sequence", 8, "attention", "ratio=4 context=8192 T=1"),
    share("sparse attention of a prompt's 8,192 tokens", 60, "prefill_attention", "ratio=4 context=8192 T=8192"),
    share("index scores, 8 sequences at 1M", 80, "indexer", "scores context=1048576 T=8"),
    share("index scores and choice of a prompt's chunk at 128K", 50, "prefill_indexer", "context=131072 T=8192"),
    micros("choice of 512 of 262,144 entries, one sequence", 12, "indexer", "choice context=1048576 T=1"),
    share("compressor and cache write of 8,192 tokens", 80, "prefill_cache", "ratio=4 T=8192"),
    micros("mHC site, one token", 3.5, "site", "T=1"),
    share("mHC site, 8,192 tokens", 85, "site", "T=8192"),
    share("FP4 experts, 8 sequences", 75, "fp4_experts", "distinct=44.9 T=8"),
    share("FP4 experts, 128 sequences", 75, "fp4_experts", "distinct=245.2 T=128"),
    share("FP4 experts of a prompt, of FP8's rate", 50, "prefill_experts", "T=8192"),
    share("dense FP8 product wq_b, 8,192 tokens, of the library's best", 90, "prefill_products", "wq_b T=8192"),
    share("dense FP8 product wq_b, one token", 82, "skinny_gemm", "wq_b T=1"),
    share("dense FP8 product wo_b, 32 tokens", 82, "skinny_gemm", "wo_b T=32"),
    Goal("a step of 39 layers, one sequence at 8K", 4.5, False, " ms", "decode",
         "flash layers=39 context=8192 batch=1", _ms),
    Goal("the same at 1M", 6.0, False, " ms", "decode", "flash layers=39 context=1048576 batch=1", _ms),
    Goal("prompt of 8K, 39 layers", 20_000, True, " tok/s", "prefill",
         "flash layers=39 context=8192 batch=1", lambda row: row["tok_s"]),
    Goal("two GPUs, 43 layers: a step of 128 sequences at 8K", 26, False, " ms", "group",
         "flash layers=43 decode context=8192 batch=128 drafts=0", _ms, "nvidia-h200-x2"),
)  # fmt: skip


def main() -> None:
    """Rewrite the table between its two marks."""
    rewrite(PAGE, MARKS, table())


def table() -> str:
    """The table as Markdown, a line ending after every row."""
    lines = ["| what | measured | goal | of the goal | commit |", "| --- | --- | --- | --- | --- |"]
    found = {name: recorded(RESULTS / f"{name}.jsonl") for name in {goal.file for goal in GOALS}}
    for goal in GOALS:
        row = found[goal.file].get((goal.bench, goal.case))
        asked = f"{'>=' if goal.least else '<='} {goal.asked:,.10g}{goal.unit}"
        if row is None:
            lines.append(f"| {goal.what} | not recorded | {asked} | | |")
            continue
        value = goal.read(row)
        part = value / goal.asked if goal.least else goal.asked / value
        shown = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        lines.append(f"| {goal.what} | {shown}{goal.unit} | {asked} | {part:.0%} | {row['commit'].split()[0]} |")
    return "".join(f"{line}\n" for line in lines)


def recorded(path: Path) -> dict[tuple[str, str], Row]:
    """The last row of each bench and case."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {(row["bench"], row.get("case")): row for row in rows}


if __name__ == "__main__":
    main()
