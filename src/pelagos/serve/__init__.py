"""HTTP in, HTTP out: the OpenAI-style chat endpoint and the page, over one worker that generates."""

from pelagos.serve.app import create_app
from pelagos.serve.ask import Card
from pelagos.serve.run import run

__all__ = ["Card", "create_app", "run"]
