"""`pelagos bench`: speed of this build on this machine. Plain argparse: runs without typer and rich."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pelagos.cli.counts import parse_tokens

_COLUMNS = ("case", "context", "batch", "tok_s", "steps_s", "gb_s", "floor_frac", "acceptance", "first_token_ms")
_KERNEL_COLUMNS = ("us", "floor_us", "floor_frac", "gbps", "tflops", "launches", "case")
SHAPES = ("flash", "pro", "nano")
_LISTS, _STEP_LISTS = ("contexts", "batches"), ("context", "batch")


def main(argv: Sequence[str]) -> int:
    """Parse, measure, print: one JSON line a figure on stdout or into --out, a table on stderr."""
    parser = argparse.ArgumentParser(prog="pelagos bench", description="Measure speed on this machine.")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    about = "Prefill, decode and cache hits of the serving engine, one JSON line a figure."
    engine = benches.add_parser("engine", help=about, description=about)
    engine.add_argument("--model", default="nano", help="bundled name, checkpoint directory or cached hub id")
    engine.add_argument("--contexts", default="1K,8K,64K,128K", help="tokens before the measured ones")
    engine.add_argument("--batches", default="1,2,4,8,16", help="sequences that decode together")
    engine.add_argument("--tokens", type=int, default=64, help="decoded tokens a sequence and figure")
    engine.add_argument("--chunk-tokens", type=int, metavar="N", help="prompt tokens a step (default: the engine's)")
    engine.add_argument("--mode", default="reference", choices=("reference", "released"), help="number mode")
    engine.add_argument("--device", help="device of the weights, such as cpu or cuda")
    engine.add_argument("--no-native", action="store_true", help="leave the compiled helper out")
    engine.add_argument("--no-exact", action="store_true", help="give up bits that do not depend on the batch")
    engine.add_argument("--no-speculation", action="store_true", help="decode without a draft")
    engine.add_argument("--out", type=Path, help="file for the JSON lines (default: stdout)")
    about = "Each kernel of a decode step on one CUDA device beside its floor, one JSON line a figure; random weights."
    kernels = benches.add_parser("kernels", help=about, description=about)
    kernels.add_argument("--shape", default="flash", choices=SHAPES, help="preset that gives sizes")
    kernels.add_argument("--only", help="comma-separated kernels (default: all)")
    kernels.add_argument("--batch", help="comma-separated tokens a call (default: each kernel's own list)")
    kernels.add_argument("--out", type=Path, help="file for the JSON lines (default: stdout)")
    about = "Whole decode steps of random models of true shape on one CUDA device, one JSON line a figure."
    decode = benches.add_parser("decode", help=about, description=about)
    decode.add_argument("--batch", default="1,8,32,128", help="sequences that decode together")
    about = "Prompts of random models of true shape on one CUDA device, one JSON line a context."
    prefill = benches.add_parser("prefill", help=about, description=about)
    for command in (decode, prefill):
        command.add_argument("--shape", default="flash", choices=SHAPES, help="preset that gives sizes")
        command.add_argument("--layers", help="the first N layers, or A:B (default: all; 39 of flash fit)")
        command.add_argument("--context", default="8K,1M", help="positions, the measured ones among them")
        command.add_argument("--out", type=Path, help="file for the JSON lines (default: stdout)")
    about = "A roofline chart of result files, as PNG; needs matplotlib."
    plot = benches.add_parser("plot", help=about, description=about)
    plot.add_argument("files", nargs="+", type=Path, help="JSON lines of the other benches, ceilings among them")
    plot.add_argument("--out", type=Path, default=Path("roofline.png"), help="the picture")
    args = parser.parse_args(argv)
    if args.bench == "plot":
        return _plot(args)
    if args.bench == "engine" and args.tokens < 1:
        parser.error(f"--tokens {args.tokens}: expected a whole number >= 1")
    rows = {"kernels": _kernels, "decode": _decode, "prefill": _prefill, "engine": _engine}[args.bench](args)
    columns = _COLUMNS if args.bench == "engine" else _KERNEL_COLUMNS
    try:
        out = nullcontext(sys.stdout) if args.out is None else args.out.open("w", encoding="utf-8")
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    with out as sink:
        print("".join(f"{name:>15}" for name in columns), file=sys.stderr)
        for row in rows:
            print(json.dumps(row), file=sink, flush=True)
            cells = ("" if row.get(name) is None else row[name] for name in columns)
            print("".join(f"{cell:>15}" for cell in cells), file=sys.stderr)
    return 0


def _engine(args: argparse.Namespace) -> Any:
    from pelagos.evals.engine_bench import engine_rows

    options: dict[str, Any] = {"mode": args.mode, "device": args.device, "exact": False if args.no_exact else None}
    options["speculation"] = not args.no_speculation
    options |= {"native": False} if args.no_native else {}
    options |= {} if args.chunk_tokens is None else {"chunk_tokens": args.chunk_tokens}
    contexts, batches = ([parse_tokens(each, name) for each in getattr(args, name).split(",")] for name in _LISTS)
    return engine_rows(args.model, contexts=contexts, batches=batches, tokens=args.tokens, **options)


def _kernels(args: argparse.Namespace) -> Any:
    from pelagos.evals.kernel_bench import BENCHES, kernel_rows

    batches = None if args.batch is None else [parse_tokens(each, "batch") for each in args.batch.split(",")]
    return kernel_rows(args.shape, BENCHES if args.only is None else args.only.split(","), batches)


def _decode(args: argparse.Namespace) -> Any:
    from pelagos.evals.step_bench import decode_rows

    contexts, batches = ([parse_tokens(each, name) for each in getattr(args, name).split(",")] for name in _STEP_LISTS)
    return decode_rows(args.shape, layers=args.layers, contexts=contexts, batches=batches)


def _prefill(args: argparse.Namespace) -> Any:
    from pelagos.evals.step_bench import prefill_rows

    contexts = [parse_tokens(each, "context") for each in args.context.split(",")]
    return prefill_rows(args.shape, layers=args.layers, contexts=contexts)


def _plot(args: argparse.Namespace) -> int:
    from pelagos.evals.step_bench import plot

    print(f"{plot(args.files, args.out)} rows drawn: {args.out}", file=sys.stderr)
    return 0
