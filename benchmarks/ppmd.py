"""Bits per byte of PPMd (variant H) on held-out text after it has read the training text of the same kind.

The yardstick for `pelagos eval bpb`. Needs `pip install pyppmd` (used here only). Each held-out document is coded by a
forked copy of the model as it was after the training text, as nano scores it: `bits_per_byte`. `bits_per_byte_running`
lets the model also learn from the held-out documents before it: compress(train + held out) - compress(train).
Prints one JSON object; run `python benchmarks/ppmd.py CORPUS > benchmarks/results/ppmd.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

import pyppmd

from pelagos.train.corpus import TEXT_KINDS, read_corpus, split

SEPARATOR = b"\0"  # ends every document, as EOS does; not counted as a byte of text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--order", type=int, default=12)
    parser.add_argument("--memory-gib", type=float, default=3.5, help="beyond it PPMd forgets everything")
    args = parser.parse_args()
    texts = split(read_corpus(args.corpus))
    results = {}
    for kind in TEXT_KINDS:
        train = [d.text.encode() for d in texts.train if d.kind == kind]
        heldout = [d.text.encode() for d in texts.heldout if d.kind == kind]
        results[kind] = score(train, heldout, args.order, int(args.memory_gib * (1 << 30)))
        print(kind, results[kind], file=sys.stderr)
    command = f"python benchmarks/ppmd.py CORPUS --order {args.order} --memory-gib {args.memory_gib}"
    machine = f"CPU, {platform.machine()}, one thread"
    print(json.dumps({"bench": "ppmd", "command": command, "device": machine, "results": results}, indent=1))


def score(train: list[bytes], heldout: list[bytes], order: int, memory: int) -> dict[str, float | int]:
    """Return bits per byte of the held-out documents, alone and running, with bytes, seconds and memory."""
    started = time.perf_counter()
    encoder = pyppmd.Ppmd7Encoder(order, memory)
    train_coded = sum(len(encoder.encode(text + SEPARATOR)) for text in train)
    total = sum(len(text) for text in heldout)
    alone = sum(coded_in_fork(encoder, text) for text in heldout)
    running = sum(len(encoder.encode(text + SEPARATOR)) for text in heldout)
    return {
        "bits_per_byte": round(8 * alone / total, 4),
        "bits_per_byte_running": round(8 * running / total, 4),
        "bits_per_byte_train": round(8 * train_coded / sum(map(len, train)), 4),
        "documents": len(heldout),
        "bytes": total,
        "train_bytes": sum(map(len, train)),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def coded_in_fork(encoder: pyppmd.Ppmd7Encoder, text: bytes) -> int:
    """Return the coded bytes of one document without teaching it to this process's model."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(send, str(len(encoder.encode(text + SEPARATOR))).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        coded = int(pipe.read())
    os.waitpid(child, 0)
    return coded


if __name__ == "__main__":
    main()
