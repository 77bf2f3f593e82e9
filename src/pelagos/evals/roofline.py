"""A chart of what the benches wrote: FLOPs a byte against FLOPs a second, under the ceilings of their device."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pelagos.errors import ConfigError, MissingDependency


def draw(files: Iterable[Path], out: Path) -> int:
    """Draw the rows of result files over the ceilings they were measured under; return how many were drawn.

    Raises ConfigError without rows or ceilings, MissingDependency without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise MissingDependency("bench plot needs matplotlib; `pip install matplotlib`") from None
    rows = [
        json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    ceilings = [row for row in rows if row.get("bench") == "ceilings"]
    drawn = [row for row in rows if row.get("gbps") and row.get("tflops") and row.get("bench") != "ceilings"]
    if not ceilings or not drawn:
        raise ConfigError("bench plot: expected rows with gbps and tflops, and a row of ceilings among them")
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
