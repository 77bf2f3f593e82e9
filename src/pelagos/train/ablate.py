"""Ablations as commands: the arms of a study spend equal FLOPs on the same data; one table, one chart.

FLOPs are those of `meter.training_flops`; an arm that is dearer a token gets fewer steps. Every run is an ordinary
run directory and resumes as one. What comes out stands as measured.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pelagos.config import ModelConfig
from pelagos.errors import ConfigError, MissingDependency
from pelagos.model.attention import CSA_RATIO
from pelagos.train.meter import Meter, chart, training_flops
from pelagos.train.precision import Stored, set_precision
from pelagos.train.recipe import TrainConfig
from pelagos.train.trainer import Trainer

STUDIES = ("optimizer", "residual", "attention", "precision", "mtp")
OPEN_GATE = 30.0  # a bias whose sigmoid is 1 in float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to train: changes of model and settings; `run` names the arm whose trained weights it takes over."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    plain_residual: bool = False
    run: str = ""


def arms_of(study: str, model: ModelConfig, config: TrainConfig) -> list[Arm]:
    """Return a study's arms, the report's own way first; raises ConfigError for an unknown study."""
    layers = model.num_hidden_layers
    heavy = next((r for r in model.layer_ratios if r not in (0, CSA_RATIO)), 128)
    tail = (0,) * (len(model.compress_ratios) - layers)
    wide = max(config.row_tokens, *(size for _, size in config.lengths))
    plain = {"quantise_from": 1, "precision": "bf16"}
    studies = {
        "optimizer": [Arm(name="muon"), Arm(name="adamw", config={"optimizer": "adamw"})],
        "residual": [Arm(name="mhc"), Arm(name="residual", model={"hc_mult": 1}, plain_residual=True)],
        "attention": [
            Arm(name="hybrid"),
            Arm(name="csa", model={"compress_ratios": (CSA_RATIO,) * layers + tail}),
            Arm(name="hca", model={"compress_ratios": (heavy,) * layers + tail}),
            Arm(name="dense", model={"compress_ratios": (0,) * layers + tail, "sliding_window": wide}),
        ],
        "precision": [
            Arm(name="bf16", config=plain),
            Arm(name="fp8", config=plain | {"precision": "fp8"}),
            Arm(name="fp4-qat"),
            Arm(name="fp4-post", config=plain, run="bf16"),
        ],
        "mtp": [Arm(name="mtp"), Arm(name="no-mtp", model={"num_nextn_predict_layers": 0})],
    }  # fmt: skip
    if study not in studies:
        raise ConfigError(f"study {study!r}: expected one of {', '.join(STUDIES)}")
    return studies[study]


def ablate(
    study: str, model: ModelConfig, config: TrainConfig, *, data: Path, out: Path, device: str,
    tokenizer: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train every arm of a study and return a row each; `config.steps` are those of the first arm.

    Writes OUT/ARM (a run directory each), OUT/STUDY.json, OUT/STUDY.md and, where matplotlib is, OUT/STUDY.png.
    """
    rows, arms = [], arms_of(study, model, config)
    budget = training_flops(dataclasses.replace(model, **arms[0].model), config.row_tokens) * config.steps
    for arm in arms:
        shape = dataclasses.replace(model, **arm.model)
        cost = training_flops(shape, config.row_tokens)
        settings = dataclasses.replace(config, **{**arm.config, "steps": max(1, round(budget / cost))})
        place = {"data": data, "out": out / (arm.run or arm.name), "device": device, "tokenizer": tokenizer}
        trainer = Trainer(shape, settings, **place)
        if arm.plain_residual:
            _open_residual(trainer)
        trainer.resume()
        started = time.monotonic()
        trainer.run()
        seconds, scores = time.monotonic() - started, trainer.scores
        if arm.run:  # quantised after training: what FP4 costs weights that never met it
            set_precision(trainer.model, "released")
            Stored(trainer.model)
            scores = trainer.evaluate()
        text = [score for kind, score in scores.items() if kind != "chat"]
        rows.append({
            "arm": arm.name, "steps": trainer.step, "tokens": trainer.tokens, "flops": cost * trainer.tokens,
            "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "mean": sum(text) / len(text) if text else None, "heldout": scores, "seconds": seconds,
        })  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    report = {"study": study, "torch": torch.__version__, "device": device, "config": dataclasses.asdict(config)}
    (out / f"{study}.json").write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    (out / f"{study}.md").write_text(table(rows), encoding="utf-8")
    _chart(study, rows, arms, out)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table; held-out in bits a byte, chat in nats a token."""
    kinds = list(rows[0]["heldout"])
    lines = [f"| arm | {' | '.join(kinds)} | mean | steps | tokens | FLOPs |", "| --- " * (len(kinds) + 5) + "|"]
    for row in rows:
        scores = " | ".join(f"{row['heldout'][kind]:.4f}" for kind in kinds)
        mean = "-" if row["mean"] is None else f"{row['mean']:.4f}"
        spent = f"{row['steps']:,} | {row['tokens']:,} | {row['flops']:.3e}"
        lines.append(f"| {row['arm']} | {scores} | {mean} | {spent} |")
    return "\n".join(lines) + "\n"


@torch.no_grad()
def _open_residual(trainer: Trainer) -> None:
    """Make the hyper-connections of a model with one stream the plain residual: x + F(x), nothing learnt."""
    for name, parameter in trainer.model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf.startswith("hc_"):
            parameter.zero_()
            if leaf.endswith("_base"):
                parameter[0] = OPEN_GATE  # pre is 1; post is 2 sigmoid(0) = 1; a 1x1 comb is 1
            parameter.requires_grad_(False)


def _chart(study: str, rows: list[dict[str, Any]], arms: list[Arm], out: Path) -> None:
    lines = {}
    for row, arm in zip(rows, arms, strict=True):
        scale = row["flops"] / max(1, row["tokens"])
        logged = Meter(out / (arm.run or arm.name)).rows()
        label = row["arm"] + ("" if row["mean"] is None else f" {row['mean']:.3f}")
        lines[label] = [(r["tokens"] * scale, r["loss"]) for r in logged if "loss" in r]
    with contextlib.suppress(MissingDependency):
        title = f"{study}: training loss, held-out bits a byte in the legend"
        chart(out / f"{study}.png", {title: lines}, "training FLOPs")
