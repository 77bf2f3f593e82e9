"""`pelagos tasks`: make, list, run and grade environments. One JSON object a line on stdout."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Run one verb; `run` and `grade` return 1 unless everything passed."""
    from pelagos import tasks

    parser = argparse.ArgumentParser(prog="pelagos tasks", description="Environments agents work in (Harbor's layout).")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="make | list | run | grade")
    texts = {"make": "write generated task folders", "list": "show the folders of a directory",
             "run": "do tasks by their own solution and grade them", "grade": "grade a packed diff"}  # fmt: skip
    for name, text in texts.items():
        verb = verbs.add_parser(name, help=text, description=text)
        about = "a directory of folders" if name in ("make", "list") else "a folder, or many"
        verb.add_argument("path", type=Path, help=about)
        if name == "make":
            verb.add_argument("--count", type=int, default=200)
            verb.add_argument("--seed", type=int, default=0)
        if name == "run":
            verb.add_argument("--untouched", action="store_true", help="do nothing instead: every task must fail")
        if name == "grade":
            verb.add_argument("diff", type=Path, help="a tar of `pack_diff` or `pelagos agent --diff`")
    args = parser.parse_args(argv)
    if args.verb == "make":
        print(json.dumps({"made": len(tasks.write_all(args.path, count=args.count, seed=args.seed))}))
        return 0
    found = [tasks.load(args.path)] if (args.path / "task.toml").exists() else list(tasks.load_all(args.path))
    good = True
    for task in found:
        told = task.to_dict()
        if args.verb != "list":
            grade = tasks.grade(task, args.diff.read_bytes()) if args.verb == "grade" else None
            grade = grade or tasks.solve(task, touch=not args.untouched)[0]
            told = {"task": task.name, "passed": grade.passed, "reward": grade.reward, "output": grade.output[-500:]}
            good &= grade.passed != (args.verb == "run" and args.untouched)
        print(json.dumps(told), flush=True)
    return 0 if good else 1
