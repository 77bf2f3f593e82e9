"""Which commit a figure was measured at."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """Return the short hash of the checkout this package lies in; None outside of one, or without git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except OSError:
        return None
