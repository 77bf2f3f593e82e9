"""The engine on CUDA: one prompt of a million tokens in chunks of two sizes, and its memory against the plan.

python -m benchmarks.cuda_engine [--model nano] [--tokens 1048568] [--chunks 512,4096] [--json FILE]

The prompt is drawn at random, so only torch, triton, numpy and safetensors are needed. Both runs have to give the same
tokens and log-probabilities and leave the same bytes in every page, and the device memory they take has to be what was
planned, within 2 %. A prompt that does not fit has to be refused. Released mode, as served on a device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pelagos.checkpoint import resolve_model
from pelagos.engine import EngineOptions, LocalEngine, SamplingParams, build_engine
from pelagos.engine.runner import weight_bytes
from pelagos.errors import CapacityError, ContextLengthError
from pelagos.evals.engine_bench import Timed, kv_budget, stamp
from pelagos.load import load_model

OUTPUT_TOKENS = 8
SLACK_FRACTION, SLACK_BYTES = 0.02, 64 << 20  # of the plan, and what the libraries hold besides
Figures = dict[str, Any]


def main() -> int:
    """Run both chunk sizes, print one JSON object; the exit code says whether every check held."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_engine", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tokens", type=int, default=(1 << 20) - OUTPUT_TOKENS)
    parser.add_argument("--chunks", default="512,4096")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    folder = resolve_model(args.model)
    model = load_model(folder, mode="released", dtype=torch.bfloat16, device="cuda")
    runs = {chunk: run(model, args.tokens, int(chunk)) for chunk in args.chunks.split(",")}
    same = len({(each["outputs"], each["pages"]) for each in runs.values()}) == 1
    found = all(each["pages"].startswith(f"{args.tokens // 128} pages") for each in runs.values())
    passed = same and found and all(each["within_plan"] and each["refused"] for each in runs.values())
    result = stamp("python -m benchmarks.cuda_engine " + " ".join(sys.argv[1:])) | {
        "bench": "cuda_engine", "model": args.model, "tokens": args.tokens, "mode": "released",
        "device": torch.cuda.get_device_name(), "runs": runs, "same_bits": same, "passed": passed,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    return int(not passed)


def run(model: Any, tokens: int, chunk: int) -> Figures:
    """Serve the prompt in chunks of one size by an engine of its own."""
    prompt = np.random.default_rng(0).integers(3, model.config.vocab_size, tokens).tolist()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    room = kv_budget(model.config, 1, tokens + 1024)
    engine = build_engine(
        model, None, EngineOptions(chunk_tokens=chunk, max_requests=1, kv_bytes=room, speculation=False)
    )
    wanted = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True, logprobs=True)
    started = time.perf_counter()
    timed = Timed(engine, prompt, wanted)
    steps = timed.finish()
    seconds = time.perf_counter() - started
    planned = engine.stats().bytes_planned
    expected = planned["total_bytes"] - weight_bytes(model)
    peak = torch.cuda.max_memory_allocated() - before
    try:
        engine.submit([*prompt, *prompt], wanted)
        refused = False
    except (CapacityError, ContextLengthError):
        refused = True
    assert isinstance(engine, LocalEngine)
    pages = page_digest(engine, prompt)
    engine.close()
    print(f"chunk {chunk}: {seconds:.1f} s, first token {timed.first_token_s:.1f} s", file=sys.stderr, flush=True)
    return {
        "seconds": round(seconds, 2), "prefill_tok_s": round(tokens / timed.first_token_s),
        "path": engine.numeric_path,
        "ms_per_token": round(1e3 * (timed.times[-1] - timed.times[0]) / (len(timed.times) - 1), 3),
        "outputs": hashlib.sha256(repr([(s.token_id, s.logprob) for s in steps]).encode()).hexdigest(),
        "pages": pages, "planned": planned, "expected_bytes": expected, "peak_bytes": peak, "refused": refused,
        "within_plan": abs(peak - expected) <= SLACK_FRACTION * expected + SLACK_BYTES,
    }  # fmt: skip


def page_digest(engine: LocalEngine, prompt: list[int]) -> str:
    """The digest of the prompt's whole pages in the order of their positions, as the prefix cache still holds them."""
    digest = hashlib.sha256()
    found = 0
    for key in engine._prefix.chain("", np.asarray(prompt)).keys:
        page = engine._pool.lookup(key)
        if page is not None:
            digest.update(engine._pools.pages[page].cpu().numpy().tobytes())
            found += 1
    return f"{found} pages {digest.hexdigest()}"


if __name__ == "__main__":
    raise SystemExit(main())
