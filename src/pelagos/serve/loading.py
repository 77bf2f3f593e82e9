"""The model as the server sees it: loading on a thread of its own, there, or failed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from pelagos.serve.scripted import scripted_llm

if TYPE_CHECKING:
    from pelagos.engine import LLM
    from pelagos.serve.settings import Settings


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

    @property
    def status(self) -> str:
        """loading, ready or failed."""
        return "ready" if self.llm is not None else "failed" if self.done.done() else "loading"

    def close(self) -> None:
        """Wait for a load that has begun, and close the model: what still runs is cancelled."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self.llm is not None:
            self.llm.close()


def load_llm(settings: Settings) -> LLM:
    """Return the model the settings name after it has answered once, so that no client waits for what comes first.

    Raises what `LLM` raises.
    """
    from pelagos.engine import LLM, SamplingParams

    if settings.engine != "local":
        script = Path(settings.engine.removeprefix("scripted:"))
        return scripted_llm(settings.model, script, generation=settings.generation)
    llm = LLM(settings.model, **settings.engine_options)
    try:
        llm.generate("Hello", SamplingParams(max_tokens=8))
    except BaseException:
        llm.close()
        raise
    return llm
