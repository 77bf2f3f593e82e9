"""What a checkpoint holds, summed from its headers: by layer, part and format, beside what its config plans."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pelagos import cost
from pelagos.checkpoint import Checkpoint, TensorInfo


def holdings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sum a checkpoint's tensors by layer, part and format, and list where it differs from its config's plan."""
    config, tensors = checkpoint.config, checkpoint.tensors.values()
    drafts = int(checkpoint.draft == "mtp")
    plan = {g.name: g for g in cost.inventory(dataclasses.replace(config, num_nextn_predict_layers=drafts), draft=True)}
    kinds = {f"layers.{i}": (ratio, i < config.num_hash_layers) for i, ratio in enumerate(config.layer_ratios)}
    kinds |= {"mtp.0": (0, False)} if drafts else {}
    by_layer: dict[str, list[TensorInfo]] = {name: [] for name in kinds}
    by_part: dict[str, list[TensorInfo]] = {}
    counts: Counter[str] = Counter()
    differences = []
    for info in tensors:
        name = re.sub(r"\.experts\.\d+\.", ".experts.*.", info.name)
        counts[name] += 1
        group = plan.get(name)
        part = group.part if group else "draft" if checkpoint.draft == "dspark" and name.startswith("mtp.") else None
        if part is None or (group and group.shape != info.shape):
            expected = list(group.shape) if group else "no such tensor"
            differences.append(f"{info.name}: {list(info.shape)}, expected {expected}")
        by_part.setdefault(part or "unplanned", []).append(info)
        place = re.match(r"(layers|mtp)\.\d+", info.name)
        if place:
            by_layer.setdefault(place[0], []).append(info)
    for group in plan.values():
        if counts[group.name] != group.count:
            differences.append(f"{group.name}: {counts[group.name]} tensors, expected {group.count}")
    layers = []
    for name, infos in by_layer.items():
        ratio, hashed = kinds.get(name, (None, None))
        kind = "unplanned" if ratio is None else cost.layer_kind(ratio)
        routing = None if hashed is None else "hash" if hashed else "learned"
        layers.append({"name": name, "kind": kind, "ratio": ratio, "routing": routing} | _sums(infos))
    return {
        "path": str(checkpoint.path),
        "config": config.to_dict(),
        "draft": checkpoint.draft,
        **_sums(tensors),
        "layers": layers,
        "parts": {part: _sums(infos) for part, infos in by_part.items()},
        "differences": differences,
    }


def _sums(tensors: Iterable[TensorInfo]) -> dict[str, Any]:
    formats: dict[str, dict[str, int]] = {}
    for info in tensors:
        elements = 0 if info.format == "i64" else math.prod(info.shape)  # a hash table is nothing learned
        each = formats.setdefault(info.format, {"tensors": 0, "parameters": 0, "bytes": 0})
        for key, value in (("tensors", 1), ("parameters", elements), ("bytes", info.num_bytes)):
            each[key] += value
    totals = {key: sum(each[key] for each in formats.values()) for key in ("tensors", "parameters", "bytes")}
    return totals | {"formats": formats}
