"""Generation: sampling parameters, the sampler, and `LLM`, which turns prompts into completions and chat turns."""

from pelagos.engine.lines import complete_lines
from pelagos.engine.llm import LLM, Completion, Step
from pelagos.engine.sampler import Sampler, SamplingParams
from pelagos.engine.turn import ChatTurn, sampling_params

__all__ = ["LLM", "ChatTurn", "Completion", "Sampler", "SamplingParams", "Step", "complete_lines", "sampling_params"]
