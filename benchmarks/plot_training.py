"""Draw the curve of a training run: `python -m benchmarks.plot_training models/nano/training_log.jsonl OUT.png`.

Above, held-out bits per byte of text at each check of the run; below, the training loss. Dotted lines mark where the
learning rate starts to fall and where CSA turns sparse and the numbers quantised. Needs `pip install matplotlib`
(used here only).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

YARDSTICK = Path(__file__).parent / "results" / "ppmd.json"
COLOURS = {"docs": "tab:blue", "code": "tab:green", "books": "tab:red"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mark", type=int, nargs="*", default=[1320, 2475], help="steps at which a stage starts")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.log.read_text(encoding="utf-8").splitlines()]
    trained = [row for row in rows if "loss" in row]
    checks = [row for row in rows if "heldout" in row]
    ppmd = json.loads(YARDSTICK.read_text(encoding="utf-8"))["results"]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5.6), height_ratios=(3, 2))
    for kind, colour in COLOURS.items():
        scores = [check["heldout"][kind] for check in checks]
        above.plot([check["step"] for check in checks], scores, "o-", color=colour, label=f"{kind} {scores[-1]:.3f}")
        above.axhline(ppmd[kind]["bits_per_byte"], color=colour, linestyle="--", linewidth=0.8)
    above.set_ylabel("held-out bits per byte\n(dashed: PPMd, order 12)")
    above.legend(loc="upper right", fontsize=8)
    steps = [row["step"] for row in trained]
    below.plot(steps, [row["loss"] for row in trained], color="0.3", linewidth=0.9, label="next token")
    below.plot(steps, [row["mtp"] for row in trained], color="0.7", linewidth=0.9, label="MTP")
    below.set(xlabel="step", ylabel="training loss (nats)", ylim=(1.2, 4.5))
    below.legend(loc="upper right", fontsize=8)
    for axis in (above, below):
        axis.grid(alpha=0.3)
        for step in args.mark:
            axis.axvline(step, color="0.5", linestyle=":", linewidth=1)
    figure.tight_layout()
    figure.savefig(args.out, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
