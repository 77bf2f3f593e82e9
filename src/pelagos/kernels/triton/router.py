"""Router, the shared expert's first product and the experts' activations in one launch; rows by expert in two more.

The router's tiles go first: their parts of k are summed by whoever chooses, for one token the last tile to arrive, for
more a program a token. Each adds the parts in the same order, so a token's choice does not depend on the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelagos.kernels.batch_rows import Mixing, Routed
from pelagos.kernels.skinny_gemm import MAX_ROWS
from pelagos.kernels.triton.formats import launch, let_next_start, target, wait_for_inputs
from pelagos.kernels.triton.fp4_experts import COLUMNS, list_rows, turn_block
from pelagos.kernels.triton.site import mixing, owed
from pelagos.kernels.triton.skinny_gemm import as_operand, bf16_tile, fp8_tile, parts_of, store_parts, wide_of

TALL = 64  # outputs a program
STAGES = 4  # of the pipeline
GATE_TILES, SHARED_TILES = 32, 256  # programs of the router's and of the shared expert's product


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) of float32, accurate where exp(x) is small; x itself above 20."""
    small = tl.exp(tl.minimum(x, 20.0))
    above = 1.0 + small
    # What the addition rounded away comes back as a factor.
    value = tl.where(above == 1.0, small, tl.log(above) * (small / tl.where(above == 1.0, 1.0, above - 1.0)))
    return tl.where(x > 20.0, x, value)


@triton.jit
def _choose(
    partial, bias, table, ids, chosen, weights, token, tokens, experts, scaling,
    PARTS: tl.constexpr, EXPERTS: tl.constexpr, PICKS: tl.constexpr, BY_TABLE: tl.constexpr,
):  # fmt: skip
    """Score one token's experts, pick and weigh them; EXPERTS and the partial sums' rows are padded."""
    lane = tl.arange(0, EXPERTS)
    real = lane < experts
    logit = tl.load(partial + token * EXPERTS + lane, mask=real, other=0.0)
    for part in tl.static_range(1, PARTS):
        logit += tl.load(partial + (part * tokens + token) * EXPERTS + lane, mask=real, other=0.0)
    score = tl.sqrt_rn(_softplus(logit))
    if BY_TABLE:
        own = table + tl.load(ids + token).to(tl.int64) * PICKS
        key = score
    else:
        key = tl.where(real, score + tl.load(bias + lane, mask=real, other=0.0), -float("inf"))
    at = tl.arange(0, 16)
    picked = tl.zeros((16,), tl.float32)
    found = tl.zeros((16,), tl.int32)
    total = 0.0
    for pick in tl.static_range(PICKS):
        if BY_TABLE:
            expert = tl.load(own + pick).to(tl.int32)
        else:
            # A NaN finds nobody: the last expert then, whatever it is worth.
            expert = tl.minimum(tl.min(tl.where(key == tl.max(key, 0), lane, EXPERTS), 0), experts - 1)
            key = tl.where(lane == expert, -float("inf"), key)
        one = tl.sum(tl.where(lane == expert, score, 0.0), 0)
        total += one
        picked = tl.where(at == pick, one, picked)
        found = tl.where(at == pick, expert, found)
    tl.store(chosen + token * PICKS + at, found, mask=at < PICKS)
    tl.store(weights + token * PICKS + at, tl.div_rn(picked, picked * 0.0 + total + 1e-20) * scaling, mask=at < PICKS)


