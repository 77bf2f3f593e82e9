"""`pelagos train`: pre-train a preset on token shards. Plain argparse: runs with torch, numpy and safetensors alone."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pelagos.config import PRESETS, bundled_model_dir, preset
from pelagos.errors import ConfigError, MissingDependency

if TYPE_CHECKING:
    from pelagos.train.ranks import Ranks
    from pelagos.train.recipe import TrainConfig
    from pelagos.train.trainer import Trainer


def main(argv: Sequence[str]) -> int:
    """Parse, train (or resume), export; the last line on stdout is a JSON summary.

    SIGINT and SIGTERM save after the present step and return 128 + the signal's number; a second one ends at once.
    """
    from pelagos.train.ablate import ablate, table
    from pelagos.train.dry_run import check_memory, measure, report, simulated
    from pelagos.train.meter import plot
    from pelagos.train.recipe import TrainConfig
    from pelagos.train.trainer import Trainer

    study = argv[0] == "ablate" if argv else False
    options = {"study": study, "needed": not any(word.startswith("--gpus") for word in argv)}
    args = _parser(TrainConfig, **options).parse_args(argv[1:] if study else argv)
    if args.gpus and not args.dry_run:
        raise ConfigError(f"--gpus {args.gpus}: simulates, so it goes with --dry-run; torchrun starts processes")
    model, config = preset(args.model), TrainConfig(steps=args.steps, **_overrides(args.set, TrainConfig))
    bundled = bundled_model_dir(args.model)
    tokenizer = bundled if (bundled / "tokenizer.json").is_file() else None
    device = args.device or _default_device()
    place: dict[str, Any] = {"data": args.data, "out": args.out, "device": device, "tokenizer": tokenizer}
    if args.gpus:
        print(simulated(args.model, model, args.gpus, config.row_tokens))
        return 0
    if study:
        print(table(ablate(args.study, model, config, **place)), end="")
        return 0
    if args.dry_run:
        memory = check_memory(model, device)
        with tempfile.TemporaryDirectory() as scratch:
            rows = measure(Trainer(model, config, **{**place, "out": Path(scratch)}, start=args.start))
        print(report(rows, *memory))
        return 0
    if args.plot and find_spec("matplotlib") is None:
        raise MissingDependency("--plot needs matplotlib; `pip install matplotlib`")
    ranks = _ranks(config, place)
    trainer = Trainer(model, config, **place, start=args.start, ranks=ranks)
    if args.export:
        trainer.check_export(args.export)
    resumed, lead = trainer.resume(), ranks is None or ranks.lead
    if lead:
        print(f"{'resuming' if resumed else 'training'} {args.model}: {trainer.describe()}", file=sys.stderr)
    if received := _run(trainer):
        print(
            f"stopped by {received.name} at step {trainer.step} of {config.steps}; the state is in {args.out}, "
            "the same command continues",
            file=sys.stderr,
        )
        return 128 + received
    if args.export:
        trainer.export(args.export)
        print(f"exported to {args.export}", file=sys.stderr) if lead else None
    if not lead:
        return 0
    if args.plot:
        print(f"curves in {plot(args.out)}", file=sys.stderr)
    print(json.dumps({"step": trainer.step, "tokens": trainer.tokens, "heldout": trainer.scores}))
    return 0


def _ranks(config: TrainConfig, place: dict[str, Any]) -> Ranks | None:
    """Return this process among those that torchrun started, if it did; on CUDA each has a device of its own."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_torchelastic_launched():
        return None
    import torch
    from torch.distributed.distributed_c10d import get_node_local_rank

    from pelagos.train.ranks import Ranks

    if place["device"] == "cuda":
        place["device"] = f"cuda:{get_node_local_rank()}"
        torch.cuda.set_device(place["device"])
    return Ranks(config, torch.device(place["device"]))


def _run(trainer: Trainer) -> signal.Signals | None:
    """Run; return the signal that ended it early, of several processes any of theirs."""
    received: list[signal.Signals] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, before[number])  # the next one ends the process
        trainer.stop()
        print(f"{received[-1].name}: saving after this step; once more to end now", file=sys.stderr, flush=True)

    before = {int(number): signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return None if trainer.run() else received[0] if received else signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _parser(config: type[TrainConfig], *, study: bool = False, needed: bool = True) -> argparse.ArgumentParser:
    settings = ", ".join(f"{f.name}={_default(f)}" for f in dataclasses.fields(config) if f.name != "steps")
    parser = argparse.ArgumentParser(
        prog="pelagos train",
        description="Train a preset from zero, or a checkpoint further, on token shards; `pelagos train ablate` with "
        "the same options trains the arms of a --study at equal FLOPs. Run the same command again to continue a run "
        "that was interrupted (Ctrl-C and SIGTERM save first).",
        epilog=f"Settings for --set and their defaults: {settings}. decay_from, sparse_from and quantise_from are "
        "fractions of --steps. Example: pelagos train --data shards --out run --steps 3300 --export run/model "
        "--set lr=0.004",
    )
    parser.add_argument("--model", default="nano", help=f"preset: {', '.join(PRESETS)} (default: nano)")
    parser.add_argument("--data", type=Path, required=needed, metavar="DIR", help="shards written by `pelagos data`")
    parser.add_argument("--out", type=Path, required=needed, metavar="DIR", help="run directory: state-STEP, log.jsonl")
    about = "optimizer steps of the whole run"
    parser.add_argument("--steps", type=int, required=needed, default=1, metavar="N", help=about)
    parser.add_argument("--from", dest="start", metavar="MODEL", help="fine-tune this checkpoint (name, directory)")
    parser.add_argument("--plot", action="store_true", help="at the end, draw OUT/curves.png")
    parser.add_argument("--dry-run", action="store_true", help="say whether it fits and how long it takes, and stop")
    about = "with --dry-run: simulate layouts on so many GPUs instead (no data is needed)"
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help=about)
    if study:
        parser.add_argument("--study", required=True, help="optimizer, residual, attention, precision or mtp")
    parser.add_argument("--export", type=Path, metavar="DIR", help="at the end, write a released-format checkpoint")
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    about = "one setting, its value in JSON; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=about)
    return parser


def _default(field: dataclasses.Field[Any]) -> str:
    factory = field.default_factory
    return json.dumps(field.default if factory is dataclasses.MISSING else factory()).replace("%", "%%")


def _overrides(pairs: Sequence[str], config: type[TrainConfig]) -> dict[str, Any]:
    """Parse FIELD=VALUE pairs; raises ConfigError for an unknown field or a value that is not JSON."""
    fields = [f.name for f in dataclasses.fields(config) if f.name != "steps"]
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name == "steps":
            raise ConfigError(f"--set {pair}: give it as --steps")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"--set {pair}: unknown field {name!r}; {hint}")
        try:
            values[name] = json.loads(text)
        except ValueError:
            got = f"got {text!r}" if equals else "got no '='"
            raise ConfigError(f"--set {pair}: expected FIELD=VALUE with a value in JSON (0.5, true), {got}") from None
    return values
