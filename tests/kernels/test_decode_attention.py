"""Decode attention: the references together against the model's attention, the Triton kernels against the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from triton_cases import error, run

from pelagos import numerics
from pelagos.config import preset
from pelagos.errors import ConfigError
from pelagos.kernels import batch_rows, cache_write, decode_attention, indexer, query
from pelagos.kernels.layout import CacheLayout, Span
from pelagos.kernels.ref import decode_attention as ref
from pelagos.kernels.ref.cache_write import turned
from pelagos.model import Transformer
from pelagos.model.attention import Attention, frequencies
from pelagos.model.paged import PagedForward, _Batch

SCRIPT = """
import torch
torch.set_num_threads(1)
from pelagos.kernels.ref import decode_attention as ref
from pelagos.kernels.triton import decode_attention as kernel
from test_decode_attention import inputs_of
from triton_cases import error
kernel.SECTION = 6
for case, picked in ((7, True), (18, True), (18, False), (19, False), (29, True)):
    inputs = inputs_of(ref.CASES[case], picked=picked)
    arrived = torch.zeros(4096, dtype=torch.int32)
    want, many, halves = ref.forward(*inputs), *(kernel.forward(*inputs, each, arrived) for each in (True, False))
    # The interpreter cuts weights to bfloat16 instead of rounding them.
    assert error(many, want) < 1e-2, (case, error(many, want))
    assert error(halves.whole(), many) < 1e-6, case
    kernel.PROGRAMS = 0
    assert torch.equal(kernel.forward(*inputs, True, arrived), many), case
    assert all(map(torch.equal, kernel.forward(*inputs, False, arrived), halves)), case
    assert not arrived.any(), case
    kernel.PROGRAMS = 300
print("compared")
"""
NAMES = ("q", "rows", "layout", "layer", "pages", "slots", "sink", "picks", "turn", "most")


def values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return numerics.decode_fp8(codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), numerics.ACT_BLOCK)


def inputs_of(case: tuple, device: str = "cpu", *, picked: bool = True) -> tuple:
    call = ref.make_call(*case, device=device)
    q, sink, picks, turn = ref.make_queries(call, picked=picked and case[1] == 4)
    return q, call.rows, call.layout, 0, call.pages, call.slots, sink, picks, turn, call.most


def model_of(ratio: int) -> Transformer:
    config = dataclasses.replace(preset("nano"), num_hidden_layers=2, compress_ratios=(ratio, 4), vocab_size=64,
                                 num_nextn_predict_layers=0, index_topk=32, n_routed_experts=4)  # fmt: skip
    model = Transformer(config, mode="released", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(ratio)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            size = weight.shape[-1] ** -0.5 if weight.dim() > 1 and "ape" not in name else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * size)
    return model


def by_references(attention: Attention, x: torch.Tensor, batch: _Batch, layout: CacheLayout, pools: list) -> tuple:
    """The site's latent (values), picks and attended values (T, H * C) of x (1, T, D) by the decode kernels."""
    spans, config, ratio = batch.owner.tolist(), layout.config, attention.ratio
    positions = batch.positions[0]
    rows = batch_rows.Rows(*(
        torch.as_tensor(each).int()
        for each in (positions, batch.slot[spans], batch.start[spans], spans, batch.pages, batch.frozen[spans])
    ))  # fmt: skip
    freqs = frequencies(config, ratio > 0, positions.device)
    turn, entry_turn = (query.angles(at, freqs) for at in (positions, positions - ratio + 1))
    products = [attention.wq_a(x), attention.wkv(x)]
    weights = cache_write.CacheWeights(attention.q_norm.weight, attention.kv_norm.weight)
    if attention.compressor is not None:
        products += [attention.compressor.wkv(x.float()), attention.compressor.wgate(x.float())]
        weights = weights._replace(ape=attention.compressor.ape.float(), norm=attention.compressor.norm.weight)
    if attention.indexer is not None:
        inner = attention.indexer.compressor
        products += [inner.wkv(x.float()), inner.wgate(x.float()), attention.indexer.weights_proj(x)]
        weights = weights._replace(index_ape=inner.ape.float(), index_norm=inner.norm.weight)
    projected = torch.cat([each[0].float() for each in products], 1)
    assert projected.shape[1] == sum(cache_write.widths(config, ratio))
    *latent, head_weights = cache_write.cache_write(projected, rows, layout, 0, *pools, weights, turn, entry_turn)
    wide = values(*latent)
    picks, index_heads = None, (config.index_n_heads, config.index_head_dim) if attention.indexer is not None else ()
    parts = [attention.wq_b, *([attention.indexer.wq_b] if attention.indexer is not None else [])]
    product = torch.cat([part(wide.bfloat16()) for part in parts], 1)
    q, index_q = query.query(product, turn, attention.heads, attention.width, *index_heads)
    most = int(positions.max() + 1) // ratio if ratio else 0
    if index_q is not None and most > config.index_topk:
        counts = torch.zeros(len(positions), indexer.COUNTS, dtype=torch.int32)
        picks = indexer.pick(index_q, head_weights, rows, layout, 0, pools[0], counts, most)
    sink = attention.attn_sink.float()
    return wide, decode_attention.attend(q, rows, layout, 0, *pools, sink, picks, turn, most)


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_references_together_are_the_attention_of_the_model(ratio, monkeypatch):
    """Prompts by the model's paged forward, then verify and decode rows by both: the same bytes, the same results."""
    model = model_of(ratio)
    attention, config = model.blocks[0].attn, model.config
    layout = CacheLayout(config, "released", 3)
    pools = [torch.zeros(4, layout.page_bytes, dtype=torch.uint8), torch.zeros(2, layout.slot_bytes, dtype=torch.uint8)]
    paged = PagedForward(model, layout, *pools, exact=False)
    generator, seen = torch.Generator().manual_seed(1), []
    monkeypatch.setattr(attention, "output", lambda out, step: seen.append((out, step)))
    tables = np.array([[2, 0, 0], [1, 3, 3]], np.int32)
    with torch.inference_mode():
        for first, counts in (((0, 0), (252, 125)), ((252, 125), (4, 3)), ((0, 128), (0, 1))):
            spans = [
                Span(np.zeros(count, np.int64), begin, slot, table, 256 if begin == 252 and ratio == 4 else 0)
                for begin, count, slot, table in zip(first, counts, (1, 0), tables, strict=True)
                if count
            ]
            batch = _Batch(spans, layout, torch.device("cpu"), 1)
            x = torch.randn(1, batch.total, config.hidden_size, generator=generator).bfloat16()
            copies = [pool.clone() for pool in pools]
            paged._attention(attention, x, paged._layers[0], batch)
            if first == (0, 0):
                continue
            wide, got = by_references(attention, x, batch, layout, copies)
            for mine, theirs in zip(copies, pools, strict=True):
                assert torch.equal(mine, theirs)
            latent = attention.inputs(x, batch.step)[0][0]
            assert torch.equal(wide, numerics.fake_quant_fp8(latent, numerics.ACT_BLOCK).float())
            out, step = seen[-1]
            want = turned(out[0], query.angles(step.positions[0], frequencies(config, ratio > 0, None)).unsqueeze(1),
                          inverse=True).flatten(1)  # fmt: skip
            assert error(got, want) < 1e-3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.zeros(1, 8, 128)}, "bfloat16"), ({"sink": torch.zeros(7)}, r"sink is \(7,\)"),
        ({"turn": torch.zeros(1, 2, 8)}, "turn is"), ({"most": 10**7}, "most=10000000"),
        ({"picks": torch.zeros(1, 8)}, "picks is"), ({"pages": torch.zeros(3, 4, dtype=torch.uint8)}, "pages"),
    ],
)  # fmt: skip
def test_other_shapes_are_refused(wrong, message):
    inputs = dict(zip(NAMES, inputs_of(("nano", 4, ((130, 1),), 0)), strict=True))
    with pytest.raises(ConfigError, match=message):
        decode_attention.attend(**(inputs | wrong))


