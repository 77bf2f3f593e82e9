"""What a run would take: memory by arithmetic before anything is built, then two steps of every stage, measured."""

import itertools
import os
import time
from typing import Any

import torch

from pelagos import cost
from pelagos.config import ModelConfig
from pelagos.errors import CapacityError
from pelagos.train.recipe import TrainConfig
from pelagos.train.trainer import Trainer

BYTES_A_PARAMETER = 16  # float32 master, gradient, momentum, and the second moment or an update in flight


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
    config = trainer.config
    for key, group in itertools.groupby(range(config.steps), lambda step: _stage(config, step)):
        steps = list(group)
        first, count = steps[0], len(steps)
        row: dict[str, Any] = dict(zip(("row_tokens", "rows", "attention", "numbers"), key, strict=True))
        row |= {"from": first, "steps": count}
        cuda = trainer.device.type == "cuda"
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
    size = config.lengths[config.length_stage(step)][1]
    return size, sum(config.rows_at(step)), attention, "released" if config.quantised(step) else config.precision
