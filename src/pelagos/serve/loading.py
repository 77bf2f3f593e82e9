"""The model as the server sees it: loading on a thread of its own, there, or failed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pelagos.engine import LLM


class Loading:
    """Runs `load` at once; the event loop stays free, so `/health` answers meanwhile."""

    def __init__(self, load: Callable[[], LLM]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loading")
        self.done = self._thread.submit(load)

    @property
    def llm(self) -> LLM | None:
        """The model once it is loaded; None before that and after a failed load."""
        if self.done.done() and not self.done.cancelled() and self.done.exception() is None:
            return self.done.result()
        return None

    def close(self) -> None:
        """Wait for a load that has begun, and close the model: what still runs is cancelled."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self.llm is not None:
            self.llm.close()
