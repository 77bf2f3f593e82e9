"""A small coding agent: a model behind any OpenAI-compatible server, two tools, and a sandbox to use them in."""

from pelagos.agent.loop import TOOLS, Agent, Outcome, replay
from pelagos.agent.model import Model

__all__ = ["TOOLS", "Agent", "Model", "Outcome", "replay"]
