"""Threads that follow turns: one loads the model, then each running turn has one that reads its events.

The event loop stays free, so `/health` answers while turns run; a turn whose reader left is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pelagos.chat.parser import Event
    from pelagos.engine import LLM, ChatTurn


TURNS = 64  # followed at once; the engine decides how many of them compute


class Worker:
    """Runs `load` and then turns, side by side; those beyond TURNS wait."""

    def __init__(self, load: Callable[[], LLM]) -> None:
        self._threads = ThreadPoolExecutor(TURNS, thread_name_prefix="turn")
        self._turns: set[ChatTurn] = set()
        self.loading = self._threads.submit(load)

    @property
    def llm(self) -> LLM | None:
        """The model once it is loaded; None before that and after a failed load."""
        if self.loading.done() and not self.loading.cancelled() and self.loading.exception() is None:
            return self.loading.result()
        return None

    async def events(self, turn: ChatTurn, *, keep_alive: float) -> AsyncIterator[Event | None]:
        """Run a turn and yield its events, and None after every `keep_alive` seconds of silence.

        Leaving the iteration early cancels the turn; an error of the turn is raised here.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[Event | None, BaseException | None]] = asyncio.Queue()

        def post(event: Event | None, error: BaseException | None = None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(queue.put_nowait, (event, error))

        def produce() -> None:
            try:
                for event in turn:
                    post(event)
            except BaseException as error:
                post(None, error)
            else:
                post(None)

        self._turns.add(turn)
        job = self._threads.submit(produce)
        try:
            while True:
                try:
                    async with asyncio.timeout(keep_alive):
                        event, error = await queue.get()
                except TimeoutError:
                    yield None
                    continue
                if error is not None:
                    raise error
                if event is None:
                    return
                yield event
        finally:
            turn.cancel.set()
            job.cancel()
            self._turns.discard(turn)

    def close(self) -> None:
        """Cancel what runs or waits, end the threads and the engine."""
        for turn in list(self._turns):
            turn.cancel.set()
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self.llm is not None:
            self.llm.close()