@triton.jit
def _route_kernel(
    x, codes, pairs, scales, gate, bias, table, ids, shared, shared_scales, out, planes, partial, shared_partial,
    arrived, chosen, weights, rows, experts, outputs, scaling,
    mix_parts, mix_base, mix_scale, post, comb, eps, norm_eps, ITERS: tl.constexpr, SUMS: tl.constexpr,
    DEPTH: tl.constexpr, GATE_PARTS: tl.constexpr, PARTS: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    PICKS: tl.constexpr, BY_TABLE: tl.constexpr, CHOOSE: tl.constexpr, CUT: tl.constexpr, COLUMNS: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """WIDE rows a product; those of one tile of weights lie beside each other, so that one brings them to the L2."""
    calls = (rows + WIDE - 1) // WIDE
    at = tl.program_id(0)
    row = at % calls * WIDE + tl.arange(0, WIDE)
    live = row < rows
    tall = tl.arange(0, TALL)
    gates = EXPERTS // TALL * GATE_PARTS * calls
    shares = outputs // TALL * PARTS * calls
    wait_for_inputs(TARGET)
    if at < gates:
        first = at // calls // GATE_PARTS * TALL
        part = at // calls % GATE_PARTS
        share: tl.constexpr = DEPTH // GATE_PARTS
        total = bf16_tile(x, gate, first, part * share, row, live, DEPTH, share, TALL, WIDE, TARGET)
        let_next_start(TARGET)
        place = (part * rows + row)[None, :] * PADDED + (first + tall)[:, None]
        tl.store(partial + place, total, mask=live[None, :])
        if CHOOSE:
            tl.debug_barrier()
            if tl.atomic_add(arrived, 1, sem="acq_rel") == gates - 1:
                tl.debug_barrier()
                _choose(partial, bias, table, ids, chosen, weights, 0, rows, experts, scaling,
                        GATE_PARTS, PADDED, PICKS, BY_TABLE)  # fmt: skip
                tl.store(arrived, 0)
    elif at < gates + shares:
        tile = (at - gates) // calls // PARTS
        part = (at - gates) // calls % PARTS
        total = fp8_tile(
            codes, scales, shared, shared_scales, tile * TALL, part * (DEPTH // PARTS), row, live, DEPTH,
            DEPTH, DEPTH // PARTS, TALL, WIDE, TARGET,
        )  # fmt: skip
        let_next_start(TARGET)
        place = row[None, :] * outputs + (tile * TALL + tall)[:, None]
        counter = arrived + 1 + tile * calls + at % calls
        store_parts(total, out, shared_partial, counter, place, live[None, :], rows * outputs, part, PARTS)
    elif at < gates + shares + rows * CUT:
        block = at - gates - shares
        turn_block(pairs, planes, block // CUT, block % CUT, DEPTH, COLUMNS)
    elif ITERS > 0:
        let_next_start(TARGET)
        token = at - gates - shares - rows * CUT
        mixing(mix_parts, mix_base, mix_scale, post, comb, token, token < rows, eps, norm_eps, ITERS, DEPTH,
               DEPTH // 128, SUMS, TARGET)  # fmt: skip


@triton.jit
def _choose_kernel(
    partial, bias, table, ids, chosen, weights, tokens, experts, scaling, PARTS: tl.constexpr, EXPERTS: tl.constexpr,
    PICKS: tl.constexpr, BY_TABLE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    let_next_start(TARGET)
    wait_for_inputs(TARGET)
    _choose(partial, bias, table, ids, chosen, weights, tl.program_id(0), tokens, experts, scaling,
            PARTS, EXPERTS, PICKS, BY_TABLE)  # fmt: skip


def forward(
    x: Tensor, codes: Tensor, scales: Tensor, gate: Tensor, bias: Tensor | None, table: Tensor | None, ids: Tensor,
    shared13: Tensor, shared13_scales: Tensor, arrived: Tensor, *, experts: int, picks: int, scaling: float,
    left: Mixing | None = None,
) -> Routed:  # fmt: skip
    """Return `kernels.router.route`'s result with planes and lists."""
    (rows, depth), outputs, made_for = x.shape, shared13.shape[0], target()
    padded = triton.next_power_of_2(gate.shape[0])
    gate_parts = parts_of(gate.shape[0] // TALL, depth, GATE_TILES)
    parts = parts_of(outputs // TALL, depth, SHARED_TILES)
    columns = triton.cdiv(depth, COLUMNS)
    partial = x.new_empty((gate_parts, rows, padded), dtype=torch.float32)
    shared_partial = x.new_empty(parts * rows * outputs if parts > 1 else 1, dtype=torch.float32)
    shared, planes = x.new_empty((rows, outputs), dtype=torch.float32), codes.new_empty((4 * rows, depth))
    chosen, weights = x.new_empty((rows, picks), dtype=torch.int32), x.new_empty((rows, picks), dtype=torch.float32)
    by_table = table is not None
    lookup = (arrived if bias is None else bias, arrived if table is None else table, ids, chosen, weights)
    common = {"PICKS": picks, "BY_TABLE": by_table, "TARGET": made_for}
    mix, constants = owed(left, x)
    wide = min(MAX_ROWS, wide_of(rows))
    products = (gate.shape[0] // TALL * gate_parts + outputs // TALL * parts) * triton.cdiv(rows, wide)
    _route_kernel[(products + rows * (columns + (left is not None)),)](
        x, as_operand(codes), codes, scales, gate, *lookup[:3], as_operand(shared13), shared13_scales,
        shared, planes, partial, shared_partial, arrived, chosen, weights, rows, experts, outputs, scaling,
        *mix, **constants, DEPTH=depth, GATE_PARTS=gate_parts, PARTS=parts, EXPERTS=gate.shape[0], PADDED=padded,
        CHOOSE=rows == 1, CUT=columns, COLUMNS=COLUMNS, TALL=TALL, WIDE=wide, **common,
        **launch(made_for, num_stages=STAGES, enable_fp_fusion=False),
    )  # fmt: skip
    if rows == 1:
        return Routed(chosen, weights, shared, planes)
    _choose_kernel[(rows,)](
        partial, *lookup, rows, experts, scaling, PARTS=gate_parts, EXPERTS=padded, **common,
        **launch(made_for, num_warps=1, enable_fp_fusion=False),
    )  # fmt: skip
    return Routed(chosen, weights, shared, planes, list_rows(chosen, experts)[0])
