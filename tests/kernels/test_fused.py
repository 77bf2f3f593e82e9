"""Launches that do what others did behind them: the same bits as apart, interpreted on a CPU and on the device."""

from __future__ import annotations

import pytest
import torch
from triton_cases import error, run

from pelagos.kernels.ref import cache_write as cache_ref
from pelagos.kernels.ref import decode_attention as calls
from pelagos.kernels.ref import fp4_experts as experts_ref
from pelagos.kernels.ref import router as router_ref
from pelagos.kernels.ref import site as site_ref
from pelagos.kernels.ref import skinny_gemm as gemm_ref

INTERPRETED = """
import torch
torch.set_num_threads(1)
import test_fused
for name, cases in test_fused.SMALL.items():
    for case in cases:
        getattr(test_fused, name)(*case)
print("same")
"""
SMALL = {
    "same_site": [(1, 256), (3, 384), (17, 128)],
    "same_cache": [("nano", ratio, ((p, 1),)) for ratio in (0, 4, 128) for p in (0, 127, 700)],
    "same_queries": [(1, 8, 64, 128), (3, 8, 64, 128)],
    "same_attention": [("nano", 4, ((700, 1), (5, 2)), 1), ("nano", 128, ((300, 1),), 0)],
    "same_hidden": [(1, 8, 2, 128, 128), (1, 16, 6, 640, 384)],
    "same_route": [(1, 20, 4, 256, 128), (2, 20, 4, 256, 128)],
    "same_joined": [(6, 20, 4, 256, 128), (70, 20, 4, 128, 128)],
    "same_picks": [(700, 1024, "nano"), (900, 1 << 17, "nano"), (300, 16384, "nano")],
}
LARGE = {
    "same_site": [*((tokens, 4096) for tokens in (1, 2, 3, 4, 5, 16, 17, 64)), (1, 7168), (2, 7168), (33, 7168)],
    "same_cache": [("flash", ratio, ((p, 1),)) for ratio in (0, 4, 128) for p in (0, 3, 127, 4095, 8190, 1048575)]
    + [("pro", ratio, ((p, 1),)) for ratio in (4, 128) for p in (8191,)],
    "same_queries": [(1, 64, 128, 32768), (2, 64, 128, 32768), (16, 64, 128, 32768), (7, 64, 128, 65536)],
    "same_attention": [("flash", 4, ((8191, 1), (130, 3)), 4), ("flash", 128, ((1048575, 1),), 0),
                       ("flash", 4, tuple((1000 * i, 1) for i in range(40)), 24), ("pro", 4, ((4095, 2),), 1)],
    "same_hidden": [(1, 256, 6, 4096, 2048), (1, 384, 6, 7168, 3072)],
    "same_route": [(1, 256, 6, 4096, 2048), (2, 256, 6, 4096, 2048), (64, 256, 6, 4096, 2048)],
    "same_joined": [(64, 256, 6, 4096, 2048), (128, 256, 6, 4096, 1024)],
    "same_picks": [(p, planned, "flash") for p, planned in (
        (8191, 8192), (2047, 8192), (20000, 32768), (65535, 65536), (12000, 65536), (1048575, 1 << 20),
        (131071, 1 << 20), (200000, 1 << 20), (196600, 1 << 20), (8191, 1 << 20), (60000, 1 << 20),
    )],
}  # fmt: skip


def equal(got, want) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(got, want, strict=True))


def counters(device: str) -> torch.Tensor:
    return torch.zeros(4096, dtype=torch.int32, device=device)


