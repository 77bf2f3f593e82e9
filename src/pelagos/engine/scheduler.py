"""Who computes what in the next step: admission, shares of prefill, pages, preemption. No tensors, no clock.

Invariants: a running request holds one slot and the pages of all positions it has computed or is about to; requests
rank by (priority, arrival), and only lower ranks give way, so the first in rank always makes progress; what a
request holds is released at once when it leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pelagos.engine.pages import PagePool
from pelagos.engine.prefix import KeyChain, Match

if TYPE_CHECKING:
    from pelagos.engine.tiers import Restore


@dataclass(eq=False, slots=True)
class Request:
    """One request's way through the engine: its tokens, how far they are computed, and what it holds.

    `tokens` is the prompt and then what was generated; `computed` counts those whose state is in the slot; below
    `frozen` the compressed entries are shared pages' and not to be written.
    """

    request_id: str
    tokens: list[int]
    prompt_tokens: int
    chain: KeyChain
    user_id: str = ""
    priority: int = 0
    arrival: int = 0
    cuts: tuple[int, ...] = ()
    reads_cache: bool = True
    computed: int = 0
    frozen: int = 0
    slot: int = -1
    home: int = 0  # the rank of its slot and pages
    pages: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    swapped_at: int = 0  # computed tokens whose state lies swapped out, 0 when none does
    moving: bool = False  # its state is being copied out or back: it takes no part in a step
    fetch: Restore | None = None  # of what lies below its pages

    @property
    def absent(self) -> bool:
        """Whether it waits for a copy, and could not start if there were room."""
        return self.moving or self.fetch is not None

    @property
    def pending(self) -> int:
        """Tokens known but not yet computed: 1 while decoding, more while the prompt (or a recomputation) runs."""
        return len(self.tokens) - self.computed

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first."""
        return -self.priority, self.arrival


class Work(NamedTuple):
    """How many tokens of a request to feed next: known ones first, then drafts."""

    request: Request
    tokens: int


class Admitted(NamedTuple):
    """A request that has just got a slot; its state comes from `match`, or from where it was swapped to."""

    request: Request
    match: Match | None


class Preempted(NamedTuple):
    """A request that had to give way, and what it held until now."""

    request: Request
    slot: int
    pages: list[int]
    computed: int


@dataclass(slots=True)
class Plan:
    """One step: restore what is admitted, then run the works as one forward."""

    works: list[Work] = field(default_factory=list)
    admitted: list[Admitted] = field(default_factory=list)
    preempted: list[Preempted] = field(default_factory=list)


