"""Agent sandbox: isolate commands on the host's own kernel, and log every one of them. See `docs/sandbox.md`.

Importing the package loads nothing: keepers are forked from a process that must stay small.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pelagos.sandbox.api import Capabilities, ExecResult, FileInfo, Limits
    from pelagos.sandbox.layers import Image, Store
    from pelagos.sandbox.sdk import AsyncSandbox, Sandbox, replay

_ROOMS = {
    "Capabilities": "api", "ExecResult": "api", "FileInfo": "api", "Limits": "api", "Image": "layers",
    "Store": "layers", "AsyncSandbox": "sdk", "Sandbox": "sdk", "replay": "sdk",
}  # fmt: skip
__all__ = ["AsyncSandbox", "Capabilities", "ExecResult", "FileInfo", "Image", "Limits", "Sandbox", "Store", "replay"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"pelagos.sandbox.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'pelagos.sandbox' has no attribute {name!r}")
