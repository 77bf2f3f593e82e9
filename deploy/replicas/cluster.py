"""What runs under Ray Serve: a replica (one engine and the ASGI application), and the router that picks one.

Ray Serve owns the processes, their health and their restarts. The front calls `Replica.answer` through a handle, and
`PrefixRouter` chooses, in the front's process, by what each replica has been sent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

from deploy.replicas.affinity import Map, Point, choose
from ray import serve
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from pelagos.errors import PelagosError
from pelagos.serve import App, Settings
from pelagos.serve.keys import KeyFile
from pelagos.serve.metrics import logging_to_stderr
from pelagos.serve.run import load_llm

APP, DEPLOYMENT = "pelagos", "engine"
PATIENCE_S = 5.0  # that an answer nobody waits for any more has to end
START_TRIES = 5  # of a replica that does not come up


class Part(NamedTuple):
    """A part of a response; the first has its status and headers."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    more: bool  # whether others follow


@dataclasses.dataclass(slots=True, eq=False, weakref_slot=True)
class Route:
    """What the front knows of a request, for the router; what the router did, for the front. None of it travels."""

    points: tuple[Point, ...] = ()
    why: str = ""
    reach: int = 0
    replica: str = ""
    entries: int = 0
    is_over: bool = False

    @property
    def size(self) -> int:
        """Bytes of the conversation."""
        return self.points[-1].reach if self.points else 0

    def __reduce__(self) -> tuple[type[Route], tuple[()]]:
        return Route, ()


class PrefixRouter(RequestRouter):
    """Picks the replica that knows most of a conversation, and sheds to others what it has no room for.

    Loads are counted here, in requests that are not over: Ray Serve's cached queue lengths lag behind, and expire. What
    they are for, to pass over a full replica, is left to it. Lives in one event loop.
    """

    def initialize_state(self, *, busy: int, entries: int, **_: Any) -> None:
        """`busy` requests are computed side by side; `entries` points of conversations are remembered."""
        self._busy = busy
        self._map: Map[ReplicaID] = Map(entries)
        self._sent: dict[ReplicaID, WeakSet[Route]] = {}  # what each replica works on; the last chosen comes last

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter.choose_replicas`: ranks of one replica each, so that a full one is passed over."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # before asking again, when all are full
        route = pending_request.kwargs.get("route") or Route()
        there = {replica.replica_id: replica for replica in candidate_replicas}
        loads = {each: 0 for each in there if each not in self._sent} | {
            each: sum(not other.is_over for other in sent if other is not route)
            for each, sent in self._sent.items()
            if each in there
        }
        known = {replica: each for replica, each in self._map.find(route.points).items() if replica in loads}
        choice = choose(known, loads, route.size, self._busy)
        # Noted at once: what begins alike and comes at the same time goes to the same replica.
        self._note(route, choice.order[0])
        route.why, route.reach = choice.why, choice.reach
        return [[there[replica_id]] for replica_id in choice.order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Note where a request went in the end."""
        if (route := pending_request.kwargs.get("route")) is not None and route.replica != replica_id.unique_id:
            route.why, route.reach = "shed", 0
            self._note(route, replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica that died."""
        super().on_replica_actor_died(replica_id)
        self._forget(replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget the replicas that are no longer there."""
        gone = set(self.curr_replicas) - {replica.replica_id for replica in replicas}
        super().update_replicas(replicas)
        for replica_id in gone:
            self._forget(replica_id)

    def _note(self, route: Route, replica_id: ReplicaID) -> None:
        for sent in self._sent.values():
            sent.discard(route)
        ours = self._sent[replica_id] = self._sent.pop(replica_id, WeakSet())
        ours.add(route)
        self._map.learn(route.points, replica_id)
        route.replica, route.entries = replica_id.unique_id, len(self._map)

    def _forget(self, replica_id: ReplicaID) -> None:
        self._map.forget(replica_id)
        self._sent.pop(replica_id, None)


class Replica:
    """One engine and the server's application over it, without a socket."""

    def __init__(self, settings: Settings, keys: KeyFile, turns: Path) -> None:
        """Load the model; raises what that raises. In `turns`, or in `disk_dir`, turns are kept for all replicas."""
        self._open = ExitStack()
        self._open.enter_context(logging_to_stderr(settings.log_level))
        self._name = serve.get_replica_context().replica_tag
        shared = dataclasses.replace(settings, disk_dir=settings.disk_dir or turns)
        self._app = App(lambda: load_llm(settings), settings=shared, keys=keys)
        self._app.loading.result()

    async def answer(self, scope: dict[str, Any], body: bytes, route: Route) -> AsyncIterator[Part]:
        """Yield the response to a request as it comes; what is there is sent at once."""
        parts: asyncio.Queue[Part | None] = asyncio.Queue()
        gone = asyncio.Event()
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if asked:
                return asked.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            more = message["type"] == "http.response.start" or message.get("more_body", False)
            parts.put_nowait(Part(message.get("status", 0), headers, message.get("body", b""), more))

        task = asyncio.ensure_future(self._app(scope, receive, send))
        task.add_done_callback(lambda _: parts.put_nowait(None))
        try:
            while (part := await parts.get()) is not None:
                while part.more and not parts.empty():  # what has come since goes with it
                    if (after := parts.get_nowait()) is None:
                        parts.put_nowait(None)
                        break
                    part = part._replace(body=part.body + after.body, more=after.more)
                yield part
            await task
        finally:
            gone.set()
            await asyncio.wait({task}, timeout=PATIENCE_S)
            task.cancel()

    async def report(self) -> dict[str, Any]:
        """Say what this replica is and counts."""
        app = self._app
        in_flight = app.traffic.in_flight
        return {
            "replica": self._name, "pid": os.getpid(), "state": app.status,
            "context_length": app.card.context_length, "stats": app.metrics.report(in_flight),
            "metrics": app.metrics.text(in_flight),
        }  # fmt: skip

    def check_health(self) -> None:
        """Raise once the engine has failed, so that Ray Serve starts another replica."""
        if self._app.llm is None:
            raise PelagosError("the engine is gone")
        self._app.llm.stats()

    async def __del__(self) -> None:
        """Close the engine and the files; Ray Serve awaits this once nothing runs here any more."""

        async def receive() -> dict[str, Any]:
            return {}

        async def send(_: Any) -> None:
            pass

        await self._app({"type": "lifespan"}, receive, send)
        self._open.close()


def deployment(
    settings: Settings, keys: KeyFile, turns: Path, *, replicas: int, cpus: float, gpus: float, entries: int
) -> serve.Application:
    """Return the application to run: so many replicas, each with so many processors and GPUs of its own."""
    router = {
        "request_router_class": PrefixRouter,
        "request_router_kwargs": {"busy": settings.max_requests, "entries": entries},
    }
    kind: Any = serve.deployment(
        Replica, name=DEPLOYMENT, num_replicas=replicas, ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # The application itself refuses what is too much, in the words of the protocol.
        max_ongoing_requests=settings.max_requests + settings.max_queued, max_queued_requests=-1,
        request_router_config=router, health_check_period_s=1.0, health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=settings.drain_s, graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=START_TRIES, logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )  # fmt: skip
    return kind.bind(settings, keys, turns)
