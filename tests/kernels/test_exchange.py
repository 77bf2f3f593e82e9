"""What travels between two ranks, one after the other in the interpreter; compiled for Hopper."""

from __future__ import annotations

from triton_cases import run

SCRIPT = """
import torch
from pelagos.kernels.triton import exchange

ROOM = 2048
boxes = [torch.zeros((exchange.PLACES, 2, ROOM), dtype=torch.int64) for _ in range(2)]
pointers = torch.tensor([each.data_ptr() for each in boxes])
number = torch.tensor([7], dtype=torch.int32)


def both(x, shape, index, **sizes):
    # The first rank sends although the other has not: it gives up at once; then all is there.
    out = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2)]
    for rank, patience in ((1, 1), (0, 1 << 20), (1, 1 << 20)):
        exchange.PATIENCE = patience
        words = [each.view(-1).view(torch.int32) for each in (x[rank], out[rank])]
        exchange.exchange(*words, pointers, number, index, rank, ROOM, **sizes)
        if patience == 1 and sizes.get("source") != 1:
            assert out[1].isnan().any()
    return out


x = [torch.randn(2, 600, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(2)]
plain = dict(width=600, send_row=0, send_rank=0)
for out in both(x, (4, 600), 0, total=600, out_rank=600, **plain):
    assert torch.equal(out, torch.cat(x))
for out in both(x, (2, 600), 1, total=600, add=True, **plain):
    assert torch.equal(out, (x[0].float() + x[1].float()).bfloat16())
for rank, out in enumerate(both(x, (1, 600), 2, total=300, width=300, send_row=0, send_rank=300, add=True)):
    assert torch.equal(out[0], (x[0][rank].float() + x[1][rank].float()).bfloat16())
for source in range(2):
    sizes = dict(total=300, width=150, send_row=300, send_rank=150, source=source)
    for rank, out in enumerate(both(x, (2, 300), 3 + source, **sizes)):
        assert torch.equal(out, x[source].chunk(2, 1)[rank]), (source, rank)
print("equal")
"""

COMPILED = """
from triton_cases import compile_all
from pelagos.kernels.triton import exchange

constants = dict(RANKS=2, BLOCK=512, PLACES=4, PATIENCE=1 << 28, TARGET="ptx")
types = dict(x="*i32", out="*i32", boxes="*i64", number="*i32")
compile_all(("cuda", 90, 32), [
    (exchange._exchange_kernel, dict(SUM=add, ONE=one, **constants), {}) for add, one in ((0, 0), (1, 0), (0, 1))
], types)
"""


def test_exchange_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "equal\n"


def test_exchange_compiles():
    assert run(COMPILED, interpret=False) == "compiled 3\n"