class Scheduler:
    """Plans steps over a pool of pages and a number of slots."""

    def __init__(
        self, pool: PagePool, *, slots: int, page_tokens: int, chunk_tokens: int,
        match: Callable[[Request], Match | None], next_stop: Callable[[Request], int],
        save: Callable[[Preempted], bool] = lambda _: True, ranks: int = 1,
    ) -> None:  # fmt: skip
        """`match` finds a waiting request's cached prefix, or returns None while that is being fetched.

        `next_stop` says at which position after `computed` a chunk has to end because state is kept there. `save`
        copies out what a request held that gives way; False when that goes on, until `give_back`.
        """
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.leaving = 0  # copies under way after which pages or slots come free: who lacks some waits for them
        self._pool, self._page_tokens, self._chunk_tokens = pool, page_tokens, chunk_tokens
        self._match, self._next_stop, self._save = match, next_stop, save
        self._slots, self.slots_total, self._ranks = list(range(slots))[::-1], slots, ranks

    @property
    def slots_in_use(self) -> int:
        """Slots held by running requests."""
        return self.slots_total - len(self._slots)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)
        self.waiting.sort(key=lambda each: each.rank)

    def remove(self, request: Request) -> None:
        """Take a request out, waiting or running, and free what it holds; unknown ones are ignored."""
        if request in self.running:
            self.running.remove(request)
            self._free(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def plan(self) -> Plan:
        """Decide the next step. Every work's pages are there; what is preempted has left the running list."""
        plan = Plan()
        self._make_way_for_priority(plan)
        here = [each for each in self.running if not each.moving]
        decoding = sum(1 + len(each.drafts) for each in here if each.pending == 1)
        budget = max(self._chunk_tokens - decoding, min(self._page_tokens, self._chunk_tokens))
        # Prompts share the budget, those that can begin now as well: a short one does not wait for a long one's end.
        sharers = sum(each.pending > 1 for each in here) + min(len(self.waiting), len(self._slots))
        for request in sorted(here, key=lambda each: each.rank):
            if request.slot < 0:
                continue  # gave way to one before it
            if request.pending == 1:
                count = 1 + len(request.drafts)
            else:
                count = self._chunk(request, -(-budget // sharers))
                sharers -= 1
                budget -= count
            if count and self._make_room(request, count, plan):
                plan.works.append(Work(request, 1 if request.pending == 1 and not request.drafts else count))
        budget = self._admit(plan, budget)
        for at, (request, count) in enumerate(plan.works):
            more = self._chunk(request, count + budget) - count if request.pending > 1 else 0
            if more > 0 and self._grow(request, count + more):  # of what nobody took
                plan.works[at] = Work(request, count + more)
                budget -= more
        return plan

    def _chunk(self, request: Request, share: int) -> int:
        return max(0, min(request.pending, share, self._next_stop(request) - request.computed))

    def _make_room(self, request: Request, count: int, plan: Plan) -> bool:
        """Get the pages of `count` more positions, by preempting lower ranks; False when it had to go itself."""
        while not self._grow(request, count):
            if request.drafts and request.pending == 1:
                request.drafts.clear()
                count = 1
                continue
            if self.leaving:
                return False
            victim = self._lowest(request.home)
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _lowest(self, home: int | None = None) -> Request:
        found = (each for each in self.running if not each.moving and home in (None, each.home))
        return max(found, key=lambda each: each.rank)

    def _grow(self, request: Request, count: int) -> bool:
        missing = -(-(request.computed + count) // self._page_tokens) - len(request.pages)
        if missing <= 0:
            return True
        got = self._pool.alloc(missing, request.home)
        if got is None:
            return False
        request.pages += got
        return True

    def _preempt(self, request: Request, plan: Plan) -> None:
        held = Preempted(request, request.slot, list(request.pages), request.computed)
        saved = self._save(held)  # should it raise, the request still runs and frees what it holds when it is ended
        plan.preempted.append(held)
        self.running.remove(request)
        if saved:
            self._free(request)
        else:
            self.leaving += 1
            request.pages, request.slot = [], -1
        self._wait(request)

    def restart(self, request: Request) -> None:
        """Have a request whose state is lost wait for its turn to be computed again, if it runs."""
        if request in self.running:
            self.remove(request)
            self._wait(request)

    def _wait(self, request: Request) -> None:
        request.computed = 0  # frozen stays: what is swapped back still has those entries
        request.drafts.clear()
        self.add(request)

    def give_back(self, held: Preempted) -> None:
        """Free what a request held that has been saved meanwhile."""
        self.leaving -= 1
        self._release(held.slot, held.pages)

    def _free(self, request: Request) -> None:
        self._release(request.slot, request.pages)
        request.pages, request.slot = [], -1

    def _release(self, slot: int, pages: list[int]) -> None:
        self._pool.release(pages[::-1])  # a chain's last page goes first: a child is useless without parents
        self._slots.append(slot)

    def _make_way_for_priority(self, plan: Plan) -> None:
        """Let in the first waiting request that can start, if all slots are taken and one of lower priority has one."""
        first = next((each for each in self.waiting if not each.absent), None)
        if first and not (self._slots or self.leaving) and any(not each.moving for each in self.running):
            victim = self._lowest()
            if victim.priority < first.priority:
                self._preempt(victim, plan)

    def _admit(self, plan: Plan, budget: int) -> int:
        """Start waiting requests in rank order while slots, pages and budget last, and return what is left of it.

        None overtakes for want of pages.
        """
        gone = {each.request for each in plan.preempted}
        for request in list(self.waiting):
            if not self._slots or budget <= 0:
                return budget
            if request in gone or request.moving:
                continue  # its state may not even be saved yet
            match = None
            if request.swapped_at:
                request.computed = request.swapped_at
            else:
                match = self._match(request)
                if match is None:
                    continue
                request.pages, request.computed, request.frozen = list(match.pages), match.resume, match.frozen
            homes = {slot % self._ranks for slot in self._slots}
            request.home = max(sorted(homes), key=self._pool.free_of)
            # What was swapped out keeps its frozen: its entries come back with it.
            count = self._chunk(request, budget) if request.pending > 1 else 1
            if not self._grow(request, count):
                self._pool.release(request.pages[::-1])
                request.pages, request.computed = [], 0
                return budget
            at = max(at for at, slot in enumerate(self._slots) if slot % self._ranks == request.home)
            request.slot = self._slots.pop(at)
            self.waiting.remove(request)
            self.running.append(request)
            plan.admitted.append(Admitted(request, match))
            plan.works.append(Work(request, count))
            budget -= count
        return budget
