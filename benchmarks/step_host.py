"""What the host does for a step of the captured forward, on a CPU: everything but the kernels, which give zeros.

    python -m benchmarks.step_host [--ranks 2] [--engine REQUESTS] [--context 1M] [--profile] [launch:8K:128]

launch:CONTEXT:SEQUENCES is `launch` by itself, one rank's of `--ranks`; `--engine` an engine with so many requests of
the context, in as many processes over gloo. Flash's shapes; there are neither weights nor caches. Times in us are
medians and the least; with `--sent` the bytes of the last step's order, and of the last results gathered.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import json
import os
import pickle
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.group_admit import Filled
from benchmarks.group_decode import Alone, spans_of

from pelagos.cli.options import parse_tokens
from pelagos.config import ModelConfig, preset
from pelagos.engine import EngineOptions, LocalEngine, SamplingParams, over_ranks
from pelagos.engine.memory import plan_memory
from pelagos.engine.tiers import Tiers
from pelagos.evals.commit import commit
from pelagos.evals.engine_bench import kv_budget
from pelagos.kernels.layout import CacheLayout
from pelagos.model import cuda_group
from pelagos.model.cuda_forward import CudaForward
from pelagos.model.cuda_group import GroupForward
from pelagos.parallel import Group

CPU = torch.device("cpu")
TOKENS, WARM = 256, 5
results: dict[int, Any] = {}


def shell(config: ModelConfig) -> Any:
    """What a forward asks of weights where nothing is computed."""
    return SimpleNamespace(config=config, device=CPU, bytes=0, layers=[], draft=None, blocks=None, mode="released",
                           bases=list)  # fmt: skip


def nothing(self: CudaForward, bucket: int, dense: bool, drafts: bool) -> Any:
    """The results of a step without its kernels: token 7 in every row."""
    c = self.weights.config
    if bucket not in results:
        picks = torch.tensor([[7.0, 0.0]], dtype=torch.float64).repeat(bucket, 1)
        streams = torch.zeros(bucket, c.hc_mult, c.hidden_size, dtype=torch.bfloat16)
        results[bucket] = torch.zeros(bucket, c.vocab_size), streams, picks, None
    return results[bucket]


def shapes(self: Any, shape: Sequence[int], dtype: torch.dtype, ranks: int = 2) -> list[torch.Tensor]:
    return [torch.empty(tuple(shape), dtype=dtype, device="meta")] * ranks


class Apart(Alone):
    """A rank of two without the other, whose memory is none."""

    memory = shapes


def figures(times: Sequence[float]) -> dict[str, float]:
    return {"us": round(statistics.median(times[WARM:]) * 1e6, 1), "least_us": round(min(times) * 1e6, 1)}


def launches(config: ModelConfig, ranks: int, context: int, batch: int, rounds: int) -> dict[str, Any]:
    """Times of `launch` with tables that stay as they are, but for one position more each time."""
    layout, own = CacheLayout(config, "released", 0), -(-batch // ranks)
    pools = [shapes(None, (own * layout.pages_for(context), layout.page_bytes), torch.uint8, ranks),
             shapes(None, (own, layout.slot_bytes), torch.uint8, ranks)]  # fmt: skip
    if ranks == 1:
        forward = CudaForward(shell(config), layout, pools[0][0], pools[1][0], positions=context)
    else:
        apart: Any = Apart(CPU, 1)
        forward = GroupForward(shell(config), layout, pools[0], pools[1], apart, positions=context, follow=False)
        forward.exchanges = apart
    spans = spans_of(layout, context - rounds, batch, ranks, 1)
    times = []
    for step in range(rounds):
        now = [span._replace(start=span.start + step) for span in spans]
        begun = time.perf_counter()
        for _ in forward.launch(now):
            pass
        times.append(time.perf_counter() - begun)
    return figures(times) | {"first_us": round(times[0] * 1e6, 1)}


@contextmanager
def one(config: ModelConfig, options: EngineOptions) -> Iterator[LocalEngine]:
    """An engine over one device."""
    layout, plan = CacheLayout(config, "released", 0), plan_memory(config, options, mode="released")
    pages, slots = shapes(None, (plan.pages, layout.page_bytes), torch.uint8, 1), shapes(
        None, (plan.slots, layout.slot_bytes), torch.uint8, 1)  # fmt: skip
    forward = CudaForward(shell(config), layout, pages[0], slots[0], positions=plan.positions)
    pools = over_ranks._RankPools(layout, pages, slots)
    engine = LocalEngine(config, options, tiers=Tiers(pools, 0), forward=forward, plan=plan, salt=b"")  # pyright: ignore[reportArgumentType]
    yield engine
    engine.close()


def steps(engine: LocalEngine, context: int, requests: int, rounds: int, profile: bool) -> dict[str, Any]:
    """An engine's steps with all requests decoding near the end of the context."""
    engine._forward = Filled(engine._forward)  # pyright: ignore[reportAttributeAccessIssue]
    ids, params = [7] * (context - TOKENS), SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0)
    for _ in range(requests):
        engine.submit(ids, params)
    times, running = [], engine._scheduler.running
    watch = cProfile.Profile()
    while len(times) < rounds:
        full = len(running) == requests and all(each.pending == 1 for each in running)
        if profile and len(times) == WARM:
            watch.enable()
        begun = time.perf_counter()
        engine.step()
        if full:
            times.append(time.perf_counter() - begun)
    watch.disable()
    if profile:
        pstats.Stats(watch, stream=sys.stderr).sort_stats("tottime").print_stats(35)
    return figures(times)


