"""Generation: the engine's interface, the local engine, sampling, and `LLM`, which ties them to a tokenizer."""

from pelagos.engine.api import Engine, EngineStats, Step, Stream
from pelagos.engine.build import EngineOptions, build_engine
from pelagos.engine.lines import complete_lines
from pelagos.engine.llm import LLM, Completion
from pelagos.engine.local import LocalEngine
from pelagos.engine.sampler import Sampler, SamplingParams
from pelagos.engine.turn import ChatTurn, sampling_params

__all__ = [
    "LLM", "ChatTurn", "Completion", "Engine", "EngineOptions", "EngineStats", "LocalEngine", "Sampler",
    "SamplingParams", "Step", "Stream", "build_engine", "complete_lines", "sampling_params",
]  # fmt: skip
