"""`pelagos generate`: complete the lines of a JSONL file."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial

from pelagos.cli.options import SAMPLING, opened, parse_tokens, shared
from pelagos.errors import RequestError

LINES_AHEAD = 32


def main(argv: Sequence[str]) -> None:
    """Complete every line; results go to stdout or a file, bad lines to stderr, and exit code 1 tells of them."""
    from pelagos.engine import LLM
    from pelagos.evals.lines import complete_lines

    about = 'Complete every line of a JSONL file, {"prompt": ...} or {"messages": ...}; exit code 1 if a line was bad.'
    parser = argparse.ArgumentParser(prog="pelagos generate", description=about)
    parser.add_argument("source", metavar="IN.jsonl", help="- reads stdin")
    shared(parser, "out", "model", "mode", "device", *SAMPLING)
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest completion")
    about = "memory for routed experts, such as 8M; others are read when chosen"
    parser.add_argument("--expert-bytes", type=partial(parse_tokens, name="expert-bytes"), metavar="N", help=about)
    parser.add_argument("--strict", action="store_true", help="stop at the first bad line")
    args = parser.parse_args(argv)
    try:
        source = sys.stdin.buffer if args.source == "-" else open(args.source, "rb")  # noqa: SIM115
    except OSError as error:
        parser.error(f"{args.source}: {error.strerror}")
    defaults = {name: getattr(args, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    ahead = LINES_AHEAD if source.seekable() else 1  # whoever writes a pipe may wait for the answer to a line
    done = bad = 0
    with source:
        llm = LLM(args.model, mode=args.mode, device=args.device, expert_bytes=args.expert_bytes)
        results = complete_lines(llm, source, defaults=defaults, ahead=ahead)
        with opened(parser, args.out) as sink:
            for done, result in enumerate(results, 1):
                print(json.dumps(result, ensure_ascii=False), file=sink, flush=True)
                bad += "error" in result
                if "error" in result:
                    print(f"line {result['line']}: {result['error']}", file=sys.stderr)
                elif sys.stderr.isatty():
                    print(f"\r{done} done", end="", file=sys.stderr)
                if bad and args.strict:
                    break
    if report := llm.expert_stats():
        print("experts: {places} of {experts} in memory, {bytes_per_token:,} bytes read a token, "
              "{hit_rate:.1%} found there, {tokens:,} tokens".format(**report), file=sys.stderr)  # fmt: skip
    if bad:
        raise RequestError(f"{bad} of {done} lines failed")
