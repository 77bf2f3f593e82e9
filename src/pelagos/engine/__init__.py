"""Generation: sampling parameters, the sampler, and `LLM`, which turns prompts into completions."""

from pelagos.engine.llm import LLM, Completion, Step
from pelagos.engine.sampler import Sampler, SamplingParams

__all__ = ["LLM", "Completion", "Sampler", "SamplingParams", "Step"]
