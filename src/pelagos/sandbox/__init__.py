"""Agent sandbox: isolate commands on the host's own kernel, and log every one of them. See `docs/sandbox.md`."""

from pelagos.sandbox.api import Capabilities, ExecResult, FileInfo, Limits
from pelagos.sandbox.layers import Image, Store
from pelagos.sandbox.sdk import AsyncSandbox, Sandbox, replay

__all__ = [
    "AsyncSandbox", "Capabilities", "ExecResult", "FileInfo", "Image", "Limits", "Sandbox", "Store", "replay",
]  # fmt: skip
