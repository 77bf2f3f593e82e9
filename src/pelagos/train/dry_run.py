"""What a run would take: memory by arithmetic before anything is built, then two steps of every stage, measured.

On many GPUs it is simulated: layouts compared by bytes as this trainer holds them, the cost model's FLOPs at an assumed
share of an H200's peak, links as measured between two H200 in a node and assumed between nodes. What context ranks
exchange is left out: of entries it is under a hundredth of what experts do.
"""

import contextlib
import itertools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pelagos import cost
from pelagos.config import ModelConfig
from pelagos.errors import CapacityError, ConfigError
from pelagos.model.attention import CSA_RATIO
from pelagos.train.meter import PEAKS, training_flops
from pelagos.train.owners import UNDER_WAY
from pelagos.train.recipe import TrainConfig
from pelagos.train.trainer import Trainer

BYTES_A_PARAMETER = 16  # float32 master, gradient, momentum, and the second moment or an update in flight
MEMORY, RESERVED = 150_754_820_096, 8 << 30  # bytes of an H200, and what driver and scratch take of them
COPIED = 4.0e12  # bytes that it reads and writes a second
UTILISED = 0.35  # share of the BF16 peak that compute alone is assumed to reach
NODE, LINK, FAR_LINK = 8, 394e9, 50e9  # bytes a second of a GPU within a node (measured) and beyond (assumed)
WAVES = 4
BATCH = {"flash": 75_497_472, "pro": 94_371_840}  # tokens a step of the technical report, 4.2.2
# (who, GPUs, pp, ep) as peers published them for their own trainers.
PUBLISHED = {"flash": [("Megatron-Bridge, Blackwell", 128, 4, 8)], "pro": [("NeMo AutoModel, H100", 512, 8, 64)]}


def check_memory(model: ModelConfig, device: str) -> tuple[int, int]:
    """Return (bytes of weights, gradients and optimizer, bytes free); raises CapacityError if the first is more."""
    needed = sum(cost.parameters_by_part(model, draft=True).values()) * BYTES_A_PARAMETER
    cuda = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if cuda else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise CapacityError(
            f"weights, gradients and optimizer need {needed / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free; "
            "train a smaller --model, or on a larger device"
        )
    return needed, free


def measure(trainer: Trainer) -> list[dict[str, Any]]:
    """Run two steps of each stage of a fresh trainer and return a row each; the trainer is of no use afterwards.

    A stage that does not fit has seconds None. The first step of a stage pays for compilation and is not counted.
    """
    rows: list[dict[str, Any]] = []
    config, cuda = trainer.config, trainer.device.type == "cuda"
    for key, group in itertools.groupby(range(config.steps), lambda step: _stage(config, step)):
        first, *more = group
        row: dict[str, Any] = dict(zip(("row_tokens", "rows", "attention", "numbers"), key, strict=True))
        row |= {"from": first, "steps": 1 + len(more)}
        try:
            for _ in range(2):
                trainer.step = first
                torch.cuda.reset_peak_memory_stats(trainer.device) if cuda else None
                started = time.monotonic()
                terms, _ = trainer._update()
                float(terms.next_token)  # waits for the device
                row["seconds"] = time.monotonic() - started
        except torch.OutOfMemoryError:
            row["seconds"] = None
            trainer.model.zero_grad()
        row["memory_gb"] = torch.cuda.max_memory_allocated(trainer.device) / 1e9 if cuda else None
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]], needed: int, free: int) -> str:
    """Return the rows as text, with the verdict: whether it fits, and how long it takes."""
    lines = [
        f"{'from step':>10}{'steps':>9}{'rows':>6}{'tokens':>8}  {'attention':10}{'numbers':10}{'s/step':>9}{'GB':>8}"
    ]
    for row in rows:
        pace = "too large" if row["seconds"] is None else f"{row['seconds']:.3f}"
        memory = "-" if row["memory_gb"] is None else f"{row['memory_gb']:.1f}"
        lines.append(
            f"{row['from']:10,}{row['steps']:9,}{row['rows']:6}{row['row_tokens']:8,}  {row['attention']:10}"
            f"{row['numbers']:10}{pace:>9}{memory:>8}"
        )
    lines.append(f"weights, gradients and optimizer {needed / 1e9:.2f} GB of {free / 1e9:.1f} GB free")
    if any(row["seconds"] is None for row in rows):
        lines.append("does not fit: lower batch_rows and raise accumulate, or set recompute=true")
    else:
        total = sum(row["seconds"] * row["steps"] for row in rows)
        lines.append(f"fits; {total / 3600:.2f} hours, checks and saves not counted")
    return "\n".join(lines)


