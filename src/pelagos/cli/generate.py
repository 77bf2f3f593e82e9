"""`pelagos generate`: complete the lines of a JSONL file."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from pelagos.cli.counts import parse_tokens
from pelagos.errors import RequestError

LINES_AHEAD = 32


def generate(
    source: Annotated[typer.FileBinaryRead, typer.Argument(metavar="IN.jsonl", help="- reads stdin.")],
    out: Annotated[Path | None, typer.Option(help="File for the results (default: stdout).")] = None,
    model: Annotated[str, typer.Option(help="Bundled name, checkpoint directory or cached hub id.")] = "nano",
    max_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability to sample from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes every completion repeatable.")] = None,
    mode: Annotated[str, typer.Option(help="Number mode: reference or released.")] = "reference",
    device: Annotated[str | None, typer.Option(help="Device of the weights, such as cpu or cuda.")] = None,
    expert_bytes: Annotated[
        str | None, typer.Option(help="Memory for routed experts, such as 8M; others are read when chosen.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Stop at the first bad line.")] = False,
) -> None:
    """Complete every line of a JSONL file, {"prompt": ...} or {"messages": ...}; exit code 1 when a line was bad."""
    from pelagos.engine import LLM
    from pelagos.evals.lines import complete_lines

    defaults = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    ahead = LINES_AHEAD if source.seekable() else 1  # whoever writes a pipe may wait for the answer to a line
    budget = None if expert_bytes is None else parse_tokens(expert_bytes, "expert-bytes")
    llm = LLM(model, mode=mode, device=device, expert_bytes=budget)
    results = complete_lines(llm, source, defaults=defaults, ahead=ahead)
    with nullcontext(sys.stdout) if out is None else out.open("w", encoding="utf-8") as sink:
        done = bad = 0
        for done, result in enumerate(results, 1):
            print(json.dumps(result, ensure_ascii=False), file=sink, flush=True)
            bad += _tell(done, result)
            if bad and strict:
                break
    if report := llm.expert_stats():
        typer.echo("experts: {places} of {experts} in memory, {bytes_per_token:,} bytes read a token, "
                   "{hit_rate:.1%} found there, {tokens:,} tokens".format(**report), err=True)  # fmt: skip
    if bad:
        raise RequestError(f"{bad} of {done} lines failed")


def _tell(done: int, result: dict[str, Any]) -> int:
    """Report one result on stderr; return 1 for a bad line."""
    if "error" in result:
        typer.echo(f"line {result['line']}: {result['error']}", err=True)
    elif sys.stderr.isatty():
        typer.echo(f"\r{done} done", err=True, nl=False)
    return int("error" in result)
