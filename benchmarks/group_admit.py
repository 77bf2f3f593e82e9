"""Requests of a million tokens at once in an engine over the ranks that torchrun starts, and what is beyond its budget.

    torchrun --standalone --nproc-per-node 2 benchmarks/group_admit.py --context 1M --requests 30

Random weights and pages. The budget is that of so many requests: pages and slots. First a budget for `--beyond` of
them, which the plan has to refuse; then the requests and one more, which has to wait while they run. Prompts take their
pages but are not computed (that would take minutes and change no byte of what is held); steps are, with all requests at
their full length. One JSON line, of a step its time, what of that lies outside the forward (`engine_us`), and the
device's time of each call (`graph_us`); the exit status says whether all was so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from benchmarks.group_decode import build

from pelagos.cli.options import parse_tokens
from pelagos.engine import EngineOptions, LocalEngine, SamplingParams, over_ranks
from pelagos.engine.over_ranks import engine_over
from pelagos.errors import CapacityError
from pelagos.evals.commit import commit
from pelagos.evals.engine_bench import kv_budget
from pelagos.evals.step_bench import fill_caches
from pelagos.kernels.layout import CacheLayout, Drawn, Output, Span
from pelagos.model.cuda_group import GroupForward
from pelagos.model.cuda_weights import Weights
from pelagos.parallel import Group

TOKENS = 128  # left to generate, a page


class Watched(GroupForward):
    """A forward over random pages, with the device's time of its calls.

    Pages of zeros give all entries one score: the indexer then searches all of them, by one program a row.
    """

    zeros = False

    def __init__(self, weights: Weights, layout: CacheLayout, pages: Any, slots: Any, group: Group, **more: Any):
        super().__init__(weights, layout, pages, slots, group, **more)
        self.took: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if not self.zeros:
            fill_caches(layout, pages[group.rank], slots[group.rank])

    def _start(self, *given: Any) -> Any:
        if not self._cuda:
            return super()._start(*given)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        staged = super()._start(*given)
        end.record()
        self.took.append((begin, end))
        return staged


class Filled:
    """A forward whose prompts are there already: random caches stand for what they would have left."""

    def __init__(self, real: Any) -> None:
        self._real, self.draws, self.took = real, True, 0.0

    def forward(self, spans: Sequence[Span]) -> Output:
        """Compute calls of decoding requests alone, and pick token 7 in all others."""
        if all(span.decode for span in spans):
            begun = time.perf_counter()
            found = self._real.forward(spans)
            self.took = time.perf_counter() - begun
            return found
        picks = {at: [Drawn(7, 0.0)] for at, span in enumerate(spans) if span.logits}
        return Output(np.empty((0, 1), np.float32), np.empty((0, 1, 1), np.float32), picks)


def admitted(engine: LocalEngine, context: int, requests: int, steps: int) -> dict[str, Any]:
    """Fill an engine with `requests` and one more; what runs, what waits, and how long a step of all takes."""
    real: Any = engine._forward
    filled = Filled(real)
    engine._forward = filled  # pyright: ignore[reportAttributeAccessIssue]
    ids = [7] * (context - TOKENS)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0)
    streams = [engine.submit(ids, params) for _ in range(requests + 1)]
    times: list[float] = []
    own: list[float] = []
    while len(times) < steps + 3:
        begun = time.perf_counter()
        engine.step()
        running = engine._scheduler.running
        if len(running) == requests and all(each.pending == 1 for each in running):
            times.append(time.perf_counter() - begun)
            own.append(times[-1] - filled.took)
    stats = engine.stats()
    held = [len(each.tokens) for each in engine._scheduler.running]
    assert not any(stream.finish_reason for stream in streams)
    return {"running": stats.requests_running, "waiting": stats.requests_waiting, "shortest": min(held),
            "preemptions": stats.preemptions, "pages": stats.pages_total, "pages_in_use": stats.pages_in_use,
            "us": round(statistics.median(times[3:]) * 1e6, 1), "engine_us": round(statistics.median(own[3:]) * 1e6, 1),
            "graph_us": [round(1e3 * begin.elapsed_time(end), 1) for begin, end in real._forward.took[3:]]}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="flash")
    parser.add_argument("--layers")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--context", default="1M")
    parser.add_argument("--requests", type=int, default=30, help="a multiple of the ranks")
    parser.add_argument("--beyond", type=int, default=34, help="requests whose budget there is no memory for")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--zeros", action="store_true", help="leave pages zero, all entries alike")
    args = parser.parse_args()
    over_ranks.GroupForward, Watched.zeros = Watched, args.zeros
    group, weights = build(args.shape, args.layers, args.device)
    assert isinstance(group, Group)
    context, config, cuda = parse_tokens(args.context, "context"), weights.config, group.device.type == "cuda"

    def options(requests: int) -> EngineOptions:
        own = requests // group.size
        return EngineOptions(
            kv_bytes=kv_budget(config, own, context, layout="released"), max_requests=requests, prefix_cache=False,
            preemption="recompute", chunk_tokens=context, speculation=False, threaded=False,
        )  # fmt: skip

    refusal = ""
    try:
        with engine_over(weights, None, options(args.beyond), group):
            pass
    except CapacityError as error:
        refusal = str(error)
    before = torch.cuda.mem_get_info()[0] if cuda else 0
    good = True
    with torch.inference_mode(), engine_over(weights, None, options(args.requests), group) as engine:
        if engine is not None:
            row = {"bench": "group_admit", "case": f"{args.shape} layers={config.num_hidden_layers}",
                   "device": torch.cuda.get_device_name() if cuda else "cpu", "ranks": group.size, "commit": commit(),
                   "torch": torch.__version__, "weights": "random", "zeros": args.zeros, "context": context,
                   "requests": args.requests,
                   "kv_bytes": engine.plan.kv_bytes, "bytes_a_token": engine.plan.page_bytes / engine.plan.page_tokens,
                   "bytes_a_request": engine.plan.slot_bytes, "beyond": args.beyond, "refusal": refusal}  # fmt: skip
            row |= admitted(engine, context, args.requests, args.steps)
            row["taken_bytes"] = before - torch.cuda.mem_get_info()[0] if cuda else 0
            good = bool(refusal) and (row["running"], row["waiting"], row["preemptions"]) == (args.requests, 1, 0)
            print(json.dumps(row | {"good": good}), flush=True)
    group.close()
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
