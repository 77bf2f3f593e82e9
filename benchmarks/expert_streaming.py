"""nano with most experts on disk, by budget: decode speed at batch 1, bytes read a token, hit rate; one JSON line each.

python benchmarks/expert_streaming.py --budgets 4M,8M,16M,36M
"""

from __future__ import annotations

import argparse
import json
import time

from pelagos import LLM
from pelagos.cli.options import parse_tokens
from pelagos.engine.sampler import SamplingParams
from pelagos.model.streaming import store_of

PROMPT = "def fibonacci(n: int) -> int:\n    "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="4M,8M,16M,36M")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--mode", default="reference")
    args = parser.parse_args()
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    first: list[int] = []
    for budget in [None, *args.budgets.split(",")]:
        size = None if budget is None else parse_tokens(budget, "budgets")
        llm = LLM("nano", mode=args.mode, expert_bytes=size, speculation=False, prefix_cache=False)
        llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8))
        begun = time.perf_counter()
        ids = llm.generate(PROMPT, params)[0].token_ids
        took = time.perf_counter() - begun
        first = first or ids
        store = store_of(llm.model)
        row = {"bench": "expert_streaming", "expert_bytes": budget, "tok_s": round(args.tokens / took, 1)}
        row |= {"same_tokens": ids == first} | ({} if store is None else store.report())
        print(json.dumps(row), flush=True)
        llm.close()


if __name__ == "__main__":
    main()
