"""The settings of one run and what they mean at each step: learning rate, batch, row length, phase, loss weights.

Source: technical report 2.4, 4.2.2, 4.2.3, 5.2.1; what it leaves open follows V3 and V3.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pelagos.config import ModelConfig
from pelagos.errors import ConfigError
from pelagos.numerics import FP4_GROUP
from pelagos.train.data import ALIGN
from pelagos.train.objective import LossWeights
from pelagos.train.optim import SCHEDULES

# Settings a resumed run may change: they decide what is written and when, not what is learnt.
WORLD = ("ep", "cp", "pp", "waves", "overlap", "owners")  # who computes what
FREE_ON_RESUME = frozenset(("eval_every", "patience", "save_every", "log_every", "profile_step", *WORLD))
CHOICES = {
    "optimizer": ("muon", "adamw"), "precision": ("bf16", "fp8"), "newton_schulz": tuple(SCHEDULES),
    "grad_sync": ("fp32_ordered", "bf16_stochastic"),
}  # fmt: skip
RAMP_LEVELS = 3  # the batch doubles at most so often while it grows


def _number(value: object) -> bool:
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


Count = Whole = int
Positive = Weight = Fraction = Share = float
Numbers = Mapping[str, Any]
# What each of these takes; numbers may be whole where a fraction is meant.
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Count": ("a whole number > 0", lambda v: type(v) is int and v > 0),
    "Whole": ("a whole number >= 0", lambda v: type(v) is int and v >= 0),
    "Positive": ("a finite number > 0", lambda v: _number(v) and v > 0),
    "Weight": ("a finite number >= 0", lambda v: _number(v) and v >= 0),
    "Fraction": ("a fraction in [0, 1]", lambda v: _number(v) and 0 <= v <= 1),
    "Share": ("a fraction in (0, 1]", lambda v: _number(v) and 0 < v <= 1),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "Numbers": ('an object of numbers, such as {"0.6": 4096}',
                lambda v: isinstance(v, Mapping) and all(map(_number, v.values()))),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run. `*_from` and `ramp_until` are fractions of `steps`; a batch is batch_rows x row_tokens x accumulate.

    LR decays from `decay_from`; rows grow as `row_tokens_from` says ({"0.6": 4096}), the tokens of a batch stay. CSA is
    sparse from `sparse_from` on, after `indexer_steps` in which only the indexer learns (0: it learns all along). From
    `quantise_from` on weights, activations and caches are quantised as released; before, products are in `precision`.
    `anticipate` > 0 watches for spikes of the loss and answers with routes that many steps old. Under torchrun micro-
    batches are dealt to the processes; each hands rows to `cp`, layers to `pp` of them, and `ep` share the experts, in
    `waves`. A matrix has one owner among `owners` (0: all). `grad_sync` says how gradients are added.
    """

    steps: Count
    batch_rows: Count = 32
    row_tokens: Count = 2048
    row_tokens_from: Numbers = field(default_factory=dict)
    accumulate: Count = 1
    ramp_from_frac: Share = 1.0
    ramp_until: Fraction = 0.03
    optimizer: str = "muon"
    newton_schulz: str = "deepseek_v4"
    lr: Positive = 3e-3
    lr_final_frac: Fraction = 0.02
    warmup_steps: Whole = 100
    decay_from: Fraction = 0.5
    sparse_from: Fraction = 0.6
    indexer_steps: Whole = 0
    indexer_lr: Positive = 1e-3
    quantise_from: Fraction = 0.7
    precision: str = "bf16"
    balance_speed: Weight = 1e-3
    balance_weight: Weight = 1e-4
    clip_norm: Positive = 1.0
    anticipate: Whole = 0
    anticipate_steps: Count = 200
    spike_sigmas: Positive = 6.0
    spike_window: Count = 200
    lora_rank: Whole = 0
    recompute: bool = False
    seed: Whole = 0
    repeats: Numbers = field(default_factory=lambda: dict.fromkeys(("docs", "code", "books", "chat", "fim"), 1))
    eval_every: Count = 500
    eval_rows: Count = 32
    patience: Count = 4
    save_every: Count = 500
    log_every: Count = 20
    profile_step: Whole = 0
    grad_sync: str = "fp32_ordered"
    ep: Count = 1
    cp: Count = 1
    pp: Count = 1
    waves: Count = 1
    overlap: bool = True
    owners: Whole = 0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, known = getattr(self, f.name), CHOICES.get(f.name, ())
            said, fits = RULES.get(str(f.type)) or (f"one of {', '.join(known)}", known.__contains__)
            if not fits(value):
                raise ConfigError(f"{f.name}={value!r}: expected {said}")
        self._check_lengths()

    def _check_lengths(self) -> None:
        if self.row_tokens % ALIGN:
            raise ConfigError(f"row_tokens={self.row_tokens}: expected a multiple of {ALIGN}")
        for key, size in self.row_tokens_from.items():
            try:
                share = float(key)
            except (TypeError, ValueError):
                share = -1.0
            if not 0 < share < 1 or type(size) is not int or size < ALIGN or size % ALIGN:
                raise ConfigError(
                    f"row_tokens_from: {key!r}: {size!r}, expected a fraction in (0, 1) and a multiple of {ALIGN}"
                )
            if self.batch_rows * self.row_tokens % size:
                raise ConfigError(
                    f"row_tokens_from: rows of {size} tokens do not divide the {self.batch_rows} x {self.row_tokens} "
                    "tokens of a micro-batch; choose batch_rows x row_tokens as a multiple of the longest row"
                )

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(first step, row tokens) of each length stage, in order."""
        later = sorted((math.ceil(float(share) * self.steps), size) for share, size in self.row_tokens_from.items())
        return [(0, self.row_tokens), *later]

    def length_stage(self, step: int) -> int:
        """Return the number of the length stage that a step is in."""
        return sum(step >= first for first, _ in self.lengths) - 1

    def length_at(self, step: int) -> int:
        """Return the tokens of a row of a step."""
        return self.lengths[self.length_stage(step)][1]

    def rows_at(self, step: int) -> list[int]:
        """Return the rows of each micro-batch of a step: the batch grows by doubling over the first `ramp_until`."""
        micro = self.batch_rows * self.row_tokens // self.length_at(step)
        rows, until = micro * self.accumulate, self.ramp_until * self.steps
        if self.ramp_from_frac < 1 and step < until:
            levels = min(RAMP_LEVELS, max(1, round(-math.log2(self.ramp_from_frac))))
            done = int(step / until * levels)
            rows = max(1, round(rows * self.ramp_from_frac ** ((levels - done) / levels)))
        return [min(micro, rows - start) for start in range(0, rows, micro)]

    def lr_at(self, step: int) -> float:
        """Linear warm-up, flat, cosine decay to `lr_final_frac` of the peak; constant while only the indexer learns."""
        if self.indexer_only(step):
            return self.indexer_lr
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        start = self.decay_from * self.steps
        progress = min(1.0, max(0.0, (step - start) / max(1.0, self.steps - start)))
        return self.lr * (self.lr_final_frac + (1 - self.lr_final_frac) * 0.5 * (1 + math.cos(math.pi * progress)))

    def dense(self, step: int) -> bool:
        """Whether CSA attends all visible entries."""
        return step < self.sparse_from * self.steps

    def indexer_only(self, step: int) -> bool:
        """Whether the model is frozen and the indexer learns the dense attention: just before sparsity begins."""
        start = math.ceil(self.sparse_from * self.steps)
        return start - self.indexer_steps <= step < start

    def quantised(self, step: int) -> bool:
        """Whether weights, activations and caches are quantised as released."""
        return step >= self.quantise_from * self.steps

    def weights_at(self, step: int) -> LossWeights:
        """MTP weighs 0.3, then 0.1 once the decay starts; with `indexer_steps` the indexer learns from then on."""
        if self.indexer_only(step):
            return LossWeights(main=0.0, mtp=0.0, balance=0.0)
        waits = self.indexer_steps > 0 and self.dense(step)
        mtp = 0.3 if step < self.decay_from * self.steps else 0.1
        return LossWeights(mtp=mtp, balance=self.balance_weight, indexer=0.0 if waits else 1.0)


def check_quantisable(model: ModelConfig, config: TrainConfig) -> None:
    """Refuse at the start what the quantised stage would refuse after most of the run; raises ConfigError."""
    sizes = {name: getattr(model, name) for name in ("hidden_size", "moe_intermediate_size", "index_head_dim")}
    odd = [f"{name}={size}" for name, size in sizes.items() if size % FP4_GROUP]
    if config.quantise_from < 1 and odd:
        raise ConfigError(
            f"quantise_from={config.quantise_from}: FP4 needs multiples of {FP4_GROUP}, here {', '.join(odd)}; "
            "--set quantise_from=1 trains it without the quantised stage"
        )