def site_of(inputs: tuple, arrived: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """A site's results of which the launch behind it gives post and comb."""
    from pelagos.kernels.triton import site as kernel
    from pelagos.kernels.triton import skinny_gemm

    options = {"iters": 20, "eps": 1e-6, "norm_eps": 1e-6}
    *results, left = kernel.forward(*inputs, **options, leave=True, arrived=arrived)
    normed = results[3]
    if len(normed) <= 64:
        wide = normed.new_zeros(64, normed.shape[1])
        skinny_gemm.merged(None, None, normed, None, None, wide, counters(normed.device), left)
    return tuple(results)


def same_site(tokens: int, width: int, device: str = "cpu") -> None:
    from pelagos.kernels.triton import site as kernel

    inputs, arrived = site_ref.make_inputs(tokens, width, device=device), counters(device)
    for own in (inputs, (None, inputs[1], None, None, *inputs[4:])):
        got = site_of(own)
        want = kernel.forward(*own, iters=20, eps=1e-6, norm_eps=1e-6)
        assert equal((got[0], *got[3:]), (want[0], *want[3:]))
        assert all(error(a, b) < 1e-6 for a, b in zip(got[1:3], want[1:3], strict=True))
        # In one launch, where the programs fit on the device together; the interpreter runs them one after another.
        assert all(equal(site_of(own, arrived), got) for _ in range(3))
        assert not arrived.any()
        last = tuple(None if each is None else each[-1:].contiguous() for each in own[:4])
        assert all(torch.equal(a[0], b[-1]) for a, b in zip(site_of((*last, *own[4:]), arrived), got, strict=True))


def same_cache(shape: str, ratio: int, spans: tuple, device: str = "cpu") -> None:
    from pelagos.kernels.triton import cache_write
    from pelagos.kernels.triton import skinny_gemm as kernel

    call = calls.make_call(shape, ratio, spans, device=device)
    config, rows = call.layout.config, len(call.rows.positions)
    _, weights, turn, entry_turn = calls.make_projected(call)
    widths = cache_ref.widths(config, ratio)
    depth = 512 if shape == "nano" else config.hidden_size
    narrow, wide = sum(widths[:2]), -(-sum(widths[2:]) // 64) * 64
    codes, scales, weight, weight_scales = gemm_ref.make_inputs(rows, narrow, depth, 1, device=device)
    generator = torch.Generator(device).manual_seed(5)
    x = gemm_ref.decoded(codes, scales, (1, 128)).bfloat16()
    wide_weight = torch.randn(wide, depth, generator=generator, device=device).bfloat16() * depth**-0.5
    arrived, results = counters(device), []
    for fused in (False, True, True):
        pools = call.pages.clone(), call.slots.clone()
        cache = (call.rows, call.layout, 0, *pools, weights, turn, entry_turn)
        operands = (codes, scales, x, weight, weight_scales, wide_weight, arrived)
        if fused:
            found = kernel.merged(*operands, cache=cache)
        else:
            found = cache_write.forward(kernel.merged(*operands), *cache)
        results.append((*found, *pools))
        assert not arrived.any()
    assert equal(results[1], results[0])
    assert equal(results[2], results[0])


def same_queries(rows: int, heads: int, width: int, plain: int, device: str = "cpu") -> None:
    from pelagos.kernels.triton import query
    from pelagos.kernels.triton import skinny_gemm as kernel

    outputs = plain + heads * width
    depth = 1024 if plain > 128 else 128
    codes, scales, weight, weight_scales = gemm_ref.make_inputs(rows, outputs, depth, 1, device=device)
    angle = torch.rand(rows, 32, generator=torch.Generator(device).manual_seed(3), device=device) * 1e6
    turn = torch.stack((angle.cos(), angle.sin()), 1).contiguous()
    if device == "cpu":  # whose interpreter cuts the kernel's product to bfloat16 instead of rounding it
        product = gemm_ref.forward(codes, scales, weight, weight_scales)
    else:
        product = kernel.forward(codes, scales, weight, weight_scales, counters(device))[0]
    want = query.forward(product, turn, plain // width, width, heads, width, eps=1e-6, index_only=True)
    found = kernel.queried(codes, scales, weight, weight_scales, turn, heads, width)
    assert found is not None
    assert error(found[0], want[0].flatten(1)) < 6e-3
    assert error(found[1], want[1]) < (0.02 if device == "cpu" else 1e-9), error(found[1], want[1])
    last = [each[-1:].contiguous() for each in (codes, scales, turn)]
    one = kernel.queried(*last[:2], weight, weight_scales, last[2], heads, width)
    assert one is not None
    assert all(torch.equal(a[0], b[-1]) for a, b in zip(one, found, strict=True))


def same_attention(shape: str, ratio: int, spans: tuple, padding: int, device: str = "cpu") -> None:
    from pelagos.kernels.triton import decode_attention as kernel
    from pelagos.kernels.triton import query

    call = calls.make_call(shape, ratio, spans, padding, device=device)
    q, sink, picks, _ = calls.make_queries(call, picked=ratio == 4)
    tokens, heads, width = q.shape
    raw = torch.cat((q.flatten(1), q.flatten(1)[:, :128]), 1).contiguous()  # rows longer than the queries
    angle = torch.rand(tokens, 32, generator=torch.Generator(device).manual_seed(3), device=device) * 1e6
    turn = torch.stack((angle.cos(), angle.sin()), 1).contiguous()
    ready = query.forward(q.flatten(1), turn, heads, width, 0, 0, eps=1e-6)[0]
    own = (call.rows, call.layout, 0, call.pages, call.slots, sink, picks, turn, call.most, True, counters(device))
    want = kernel.forward(ready, *own)
    views = raw[:, : heads * width].unflatten(1, (heads, width))
    got = kernel.forward(views, *own, 1e-6)
    live = call.rows.positions >= 0
    assert error(got[live], want[live]) < 3e-3, error(got[live], want[live])
    assert torch.equal(kernel.forward(views, *own, 1e-6), got)
    for name in ("RESIDENT", "PROGRAMS"):  # cut another way
        kept = getattr(kernel, name)
        setattr(kernel, name, 0)
        assert torch.equal(kernel.forward(views, *own, 1e-6)[live], got[live])
        setattr(kernel, name, kept)


def same_hidden(tokens: int, experts: int, picks: int, width: int, inner: int, device: str = "cpu") -> None:
    from pelagos.kernels.batch_rows import Routed
    from pelagos.kernels.triton import fp4_experts as kernel

    inputs = experts_ref.make_inputs(tokens, experts, picks, width, inner, device=device)
    generator = torch.Generator(device).manual_seed(1)
    planes = kernel.list_rows(inputs[2], experts, inputs[0])[1]
    gates = torch.randn(tokens, 2 * inner, generator=generator, device=device)
    shared = gemm_ref.make_inputs(1, width, inner, 1, device=device)[2:]
    arrived = counters(device)
    routed = Routed(inputs[2], inputs[3], gates, planes)
    want = kernel.site(inputs[1], routed, *inputs[4:], shared, 10.0, None, None)
    for _ in range(2):
        assert equal(kernel.site(inputs[1], routed, *inputs[4:], shared, 10.0, None, None, arrived), want)
        assert not arrived.any()


def same_route(tokens: int, experts: int, picks: int, width: int, inner: int, device: str = "cpu") -> None:
    from pelagos.kernels.triton import router as kernel
    from pelagos.kernels.triton import site

    inputs = router_ref.make_inputs(tokens, experts, picks, width, inner, False, device=device)
    options = {"experts": experts, "picks": picks, "scaling": 1.5}
    streams = site_ref.make_inputs(tokens, width, device=device)
    want = kernel.forward(*inputs, counters(device), **options)
    apart = site_of(streams)
    *found, left = site.forward(*streams, iters=20, eps=1e-6, norm_eps=1e-6, leave=True)
    got = kernel.forward(*inputs, counters(device), **options, left=left)
    assert equal(found, apart)
    assert equal(got[:4], want[:4])


def same_joined(tokens: int, experts: int, picks: int, width: int, inner: int, device: str = "cpu") -> None:
    """Rows routed in one call, of several products each, are those of two calls, to the last code."""
    from pelagos.kernels.triton import router as kernel

    inputs = router_ref.make_inputs(tokens, experts, picks, width, inner, False, device=device)
    options = {"experts": experts, "picks": picks, "scaling": 1.5}
    whole = kernel.forward(*inputs, counters(device), **options)
    parts = []
    for rows in (slice(0, tokens // 2), slice(tokens // 2, tokens)):
        own = [each[rows].contiguous() if i in (0, 1, 2, 6) else each for i, each in enumerate(inputs)]
        parts.append(kernel.forward(*own, counters(device), **options))
    assert equal([torch.cat(each) for each in zip(*(part[:4] for part in parts), strict=True)], whole[:4])


def same_picks(position: int, planned: int, shape: str, device: str = "cpu") -> None:
    """The choice in the launch of the scores, and by a second one, of a graph planned for far more too."""
    from pelagos.kernels.triton import indexer as kernel

    call = calls.make_call(shape, 4, ((position, 1), (position // 2, 2)), device=device)
    layout, rows, most = call.layout, call.rows, planned // 4
    pages = layout.pages_for(planned) - rows.table.shape[1]
    rows = rows._replace(table=torch.nn.functional.pad(rows.table, (0, max(pages, 0))).contiguous())
    generator, config = torch.Generator(device).manual_seed(1), layout.config
    heads = (3, config.index_n_heads)
    index_q = torch.randn(*heads, config.index_head_dim, generator=generator, device=device).bfloat16()
    weights = torch.rand(heads, generator=generator, device=device)
    arrived = torch.zeros(3, 1, dtype=torch.int32, device=device)
    options = (index_q, weights, rows, layout, 0, call.pages, most)
    scores, bounds = kernel.score(*options)
    got = kernel.choose(scores, bounds, rows.positions, 4, config.index_topk, arrived)
    for row, at in enumerate(rows.positions.tolist()):
        seen = (at + 1) // 4
        want = scores[row, :seen].argsort(descending=True, stable=True)[: config.index_topk].sort()[0]
        assert torch.equal(got[row, : len(want)].long(), want)
    for _ in range(2 if most <= kernel.CHUNK else 0):
        assert torch.equal(kernel.score(*options, arrived)[1], got)
        assert not arrived.any()


def test_the_same_bits_interpreted() -> None:
    assert run(INTERPRETED, interpret=True) == "same\n"


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in LARGE.items() for case in cases], ids=str)
def test_the_same_bits_on_the_device(name: str, case: tuple) -> None:
    globals()[name](*case, device="cuda")
