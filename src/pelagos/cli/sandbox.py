"""`pelagos sandbox`: doctor, and what one asks of a trajectory log. Data on stdout, complaints on stderr."""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pelagos.errors import PelagosError
from pelagos.sandbox import log
from pelagos.sandbox.doctor import OPTIONAL, examine, table
from pelagos.sandbox.keeper import SUBSTRATES
from pelagos.sandbox.layers import default_store
from pelagos.sandbox.sdk import replay


def main(arguments: Sequence[str]) -> int:
    """Run one command and return the exit status: 1 where something does not work, verify or repeat."""
    parser = argparse.ArgumentParser(prog="pelagos sandbox", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name, help=text, description=text).add_argument for name, text in {
        "doctor": "start every substrate here and say what is missing",
        "serve": "serve sandboxes over HTTP: gateway, edge and watcher in one",
        "collect": "delete layers and snapshots of guests that nothing uses",
        "verify": "check a sandbox directory's log and blobs",
        "provenance": "list what was asked and what came of it, one JSON object a line",
        "export": "write a log and its blobs as one tar",
        "replay": "run a log again in a new sandbox and list what comes out differently",
    }.items()}  # fmt: skip
    add["doctor"]("--json", action="store_true", help="one JSON object instead of a table")
    add["doctor"]("substrate", nargs="*", help="only these")
    add["collect"]("--days", type=float, default=30, help="only what was not used for so long")
    said = "TOML: a table per project with key, sandboxes, memory_mb; without it this is an edge alone"
    add["serve"]("projects", type=Path, nargs="?", help=said)
    add["serve"]("--name", default="local", help="of this host's edge, by which gateways know it")
    add["serve"]("--host", default="127.0.0.1")
    add["serve"]("--port", type=int, default=8100)
    add["serve"]("--memory-mb", type=float, default=8192, help="of this host's sandboxes together")
    add["serve"]("--edge", action="append", default=[], metavar="NAME=URL", help="another host's edge")
    add["serve"]("--secret", type=Path, help="a file: what gateways and edges know each other by")
    for name in ("verify", "provenance", "export", "replay"):
        add[name]("directory", type=Path)
    add["verify"]("--head", help="a head that must be in the chain")
    add["provenance"]("--blob", help="only what made or took this sha256")
    add["provenance"]("--path", help="only what names this path")
    add["export"]("target", type=Path)
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "serve":
            serve(asked)
            return 0
        if asked.command == "doctor":
            report = examine(names=asked.substrate or SUBSTRATES)
            print(json.dumps(report) if asked.json else table(report))
            wanted = asked.substrate or set(SUBSTRATES) - set(OPTIONAL)
            return 0 if all(report["substrates"][name]["works"] for name in wanted) else 1
        lines = list(told(asked))
        print("".join(json.dumps(line) + "\n" for line in lines), end="")
    except (PelagosError, OSError) as error:
        print(f"{parser.prog} {asked.command}: {error}", file=sys.stderr)
        return 1
    return 1 if asked.command == "replay" and lines else 0


def told(asked: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Return what a question about the store or a log is answered with."""
    if asked.command == "collect":
        return [default_store().collect(older_s=asked.days * 86400)]
    if asked.command == "verify":
        count, head = log.verify(asked.directory, head=asked.head)
        return [{"records": count, "head": head}]
    if asked.command == "export":
        return [{"file": str(asked.target), "head": log.export(asked.directory, asked.target)}]
    if asked.command == "provenance":
        return log.provenance(asked.directory, blob=asked.blob, path=asked.path)
    return asyncio.run(replay(asked.directory))


def serve(asked: argparse.Namespace) -> None:
    """Serve until told to end."""
    import uvicorn

    from pelagos.sandbox.service import Edge, Gateway, app, over_http, read_projects

    secret = asked.secret.read_text(encoding="ascii").strip() if asked.secret else ""
    edge = Edge(default_store(), name=asked.name, most_memory_mb=asked.memory_mb)
    far = (word.split("=", 1) for word in asked.edge)
    edges = {edge.name: edge.answer} | {name: over_http(url, secret) for name, url in far}
    gateway = Gateway(read_projects(asked.projects), edges) if asked.projects else None
    uvicorn.run(app(gateway, edge, secret=secret), host=asked.host, port=asked.port, log_level="warning")
