"""`pelagos eval`: measures of a model."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pelagos.cli.options import shared

_EVERY_S = 5.0  # between two lines of progress


def main(argv: Sequence[str]) -> int:
    """Parse, measure, print: one JSON object with --json, else a table."""
    parser = argparse.ArgumentParser(prog="pelagos eval", description="Measure a model.")
    measures = parser.add_subparsers(dest="measure", required=True, metavar="MEASURE")
    about = "Bits per byte of text; each document counts alone, with its end."
    bpb = measures.add_parser("bpb", help=about, description=about)
    bpb.add_argument("files", nargs="+", type=Path, metavar="FILE", help="text, JSON lines or Parquet; .gz is unpacked")
    shared(bpb, "model", "mode", "device", "json")
    bpb.add_argument("--context", type=int, metavar="N", help="start anew every N tokens (default: whole documents)")
    bpb.add_argument("--sample", type=int, metavar="N", help="score N documents of each file (default: all)")
    bpb.add_argument("--seed", type=int, default=0, help="which documents --sample draws")
    args = parser.parse_args(argv)
    import torch

    from pelagos.config import read_environment
    from pelagos.evals.bpb import bits_per_byte

    if (threads := read_environment().threads) is not None:
        torch.set_num_threads(threads)
    said = time.monotonic()

    def progress(line: str) -> None:
        nonlocal said
        if time.monotonic() - said > _EVERY_S:
            said = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    chosen = {name: getattr(args, name) for name in ("mode", "context", "sample", "seed", "device")}
    report = bits_per_byte(args.model, args.files, **chosen, progress=progress)
    print(json.dumps(report, indent=1, ensure_ascii=False) if args.json else _table(report))
    return 0


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'bits/byte':>9}  {'tokens':>11}  {'bytes':>11}  {'documents':>9}  file"]
    for row in (*report["files"], report | {"file": "all"}):
        counts = f"{row['tokens']:11,}  {row['bytes']:11,}  {row['documents']:9,}"
        lines.append(f"{row['bits_per_byte']:9.4f}  {counts}  {row['file']}")
    context = report["context"] or "whole documents"
    return "\n".join([*lines, f"model {report['model']}, mode {report['mode']}, context {context}"])
