"""Draw what `pelagos bench kernels`, `decode` or `prefill` wrote: `python -m benchmarks.plot_roofline FILE OUT.png`.

FLOPs a byte against FLOPs a second, under the ceilings of the device they were measured on. Needs `pip install
matplotlib`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pelagos.errors import ConfigError


def main() -> None:
    """Read the rows and write the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot_roofline", description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines, ceilings among them")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    print(f"{draw(args.files, args.out)} rows drawn: {args.out}")


def draw(files: Sequence[Path], out: Path) -> int:
    """Draw the rows of result files over the ceilings they were measured under; return how many were drawn.

    Raises ConfigError when there is no row with ceilings before it.
    """
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    rows = [
        json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    ceilings = [row for row in rows if row.get("bench") == "ceilings"]
    drawn = [row for row in rows if row.get("gbps") and row.get("tflops") and row.get("bench") != "ceilings"]
    if not ceilings or not drawn:
        raise ConfigError("expected rows with gbps and tflops, and a row of ceilings among them")
    best = ceilings[-1]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    x = np.logspace(-1, 4.5, 200)
    for name, peak in (("FP8", best["tflops"]), ("BF16", best["bf16_tflops"])):
        axes.plot(x, np.minimum(best["gbps"] * x / 1e3, peak), label=f"{name} {peak:,} TFLOP/s", linewidth=1)
    for bench in dict.fromkeys(row["bench"] for row in drawn):
        own = [row for row in drawn if row["bench"] == bench]
        intensity = [1e3 * row["tflops"] / row["gbps"] for row in own]
        axes.scatter(intensity, [row["tflops"] for row in own], s=14, label=bench)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    axes.set_title(f"{best['device']}: read {best['gbps']:,} GB/s, random weights")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    return len(drawn)


if __name__ == "__main__":
    main()
