"""Decode steps of a model divided over the processes that torchrun starts, one JSON line on rank 0.

    torchrun --standalone --nproc-per-node 2 benchmarks/group_decode.py --context 8K --batch 1

Random weights and caches. On a CPU (`--device cpu --shape nano`, experts of 256) it only shows that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time

import numpy as np
import torch

from pelagos.cli.counts import parse_tokens
from pelagos.evals.step_bench import cut_config, fill_caches
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.model.cuda_forward import BUCKETS
from pelagos.model.cuda_group import GroupForward, cut_width
from pelagos.model.cuda_weights import Weights
from pelagos.parallel import Group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="flash")
    parser.add_argument("--layers")
    parser.add_argument("--context", default="8K")
    parser.add_argument("--batch", type=int, default=1, help="sequences on all ranks together")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device, context = torch.device(args.device), parse_tokens(args.context, "context")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    config = cut_config(args.shape, args.layers)
    if args.shape == "nano":
        config = dataclasses.replace(config, moe_intermediate_size=256)
    group = Group(device, 2 * BUCKETS[-1] * config.hidden_size)
    config = cut_width(config, group.size)
    layout = CacheLayout(config, "released", 0)
    weights = Weights(config, device).fill_random()
    each, own = layout.pages_for(context), -(-args.batch // group.size)
    pages = torch.zeros((own * each, layout.page_bytes), dtype=torch.uint8, device=device)
    slots = torch.zeros((own, layout.slot_bytes), dtype=torch.uint8, device=device)
    fill_caches(layout, pages, slots)
    forward = GroupForward(weights, layout, pages, slots, group, positions=context)
    tables = [(np.arange(each) + each * (i // group.size)) * group.size + i % group.size for i in range(args.batch)]
    spans = [
        Span(np.array([7 + i]), context - 2, i, tables[i].astype(np.int32), decode=True) for i in range(args.batch)
    ]
    times = []
    for _ in range(args.steps + 3):
        begun = time.perf_counter()
        for _ in forward.launch(spans):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    took = max(group.gather(statistics.median(times[3:])))
    if group.rank == 0:
        case = f"{args.shape} layers={config.num_hidden_layers} context={context} batch={args.batch} ranks={group.size}"
        row = {"bench": "group_decode", "case": case, "device": str(device), "us": round(took * 1e6, 1),
               "tok_s": round(args.batch / took, 1), "weight_bytes": weights.bytes}  # fmt: skip
        print(json.dumps(row), flush=True)
    group.close()


if __name__ == "__main__":
    main()
