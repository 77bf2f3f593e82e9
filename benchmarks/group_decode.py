"""Steps and prompts of a model divided over the processes that torchrun starts, JSON lines on rank 0.

    torchrun --standalone --nproc-per-node 2 benchmarks/group_decode.py decode:4K:1 verify:4K:1:2 prompt:8K

decode:CONTEXT:SEQUENCES is a step, fused: and unfused: one with these launches whatever `GroupForward.fuses` says,
verify:CONTEXT:SEQUENCES:DRAFTS one of DRAFTS + 1 tokens a sequence with as many calls of the draft layer before it,
prompt:CONTEXT a prompt from its first token to its last. Random weights and caches.
`--apart` leaves every sequence its rank's bits (no rank helps another); `--alone 0` (1) has one process compute the
part of the first (second) of two ranks, whose peer answers at once: what is left is a rank's own time. `--profile` adds
a step's kernels.

Of a step host_us is each rank's time until its graph was started, skew_us what lies between the ranks' starts. Of a
prompt of one call `overlap` has, by rank: its times, no logits asked for, with copies between ranks beside what is
computed, in line with it, and without any (what others have is then left from before), one of each in turn. By their
medians an exchange costs what lies between in line and without, and the share of it that is hidden is what lies between
in line and beside. Further where a stream stood: for keys of rows before (`keys`), for the others' rows and partial
results, for the hosts. On a CPU (`--device cpu --shape nano`) it only shows that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pelagos.cli.options import parse_tokens
from pelagos.config import preset
from pelagos.evals.commit import commit
from pelagos.evals.step_bench import cut_config, fill_caches, profiled
from pelagos.kernels.layout import CacheLayout, Draw, Span
from pelagos.model.cuda_forward import PROMPT_TOKENS, CudaForward
from pelagos.model.cuda_group import GroupForward, cut_width
from pelagos.model.cuda_weights import Weights
from pelagos.parallel import Group

PROMPT_ROUNDS, WATCHED_ROUNDS = 2, 10
WAITS = ("keys", "rows", "parts", "call")  # by channel


class Alone:
    """A group of two whose other rank answers at once with what this one has."""

    size = 2

    def __init__(self, device: torch.device, experts: int, rank: int = 0) -> None:
        self.device, self.experts, self.rank = device, experts, rank

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        own = torch.zeros(tuple(shape), dtype=dtype, device=self.device)
        if dtype == torch.int32:  # the experts that the other's rows choose
            own.random_(0, self.experts)
        return [own] * 2

    def every_row(self, x: Tensor) -> Tensor:
        return torch.cat((x, x.flip(1)))

    def own_sum(self, x: Tensor) -> Tensor:
        return x[: len(x) // 2]

    def sum(self, x: Tensor) -> Tensor:
        return x

    def columns(self, x: Tensor, source: int) -> Tensor:
        return x.chunk(2, 1)[0].contiguous()

    def gather(self, thing: Any) -> list[Any]:
        return [thing] * self.size

    def finish(self) -> None: ...

    def signal(self, rank: int, channel: int) -> None: ...

    def wait(self, rank: int, channel: int) -> None: ...

    def meet(self, channel: int) -> None: ...

    def close(self) -> None: ...


def spans_of(layout: CacheLayout, context: int, batch: int, ranks: int, tokens: int) -> list[Span]:
    """The last `tokens` positions before the end, one sequence after the other on each rank in turn."""
    each = layout.pages_for(context)
    tables = [(np.arange(each) + each * (i // ranks)) * ranks + i % ranks for i in range(batch)]
    return [
        Span(np.arange(7 + i, 7 + i + tokens), context - 1 - tokens, i, tables[i].astype(np.int32), decode=True,
             logits=tokens, draws=(Draw(),) * tokens)
        for i in range(batch)
    ]  # fmt: skip


def steps(forward: CudaForward, spans: list[Span], count: int, drafts: int) -> list[tuple[float, float, float]]:
    """When steps begin, have been started and end as the host sees them, draft calls included."""
    config, found = forward.weights.config, []
    past = np.zeros((len(spans), config.hc_mult, config.hidden_size), np.float32)
    follow = [span._replace(tokens=span.tokens[:1], logits=1, draws=span.draws[:1]) for span in spans]
    for _ in range(count):
        begun = time.perf_counter()
        for _ in range(drafts):
            for _ in forward.launch(follow, past):
                pass
        for _ in forward.launch(spans):
            pass
        started = time.perf_counter()
        synchronize(forward)
        found.append((begun, started, time.perf_counter()))
    return found


def synchronize(forward: CudaForward) -> None:
    if forward.weights.device.type == "cuda":
        torch.cuda.synchronize()


def graph(forward: CudaForward, spans: list[Span], count: int) -> list[float]:
    """Seconds of a step's graphs alone, as the device sees them."""
    found = []
    for _ in range(count):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        took = 0.0
        for staged in forward.launch(spans):
            begin.record()
            staged.call.run()
            end.record()
            end.synchronize()
            took += begin.elapsed_time(end) / 1e3
        found.append(took)
    return found


