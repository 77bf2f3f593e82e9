"""`pelagos bench`: speed of this build on this machine."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pelagos.cli.options import counts, opened, shared

_COLUMNS = ("case", "context", "batch", "tok_s", "steps_s", "gb_s", "floor_frac", "acceptance", "first_token_ms")
_KERNEL_COLUMNS = ("us", "floor_us", "floor_frac", "gbps", "tflops", "launches", "case")
_ABOUT = {
    "engine": "Prefill, decode and cache hits of the serving engine, one JSON line a figure.",
    "kernels": "Each kernel on one CUDA device beside its floor, one JSON line a figure; random weights.",
    "decode": "Whole decode steps of random models of true shape on one CUDA device, one JSON line a figure.",
    "prefill": "Prompts of random models of true shape on one CUDA device, one JSON line a context.",
    "plot": "A roofline chart of result files, as PNG; needs matplotlib.",
}


def main(argv: Sequence[str]) -> int:
    """Parse, measure, print: one JSON line a figure on stdout or into --out, a table on stderr."""
    parser = argparse.ArgumentParser(prog="pelagos bench", description="Measure speed on this machine.")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    commands = {name: benches.add_parser(name, help=about, description=about) for name, about in _ABOUT.items()}
    engine, kernels, plot = commands["engine"], commands["kernels"], commands["plot"]
    shared(engine, "model", "mode", "device", "out")
    counts(engine, "contexts", "tokens before the measured ones", "1K,8K,64K,128K")
    counts(engine, "batches", "sequences that decode together", "1,2,4,8,16")
    engine.add_argument("--tokens", type=int, default=64, help="decoded tokens a sequence and figure")
    engine.add_argument("--chunk-tokens", type=int, metavar="N", help="prompt tokens a step (default: the engine's)")
    engine.add_argument("--no-native", action="store_true", help="leave the compiled helper out")
    engine.add_argument("--no-exact", action="store_true", help="give up bits that do not depend on the batch")
    engine.add_argument("--no-speculation", action="store_true", help="decode without a draft")
    for command in (kernels, commands["decode"], commands["prefill"]):
        command.add_argument("--shape", default="flash", choices=("flash", "pro", "nano"), help="preset of the sizes")
        shared(command, "out")
        if command is not kernels:
            about = "the first N layers, or A:B (default: all; 39 of flash fit)"
            command.add_argument("--layers", help=about)
            counts(command, "context", "positions, the measured ones among them", "8K,1M")
    kernels.add_argument("--only", type=lambda text: text.split(","), help="comma-separated kernels (default: all)")
    counts(kernels, "batch", "tokens a call (default: each kernel's own list)")
    counts(commands["decode"], "batch", "sequences that decode together", "1,8,32,128")
    plot.add_argument("files", nargs="+", type=Path, help="JSON lines of the other benches, ceilings among them")
    plot.add_argument("--out", type=Path, default=Path("roofline.png"), help="the picture")
    args = parser.parse_args(argv)
    if args.bench == "plot":
        from pelagos.evals.roofline import draw

        try:
            print(f"{draw(args.files, args.out)} rows drawn: {args.out}", file=sys.stderr)
        except OSError as error:
            parser.error(f"{error.filename}: {error.strerror}")
        return 0
    if args.bench == "engine" and args.tokens < 1:
        parser.error(f"--tokens {args.tokens}: expected a whole number >= 1")
    columns = _COLUMNS if args.bench == "engine" else _KERNEL_COLUMNS
    with opened(parser, args.out) as sink:
        print("".join(f"{name:>15}" for name in columns), file=sys.stderr)
        for row in _rows(args):
            print(json.dumps(row), file=sink, flush=True)
            cells = ("" if row.get(name) is None else row[name] for name in columns)
            print("".join(f"{cell:>15}" for cell in cells), file=sys.stderr)
    return 0


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if args.bench == "kernels":
        from pelagos.evals.kernel_bench import kernel_rows

        return kernel_rows(args.shape, args.only, args.batch)
    if args.bench != "engine":
        from pelagos.evals.step_bench import step_rows

        batches = args.batch if args.bench == "decode" else [1]
        return step_rows(args.bench, args.shape, layers=args.layers, contexts=args.context, batches=batches)
    from pelagos.evals.engine_bench import engine_rows

    options: dict[str, Any] = {"mode": args.mode, "device": args.device, "exact": False if args.no_exact else None}
    options["speculation"] = not args.no_speculation
    options |= {"native": False} if args.no_native else {}
    options |= {} if args.chunk_tokens is None else {"chunk_tokens": args.chunk_tokens}
    return engine_rows(args.model, contexts=args.contexts, batches=args.batches, tokens=args.tokens, **options)
