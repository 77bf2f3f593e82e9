"""The life of a training run on one device: schedule, steps, held-out checks, resume, export.

Source: technical report 4.2.2 (schedule, MTP weight, dense then sparse CSA), 5.2.1 (quantisation-aware stage).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pelagos.config import ModelConfig
from pelagos.errors import CheckpointError, ConfigError
from pelagos.load import save_model
from pelagos.model import Transformer
from pelagos.train.data import IGNORE, Batch, PackedBatches, read_shard
from pelagos.train.init import initialise
from pelagos.train.objective import Losses, LossWeights, losses, token_loss, update_balance_bias
from pelagos.train.optim import Optimizer

RUN_FORMAT = 1
EXPORT_SHARD_BYTES = 15_000_000  # a shard of the bundled model stays under the 16 MiB that file hosts take
SCORED = ("docs", "code", "books", "chat")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run. Stages are fractions of `steps`: LR decays from `decay_from` on, CSA is sparse from `sparse_from` on,
    weights and activations are quantised from `quantise_from` on."""

    steps: int
    batch_rows: int = 32
    row_tokens: int = 2048
    accumulate: int = 1
    lr: float = 3e-3
    lr_final_frac: float = 0.02
    warmup_steps: int = 100
    decay_from: float = 0.5
    sparse_from: float = 0.6
    quantise_from: float = 0.7
    balance_speed: float = 1e-3
    clip_norm: float = 1.0
    seed: int = 0
    repeats: Mapping[str, float] = field(
        default_factory=lambda: {"docs": 1, "code": 1, "books": 1, "chat": 1, "fim": 1}
    )
    eval_every: int = 500
    eval_rows: int = 32
    patience: int = 4
    save_every: int = 500
    log_every: int = 20
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_rows", "row_tokens", "accumulate", "eval_every", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a whole number >= 1")
        for name in ("decay_from", "sparse_from", "quantise_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a fraction of the run in [0, 1]")

    def lr_at(self, step: int) -> float:
        """Linear warm-up, flat, cosine decay to `lr_final_frac` of the peak."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        start = self.decay_from * self.steps
        progress = min(1.0, max(0.0, (step - start) / max(1.0, self.steps - start)))
        return self.lr * (self.lr_final_frac + (1 - self.lr_final_frac) * 0.5 * (1 + math.cos(math.pi * progress)))

    def weights_at(self, step: int) -> LossWeights:
        """MTP weighs 0.3, then 0.1 once the decay starts."""
        return LossWeights(mtp=0.3 if step < self.decay_from * self.steps else 0.1)


class Trainer:
    """Trains `config`'s model on shards in `data` and keeps its state in `out`, where a later run resumes it."""

    def __init__(self, model: ModelConfig, config: TrainConfig, *, data: Path, out: Path, device: str) -> None:
        self.config, self.out = config, out
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.model = Transformer(model, device=self.device)
        self.model.carrier = torch.bfloat16 if on_gpu else torch.float32
        initialise(self.model, config.seed)
        if on_gpu:
            torch.set_float32_matmul_precision("high")
        self.optimizer = Optimizer(self.model)
        layout = {"batch_rows": config.batch_rows, "row_tokens": config.row_tokens, "seed": config.seed}
        self.batches = PackedBatches(read_shard(data, "train"), repeats=config.repeats, **layout)
        self.heldout = read_shard(data, "heldout")
        self.step, self.best, self.stale, self.tokens = 0, math.inf, 0, 0
        self.cross_entropy = token_loss
        if config.compile:
            self.cross_entropy = torch.compile(token_loss, dynamic=False)
            torch._dynamo.config.recompile_limit = 64  # layer kinds x stages
            for block in (*self.model.layers, *self.model.mtp):
                block.attention_site = torch.compile(block.attention_site, dynamic=False)
                block.expert_site = torch.compile(block.expert_site, dynamic=False)
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Train until the last step, or until the mean held-out loss has not fallen for `patience` checks."""
        config, started, seen = self.config, time.monotonic(), 0
        while self.step < config.steps:
            terms, norm = self._update()
            seen += config.batch_rows * config.row_tokens * config.accumulate
            self.step += 1
            if self.step % config.log_every == 0:
                self._report(terms, norm, seen / (time.monotonic() - started))
                started, seen = time.monotonic(), 0
            if self.step % config.eval_every == 0 or self.step == config.steps:
                scores = self.evaluate()
                self._log({"step": self.step, "heldout": scores})
                if self._should_stop(scores):
                    break
                started, seen = time.monotonic(), 0
            if self.step % config.save_every == 0:
                self.save()
        self.save()

    def _should_stop(self, scores: Mapping[str, float]) -> bool:
        mean = sum(scores.values()) / len(scores)
        self.stale = 0 if mean < self.best else self.stale + 1
        self.best = min(self.best, mean)
        return self.stale >= self.config.patience

    def _update(self) -> tuple[Losses, Tensor]:
        """One optimizer step over `accumulate` batches."""
        config = self.config
        self._set_stage()
        weights, terms, load = config.weights_at(self.step), None, None
        for parameter in self.model.parameters():
            parameter.grad = None
        for _ in range(config.accumulate):
            batch = self.batches.next()
            dense = self.step < config.sparse_from * config.steps
            terms = self._losses(batch, weights, dense=dense)
            (terms.total / config.accumulate).backward()
            load = terms.load if load is None else load + terms.load
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step(config.lr_at(self.step))
        assert terms is not None
        assert load is not None
        update_balance_bias(self.model, load, config.balance_speed)
        self.tokens += config.batch_rows * config.row_tokens * config.accumulate
        return terms, norm

    def _set_stage(self) -> None:
        quantise = self.step >= self.config.quantise_from * self.config.steps
        mode = "released" if quantise else "reference"
        if self.model.mode != mode:
            self.model.set_mode(mode, master_weights=quantise)

    def _losses(self, batch: Batch, weights: LossWeights, *, dense: bool) -> Losses:
        ids, positions, segments, targets = (torch.from_numpy(a).to(self.device, non_blocking=True) for a in batch)
        options = {"dense": dense, "cross_entropy": self.cross_entropy}
        return losses(self.model, ids, positions, segments, targets, weights, **options)

    def evaluate(self) -> dict[str, float]:
        """Return held-out loss a kind over up to `eval_rows` rows: bits per byte of text, nats a token for chat.

        Gradients stay enabled (and unused): under no_grad every compiled block would be compiled once more.
        """
        scores, config = {}, self.config
        dense = self.step <= config.sparse_from * config.steps
        for kind in SCORED:
            if not (self.heldout.kinds == self._kind(kind)).any():
                continue
            layout = {"batch_rows": config.batch_rows, "row_tokens": config.row_tokens, "seed": 0}
            nats, count, rows = 0.0, 0, 0
            for batch in PackedBatches(self.heldout, repeats={kind: 1}, **layout).epoch():
                if rows >= config.eval_rows or (rows and len(batch.ids) < config.batch_rows):
                    break
                terms = self._losses(batch, LossWeights(), dense=dense)
                tokens = int((batch.targets != IGNORE).sum())
                nats, count, rows = nats + float(terms.next_token) * tokens, count + tokens, rows + len(batch.ids)
            scores[kind] = nats / count * (self._tokens_per_byte(kind) / math.log(2) if kind != "chat" else 1.0)
        return scores

    def _kind(self, name: str) -> int:
        return list(self.heldout.meta["kinds"]).index(name)

    def _tokens_per_byte(self, kind: str) -> float:
        of_kind = self.heldout.kinds == self._kind(kind)
        predicted = (self.heldout.offsets[1:] - self.heldout.offsets[:-1] - 1)[of_kind].sum()
        return float(predicted) / self.heldout.bytes_of(kind)

    def _report(self, terms: Losses, norm: Tensor, rate: float) -> None:
        load = terms.load.float()
        row = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": float(terms.next_token),
            "mtp": float(terms.mtp),
            "balance": float(terms.balance) / len(load),
            "indexer": float(terms.indexer),
            "grad_norm": float(norm),
            "max_load": float((load.max(-1).values / load.mean(-1)).max()),
            "lr": self.config.lr_at(self.step - 1),
            "tokens_per_s": rate,
        }
        self._log(row)

    def _log(self, row: Mapping[str, Any]) -> None:
        """One JSON line in the run's log, one short line on stderr."""
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        flat = row | row["heldout"] if "heldout" in row else row
        shown = " ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in flat.items() if k != "heldout"
        )
        print(shown, file=sys.stderr, flush=True)

    def save(self) -> None:
        """Write the run's state; the file appears whole or not at all."""
        state = {
            "format": RUN_FORMAT,
            "config": dataclasses.asdict(self.config),
            "model_config": self.model.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.batches.state,
            "step": self.step,
            "tokens": self.tokens,
            "best": self.best,
            "stale": self.stale,
        }
        partial = self.out / "state.pt.partial"
        torch.save(state, partial)
        partial.replace(self.out / "state.pt")

    def resume(self) -> bool:
        """Continue from the state in `out`, if any; raises CheckpointError when it is torn or another model's."""
        path = self.out / "state.pt"
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path}: not a readable run state ({error}); delete it to start over") from None
        if state.get("format") != RUN_FORMAT or state["model_config"] != self.model.config.to_dict():
            raise CheckpointError(f"{path}: a run of another format or model; choose another --out or delete it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.restore(state["data"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.best, self.stale = state["best"], state["stale"]
        return True

    def export(self, path: Path) -> None:
        """Write the model as a released-format checkpoint (FP4 experts, FP8 projections)."""
        save_model(self.model, path, shard_bytes=EXPORT_SHARD_BYTES)
