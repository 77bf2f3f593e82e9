"""Prefix-cache hits on a replayed multi-turn, multi-user trace, beside what any eviction policy could attain.

python -m benchmarks.trace --data FOLDER [--seeds 0 1 2] [--percent 25] [--people 90] [--hours 8] [--json FILE]

No model runs: pages are ids, states are sized dummies taken where the cache's own policy takes them; text comes from
the gzip JSON lines in FOLDER. The trace is drawn first and knows nothing of the cache; `Habits` says how people act.
The pool has a percentage of the trace's distinct pages, states a third of the pool's bytes, as the memory plan has it.

The bound. Call a page held while a running request uses it, and idle between two such times. A page that a prompt
finds at the end of an idle time was in the pool all through it (nothing but computing it again brings it back, and
computing is a miss), so every hit on a page nobody holds is an idle time kept whole, and at no event do pages held
and idle pages kept exceed the pool. The most idle times that can be kept is found greedily: sweep the events in time,
and where too many overlap drop the one that ends last. That is Belady's rule with bypass, exact for pages of one size
under a varying bound. It ignores that a page is found only when all before it are, so it bounds every policy.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pelagos.chat import Tokenizer
from pelagos.config import preset
from pelagos.engine.pages import PagePool
from pelagos.engine.prefix import KeyChain, Match, PrefixCache
from pelagos.evals.commit import commit
from pelagos.kernels.layout import CacheLayout

BEGIN, END, USER, ASSISTANT, THINK = 0, 1, 2, 3, 4  # stand-ins for the protocol's tokens; text ids start above them
TEXT_FROM = 8


@dataclass(frozen=True, slots=True)
class Habits:
    """How the people of the trace act: medians and sigmas are of lognormals, tokens or seconds; the rest are odds."""

    accounts: int = 12  # each one a user_id: nothing is shared between them
    system_prompts: int = 3  # of an account
    system_tokens: tuple[float, float] = (900, 0.8)
    turns: float = 4.0  # of a visit, mean of a geometric
    think_s: tuple[float, float] = (40, 1.0)  # between an answer and the next message
    away_s: tuple[float, float] = (1800, 1.5)  # between visits
    resume: float = 0.4  # a visit goes on with an earlier conversation, likelier a recent one
    message_tokens: tuple[float, float] = (60, 1.0)
    paste: float = 0.12  # a message brings a document or a tool's output
    paste_tokens: tuple[float, float] = (1500, 0.7)
    answer_tokens: tuple[float, float] = (220, 0.8)
    thinks: float = 0.3  # a conversation whose answers are thought over first; thoughts are not shown again
    thought_tokens: tuple[float, float] = (400, 0.8)
    edit: float = 0.07  # a turn rewrites the middle of one of the last four messages and goes on from there
    again: float = 0.04  # the same prompt is asked once more
    fork: float = 0.05  # two to four answers at once, one of which is kept
    token_s: float = 0.03  # time an answer takes per token
    context: int = 32_000  # longer conversations are left


class Request(NamedTuple):
    """One prompt and the answer it got; `mark` is where the next turn renders differently."""

    start: float
    end: float
    user_id: str
    prompt: np.ndarray  # (n,) int32
    output: np.ndarray  # (m,) int32
    mark: int


class Text:
    """A stream of token ids that never gives the same passage twice before it is used up."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens.astype(np.int32) + TEXT_FROM
        self._at = 0
        self.times_used = 1

    def take(self, count: int) -> np.ndarray:
        """Return the next `count` ids."""
        if self._at + count > len(self._tokens):
            self._at, self.times_used = self.times_used * 7919 % 128, self.times_used + 1
        self._at += count
        return self._tokens[self._at - count : self._at]


def read_text(folder: Path, tokenizer: str, tokens: int, seed: int) -> Text:
    """Tokenise documents of a data folder, drawn over all its files, until there are `tokens` ids."""
    documents = []
    for file in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            documents += [json.loads(line)["text"][:20_000] for line in lines]
    random.Random(seed).shuffle(documents)
    model, ids = Tokenizer.load(tokenizer), []
    for text in documents:
        ids += model.encode(text)
        if len(ids) >= tokens:
            break
    return Text(np.array(ids))


@dataclass(slots=True)
class Talk:
    """A conversation: its system prompt and (message, shown answer) turns."""

    system: np.ndarray
    thinks: bool
    turns: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def prompt(self, message: np.ndarray) -> tuple[np.ndarray, int]:
        """Render all turns and a new message; the mark is before the generation suffix."""
        parts = [np.array([BEGIN]), self.system]
        for asked, answer in self.turns:
            parts += [np.array([USER]), asked, np.array([ASSISTANT]), answer, np.array([END])]
        parts += [np.array([USER]), message]
        mark = sum(map(len, parts))
        return np.concatenate([*parts, [ASSISTANT, THINK] if self.thinks else [ASSISTANT]]).astype(np.int32), mark


