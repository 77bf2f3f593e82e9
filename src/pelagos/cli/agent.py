"""`pelagos agent`: a model does a task in a sandbox; answer on stdout, what it does on stderr."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Run one task folder or instruction and return 0 when the agent ended by itself (and, with tests, passed)."""
    from pelagos import tasks
    from pelagos.agent import Agent, Model
    from pelagos.sandbox import Image, Sandbox

    parser = argparse.ArgumentParser(prog="pelagos agent", description="Have a model do a task in a sandbox.")
    parser.add_argument("task", help="a task folder, or the instruction itself")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="an OpenAI-compatible server")
    parser.add_argument("--model", default="default", help="its model")
    parser.add_argument("--key", help="its key")
    parser.add_argument("--workspace", type=Path, help="a directory whose copy the agent works on")
    parser.add_argument("--substrate", default="container", help="container, microvm or fullvm")
    parser.add_argument("--turns", type=int, default=50, help="at most so many")
    parser.add_argument("--transcript", type=Path, default=Path("transcript.jsonl"), help="written, and gone on with")
    parser.add_argument("--diff", type=Path, help="write what changed as a tar")
    args = parser.parse_args(argv)
    task = tasks.load(Path(args.task)) if Path(args.task).is_dir() else None
    image = tasks.image_of(task) if task else Image.host()
    if args.workspace:
        image = image.with_directory(args.workspace, at="/workspace")

    def show(turn: dict) -> None:
        print(json.dumps(turn, ensure_ascii=False), file=sys.stderr)

    with Sandbox.create(substrate=args.substrate, image=image, ttl_s=3600) as box:
        model = Model(url=args.url, name=args.model, key=args.key)
        agent = Agent(box, args.transcript, max_turns=args.turns)
        outcome = agent.run(task.instruction if task else args.task, model, on_turn=show)
        diff = box.pack_diff()
    if args.diff:
        args.diff.write_bytes(diff)
    told = outcome.to_dict() | ({"passed": tasks.grade(task, diff).passed} if task else {})
    print(json.dumps(told, ensure_ascii=False))
    return 0 if outcome.ended == "done" and told.get("passed", True) else 1
