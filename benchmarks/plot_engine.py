"""Draw what `pelagos bench engine --out FILE` wrote: `python -m benchmarks.plot_engine FILE [FILE ...] OUT.png`.

Left, prefill and decode tokens per second against the context; middle, decode against the batch at each context, with
the share of the floor; right, milliseconds to the first token behind a cached context. Needs `pip install matplotlib`
(used here only).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def main() -> None:
    """Read the rows and write the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot_engine", description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("it needs matplotlib; `pip install matplotlib`")
    try:
        rows = [json.loads(line) for path in args.rows for line in path.read_text(encoding="utf-8").splitlines()]
        draw(rows, args.out)
    except (OSError, ValueError, KeyError, IndexError) as error:
        what = "expected rows of `pelagos bench engine --out FILE`, and a place for the picture"
        parser.error(f"{what}: {type(error).__name__}: {error}")


def series(rows: Sequence[Row], case: str, x: str, y: str, **fixed: int) -> tuple[list[float], list[float]]:
    """The points (x, y) of one case, in order of x, where the columns in `fixed` have those values."""
    kept = [row for row in rows if row["case"] == case and all(row[name] == value for name, value in fixed.items())]
    kept.sort(key=lambda row: row[x])
    return [row[x] for row in kept], [row[y] for row in kept]


def draw(rows: Sequence[Row], out: Path) -> None:
    """Write a PNG of three panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4))
    left.plot(*series(rows, "prefill", "context", "tok_s"), "s--", color="0.3", label="prefill")
    for batch in sorted({row["batch"] for row in rows if row["case"] == "decode"}):
        left.plot(*series(rows, "decode", "context", "tok_s", batch=batch), "o-", label=f"decode, batch {batch}")
    left.set(xlabel="context, tokens", ylabel="tokens/s", xscale="log", yscale="log")
    for context in sorted({row["context"] for row in rows if row["case"] == "decode"}):
        batches, rates = series(rows, "decode", "batch", "tok_s", context=context)
        _, shares = series(rows, "decode", "batch", "floor_frac", context=context)
        middle.plot(batches, rates, "o-", label=f"{context:,}")
        for batch, rate, share in zip(batches, rates, shares, strict=True):
            middle.annotate(f"{share:.0%}", (batch, rate), fontsize=6, xytext=(2, 3), textcoords="offset points")
    middle.set(xlabel="sequences", ylabel="tokens/s (share of the floor)", xscale="log")
    for case, label in (("hit_ram", "RAM"), ("hit_ssd", "SSD")):
        right.plot(*series(rows, case, "context", "first_token_ms"), "o-", label=label)
    right.set(xlabel="cached context, tokens", ylabel="ms to the first token", xscale="log", yscale="log")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    figure.suptitle(f"{rows[0]['model']} on {rows[0]['device']}, commit {rows[0]['commit']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