def prompt(
    forward: CudaForward,
    span: Span,
    length: int,
    group: Group | Alone,
    rounds: int = PROMPT_ROUNDS,
    *,
    ask: bool = True,
) -> list[float]:
    """Seconds of a whole prompt in calls of the most tokens one takes; logits, which hosts exchange, if `ask`."""
    ids = np.random.default_rng(0).integers(0, forward.weights.config.vocab_size, length)
    most, found = PROMPT_TOKENS * group.size, []
    for _ in range(rounds):
        group.gather(None)
        begun = time.perf_counter()
        for start in range(0, length, most):
            last = ask and start + most >= length and isinstance(group, Group)  # alone the last row is not here
            forward.prefill.run([span._replace(tokens=ids[start : start + most], start=start, logits=int(last))])
        synchronize(forward)
        found.append(time.perf_counter() - begun)
    return found


def overlap(forward: Any, span: Span, length: int, group: Any) -> dict[str, Any]:
    """Times of a prompt's exchanges in ms on this rank: what they cost beside what is computed and in line."""
    prefill, cuda = forward.prefill, forward.weights.device.type == "cuda"
    side = prefill._side
    marks: list[tuple[str, Any, Any]] = []

    def now() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def marked(name: str, call: Any) -> Any:
        begin = now()
        found = call()
        marks.append((name, begin, now()))
        return found

    def waiting() -> dict[str, float]:
        marks.clear()
        group.wait = lambda rank, channel: marked(WAITS[channel], lambda: type(group).wait(group, rank, channel))
        group.gather = lambda thing: marked("hosts", lambda: type(group).gather(group, thing))
        prefill._copy = lambda into, values: marked("copies", lambda: type(prefill)._copy(prefill, into, values))
        try:
            prompt(forward, span, length, group, 1)
        finally:
            del group.wait, group.gather, prefill._copy
        took: dict[str, float] = {}
        for name, begin, end in marks:
            took[name] = took.get(name, 0.0) + (begin.elapsed_time(end) if cuda else 1e3 * (end - begin))
        return {name: round(each, 2) for name, each in took.items()}

    def timed(how: str) -> float:
        prefill._side = side if how == "beside" else None
        if how == "without":
            prefill._copy = lambda into, values: None
        try:
            return 1e3 * prompt(forward, span, length, group, 1, ask=False)[0]
        finally:
            vars(prefill).pop("_copy", None)
            prefill._side = side

    ways = ("beside", "in_line", "without")
    found: dict[str, Any] = {"waits_ms": waiting()}
    times = {how: [] for how in ways}
    for _ in range(WATCHED_ROUNDS):  # in turns, so that a change of clocks falls on all three
        for how in ways:
            times[how].append(timed(how))
    beside, in_line, without = (statistics.median(times[how]) for how in ways)
    found |= {f"{how}_ms": [round(each, 2) for each in times[how]] for how in ways}
    found["exchange_ms"] = round(in_line - without, 2)
    return found | {"hidden": round((in_line - beside) / (in_line - without), 3) if in_line > without else None}


