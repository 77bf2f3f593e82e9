"""`LLM` over a real, untrained model: prompts, streams, chunks, stops and refusals."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.scripted import scripted_llm
from tests.engine.small_tokens import config_for, small_tokenizer

import pelagos
from pelagos.engine import LLM, SamplingParams
from pelagos.engine.output import StopCut
from pelagos.errors import ConfigError, ContextLengthError, RequestError
from pelagos.model import Transformer

GREEDY = SamplingParams(max_tokens=12, temperature=0, logprobs=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokenizer = small_tokenizer()
    torch.manual_seed(5)
    model = Transformer(config_for(tokenizer, max_position_embeddings=512))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return LLM.from_parts(model.eval(), tokenizer)


def test_front_door_names_the_room() -> None:
    assert pelagos.LLM is LLM
    assert pelagos.SamplingParams is SamplingParams
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = pelagos.LLMs  # type: ignore[attr-defined]


def test_greedy_is_the_argmax_of_whole_forwards(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("The quick brown fox")
    [done] = llm.generate(prompt, GREEDY)
    ids = list(prompt)
    for token, logprob in zip(done.token_ids, done.logprobs or [], strict=True):
        with torch.no_grad():
            logits = llm.model(torch.tensor([ids]))[0, -1]
        assert token == int(logits.argmax())
        assert logprob == pytest.approx(float(torch.log_softmax(logits, -1)[token]), abs=1e-4)
        ids.append(token)
    assert len(done.token_ids) == 12
    assert done.finish_reason == "length"
    assert done.text == llm.tokenizer.decode(done.token_ids)


def test_text_prompt_gets_a_begin_token_and_ids_do_not(llm: LLM) -> None:
    ids = llm.prompt_ids("Hello")
    assert ids == [llm.model.config.bos_token_id, *llm.tokenizer.encode("Hello")]
    assert llm.generate(["Hello", ids], GREEDY)[0] == llm.generate(ids, GREEDY)[0]
    assert llm.generate([], GREEDY) == []


def test_prefill_chunks_do_not_change_the_completion(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("The lazy dog. Hello, world! " * 6)
    whole = llm.generate(prompt, GREEDY)[0]
    other = LLM.from_parts(llm.model, llm.tokenizer, chunk_tokens=16)
    assert other.generate(prompt, GREEDY)[0] == whole
    other.close()


def test_sampling_is_the_same_alone_and_in_a_batch(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=8, seed=seed) for seed in (1, 2, 3)]
    alone = [llm.generate("fox", each)[0] for each in params]
    assert llm.generate(["fox"] * 3, params) == alone
    streams = [llm.stream("fox", each) for each in params]
    steps = list(zip(*streams, strict=False))  # interleaved
    assert [[step[i].token_id for step in steps] for i in range(3)] == [each.token_ids[: len(steps)] for each in alone]
    assert alone[0].logprobs is None


def test_a_stop_string_cuts_the_text_not_the_ids(llm: LLM) -> None:
    free = llm.generate("fox", SamplingParams(max_tokens=30, seed=4))[0]
    stop = free.text[5:8]
    cut = llm.generate("fox", SamplingParams(max_tokens=30, seed=4, stop=stop))[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert stop in llm.tokenizer.decode(cut.token_ids)


def test_the_end_token_ends_and_is_not_in_the_text() -> None:
    llm = scripted_llm("Hello")
    [done] = llm.generate("x", SamplingParams(max_tokens=50))
    tokens = [*llm.tokenizer.encode("Hello"), llm.config.eos_token_id]
    assert (done.token_ids, done.text, done.finish_reason) == (tokens, "Hello", "stop")


def test_cancel_ends_between_tokens_and_between_chunks(llm: LLM) -> None:
    cancel = threading.Event()
    stream = llm.stream("fox", SamplingParams(max_tokens=100, seed=0), cancel=cancel)
    assert next(stream).finish_reason is None
    cancel.set()
    assert list(stream) == []
    assert list(llm.stream("fox", cancel=cancel)) == []


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "empty"), ([[]], "empty"), ([[1, -1]], r"prompt\[1\]=-1"), ([1, 10**6], r"prompt\[1\]=1000000"),
        ([["a"]], "prompt: expected a sequence of whole numbers"),
        ([3.5], r"prompts\[0\] is a float"), ([True], r"prompts\[0\] is a bool"),
        (None, "prompts is a NoneType"), (np.array([5, 6]), "prompts is a ndarray"), (b"abc", r"prompts\[0\] is a int"),
    ],
)  # fmt: skip
def test_a_wrong_prompt_is_refused(llm: LLM, prompt: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        llm.generate(prompt)


def test_a_context_beyond_the_positions_is_refused_at_the_call(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match=r"maximum context length is 512 tokens.*600 tokens \(500 in"):
        llm.stream([5] * 500, SamplingParams(max_tokens=100))
    assert len(list(llm.stream([5] * 509, SamplingParams(max_tokens=3, temperature=0)))) <= 3


def test_params_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="1 SamplingParams for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])


def test_parts_of_different_models_are_refused(llm: LLM) -> None:
    small = Transformer(config_for(llm.tokenizer, vocab_size=64), device="meta")
    with pytest.raises(ConfigError, match="different models"):
        LLM.from_parts(small, llm.tokenizer)
    with pytest.raises(ConfigError, match="threaded=False"):
        LLM("nano", threaded=False)
    with pytest.raises(ConfigError, match="generation='0801'"):
        LLM.from_parts(llm.model, llm.tokenizer, generation="0801")


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_stop_cut_at_any_split(text: str, stops: list[str], size: int) -> None:
    cut = StopCut(stops)
    out = ""
    for at in range(0, len(text), size):
        out += cut.push(text[at : at + size])
        # What is held back is never more than an unfinished stop string needs.
        assert cut.is_cut or len(text[: at + size]) - len(out) < max(map(len, stops), default=1)
    out += cut.finish()
    ends = [text.find(stop) for stop in stops if stop in text]
    assert cut.is_cut == bool(ends)
    if not ends:
        assert out == text
    elif size == 1:
        first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        assert out == text[: min(e for e in ends if any(text.startswith(s, e) and e + len(s) == first for s in stops))]
    else:
        assert out == text[: len(out)]
        assert not any(stop in out for stop in stops)
