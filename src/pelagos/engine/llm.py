"""`LLM`: one model and its tokenizer; prompts in, completions or a stream of steps out.

Refuses empty prompts, ids outside the vocabulary and contexts beyond the model's positions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pelagos.chat.tokenizer import Tokenizer
from pelagos.chat.tokens import BOS, EOS
from pelagos.checkpoint import resolve_model
from pelagos.config import GENERATIONS, read_environment
from pelagos.engine.output import StopCut
from pelagos.engine.sampler import Sampler, SamplingParams
from pelagos.engine.turn import ChatTurn
from pelagos.errors import ConfigError, ContextLengthError, RequestError
from pelagos.load import load_model
from pelagos.model import ContiguousCache, Transformer

Prompt = str | Sequence[int]
# A multiple of 128, so every compressor closes its groups on a chunk boundary.
PREFILL_CHUNK = 512


class Step(NamedTuple):
    """One generated token: its id, the text it makes certain, its log-probability, and on the last one why it ended.

    finish_reason is None except on the last step: `stop` (end token or stop string), `length` or `cancelled`.
    """

    token_id: int
    text: str
    logprob: float
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What one prompt became; token_ids include the end token, text does not; logprobs only where asked for."""

    token_ids: list[int]
    text: str
    logprobs: list[float] | None
    finish_reason: str


