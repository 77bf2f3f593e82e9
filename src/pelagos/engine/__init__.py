"""Generation: the engine's interface, the local engine, sampling, and `LLM`, which ties them to a tokenizer.

Names are fetched from their modules on first use, so that what needs no tensors loads none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pelagos.engine.api import Engine as Engine
    from pelagos.engine.api import EngineOptions as EngineOptions
    from pelagos.engine.api import EngineStats as EngineStats
    from pelagos.engine.api import Step as Step
    from pelagos.engine.api import Stream as Stream
    from pelagos.engine.build import build_engine as build_engine
    from pelagos.engine.llm import LLM as LLM
    from pelagos.engine.llm import Completion as Completion
    from pelagos.engine.local import LocalEngine as LocalEngine
    from pelagos.engine.sampler import Sampler as Sampler
    from pelagos.engine.sampler import SamplingParams as SamplingParams
    from pelagos.engine.turn import ChatTurn as ChatTurn
    from pelagos.engine.turn import sampling_params as sampling_params

_MODULES = {
    "api": ("Engine", "EngineOptions", "EngineStats", "Step", "Stream"),
    "build": ("build_engine",),
    "llm": ("LLM", "Completion"),
    "local": ("LocalEngine",),
    "sampler": ("Sampler", "SamplingParams"),
    "turn": ("ChatTurn", "sampling_params"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
