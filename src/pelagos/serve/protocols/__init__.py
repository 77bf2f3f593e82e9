"""The protocols the server speaks: requests in, frames out. Each reads into one `Ask` and writes from one `Answer`."""

from pelagos.serve.ask import Api
from pelagos.serve.protocols.chat import Chat

APIS: tuple[Api, ...] = (Chat(),)
