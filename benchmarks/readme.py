"""The README's table of figures, made from `benchmarks/results/*.json` and the cost model.

python -m benchmarks.readme rewrites the table in README.md; a test checks that it is up to date. A row whose result
file does not exist is left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pelagos import cost

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKS = "<!-- figures -->\n", "<!-- /figures -->\n"
MILLION = 1 << 20
KINDS = {"docs": "docs", "code": "Python", "books": "books"}


def main() -> None:
    """Rewrite the table between its two marks."""
    rewrite(README, MARKS, table())


def rewrite(page: Path, marks: tuple[str, str], inside: str) -> None:
    """Put `inside` between a page's two marks; raises ValueError where one is missing."""
    before, _, after = split(page.read_text(encoding="utf-8"), marks)
    page.write_text(inside.join((before + marks[0], marks[1] + after)), encoding="utf-8")


def split(text: str, marks: tuple[str, str]) -> tuple[str, str, str]:
    """Return what stands before, between and after the marks; raises ValueError where one is missing."""
    before, rest = text.split(marks[0])
    inside, after = rest.split(marks[1])
    return before, inside, after


def table() -> str:
    """The table as Markdown, a line ending after every row."""
    rows = [("measured", "figure", "command"), ("---", "---", "---")]
    rows += parity() + text_rows() + engine() + price()
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def parity() -> list[tuple[str, str, str]]:
    """Distances from `transformers` and from the released code's vectors."""
    found = result("parity")
    if found is None:
        return []
    reference, released = found["reference"], found["released"]
    worst = max(reference["max_difference"].values())
    cases = f"{reference['configurations']} random configurations, {reference['positions']:,} positions"
    golden = max(way["max"] for way in released.values())
    return [
        (
            f"largest logit difference from transformers {found['transformers']}, fp32, reference mode",
            f"{worst:.1e} ({cases})",
            f"`{found['command']}`",
        ),
        (
            "largest logit difference from the released code's vectors, released mode",
            f"{golden:.1e} (prefill of 300, decode of 163)",
            f"`{found['command']}`",
        ),
    ]


def text_rows() -> list[tuple[str, str, str]]:
    """Bits per byte of nano beside PPMd conditioned on the same training text."""
    nano, ppmd = result("nano_bpb"), result("ppmd")
    if nano is None or ppmd is None:
        return []
    pairs = []
    for kind, name in KINDS.items():
        ours, theirs = nano["results"][kind], ppmd["results"][kind]
        part = "" if ours["sample"] is None else f" on {ours['documents']} of {theirs['documents']} files"
        pairs.append(f"{name} {ours['bits_per_byte']:.3f}{part} ({theirs['bits_per_byte']:.3f})")
    what = "bits per byte of held-out text, nano (PPMd after the same training text)"
    return [(what, "; ".join(pairs), f"`{nano['command'].partition(' (')[0]}`")]


def engine() -> list[tuple[str, str, str]]:
    """The serving engine: speed beside `transformers`, exactness, hits, faults."""
    rows = []
    if found := result("engine_speed"):
        parts = found["parts"]
        steps = {name: each["median"] for name, each in parts["decode"]["ms_per_step"].items()}
        for batch in (1, 16):
            theirs = min(ms for name, ms in steps.items() if re.fullmatch(f"transformers \\w+ {batch}", name))
            ours = steps[f"helper {batch}"]
            what = f"nano decoding on a CPU, 2 threads, fp32, batch {batch}: tokens/s (transformers' fastest path)"
            figure = f"{1e3 * batch / ours:,.0f} ({1e3 * batch / theirs:,.0f}), {theirs / ours:.1f}x"
            rows.append((what, figure, "`python -m benchmarks.engine_speed --only decode`"))
        first = parts["hits"]["first_token_ms"]
        what = "first token behind a cached prefix of 65,536 tokens, from RAM; from disk (computed: cold)"
        cold = parts["hits"]["cold_ms"] / 1e3
        figure = f"{first['ram']['median']:.0f} ms; {first['ssd']['median']:.0f} ms ({cold:.0f} s)"
        rows.append((what, figure, "`python -m benchmarks.engine_speed --only hits`"))
    if found := result("engine_exactness"):
        groups = [each for groups in found["summary"].values() for each in groups.items()]
        sums = [group for name, group in groups if name.endswith("helper")]
        runs, tokens, tokens_off, bits_off = (
            sum(each[key] for each in sums) for key in ("runs", "tokens", "differing_tokens", "differing_logprobs")
        )
        what = "tokens; log-probability bits that change with batch, chunks, hits (RAM, disk), swaps, drafts (helper)"
        figure = f"{tokens_off}; {bits_off} of {tokens:,} tokens in {runs} runs"
        rows.append((what, figure, "`python -m benchmarks.engine_exactness --tiny --nano --cuts --path helper`"))
    if found := result("trace"):
        least = 100 * found["hit_of_attainable_least"]
        what = "prefix hits on a replayed trace, pool of 25 % of its bytes, of what an all-knowing cache gets"
        rows.append((what, f"{least:.1f} %", "`python -m benchmarks.trace --data DIRECTORY`"))
    if found := result("disk_faults"):
        what = "wrong results after kills, bit flips, full disks and the like while the disk cache is written"
        rows.append((what, f"{found['failed']} of {found['done']}", "`python -m benchmarks.disk_faults`"))
    if found := result("leaks"):
        done, calls = found["chunkings"]["done"], found["calls"]["counts"]["calls"]
        wrong = len(found["chunkings"]["wrong"]) + len(found["calls"]["wrong"])
        what = "leaks of tool-call markup, or calls of no valid JSON: outputs cut at random; calls sampled from nano"
        rows.append((what, f"{wrong} of {done:,}; {calls:,}", "`python -m benchmarks.leaks`"))
    return rows


def price() -> list[tuple[str, str, str]]:
    """The growth of Flash's cache, by formula."""
    report = cost.report("flash", context=MILLION).to_dict()
    share = f"{100 * report['versus']['v3.2']['kv']:.1f} % of V3.2's at {MILLION:,} tokens"
    figure = f"{report['kv_bytes_per_token']:,.0f} B/token, {share}"
    return [("KV cache of DeepSeek-V4-Flash", figure, "`pelagos cost --model flash`")]


def result(name: str) -> dict[str, Any] | None:
    """The recorded result NAME.json, or None where nobody has recorded one."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


if __name__ == "__main__":
    main()
