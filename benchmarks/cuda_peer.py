"""`transformers` on six layers of V4-Flash's width on one CUDA device: the other side of `bench decode|prefill`.

python -m benchmarks.cuda_peer [--contexts 2048,8192] [--tokens 16] [--experts grouped_mm] [--device cuda] [--small]

Two window, two CSA and two HCA layers, BF16, random weights; one JSON line a figure. Out of memory is a figure too.
`--small` shrinks every width, to try the script where there is no such device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from pelagos.evals.engine_bench import stamp

LAYERS = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
SMALL = {
    "hidden_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 8, "head_dim": 128, "q_lora_rank": 128,
    "o_groups": 2, "o_lora_rank": 128, "n_routed_experts": 16, "vocab_size": 1024, "index_n_heads": 8,
    "index_head_dim": 64, "index_topk": 64,
}  # fmt: skip


def main() -> int:
    """Build the model in device memory, measure prefill and decode at each context, print a line each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_peer", description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="2048,8192")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--experts", default="grouped_mm")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    import transformers
    from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

    sizes: dict[str, Any] = SMALL if args.small else {}
    layers = [kind for kind in LAYERS for _ in range(2)]
    config = DeepseekV4Config(num_hidden_layers=6, layer_types=layers, mlp_layer_types=["moe"] * 6, **sizes)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device), torch.inference_mode():
        model = DeepseekV4ForCausalLM(config).eval()
        model.set_experts_implementation(args.experts)
    marks = stamp("python -m benchmarks.cuda_peer " + " ".join(sys.argv[1:]))
    marks |= {"transformers": transformers.__version__, "weights": "random", "experts": args.experts}
    marks |= {"device": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    for context in (int(each) for each in args.contexts.split(",")):
        for batch in (int(each) for each in args.batches.split(",")):
            row = {"bench": "peer", "case": f"transformers layers=6 context={context} batch={batch}"}
            try:
                found = measure(model, batch, context, args.tokens)
            except torch.OutOfMemoryError:
                found = {"error": "out of memory"}
            print(json.dumps(row | found | marks), flush=True)
    return 0


@torch.inference_mode()
def measure(model: Any, batch: int, context: int, tokens: int) -> dict[str, float]:
    """Milliseconds of a prefill of (batch, context) tokens after one that warms up, and of a decode step after it."""
    import transformers

    def wait() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    ids = torch.randint(3, model.config.vocab_size, (batch, context), device=model.device)
    for _ in range(2):
        past = transformers.DynamicCache(config=model.config)
        wait()
        started = time.perf_counter()
        logits = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits
        wait()
        prefill = time.perf_counter() - started
    gaps = []
    for _ in range(tokens):
        token = logits[:, -1].argmax(-1, keepdim=True)
        wait()
        started = time.perf_counter()
        logits = model(token, past_key_values=past, use_cache=True, logits_to_keep=1).logits
        wait()
        gaps.append(time.perf_counter() - started)
    return {
        "prefill_ms": round(1e3 * prefill, 1), "prefill_tok_s": round(batch * context / prefill),
        "decode_ms": round(1e3 * statistics.median(gaps), 2),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
