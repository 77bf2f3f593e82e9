"""The life of a training run on one device: steps, held-out checks, spikes, resume, export.

What a step should be is the recipe's business (recipe.py). Source: technical report 4.2.2, 4.2.3, 5.2.1.
"""

import collections
import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pelagos.checkpoint import write_checkpoint
from pelagos.config import ModelConfig
from pelagos.errors import CheckpointError, ConfigError, DataError, TrainingError
from pelagos.kernels.cross_entropy import cross_entropy
from pelagos.load import load_model, usable_device
from pelagos.model import Transformer
from pelagos.numerics import LOSSLESS_BINADES
from pelagos.train import lora, state
from pelagos.train.context import Context
from pelagos.train.data import IGNORE, KINDS, SPLITS, Batch, PackedBatches, Shard, read_shard, sha256_of
from pelagos.train.forward import Forward
from pelagos.train.guard import Ahead, SpikeDetector, routed, routers
from pelagos.train.init import initialise
from pelagos.train.meter import ClampHits, Meter, peak_flops, training_flops
from pelagos.train.objective import Losses, LossWeights, losses, token_loss, update_balance_bias
from pelagos.train.optim import SCHEDULES, OptimConfig, Optimizer
from pelagos.train.owners import Owners
from pelagos.train.precision import Stored, fp4_binades, set_precision
from pelagos.train.ranks import Ranks
from pelagos.train.recipe import FREE_ON_RESUME, TrainConfig, check_quantisable
from pelagos.train.stages import Pipeline, cut_layers
from pelagos.train.waves import divide_experts

PROGRESS = ("step", "tokens", "best", "stale", "scores")  # how far a run came, as its state says it
EXPORT_SHARD_BYTES = 15_000_000  # a shard of the bundled model stays under the 16 MiB that file hosts take
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
LARGE_VOCABULARY = 32_768  # from here on logits are made in parts