def rows(args: argparse.Namespace, group: Group | Alone, weights: Weights) -> Iterator[dict[str, Any]]:
    device, config, ranks = weights.device, weights.config, group.size
    layout = CacheLayout(config, "released", 4)
    cases = [(kind, parse_tokens(context, "context"), *(int(each) for each in more), *(1, 0)[len(more) :])
             for kind, context, *more in (case.split(":") for case in args.cases)]  # fmt: skip
    own = [-(-batch // ranks) for _, _, batch, _ in cases]
    most = max(mine * layout.pages_for(context) for mine, (_, context, _, _) in zip(own, cases, strict=True))
    pages, slots = (group.memory(size, torch.uint8) for size in ((most, layout.page_bytes),
                                                                 (max(own), layout.slot_bytes)))  # fmt: skip
    fill_caches(layout, pages[group.rank], slots[group.rank])
    forward = None  # planned for up to twice a step's context; a prompt's does not matter
    for kind, context, batch, drafts in cases:
        if forward is None or forward.positions < context or (kind != "prompt" and forward.positions > 2 * context):
            forward = None
            forward = GroupForward(weights, layout, pages, slots, group, positions=context, follow=not args.apart)  # pyright: ignore[reportArgumentType]
            if isinstance(group, Alone):
                forward.exchanges = group  # pyright: ignore[reportAttributeAccessIssue]
        fuses = {"fused": True, "unfused": False}.get(kind, GroupForward.fuses)
        if forward.fuses != fuses:
            forward.fuses = fuses
            forward._calls.clear()
        spans, begun = spans_of(layout, context, batch, ranks, drafts + 1), time.perf_counter()
        extra: dict[str, Any] = {}
        if kind == "prompt":
            given = spans[0]._replace(decode=False, draws=())
            short = context <= PROMPT_TOKENS * ranks
            times = prompt(forward, given, context, group, WATCHED_ROUNDS if short else PROMPT_ROUNDS)
            took, made = statistics.median(times[1:]), context  # the first compiles
            if short and args.alone is None:
                extra["overlap"] = group.gather(overlap(forward, given, context, group))
        else:
            points = steps(forward, spans, args.steps + 3, drafts)
            times = [end - begin for begin, _, end in points]
            took, made = statistics.median(times[3:]), batch
            every = np.array(group.gather(points[3:]))  # one clock for the processes of one host
            extra["host_us"] = (np.median(every[..., 1] - every[..., 0], 1) * 1e6).round(1).tolist()
            extra["skew_us"] = round(float(np.median(np.ptp(every[..., 1], 0))) * 1e6, 1)
        took = max(group.gather(took))
        replays = graph(forward, spans, args.steps) if kind != "prompt" and device.type == "cuda" else [0.0]
        if args.profile and kind != "prompt":
            extra["kernels"] = profiled(forward, spans)
        case = f"{args.shape} layers={config.num_hidden_layers} {kind} context={context} batch={batch} drafts={drafts}"
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        yield {"bench": "group", "case": case, "device": name, "commit": commit(), "torch": torch.__version__,
               "ranks": ranks, "alone": args.alone,
               "apart": args.apart, "us": round(took * 1e6, 1), "graph_us": round(statistics.median(replays) * 1e6, 1),
               "tok_s": round(made / took, 1), "steps_s": round(1 / took, 1), "most_tokens": batch * (drafts + 1),
               "first_s": round(times[0], 2), "case_s": round(time.perf_counter() - begun, 1),
               "weight_bytes": weights.bytes, "kv_bytes_a_token": layout.page_bytes / layout.page_tokens,
               "kv_bytes_a_sequence": layout.slot_bytes} | extra  # fmt: skip


def build(shape: str, layers: str | None, where: str, alone: int | None = None) -> tuple[Group | Alone, Weights]:
    """Join the other ranks, or be `alone` as one of two; make this one's random weights."""
    device = torch.device(where)
    if device.type == "cuda":
        device = torch.device("cuda", 0 if alone is not None else int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    config = cut_config(shape, layers)
    config = dataclasses.replace(config, num_nextn_predict_layers=preset(shape).num_nextn_predict_layers)
    if shape == "nano":
        config = dataclasses.replace(config, moe_intermediate_size=256)
    group = Group(device) if alone is None else Alone(device, config.n_routed_experts, alone)
    return group, Weights(cut_width(config, group.size), device).fill_random()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--shape", default="flash")
    parser.add_argument("--layers")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--alone", type=int, choices=(0, 1))
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    group, weights = build(args.shape, args.layers, args.device, args.alone)
    with torch.inference_mode():
        for row in rows(args, group, weights):
            if group.rank == 0 or args.alone is not None:
                print(json.dumps(row), flush=True)
    group.close()


if __name__ == "__main__":
    main()
