"""All prompt kernels compile for the targets we name, without a device: compiled, not run."""

from __future__ import annotations

import pytest
from triton_cases import hazards, run

SCRIPT = """
from triton_cases import compile_all
from pelagos.kernels.triton import hopper_attention, hopper_experts
from pelagos.kernels.triton import prefill_attention, prefill_cache, prefill_experts, prefill_indexer, prefill_products

backend, arch, warp = {target}
made_for = "ptx" if backend == "cuda" else "any"
CODE = "*fp8e4nv" if backend == "cuda" else "*u8"
BF16, F32, U8, I32 = "*bf16", "*fp32", "*u8", "*i32"
TYPES = dict.fromkeys(("x", "q", "keys", "out", "up", "down", "shared", "first", "norm", "kv_norm", "index_norm"), BF16)
TYPES |= dict.fromkeys(("xs", "weights", "hs", "sink", "turn", "entry_turn", "factors", "ape", "index_ape", "kv_ring",
                        "score_ring", "index_kv_ring", "index_score_ring", "source", "index_source",
                        "head_weights"), F32)
TYPES |= dict.fromkeys(("codes", "scales", "w", "base", "hidden", "turned", "pool", "main", "index", "window"), U8)
TYPES |= dict.fromkeys(("order", "tile_expert", "tile_first", "tile_end", "chosen", "counts", "totals", "place_of",
                        "ends", "positions", "places", "firsts", "owners", "table", "starts", "windows", "units",
                        "count", "seen", "blocks", "best", "old", "picks",
                        "old_scores", "best_scores"), I32)
TYPES |= dict.fromkeys(("limit", "eps", "factor"), "fp32") | {{"homes": "*i64"}}
STACKED = dict(SHARED=6, DEPTH=512, OUTPUTS=256, PLACED=False)
EXPERT = dict(TILE=64, TARGET=made_for)
ATTEND = dict(HEADS=64, PADDED=64, WIDTH=512, ROPE=64, SIZE=128, FAR=True, PICKS=512, TILE=64, TARGET=made_for)
PLACED = STACKED | dict(PLACED=True)
PLACE = dict(WIDTH=512, ROPE=64, SCALES=8, RATIO=4, SPAN=1024, TAIL=8, INDEX=128, TARGET=made_for)
KERNELS = [
    (prefill_experts._count_kernel, dict(EXPERTS=256, PADDED=256, PICKS=256), dict(picks="i32")),
    (prefill_experts._offset_kernel, dict(BLOCKS=16, EXPERTS=256, PADDED=256, TILE=128, ALIGN=8),
     dict(blocks="i32")),
    (prefill_experts._place_kernel, dict(EXPERTS=256, PICKS=256), dict(picks="i32")),
    (prefill_experts._turn_kernel, dict(PICKED=6, WIDTH=512, COLUMNS=512), {{}}),
    *((prefill_experts._product_kernel, each | EXPERT, dict(x=U8, scale=I32, num_warps=8, num_stages=2))
      for each in (STACKED, PLACED)),
    (prefill_experts._hidden_kernel, dict(INNER=256, GROUPS=8, TARGET=made_for), {{}}),
    (prefill_experts._combine_kernel, dict(PICKED=6, WIDTH=512, HAS_SHARED=True, COLUMNS=512, TARGET=made_for), {{}}),
    (prefill_attention._attend_kernel, ATTEND,
     dict(base=I32, scale="fp32", num_warps=8, num_stages=1 if backend == "hip" else 2)),
    (prefill_indexer._query_kernel, dict(HEADS=64, WIDTH=128), {{}}),
    (prefill_indexer._score_kernel, dict(CHUNK=8192, HEADS=64, PADDED=64, WIDTH=128, KEYS=128, TARGET=made_for),
     dict(q=CODE, keys=CODE, scales=F32, out=F32, base=I32)),
    (prefill_indexer._select_kernel, dict(CHUNK=1024, TOPK=512, FIRST=False), dict(scores=F32)),
    (prefill_products._factor_kernel, dict(TILE=64), dict(factors=F32, blocks="i32")),
    (prefill_products._quantise_kernel, dict(WIDTH=1024, COLUMNS=1024, NORM=True, SWIGLU=False, TARGET=made_for), {{}}),
    (prefill_cache._entry_kernel, dict(PAGE=128, SLOTS=8, ROUNDS=7, **PLACE), {{}}),
    (prefill_cache._row_kernel, dict(LATENT=1024, SIZE=128, RING=131, **PLACE), {{}}),
    (prefill_cache._decode_kernel, dict(WIDTH=512, SCALES=8, EACH=32, SIZE=0, ROWS=8), dict(base=I32)),
    (prefill_cache._index_kernel, dict(WIDTH=128, EACH=32, KEYS=32), dict(base=I32, scales=F32)),
]
HOPPER = [
    *((hopper_experts._product_kernel, each, dict(x=CODE, scale=U8, num_warps=4)) for each in (STACKED, PLACED)),
    (hopper_attention._attend_kernel, dict(HEADS=64, WIDTH=512, ROPE=64, SIZE=128, FAR=True, PICKS=512),
     dict(base=I32, scale="fp32", num_warps=8)),
]
compile_all({target}, KERNELS + HOPPER * (arch == 90), TYPES)
"""


@pytest.mark.parametrize(
    "target", [("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64), ("hip", "gfx950", 64)], ids=str
)
def test_kernels_compile(target, tmp_path):
    path = tmp_path / "compile_script.py"
    path.write_text(SCRIPT.format(target=target), encoding="utf-8")
    count = 21 if target[1] == 90 else 18
    assert run(f"import runpy; runpy.run_path({str(path)!r})", interpret=False) == f"compiled {count}\n"


@pytest.mark.parametrize(("fence", "found"), [("", ["no fence after a wait for copies"]), ("fence.proxy.async;", [])])
def test_a_wait_for_copies_without_a_fence_is_told(fence, found):
    copies = "$L1:\ncp.async.cg.shared [a], [b];\ncp.async.mbarrier.arrive.noinc.b64 [c];\n@p bra $L1;"
    products = (
        f"$L2:\nmbarrier.try_wait.b64 q, [c];\n{fence}\nwgmma.mma_async {{r}}, d, e;\nwgmma.wait_group 0;\n@p bra $L2;"
    )
    assert hazards(f"{copies}\n{products}") == found