class LLM:
    """A loaded model with its tokenizer; streams are independent of each other, the weights are only read."""

    def __init__(
        self,
        path_or_name: str | Path = "nano",
        *,
        mode: str = "reference",
        device: torch.device | str | None = None,
        generation: str | None = None,
    ) -> None:
        """Load a bundled name, a directory or a cached hub id; `generation` (prompt protocol) None takes the model's.

        Honours PELAGOS_THREADS. Raises CheckpointError, ConfigError, or MissingDependency without `tokenizers`.
        """
        threads = read_environment().threads
        if threads is not None:
            torch.set_num_threads(threads)
        path = resolve_model(path_or_name)
        self._hold(load_model(path, mode=mode, device=device), Tokenizer.load(path), generation)

    @classmethod
    def from_parts(cls, model: Transformer, tokenizer: Tokenizer, *, generation: str | None = None) -> LLM:
        """Wrap a model and a tokenizer that are already in memory."""
        llm = cls.__new__(cls)
        llm._hold(model, tokenizer, generation)
        return llm

    def _hold(self, model: Transformer, tokenizer: Tokenizer, generation: str | None) -> None:
        if generation is not None and generation not in GENERATIONS:
            raise ConfigError(f"generation={generation!r}: expected one of {', '.join(GENERATIONS)}")
        ours = (tokenizer.id(BOS), tokenizer.id(EOS), tokenizer.vocab_size)
        config = model.config
        if ours[:2] != (config.bos_token_id, config.eos_token_id) or ours[2] > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has BOS {ours[0]}, EOS {ours[1]} and {ours[2]} ids, config.json says "
                f"{config.bos_token_id}, {config.eos_token_id} and {config.vocab_size}: they belong to different models"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.generation = generation or model.config.generation

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete each prompt (text, or token ids used as they are) and return the completions in order.

        One SamplingParams serves all prompts, a list gives one each. A text gets the begin-of-sentence token in front.
        Raises RequestError for an empty prompt, ids outside the vocabulary, or a context too long for the model.
        """
        batch = _as_batch(prompts)
        many = [params or SamplingParams()] * len(batch) if not isinstance(params, Sequence) else list(params)
        if len(many) != len(batch):
            raise RequestError(f"{len(many)} SamplingParams for {len(batch)} prompts: give one, or one per prompt")
        streams = [self.stream(prompt, each) for prompt, each in zip(batch, many, strict=True)]
        return [_collect(steps, each) for steps, each in zip(streams, many, strict=True)]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, cancel: threading.Event | None = None
    ) -> Iterator[Step]:
        """Complete one prompt token by token; checks run at the call, computation as the steps are pulled.

        Setting `cancel` ends the stream before its next token or prefill chunk, without a finish_reason.
        Raises RequestError as `generate` does.
        """
        params = params or SamplingParams()
        ids = self.prompt_ids(prompt)
        self._check_context(len(ids), params.max_tokens)
        return self._steps(ids, params, cancel or threading.Event())

    def chat(self, body: dict[str, Any], *, max_tokens: int = 8192, cancel: threading.Event | None = None) -> ChatTurn:
        """Return the answer to a chat-completions body: iterate it for its events, or `run()` it.

        Without a bound in the body the answer has at most `max_tokens` tokens, and never more than fit the context.
        Raises RequestError for a body that cannot be rendered, sampled or fitted.
        """
        return ChatTurn(self, body, max_tokens=max_tokens, cancel=cancel)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, checked; raises RequestError."""
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty: give at least one character or token id")
            return [self.model.config.bos_token_id, *self.tokenizer.encode(prompt)]
        ids = list(prompt)
        if not ids:
            raise RequestError("the prompt is empty: give at least one character or token id")
        vocab = self.model.config.vocab_size
        for position, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < vocab:
                raise RequestError(f"prompt[{position}]={token!r}: expected a token id from 0 to {vocab - 1}")
        return ids

    def _check_context(self, prompt: int, completion: int) -> None:
        limit = self.model.config.max_position_embeddings
        if prompt + completion > limit:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens. However, you requested {prompt + completion} "
                f"tokens ({prompt} in the messages, {completion} in the completion). Please reduce the length of the "
                "messages or completion."
            )

    def _steps(self, ids: list[int], params: SamplingParams, cancel: threading.Event) -> Iterator[Step]:
        cache = ContiguousCache(self.model.config, capacity=len(ids) + params.max_tokens)
        logits = None
        for start in range(0, len(ids), PREFILL_CHUNK):
            if cancel.is_set():
                return
            logits = self._forward(ids[start : start + PREFILL_CHUNK], cache)
        assert logits is not None
        sampler = Sampler(params, self.model.config.vocab_size, ids)
        position = len(ids)
        decoder = self.tokenizer.stream_decoder()
        text = StopCut(params.stop)
        for left in range(params.max_tokens, 0, -1):
            if cancel.is_set():
                return
            token, logprob, _ = sampler.pick(logits.float().cpu().numpy(), position)
            position += 1
            ended = token == self.model.config.eos_token_id
            delta = text.push("" if ended else decoder.push(token))
            reason = "stop" if ended or text.is_cut else "length" if left == 1 else None
            if reason is not None and not text.is_cut:
                delta += text.push(decoder.flush()) + text.finish()
            yield Step(token, delta, logprob, reason)
            if reason is not None:
                return
            logits = self._forward([token], cache)

    @torch.inference_mode()
    def _forward(self, ids: list[int], cache: ContiguousCache) -> Tensor:
        batch = torch.tensor([ids], device=next(self.model.parameters()).device)  # (1, S)
        return self.model(batch, cache, last_only=True)[0, -1]  # (V,)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A text or a non-empty list of ids is one prompt; any other list is a list of prompts."""
    if isinstance(prompts, str) or (prompts and all(type(each) is int for each in prompts)):
        return [cast(Prompt, prompts)]
    for position, each in enumerate(prompts):
        if not isinstance(each, (str, Sequence)):
            raise RequestError(f"prompts[{position}] is a {type(each).__name__}: expected text or a list of token ids")
    return list(cast(Sequence[Prompt], prompts))


def _collect(steps: Iterable[Step], params: SamplingParams) -> Completion:
    done = list(steps)
    logprobs = [step.logprob for step in done] if params.logprobs else None
    text = "".join(step.text for step in done)
    return Completion([step.token_id for step in done], text, logprobs, done[-1].finish_reason or "cancelled")
