"""Training over several processes against one: losses, masters, exported FP4 codes; kills, re-sharding; dated JSON.

`python -m benchmarks.distributed` runs every case that OUT (benchmarks/results/distributed.json) does not hold yet, so
that it can be stopped and started again; `--cases dp2,ep2` runs these. gloo on a CPU, tiny shapes: it shows that worlds
agree, no speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from tests.train.small import run_config, small_config, small_model, write_shards
from torch import Tensor

from pelagos.errors import PelagosError
from pelagos.numerics import encode_fp4
from pelagos.train.context import Context
from pelagos.train.forward import Forward
from pelagos.train.objective import LossWeights, losses, prepare
from pelagos.train.precision import set_precision
from pelagos.train.ranks import Line, Ranks
from pelagos.train.state import released
from pelagos.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "distributed.json"
BASE: dict[str, Any] = {"steps": 20, "batch_rows": 1, "row_tokens": 256, "accumulate": 4, "clip_norm": 1.0, "lr": 1e-3}
# Where bits cannot agree: Newton-Schulz in BF16 makes rounding O(1) in directions that a gradient does not have, and a
# code of FP4 or FP8 that falls to the other side is no rounding any more ("cp2 quantised" says how much).
ROUNDED: dict[str, Any] = {"lr": 1e-4, "float32_muon": True, "quantise_from": 1}
# The streams that enter the first layer are equal, so that its mixing has no gradient but rounding, of which AdamW and
# Muon make a whole step.
UNDETERMINED = ("layers.0.hc_attn_",)
# name: processes, settings; "model" changes the model, the reference of a case is one process with the same model.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "dp4 owners2": (4, {"owners": 2}),
    "ep2": (2, {"ep": 2}),
    "ep2 waves2": (2, {"ep": 2, "waves": 2}),
    "ep2 waves4 no overlap": (2, {"ep": 2, "waves": 4, "overlap": False}),
    "ep4": (4, {"ep": 4, "waves": 2}),
    "ep2 dp4": (4, {"ep": 2}),
    "cp2": (2, {"cp": 2, **ROUNDED}),
    "cp2 quantised": (2, {"cp": 2, **ROUNDED, "quantise_from": 0.67}),
    "cp4": (4, {"cp": 4, **ROUNDED}),
    "cp2 dp2": (4, {"cp": 2, **ROUNDED}),
    "pp2": (2, {"pp": 2}),
    "pp2 dp2": (4, {"pp": 2}),
    "pp2 ep2": (4, {"pp": 2, "ep": 2}),
    "pp2 cp2": (4, {"pp": 2, "cp": 2, **ROUNDED}),
    "cp2 ep2": (2, {"cp": 2, "ep": 2, "waves": 2, **ROUNDED}),
}


def trainer_of(spec: dict[str, Any], out: Path) -> Trainer:
    """Return the trainer of a case in this process."""
    settings = dict(spec["settings"])
    model, wide = small_config(**settings.pop("model", {})), settings.pop("float32_muon", False)
    config = run_config(**{**BASE, **settings})
    ranks = Ranks(config, torch.device("cpu")) if spec["distributed"] else None
    trainer = Trainer(model, config, data=Path(spec["data"]), out=out, device="cpu", ranks=ranks)
    if wide:
        trainer.optimizer.config = dataclasses.replace(trainer.optimizer.config, dtype=torch.float32)
    return trainer


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one case in this process; return losses, norms, masters and codes of the whole model."""
    steps, norms = [], []
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(spec, Path(scratch))
        while trainer.step < trainer.config.steps:
            terms, norm = trainer._update()
            trainer.step += 1
            steps.append([float(terms.next_token), float(terms.mtp), float(terms.balance), float(terms.indexer)])
            norms.append(float(norm))
    return {"losses": steps, "norms": norms, **weights_of(trainer)}


def live(spec: dict[str, Any]) -> dict[str, Any]:
    """Run or resume a case in spec["run"]; return its weights.

    In attempts below `kills` a rank, drawn, dies within `within` seconds; with `die_at` one does in the first.
    """
    trainer = trainer_of(spec, Path(spec["run"]))
    trainer.resume()
    signal.signal(signal.SIGTERM, lambda *_: trainer.stop())  # as `pelagos train` does: torchrun tells the survivors
    attempt, draw = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), random.Random(spec.get("seed", 0))
    for _ in range(attempt + 1):
        victim, delay = draw.randrange(spec["world"]), draw.uniform(0, spec.get("within", 0))
    if "die_at" in spec and attempt == 0:
        while trainer.step < spec["die_at"]:
            trainer._update()
            trainer.step += 1
        trainer.save()
        if spec["distributed"] and trainer.ranks.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
    if attempt < spec.get("kills", 0) and spec["distributed"] and trainer.ranks.rank == victim:
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    resumed = trainer.step
    if spec.get("until"):
        while trainer.step < spec["until"]:
            trainer._update()
            trainer.step += 1
        trainer.save()
    else:
        trainer.run()
    return {"losses": [], "norms": [], "resumed": resumed, "attempt": attempt, **weights_of(trainer)}


