"""`pelagos data`: from a corpus directory to token shards, and what they hold."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pelagos.cli.options import shared
from pelagos.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Split a corpus, tokenise it and make chat samples: everything `pelagos train` reads."""
    from pelagos.train import prepare

    parser = argparse.ArgumentParser(prog="pelagos data", description=main.__doc__)
    about = "CORPUS: directory with docs, code and books .jsonl.gz (none with --source); OUT: for the shards"
    parser.add_argument("places", nargs="+", type=Path, metavar="[CORPUS] OUT", help=about)
    about = "KIND=PATH: text, .jsonl or .parquet, a glob or an fsspec URL; repeatable"
    parser.add_argument("--source", action="append", default=[], metavar="KIND=PATH", help=about)
    about = "with --source: kinds that add fill-in-the-middle"
    parser.add_argument("--fim", action="append", default=[], metavar="KIND", help=about)
    parser.add_argument("--near-duplicates", action="store_true", help="with --source: drop near-duplicates too")
    parser.add_argument("--tokenizer", type=Path, default=Path("models/nano"), help="directory of tokenizer.json")
    about = "learn the tokenizer from the training text first"
    parser.add_argument("--learn-tokenizer", action="store_true", help=about)
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens to learn, special ones included")
    about = "also write heldout_KIND.jsonl, to be scored by eval bpb"
    parser.add_argument("--heldout-text", action="store_true", help=about)
    parser.add_argument("--archive", type=Path, help="also pack the shards into this .tar.xz")
    parser.add_argument("--row-tokens", type=int, default=2048, help="row length the padding is reported for")
    shared(parser, "json")
    args = parser.parse_args(argv)
    out, pairs = args.places[-1], [each.partition("=") for each in args.source]
    if len(args.places) != (1 if pairs else 2) or not all(kind and path for kind, _, path in pairs):
        raise ConfigError("expected CORPUS OUT, or OUT with --source KIND=PATH; see `pelagos data --help`")
    if pairs:
        named = [(kind, path) for kind, _, path in pairs]
        meta = prepare.tokenise(named, out, args.tokenizer, near_duplicates=args.near_duplicates, fim=args.fim)
    else:
        how = {"tokenizer_dir": args.tokenizer, "heldout_text": args.heldout_text, "archive": args.archive}
        learnt = args.vocab_size if args.learn_tokenizer else None
        meta = prepare.prepare(args.places[0], out, **how, learn_vocab_size=learnt)
    print(json.dumps(meta, indent=1, ensure_ascii=False) if args.json else prepare.report(out, args.row_tokens))
