"""Training on one CUDA device: kernels beside their floor, then whole steps of S and M (complete V4 blocks).

`python -m benchmarks.training kernels` times the hyper-connection site and the attention of training, forward and
backward, in GB/s and as a share of the measured copy rate. `python -m benchmarks.training steps --size S` times whole
steps on random tokens, with four streams and with a plain residual, and says what Muon takes of them. `all` runs the
device tests and everything (some minutes). `torchrun --standalone --nproc-per-node 2 -m benchmarks.training worlds
--size M --rows 32 --accumulate 8` times one process and then both, by replicas and by experts in waves, with the dry
run's bytes and seconds beside. `... served --data SHARDS` takes a quantised step of nano and says how far the logits of
training's forward are from those that the export gets from `model.cuda_forward`. One JSON object a line on stdout, a
table on stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pelagos.config import ModelConfig, nano
from pelagos.evals.commit import commit
from pelagos.kernels import mhc, training_attention
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.ref import mhc as mhc_ref
from pelagos.kernels.ref import training_attention as attention_ref
from pelagos.load import load_model
from pelagos.model.cuda_forward import CudaForward
from pelagos.model.cuda_weights import Weights
from pelagos.train.data import ShardWriter, write_meta
from pelagos.train.dry_run import layout
from pelagos.train.meter import PEAKS, peak_flops, training_flops
from pelagos.train.objective import prepare
from pelagos.train.ranks import Ranks
from pelagos.train.recipe import TrainConfig
from pelagos.train.trainer import Trainer

WARM = 2  # steps before those that are timed: the first compiles
RATIOS = (0, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4)
# (hidden, layers, heads, experts, expert width): specification of training, part F.
SIZES = {"S": (512, 8, 8, 32, 256), "M": (768, 12, 8, 64, 384), "XS": (128, 4, 8, 8, 32)}
# (what, settings): how two processes divide M. The first is each by itself.
WORLDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("one", {}), ("dp", {}), ("dp in BF16", {"grad_sync": "bf16_stochastic"}), ("ep", {"ep": 2}),
    ("waves in turn", {"ep": 2, "waves": 4, "overlap": False}), ("waves overlapping", {"ep": 2, "waves": 4}),
)  # fmt: skip


def sized(name: str) -> ModelConfig:
    """The model of a size: 39M active of 113M, or 116M active of 721M, vocabulary 16K; XS is to try commands on."""
    hidden, layers, heads, experts, width = SIZES[name]
    return dataclasses.replace(
        nano(), vocab_size=16384, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        q_lora_rank=256, o_lora_rank=128, compress_ratios=(*RATIOS[:layers], 0), n_routed_experts=experts,
        num_experts_per_tok=6, moe_intermediate_size=width,
    )  # fmt: skip


def seconds(run: Callable[[], object], *, repeats: int = 10) -> float:
    """Median of timed runs after two to warm up."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def say(row: dict) -> None:
    count = os.environ.get("WORLD_SIZE")
    start = f"torchrun --standalone --nproc-per-node {count}" if count else "python"
    words = " ".join([start, "-m benchmarks.training", *sys.argv[1:]])
    print(json.dumps(row | {"commit": commit(), "torch": torch.__version__, "command": words}), flush=True)
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), file=sys.stderr)


