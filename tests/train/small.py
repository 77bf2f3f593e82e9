"""A model, shards and batches small enough to train in a test, shared by the tests of the train room."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pelagos.config import ModelConfig, tiny
from pelagos.model import Transformer
from pelagos.train.data import IGNORE, ShardWriter, write_meta
from pelagos.train.init import initialise
from pelagos.train.recipe import TrainConfig
from pelagos.train.trainer import Trainer


def small_config(**changes: Any) -> ModelConfig:
    """The tiny preset with few layers, each kind once."""
    base = {"num_hidden_layers": 3, "compress_ratios": (0, 4, 8, 0), "num_hash_layers": 1}
    base["hc_sinkhorn_iters"] = 4
    return dataclasses.replace(tiny(), **(base | changes))


def small_model(seed: int = 0, **changes: Any) -> Transformer:
    model = Transformer(small_config(**changes))
    initialise(model, seed)
    return model


def packed(lengths: list[list[int]], row_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of random samples of these lengths, each at the next multiple of 128: ids, positions, segments, targets."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), row_tokens)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments, targets = np.full(shape, -1, np.int32), np.full(shape, IGNORE, np.int64)
    for row, samples in enumerate(lengths):
        column = 0
        for number, length in enumerate(samples):
            tokens = rng.integers(0, 128, length + 1)
            at = slice(column, column + length)
            ids[row, at], targets[row, at] = tokens[:-1], tokens[1:]
            positions[row, at], segments[row, at] = np.arange(length), number
            column += -(-length // 128) * 128
    ids_, positions_, segments_, targets_ = (torch.from_numpy(a) for a in (ids, positions, segments, targets))
    return ids_, positions_, segments_, targets_


def write_shards(directory: Path, *, largest: int = 127, samples: int = 24, kinds: tuple[str, ...] = ()) -> Path:
    """Shards of samples that count upwards in steps of their own, tokens 2..largest; beside them their tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = directory / "tokenizer.json"
    tokenizer.write_text('{"a": "tokenizer"}', encoding="utf-8")
    rng = np.random.default_rng(0)
    kinds = kinds or ("docs", "code", "books", "chat")
    splits = {}
    for split, count in (("train", samples), ("heldout", 8)):
        tokens = []
        for _ in range(count):
            start, pace = rng.integers(0, 60), rng.integers(1, 4)
            tokens.append((2 + (start + pace * np.arange(rng.integers(60, 128))) % (largest - 1)).astype(np.uint16))
        named = [kinds[i % len(kinds)] for i in range(count)]
        sizes = [0 if kind == "chat" else 3 * len(t) for kind, t in zip(named, tokens, strict=True)]
        writer = ShardWriter(directory, split)
        for sample in zip(tokens, named, sizes, strict=True):
            writer.add(*sample)
        splits[split] = writer.close()
    write_meta(directory, tokenizer, splits, {"licences": {}})
    return directory


def run_config(**changes: Any) -> TrainConfig:
    """Six steps of two rows of 128 tokens: sparse from the third, quantised from the fifth."""
    base = {
        "steps": 6, "batch_rows": 2, "row_tokens": 128, "warmup_steps": 2, "decay_from": 0.5, "sparse_from": 0.34,
        "quantise_from": 0.67, "repeats": {"docs": 1, "code": 1, "books": 1, "chat": 1}, "eval_every": 100,
        "eval_rows": 2, "save_every": 100, "log_every": 1,
    }  # fmt: skip
    return TrainConfig(**(base | changes))


def trainer_of(data: Path, out: Path, *, tokenizer: Path | None = None, **changes: Any) -> Trainer:
    config = run_config(**changes)
    return Trainer(small_config(), config, data=data, out=out, device="cpu", tokenizer=tokenizer)
