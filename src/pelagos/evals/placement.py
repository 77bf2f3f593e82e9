"""A plan of serving one model on several GPUs, before any is there: bytes, exchanges, simulated times.

All sizes are the cost model's. Times are simulated: a line fitted to whole steps and prompts measured on one H200, plus
exchanges as measured between two. Source: technical report 3.1 (waves, the balance rule).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pelagos import cost
from pelagos.config import ModelConfig
from pelagos.errors import ConfigError

BLOCK = 128  # columns that share an activation scale: an expert's width is cut in multiples of it
CALL_ROWS = 64  # of a decode call on each GPU that has sequences of its own
# One H200: memory, what the driver and scratch take of it; bytes a second of a step and seconds a layer beside them,
# which give the measured steps of Flash cut to 39 layers at 8K (batches 1, 8, 32, 128: 5.46, 12.5, 28.6, 83.8 ms).
MEMORY_BYTES, RESERVED_BYTES = 150_754_820_096, 8 << 30
# Experts cut by width are read at less: fitted to whole Flash on two (8K: batches 1, 8, 128 in 5.38, 9.91, 38.7 ms).
STREAM, CUT_STREAM, A_LAYER = 0.65 * 4.26e12, 0.5 * 4.26e12, 45e-6
FP8_FLOPS = 1.484e15
PREFILL = (39, 20_900.0)  # layers of Flash, tokens a second of an 8K prompt
PREFILL_SHARED = 0.77  # of twice that speed, per layer, that two GPUs reached with the same prompt
# Two H200: peer copies; what an exchange adds to a step (2.6 us for 8 KB, 4.2 us for 512 KB). Between nodes: assumed.
LINK, EXCHANGE_S, EXCHANGE = 394e9, 2.6e-6, 330e9
NODE, FAR_LINK, FAR_EXCHANGE_S = 8, 50e9, 25e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One way to place a model on `gpus`; times are simulated seconds."""

    gpus: int
    attention: str  # "sequence": each GPU its own sequences, or "context": heads and cache rows of each are shared
    experts: str
    weight_bytes: int
    room_bytes: int  # for caches, on each GPU; negative: the weights do not fit
    sequences: int  # of the context, on all GPUs together
    exchanges: int  # a layer
    step_s: float
    exchange_s: float
    prefill_tok_s: float
    prefill_exchange_frac: float  # of the experts' compute that waves hide it behind

    def row(self, batch: int) -> dict[str, Any]:
        """Return the figures as printed."""
        return dataclasses.asdict(self) | {
            "batch": batch, "tok_s": round(batch / self.step_s, 1), "fits": self.room_bytes >= 0, "simulated": True,
        }  # fmt: skip


def plan_rows(model: str, *, gpus: list[int], context: int, batch: int) -> Iterator[dict[str, Any]]:
    """Yield one row a number of GPUs and way to place attention. Raises ConfigError for sizes that mean nothing."""
    name, config = cost.resolve(model)
    if not isinstance(config, ModelConfig):
        raise ConfigError(f"--dry-run places V4 models, not {name}")
    for count in gpus:
        for attention in ("sequence", "context"):
            found = plan(config, count, attention, context=context, batch=batch)
            yield {"model": name, "context": context, **found.row(batch), **balance(config, count)}


def balance(config: ModelConfig, gpus: int) -> dict[str, float]:
    """Return C/B, FLOPs a second over bytes a second, and the 2d (d: expert width) up to which waves hide exchanges."""
    return {"c_over_b": round(FP8_FLOPS / link(gpus)), "limit_2d": 2 * config.moe_intermediate_size}


def link(gpus: int) -> float:
    """Bytes a second between GPUs."""
    return LINK if gpus <= NODE else FAR_LINK


def width_parts(config: ModelConfig, gpus: int) -> int:
    """Return into how many parts an expert's width is cut: the most that divide the GPUs and leave whole blocks."""
    return max(n for n in range(1, gpus + 1) if gpus % n == 0 and config.moe_intermediate_size % (n * BLOCK) == 0)


def exchange(gpus: int, size: int) -> float:
    """Seconds of one exchange of `size` bytes from every GPU to each other."""
    far = (FAR_EXCHANGE_S + size / FAR_LINK) if gpus > NODE else 0.0
    return EXCHANGE_S + (min(gpus, NODE) - 1) * size / EXCHANGE + far