def kernels(tokens: int) -> None:
    buffer = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    copy = 2 * buffer.numel() / seconds(lambda: buffer.clone())
    for width in (256, 512, 768):
        y, streams, post, comb, fn, base, scale = (
            t.requires_grad_() for t in mhc_ref.make_inputs(tokens, width, device="cuda")
        )
        stream_bytes = 2 * streams.numel()
        grads = [torch.randn_like(t) for t in (streams, y, post, comb)]

        def forward(args=(y, streams, post, comb, fn, base, scale)):
            y, streams, post, comb, fn, base, scale = args
            return mhc.site((y, post, comb), streams, fn, base, scale, **mhc_ref.OPTIONS)

        def both(forward=forward, grads=grads, learnt=(y, streams, post, comb, fn, base, scale)):
            torch.autograd.grad(forward(), learnt, grads)

        for name, run, passes in (("mhc forward", forward, 3.5), ("mhc forward + backward", both, 10.5)):
            took = seconds(run)
            floor = passes * stream_bytes / copy
            say({"bench": name, "tokens": tokens, "width": width, "us": took * 1e6, "floor_frac": floor / took})
    for case in (((2048,), 8, 128, 128, 0, 0), ((2048,), 8, 128, 128, 128, 0), ((2048,), 8, 128, 128, 4, 0),
                 ((2048,), 8, 128, 128, 4, 128), ((16384,), 8, 128, 128, 4, 128)):  # fmt: skip
        rows = max(1, tokens // sum(case[0]))
        given = attention_ref.make_inputs(*case, device="cuda", batch=rows)
        names = ("q", "rows", "entries", "sink")
        learnt = [given[n].requires_grad_() for n in names if given[n] is not None]

        def attend(given=given):
            return training_attention.attend(**given)[0]

        up = torch.randn_like(given["q"])

        def step(attend=attend, learnt=learnt, up=up):
            torch.autograd.grad(attend(), learnt, up)

        shape = {"row": sum(case[0]), "rows": rows, "ratio": case[4], "picks": case[5]}
        say({"bench": "attention forward", **shape, "us": seconds(attend, repeats=5) * 1e6})
        say({"bench": "attention forward + backward", **shape, "us": seconds(step, repeats=5) * 1e6})


def shards(directory: Path, vocabulary: int) -> Path:
    """Random tokens: speed does not read them."""
    rng = np.random.default_rng(0)
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    entries = {}
    for split, count in (("train", 2000), ("heldout", 8)):
        writer = ShardWriter(directory, split)
        for _ in range(count):
            writer.add(rng.integers(2, vocabulary, 2049).astype(np.uint16), "docs", 4 * 2049)
        entries[split] = writer.close()
    write_meta(directory, directory / "tokenizer.json", entries, {})
    return directory


def plain_residual() -> None:
    """Make a site of one stream what it is without hyper-connections: x + F(x), one addition."""

    def leave(pending, streams):
        return streams if pending is None else streams + pending[0].unsqueeze(-2)

    def site(pending, streams, *_, **__):
        entered = leave(pending, streams)
        return entered, entered.squeeze(-2), None, None

    mhc.site, mhc.leave = site, leave


def steps(
    size: str, *, precision: str, rows: int, accumulate: int, sparse: bool, plain: bool, released: bool, profile: int
) -> None:
    config = TrainConfig(
        steps=1000, batch_rows=rows, accumulate=accumulate, precision=precision, quantise_from=0 if released else 1,
        sparse_from=0 if sparse else 1, repeats={"docs": 1}, log_every=10**6,
    )  # fmt: skip
    model = sized(size)
    if plain:
        model = dataclasses.replace(model, hc_mult=1)
        plain_residual()
    with tempfile.TemporaryDirectory() as scratch:
        data = shards(Path(scratch), model.vocab_size)
        trainer = Trainer(model, config, data=data, out=Path(scratch) / "run", device="cuda")
        started = time.monotonic()
        trainer._update()
        torch.cuda.synchronize()
        first = time.monotonic() - started
        torch.cuda.reset_peak_memory_stats()
        took = seconds(trainer._update, repeats=3)
        muon = seconds(lambda: trainer.optimizer.step(1e-5), repeats=3)
        tokens = rows * accumulate * config.row_tokens
        flops = training_flops(model, config.row_tokens) * tokens / took
        peak = peak_flops(torch.device("cuda"))
        say({
            "bench": "step", "size": size, "residual": "plain" if plain else "mhc", "precision": precision,
            "attention": "sparse" if sparse else "dense", "released": released, "tokens": tokens, "ms": took * 1e3,
            "tokens_per_s": tokens / took, "mfu": flops / peak if peak else None, "muon_frac": muon / took,
            "first_step_s": first, "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
            "device": torch.cuda.get_device_name(),
        })  # fmt: skip
        if profile:
            top(trainer, profile)


def top(trainer: Trainer, count: int) -> None:
    """Print the kernels that one step spends most of its time in, and how long the device was idle."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        started = time.monotonic()
        trainer._update()
        torch.cuda.synchronize()
        wall = (time.monotonic() - started) * 1e3
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    busy = sum(row.self_device_time_total for row in rows) / 1e3
    say({"bench": "profile", "wall_ms": wall, "busy_ms": busy, "kernels": sum(row.count for row in rows)})
    for row in rows[:count]:
        name = row.key.replace("at::native::", "").replace("void ", "")
        print(f"{row.self_device_time_total / 1e3:9.2f} ms {row.count:6} {name[:110]}", file=sys.stderr)


def exchanged(trainer: Trainer) -> dict[str, float]:
    """Return milliseconds of a step in which the device exchanges, waiting included, and computes as well meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        trainer._update()
        torch.cuda.synchronize()
    spans: list[tuple[float, float, bool]] = []
    for event in profile.events() or ():
        if event.device_type == torch.profiler.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end, "nccl" in event.name.lower()))
    every, ours, theirs = (
        covered((begin, end) for begin, end, nccl in spans if nccl in kinds)
        for kinds in ((True, False), (False,), (True,))
    )
    return {"busy_ms": every / 1e3, "exchange_ms": theirs / 1e3, "hidden_ms": (ours + theirs - every) / 1e3}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length that spans cover together."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def worlds(size: str, *, device: str, rows: int, accumulate: int, cases: str) -> None:
    """Under torchrun: steps of each process by itself, then of both together; losses must agree, rank 0 says it all."""
    number, one_s = int(os.environ["LOCAL_RANK"]), 0.0
    place, model, cuda = torch.device(device, number), sized(size), device == "cuda"
    if cuda:
        torch.cuda.set_device(place)
    else:
        place = torch.device(device)
    with tempfile.TemporaryDirectory() as scratch:
        data = shards(Path(scratch), model.vocab_size)
        for name, settings in WORLDS:
            if cases and name not in cases.split(";"):
                continue
            config = TrainConfig(
                steps=1000, batch_rows=rows, accumulate=accumulate, quantise_from=1, sparse_from=1,
                repeats={"docs": 1}, log_every=10**6, **settings,
            )  # fmt: skip
            ranks, started = Ranks(config, place, alone=name == "one"), time.monotonic()
            trainer = Trainer(model, config, data=data, out=Path(scratch) / "run", device=str(place), ranks=ranks)
            held = torch.cuda.memory_allocated() if cuda else 0
            times, losses = [], []
            for _ in range(WARM + 3):
                begun = time.monotonic()
                terms, _ = trainer._update()
                trainer.step += 1
                losses.append(float(terms.next_token))  # waits for the device
                times.append(time.monotonic() - begun)
                if number == 0:
                    print(f"{name}: step {len(times)} took {times[-1]:.2f} s", file=sys.stderr, flush=True)
                if cuda and len(times) == WARM:
                    torch.cuda.reset_peak_memory_stats()
            took, tokens = sorted(times[WARM:])[1], rows * accumulate * config.row_tokens
            one_s = took if name == "one" else one_s
            mfu = training_flops(model, config.row_tokens) * tokens / one_s / PEAKS["H200"] if one_s else 0.35
            shape = {"tokens": tokens, "row": config.row_tokens, "rows": rows, "utilised": mfu}
            shape |= {"ordered": config.grad_sync == "fp32_ordered"}
            dry = layout(model, ranks.size, 1, config.ep, 1, **shape)
            peak = torch.cuda.max_memory_allocated() if cuda else 0
            row = {
                "bench": "worlds", "case": name, "size": size, "processes": ranks.size, **settings, "tokens": tokens,
                "ms": took * 1e3, "tokens_per_s": tokens / took, "speedup": one_s / took if one_s else None,
                "losses": losses, "dry_run_ms": dry.step_s * 1e3, "dry_run_from_mfu": mfu,
                "dry_run_experts_ms": dry.experts_s * 1e3, "dry_run_sync_ms": dry.sync_s * 1e3,
                "weights_gb": held / 1e9, "peak_gb": peak / 1e9, "dry_run_gb": dry.bytes / 1e9,
                "dry_run_state_gb": (dry.weights + dry.gradients + dry.optimizer) / 1e9,
                "steps_s": times, "whole_s": time.monotonic() - started,
                "device": torch.cuda.get_device_name() if cuda else "CPU",
            }  # fmt: skip
            if number == 0:
                say(row)
            busy = exchanged(trainer) if cuda and ranks.size > 1 else {}  # after the row: it may not come to its end
            if number == 0 and busy:
                say({"bench": "worlds, one step profiled", "case": name, **busy})
            del trainer
            gc.collect()  # it and what it calls back hold each other, and with them weights, momentum and gradients
            if cuda:
                torch.cuda.empty_cache()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def served(data: Path, *, device: str, tokens: int, rows: int) -> None:
    """Compare training's quantised forward over held-out rows with prompts of the export, sample by sample."""
    config = TrainConfig(
        steps=10, batch_rows=rows, row_tokens=tokens, sparse_from=0, quantise_from=0, lr=1e-4, warmup_steps=0
    )
    with tempfile.TemporaryDirectory() as scratch:
        out, names = Path(scratch), Path("models/nano")
        trainer = Trainer(nano(), config, data=data, out=out / "run", device=device, tokenizer=names, start="nano")
        trainer._update()
        trainer.export(out / "model")
        batch = next(trainer._packed(trainer.heldout, 0, {"docs": 1}, 0).epoch())
        prepared = prepare(trainer.model, *(torch.from_numpy(part).to(trainer.device) for part in batch), dense=False)
        streams = trainer.forward.run(prepared.step, prepared.cache, [])
        trained = trainer.model.logits(trainer.forward.collapse(trainer.model, streams)).detach().cpu()
        server = load_model(out / "model", mode="released")
    plan = CacheLayout(server.config, "released")
    weights = Weights(server.config, torch.device(device)).fill((n, t) for n, t, _ in server.released_tensors())
    table, apart = np.arange(plan.pages_for(tokens), dtype=np.int32), []
    sizes = ((len(table), plan.page_bytes), (2, plan.slot_bytes))
    for row, number in ((r, n) for r, own in enumerate(batch.segments) for n in range(own.max() + 1)):
        at = np.flatnonzero(batch.segments[row] == number)
        pools = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]
        forward = CudaForward(weights, plan, *pools, positions=tokens)
        output = forward.forward([Span(batch.ids[row, at], 0, 1, table, 0, len(at))])
        got, want, aims = torch.tensor(output.logits), trained[row, at], torch.from_numpy(batch.targets[row, at])
        asked = aims >= 0
        chances = [x.log_softmax(-1)[asked].gather(1, aims[asked, None]) for x in (got, want)]
        level = [x - x.mean(-1, keepdim=True) for x in (got, want)]
        apart.append([len(at), *(float(x) for x in (
            (level[0] - level[1]).norm() / level[1].norm(), (got.argmax(-1) == want.argmax(-1)).float().mean(),
            (chances[0] - chances[1]).abs().mean(), chances[0].mean(), chances[1].mean(),
        ))])  # fmt: skip
    counts, *rest = np.array(apart).T
    names = ("logits_apart", "same_best", "logprob_apart", "served_logprob", "trained_logprob")
    means = {name: float(values @ counts / counts.sum()) for name, values in zip(names, rest, strict=True)}
    shape = {"device": device, "samples": len(apart), "tokens": int(counts.sum())}
    say({"bench": "trainer beside server", **shape, **means})


