"""`pelagos data`: from a corpus directory to token shards, and what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def data(
    corpus: Annotated[Path, typer.Argument(help="Directory with docs, code and books .jsonl.gz.")],
    out: Annotated[Path, typer.Argument(help="Directory for the shards.")],
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
    from pelagos.train import prepare

    meta = prepare.prepare(
        corpus,
        out,
        tokenizer_dir=tokenizer,
        learn_vocab_size=vocab_size if learn_tokenizer else None,
        heldout_text=heldout_text,
        archive=archive,
    )
    typer.echo(json.dumps(meta, indent=1, ensure_ascii=False) if json_output else prepare.report(out, row_tokens))
