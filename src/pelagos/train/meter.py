"""What a run writes about itself: a line to read, JSON lines, TensorBoard events, and curves as PNG.

Event files are written here (a record is a length, two checksums and a small protocol buffer), so TensorBoard need
not be installed to make them. FLOPs come from cost.py.
"""

import json
import math
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pelagos import cost
from pelagos.config import ModelConfig
from pelagos.errors import MissingDependency
from pelagos.model import Transformer
from pelagos.model.experts import Experts, SharedExpert

# Dense BF16 peak in FLOP/s by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "H20": 148e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
CLAMPED = ("gate", "up_high", "up_low")


def training_flops(config: ModelConfig, row_tokens: int) -> float:
    """Return the FLOPs of training on one token in rows of that length: three times a forward, MTP included.

    The forward is that of a token at the mean context, as cost.py counts it; recomputation does not count.
    """
    forward = sum(cost.flops(config, max(1, row_tokens // 2)).values())
    if config.num_nextn_predict_layers:
        draft = sum(g.matmul_flops for g in cost.inventory(config, draft=True) if g.part == "mtp")
        forward += draft + 2 * config.vocab_size * config.hidden_size
    return 3.0 * forward


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense BF16 peak, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class ClampHits:
    """Counts how often the experts' SwiGLU met its clamp, over all layers."""

    def __init__(self, model: Transformer) -> None:
        device = next(model.parameters()).device
        self._counts: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, (Experts, SharedExpert)):
                module.hits = torch.zeros(3, dtype=torch.int64, device=device)
                self._counts.append(module.hits)

    def read(self, across: Callable[[Tensor], Tensor] | None = None) -> dict[str, int]:
        """Return the hits of gate, up above and up below since the last call, added `across` processes; start anew."""
        own = torch.stack(self._counts).sum(0)
        total = (across(own) if across else own).tolist()
        for count in self._counts:
            count.zero_()
        return dict(zip(CLAMPED, total, strict=True))


class Meter:
    """The log of one run directory; `write` adds a row to all of its forms, or to none if `quiet`."""

    def __init__(self, out: Path, *, quiet: bool = False) -> None:
        self.path, self._events, self._quiet = out / "log.jsonl", out / "tensorboard", quiet
        self._file: Path | None = None

    def write(self, row: Mapping[str, Any], line: str) -> None:
        """Append one row: numbers and dicts of numbers under `step`; print the line on stderr."""
        if self._quiet:
            return
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        self._write_event(int(row["step"]), dict(_flat(row)))
        print(line, file=sys.stderr, flush=True)

    def cut(self, step: int) -> None:
        """Drop rows of steps after `step`, and torn ones; TensorBoard is told that they do not count."""
        if self._quiet or not self.path.exists():
            return
        lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        partial.replace(self.path)
        self._write_record(_field(1, time.time()) + _field(2, step + 1) + _field(7, _field(1, 1)))  # SessionLog: START

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows written so far."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def _write_event(self, step: int, values: Mapping[str, float]) -> None:
        summary = b"".join(
            _field(1, _field(1, name.encode()) + bytes((2 << 3 | 5,)) + struct.pack("<f", value))
            for name, value in values.items()
        )
        self._write_record(_field(1, time.time()) + _field(2, step) + _field(5, summary))

    def _write_record(self, event: bytes) -> None:
        if self._file is None:
            self._events.mkdir(exist_ok=True)
            self._file = self._events / f"events.out.tfevents.{time.time_ns():020d}.pelagos"
            self._write_record(_field(1, time.time()) + _field(3, b"brain.Event:2"))
        length = struct.pack("<Q", len(event))
        parts = (length, _masked_crc(length), event, _masked_crc(event))
        with self._file.open("ab") as file:
            file.write(b"".join(parts))


Lines = dict[str, list[tuple[float, float]]]


def plot(out: Path) -> Path:
    """Draw a run's curves from its log into `curves.png` beside it; return that path.

    Raises MissingDependency without matplotlib.
    """
    rows = Meter(out).rows()
    panels: dict[str, Lines] = {}
    groups = {"nats a token": ("loss", "mtp", "indexer"), "": ("grad_norm", "max_load"), "a second": ("tokens_per_s",)}
    for title, names in groups.items():
        panels[title] = {n: [(r["step"], r[n]) for r in rows if n in r] for n in names}
    checks = [r for r in rows if "heldout" in r]
    kinds = checks[-1]["heldout"] if checks else ()
    scores = {k: [(r["step"], r["heldout"][k]) for r in checks] for k in kinds}
    panels["held-out: bits a byte, chat nats a token"] = scores
    return chart(out / "curves.png", panels, "step")


def chart(path: Path, panels: Mapping[str, Lines], axis_name: str) -> Path:
    """Draw titled panels of labelled lines into a PNG; raises MissingDependency without matplotlib."""
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]

        matplotlib.use("Agg")
        from matplotlib import pyplot  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise MissingDependency("curves need matplotlib; `pip install matplotlib`") from None
    wide = min(2, len(panels))
    figure, axes = pyplot.subplots(-(-len(panels) // wide), wide, figsize=(5.5 * wide, 4.2), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for label, points in lines.items():
            axis.plot([x for x, _ in points], [y for _, y in points], label=label, linewidth=1)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel(axis_name, fontsize=8)
        if lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _flat(row: Mapping[str, Any], prefix: str = ""):
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, float(value)


def _step_of(line: str) -> float:
    """Step of a log line; a torn one counts as beyond any step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _field(number: int, value: int | float | bytes) -> bytes:
    """One protocol-buffer field: a varint, a double or length-delimited bytes."""
    if isinstance(value, float):
        return bytes((number << 3 | 1,)) + struct.pack("<d", value)
    if isinstance(value, bytes):
        return bytes((number << 3 | 2,)) + _varint(len(value)) + value
    return bytes((number << 3,)) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C as records want it: rotated and offset."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