def border(spec: dict[str, Any]) -> dict[str, Any]:
    """Return how far parts of rows are from whole rows in loss and gradient, with borders as they must be and of m.

    And, as "quantised", whether streams and drafts of the quantised stage have the same bits.
    """
    found: dict[str, Any] = {}
    line = Ranks(run_config(**BASE, cp=spec["world"]), torch.device("cpu")).cp
    for length in spec["lengths"]:
        draw = torch.Generator().manual_seed(length)
        ids, targets = torch.randint(128, (2, 2, length), generator=draw)
        place = torch.arange(length)
        segments = torch.stack((torch.zeros_like(place), (place >= 24).long())).int()
        positions = torch.stack((place, place - 24 * (place >= 24)))
        batch, model = (ids, positions, segments, targets), small_model()
        whole = losses(model, *batch, LossWeights(), dense=False)
        whole.total.backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for name, capped in (("exact", False), ("m", True)):
            model.zero_grad()
            part = losses(model, *batch, LossWeights(), dense=False, context=Context(model.config, line, capped=capped))
            part.total.backward()
            apart = [float((line.sum(model.get_parameter(n).grad) - g).abs().max() / (g.abs().max() + 1e-3))
                     for n, g in expected.items()]  # fmt: skip
            found[f"{length} {name}"] = (float(line.sum(part.total.detach()) - whole.total), max(apart))
    found["quantised"] = [bool(found) for found in line.sum(torch.tensor(_same_bits(line))) == line.size]
    return found


