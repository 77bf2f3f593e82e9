"""All decode kernels compile for the targets we name, without a device: compiled, not run."""

from __future__ import annotations

import pytest
from triton_cases import run

SCRIPT = """
from triton_cases import compile_all
from pelagos.kernels.triton import fp4_experts, router, site, skinny_gemm

backend, arch, warp = {target}
made_for = "ptx" if backend == "cuda" else "any"
BF16, F32, U8, I32, I16 = "*bf16", "*fp32", "*u8", "*i32", "*i16"
TYPES = dict(
    y=BF16, streams=BF16, out=BF16, terms=BF16, norm=BF16, normed=BF16, x=BF16, planes=U8, hidden=U8, hs=U8,
    spread=U8, xs=U8,
    post=F32, comb=F32, fn=F32, base=F32, scale=F32, parts=F32, weights=F32, partial=F32,
    codes=U8, scales=U8, weight=U8, weight_scales=U8, w=U8, chosen=I32, table=I32, slot_expert=I32, slot_rows=I32,
    arrived=I32, homes="*i64", pairs=U8, gate=BF16, bias=F32, ids=I32, shared=F32, shared_partial=F32, shared_codes=U8,
    shared_scales=U8, shared_w=U8, shared_w_scales=U8, wide_weight=BF16, out_scales=U8,
    scaling="fp32", eps="fp32", norm_eps="fp32", limit="fp32", mix_eps="fp32", mix_norm_eps="fp32", mix_parts=F32,
    mix_base=F32, mix_scale=F32,
)
SITE = dict(WIDTH=512, HAS_POST=True, TARGET=made_for)
MIX = dict(y=F32, routed=F32)
FINISH = dict(ITERS=20, FIRST=1, WIDTH=512, PARTS=4, PADDED=4, TARGET=made_for)
EXPERT = dict(HIDDEN=False, ROWS=64, PARTS=2, SINGLE=False, WIDE=16, DEPTH=512, OUTPUTS=256, UNITS=1, TALL=False,
              TARGET=made_for)
HERE, THERE = dict(PLACED=False), dict(PLACED=True)
TILE = dict(DEPTH=512, PART=256, PARTS=2, TALL=64, WIDE=16, TARGET=made_for)
PRODUCT = TILE | dict(QUANTISE=False, LEFT=False)
CHOICE = dict(PICKS=6, BY_TABLE=False, TARGET=made_for)
LEFT = dict(ITERS=20, SUMS=4)
ROUTER = LEFT | dict(DEPTH=512, GATE_PARTS=1, PARTS=2, PADDED=64, CHOOSE=True, CUT=1, COLUMNS=1024, TALL=64, WIDE=16,
                     **CHOICE)
E4M3 = "*fp8e4nv" if backend == "cuda" else U8
FP8 = dict(codes=E4M3, weight=E4M3)
MIXED = dict(x=E4M3, scale=U8, shared_codes=E4M3, shared_w=E4M3)
GATES = dict(x=E4M3, scale=U8, shared_w=E4M3)
ROUTED = dict(table="*i64", codes=E4M3, shared=E4M3, shared_scales=U8, out=F32)
KEPT = dict.fromkeys(
    "turn entry_turn ape kv_ring score_ring index_ape index_kv_ring index_score_ring head_weights".split(), F32
)
KEPT |= dict.fromkeys("positions places firsts owners table frozens".split(), I32)
KEPT |= dict.fromkeys("q_norm kv_norm norm index_norm index_q".split(), BF16)
KEPT |= dict.fromkeys("latent_codes latent_scales window main index".split(), U8)
KEPT |= dict.fromkeys("head_factor factor eps".split(), "fp32") | dict(out=F32)
KEEP = dict(LATENT=128, PADDED=128, WIDTH=128, ROPE=64, RING=131, SCALES=8, PAGE=128, SLOTS=8, HEADS=16,
            HEADS_PADDED=16, ROUNDS=6, TARGET=made_for)
CSA, HCA = KEEP | dict(RATIO=4, SPAN=256, TAIL=11, INDEX=64), KEEP | dict(RATIO=128, SPAN=128, TAIL=131, INDEX=0)
KERNELS = [
    *((site._mix_token_kernel, dict(EACH=1, LAST=2, PICKED=6, PARTS=1, ONE=one, PADDED=4, **SITE), MIX)
      for one in (False, True)),
    (site._split_kernel, dict(WIDTH=512, TARGET=made_for), dict()),
    (site._mix_kernel, dict(TILE=64, STEP=32, SPAN=512, STAGES=3, **SITE), dict()),
    (site._finish_kernel, dict(TILE=1, RUN=1, **FINISH), dict(num_warps=1)),
    (site._finish_kernel, dict(TILE=16, RUN=4, **FINISH), dict()),
    (fp4_experts._plan_kernel, dict(BY_PICK=True, PICKS=16, COLUMNS=1024, CUT=1, TARGET=made_for), dict()),
    (fp4_experts._product_kernel, dict(SHARED=6, FP8_PARTS=0, COLUMNS=32, **THERE, **EXPERT), MIXED),
    (fp4_experts._product_kernel, dict(SHARED=6, FP8_PARTS=0, COLUMNS=32, **HERE, **EXPERT) | dict(UNITS=2), MIXED),
    (fp4_experts._product_kernel,
     dict(SHARED=1, FP8_PARTS=2, COLUMNS=32, **HERE, **EXPERT) | dict(UNITS=4, TALL=True, PARTS=1, WIDE=32), MIXED),
    (fp4_experts._product_kernel, dict(SHARED=1, FP8_PARTS=2, COLUMNS=16, **HERE, **EXPERT), MIXED),
    (fp4_experts._product_kernel,
     dict(SHARED=6, FP8_PARTS=0, **HERE, **EXPERT) | dict(SINGLE=True, HIDDEN=True, COLUMNS=16), GATES),
    (fp4_experts._hidden_kernel, dict(INNER=256, PARTS=2, TARGET=made_for), dict()),
    (fp4_experts._combine_kernel,
     dict(PICKED=6, WIDTH=512, PARTS=2, FP8_PARTS=2, COLUMNS=1024, TARGET=made_for), dict()),
    (skinny_gemm._plain_kernel, PRODUCT, FP8),
    (skinny_gemm._plain_kernel, PRODUCT | dict(PART=512, PARTS=1, TALL=128, WIDE=64), FP8),
    (skinny_gemm._plain_kernel, PRODUCT | dict(LEFT=True), FP8 | dict(out=F32)),
    (skinny_gemm._plain_kernel, PRODUCT | dict(QUANTISE=True), FP8 | dict(out=U8)),
    (skinny_gemm._plain_kernel, PRODUCT | dict(QUANTISE=True), dict(codes=BF16, out=U8)),
    (skinny_gemm._merged_kernel, TILE | LEFT, FP8 | dict(out=F32)),
    *((skinny_gemm._kept_kernel, TILE | LEFT | each, FP8 | KEPT) for each in (CSA, HCA)),
    (skinny_gemm._query_kernel, dict(DEPTH=512, INDEX=64, ROPE=64, ROUNDS=6, TALL=64, WIDE=16, TARGET=made_for), FP8 |
     KEPT),
    (router._route_kernel, ROUTER | dict(EXPERTS=64), ROUTED),
    (router._choose_kernel, dict(PARTS=2, EXPERTS=64, **CHOICE), dict(table="*i64")),
]
compile_all({target}, KERNELS, TYPES)
"""


@pytest.mark.parametrize(
    "target", [("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64), ("hip", "gfx950", 64)], ids=str
)
def test_kernels_compile(target, tmp_path):
    path = tmp_path / "compile_script.py"
    path.write_text(SCRIPT.format(target=target), encoding="utf-8")
    assert run(f"import runpy; runpy.run_path({str(path)!r})", interpret=False) == "compiled 25\n"
