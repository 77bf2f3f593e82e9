"""Recall as a task: samples that teach it, and what share of answers a model gives.

`python -m benchmarks.recall make OUT --shards DATA` writes shards with all samples of DATA and two more kinds: `mqar`
(pairs `key=value`, then each key once more, in another order; 4 to 64 pairs) and `needle` (such pairs behind a phrase,
anywhere in 256 to 16K tokens of text, asked for at its end; all scales alike). Only values carry loss, and rows too
short for a sample leave it out. `... score MODEL --kind mqar` asks 64 pairs, `--kind needle` one among 16K tokens of
held-out text, and prints the share of right answers, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from pelagos.load import load_model, usable_device
from pelagos.train.data import KINDS, NO_LOSS, Shard, ShardWriter, read_shard, write_meta
from pelagos.train.prepare import text_encoder

FIRST_WORD = 300  # tokens before are special ones and single bytes
PHRASE = "\nRemember: "
TEXTS = ("docs", "code", "books")
RECALL = ("mqar", "needle")
SHORTEST, ASKED = 256, 640  # tokens of text of the shortest needle, and room for all that one tells and asks


class Tasks:
    """Draws samples; tokens that are only read carry NO_LOSS."""

    def __init__(self, tokenizer: Path, text: Shard, seed: int) -> None:
        encoder = text_encoder(tokenizer)
        self.words = np.arange(FIRST_WORD, encoder.get_vocab_size(), dtype=np.uint16)
        self.phrase, self.equals, self.stop = (np.array(encoder.encode(t).ids, np.uint16) for t in (PHRASE, "=", "\n"))
        self.begin = text.tokens[text.offsets[0]]
        kinds = [text.meta["kinds"].index(kind) for kind in TEXTS]
        self.places = np.flatnonzero(np.isin(text.kinds, kinds) & (np.diff(text.offsets) > 512))
        self.text, self.rng = text, np.random.default_rng(seed)

    def pairs(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rng.choice(self.words, count, replace=False), self.rng.choice(self.words, count)

    def lines(self, keys: np.ndarray, values: np.ndarray, *, answers: bool) -> np.ndarray:
        """`key=value` lines (N, 4), the values with loss if they are answers."""
        rows = np.empty((len(keys), 4), np.uint16)
        rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = keys, self.equals[0], values, self.stop[0]
        rows[:, [0, 1, 3]] |= NO_LOSS
        rows[:, 2] |= 0 if answers else NO_LOSS
        return rows

    def mqar(self, count: int) -> np.ndarray:
        keys, values = self.pairs(count)
        order = self.rng.permutation(count)
        told, asked = self.lines(keys, values, answers=False), self.lines(keys[order], values[order], answers=True)
        return np.concatenate([self.begin[None] | NO_LOSS, told.ravel(), asked.ravel()])

    def needle(self, count: int, length: int) -> np.ndarray:
        keys, values = self.pairs(count)
        hay: list[np.ndarray] = []
        while sum(map(len, hay)) < length:
            place = self.rng.choice(self.places)
            hay.append(self.text.tokens[self.text.offsets[place] + 1 : self.text.offsets[place + 1] - 1])
        straw = np.concatenate(hay)[:length] | NO_LOSS
        parts, last = [self.begin[None] | NO_LOSS], 0
        depths, told = np.sort(self.rng.integers(0, length, count)), self.lines(keys, values, answers=False)
        for depth, line in zip(depths, told, strict=True):
            parts += [straw[last:depth], self.phrase | NO_LOSS, line]
            last = depth
        parts.append(straw[last:])
        order = self.rng.permutation(count)
        for line in self.lines(keys[order], values[order], answers=True):
            parts += [self.phrase | NO_LOSS, line]
        return np.concatenate(parts)


def make(out: Path, shards: Path, tokenizer: Path, *, mqar: int, needles: int, longest: int, seed: int) -> None:
    """Write the shards; `mqar` and `needles` are samples of each for training."""
    out.mkdir(parents=True, exist_ok=True)
    entries = {}
    for split, share in (("train", 1.0), ("heldout", 0.002)):
        shard = read_shard(shards, split)
        writer, tasks = ShardWriter(out, split, (*KINDS, *RECALL)), Tasks(tokenizer, shard, seed)
        for i, kind in enumerate(shard.kinds):
            sample = shard.tokens[shard.offsets[i] : shard.offsets[i + 1]]
            writer.add(np.asarray(sample), shard.meta["kinds"][kind], int(shard.text_bytes[i]))
        for _ in range(max(16, round(mqar * share))):
            writer.add(tasks.mqar(int(tasks.rng.integers(4, 65))), "mqar", 1)
        number = max(4, round(needles * share))
        for i in range(number):  # lengths evenly over the scales, so that there are short ones however few
            length = int(SHORTEST * ((longest - ASKED) / SHORTEST) ** (i / number))
            writer.add(tasks.needle(int(tasks.rng.integers(1, 33)), length), "needle", 1)
        entries[split] = writer.close()
    notes = {"recall": {"seed": seed}, "whole": RECALL}
    write_meta(out, tokenizer / "tokenizer.json", entries, notes, kinds=(*KINDS, *RECALL))


@torch.no_grad()
def score(model: str, kind: str, shards: Path, tokenizer: Path, *, samples: int, tokens: int, device: str) -> dict:
    """The share of answers that are the model's first choice, each read behind the whole sample before it."""
    place = usable_device(device)
    loaded, tasks = load_model(model, device=place), Tasks(tokenizer, read_shard(shards, "heldout"), 1)
    loaded.carrier = torch.bfloat16 if place.type == "cuda" else torch.float32
    right = asked = 0
    started = time.monotonic()
    for _ in range(samples):
        sample = tasks.mqar(64) if kind == "mqar" else tasks.needle(1, tokens - 32)
        ids = torch.from_numpy((sample & (NO_LOSS - 1)).astype(np.int64)).to(place)
        answers = torch.from_numpy(np.flatnonzero(sample < NO_LOSS)).to(place)
        logits = loaded(ids[None, :-1])[0]
        right += int((logits[answers - 1].argmax(-1) == ids[answers]).sum())
        asked += len(answers)
    took = time.monotonic() - started
    return {"model": model, "kind": kind, "tokens": len(sample), "asked": asked, "right": right / asked, "s": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "score"))
    parser.add_argument("target", help="directory to write, or model to ask")
    parser.add_argument("--shards", type=Path, required=True, help="shards of text")
    parser.add_argument("--tokenizer", type=Path, default=Path("models/nano"))
    parser.add_argument("--kind", choices=("mqar", "needle"), default="mqar")
    parser.add_argument("--mqar", type=int, default=20000, help="samples to train on")
    parser.add_argument("--needles", type=int, default=1500, help="samples to train on")
    parser.add_argument("--longest", type=int, default=16384, help="tokens of a needle's sample")
    parser.add_argument("--samples", type=int, default=20, help="samples to score")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.what == "make":
        counts = {"mqar": args.mqar, "needles": args.needles, "longest": args.longest}
        make(Path(args.target), args.shards, args.tokenizer, seed=0, **counts)
    else:
        options = {"samples": args.samples, "tokens": args.longest, "device": args.device}
        print(json.dumps(score(args.target, args.kind, args.shards, args.tokenizer, **options)), flush=True)


if __name__ == "__main__":
    main()
