"""The life of a training run on one device: schedule, steps, held-out checks, resume, export.

Source: technical report 4.2.2 (schedule, MTP weight, dense then sparse CSA), 5.2.1 (quantisation-aware stage).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pelagos.config import ModelConfig
from pelagos.errors import CheckpointError, ConfigError, DataError, TrainingError
from pelagos.load import save_model, usable_device
from pelagos.model import Transformer
from pelagos.numerics import FP4_GROUP
from pelagos.train.data import IGNORE, SPLITS, TOKEN_MASK, Batch, PackedBatches, Shard, read_shard, sha256_of
from pelagos.train.init import initialise
from pelagos.train.objective import Losses, LossWeights, losses, token_loss, update_balance_bias
from pelagos.train.optim import Optimizer

RUN_FORMAT = 2
EXPORT_SHARD_BYTES = 15_000_000  # a shard of the bundled model stays under the 16 MiB that file hosts take
SCORED = ("docs", "code", "books", "chat")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Settings a resumed run may change: they decide what is written and when, not what is learnt.
FREE_ON_RESUME = frozenset(("eval_every", "patience", "save_every", "log_every", "compile"))


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
        for f in dataclasses.fields(self):
            self._check_type(f.name, f.type, getattr(self, f.name))
        positive = (
            "steps batch_rows row_tokens accumulate lr clip_norm eval_every eval_rows patience save_every log_every"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a value > 0")
        for name in ("warmup_steps", "seed", "balance_speed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a value >= 0")
        for name in ("lr_final_frac", "decay_from", "sparse_from", "quantise_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a fraction in [0, 1]")

    @staticmethod
    def _check_type(name: str, kind: object, value: object) -> None:
        """Raise ConfigError unless a value fits its annotation; numbers may be whole where a fraction is meant."""
        whole = type(value) is int
        number = whole or (isinstance(value, float) and math.isfinite(value))
        if kind == "int" and not whole:
            raise ConfigError(f"{name}={value!r}: expected a whole number")
        if kind == "float" and not number:
            raise ConfigError(f"{name}={value!r}: expected a finite number")
        if kind == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r}: expected true or false")
        if name == "repeats":
            shares = list(value.values()) if isinstance(value, Mapping) else [None]
            if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in shares):
                raise ConfigError(f'{name}={value!r}: expected an object of numbers, such as {{"docs": 1.5}}')

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
    """Trains `model` on shards in `data` and keeps its state in `out`, where a later run resumes it.

    `tokenizer` is a directory of TOKENIZER_FILES: shards made with another one are refused, and `export` copies them.
    Raises ConfigError for a device, a setting or a directory that cannot serve, DataError for shards that do not fit.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        *,
        data: Path,
        out: Path,
        device: str,
        tokenizer: Path | None = None,
    ) -> None:
        self.config, self.out, self.tokenizer = config, out, tokenizer
        self.device = usable_device(device)
        _check_quantisable(model, config)
        shards = [read_shard(data, s, tokenizer=tokenizer and tokenizer / TOKENIZER_FILES[0]) for s in SPLITS]
        for split, shard in zip(SPLITS, shards, strict=True):
            _check_vocabulary(shard, model, data / f"{split}.tokens")
        train, self.heldout = shards
        self.digests = {name: entry["sha256"] for name, entry in train.meta["splits"]["train"]["files"].items()}
        self.scored = [kind for kind in SCORED if (self.heldout.kinds == self._kind(kind)).any()]
        if not self.scored:
            raise DataError(
                f"{data}: the held-out split has no sample of {', '.join(SCORED)}; run `pelagos data` again"
            )
        layout = {"batch_rows": config.batch_rows, "row_tokens": config.row_tokens, "seed": config.seed}
        self.batches = PackedBatches(train, repeats=config.repeats, **layout)
        on_gpu = self.device.type == "cuda"
        self.model = Transformer(model, device=self.device)
        self.model.carrier = torch.bfloat16 if on_gpu else torch.float32
        initialise(self.model, config.seed)
        if on_gpu:
            torch.set_float32_matmul_precision("high")
        self.optimizer = Optimizer(self.model)
        self.step, self.best, self.stale, self.tokens = 0, math.inf, 0, 0
        self.scores: dict[str, float] = {}
        self._stop_asked = False
        self._health: list[Tensor] = []  # one scalar a step, finite if the step was; read only when something waits
        self.cross_entropy = token_loss
        if config.compile:
            self.cross_entropy = torch.compile(token_loss, dynamic=False)
            torch._dynamo.config.recompile_limit = 64  # layer kinds x stages
            for block in (*self.model.layers, *self.model.mtp):
                for site in ("attention_site", "expert_site"):
                    setattr(block, site, torch.compile(getattr(block, site), dynamic=False))
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{out}: not usable as the run directory ({error.strerror or error})") from None

    def describe(self) -> str:
        """Say on what device and in what dtypes this run computes, and how far it is."""
        count = sum(p.numel() for p in self.model.parameters())
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        dtypes = f"{_plain(self.model.carrier)} activations, {_plain(self.model.embed.weight.dtype)} master weights"
        batch = self._batch_tokens()
        return (
            f"{count:,} parameters on {self.device} ({name}, {torch.get_num_threads()} CPU threads), {dtypes}; "
            f"step {self.step:,} of {self.config.steps:,}, {batch:,} tokens a step"
        )

    def stop(self) -> None:
        """Ask a running `run` to save and return after the step it is in; safe in a signal handler."""
        self._stop_asked = True

    def run(self) -> bool:
        """Train until the last step, or until the mean held-out loss has not fallen for `patience` checks.

        Returns whether the run is complete: False after `stop`, with the state saved. Raises TrainingError when a
        loss or gradient is not finite; the last saved state then stays.
        """
        config, started, seen = self.config, time.monotonic(), 0
        while self.step < config.steps and self.stale < config.patience:
            terms, norm = self._update()
            seen += 1
            self.step += 1
            if self.step % config.log_every == 0:
                self._report(terms, norm, (time.monotonic() - started) / seen)
                started, seen = time.monotonic(), 0
            if self.step % config.eval_every == 0 or self.step == config.steps:
                self._check_held_out()
                started, seen = time.monotonic(), 0
            if self._stop_asked:
                self.save()
                return False
            if self.step % config.save_every == 0:
                self.save()
        self.save()
        return True

    def _check_held_out(self) -> None:
        self._require_finite()
        self.scores = self.evaluate()
        mean = sum(self.scores.values()) / len(self.scores)
        self.stale = 0 if mean < self.best else self.stale + 1
        self.best = min(self.best, mean)
        units = {kind: "nats/token" if kind == "chat" else "bits/byte" for kind in self.scores}
        parts = [f"{kind} {score:.4f} {units[kind]}" for kind, score in self.scores.items()]
        waiting = f", no better for {self.stale} of {self.config.patience} checks" if self.stale else ""
        self._log({"step": self.step, "heldout": self.scores}, f"held-out {', '.join(parts)}{waiting}")

    def _require_finite(self) -> None:
        """Raise TrainingError naming the first step since the last call whose loss or gradient was not finite."""
        if not self._health:
            return
        finite = torch.stack(self._health).isfinite().tolist()
        self._health.clear()
        if not all(finite):
            step = self.step - len(finite) + finite.index(False) + 1
            path = self.out / "state.pt"
            kept = f"{path} keeps the last good state" if path.exists() else "no state was saved yet"
            raise TrainingError(
                f"step {step}: loss or gradient is not finite, expected a number; stopped, {kept}. "
                f"Start again in another run directory with a lower lr (now {self.config.lr}) or clip_norm"
            )

    def _batch_tokens(self) -> int:
        return self.config.batch_rows * self.config.row_tokens * self.config.accumulate

    def _update(self) -> tuple[Losses, Tensor]:
        """One optimizer step over `accumulate` batches."""
        config = self.config
        self._set_stage(self.step)
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
        self._health.append(terms.total.detach() + norm)
        self.tokens += self._batch_tokens()
        return terms, norm

    def _set_stage(self, step: int) -> None:
        quantise = step >= self.config.quantise_from * self.config.steps
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
        for kind in self.scored:
            layout = {"batch_rows": config.batch_rows, "row_tokens": config.row_tokens, "seed": 0}
            nats, count, rows = 0.0, 0, 0
            for batch in PackedBatches(self.heldout, repeats={kind: 1}, **layout).epoch():
                if rows >= config.eval_rows or (rows and len(batch.ids) < config.batch_rows):
                    break
                terms = self._losses(batch, LossWeights(), dense=dense)
                tokens = int((batch.targets != IGNORE).sum())
                nats, count, rows = nats + float(terms.next_token) * tokens, count + tokens, rows + len(batch.ids)
            unit = self._tokens_per_byte(kind) / math.log(2) if kind != "chat" else 1.0
            scores[kind] = nats / max(count, 1) * unit
        return scores

    def _kind(self, name: str) -> int:
        return list(self.heldout.meta["kinds"]).index(name)

    def _tokens_per_byte(self, kind: str) -> float:
        of_kind = self.heldout.kinds == self._kind(kind)
        predicted = (self.heldout.offsets[1:] - self.heldout.offsets[:-1] - 1)[of_kind].sum()
        return float(predicted) / self.heldout.bytes_of(kind)

    def _report(self, terms: Losses, norm: Tensor, seconds_a_step: float) -> None:
        self._require_finite()
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
            "tokens_per_s": self._batch_tokens() / seconds_a_step,
        }
        left = round((self.config.steps - self.step) * seconds_a_step)
        line = (
            f"loss {row['loss']:.4f} mtp {row['mtp']:.4f} grad norm {row['grad_norm']:.3f} "
            f"max expert load {row['max_load']:.2f}x lr {row['lr']:.2e} {row['tokens_per_s']:,.0f} tok/s "
            f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )
        self._log(row, line)

    def _log(self, row: Mapping[str, Any], line: str) -> None:
        """One JSON line in the run's log, one line to read on stderr."""
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        print(f"step {self.step}/{self.config.steps} {line}", file=sys.stderr, flush=True)

    def save(self) -> None:
        """Write the run's state; the file appears whole or not at all.

        Raises TrainingError for weights that are not finite, CheckpointError when the disk fails; the state that was
        there then stays.
        """
        self._require_finite()
        state = {
            "format": RUN_FORMAT,
            "config": dataclasses.asdict(self.config),
            "model_config": self.model.config.to_dict(),
            "shards": self.digests,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.batches.state,
            "step": self.step,
            "tokens": self.tokens,
            "best": self.best,
            "stale": self.stale,
            "scores": self.scores,
        }
        partial = self.out / "state.pt.partial"
        try:
            torch.save(state, partial)
            partial.replace(self.out / "state.pt")
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"{partial}: state of step {self.step} not written ({error})") from None

    def resume(self) -> bool:
        """Continue from the state in `out`, if any, and drop log lines of steps that it does not hold.

        The continued run is bitwise the uninterrupted one (same device, threads, compile). Raises CheckpointError
        for a torn state and for one of another model, data or settings: the schedule and the stages are fractions of
        `steps`, so only FREE_ON_RESUME may differ.
        """
        path = self.out / "state.pt"
        if path.exists():
            self._restore(path)
        log = self.out / "log.jsonl"
        if log.exists():
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if _step_of(line) <= self.step]
            partial = log.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            partial.replace(log)
        return path.exists()

    def _restore(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{path}: not a readable run state ({reason}); delete it to start over") from None
        if not isinstance(state, dict) or state.get("format") != RUN_FORMAT:
            raise CheckpointError(f"{path}: not a run state of format {RUN_FORMAT}; choose another --out or delete it")
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in FREE_ON_RESUME}
        stored = {k: v for k, v in state["config"].items() if k not in FREE_ON_RESUME}
        differences = [
            *_differences("model", state["model_config"], self.model.config.to_dict()),
            *_differences("setting", stored, settings),
            *_differences("shard", state["shards"], self.digests),
        ]
        if differences:
            raise CheckpointError(
                f"{path} belongs to another run: {'; '.join(differences)}. Only {', '.join(sorted(FREE_ON_RESUME))} "
                "may change on resuming, because schedule and stages are fractions of one run; repeat its settings, "
                "choose another --out, or delete it"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.restore(state["data"])
        self.step, self.tokens, self.scores = state["step"], state["tokens"], state["scores"]
        self.best, self.stale = state["best"], state["stale"]
        self._set_stage(self.step - 1)

    def check_export(self, path: Path) -> list[tuple[Path, Path]]:
        """Return the (source, target) tokenizer files an export to `path` copies.

        Raises CheckpointError when `path` is a file or holds another tokenizer.
        """
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path}: is a file, expected a directory or a new path to export to")
        copies = []
        sources = [] if self.tokenizer is None else [self.tokenizer / name for name in TOKENIZER_FILES]
        for source in filter(Path.exists, sources):
            target = path / source.name
            if not target.exists():
                copies.append((source, target))
            elif sha256_of(source) != sha256_of(target):
                raise CheckpointError(f"{target}: another file than {source}; export to another directory")
        return copies

    def export(self, path: Path) -> None:
        """Write the model as a released-format checkpoint (FP4 experts, FP8 projections) with its tokenizer.

        The checkpoint appears whole or not at all; the tokenizer is there before it.
        """
        for source, target in self.check_export(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            shutil.copyfile(source, partial)
            partial.replace(target)
        save_model(self.model, path, shard_bytes=EXPORT_SHARD_BYTES)


def _check_quantisable(model: ModelConfig, config: TrainConfig) -> None:
    """Refuse at the start what the quantised stage would refuse after most of the run."""
    sizes = {name: getattr(model, name) for name in ("hidden_size", "moe_intermediate_size", "index_head_dim")}
    odd = [f"{name}={size}" for name, size in sizes.items() if size % FP4_GROUP]
    if config.quantise_from < 1 and odd:
        raise ConfigError(
            f"quantise_from={config.quantise_from}: FP4 needs multiples of {FP4_GROUP}, here {', '.join(odd)}; "
            "--set quantise_from=1 trains it without the quantised stage"
        )


def _check_vocabulary(shard: Shard, model: ModelConfig, path: Path) -> None:
    largest = int((shard.tokens & TOKEN_MASK).max())
    if largest >= model.vocab_size:
        raise DataError(
            f"{path}: holds token {largest}, the model's vocab_size is {model.vocab_size}; "
            "make shards with this model's tokenizer (`pelagos data --tokenizer DIR`) or train another --model"
        )


def _differences(what: str, old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"{what} {key} was {old.get(key)!r}, now {new.get(key)!r}"


def _step_of(line: str) -> float:
    """Step of a log line; a torn one counts as beyond any step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
