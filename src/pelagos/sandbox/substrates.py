"""The substrates that exist, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pelagos.errors import SandboxError
from pelagos.sandbox.api import Spec, Substrate
from pelagos.sandbox.container import Container
from pelagos.sandbox.function import Function

# Each takes (the sandbox's directory, the directory of layers, spec).
SUBSTRATES: dict[str, Callable[[Path, Path, Spec], Substrate]] = {"container": Container, "function": Function}


def make(box: Path, layers: Path, spec: Spec) -> Substrate:
    """Return the substrate of a spec, not yet started, once it has every flag the spec requires."""
    if spec.substrate not in SUBSTRATES:
        raise SandboxError(f"substrate {spec.substrate!r}: expected one of {', '.join(SUBSTRATES)}")
    substrate = SUBSTRATES[spec.substrate](box, layers, spec)
    try:
        substrate.capabilities.check(spec.require)
    except SandboxError:
        substrate.stop()
        raise
    return substrate
