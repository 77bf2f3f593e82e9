"""`pelagos keys`: who may use a server, and how much."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Make, list or revoke a key; a new one is printed this once."""
    from pelagos.serve.keys import KeyFile

    parser = argparse.ArgumentParser(prog="pelagos keys", description="Make, list and revoke the keys of a server.")
    parser.add_argument("--file", type=Path, help="file of the keys (default: ~/.config/pelagos/keys.json)")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="add | list | revoke")
    add, _, revoke = verbs.add_parser("add"), verbs.add_parser("list"), verbs.add_parser("revoke")
    for each in (add, revoke):
        each.add_argument("name", help="letters, digits, dots, dashes and underscores")
    add.add_argument("--concurrency", type=int, metavar="N", help="requests at a time")
    add.add_argument("--per-minute", type=int, metavar="N", help="requests begun a minute")
    args = parser.parse_args(argv)
    keys = KeyFile(args.file)
    if args.verb == "add":
        print(keys.add(args.name, concurrency=args.concurrency, per_minute=args.per_minute))
    elif args.verb == "revoke":
        keys.revoke(args.name)
    for key in keys.read() if args.verb == "list" else ():
        print(json.dumps(key.about))
