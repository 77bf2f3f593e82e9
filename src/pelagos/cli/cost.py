"""`pelagos cost`: parse token counts and tasks, make one report, print it."""

import argparse
import json
import re
from collections.abc import Sequence
from functools import partial

from pelagos import cost as costs
from pelagos.cli.options import counts, parse_tokens, shared
from pelagos.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Cost a model: parameters, cache bytes, FLOPs per token, V3.2 and GQA-8 beside it, a task's price."""
    parser = argparse.ArgumentParser(prog="pelagos cost", description=main.__doc__)
    parser.add_argument("--model", default="flash", help="flash, pro, nano, tiny, v3.2, a directory or a cached hub id")
    about = "tokens of context; K = 1,024, M = 1,048,576"
    parser.add_argument("--context", type=partial(parse_tokens, name="context"), default="1M", help=about)
    about = "price N requests; HIT is a share of IN (<= 1 or 90%%) or tokens"
    parser.add_argument("--task", type=parse_task, metavar="IN,OUT,HIT,N", help=about)
    parser.add_argument("--prices", help="for --task: launch, current (default), or a YYYY-MM-DD")
    about = f"how FLOPs count: {', '.join(costs.WEIGHTINGS)}"
    parser.add_argument("--weighting", default=costs.DEFAULT_WEIGHTING, help=about)
    parser.add_argument("--layout", default="released", help=f"how cache rows are encoded: {', '.join(costs.LAYOUTS)}")
    counts(parser, "dry-run", "plan serving on so many GPUs, such as 4,8,16; times are simulated")
    parser.add_argument("--batch", type=int, default=1, help="for --dry-run: sequences that decode together")
    shared(parser, "json")
    args = parser.parse_args(argv)
    if args.prices is not None and args.task is None:
        raise ConfigError(f"--prices {args.prices}: prices a task, give one with --task IN,OUT,HIT,N")
    if args.dry_run is not None:
        if args.task is not None:
            raise ConfigError("--task with --dry-run: a plan of GPUs prices no task, give one of them")
        from pelagos.evals.placement import plan_rows, table

        rows = list(plan_rows(args.model, gpus=args.dry_run, context=args.context, batch=args.batch))
        print(json.dumps(rows, indent=1) if args.json else table(rows))
        return
    how = {"weighting": args.weighting, "layout": args.layout, "task": args.task, "prices": args.prices or "current"}
    report = costs.report(args.model, context=args.context, **how)
    print(json.dumps(report.to_dict(), indent=1) if args.json else report.table())


def parse_task(text: str) -> tuple[int, int, float, int]:
    """Read `IN,OUT,HIT,N`: tokens, tokens, a share or a number of tokens, requests; raises ConfigError."""
    fields = [field.strip() for field in text.split(",")]
    if len(fields) != 4:
        raise ConfigError(f"task {text!r}: expected IN,OUT,HIT,N such as 20000,1500,0.9,50, got {len(fields)} fields")
    if re.fullmatch(r"[01]?\.\d{1,12}|\d{1,3}(\.\d{1,10})?%", fields[2], re.ASCII):
        hit = float(fields[2].rstrip("%")) / (100 if fields[2].endswith("%") else 1)
        if hit > 1:
            raise ConfigError(f"task HIT={fields[2]}: a share of the input is at most 1 (100%)")
    else:
        hit = float(parse_tokens(fields[2], "task HIT"))
    names = ((0, "IN"), (1, "OUT"), (3, "N"))
    read, generated, requests = (parse_tokens(fields[i], f"task {name}") for i, name in names)
    return read, generated, hit, requests