def serve(args: argparse.Namespace, config: ModelConfig) -> dict[str, Any] | None:
    """The row of an engine; None on the ranks that only compute."""
    context = parse_tokens(args.context, "context")
    options = EngineOptions(
        kv_bytes=kv_budget(config, -(-args.engine // args.ranks), context, layout="released"), prefix_cache=False,
        max_requests=args.engine, preemption="recompute", chunk_tokens=context, speculation=False, threaded=False,
    )  # fmt: skip
    if args.ranks == 1:
        with one(config, options) as engine:
            return steps(engine, context, args.engine, args.steps, args.profile)
    sent: list[int] = []
    gathered: list[int] = []
    row = None
    group = Group(CPU)
    told, gather = group.told, group.gather

    def counted_told(thing: Any = None) -> Any:
        sent.append(len(pickle.dumps(thing)))
        return told(thing)

    def counted_gather(thing: Any) -> list[Any]:
        gathered.append(len(pickle.dumps(thing)))
        return gather(thing)

    if args.sent:
        group.told, group.gather = counted_told, counted_gather
    group.memory = lambda shape, dtype: shapes(None, shape, dtype, group.size)
    over_ranks.available_bytes = lambda device: None
    with over_ranks.engine_over(shell(config), None, options, group) as engine:
        if engine is not None:
            row = steps(engine, context, args.engine, args.steps, args.profile)
            row |= {"sent": sent[-1:], "gathered": gathered[-1:]}
    group.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2)
    parser.add_argument("--engine", type=int, default=0)
    parser.add_argument("--context", default="1M")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--sent", action="store_true", help="count bytes, which takes time")
    args = parser.parse_args()
    config = dataclasses.replace(preset("flash"), num_nextn_predict_layers=0)
    CudaForward._step = nothing
    cuda_group.Exchanges.every_row = lambda self, x: torch.cat([x] * args.ranks)
    head = {"bench": "step_host", "commit": commit(), "torch": torch.__version__, "ranks": args.ranks}
    with torch.inference_mode():
        for case in args.cases:
            _, context, batch = case.split(":")
            found = launches(config, args.ranks, parse_tokens(context, "context"), int(batch), args.steps)
            print(json.dumps(head | {"case": case} | found), flush=True)
        if args.engine:
            config = cuda_group.cut_width(config, args.ranks)
            ranks, rank = range(1, args.ranks), 0
            with tempfile.TemporaryDirectory() as folder:
                for other in ranks:
                    rank = rank or (0 if os.fork() else other)
                if args.ranks > 1:
                    store = torch.distributed.FileStore(f"{folder}/store", args.ranks)  # pyright: ignore[reportPrivateImportUsage]
                    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=args.ranks)
                row = serve(args, config)
                if rank:
                    os._exit(0)
                for _ in ranks:
                    os.wait()
            print(json.dumps(head | {"case": f"engine:{args.context}:{args.engine}"} | (row or {})), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
