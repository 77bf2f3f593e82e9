"""`pelagos inspect`: what a checkpoint holds (from its headers alone), or one text's last token traced through it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pelagos.chat import Tokenizer
    from pelagos.model.trace import LayerTrace, Mixing, Trace

_LISTED = 8  # differences and entries a human listing names before it only counts


def inspect(
    target: Annotated[str | None, typer.Argument(metavar="DIR_OR_NAME", help="The same as --model.")] = None,
    model: Annotated[str, typer.Option(help="Bundled name, checkpoint directory or cached hub id.")] = "nano",
    trace: Annotated[str | None, typer.Option(metavar="TEXT", help="Trace the last token of TEXT; - is stdin.")] = None,
    mode: Annotated[str, typer.Option(help="Number mode of a trace: reference or released.")] = "reference",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Show what a checkpoint holds: layers, parameters, bytes, formats; with --trace, how a text passes its layers."""
    from pelagos.checkpoint import open_checkpoint, resolve_model
    from pelagos.cli.holdings import holdings

    path = resolve_model(target or model)
    if trace is None:
        report = holdings(open_checkpoint(path))
        typer.echo(json.dumps(report, indent=1) if json_output else "\n".join(_holdings_lines(report)))
        return
    from pelagos.engine import LLM
    from pelagos.model.trace import trace as trace_text

    llm = LLM(path, mode=mode)
    found = trace_text(llm.model, llm.prompt_ids(sys.stdin.read() if trace == "-" else trace))
    if json_output:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        typer.echo("\n".join(_trace_lines(found, llm.tokenizer)))


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