def _stage(config: TrainConfig, step: int) -> tuple[int, int, str, str]:
    attention = "indexer" if config.indexer_only(step) else "dense" if config.dense(step) else "sparse"
    numbers = "released" if config.quantised(step) else config.precision
    return config.length_at(step), sum(config.rows_at(step)), attention, numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One layout; bytes are of the fullest device, seconds those of a step, all simulated."""

    gpus: int
    pp: int
    ep: int
    cp: int
    micro_batches: int  # of a data rank
    weights: int
    gradients: int
    optimizer: int
    activations: int
    compute_s: float
    experts_s: float  # exchange of the experts, and what waves leave of it in sight
    seen_s: float
    stages_s: float
    sync_s: float
    bubble: float

    @property
    def bytes(self) -> int:
        """Bytes of the fullest device."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def fits(self) -> bool:
        """Whether an H200 holds that."""
        return self.bytes <= MEMORY - RESERVED

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return (self.compute_s + self.seen_s + self.stages_s) / (1 - self.bubble) + self.sync_s


def kept(config: ModelConfig, row: int) -> float:
    """Bytes a token that the forward keeps for the backward on CUDA, in BF16 and rows of `row`, all layers."""
    d, n, k, f, c = (
        config.hidden_size, config.hc_mult, config.num_experts_per_tok, config.moe_intermediate_size, config.head_dim
    )  # fmt: skip
    heads, ratios = config.num_attention_heads, (*config.layer_ratios, *[0] * config.num_nextn_predict_layers)
    # Of a site: streams, what enters (and its norm's input) and what leaves it; gates and Sinkhorn's divisors.
    sites = 2 * (2 * (n + 3) * d + 4 * (n * (n + 2) + 2 + 2 * n + n * n + (2 * config.hc_sinkhorn_iters - 1) * n))
    # Latent and row before and after their norms; queries likewise, what they found, and that turned back; its groups.
    attention = 2 * (2 * config.q_lora_rank + 2 * c + 4 * heads * c + config.o_groups * config.o_lora_rank) + 8 * heads
    # The router's float32; a pick's row, gate, up and product, and where it lies; the shared expert's.
    experts = 4 * d + 12 * config.n_routed_experts + k * (2 * d + 6 * f + 20) + 6 * f
    # Compressors' keys and scores, float32; of the indexer also queries, gates and the divergence's gradient.
    pooled = 8 * c * (sum(ratio > 0 for ratio in ratios) + ratios.count(CSA_RATIO))
    indexer = 16 * config.index_head_dim + config.index_n_heads * (2 * config.index_head_dim + 2) + row
    # Twice the head's site, the streams that leave and what the loss makes; the draft's entry.
    ends = 2 * (2 * (2 * n * d + 2 * d) + (n + 2) * d)
    return len(ratios) * (sites + attention + experts) + pooled + ratios.count(CSA_RATIO) * indexer + ends