def draw_trace(text: Text, *, people: int, hours: float, seed: int, habits: Habits | None = None) -> list[Request]:
    """Draw what `people` ask in `hours`, in order of start."""
    habits = habits or Habits()
    luck = random.Random(seed)
    systems = [
        [text.take(_tokens(luck, habits.system_tokens, 4000)) for _ in range(habits.system_prompts)]
        for _ in range(habits.accounts)
    ]
    weights = [1 / (1 + i) for i in range(habits.accounts)]  # accounts are unequally busy
    requests: list[Request] = []
    for _ in range(people):
        account = luck.choices(range(habits.accounts), weights)[0]
        clock, talks = luck.uniform(0, 3600 * min(1.0, hours / 2)), []
        while clock < 3600 * hours:
            if talks and luck.random() < habits.resume:
                talks.append(talks.pop(-min(len(talks), 1 + int(luck.expovariate(0.7)))))
            else:
                talks.append(Talk(luck.choice(systems[account]), luck.random() < habits.thinks))
            for _ in range(1 + int(luck.expovariate(1 / habits.turns))):
                for request in _turn(talks[-1], clock, f"account-{account}", text, luck, habits):
                    requests.append(request)
                    clock = max(clock, request.end)
                clock += luck.lognormvariate(np.log(habits.think_s[0]), habits.think_s[1])
            clock += luck.lognormvariate(np.log(habits.away_s[0]), habits.away_s[1])
    return sorted((r for r in requests if r.start < 3600 * hours), key=lambda r: r.start)


def _tokens(luck: random.Random, spread: tuple[float, float], most: int) -> int:
    return max(4, min(most, int(luck.lognormvariate(np.log(spread[0]), spread[1]))))


