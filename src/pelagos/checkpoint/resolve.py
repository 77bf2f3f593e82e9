"""From what the user typed to a checkpoint directory: a bundled name, a directory, or a hub id already downloaded."""

import re
from pathlib import Path

from pelagos.config import HUB_ID, bundled_model_dir, hub_snapshot
from pelagos.errors import CheckpointError

_BUNDLED_NAME = re.compile(r"\w[\w-]*")


def resolve_model(name_or_path: str | Path) -> Path:
    """Return the checkpoint directory of a bundled name, a directory or a hub id, looked up in that order.

    A hub id `org/name` is found in the local hub cache at the revision of `refs/main`; nothing is downloaded.
    Raises CheckpointError listing what was tried and the bundled names.
    """
    text = str(name_or_path)
    tried: list[str] = []
    try:
        found = _search(text, tried)
    except (OSError, ValueError, RuntimeError) as error:  # a path the system refuses: too long, no such home
        tried.append(f"path ({error})"[:200])
        found = None
    if found is None:
        names = ", ".join(bundled_names()) or "none"
        raise CheckpointError(f"model {text[:200]!r}: not found; tried {'; '.join(tried)}. Bundled models: {names}")
    return found


def _search(text: str, tried: list[str]) -> Path | None:
    """Return the directory, or None with one line in `tried` for each place looked at."""
    if _BUNDLED_NAME.fullmatch(text):
        bundled = bundled_model_dir(text)
        if (bundled / "config.json").is_file():
            return bundled
        tried.append(f"bundled model {bundled}")
    directory = Path(text).expanduser()
    if (directory / "config.json").is_file():
        return directory
    reason = "has no config.json" if directory.is_dir() else "is a file" if directory.exists() else "not there"
    tried.append(f"directory {directory} ({reason})")
    if HUB_ID.fullmatch(text):
        snapshot = hub_snapshot(text)
        if isinstance(snapshot, Path):
            return snapshot
        tried.append(f"hub cache {snapshot}")
    return None


def bundled_names() -> list[str]:
    """Return the names of the models that come with this installation."""
    return sorted(file.parent.name for file in bundled_model_dir("any").parent.glob("*/config.json"))
