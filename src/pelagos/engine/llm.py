"""`LLM`: one model, its tokenizer and an engine; prompts in, completions or a stream of steps out.

Refuses empty prompts, ids outside the vocabulary and contexts beyond the model's positions or the engine's memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from pelagos.chat.tokenizer import Tokenizer
from pelagos.chat.tokens import BOS, EOS
from pelagos.checkpoint import resolve_model
from pelagos.config import GENERATIONS, ModelConfig, read_environment
from pelagos.engine.api import Engine, EngineOptions, EngineStats, Step, StepReader, Stream
from pelagos.engine.build import aside, build_engine
from pelagos.engine.sampler import SamplingParams
from pelagos.engine.turn import ChatTurn
from pelagos.errors import ConfigError, RequestError
from pelagos.load import load_served
from pelagos.model import Transformer
from pelagos.model.streaming import ExpertBlocks, ExpertStore, store_of

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """What one prompt became; token_ids include the end token, text does not; logprobs only where asked for.

    `cached_tokens` of the prompt were not computed again; `accepted_drafts` of the tokens came from a draft.
    """

    token_ids: list[int]
    text: str
    logprobs: list[float] | None
    finish_reason: str
    cached_tokens: int = 0
    accepted_drafts: int = 0
    top_logprobs: list[tuple[tuple[int, float], ...]] | None = None
    prompt_logprobs: list[float | None] | None = None


class LLM:
    """A loaded model with its tokenizer, behind an engine that many threads may use at once."""

    def __init__(
        self, path_or_name: str | Path = "nano", *, mode: str = "reference", device: torch.device | str | None = None,
        generation: str | None = None, expert_bytes: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Load a bundled name, a directory or a cached hub id; `generation` (prompt protocol) None takes the model's.

        `options` are those of `EngineOptions`. expert_bytes: memory for routed experts (None: all of them); on a CPU
        the others are read when chosen, on CUDA in released mode they lie in host memory. Honours PELAGOS_THREADS.
        Raises CheckpointError, ConfigError, CapacityError when the memory is not there, or MissingDependency without
        `tokenizers`.
        """
        serving = EngineOptions(**options)
        if not serving.threaded:
            raise ConfigError("threaded=False: nobody would run the engine's steps; use build_engine and call step")
        threads = read_environment().threads
        if threads is not None:
            torch.set_num_threads(threads)
        path = resolve_model(path_or_name)
        model = aside(lambda: load_served(path, mode=mode, device=device, expert_bytes=expert_bytes))
        tokenizer = Tokenizer.load(path)
        self._hold(model.config, tokenizer, generation, model if isinstance(model, Transformer) else None)
        self._experts = store_of(model) if isinstance(model, Transformer) else model.blocks
        self.engine: Engine = build_engine(model, tokenizer, serving)

    @classmethod
    def from_parts(
        cls, model: Transformer, tokenizer: Tokenizer, *, generation: str | None = None, **options: Any
    ) -> LLM:
        """Wrap a model and a tokenizer that are already in memory; `options` are those of `EngineOptions`."""
        llm = cls.__new__(cls)
        llm._hold(model.config, tokenizer, generation, model)
        llm.engine = build_engine(model, tokenizer, EngineOptions(**options))
        return llm

    @classmethod
    def over(cls, engine: Engine, config: ModelConfig, tokenizer: Tokenizer, *, generation: str | None = None) -> LLM:
        """Wrap any engine, for a model of that config and tokenizer."""
        llm = cls.__new__(cls)
        llm._hold(config, tokenizer, generation, None)
        llm.engine = engine
        return llm

    def _hold(
        self, config: ModelConfig, tokenizer: Tokenizer, generation: str | None, model: Transformer | None
    ) -> None:
        if generation is not None and generation not in GENERATIONS:
            raise ConfigError(f"generation={generation!r}: expected one of {', '.join(GENERATIONS)}")
        ours = (tokenizer.id(BOS), tokenizer.id(EOS), tokenizer.vocab_size)
        if ours[:2] != (config.bos_token_id, config.eos_token_id) or ours[2] > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has BOS {ours[0]}, EOS {ours[1]} and {ours[2]} ids, config.json says "
                f"{config.bos_token_id}, {config.eos_token_id} and {config.vocab_size}: they belong to different models"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.generation = generation or config.generation
        self._model = model
        self._experts: ExpertStore | ExpertBlocks | None = None

    @property
    def model(self) -> Transformer:
        """The model itself; ConfigError when the engine is not over one in this process, or over packed weights."""
        if self._model is None:
            raise ConfigError("this LLM stands over an engine without a model of its own, or over packed weights")
        return self._model

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete each prompt (text, or token ids used as they are), all together; completions in order.

        One SamplingParams serves all prompts, a list gives one each. A text gets the begin-of-sentence token in front.
        Raises RequestError for an empty prompt, ids outside the vocabulary, or a context too long for the model,
        CapacityError for one too long for the engine's memory; prompts before it are cancelled then.
        """
        batch = _as_batch(prompts)
        many = [params or SamplingParams()] * len(batch) if not isinstance(params, Sequence) else list(params)
        if len(many) != len(batch):
            raise RequestError(f"{len(many)} SamplingParams for {len(batch)} prompts: give one, or one per prompt")
        streams: list[Stream] = []
        try:
            for prompt, each in zip(batch, many, strict=True):
                streams.append(self.submit(prompt, each))
            return [_collect(stream, each) for stream, each in zip(streams, many, strict=True)]
        finally:
            for stream in streams:
                stream.cancel()

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Stream:
        """Queue one prompt and return its stream; `options` and errors are those of `Engine.submit`."""
        return self.engine.submit(self.prompt_ids(prompt), params or SamplingParams(), **options)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, cancel: threading.Event | None = None,
        **options: Any,
    ) -> Iterator[Step]:  # fmt: skip
        """Complete one prompt token by token; checks run at the call, computation goes on as the steps are read.

        Setting `cancel`, or letting go of the iterator, ends the stream without a finish_reason and frees what it held.
        Raises RequestError and CapacityError as `generate` does; `options` are those of `Engine.submit`.
        """
        return StepReader(self.submit(prompt, params, **options), cancel)

    def chat(self, body: dict[str, Any], *, max_tokens: int = 8192, **options: Any) -> ChatTurn:
        """Return the answer to a chat-completions body: iterate it for its events, or `run()` it.

        Without a bound in the body the answer has at most `max_tokens` tokens, and never more than fit the context;
        `options` are those of `ChatTurn`.
        Raises RequestError for a body that cannot be rendered, sampled or fitted.
        """
        return ChatTurn(self, body, max_tokens=max_tokens, **options)

    def stats(self) -> EngineStats:
        """Return what the engine counts: pages and slots in use, hits, evictions, damaged disk entries."""
        return self.engine.stats()

    def expert_stats(self) -> dict[str, float]:
        """Return what streamed experts count: places, share found there, bytes read a token; {} where none are."""
        return {} if self._experts is None else self._experts.report()

    def close(self) -> None:
        """End what runs, finish the disk cache's writes and stop the engine; an LLM that is never closed ends too."""
        self.engine.close()

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt; raises RequestError for no text. The engine checks ids."""
        if not isinstance(prompt, str):
            return list(prompt)
        if not prompt:
            raise RequestError("the prompt is empty: give at least one character or token id")
        return [self.config.bos_token_id, *self.tokenizer.encode(prompt)]


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A text or a non-empty list of ids is one prompt; any other list is a list of prompts."""
    if isinstance(prompts, str) or (isinstance(prompts, (list, tuple)) and {type(each) for each in prompts} == {int}):
        return [cast(Prompt, prompts)]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts is a {type(prompts).__name__}: expected text, a list of token ids or of prompts")
    for position, each in enumerate(prompts):
        if not isinstance(each, (str, Sequence)):
            raise RequestError(f"prompts[{position}] is a {type(each).__name__}: expected text or a list of token ids")
    return list(cast(Sequence[Prompt], prompts))


def _collect(stream: Stream, params: SamplingParams) -> Completion:
    done = list(stream)
    return Completion(
        token_ids=[step.token_id for step in done],
        text="".join(step.text for step in done),
        logprobs=[step.logprob for step in done] if params.logprobs else None,
        finish_reason=stream.finish_reason or "cancelled",
        cached_tokens=stream.cached_tokens,
        accepted_drafts=stream.accepted_drafts,
        top_logprobs=[step.top_logprobs for step in done] if params.logprobs not in (False, True) else None,
        prompt_logprobs=stream.prompt_logprobs,
    )