class Trainer:
    """Trains `model` on shards in `data` and keeps its state in `out`, where a later run resumes it.

    `tokenizer` is a directory of TOKENIZER_FILES: shards made with another one are refused, and `export` copies them.
    `start` names a released-format checkpoint to fine-tune instead of fresh weights; its config replaces `model`.
    Of several processes each is given its `ranks`; the first writes the log. Raises ConfigError for a device, a setting
    or a directory that cannot serve, DataError for shards that do not fit.
    """

    def __init__(
        self, model: ModelConfig, config: TrainConfig, *, data: Path, out: Path, device: str,
        tokenizer: Path | None = None, start: str | Path | None = None, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.config, self.out, self.tokenizer, self.start = config, out, tokenizer, start
        self.device = usable_device(device)
        self.ranks = ranks or Ranks(config, self.device, alone=True)
        loaded = None if start is None else load_model(start, device=self.device, part=self._cut).train()
        model = model if loaded is None else loaded.config
        check_quantisable(model, config)
        shards = [read_shard(data, s, tokenizer=tokenizer and tokenizer / TOKENIZER_FILES[0]) for s in SPLITS]
        for split, shard in zip(SPLITS, shards, strict=True):
            _check_vocabulary(shard, model, data / f"{split}.tokens")
        self.shard, self.heldout = shards
        self.digests = {n: entry["sha256"] for n, entry in self.shard.meta["splits"]["train"]["files"].items()}
        kinds = [kind for kind in self.heldout.meta["kinds"] if kind != "fim"]
        self.scored = [kind for kind in kinds if self.heldout.of_kind(kind).any()]
        if not self.scored:
            raise DataError(f"{data}: the held-out split has no sample to score (fim is not); run `pelagos data` again")
        self.length_stage, self.batches = 0, self._loader(0)
        on_gpu = self.device.type == "cuda"
        self.model = loaded or self._made(model)
        self.model.carrier = torch.bfloat16 if on_gpu else torch.float32
        if config.lora_rank:
            lora.attach(self.model, config.lora_rank, config.seed)
        if on_gpu:
            torch.set_float32_matmul_precision("high")
        options = OptimConfig(newton_schulz=SCHEDULES[config.newton_schulz], muon=config.optimizer == "muon")
        alone = self.ranks.size == 1
        self.optimizer = Optimizer(self.model, options) if alone else Owners(self.model, options, self.ranks, config)
        self.step, self.best, self.stale, self.tokens = 0, math.inf, 0, 0
        self.scores: dict[str, float] = {}
        self.recall: float | None = None
        self._stop_asked = self._stop_agreed = False
        self._health: list[Tensor] = []  # one scalar a step, finite if the step was; read only when something waits
        self.stored: Stored | None = None
        self.kind = ""
        self._set_stage(0)
        self.spikes = SpikeDetector(config.spike_window, config.spike_sigmas)
        self.ahead = Ahead(config.anticipate, self._fetch, self._route, self._data_state)
        self.meter, self.hits = Meter(out, quiet=not self.ranks.lead), ClampHits(self.model)
        large = on_gpu or model.vocab_size >= LARGE_VOCABULARY
        self.cross_entropy = cross_entropy if large else token_loss
        self.forward = Forward(self.model, recompute=config.recompute)
        self.pipeline: Pipeline | None = None
        if config.pp > 1:
            self.pipeline = Pipeline(self.forward, self.ranks, self.optimizer.collect, self.cross_entropy)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{out}: not usable as the run directory ({error.strerror or error})") from None

    def _made(self, config: ModelConfig) -> Transformer:
        """This rank's part of a fresh model: nothing else is ever in memory."""
        model = Transformer(config, device="meta")
        self._cut(model)
        initialise(model.to_empty(device=self.device), self.config.seed)
        return model

    def _cut(self, model: Transformer) -> None:
        config, ranks = self.config, self.ranks
        if config.pp > 1:
            cut_layers(model, ranks.pp.rank, config.pp)
        if config.ep > 1:
            ordered = config.grad_sync == "fp32_ordered"
            divide_experts(model, ranks.ep, waves=config.waves, overlap=config.overlap, ordered=ordered)

    def _loader(self, stage: int) -> PackedBatches:
        """The loader of a length stage; each stage draws anew, its seed set apart."""
        own = dict.fromkeys((k for k in self.shard.meta["kinds"] if k not in KINDS), 1.0)
        first, _ = self.config.lengths[stage]
        return self._packed(self.shard, first, own | dict(self.config.repeats), self.config.seed + 1000 * stage)

    def _packed(self, shard: Shard, step: int, repeats: Mapping[str, float], seed: int) -> PackedBatches:
        size = self.config.length_at(step)
        rows = self.config.batch_rows * self.config.row_tokens // size
        return PackedBatches(shard, batch_rows=rows, row_tokens=size, repeats=repeats, seed=seed)

    def _fetch(self, step: int) -> list[Batch]:
        stage = self.config.length_stage(step)
        if stage != self.length_stage:
            self.length_stage, self.batches = stage, self._loader(stage)
        return [self.batches.next(rows) for rows in self.config.rows_at(step)]

    def _data_state(self) -> dict[str, int]:
        return {"stage": self.length_stage} | self.batches.state

    @torch.no_grad()
    def _route(self, batch: Batch) -> list[Tensor]:
        """Return the experts the present weights choose for a batch, (T, K) int16 a layer."""
        notes: list[dict[str, Tensor]] = []
        self._losses(batch, LossWeights(), dense=self.config.dense(self.step), notes=notes)
        assert len(notes) == len(routers(self.model))
        return [note["chosen"].to(torch.int16) for note in notes]

    def describe(self) -> str:
        """Say on what device and in what dtypes this run computes, and how far it is."""
        count = sum(p.numel() for p in self.model.parameters())
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        dtypes = f"{str(self.model.carrier).removeprefix('torch.')} activations, float32 master weights"
        here = "" if self.ranks.size == 1 else f" in each of {self.ranks.size} processes,"
        return (
            f"{count:,} parameters{here} on {self.device} ({name}, {torch.get_num_threads()} CPU threads), {dtypes}; "
            f"step {self.step:,} of {self.config.steps:,}, {self._batch_tokens():,} tokens a step"
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
        if config.anticipate and state.newest(self.out) is None:
            self.save()  # somewhere to go back to
        while self.step < config.steps and self.stale < config.patience:
            with self._profiled():
                terms, norm = self._update()
            if config.anticipate and self._rolled_back(terms):
                started, seen = time.monotonic(), 0
                continue
            seen += 1
            self.step += 1
            if self.step % config.log_every == 0:
                self._report(terms, norm, (time.monotonic() - started) / seen)
                started, seen = time.monotonic(), 0
            if self.step % config.eval_every == 0 or self.step == config.steps:
                self._check_held_out()
                started, seen = time.monotonic(), 0
            if self._stop_agreed if self.ranks.size > 1 else self._stop_asked:
                self.save()
                return False
            if self.step % config.save_every == 0:
                self.save()
        self.save()
        return True

    def _profiled(self) -> Any:
        """A profile of step `profile_step` into `profile.json` (open it at ui.perfetto.dev), or nothing."""
        if self.step + 1 != self.config.profile_step:
            return contextlib.nullcontext()
        path = str(self.out / "profile.json")
        return torch.profiler.profile(on_trace_ready=lambda profile: profile.export_chrome_trace(path))

    def _rolled_back(self, terms: Losses) -> bool:
        """Whether this step's loss was a spike: then the last saved state is back and routes are anticipated."""
        again = self.step < self.ahead.until
        wrong = None if again else self.spikes.spike(float(terms.next_token))
        if wrong is None:
            return False
        spiked = self.step + 1
        self._health.clear()
        self._restore()
        self.ahead.until = max(spiked, self.step) + self.config.anticipate_steps
        self.meter.cut(self.step)
        line = (
            f"step {spiked}: {wrong}; back to step {self.step}, with experts chosen by weights "
            f"{self.config.anticipate} steps old until step {self.ahead.until}"
        )
        self.meter.write({"step": self.step, "spike_at": spiked, "anticipate_until": self.ahead.until}, line)
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
        row = {"step": self.step, "heldout": self.scores} | ({"recall": self.recall} if self.recall else {})
        recall = f", indexer recall {self.recall:.3f}" if self.recall else ""
        if self.kind == "released":
            row["fp4_binades"] = span = fp4_binades(self.model)
            if span > LOSSLESS_BINADES:
                recall += f"; FP4 scales span {span} binades in a block, more than the {LOSSLESS_BINADES} FP8 can hold"
        self._log(row, f"held-out {', '.join(parts)}{recall}{waiting}")

    def _require_finite(self) -> None:
        """Raise TrainingError naming the first step since the last call whose loss or gradient was not finite."""
        if not self._health:
            return
        finite = torch.stack(self._health).isfinite().tolist()
        self._health.clear()
        if not all(finite):
            step = self.step - len(finite) + finite.index(False) + 1
            path = state.newest(self.out)
            kept = f"{path} keeps the last good state" if path else "no state was saved yet"
            raise TrainingError(
                f"step {step}: loss or gradient is not finite, expected a number; stopped, {kept}. "
                f"Start again in another run directory with a lower lr (now {self.config.lr}) or clip_norm"
            )

    def _batch_tokens(self) -> int:
        return sum(self.config.rows_at(self.step)) * self.config.length_at(self.step)

    def _update(self) -> tuple[Losses, Tensor]:
        config = self.config
        self._set_stage(self.step)
        weights, dense, terms, load = config.weights_at(self.step), config.dense(self.step), None, None
        for parameter in self.model.parameters():
            parameter.grad = None
        batches, routes = self.ahead.take(self.step)
        rows = sum(len(batch.ids) for batch in batches)
        batches = [batch for place, batch in enumerate(batches) if self.ranks.mine(place)]
        if self.pipeline is not None:
            passed = self.pipeline.run(batches, weights, dense=dense, share=len(batches[0].ids) / rows)
            terms, load = passed[-1], torch.stack([each.load for each in passed]).sum(0)
        for place, batch in enumerate(batches if self.pipeline is None else []):
            with routed(self.model, routes[place] if routes else None):
                terms = self._losses(batch, weights, dense=dense)
            (terms.total * (len(batch.ids) / rows)).backward()
            self.optimizer.collect()
            load = terms.load if load is None else load + terms.load
        norm = self.optimizer.clip(config.clip_norm)
        with self.stored or contextlib.nullcontext():
            self.optimizer.step(config.lr_at(self.step))
        assert terms is not None
        assert load is not None
        terms, load, self._stop_agreed = self.ranks.agree(terms, load, self._stop_asked)
        if not config.indexer_only(self.step):
            update_balance_bias(self.model, load, config.balance_speed)
        self._health.append(terms.total.detach() + norm)
        self.tokens += rows * batches[0].ids.shape[1]
        return terms, norm

    def _set_stage(self, step: int) -> None:
        kind = "released" if self.config.quantised(step) else self.config.precision
        if kind != self.kind:
            set_precision(self.model, kind, fp8=self.config.precision == "fp8")
            self.kind = kind
            self.stored = Stored(self.model) if kind == "released" else None

    def _losses(
        self, batch: Batch, weights: LossWeights, *, dense: bool, notes: list[dict[str, Tensor]] | None = None
    ) -> Losses:
        ids, positions, segments, targets = (torch.from_numpy(a).to(self.device, non_blocking=True) for a in batch)
        options: dict[str, Any] = {"cross_entropy": self.cross_entropy, "forward": self.forward, "notes": notes}
        if self.pipeline is not None:
            return self.pipeline.score(batch, dense=dense)
        if self.ranks.cp.size > 1:
            options["context"] = Context(self.model.config, self.ranks.cp)
        return losses(self.model, ids, positions, segments, targets, weights, dense=dense, **options)

    def evaluate(self) -> dict[str, float]:
        """Return held-out loss a kind over up to `eval_rows` rows: bits per byte of text, nats a token for chat.

        Gradients stay enabled (and unused), so that the kernels are those of training.
        """
        scores, config, recall = {}, self.config, []
        step = max(0, self.step - 1)  # the numbers of the stage that the last step was in
        for kind in self.scored:
            nats, count, rows, batches = 0.0, 0, 0, self._packed(self.heldout, step, {kind: 1}, 0)
            for batch in batches.epoch():
                if rows >= config.eval_rows or (rows and len(batch.ids) < batches.batch_rows):
                    break
                terms = self._losses(batch, LossWeights(), dense=config.dense(step), notes=[])
                tokens = int((batch.targets != IGNORE).sum())
                nats, count, rows = nats + float(terms.next_token) * tokens, count + tokens, rows + len(batch.ids)
                recall += terms.recall
            unit = self._tokens_per_byte(kind) / math.log(2) if kind != "chat" else 1.0
            scores[kind] = nats / max(count, 1) * unit
        self.recall = float(torch.stack(recall).mean()) if recall else None
        return scores

    def _tokens_per_byte(self, kind: str) -> float:
        of_kind = self.heldout.of_kind(kind)
        predicted = (self.heldout.offsets[1:] - self.heldout.offsets[:-1] - 1)[of_kind].sum()
        return float(predicted) / self.heldout.bytes_of(kind)

    def _report(self, terms: Losses, norm: Tensor, seconds_a_step: float) -> None:
        self._require_finite()
        load, config, hits = terms.load.float(), self.config, self.hits.read(self.ranks.world.sum)
        pace = self._batch_tokens() / seconds_a_step
        row: dict[str, Any] = {
            "step": self.step, "tokens": self.tokens, "loss": float(terms.next_token), "mtp": float(terms.mtp),
            "balance": float(terms.balance) / len(load), "indexer": float(terms.indexer), "grad_norm": float(norm),
            "max_load": float((load.max(-1).values / load.mean(-1)).max()), "clamp_hits": hits,
            "lr": config.lr_at(self.step - 1), "tokens_per_s": pace,
        }  # fmt: skip
        utilised = ""
        if peak := peak_flops(self.device):
            row["mfu"] = training_flops(self.model.config, config.length_at(self.step - 1)) * pace / peak
            row["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            utilised = f" MFU {row['mfu']:.1%} {row['memory_gb']:.1f} GB"
        left = round((config.steps - self.step) * seconds_a_step)
        line = (
            f"loss {row['loss']:.4f} mtp {row['mtp']:.4f} indexer {row['indexer']:.3f} "
            f"grad norm {row['grad_norm']:.3f} max expert load {row['max_load']:.2f}x clamped {sum(hits.values()):,} "
            f"lr {row['lr']:.2e} "
            f"{pace:,.0f} tok/s{utilised} ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        )
        self._log(row, line)

    def _log(self, row: Mapping[str, Any], line: str) -> None:
        self.meter.write(row, f"step {self.step}/{self.config.steps} {line}")

    def save(self) -> None:
        """Write the run's state; the file appears whole or not at all.

        Raises TrainingError for weights that are not finite, CheckpointError when the disk fails; the state that was
        there then stays.
        """
        self._require_finite()
        state.write(self.out, self._facts(), self._tensors(), lead=self.ranks.lead)

    def _tensors(self) -> dict[str, Tensor]:
        return state.named(self.model, self.optimizer, self.stored)

    def _facts(self) -> dict[str, Any]:
        """What this run is and how far it came, tensors apart."""
        return {
            "config": dataclasses.asdict(self.config), "model_config": self.model.config.to_dict(),
            "shards": self.digests, "start": None if self.start is None else str(self.start),
            "ahead": self.ahead.state(), "spikes": list(self.spikes.losses),
            **{name: getattr(self, name) for name in PROGRESS},
        }  # fmt: skip

    def resume(self) -> bool:
        """Continue from the state in `out`, if any, and drop log lines of steps that it does not hold.

        The continued run is bitwise the uninterrupted one (same device, threads). Raises CheckpointError
        for a torn state and for one of another model, data or settings: the schedule and the stages are fractions of
        `steps`, so only FREE_ON_RESUME may differ.
        """
        if (old := self.out / "state.pt").exists():
            raise CheckpointError(f"{old}: a state of an older format; choose another --out or delete it")
        found = state.newest(self.out) is not None
        if found:
            self._restore()
        self.meter.cut(self.step)
        return found

    def _restore(self) -> None:
        path = state.newest(self.out)
        assert path is not None
        self._adopt(path, state.facts_of(path))
        state.read(path, self._tensors())

    def _adopt(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Continue at the step of `facts`; raises CheckpointError for those of another run."""
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in FREE_ON_RESUME}
        stored = {k: v for k, v in facts["config"].items() if k not in FREE_ON_RESUME}
        differences = [
            *_differences("model", facts["model_config"], self.model.config.to_dict()),
            *_differences("setting", stored, settings),
            *_differences("shard", facts["shards"], self.digests),
            *_differences("checkpoint", {"start": facts["start"]}, {"start": self.start and str(self.start)}),
        ]
        if differences:
            raise CheckpointError(
                f"{path} belongs to another run: {'; '.join(differences)}. Only {', '.join(sorted(FREE_ON_RESUME))} "
                "may change on resuming, because schedule and stages are fractions of one run; repeat its settings, "
                "choose another --out, or delete it"
            )
        for name in PROGRESS:
            setattr(self, name, facts[name])
        self._set_stage(self.step - 1)
        data = facts["ahead"]["data"]
        self.length_stage, self.batches = data["stage"], self._loader(data["stage"])
        self.batches.restore(data)
        self.ahead.restore(facts["ahead"], self.step)
        self.spikes.losses.clear()
        self.spikes.losses.extend(facts["spikes"])

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
        tensors = state.released(self.model, self.ranks)
        if not self.ranks.lead:
            collections.deque(tensors, maxlen=0)  # sends them
            return
        for source, target in self.check_export(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            shutil.copyfile(source, partial)
            partial.replace(target)
        write_checkpoint(path, tensors, self.model.config, shard_bytes=EXPORT_SHARD_BYTES)


def _check_vocabulary(shard: Shard, model: ModelConfig, path: Path) -> None:
    largest = int((shard.tokens & (shard.no_loss - 1)).max())
    if largest >= model.vocab_size:
        raise DataError(
            f"{path}: holds token {largest}, the model's vocab_size is {model.vocab_size}; "
            "make shards with this model's tokenizer (`pelagos data --tokenizer DIR`) or train another --model"
        )


def _differences(what: str, old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"{what} {key} was {old.get(key)!r}, now {new.get(key)!r}"
