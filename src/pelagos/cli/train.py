"""`pelagos train`: pre-train a preset on token shards. Plain argparse: runs with torch, numpy and safetensors alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Parse, train (or resume), export; the last line on stdout is a JSON summary."""
    import torch

    from pelagos.config import preset
    from pelagos.train.trainer import TrainConfig, Trainer

    parser = argparse.ArgumentParser(prog="pelagos train", description="Pre-train a model on token shards.")
    parser.add_argument("--model", default="nano", help="preset: nano, tiny, flash, pro")
    parser.add_argument("--data", type=Path, required=True, help="directory written by `pelagos data`")
    parser.add_argument("--out", type=Path, required=True, help="run directory; an interrupted run resumes from it")
    parser.add_argument("--export", type=Path, help="write the released-format checkpoint here at the end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any other TrainConfig field")
    args = parser.parse_args(argv)
    config = TrainConfig(steps=args.steps, **_overrides(args.set, TrainConfig))
    trainer = Trainer(preset(args.model), config, data=args.data, out=args.out, device=args.device)
    if trainer.resume():
        print(f"resumed at step {trainer.step}", file=sys.stderr)
    trainer.run()
    if args.export:
        trainer.export(args.export)
    print(json.dumps({"step": trainer.step, "tokens": trainer.tokens, "heldout": trainer.evaluate()}))
    return 0


def _overrides(pairs: Sequence[str], config: type) -> dict[str, object]:
    """Parse FIELD=VALUE pairs by the type of the field's default; unknown fields raise ConfigError."""
    import difflib

    from pelagos.errors import ConfigError

    fields = {f.name: f for f in dataclasses.fields(config)}
    values: dict[str, object] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise ConfigError(f"--set {pair}: unknown field{f', did you mean {near[0]}?' if near else ''}")
        try:
            values[name] = json.loads(text)
        except ValueError:
            raise ConfigError(f"--set {pair}: expected a JSON value after '='") from None
    return values
