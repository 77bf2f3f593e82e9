"""Decode speed of a checkpoint on this CPU, beside `transformers` on the same weights in the same process.

python -m benchmarks.decode [--model nano] [--prompt 512] [--tokens 128] [--repeats 5] [--threads 2] [--json FILE]

Float32, batch 1, greedy, cache on; the median of the repeats is the figure. The floor is the time to read the active
weights once at the measured read rate of this machine. The other side runs each of its experts implementations and
its fastest counts. Both sides must produce the same tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pelagos import cost
from pelagos.checkpoint import resolve_model
from pelagos.load import load_model
from pelagos.model import ContiguousCache

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
Step = Callable[[torch.Tensor], torch.Tensor]


def main() -> int:
    """Measure both sides and print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = resolve_model(args.model)
    model = load_model(path)
    prompt = torch.randint(model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    sides: dict[str, list[float]] = {}
    outputs: dict[str, list[int]] = {}
    oracle = load_oracle(path)
    makers: dict[str, Callable[[], Step]] = {"pelagos": lambda: our_step(model)}
    for name in IMPLEMENTATIONS:
        makers[f"transformers {name}"] = lambda name=name: their_step(oracle, name)
    with torch.inference_mode():
        for repeat in range(args.repeats + 1):  # the first warms up
            for side, make in makers.items():
                seconds, tokens = decode(make(), prompt, args.tokens)
                if outputs.setdefault(side, tokens) != tokens:
                    raise SystemExit(f"{side}: two runs gave different tokens")
                if repeat:
                    sides.setdefault(side, []).append(seconds / args.tokens)
    median = {side: statistics.median(times) for side, times in sides.items()}
    peer = min((s for s in median if s != "pelagos"), key=lambda s: median[s])
    active_bytes = cost.active_parameters(model.config) * 4
    floor = active_bytes / read_rate()
    result = {
        "bench": "decode",
        "device": platform.processor() or platform.machine(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "command": "python -m benchmarks.decode " + " ".join(sys.argv[1:]),
        "torch": torch.__version__,
        "threads": args.threads,
        "prompt": args.prompt,
        "tokens": args.tokens,
        "ms_per_token": {side: round(1e3 * t, 3) for side, t in median.items()},
        "tokens_per_s": {side: round(1 / t, 1) for side, t in median.items()},
        "spread_ms": {side: [round(1e3 * min(t), 3), round(1e3 * max(t), 3)] for side, t in sides.items()},
        "peer": peer,
        "speedup": round(median[peer] / median["pelagos"], 2),
        "same_tokens": outputs["pelagos"] == outputs[peer],
        "active_bytes": active_bytes,
        "floor_ms": round(1e3 * floor, 3),
        "floor_frac": round(floor / median["pelagos"], 3),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


def decode(step: Step, prompt: torch.Tensor, count: int) -> tuple[float, list[int]]:
    """Prefill outside the clock, then time `count` greedy steps."""
    token = step(prompt).argmax(-1, keepdim=True)
    tokens = []
    started = time.perf_counter()
    for _ in range(count):
        token = step(token).argmax(-1, keepdim=True)
        tokens.append(int(token))
    return time.perf_counter() - started, tokens


def our_step(model: Any) -> Step:
    """A fresh sequence on our side: tokens (1, S) -> last logits (1, V)."""
    cache = ContiguousCache(model.config)
    return lambda ids: model(ids, cache, last_only=True)[:, -1]


def their_step(oracle: Any, implementation: str) -> Step:
    """A fresh sequence on the other side, with one of its experts implementations."""
    import transformers

    oracle.set_experts_implementation(implementation)
    past = transformers.DynamicCache(config=oracle.config)
    return lambda ids: oracle(ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1]


def load_oracle(path: Path) -> Any:
    """Load the same file in transformers, every weight expanded to float32."""
    import transformers
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

    settings = transformers.FineGrainedFP8Config(dequantize=True)
    oracle = DeepseekV4ForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=settings)
    return oracle.float().eval()


def read_rate() -> float:
    """Bytes per second this machine reads, measured on 400 MB, best of 5."""
    block = torch.ones(100_000_000)
    best = min(timed(block.sum) for _ in range(5))
    return block.numel() * 4 / best


def timed(call: Callable[[], object]) -> float:
    """Seconds one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
