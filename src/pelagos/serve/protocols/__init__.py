"""The protocols the server speaks: requests in, frames out. Each reads into one `Ask` and writes from one `Answer`."""

from pelagos.serve.protocols.chat import Chat
from pelagos.serve.protocols.completions import Completions
from pelagos.serve.protocols.messages import Messages
from pelagos.serve.protocols.responses import Responses
from pelagos.serve.protocols.wire import Api

APIS: tuple[Api, ...] = (Chat(), Completions(), Responses(), Messages())