def layout(
    config: ModelConfig, gpus: int, pp: int, ep: int, cp: int, *, tokens: int, row: int, rows: int = 1,
    utilised: float = UTILISED, ordered: bool = False,
) -> Layout:  # fmt: skip
    """Simulate one layout for steps of `tokens` in micro-batches of `rows` rows of `row`; raises ConfigError.

    `ordered` sums gradients after each micro-batch (fp32_ordered), else once a step.
    """
    layers, data = config.num_hidden_layers + config.num_nextn_predict_layers, gpus // pp
    micro = tokens * cp // (row * rows) // data
    if gpus % pp or data % ep or data % cp or config.n_routed_experts % ep or layers < 2 * pp or micro < pp:
        raise ConfigError(f"{gpus} GPUs as pp={pp}, ep={ep}, cp={cp} with {tokens // row} rows a step do not divide")
    part = row * rows // cp  # tokens of a micro-batch on a device
    parts = cost.parameters_by_part(config, draft=True)
    routed = sum(g.parameters for g in cost.inventory(config, draft=True) if ".experts." in g.name)
    stage = -(-layers // pp) / layers
    # Embedding and head, of AdamW: on one device where there is one stage, else on the first and the last.
    ends = (sum if pp == 1 else max)((parts["embedding"], parts["head"]))
    dense = int((sum(parts.values()) - routed - parts["embedding"] - parts["head"]) * stage) + ends
    experts, replicas = int(routed * stage / ep), data // ep
    own, own_ends = dense // data + experts // replicas, ends // data
    d, n, k, f = config.hidden_size, config.hc_mult, config.num_experts_per_tok, config.moe_intermediate_size
    # All gradients while they add up; of several ranks the own sums too, and of ordered ones what is sent and comes.
    held = 4 * (dense + experts)
    if gpus > 1:
        way = 8 * (dense + UNDER_WAY * ep * experts // max(1, round(layers * stage)))
        held = 4 * own + (way if ordered else held)
    # Dense weights in BF16, once for all micro-batches; the head's gradients, of the forward (not on a first stage)
    casts = 2 * (dense - ends) + 4 * (pp == 1) * (1 + config.num_nextn_predict_layers) * parts["head"]
    # On top: notes of indexers and counted choices in the loss, or an expert's backward before it lets go of anything.
    notes = 2 * row * config.layer_ratios.count(CSA_RATIO) / pp + 8 * k * config.n_routed_experts
    last = max(notes, 2 * k * (2 * d + 3 * f))
    flops = training_flops(config, row) * tokens / gpus
    compute = flops / (utilised * PEAKS["H200"])
    passed = tokens / data * layers / pp  # tokens times layers of a device
    link, far = LINK if ep <= NODE else FAR_LINK, FAR_LINK if data > NODE else LINK
    sent = 8 * d * k * (ep - 1) / ep * passed  # BF16 there and back, forward and backward
    # Gradients: zeros, copy and two sums of what comes, their way as far as the backward does not hide it; then values.
    spread = dense * (1 - 1 / data) + experts * (1 - 1 / replicas)
    moved, times = 24 * (dense + (ep if ordered else 1) * experts) / COPIED, micro if ordered else 1
    way = 4 * (spread + ordered * (ep - 1) * experts * (1 - 1 / replicas)) * times / far
    sync = (
        moved * times + max(4 * dense / far, way - ordered * compute * 2 / 3) + 4 * spread / far + 20 * spread / COPIED
    )
    # What waves hide: the experts' products of the other waves.
    hidden = 18.0 * d * f * k * passed / (utilised * PEAKS["H200"]) * (1 - 1 / WAVES)
    return Layout(
        gpus=gpus, pp=pp, ep=ep, cp=cp, micro_batches=micro, weights=4 * (dense + experts), gradients=held,
        optimizer=4 * own + 4 * own_ends,
        activations=int(min(pp, micro) * part * kept(config, row) / pp + casts + part * last),
        compute_s=compute, experts_s=sent / link, seen_s=max(0.0, sent / link - hidden),
        stages_s=0.0 if pp == 1 else 4 * (n + 1) * d * tokens / data / FAR_LINK,
        sync_s=sync if gpus > 1 else 0.0,
        bubble=(pp - 1) / (micro + pp - 1),
    )  # fmt: skip


def layouts(config: ModelConfig, gpus: int, *, tokens: int, row: int) -> Iterator[Layout]:
    """Yield every layout of powers of two that divides."""
    powers = [1 << i for i in range(gpus.bit_length())]
    for pp, ep, cp in itertools.product(powers, powers, powers[:4]):
        with contextlib.suppress(ConfigError):
            yield layout(config, gpus, pp, ep, cp, tokens=tokens, row=row)


def simulated(name: str, config: ModelConfig, gpus: int, row: int = 4096) -> str:
    """Return the layout that would be taken, why, the next best and published ones, as text."""
    tokens = BATCH.get(name, 1 << 22)
    every = layouts(config, gpus, tokens=tokens, row=row)
    # What is quicker by less than a hundredth is not: then the one that cuts rows least.
    found = sorted(
        every, key=lambda one: (not one.fits, int(100 * math.log(one.step_s if one.fits else one.bytes)), one.cp)
    )
    if not found:
        raise ConfigError(f"--gpus {gpus}: no layout of powers of two divides {name}; expected 1, 2, 4 ... GPUs")
    lines = [f"simulated, nothing here was run: {name} on {gpus} H200, {tokens:,} tokens a step in rows of {row:,}"]
    rows = [("taken" if found[0].fits else "none fits, nearest", found[0]), *(("next", one) for one in found[1:4])]
    for who, count, pp, ep in PUBLISHED.get(name, []):
        rows.append((f"layout of {who}", layout(config, count, pp, ep, 1, tokens=tokens, row=row)))
    for title, one in rows:
        lines.append(
            f"{title}: {one.gpus} GPUs, pp={one.pp} ep={one.ep} cp={one.cp} dp={one.gpus // one.pp // one.cp}, "
            f"{one.micro_batches} micro-batches: {one.bytes / 1e9:.1f} GB a GPU"
            f"{'' if one.fits else ' (does not fit)'} = weights {one.weights / 1e9:.1f} + gradients "
            f"{one.gradients / 1e9:.1f} + optimizer {one.optimizer / 1e9:.1f} + activations "
            f"{one.activations / 1e9:.1f}\n    step {one.step_s:.1f} s ({tokens / one.step_s:,.0f} tok/s): compute "
            f"{one.compute_s:.1f}, experts' exchange {one.experts_s:.1f} of which {one.seen_s:.1f} in sight, stages "
            f"{one.stages_s:.2f}, gradients {one.sync_s:.2f}, bubble {one.bubble:.1%}"
        )
    near = "stays in a node" if found[0].ep <= NODE else "crosses nodes: smaller groups do not fit or take longer"
    count = sum(one.fits for one in found)
    near += "; parts of rows (cp) run on CPUs only as yet" if found[0].cp > 1 else ""
    lines.append(f"why: the quickest of {count} that fit, of {len(found)} layouts; its experts' exchange {near}")
    return "\n".join(lines)