def test_picks_that_name_all_change_nothing():
    inputs = inputs_of(("nano", 4, ((3, 1), (250, 3)), 1))
    assert torch.equal(ref.forward(*inputs[:7], None, *inputs[8:]), ref.forward(*inputs))


def test_kernels_in_the_interpreter():
    assert run(SCRIPT, interpret=True) == "compared\n"


@pytest.mark.gpu
@pytest.mark.parametrize("case", ref.CASES, ids=str)
def test_kernels_on_the_device(case, monkeypatch):
    """Within the format's tolerance; the same bits again, cut another way, and for a row by itself."""
    from pelagos.kernels.triton import decode_attention as kernel

    inputs = inputs_of(case, "cuda")
    attend = decode_attention.attend
    got, want, halves = attend(*inputs), ref.forward(*inputs), attend(*inputs, whole=False)
    assert error(got, want) < 4e-3
    assert error(halves.whole(), got) < 1e-6
    assert torch.equal(got, attend(*inputs))
    q, rows, *pools, sink, picks, turn, most = inputs
    for at in {0, len(q) // 2, len(q) - 1}:
        one = slice(at, at + 1)
        alone = rows._replace(**{name: getattr(rows, name)[one] for name in rows._fields if name != "table"})
        picked = None if picks is None else picks[one]
        assert torch.equal(attend(q[one], alone, *pools, sink, picked, turn[one], most)[0], got[at])
    monkeypatch.setattr(kernel, "RESIDENT", 0)
    assert torch.equal(got, attend(*inputs))
    monkeypatch.setattr(kernel, "PROGRAMS", 0)
    assert torch.equal(got, attend(*inputs))
    assert all(map(torch.equal, halves, attend(*inputs, whole=False)))
    if case[1] == 4 and most <= inputs[2].config.index_topk:
        assert torch.equal(got, attend(*inputs[:7], None, *inputs[8:]))
