"""Bits per byte of text under a model: how many bits it needs to tell a text, for each UTF-8 byte of that text.

A document is BOS, its tokens (text that spells a special token gets ordinary ones) and EOS. Each document stands
alone. The bits of EOS count, since without it nobody could tell where the document ends (a compressor that codes
several documents pays for a separator too); its bytes do not, so the figure errs on the high side by that little.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch.nn import functional

from pelagos.chat import Tokenizer
from pelagos.chat.tokens import BOS, EOS
from pelagos.checkpoint import resolve_model
from pelagos.errors import ConfigError, DataError
from pelagos.load import load_model
from pelagos.model import ContiguousCache, Transformer
from pelagos.train import sources

FORWARD_TOKENS = 512  # in one forward: larger ones leave the processor's caches, smaller ones leave it idle
MAX_ROWS = 8
BATCH_TOKENS = 8192  # several documents share a batch up to this size, so that progress shows
IGNORED = -100  # target of a padded position
MAX_PADDING = 1.1  # documents share a batch while its padded size is at most this times their tokens
Progress = Callable[[str], None]


@dataclass(slots=True)
class Score:
    """Code length of some documents: nats over `tokens` predicted tokens (EOS included) that spell `bytes` bytes."""

    path: str = ""
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    seconds: float = 0.0

    def add(self, other: Self) -> None:
        """Count another score's documents too."""
        for name in ("documents", "tokens", "bytes", "nats", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_dict(self) -> dict[str, Any]:
        """Return bits per byte and the counts behind it."""
        counts = {name: getattr(self, name) for name in ("tokens", "bytes", "documents")}
        return {"bits_per_byte": self.nats / math.log(2) / self.bytes, **counts, "seconds": round(self.seconds, 1)}


def bits_per_byte(
    path_or_name: str | Path,
    files: Sequence[Path],
    *,
    mode: str = "reference",
    context: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Score files of text or JSON lines under a model; return bits_per_byte, tokens, bytes, documents and `files`.

    `context` restarts the model's memory every that many tokens (None: a whole document, as far as the model has
    positions). `sample` scores that many documents of each file, drawn by `seed`. Every file is read before the model
    is loaded. Raises DataError for a file that cannot be scored, ConfigError for an impossible setting.
    """
    for name, value in (("context", context), ("sample", sample)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: expected a whole number >= 1")
    if not files:
        raise DataError("no file to score: expected text files or JSON lines with a text field")
    texts = [_drawn(read_documents(file), sample, seed) for file in files]
    directory = resolve_model(path_or_name)
    tokenizer = Tokenizer.load(directory)
    model = load_model(directory, mode=mode, device=device)
    total, rows = Score(), []
    for file, documents in zip(files, texts, strict=True):
        score = Score(path=str(file))
        for part in score_documents(model, tokenizer, documents, context=context):
            score.add(part)
            done = f"{score.documents}/{len(documents)} documents, {score.tokens} tokens"
            progress(f"{file}: {done}, {score.tokens / score.seconds:.0f} tokens/s")
        total.add(score)
        rows.append({"file": score.path} | score.to_dict())
    settings = {"model": str(path_or_name), "mode": mode, "context": context, "sample": sample, "seed": seed}
    return total.to_dict() | settings | {"files": rows}


def read_documents(file: Path) -> list[str]:
    """Return the texts of a file as `train.sources` reads it; raises DataError naming file, line and what is wrong."""
    documents = [document.text for document in sources.read_documents("", str(file), empty=False)]
    if not documents:
        raise DataError(f"{file}: empty; expected text, or JSON lines with a text field in a .jsonl file")
    return documents


def score_documents(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], *, context: int | None = None
) -> Iterator[Score]:
    """Score each text as a document of its own; yield one score a batch of texts of like length, shortest first.

    Rows of a batch end in padding that nothing before it can see.
    """
    bos, eos = tokenizer.id(BOS), tokenizer.id(EOS)
    documents = sorted((([bos, *tokenizer.encode(text), eos], len(text.encode())) for text in texts), key=_length)
    while documents:
        rows = 1
        while rows < min(MAX_ROWS, len(documents)):
            padded = _length(documents[rows]) * (rows + 1)
            if padded > min(BATCH_TOKENS, MAX_PADDING * sum(map(_length, documents[: rows + 1]))):
                break
            rows += 1
        started = time.perf_counter()
        nats = sum(_nats(model, [ids for ids, _ in documents[:rows]], context))
        score = Score(documents=rows, nats=nats, seconds=time.perf_counter() - started)
        for ids, size in documents[:rows]:
            score.tokens += len(ids) - 1
            score.bytes += size
        yield score
        del documents[:rows]


@torch.inference_mode()
def _nats(model: Transformer, samples: Sequence[list[int]], context: int | None) -> list[float]:
    """Return -log p of each sample's tokens after its first; the memory starts anew every `context` tokens."""
    context = min(context or model.config.max_position_embeddings, model.config.max_position_embeddings)
    device = model.embed.weight.device
    inputs = max(map(len, samples)) - 1
    ids = torch.zeros((len(samples), inputs + 1), dtype=torch.int64)
    targets = torch.full((len(samples), inputs), IGNORED)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample)
        targets[row, : len(sample) - 1] = ids[row, 1 : len(sample)]
    ids, targets = ids.to(device), targets.to(device)
    nats = torch.zeros(len(samples), dtype=torch.float64)
    step = max(1, FORWARD_TOKENS // len(samples))
    for begin in range(0, inputs, context):
        cache = ContiguousCache(model.config)
        end = min(begin + context, inputs)
        for start in range(begin, end, step):
            part = slice(start, min(start + step, end))
            logits = model(ids[:, part], cache)  # (B, S, V)
            given = {"ignore_index": IGNORED, "reduction": "none"}
            lost = functional.cross_entropy(logits.flatten(0, 1), targets[:, part].flatten(), **given)
            nats += lost.view(len(samples), -1).double().sum(1).cpu()
    return nats.tolist()


def _length(document: tuple[list[int], int]) -> int:
    return len(document[0])


def _drawn(documents: list[str], sample: int | None, seed: int) -> list[str]:
    if sample is None or sample >= len(documents):
        return documents
    return random.Random(seed).sample(documents, sample)
