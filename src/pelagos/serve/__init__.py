"""HTTP in, HTTP out: the protocols agents speak, the page and the dashboard, over one engine."""

from pelagos.serve.app import create_app
from pelagos.serve.ask import Card
from pelagos.serve.run import run
from pelagos.serve.settings import Settings, read_settings

__all__ = ["Card", "Settings", "create_app", "read_settings", "run"]
