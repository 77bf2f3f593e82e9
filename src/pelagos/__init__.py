"""Pelagos: the DeepSeek-V4 system in Python. See `docs/tour.md` for the way in.

Importing the package loads nothing heavy: each public name is fetched from its room on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pelagos import chat as chat
    from pelagos.config import ModelConfig as ModelConfig
    from pelagos.engine import LLM as LLM
    from pelagos.engine import Completion as Completion
    from pelagos.engine import SamplingParams as SamplingParams
    from pelagos.load import load_model as load_model
    from pelagos.model import Transformer as Transformer

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "ModelConfig", "SamplingParams", "Transformer", "chat", "load_model"]

_ROOMS = {
    "LLM": "engine",
    "Completion": "engine",
    "SamplingParams": "engine",
    "ModelConfig": "config",
    "Transformer": "model",
    "load_model": "load",
}


def __getattr__(name: str) -> Any:
    if name == "chat":
        return importlib.import_module("pelagos.chat")
    if name in _ROOMS:
        return getattr(importlib.import_module(f"pelagos.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'pelagos' has no attribute {name!r}")
