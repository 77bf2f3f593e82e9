"""Distance of the forward from two independent ones: `transformers` (reference mode) and the released code's vectors.

python -m benchmarks.parity [--cases 24] [--json FILE]

The random configurations, weights and schedules are those of the test of the same name; here the largest difference
is reported instead of bounded. The golden vectors are what the released inference code computes (tests/golden).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tests.model.test_transformers_parity import Margins, load_oracle, make_case, random_model

from pelagos.evals.commit import commit
from pelagos.load import load_model, save_model
from pelagos.model import ContiguousCache

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "released"
PREFILL = 137  # the golden decode starts here
NEAR = 1e-3


def main() -> int:
    """Measure both distances and print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    result = {
        "bench": "parity",
        "command": "python -m benchmarks.parity",
        "device": f"CPU, {platform.machine()}, one thread",
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "reference": against_transformers(args.cases),
        "released": against_golden(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


@torch.no_grad()
def against_transformers(cases: int) -> dict[str, Any]:
    """Largest |logit difference| over `cases` configurations, in one pass and chunk by chunk; ties are left out."""
    worst = {"one_pass": 0.0, "chunks": 0.0}
    positions = ties = 0
    for seed in range(cases):
        case = make_case(seed)
        model = random_model(case)
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, Path(folder), exact=True)
            oracle = load_oracle(Path(folder))
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(case.config.vocab_size, (case.batch, case.cuts[-1]), generator=generator)
        margins = Margins(oracle, case.config.index_topk)
        wanted = oracle(ids, use_cache=False).logits
        tied = margins.ties(ids.shape)
        cache = ContiguousCache(case.config)
        chunks = [model(ids[:, a:b], cache) for a, b in zip((0, *case.cuts), case.cuts, strict=False)]
        for way, ours in (("one_pass", model(ids)), ("chunks", torch.cat(chunks, 1))):
            difference = (ours - wanted).abs().amax(-1).masked_fill(tied, 0.0)
            worst[way] = max(worst[way], float(difference.max()))
        positions, ties = positions + ids.numel(), ties + int(tied.sum())
    return {"max_difference": worst, "configurations": cases, "positions": positions, "ties": ties}


@torch.no_grad()
def against_golden() -> dict[str, Any]:
    """Distances from the released code's logits, prefill of 300 tokens and 163 decoded one by one."""
    model = load_model(GOLDEN, mode="released")
    vectors = load_file(GOLDEN / "golden.safetensors")
    ids = vectors["ids"]
    cache = ContiguousCache(model.config)
    model(ids[:, :PREFILL], cache)
    decoded = [model(ids[:, t : t + 1], cache)[0] for t in range(PREFILL, ids.shape[1])]
    pairs = {
        "prefill": (model(ids)[0], vectors["logits"]),
        "decode": (torch.cat(decoded), vectors["decode_logits"]),
    }
    return {way: distances(ours - theirs) for way, (ours, theirs) in pairs.items()}


def distances(difference: torch.Tensor) -> dict[str, float]:
    """Median and maximum of |difference| (S, V), and the share of positions that stay within NEAR."""
    difference = difference.abs()
    near = (difference.amax(-1) <= NEAR).double().mean()
    return {"median": float(difference.median()), "max": float(difference.max()), "positions_within_1e-3": float(near)}


if __name__ == "__main__":
    raise SystemExit(main())