def _turn(talk: Talk, clock: float, user_id: str, text: Text, luck: random.Random, habits: Habits) -> Iterator[Request]:
    message = text.take(_tokens(luck, habits.message_tokens, 2000))
    if luck.random() < habits.paste:
        message = np.concatenate([message, text.take(_tokens(luck, habits.paste_tokens, 8000))])
    kind = luck.random()
    if talk.turns and kind < habits.edit:
        place = len(talk.turns) - 1 - luck.randrange(min(4, len(talk.turns)))
        old, third = talk.turns[place][0], max(1, len(talk.turns[place][0]) // 3)
        message = np.concatenate([old[:third], text.take(third), old[2 * third :]])
        del talk.turns[place:]
    elif talk.turns and kind < habits.edit + habits.again:
        message = talk.turns.pop()[0]
    prompt, mark = talk.prompt(message)
    if len(prompt) > habits.context:
        talk.turns.clear()
        prompt, mark = talk.prompt(message)
    answers = []
    for _ in range(luck.randint(2, 4) if luck.random() < habits.fork else 1):
        answer = text.take(_tokens(luck, habits.answer_tokens, 2000))
        answers.append(answer)
        thought = text.take(_tokens(luck, habits.thought_tokens, 4000)) if talk.thinks else answer[:0]
        output = np.concatenate([thought, answer, [END]]).astype(np.int32)
        yield Request(clock, clock + 0.5 + habits.token_s * len(output), user_id, prompt, output, mark)
    talk.turns.append((message, luck.choice(answers)))


class Event(NamedTuple):
    """A request starts (its prompt's pages are taken) or ends (its output's too, then all are let go)."""

    time: float
    is_start: bool
    request: int


def events(trace: list[Request]) -> list[Event]:
    """All starts and ends in order; at one moment ends go first."""
    both = [Event(r.start, True, i) for i, r in enumerate(trace)] + [
        Event(r.end, False, i) for i, r in enumerate(trace)
    ]
    return sorted(both)


@dataclass(slots=True)
class Replay:
    """What one replay counted, tokens unless said."""

    requests: int = 0
    prompt: int = 0
    hit: int = 0  # prompt tokens whose pages were found
    cached: int = 0  # prompt tokens that were not computed
    computed: int = 0
    recomputed: int = 0  # of the computed ones, those whose pages were found: their window state was lost
    resumed_from_state: int = 0  # requests
    resumed_from_pages: int = 0  # requests that computed the tail again over frozen pages
    running_most: int = 0  # requests at once
    evicted_pages: int = 0
    evicted_states: int = 0


def replay(trace: list[Request], layout: CacheLayout, *, pages: int, state_bytes: int) -> Replay:
    """Run the trace through a page pool and a prefix cache of that room."""
    pool, seen = PagePool(pages), Replay()
    cache = PrefixCache(pool, layout, salt=b"trace", state_bytes=state_bytes)
    running: dict[int, tuple[KeyChain, Match, list[int]]] = {}
    for event in events(trace):
        request = trace[event.request]
        if event.is_start:
            prompt = len(request.prompt)
            chain = cache.chain(request.user_id, request.prompt)
            match = cache.match(chain, prompt - 1)
            cache.record(match)
            held = list(match.pages) + _alloc(pool, layout.pages_for(prompt) - len(match.pages))
            running[event.request] = chain, match, held
            _publish(cache, layout, chain, match, held, match.resume, prompt, request.mark)
            seen.requests += 1
            seen.prompt += prompt
            seen.hit += len(match.pages) * layout.page_tokens
            seen.recomputed += max(0, min(match.frozen, prompt) - match.resume)
            seen.running_most = max(seen.running_most, len(running) + 1)
            seen.resumed_from_state += match.state is not None
            seen.resumed_from_pages += match.resume > 0 and match.state is None
        else:
            chain, match, held = running.pop(event.request)
            before = len(chain)
            chain.push(request.output)
            held += _alloc(pool, layout.pages_for(len(chain)) - len(held))
            _publish(cache, layout, chain, match, held, before, before, request.mark)
            _keep(cache, layout, chain, len(chain), anchor=True)
            pool.release(reversed(held))
            cache.finish(chain, request.mark)
    assert pool.in_use == 0
    seen.cached = cache.stats.cached_tokens
    seen.computed = seen.prompt - seen.cached
    seen.evicted_pages, seen.evicted_states = pool.evictions, cache.stats.evicted_states
    return seen


def _alloc(pool: PagePool, count: int) -> list[int]:
    pages = pool.alloc(count)
    if pages is None:
        raise SystemExit(f"{pool.count} pages do not hold the requests that run at once: raise --percent")
    return pages


def _publish(
    cache: PrefixCache,
    layout: CacheLayout,
    chain: KeyChain,
    match: Match,
    held: list[int],
    start: int,
    prompt: int,
    mark: int,
) -> None:
    """What the engine does after computing start..len(chain)-1: name the completed pages, keep states."""
    for page in range(max(len(match.pages), start // layout.page_tokens), len(chain.keys)):
        cache._pool.register(held[page], chain.keys[page])
    for cut in cache.cuts(match, start, len(chain), prompt=prompt, marks=[mark]):
        _keep(cache, layout, chain, cut.position, anchor=cut.anchor)


def _keep(cache: PrefixCache, layout: CacheLayout, chain: KeyChain, position: int, *, anchor: bool) -> None:
    if not cache.has_state(chain, position):
        size = layout.state_size(position)
        cache.add_state(chain, position, np.broadcast_to(np.uint8(0), size), anchor=anchor)


@dataclass(slots=True)
class Shape:
    """The whole pages of each prompt and output, numbered by content; and the open page, 0 or 1, each ends with."""

    prompt: list[list[int]]
    output: list[list[int]]
    open: list[tuple[int, int]]
    distinct: int


def shape_of(trace: list[Request], layout: CacheLayout) -> Shape:
    """Number the distinct whole pages of the trace."""
    cache = PrefixCache(PagePool(1), layout, salt=b"trace", state_bytes=0)
    numbers: dict[bytes, int] = {}
    shape = Shape([], [], [], 0)
    for request in trace:
        chain = cache.chain(request.user_id, request.prompt)
        whole = len(chain.keys)
        chain.push(request.output)
        named = [numbers.setdefault(key, len(numbers)) for key in chain.keys]
        shape.prompt.append(named[:whole])
        shape.output.append(named[whole:])
        shape.open.append((layout.pages_for(len(request.prompt)) - whole, layout.pages_for(len(chain)) - len(named)))
    shape.distinct = len(numbers)
    return shape


def idle_times(trace: list[Request], shape: Shape, *, pages: int) -> tuple[int, list[tuple[int, int]], list[int]]:
    """What the bound is made of, over `events(trace)`.

    Prompt pages found because somebody holds them; idle times that end in a hit, from their first event to the event
    of the hit; and for each event the idle pages that fit beside those held.
    """
    holders: dict[int, int] = {}
    idle_from: dict[int, int] = {}
    found, open_pages = 0, 0
    times: list[tuple[int, int]] = []
    room: list[int] = []
    for at, event in enumerate(events(trace)):
        prompt, output = shape.prompt[event.request], shape.output[event.request]
        opened, left_open = shape.open[event.request]
        if event.is_start:
            open_pages += opened
            for page in prompt:
                found += page in holders
                if page in idle_from:
                    times.append((idle_from.pop(page), at))
                holders[page] = holders.get(page, 0) + 1
            room.append(pages - len(holders) - open_pages)
            continue
        open_pages -= opened
        for page in output:
            idle_from.pop(page, None)
            holders[page] = holders.get(page, 0) + 1
        room.append(pages - len(holders) - open_pages - left_open)
        for page in prompt + output:
            holders[page] -= 1
            if not holders[page]:
                del holders[page]
                idle_from[page] = at + 1
    return found, times, room


def most_kept(times: list[tuple[int, int]], room: list[int]) -> int:
    """The most of the intervals [start, end) that can be kept so that at most room[t] of them cover any t."""
    starting: dict[int, list[int]] = {}
    for start, end in times:
        starting.setdefault(start, []).append(end)
    latest: list[int] = []  # minus the ends of those kept, a heap
    ending = [0] * (len(room) + 1)
    kept = dropped = 0
    for at, most in enumerate(room):
        kept -= ending[at]
        for end in starting.get(at, ()):
            if end > at:
                heapq.heappush(latest, -end)
                ending[end] += 1
                kept += 1
        while kept > max(0, most):
            ending[-heapq.heappop(latest)] -= 1
            kept -= 1
            dropped += 1
    return len(times) - dropped


def main() -> int:
    """Draw traces, replay each with little room and with room for all, and print one JSON object."""
    summary = "Prefix-cache hits on a replayed trace, beside what any eviction policy could attain."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace", description=summary)
    parser.add_argument("--data", type=Path, required=True, help="folder of *.jsonl.gz with `text`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--percent", type=float, default=25, help="pages of the pool, of the trace's distinct ones")
    parser.add_argument("--people", type=int, default=90)
    parser.add_argument("--hours", type=float, default=8)
    parser.add_argument("--model", default="nano", help="whose tokenizer splits, whose page and state bytes count")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    layout = CacheLayout(preset(args.model))
    runs = []
    for seed in args.seeds:
        text = read_text(args.data, args.model, 4_000_000, seed)
        trace = draw_trace(text, people=args.people, hours=args.hours, seed=seed)
        runs.append({"seed": seed, "text_used": text.times_used} | measure(trace, layout, percent=args.percent))
    result = {
        "bench": "trace",
        "commit": commit(),
        "command": "python -m benchmarks.trace " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "habits": asdict(Habits()),
        "page_tokens": layout.page_tokens,
        "page_bytes": layout.page_bytes,
        "hit_of_attainable_least": min(run[f"{args.percent:g}%"]["hit_of_attainable"] for run in runs),
        "hit_of_attainable_least_with_room_for_all": min(run["all"]["hit_of_attainable"] for run in runs),
        "runs": runs,
    }
    document = json.dumps(result, indent=1)
    print(document)
    if args.json:
        args.json.write_text(document + "\n", encoding="utf-8")
    return 0


def measure(trace: list[Request], layout: CacheLayout, *, percent: float) -> dict[str, Any]:
    """Replay with `percent` of the distinct pages and with room for all."""
    shape = shape_of(trace, layout)
    everything = shape.distinct + sum(map(max, shape.open))  # duplicates of pages being computed at once too
    result: dict[str, Any] = {
        "requests": len(trace),
        "distinct_pages": shape.distinct,
        "distinct_bytes": shape.distinct * layout.page_bytes,
    }
    for name, pages, states in (
        (f"{percent:g}%", round(shape.distinct * percent / 100), None),
        ("all", everything, sum(len(r.prompt) + len(r.output) for r in trace) * layout.slot_bytes),
    ):
        states = pages * layout.page_bytes // 3 if states is None else states
        seen = replay(trace, layout, pages=pages, state_bytes=states)
        found, times, room = idle_times(trace, shape, pages=pages)
        bound = (found + most_kept(times, room)) * layout.page_tokens
        result[name] = {
            "pages": pages,
            "state_bytes": states,
            **asdict(seen),
            "attainable": bound,
            "hit_of_attainable": round(seen.hit / bound, 4),
            "hit_of_prompt": round(seen.hit / seen.prompt, 4),
            "cached_of_prompt": round(seen.cached / seen.prompt, 4),
        }
    return result


if __name__ == "__main__":
    raise SystemExit(main())
