"""Drafts on a device: steps a second, tokens a step and tokens a second by depth and batch; a JSON line each.

    python -m benchmarks.cuda_speculation [--model nano] [--batches 1,8] [--depths 0,1,2,3,4,adaptive]

The model's own weights and real text, greedy, released mode: the captured step on CUDA. Of three runs after one that is
not counted (it compiles and captures) the one in the middle. A step's verification and its draft calls are both in its
time. `--device cpu` only shows that it runs.
"""

from __future__ import annotations

import argparse
import json

import torch

from pelagos.chat import Tokenizer
from pelagos.checkpoint import resolve_model
from pelagos.engine import EngineOptions, build_engine
from pelagos.evals.commit import commit
from pelagos.evals.engine_bench import decode_window, kv_budget, text_ids
from pelagos.load import load_served

PROMPT, RUNS = 400, 3
SETTLE = 24  # tokens more than asked for, that outlast the others' prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--depths", default="0,1,2,3,4,adaptive")
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    batches = [int(each) for each in args.batches.split(",")]
    model = load_served(args.model, mode="released", device=args.device)
    ids = text_ids(Tokenizer.load(resolve_model(args.model)), max(batches) * PROMPT)
    prompts = [ids[at : at + PROMPT] for at in range(0, len(ids), PROMPT)]
    room = kv_budget(model.config, max(batches), max(1024, PROMPT + args.tokens + SETTLE + 256), layout="released")
    for depth in args.depths.split(","):
        engine = build_engine(model, None, EngineOptions(
            chunk_tokens=1024, max_requests=max(batches), kv_bytes=room, prefix_cache=False, preemption="recompute",
            speculation=True if depth == "adaptive" else int(depth),
        ))  # fmt: skip
        for batch in batches:
            runs = [decode_window(engine, prompts[:batch], tokens=args.tokens, settle=SETTLE) for _ in range(RUNS + 1)]
            run = sorted(runs[1:], key=lambda each: each.tokens_per_s)[RUNS // 2]
            print(json.dumps({
                "bench": "cuda_speculation", "model": args.model, "commit": commit(), "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device, "batch": batch,
                "depth": depth, "tok_s": round(run.tokens_per_s, 1), "steps_s": round(run.steps_per_s, 1),
                "tokens_a_step": round(run.emitted / (run.emitted - run.accepted), 3), "drafted": run.drafted,
                "accepted": run.accepted, "tok_s_of_all": [round(each.tokens_per_s, 1) for each in runs[1:]],
                "path": engine.numeric_path,
            }), flush=True)  # fmt: skip
        engine.close()


if __name__ == "__main__":
    main()
