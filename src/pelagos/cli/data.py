"""`pelagos data`: from a corpus directory to token shards, and what they hold."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pelagos.errors import ConfigError


def data(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="[CORPUS] OUT",
            help="CORPUS: directory with docs, code and books .jsonl.gz (none with --source); OUT: for the shards.",
        ),
    ],
    source: Annotated[
        list[str], typer.Option(help="KIND=PATH: text, .jsonl or .parquet, a glob or an fsspec URL; repeatable.")
    ] = [],  # noqa: B006
    fim: Annotated[list[str], typer.Option(help="With --source: kinds that add fill-in-the-middle.")] = [],  # noqa: B006
    near_duplicates: Annotated[bool, typer.Option(help="With --source: drop near-duplicates too.")] = False,
    tokenizer: Annotated[Path, typer.Option(help="Directory of tokenizer.json.")] = Path("models/nano"),
    learn_tokenizer: Annotated[bool, typer.Option(help="Learn the tokenizer from the training text first.")] = False,
    vocab_size: Annotated[int, typer.Option(help="Tokens to learn, special ones included.")] = 4096,
    heldout_text: Annotated[
        bool, typer.Option(help="Also write heldout_KIND.jsonl, to be scored by eval bpb.")
    ] = False,
    archive: Annotated[Path | None, typer.Option(help="Also pack the shards into this .tar.xz.")] = None,
    row_tokens: Annotated[int, typer.Option(help="Row length the padding is reported for.")] = 2048,
    json_output: Annotated[bool, typer.Option("--json", help="Print meta.json on stdout.")] = False,
) -> None:
    """Split a corpus, tokenise it and make chat samples: everything `pelagos train` reads."""
    from pelagos.train import prepare, sources

    out, pairs = places[-1], [each.partition("=") for each in source]
    if len(places) != (1 if source else 2) or not all(kind and path for kind, _, path in pairs):
        raise ConfigError("expected CORPUS OUT, or OUT with --source KIND=PATH; see `pelagos data --help`")
    if source:
        named = [(kind, path) for kind, _, path in pairs]
        meta = sources.tokenise(named, out, tokenizer, near_duplicates=near_duplicates, fim=fim)
    else:
        learnt = {"tokenizer_dir": tokenizer, "learn_vocab_size": vocab_size if learn_tokenizer else None}
        meta = prepare.prepare(places[0], out, **learnt, heldout_text=heldout_text, archive=archive)
    typer.echo(json.dumps(meta, indent=1, ensure_ascii=False) if json_output else prepare.report(out, row_tokens))
