"""`pelagos inspect`: what a checkpoint holds (from its headers alone), or one text's last token traced through it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pelagos import cost
from pelagos.checkpoint import Checkpoint, TensorInfo, open_checkpoint, resolve_model
from pelagos.cli.options import shared

if TYPE_CHECKING:
    from pelagos.chat import Tokenizer
    from pelagos.model.trace import LayerTrace, Mixing, Trace

_LISTED = 8  # differences and entries a human listing names before it only counts


def main(argv: Sequence[str]) -> None:
    """Show what a checkpoint holds: layers, parameters, bytes, formats; with --trace, how a text passes its layers."""
    parser = argparse.ArgumentParser(prog="pelagos inspect", description=main.__doc__)
    parser.add_argument("target", nargs="?", metavar="DIR_OR_NAME", help="the same as --model")
    parser.add_argument("--trace", metavar="TEXT", help="trace the last token of TEXT; - is stdin")
    shared(parser, "model", "mode", "json")
    args = parser.parse_args(argv)
    path = resolve_model(args.target or args.model)
    if args.trace is None:
        report = holdings(open_checkpoint(path))
        lines = _holdings_lines(report)
    else:
        from pelagos.engine import LLM
        from pelagos.model.trace import trace

        llm = LLM(path, mode=args.mode)
        found = trace(llm.model, llm.prompt_ids(sys.stdin.read() if args.trace == "-" else args.trace))
        report, lines = dataclasses.asdict(found), _trace_lines(found, llm.tokenizer)
    print(json.dumps(report, indent=1) if args.json else "\n".join(lines))


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


def _holdings_lines(report: dict[str, Any]) -> Iterator[str]:
    config, draft = report["config"], report["draft"]
    yield f"{report['path']}: {config['num_hidden_layers']} layers, {draft or 'no'} draft"
    sizes = "vocab_size hidden_size num_attention_heads head_dim sliding_window index_topk n_routed_experts hc_mult"
    yield "  ".join(f"{name}={config[name]}" for name in sizes.split())
    row = "{:<18}{:<11}{:>6}  {:<9}{:>8}{:>17}{:>17}  {}".format
    yield ""
    yield row("layer", "kind", "ratio", "routing", "tensors", "parameters", "bytes", "formats (tensors)")
    for layer in report["layers"]:
        ratio, routing = ("" if layer[key] is None else layer[key] for key in ("ratio", "routing"))
        yield row(layer["name"], layer["kind"], ratio, routing, *_figures(layer))
    yield ""
    yield row("part", "", "", "", "tensors", "parameters", "bytes", "formats (tensors)")
    for part, sums in report["parts"].items():
        yield row(part, "", "", "", *_figures(sums))
    yield row("all", "", "", "", *_figures(report))
    yield ""
    yield row("format", "", "", "", "tensors", "parameters", "bytes", "").rstrip()
    for name, sums in report["formats"].items():
        yield row(name, "", "", "", *_figures(sums)).rstrip()
    yield ""
    odd = report["differences"]
    yield f"differs from config.json in {len(odd)} places:" if odd else "holds what config.json plans"
    yield from (f"  {line}" for line in odd[:_LISTED])
    if len(odd) > _LISTED:
        yield f"  and {len(odd) - _LISTED} more"


def _figures(sums: dict[str, Any]) -> tuple[str, str, str, str]:
    formats = ", ".join(f"{name} {each['tensors']:,}" for name, each in sums.get("formats", {}).items())
    return f"{sums['tensors']:,}", f"{sums['parameters']:,}", f"{sums['bytes']:,}", formats


def _trace_lines(found: Trace, tokenizer: Tokenizer) -> Iterator[str]:
    last = len(found.ids) - 1
    yield f"{len(found.ids)} tokens; traced: position {last}, {tokenizer.decode(found.ids[last:])!r}"
    likely = (f"{tokenizer.decode([token])!r} {share:.1%}" for token, share in found.following)
    yield f"next token: {', '.join(likely)}"
    for layer in found.layers:
        yield ""
        yield f"layer {layer.layer}: {layer.kind}, ratio {layer.ratio}, {layer.routing} routing"
        yield f"  window    positions {layer.window[0]}..{layer.window[1]}"
        if layer.ratio:
            yield f"  entries   {layer.visible} visible{_attended(layer)}"
        pairs = zip(layer.experts, layer.expert_weights, strict=True)
        yield f"  experts   {', '.join(f'{expert} x{weight:.3f}' for expert, weight in pairs)}"
        yield from _mixing_lines("attn", layer.attn_mixing)
        yield from _mixing_lines("ffn", layer.ffn_mixing)


def _attended(layer: LayerTrace) -> str:
    entries = list(range(layer.visible)) if layer.picks is None else layer.picks
    picked = "" if layer.picks is None else f", {len(layer.picks)} picked: {_joined_runs(layer.picks)}"
    best = sorted(zip(layer.shares, entries, strict=True), reverse=True)[:_LISTED]
    shares = ", ".join(f"{entry} {share:.1%}" for share, entry in best)
    return f"{picked}\n  attention {sum(layer.shares):.1%} on entries: {shares}" if entries else ""


def _joined_runs(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def _mixing_lines(site: str, mixing: Mixing) -> Iterator[str]:
    rows = " / ".join(" ".join(f"{value:.3f}" for value in row) for row in mixing.matrix)
    named = (("rows", mixing.row_sums), ("columns", mixing.column_sums))
    sums = ", ".join(f"{name} {min(each):.4f}..{max(each):.4f}" for name, each in named)
    yield f"  mHC {site:<5} {rows}"
    yield f"            sums of {sums}; spectral norm {mixing.spectral_norm:.4f}"
