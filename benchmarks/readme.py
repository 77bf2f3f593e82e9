"""The README's table of figures, made from `benchmarks/results/*.json` and the cost model.

python -m benchmarks.readme rewrites the table in README.md; a test checks that it is up to date. A row whose result
file does not exist is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pelagos import cost

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
OPEN, CLOSE = "<!-- figures -->\n", "<!-- /figures -->\n"
MILLION = 1 << 20
KINDS = {"docs": "docs", "code": "Python", "books": "books"}


def main() -> None:
    """Rewrite the table between its two marks."""
    before, _, after = split(README.read_text(encoding="utf-8"))
    README.write_text(before + OPEN + table() + CLOSE + after, encoding="utf-8")


def split(text: str) -> tuple[str, str, str]:
    """Return what stands before, between and after the marks; raises ValueError where one is missing."""
    before, rest = text.split(OPEN)
    inside, after = rest.split(CLOSE)
    return before, inside, after


def table() -> str:
    """The table as Markdown, a line ending after every row."""
    rows = [("measured", "figure", "command"), ("---", "---", "---")]
    rows += parity() + text_rows() + decode() + price()
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


def decode() -> list[tuple[str, str, str]]:
    """Decode speed of nano on a CPU beside `transformers`."""
    found = result("decode")
    if found is None:
        return []
    ours, theirs = (found["tokens_per_s"][side] for side in ("pelagos", found["peer"]))
    what = f"nano decoding on a CPU, {found['threads']} threads, fp32: tokens/s (transformers' fastest path)"
    return [(what, f"{ours:.0f} ({theirs:.0f}), {found['speedup']:.1f}x", f"`{found['command'].strip()}`")]


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
