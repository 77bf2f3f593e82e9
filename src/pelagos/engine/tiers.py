"""Host memory behind the pools: pages before they are evicted, sequences that gave way, and what the disk reads into.

Copies run on a thread and streams of their own in each direction, states apart from pages. A step waits for none, but
where it keeps a state while `ROWS` are on their way out: then for one of those. Until a copy is over what it reads and
writes is held: pages by references, host blocks likewise; then `poll` says so to whoever started it, and what went
wrong. On a CPU the pools are host memory already: without blocks (tests have some) states are packed and the disk reads
and writes in place, at once.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pelagos.engine.disk import DiskCache, Ticket
from pelagos.engine.memory import EMPTY_BLOCK
from pelagos.engine.pages import PagePool
from pelagos.engine.runner import Pools
from pelagos.kernels.layout import Bytes, CacheLayout

CHUNK_BYTES = 8 << 20  # of a staging buffer, and between two looks whether a copy was given up
DIRECT_BYTES = 256 << 10  # from here on a run is copied without staging: copies so long take no kernel's time
CLEAN_BYTES, CLEAN_SCAN = 64 << 20, 1024  # copied out at once, and of how many pages, the coldest first
ROWS = 4  # states on their way out at once
Over = Callable[[BaseException | None], None]  # hears that a copy is over, and what went wrong


def staging_bytes(layout: CacheLayout) -> int:
    """Bytes of the device that copies are gathered in."""
    return 4 * _at_once(layout.page_bytes) * layout.page_bytes + ROWS * (layout.slot_bytes + layout.page_bytes)


def _at_once(page_bytes: int) -> int:
    return max(1, CHUNK_BYTES // (page_bytes or EMPTY_BLOCK))


def pinned(rows: int, width: int, device: torch.device) -> Tensor:
    """Return (rows, width) uint8 of the host, locked for copies of a CUDA device as long as this tensor itself lives.

    Of exactly these bytes; the library's own allocator takes the next power of two.
    """
    taken = mmap.mmap(-1, max(1, rows * width), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(taken, dtype=torch.uint8)[: rows * width].view(rows, width)
    if device.type == "cuda" and memory.numel():
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory


class Copy:
    """A copy under way."""

    future: Future[Any]
    cancelled = False

    @property
    def error(self) -> BaseException | None:
        """Why it failed, once it is over."""
        return CancelledError() if self.future.cancelled() else self.future.exception()

    def stop(self) -> None:
        """End it early, and wait for that: a moment."""
        self.cancelled = True
        if not self.future.cancel():
            wait([self.future])


class Parked(NamedTuple):
    """A sequence in host memory: the blocks of its pages, and those of its slot; full when `copy` is over."""

    pages: list[int]
    slot: list[int]
    copy: Copy


@dataclass(eq=False)
class Restore:
    """Pages and a state on their way up from host blocks or the disk."""

    keys: Sequence[bytes]
    pages: Sequence[int]
    blocks: list[int]
    new: Sequence[int]  # places of those that the disk fills
    then: Callable[[int, memoryview | None], None]
    ticket: Ticket | None = None
    copy: Copy | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """Give up what has not come yet; `then` is called soon."""
        self.cancelled = True
        if self.ticket is not None:
            self.ticket.cancel()
        if self.copy is not None:
            self.copy.cancelled = True


class Lane:
    """Copies in one direction, in order: a thread and, on CUDA, two streams, each with a buffer of `most` pages."""

    def __init__(self, name: str, pages: Tensor, most: int) -> None:
        self.most, self._device, self.failed = most, pages.device, 0
        self._thread = ThreadPoolExecutor(1, f"pelagos-{name}")
        self._staging = pages.new_empty((2, most, pages.shape[1]))
        first = -int(pages.shape[1] < DIRECT_BYTES)  # kernels that gather go before a step's, mere copies do not
        self._streams = [torch.cuda.Stream(pages.device, priority=first) for _ in range(2)] if pages.is_cuda else []

    def start(self, job: Callable[[Copy], Any]) -> Copy:
        """Run a job on the thread, behind what the current stream has been given so far."""
        copy = Copy()
        after = torch.cuda.current_stream(self._device).record_event() if self._streams else None
        copy.future = self._thread.submit(self._run, job, copy, after)
        return copy

    def _run(self, job: Callable[[Copy], Any], copy: Copy, after: Any) -> Any:
        with torch.inference_mode():
            for stream in self._streams:
                stream.wait_event(after)
            try:
                return job(copy)
            except Exception:
                self.failed += 1
                raise
            finally:
                self.wait()

    @contextlib.contextmanager
    def turn(self, number: int = 0, *, paced: bool = False) -> Iterator[Tensor]:
        """Let copies go to one of the streams in turn, `paced` when its last ones are over; yields its buffer."""
        if paced and self._streams:  # a step's own copies then wait for two of these at most
            self._streams[number % 2].synchronize()
        with torch.cuda.stream(self._streams[number % 2]) if self._streams else contextlib.nullcontext():
            yield self._staging[number % 2]

    def wait(self) -> None:
        """Wait on the thread for the copies so far."""
        for stream in self._streams:
            stream.synchronize()

    def close(self) -> None:
        """End the thread when its jobs are over."""
        self._thread.shutdown()


class Tiers:
    """Host blocks behind the pools, the disk behind those: an index for `PrefixCache.match`, and all copies between.

    All methods are the engine thread's. What is to be done when a copy is over, `then`, happens in `poll`.
    """

    disk: DiskCache | None = None

    def __init__(self, pools: Pools, blocks: int) -> None:
        layout = pools.layout
        self.index = PagePool(blocks)
        self._in_place = pools.on_cpu and not blocks
        self.copied_in = self.copied_out = 0  # pages
        self.pools, self._layout = pools, layout
        self._blocks = pinned(blocks, layout.page_bytes or EMPTY_BLOCK, pools.pages.device)
        self._content, most = self._blocks.numpy(), _at_once(layout.page_bytes) if blocks else 0
        self._out, self._in = (Lane(name, pools.pages, most) for name in ("tier-out", "tier-in"))
        self._states_out = Lane("states-out", pools.pages, 0)
        rows, self._spare = layout.slot_bytes + layout.page_bytes, list(range(ROWS if blocks else 0))
        self._rows = pools.pages.new_empty((len(self._spare), rows))
        self._states = pinned(2 if blocks else 0, rows, pools.pages.device)  # one on its way out, one on its way in
        self._under_way: list[tuple[Copy, Over]] = []
        self._restores: list[Restore] = []
        self._clean: tuple[int, ...] | None = None  # what the pools looked like when nothing was left to clean
        self._cleaning = False

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._under_way or self._restores)

    def poll(self) -> None:
        """Take note of what is over."""
        for restore in [each for each in self._restores if each.ticket is None or each.ticket.done()]:
            self._restores.remove(restore)
            self._copy_restored(restore)
        for each in [each for each in self._under_way if each[0].future.done()]:
            self._under_way.remove(each)
            each[1](each[0].error)

    def drain(self) -> None:
        """Wait for all that is under way."""
        while self.busy:
            for restore in self._restores:
                if restore.ticket is not None:
                    restore.ticket.wait()
            wait([copy.future for copy, _ in self._under_way])
            self.poll()

    def close(self) -> None:
        """Wait, then end the threads."""
        self.drain()
        for lane in (self._out, self._in, self._states_out):
            lane.close()

    def stats(self) -> dict[str, int]:
        """Host blocks there are, in use, cached and evicted, pages copied in and out, and copies that failed."""
        index = self.index
        return {"blocks": index.count, "in_use": index.in_use, "cached": index.cached, "evicted": index.evictions,
                "copied_in": self.copied_in, "copied_out": self.copied_out,
                "failed": self._in.failed + self._out.failed + self._states_out.failed}  # fmt: skip

    # What a prompt can start from, by the index of the tiers alone.

    @property
    def has_any(self) -> bool:
        """Whether there is a tier below the pools."""
        return self.index.count > 0 or self.disk is not None

    def known_pages(self, user: str, keys: Sequence[bytes]) -> int:
        """How many of the keys, from the first on without a gap, are in host blocks or on disk."""
        at = 0
        while at < len(keys):
            if self.index.lookup(keys[at]) is not None:
                found = 1
            else:
                found = 0 if self.disk is None else self.disk.known_pages(user, keys[at:])
            if not found:
                break
            at += found
        return at

    def known_states(self, user: str, node_key: bytes) -> Sequence[tuple[int, bytes]]:
        """(tokens after the node, state key) of every state on disk; those in RAM are the prefix cache's."""
        return () if self.disk is None else self.disk.known_states(user, node_key)

    # Pages.

    def clean(self, pool: PagePool, then: Callable[[], None]) -> bool:
        """Start copying out some of the cached pages that are evicted next; whether there are any."""
        if self._cleaning or not self.index.count:
            return False
        looks = (pool.evictions, pool.cached, self.index.evictions, self.index.cached)
        if looks == self._clean:
            return False
        scan, most = min(CLEAN_SCAN, self.index.count // 2), CLEAN_BYTES // self._blocks.shape[1]
        coldest = pool.coldest(scan)
        cold = [each for each in coldest if self.index.lookup(each[0]) is None]
        cold = cold[: max(1, min(most, pool.count // 8))][::-1]  # the first of a chain are the last to go
        blocks, _ = self._take([key for key, _ in cold])
        cold = cold[: len(blocks)]
        if not cold:
            self._clean = looks
            return False
        keys, pages = [key for key, _ in cold], [page for _, page in cold]

        def over(_: BaseException | None) -> None:
            self._cleaning = False
            # Holding them made them the last used; those that somebody used meanwhile are.
            pool.demote([key for (key, page), use in zip(coldest, uses, strict=True) if pool.uses[page] == use][::-1])
            then()

        self._cleaning = True
        self._copy_out(pool, keys, pages, blocks, over)
        uses = [pool.uses[page] for _, page in coldest]
        return True

    def write(self, pool: PagePool, user: str, items: Sequence[tuple[bytes, int]], first: int) -> None:
        """Copy (key, page) of completed pages out, and have the disk write them; `first` as `DiskCache.write_pages`.

        Pages that there are no blocks for follow when the others are out.
        """
        disk = self.disk
        assert disk is not None
        if self._in_place:
            return disk.write_pages(user, [(key, self.pools.page_bytes[page].data) for key, page in items], first=first)
        blocks, _ = self._take([key for key, _ in items])
        if not blocks:
            disk.drop(len(items))
            return
        keys, pages = [key for key, _ in items[: len(blocks)]], [page for _, page in items[: len(blocks)]]
        rest = items[len(blocks) :]
        held = [page for _, page in rest]

        def behind() -> None:
            content = [(key, self._content[block].data) for key, block in zip(keys, blocks, strict=True)]
            disk.write_pages(user, content, first=first)

        def over(error: BaseException | None) -> None:
            if error is not None:
                disk.drop(len(keys))
            if rest:
                self.write(pool, user, rest, first + len(keys))
                pool.release(held[::-1])

        pool.share(held)
        self._copy_out(pool, keys, pages, blocks, over, behind)

    def read(
        self, user: str, keys: Sequence[bytes], state_key: bytes | None, pages: Sequence[int],
        then: Callable[[int, memoryview | None], None],
    ) -> Restore:  # fmt: skip
        """Start bringing leading pages of a chain into `pages`, and a state of the disk.

        `then` gets how many pages have come, and the state where it was asked for and is whole.
        """
        taken = ([], range(len(keys))) if self._in_place else self._take(keys)
        restore = Restore(keys, pages, *taken, then)
        if self.disk is not None and (restore.new or state_key is not None):
            into = [self._row(restore, at).data for at in restore.new]
            restore.ticket = self.disk.read(user, [keys[at] for at in restore.new], state_key, into=into)
        if restore.ticket is None and not self._in_place:
            self._copy_restored(restore)
        else:
            self._restores.append(restore)
        return restore

    def _row(self, restore: Restore, at: int) -> Bytes:
        """Where the disk puts a page."""
        return self.pools.page_bytes[restore.pages[at]] if self._in_place else self._content[restore.blocks[at]]

    def _copy_restored(self, restore: Restore) -> None:
        """Copy what is in host blocks now up into the pages."""
        ticket, blocks = restore.ticket, restore.blocks
        read, state = (0, None) if ticket is None else (len(ticket.pages), ticket.state)
        if self._in_place:
            return restore.then(read, state)
        count = 0 if restore.cancelled else [*restore.new, len(blocks)][read]

        def over(error: BaseException | None) -> None:
            came = 0 if error or restore.copy is None else restore.copy.future.result()
            self.copied_in += came
            restore.then(came, state)
            for at in restore.new[:read]:
                self.index.register(blocks[at], restore.keys[at])
            self.index.release(blocks[::-1])

        given = restore.pages[:count], blocks[:count]
        restore.copy = self._start(self._in, lambda copy: self._move(self._in, copy, *given), over)

    def _take(self, keys: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Hold a block for each key as far as there is room; which of them do not hold its content yet."""
        new: list[int] = []
        blocks = list(iter(map(self.index.lookup, keys).__next__, None))  # up to the first that is missing
        self.index.share(blocks)  # all at once: steps wait for this
        for at, key in enumerate(keys[len(blocks) :], len(blocks)):
            block = self.index.lookup(key)
            if block is not None:
                self.index.share([block])
            elif (got := self.index.alloc(1)) is not None:
                [block] = got
                new.append(at)
            else:
                break
            blocks.append(block)
        return blocks, new

    def _copy_out(
        self, pool: PagePool, keys: list[bytes], pages: list[int], blocks: list[int], then: Over,
        behind: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Copy pages into blocks that are held; `behind` is called on the lane's thread."""
        pool.share(pages)

        def job(copy: Copy) -> None:
            self._move(self._out, copy, pages, blocks)
            if behind is not None:
                self._out.wait()
                behind()

        def over(error: BaseException | None) -> None:
            if error is None:
                self.copied_out += len(pages)
                for key, block in zip(keys, blocks, strict=True):
                    self.index.register(block, key)
            self.index.release(blocks[::-1])
            pool.release(pages[::-1])
            then(error)

        self._start(self._out, job, over)

    def _move(self, lane: Lane, copy: Copy, pages: Sequence[int], blocks: Sequence[int]) -> int:
        """Copy pages out to blocks or in from them, on the lane's thread; return how many, all unless it is stopped."""
        pool, size, out = self.pools.pages, self._layout.page_bytes, lane is self._out
        direct = size >= DIRECT_BYTES or len(pages) * size >= DIRECT_BYTES * sum(1 for _ in _runs(pages, blocks))
        with lane.turn():
            index = None if direct else torch.tensor(pages, dtype=torch.int64).to(pool.device)
        for turn, at in enumerate(range(0, len(pages), lane.most)):
            if copy.cancelled:
                return at
            here, there = pages[at : at + lane.most], blocks[at : at + lane.most]
            with lane.turn(turn, paced=direct) as staging:
                if out and index is not None:
                    torch.index_select(_words(pool), 0, index[at : at + lane.most], out=_words(staging[: len(here)]))
                for place, count in _runs(here, there) if direct else _runs(there):
                    host = self._blocks[there[place] : there[place] + count, :size]
                    begin = here[place] if direct else place
                    device = (pool if direct else staging)[begin : begin + count]
                    (host if out else device).copy_(device if out else host, non_blocking=True)
                if not out and index is not None:
                    _words(pool).index_copy_(0, index[at : at + lane.most], _words(staging[: len(here)]))
        return len(pages)

    # Whole sequences, and states.

    def park(self, slot: int, pages: Sequence[int], then: Over) -> Parked | None:
        """Start copying a sequence out; None where host memory has no room."""
        slots = -(-self._layout.slot_bytes // self._blocks.shape[1])
        blocks = self.index.alloc(len(pages) + slots)
        if blocks is None:
            return None
        blocks.sort()
        ours, rest = blocks[: len(pages)], blocks[len(pages) :]

        def job(copy: Copy) -> None:
            self._move(self._out, copy, pages, ours)
            with self._out.turn():
                for host, part in self._slot_parts(rest, slot):
                    host.copy_(part, non_blocking=True)

        return Parked(ours, rest, self._start(self._out, job, then))

    def unpark(self, parked: Parked, slot: int, pages: Sequence[int], then: Over) -> Copy:
        """Start copying a sequence back, into any slot and pages."""

        def job(copy: Copy) -> None:
            self._move(self._in, copy, pages[: len(parked.pages)], parked.pages)
            with self._in.turn():
                for host, part in self._slot_parts(parked.slot, slot):
                    part.copy_(host, non_blocking=True)

        return self._start(self._in, job, then)

    def drop(self, parked: Parked) -> None:
        """Free the host's blocks of a sequence, when nothing is copied into them any more."""
        self._under_way.append((parked.copy, lambda _: self.index.release([*parked.pages, *parked.slot])))

    def _slot_parts(self, blocks: Sequence[int], slot: int) -> Iterator[tuple[Tensor, Tensor]]:
        row, width = self.pools.slots[slot], self._blocks.shape[1]
        for place, count in _runs(blocks):
            part = row[place * width : (place + count) * width]
            yield self._blocks[blocks[place] : blocks[place] + count].view(-1)[: len(part)], part

    def _start(self, lane: Lane, job: Callable[[Copy], Any], then: Over) -> Copy:
        copy = lane.start(job)
        self._under_way.append((copy, then))
        return copy

    def pack(
        self, slot: int, page: int | None, position: int, behind: Callable[[Bytes], None],
        then: Callable[[Bytes | None], None],
    ) -> None:  # fmt: skip
        """Copy out the state of the sequence in `slot` as it is now; `behind` gets it on the lane's thread.

        `then` gets None where that failed.
        """
        if self._in_place:
            open_page = None if page is None else self.pools.page_bytes[page]
            try:
                packed = self._layout.pack_state(self.pools.slot_bytes[slot], open_page, position)
            except Exception:
                then(None)
                raise
            then(packed)
            return behind(packed)
        while not self._spare:
            wait([copy.future for copy, _ in self._under_way], return_when="FIRST_COMPLETED")
            self.poll()
        at, size, lane = self._spare.pop(), self._layout.slot_bytes, self._states_out
        row = self._rows[at]
        row[:size].copy_(self.pools.slots[slot])
        if page is not None:
            row[size:].copy_(self.pools.pages[page])

        def job(_: Copy) -> Bytes:
            with lane.turn():
                self._states[0].copy_(row, non_blocking=True)
            lane.wait()
            host = self._states[0].numpy()
            packed = self._layout.pack_state(host[:size], None if page is None else host[size:], position)
            behind(packed)
            return packed

        def over(error: BaseException | None) -> None:
            self._spare.append(at)
            then(None if error else copy.future.result())

        copy = self._start(lane, job, over)

    def unpack(self, packed: Bytes, slot: int, page: int | None, position: int, then: Over) -> Copy | None:
        """Start putting a packed state into a slot, its open page only into `page`; None when that is done."""
        layout, pools = self._layout, self.pools
        if self._in_place:
            open_page = np.empty(layout.page_bytes, np.uint8) if page is None else pools.page_bytes[page]
            layout.unpack_state(packed, pools.slot_bytes[slot], open_page, position)
            return then(None)

        def job(_: Copy) -> None:
            host, size = self._states[1], layout.slot_bytes
            layout.unpack_state(packed, host[:size].numpy(), host[size:].numpy(), position)
            with self._in.turn():
                pools.slots[slot].copy_(host[:size], non_blocking=True)
                if page is not None and position % layout.page_tokens:
                    pools.pages[page].copy_(host[size:], non_blocking=True)

        return self._start(self._in, job, then)


def _runs(*ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(place, count) of the longest runs over which each of the sequences counts up by one."""
    begin = 0
    for at in range(1, len(ids[0]) + 1):
        if at == len(ids[0]) or any(each[at] != each[at - 1] + 1 for each in ids):
            yield begin, at - begin
            begin = at


def _words(rows: Tensor) -> Tensor:
    """The same bytes as the widest words they divide into."""
    widest = next(each for each in (torch.int64, torch.int32, torch.uint8) if rows.shape[1] % each.itemsize == 0)
    return rows.view(widest)
