"""`pelagos cost`: parse token counts and tasks, make one report, print it."""

import json
import re
from typing import Annotated

import typer

from pelagos import cost as costs
from pelagos.cli.counts import parse_tokens
from pelagos.errors import ConfigError

_WEIGHTINGS = f"How FLOPs count: {', '.join(costs.WEIGHTINGS)}."


def cost(
    model: Annotated[str, typer.Option(help="flash, pro, nano, tiny, v3.2, a directory or a cached hub id")] = "flash",
    context: Annotated[str, typer.Option(help="Tokens of context; K = 1,024, M = 1,048,576.")] = "1M",
    task: Annotated[
        str | None,
        typer.Option(metavar="IN,OUT,HIT,N", help="Price N requests; HIT is a share of IN (<= 1 or 90%) or tokens."),
    ] = None,
    prices: Annotated[str | None, typer.Option(help="For --task: launch, current (default), or a YYYY-MM-DD.")] = None,
    weighting: Annotated[str, typer.Option(help=_WEIGHTINGS)] = costs.DEFAULT_WEIGHTING,
    layout: Annotated[str, typer.Option(help=f"How cache rows are encoded: {', '.join(costs.LAYOUTS)}.")] = "released",
    dry_run: Annotated[
        str | None,
        typer.Option(metavar="GPUS", help="Plan serving on so many GPUs, such as 4,8,16; times are simulated."),
    ] = None,
    batch: Annotated[int, typer.Option(help="For --dry-run: sequences that decode together.")] = 1,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Cost a model: parameters, cache bytes, FLOPs per token, V3.2 and GQA-8 beside it, a task's price."""
    if prices is not None and task is None:
        raise ConfigError(f"--prices {prices}: prices a task, give one with --task IN,OUT,HIT,N")
    if dry_run is not None:
        from pelagos.evals.placement import plan_rows, table

        counts = [parse_tokens(each, "dry-run") for each in dry_run.split(",")]
        rows = list(plan_rows(model, gpus=counts, context=parse_tokens(context, "context"), batch=batch))
        typer.echo(json.dumps(rows, indent=1) if json_output else table(rows))
        return
    priced = {"task": None if task is None else parse_task(task), "prices": prices or "current"}
    tokens = parse_tokens(context, "context")
    report = costs.report(model, context=tokens, weighting=weighting, layout=layout, **priced)
    typer.echo(json.dumps(report.to_dict(), indent=1) if json_output else report.table())


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