def step(config: ModelConfig, moved: float, rows: int) -> float:
    """Seconds of a step that moves so many bytes on a GPU over `rows` tokens: calls of at most 64 rows in turn."""
    return moved / STREAM + -(-rows // CALL_ROWS) * config.num_hidden_layers * A_LAYER


def plan(config: ModelConfig, gpus: int, attention: str, *, context: int, batch: int) -> Plan:
    """Place a model: experts by width (and by number where the width is cut too small), attention as told.

    Shared experts are cut by width in both, the vocabulary by rows in "context"; all else is on every GPU. Raises
    ConfigError for fewer than one GPU, sequence or token.
    """
    if min(gpus, context, batch) < 1:
        raise ConfigError(f"dry run: {gpus} GPUs, context {context}, batch {batch}: expected at least one of each")
    sizes: Counter[str] = Counter()
    for group in cost.inventory(config):
        part = group.part
        if part in ("attention", "indexer") and group.name.endswith(("wo_a.weight", "wo_b.weight")):
            part = "outputs"
        elif part in ("attention", "indexer") and group.name.endswith("wq_b.weight"):
            part = "queries"
        elif part == "embedding":
            part = "table"
        elif part == "shared_expert" or (part == "head" and attention == "context"):
            part = "cut"
        elif part != "routed_experts":
            part = "whole"
        sizes[part] += sum(size for _, size in group.stored().values())
    shared, heads = attention == "context", sizes["queries"] + sizes["outputs"]
    cut = sizes["cut"] + (heads if shared else 0)
    whole = sizes["whole"] + (0 if shared else heads)
    table = sizes["table"] * (1 if shared else gpus)
    weights = -(-(sizes["routed_experts"] + cut + table) // gpus) + whole
    own = -(-batch // gpus)  # sequences of the fullest GPU
    rows = batch if shared else own
    keys = (batch / gpus if shared else own) * cost.kv_read_bytes(config, context)
    together = CALL_ROWS if shared else CALL_ROWS * gpus
    calls = [min(together, batch - at) for at in range(0, batch, together)]
    experts = sum(sizes["routed_experts"] * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** n)
                  for n in calls) / gpus  # fmt: skip
    moved = keys + (whole + cut / gpus) * -(-rows // CALL_ROWS)
    d, values = config.hidden_size, config.num_attention_heads * config.head_dim
    if shared:  # queries, partial attention, y where heads are cut, the experts' results
        each = [2 * values * batch // gpus, 4 * values * batch // gpus, 2 * d * batch, 2 * d * batch]
    elif batch == 1:  # the others follow: heads handed out, y, the experts' results
        each = [2 * values // gpus, 2 * d, 2 * d]
        moved -= sizes["outputs"] * (1 - 1 / gpus)
    else:  # rows brought together, partial results
        each = [2 * d * own, 2 * d * own]
    traded = config.num_hidden_layers * sum(exchange(gpus, size) for size in each) if gpus > 1 else 0.0
    took = step(config, moved, rows) + experts / (CUT_STREAM if gpus > 1 else STREAM) + traded
    room = MEMORY_BYTES - RESERVED_BYTES - weights
    parts = width_parts(config, gpus)
    compute, hidden = prefill(config, gpus, context)
    speed = (gpus * PREFILL_SHARED if gpus > 1 else 1) / compute
    return Plan(
        gpus=gpus, attention=attention, weight_bytes=weights, room_bytes=room, exchanges=len(each) if gpus > 1 else 0,
        experts=f"width / {parts}" + (f", {gpus // parts} groups of experts" if gpus > parts else ""),
        sequences=max(0, room) * gpus // cost.sequence_bytes(config, context) if shared
        else gpus * (max(0, room) // cost.sequence_bytes(config, context)),
        step_s=took, exchange_s=traded, prefill_tok_s=round(speed / max(1.0, hidden)),
        prefill_exchange_frac=round(hidden, 3),
    )  # fmt: skip


def prefill(config: ModelConfig, gpus: int, context: int) -> tuple[float, float]:
    """Return seconds of a prompt's token on one GPU, and its experts' exchange over their compute (1: barely hidden).

    Compute is scaled from the measured prompt by FLOPs; an exchange takes 3 bytes a value of each pick that leaves.
    """
    layers, speed = PREFILL
    flash = cost.resolve("flash")[1]
    assert isinstance(flash, ModelConfig)
    measured = dataclasses.replace(flash, num_hidden_layers=layers, compress_ratios=flash.compress_ratios[:layers])
    flops = [cost.weighted_flops(each, at, "index_x1") for each, at in ((config, context // 2), (measured, 4096))]
    token = flops[0] / flops[1] / speed
    moe = cost.flops(config, context)["moe"]
    sent = 3 * config.hidden_size * config.num_experts_per_tok * config.num_hidden_layers * (gpus - 1) / gpus
    return token, sent / link(gpus) / (moe / flops[0] * token)


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as lines for a terminal."""
    lines = ["simulated: fitted to steps and prompts of one H200 and exchanges of two; not run on such machines"]
    for row in rows:
        fits = f"{row['room_bytes'] / 1e9:6.1f} GB for caches" if row["fits"] else "the weights do not fit"
        lines.append(
            f"{row['model']} on {row['gpus']:2} GPUs, attention by {row['attention']:8}, experts {row['experts']}: "
            f"{row['weight_bytes'] / 1e9:6.1f} GB of weights a GPU, {fits}"
        )
        if row["fits"]:
            hidden = "<=" if row["c_over_b"] <= row["limit_2d"] else ">"
            lines.append(
                f"    {row['sequences']} sequences of {row['context']:,}; step of {row['batch']}: "
                f"{row['step_s'] * 1e3:.2f} ms ({row['tok_s']:,} tok/s), of it {row['exchanges']} exchanges a layer "
                f"{row['exchange_s'] * 1e3:.2f} ms; prompts {row['prefill_tok_s']:,} tok/s, their exchange "
                f"{row['prefill_exchange_frac']:.0%} of the experts' compute; C/B {row['c_over_b']:,} {hidden} 2d "
                f"{row['limit_2d']:,}"
            )
    return "\n".join(lines)