def everything() -> None:
    """Device tests of the training kernels, their figures, then S and M, beside a plain residual and in FP8."""
    names = ("mhc", "training_attention", "index_training", "compressor", "grouped_experts", "norm_rope",
             "cross_entropy", "fp8_product")  # fmt: skip
    tests = [f"tests/kernels/test_{name}.py" for name in names]
    runs = [["-m", "pytest", "-q", "-m", "gpu", *tests], ["-m", "benchmarks.training", "kernels"]]
    for size, rows in (("S", 64), ("M", 32)):
        shape = ["--size", size, "--rows", str(rows), "--accumulate", str(256 // rows)]
        variants = ([], ["--plain"], ["--sparse"], ["--precision", "fp8"], ["--sparse", "--released"])
        runs += [["-m", "benchmarks.training", "steps", *shape, *more] for more in variants]
    for run in runs:
        print("$ python", *run, file=sys.stderr, flush=True)
        subprocess.run([sys.executable, *run], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernels", "steps", "worlds", "served", "all"))
    parser.add_argument("--tokens", type=int, default=32768, help="of the kernels' inputs")
    parser.add_argument("--size", choices=tuple(SIZES), default="S")
    parser.add_argument("--rows", type=int, default=16, help="rows of 2,048 tokens a micro-batch")
    parser.add_argument("--accumulate", type=int, default=16, help="micro-batches a step: 16 x 16 rows are 0.5M tokens")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--profile", type=int, default=0, help="kernels of a step to list, the longest first")
    for flag in ("sparse", "plain", "released"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--cases", default="", help="of `worlds`, semicolon between (default: all)")
    parser.add_argument("--data", type=Path, help="of `served`: shards with nano's tokenizer")
    parser.add_argument("--row", type=int, default=2048, help="of `served`: tokens a row")
    parser.add_argument("--device", default="cuda", help="of `worlds` and `served`; cpu to try it")
    args = parser.parse_args()
    if args.what == "worlds" and "LOCAL_RANK" not in os.environ:
        sys.exit("benchmarks.training worlds: start it with torchrun, a process a device")
    if not torch.cuda.is_available() and (args.what not in ("worlds", "served") or args.device != "cpu"):
        sys.exit("benchmarks.training: no CUDA device here; speed is only measured where it is used")
    if args.what == "all":
        everything()
    elif args.what == "kernels":
        kernels(args.tokens)
    elif args.what == "served":
        served(args.data, device=args.device, tokens=args.row, rows=args.rows)
    elif args.what == "worlds":
        worlds(args.size, **{name: getattr(args, name) for name in ("device", "rows", "accumulate", "cases")})
    else:
        names = ("precision", "rows", "accumulate", "sparse", "plain", "released", "profile")
        steps(args.size, **{name: getattr(args, name) for name in names})


if __name__ == "__main__":
    main()
