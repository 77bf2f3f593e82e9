"""The attention kernels compile for the targets we name, without a device: compiled, not run."""

from __future__ import annotations

import pytest
from triton_cases import run

SCRIPT = """
from triton_cases import compile_all
from pelagos.kernels.triton import cache_write, decode_attention, indexer, query

backend, arch, warp = {target}
width, latent, index, heads, blocks = {sizes}
made_for = "ptx" if backend == "cuda" else "any"
BF16, F32, U8, I32 = "*bf16", "*fp32", "*u8", "*i32"
TYPES = dict.fromkeys(
    ("projected turn entry_turn ape kv_ring score_ring index_ape index_kv_ring index_score_ring head_weights sink"
     " partial tops").split(), F32
) | dict.fromkeys("positions places firsts owners table frozens picks scores bounds found sizes arrived".split(), I32)
TYPES |= dict.fromkeys("q_norm kv_norm norm index_norm product q index_q stored".split(), BF16)
TYPES |= dict.fromkeys("stored_scales codes scales window main index pages slots".split(), U8)
TYPES |= {{"noted": "*i64"}} | dict.fromkeys("head_factor factor eps scale".split(), "fp32")
CSA = dict(RATIO=4, PICKED=512, WINDOW=128, BLOCKS=blocks, KEYS=64, TARGET=made_for)
HCA = CSA | dict(RATIO=128, PICKED=0)
ATTEND = dict(RING=131, SCALES=8, HEADS=heads, CUT=1, NORM=True, COUNT=64)
WRITE = dict(LATENT=latent, PADDED=latent, WIDTH=width, ROPE=64, RING=131, SCALES=8, PAGE=128, SLOTS=8, HEADS=heads,
             HEADS_PADDED=heads, ROUNDS=index.bit_length() - 1, TARGET=made_for)
SELECT = dict(RATIO=4, TOPK=128, GROUP=16, CHUNK=1024, GROUPS=1024, TARGET=made_for)
KERNELS = [
    (decode_attention._attend_kernel, CSA | ATTEND | dict(PER_PAGE=32, EACH=1, DONE=False), dict(num_warps=8)),
    (decode_attention._attend_kernel, CSA | ATTEND | dict(PER_PAGE=32, EACH=1, DONE=False, CUT=blocks),
     dict(num_warps=8)),
    (decode_attention._attend_kernel, HCA | ATTEND | dict(PER_PAGE=1, EACH=18, DONE=True, COUNT=256,
                                                          CUT=(blocks + 1) // 2), dict(num_warps=4)),
    *((decode_attention._combine_kernel, CSA | each, dict(num_warps=1, stored=U8))
      for each in (dict(EACH=1, SECTIONS=2, RUN=18), dict(EACH=18, SECTIONS=1, RUN=20))),
    (cache_write._kernel, WRITE | dict(RATIO=4, SPAN=2 * width, TAIL=11, INDEX=index), dict(num_warps=8)),
    (cache_write._kernel, WRITE | dict(RATIO=128, SPAN=width, TAIL=131, INDEX=0), dict(num_warps=8)),
    (query._kernel, dict(WIDTH=width, ROPE=64, ROWS=4, INDEX_WIDTH=index, ROUNDS=index.bit_length() - 1, INDEX_ROWS=8,
                         TARGET=made_for), dict()),
    *((indexer._score_kernel, dict(RATIO=4, TOPK=512, PER_PAGE=32, WIDTH=index, HEADS=heads, PADDED=heads, KEYS=128,
                                   GROUP=1, MOST=0, PICK=pick, TILE=2048, TARGET=made_for), dict(num_warps=8))
      for pick in (False, True)),
    (indexer._select_kernel, SELECT | dict(CHUNKS=1, ROUNDS=0, TILE=1024), dict(num_warps=16)),
    (indexer._select_kernel, SELECT | dict(CHUNKS=64, ROUNDS=6, TILE=512), dict(num_warps=16)),
]
compile_all({target}, KERNELS, TYPES, ("pages", "slots"))
"""
NANO, FLASH = (128, 128, 64, 16, 1), (512, 1024, 128, 64, 4)
TARGETS = [("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64), ("hip", "gfx950", 64)]


def compiled(target, sizes, tmp_path) -> None:
    path = tmp_path / "compile_script.py"
    path.write_text(SCRIPT.format(target=target, sizes=sizes), encoding="utf-8")
    assert run(f"import runpy; runpy.run_path({str(path)!r})", interpret=False) == "compiled 12\n"


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_kernels_compile(target, tmp_path):
    compiled(target, NANO, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_kernels_compile_for_flash(target, tmp_path):
    compiled(target, FLASH, tmp_path)
