"""`pelagos cache`: what the prefix cache on disk holds, whether it is intact, and its removal."""

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pelagos.cli.options import shared
from pelagos.config import read_environment
from pelagos.engine.disk_file import KINDS, USER_OF_KEY, CacheDirectory, DamagedFile
from pelagos.errors import CacheError, ConfigError


def main(argv: Sequence[str]) -> int:
    """Run one verb; `verify` returns 1 when a file is damaged."""
    parser = argparse.ArgumentParser(prog="pelagos cache", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list | verify | purge")
    for verb in (list_, verify, purge):
        command = verbs.add_parser(verb.__name__.rstrip("_"), help=verb.__doc__, description=verb.__doc__)
        command.set_defaults(run=verb)
        command.add_argument("--dir", type=Path, help="cache directory (default: pelagos/prefix in your cache)")
        command.add_argument("--user", metavar="ID", help="only this user id (the directory has keyed hashes)")
        command.add_argument("--key", metavar="NAME", help="the user's API key, where the server asks for keys")
        shared(command, "json")
        if verb is verify:
            command.add_argument("--delete", action="store_true", help="remove the damaged files")
        if verb is purge:
            command.add_argument("--all", action="store_true", help="remove what all users and models have")
    args = parser.parse_args(argv)
    args.user = args.user if args.key is None else USER_OF_KEY.format(args.key, args.user or "")
    if args.verb == "purge" and (args.user is None) != args.all:
        raise ConfigError("pelagos cache purge: expected either --user ID or --all")
    usual = read_environment().cache_home / "pelagos" / "prefix"
    report, lines = args.run(CacheDirectory(args.dir or usual, create=args.dir is None), args)
    print(json.dumps(report, indent=1) if args.json else "\n".join(lines))
    return 1 if report.get("damaged") else 0


def list_(cache: CacheDirectory, args: argparse.Namespace) -> tuple[dict[str, Any], Iterable[str]]:
    """Show users, files, bytes, last use, and the positions that states resume at; with --user, every file."""
    users = [_summary(tag, list(_rows(cache, tag))) for tag in _tags(cache, args.user)]
    report = {"dir": str(cache.root), "bytes": sum(each["bytes"] for each in users), "users": users}
    return report, _lines(report, files=args.user is not None)


def verify(cache: CacheDirectory, args: argparse.Namespace) -> tuple[dict[str, Any], Iterable[str]]:
    """Read every byte and compare checksums; exit code 1 when a file is damaged."""
    counts, damaged = {"intact": 0, "other_format": 0, "gone": 0}, []
    for tag, listed in ((each, file) for each in _tags(cache, args.user) for file in cache.list_files(each)):
        try:
            cache.read_table(tag, listed, whole=True)
            counts["intact"] += 1
        except DamagedFile as error:
            damaged.append({"user": tag, "file": listed.name, "bytes": listed.size, "error": str(error)})
            if args.delete:
                (cache.root / tag / listed.name).unlink(missing_ok=True)
        except CacheError:
            counts["other_format"] += 1
        except FileNotFoundError:  # evicted while we read
            counts["gone"] += 1
    report = {"dir": str(cache.root), **counts, "deleted": len(damaged) if args.delete else 0, "damaged": damaged}
    shown = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in (counts | {"damaged": len(damaged)}).items())
    return report, [*(f"damaged: {each['user']}/{each['error']}" for each in damaged), f"{cache.root}: {shown}"]


def purge(cache: CacheDirectory, args: argparse.Namespace) -> tuple[dict[str, Any], Iterable[str]]:
    """Remove a user's files, or with --all everyone's; a server that runs goes on and computes again."""
    with cache.locked(10.0) as held:
        if not held:
            raise CacheError(f"{cache.root}: another process has held its lock for 10 s; stop that one and try again")
        removed = sum(cache.remove_user(tag) for tag in _tags(cache, args.user))
    return {"dir": str(cache.root), "removed": removed}, [f"{cache.root}: {removed} files removed"]


def _tags(cache: CacheDirectory, user: str | None) -> list[str]:
    return cache.tags() if user is None else [cache.tag(user)]


def _rows(cache: CacheDirectory, tag: str) -> Iterator[dict[str, Any]]:
    for listed in cache.list_files(tag):
        row = {"file": listed.name, "kind": KINDS[listed.kind], "model": listed.fingerprint.hex()}
        row |= {"format": listed.version, "bytes": listed.size, "last_use": _moment(listed.used)}
        try:
            table = cache.read_table(tag, listed)
        except FileNotFoundError:
            continue
        except CacheError as error:
            yield row | {"entries": 0, "positions": [], "error": str(error)}
        else:
            yield row | {"entries": len(table.records), "positions": [record.position for record in table.records]}


def _summary(tag: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in ("pages", "state")}
    return {
        "user": tag,
        "pages": sum(row["entries"] for row in of["pages"]),
        "states": sum(row["entries"] for row in of["state"]),
        "bytes": sum(row["bytes"] for row in rows),
        "last_use": max((row["last_use"] for row in rows), default=None),
        "positions": sorted(position for row in of["state"] for position in row["positions"]),
        "files": rows,
    }


def _lines(report: dict[str, Any], *, files: bool) -> Iterator[str]:
    row = "{:<34}{:>7}{:>8}{:>16}  {:<21}{}".format
    yield f"{report['dir']}: {report['bytes']:,} bytes of {len(report['users'])} users"
    yield row("user", "pages", "states", "bytes", "last use (UTC)", "states at")
    for user in report["users"]:
        counts = user["pages"], user["states"], f"{user['bytes']:,}", user["last_use"] or "never"
        yield row(user["user"], *counts, _some(user["positions"]))
        for file in user["files"] if files else ():
            about = file.get("error") or f"{file['kind']} {_some(file['positions'])}"
            yield f"  {file['file']}  {file['bytes']:,} bytes  {file['last_use']}  {about}"


def _some(positions: list[int], named: int = 6) -> str:
    more = f" and {len(positions) - named} more" if len(positions) > named else ""
    return " ".join(map(str, positions[:named])) + more


def _moment(used: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(used / 1e9))
