"""`pelagos cache`: what the prefix cache on disk holds, whether it is intact, and its removal."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pelagos.config import read_environment
from pelagos.engine.disk_file import KINDS, CacheDirectory, DamagedFile, Listed
from pelagos.errors import CacheError, ConfigError

app = typer.Typer(no_args_is_help=True)
Place = Annotated[Path | None, typer.Option("--dir", help="Cache directory (default: pelagos/prefix in your cache).")]
User = Annotated[str | None, typer.Option(help="Only this user id; the directory knows users by a keyed hash.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
_SHOWN = 6  # positions a human listing names before it only counts


@app.command("list")
def list_(directory: Place = None, user: User = None, json_output: AsJson = False) -> None:
    """Show users, files, bytes, last use, and the positions that states resume at; with --user, every file."""
    cache = _open(directory)
    users = [_summary(tag, list(_rows(cache, tag))) for tag in _tags(cache, user)]
    report = {"dir": str(cache.root), "bytes": sum(each["bytes"] for each in users), "users": users}
    typer.echo(json.dumps(report, indent=1) if json_output else "\n".join(_lines(report, files=user is not None)))


@app.command()
def verify(
    directory: Place = None, user: User = None, json_output: AsJson = False,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the damaged files.")] = False,
) -> None:  # fmt: skip
    """Read every byte and compare checksums; exit code 1 when a file is damaged."""
    cache = _open(directory)
    counts, damaged = {"intact": 0, "other_format": 0, "gone": 0}, []
    for tag, listed in _files(cache, user):
        try:
            cache.read_table(tag, listed, whole=True)
            counts["intact"] += 1
        except DamagedFile as error:
            damaged.append({"user": tag, "file": listed.name, "bytes": listed.size, "error": str(error)})
            if delete:
                (cache.root / tag / listed.name).unlink(missing_ok=True)
        except CacheError:
            counts["other_format"] += 1
        except FileNotFoundError:  # evicted while we read
            counts["gone"] += 1
    report = {"dir": str(cache.root), **counts, "deleted": len(damaged) if delete else 0, "damaged": damaged}
    lines = [f"damaged: {each['user']}/{each['error']}" for each in damaged]
    shown = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in (counts | {"damaged": len(damaged)}).items())
    typer.echo(json.dumps(report, indent=1) if json_output else "\n".join([*lines, f"{cache.root}: {shown}"]))
    raise typer.Exit(1 if damaged else 0)


@app.command()
def purge(
    directory: Place = None, user: User = None, json_output: AsJson = False,
    everything: Annotated[bool, typer.Option("--all", help="Remove what all users and models have.")] = False,
) -> None:  # fmt: skip
    """Remove a user's files, or with --all everyone's; a server that runs goes on and computes again."""
    if (user is None) != everything:
        raise ConfigError("pelagos cache purge: expected either --user ID or --all")
    cache = _open(directory)
    with cache.locked(10.0) as held:
        if not held:
            raise CacheError(f"{cache.root}: another process has held its lock for 10 s; stop that one and try again")
        removed = sum(cache.remove_user(tag) for tag in _tags(cache, user))
    report = {"dir": str(cache.root), "removed": removed}
    typer.echo(json.dumps(report, indent=1) if json_output else f"{cache.root}: {removed} files removed")


def _open(directory: Path | None) -> CacheDirectory:
    usual = read_environment().cache_home / "pelagos" / "prefix"
    return CacheDirectory(directory or usual, create=directory is None)


def _tags(cache: CacheDirectory, user: str | None) -> list[str]:
    return cache.tags() if user is None else [cache.tag(user)]


def _files(cache: CacheDirectory, user: str | None) -> Iterator[tuple[str, Listed]]:
    for tag in _tags(cache, user):
        yield from ((tag, listed) for listed in cache.list_files(tag))


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


def _some(positions: list[int]) -> str:
    more = f" and {len(positions) - _SHOWN} more" if len(positions) > _SHOWN else ""
    return " ".join(map(str, positions[:_SHOWN])) + more


def _moment(used: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(used / 1e9))