def _same_bits(line: Line) -> list[int]:
    """Whether a quantised forward over this part of rows has the streams and the drafts of whole rows, bit by bit."""
    ids, positions = torch.arange(1024).view(2, 512) % 127, torch.arange(512).expand(2, -1).clone()
    segments = (positions >= torch.tensor([[128], [384]])).int()  # a sample that lies across the border, and one before
    positions -= segments * torch.tensor([[128], [384]])
    model, runs = small_model(), list[tuple[Tensor, Tensor]]()
    set_precision(model, "released")
    for context in (None, Context(model.config, line)):
        forward = Forward(model)
        batch = prepare(model, ids, positions, segments, ids, dense=False, context=context)
        streams = forward.run(batch.step, batch.cache, [])
        runs.append((streams, forward.draft(streams, batch.next_ids, batch.step, batch.cache, {})))
    cut = slice(512 // line.size * line.rank, 512 // line.size * (line.rank + 1))
    return [int(torch.equal(whole[:, cut], part)) for whole, part in zip(*runs, strict=True)]


def weights_of(trainer: Trainer) -> dict[str, Any]:
    """Return masters and FP4 codes of the whole model, on the first rank."""
    if trainer.stored is not None:
        trainer.stored.__enter__()
    masters = {n: p.detach().clone() for n, p, _ in released(trainer.model, trainer.ranks)}
    codes = {n: encode_fp4(p)[0] for n, p in masters.items() if ".experts." in n}
    return {"masters": masters, "codes": codes}


def compare(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Return how far a case is from one rank."""
    apart = torch.tensor(found["losses"]) - torch.tensor(reference["losses"])
    masters = {n: float((p - reference["masters"][n]).abs().max()) for n, p in found["masters"].items()}
    same = sum(int((c == reference["codes"][n]).sum()) for n, c in found["codes"].items())
    free = max(masters.pop(name) for name in list(masters) if name.startswith(UNDETERMINED))
    worst = max(masters, key=lambda name: masters[name])
    return {
        "loss": float(apart.abs().max()), "master": masters[worst], "worst_master": worst, "undetermined": free,
        "codes_equal": same / sum(c.numel() for c in found["codes"].values()),
        "bits": found["losses"] == reference["losses"] and not masters[worst] and not free,
    }  # fmt: skip


def launch(
    specs: list[dict[str, Any]], world: int, scratch: Path, *, restarts: int = 0, timeout: float = 1800
) -> tuple[int, str]:
    """Run specs one after another in `world` processes; each leaves its result in spec["out"].

    Returns torchrun's exit code and what all of them wrote on stderr.
    """
    path = scratch / f"specs-{world}.json"
    path.write_text(json.dumps(specs), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += [f"--max-restarts={restarts}"]
    command += ["-m", "benchmarks.distributed", "--worker", str(path)]
    # Else all restarts share one store, where addresses of the dead are found.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment)
    return done.returncode, done.stderr


def worker(path: Path) -> None:
    """One process of a `launch`."""
    torch.set_num_threads(1)
    for spec in json.loads(path.read_text(encoding="utf-8")):
        if Path(spec["out"]).exists():  # this is a restart
            continue
        try:
            result = {"train": train, "live": live, "border": border}[spec.get("kind", "train")](spec)
        except PelagosError as error:
            raise SystemExit(f"error: {error}") from None
        if not spec["distributed"] or torch.distributed.get_rank() == 0:
            torch.save(result, spec["out"])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def reference_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the one process that a case is held against."""
    keep = (
        "seed model steps accumulate optimizer precision batch_rows row_tokens clip_norm lr quantise_from float32_muon"
    )
    return {name: value for name, value in settings.items() if name in keep.split()}


def run(names: list[str], scratch: Path, **overrides: Any) -> dict[str, dict[str, Any]]:
    """Run named cases and what they are held against; return how each compares."""
    data = write_shards(scratch / "shards", samples=96)
    wanted = {name: (CASES[name][0], {**CASES[name][1], **overrides}) for name in names}
    references = {json.dumps(reference_of(s), sort_keys=True): reference_of(s) for _, s in wanted.values()}
    for number, (key, settings) in enumerate(references.items()):
        out = scratch / f"reference-{number}.pt"
        torch.save(train({"settings": settings, "distributed": False, "data": str(data)}), out)
        references[key] = torch.load(out, weights_only=True)
    found: dict[str, dict[str, Any]] = {}
    for world in sorted({world for world, _ in wanted.values()}):
        mine = {name: settings for name, (size, settings) in wanted.items() if size == world}
        place = {"distributed": True, "world": world, "data": str(data)}
        specs = [
            {"settings": settings, "out": str(scratch / f"{number}-{world}.pt"), **place}
            for number, settings in enumerate(mine.values())
        ]
        code, said = launch(specs, world, scratch)
        if code:
            raise SystemExit(said[-6000:])
        for (name, settings), spec in zip(mine.items(), specs, strict=True):
            reference = references[json.dumps(reference_of(settings), sort_keys=True)]
            found[name] = compare(torch.load(spec["out"], weights_only=True), reference)
    return found


LIFE: dict[str, Any] = {"steps": 80, "row_tokens": 128, "save_every": 1}


def life(scratch: Path) -> dict[str, dict[str, Any]]:
    """Twenty kills at moments drawn, each answered by torchrun; then a run that 4, 1 and 2 ranks carry on in turn."""
    data = str(write_shards(scratch / "shards", samples=96))
    reference = train({"settings": LIFE, "distributed": False, "data": data})
    place = {"kind": "live", "distributed": True, "data": data}
    spec = {**place, "settings": {**LIFE, "ep": 2, "waves": 2}, "world": 2, "out": str(scratch / "killed.pt"),
            "run": str(scratch / "killed"), "kills": 20, "within": 1.0, "seed": 20}  # fmt: skip
    code, said = launch([spec], 2, scratch, restarts=40)
    killed = torch.load(spec["out"], weights_only=True) if code == 0 else {}
    counts = {"exit": code, "kills": said.count("exitcode: -9"), "attempts": killed.get("attempt", 0) + 1}
    found = {"kills": {**counts, **_apart(killed, reference)}}
    for world, until, settings in ((4, 20, {"ep": 4}), (1, 40, {}), (2, None, {"ep": 2, "waves": 2})):
        spec = {**place, "settings": {**LIFE, **settings}, "world": world, "run": str(scratch / "run"), "until": until,
                "out": str(scratch / f"reshard-{world}.pt")}  # fmt: skip
        code, said = launch([spec], world, scratch)
        if code:
            raise SystemExit(said[-6000:])
    found["reshard 4 1 2"] = _apart(torch.load(spec["out"], weights_only=True), reference)
    return found


def _apart(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Return how far the weights of a run are from those of another."""
    pairs = [(found["masters"][name], p) for name, p in reference["masters"].items()] if found else []
    return {"master": max((float((a - b).abs().max()) for a, b in pairs), default=None),
            "bits": bool(pairs) and all(torch.equal(a, b) for a, b in pairs)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", help="names, comma between (default: all not in OUT yet)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    torch.set_num_threads(1)
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    names = args.cases.split(",") if args.cases else [name for name in CASES if name not in known]
    overrides = {k: json.loads(v) for k, _, v in (pair.partition("=") for pair in args.set)}
    worlds: list[int] = sorted({CASES[name][0] for name in names if name in CASES})
    for world in [*worlds, 0] if "kills" in names or not (args.cases or "kills" in known) else worlds:
        with tempfile.TemporaryDirectory() as scratch:
            mine = [n for n in names if n in CASES and CASES[n][0] == world]
            rows = run(mine, Path(scratch), **overrides) if world else life(Path(scratch))
        for name, row in rows.items():
            print(name, json.dumps(row), flush=True)
            if not overrides:
                known[name] = row | {"world": world, "date": str(datetime.date.today()), "torch": torch.__version__}
        if not overrides:
            args.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
