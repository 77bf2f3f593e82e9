"""HTTP in, HTTP out: the protocols agents speak, the page and the dashboard, over one engine."""

from pelagos.serve.app import App
from pelagos.serve.ask import Card
from pelagos.serve.run import run
from pelagos.serve.settings import Settings, read_settings

__all__ = ["App", "Card", "Settings", "read_settings", "run"]
