"""From picks to steps: text, stop strings, ends, lengths; the same however many picks come at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.small_tokens import small_tokenizer

from pelagos.engine.output import TextStream
from pelagos.engine.sampler import Pick, SamplingParams

EOS = 0


class Letters:
    """Token i is the i-th letter of the UTF-8 bytes of a text, given out as characters complete."""

    def __init__(self) -> None:
        self._bytes = b""

    def push(self, index: int) -> str:
        self._bytes += bytes([index])
        try:
            text, self._bytes = self._bytes.decode(), b""
        except UnicodeDecodeError:
            return ""
        return text

    def flush(self) -> str:
        rest, self._bytes = self._bytes, b""
        return rest.decode(errors="replace")


def picks_of(text: str | bytes) -> list[Pick]:
    data = text.encode() if isinstance(text, str) else text
    return [Pick(byte, -0.5, ((byte, -0.5),)) for byte in data]


def run(picks: list[Pick], sizes: tuple[int, ...] = (1,), **params: Any) -> tuple[list[Any], TextStream]:
    """Push picks in pieces of the given sizes, over and over, until they or the request end."""
    out = TextStream(Letters(), SamplingParams(**params), EOS)
    steps, at, turn = [], 0, 0
    while at < len(picks) and out.finish_reason is None:
        size = sizes[turn % len(sizes)]
        steps += out.push(picks[at : at + size])
        at, turn = at + size, turn + 1
    return steps, out


def test_steps_carry_logprobs_and_the_last_its_reason() -> None:
    steps, out = run(picks_of("abc"), max_tokens=3)
    assert [step.text for step in steps] == ["a", "b", "c"]
    assert [step.finish_reason for step in steps] == [None, None, "length"]
    assert steps[0].logprob == -0.5
    assert steps[0].top_logprobs == ((97, -0.5),)
    assert (out.finish_reason, out.left) == ("length", 0)
    assert out.push(picks_of("d")) == []


def test_an_end_token_is_a_step_without_text() -> None:
    steps, _ = run(picks_of(b"ab\0cd"), sizes=(4,))
    assert [(step.token_id, step.text, step.finish_reason) for step in steps] == [
        (97, "a", None), (98, "b", None), (EOS, "", "stop"),
    ]  # fmt: skip
    steps, _ = run(picks_of(b"a\0bx"), ignore_eos=True, stop_token_ids=[ord("x")])
    assert [step.text for step in steps] == ["a", "", "b", ""]
    assert steps[-1].finish_reason == "stop"


def test_bytes_that_never_became_a_character_come_out_at_the_end() -> None:
    whole = "é€".encode()
    steps, _ = run(picks_of(whole[:-1]), max_tokens=4)
    assert [step.text for step in steps] == ["", "é", "", "\ufffd"]
    assert run(picks_of(whole[:3] + b"\0"))[0][-1].text == "\ufffd"
    steps, out = run(picks_of(whole[:-1]), max_tokens=4, stop="\ufffd")  # even these may be a stop string
    assert ("".join(step.text for step in steps), out.finish_reason) == ("é", "stop")


def test_text_held_back_for_a_stop_string_comes_out_when_none_follows() -> None:
    steps, _ = run(picks_of("a</b"), stop="</end>", max_tokens=4)
    assert [step.text for step in steps] == ["a", "", "", "</b"]
    steps, _ = run(picks_of(b"a</\0"), stop="</end>")
    assert [step.text for step in steps] == ["a", "", "", "</"]
    steps, _ = run(picks_of("a</end>b"), stop="</end>", max_tokens=7)
    assert [step.text for step in steps] == ["a", "", "", "", "", "", ""]
    assert steps[-1].finish_reason == "stop"


@given(
    st.text("ab€", max_size=24), st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 40), st.booleans(),
)  # fmt: skip
def test_any_chunking_gives_the_same_steps_cut_at_the_first_stop(
    text: str, stops: list[str], sizes: list[int], most: int, ends: bool
) -> None:
    picks = picks_of(text.encode() + b"\0" * ends)
    steps, out = run(picks, max_tokens=most, stop=stops)
    assert run(picks, tuple(sizes), max_tokens=most, stop=stops)[0] == steps
    got = "".join(step.text for step in steps)
    seen = bytes(step.token_id for step in steps if step.token_id != EOS).decode(errors="replace")
    hits = [at for stop in stops if (at := seen.find(stop)) >= 0]
    if hits:
        # Characters come one by one, so the stop that is complete first ends the text where it begins.
        done = min(seen.find(stop) + len(stop) for stop in stops if stop in seen)
        assert done == len(seen)
        assert got == seen[: min(done - len(stop) for stop in stops if seen.endswith(stop))] or not seen.startswith(got)
        assert out.finish_reason == "stop"
    elif out.finish_reason is None:
        assert seen.startswith(got)
        assert len(seen.rstrip("\ufffd")) - len(got) < max(map(len, stops), default=1)
    else:
        assert got == seen
        assert out.finish_reason == ("stop" if ends and len(picks) <= most else "length")
    assert all(step.finish_reason is None for step in steps[:-1])


@pytest.mark.parametrize("text", ["Hello, world!", "naïve café €5"])
def test_the_real_decoder_fits(text: str) -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    out = TextStream(tokenizer.stream_decoder(), SamplingParams(max_tokens=len(ids)), -1)
    steps = out.push([Pick(token, 0.0) for token in ids])
    assert "".join(step.text for step in steps) == text
    assert out.finish_reason == "length"
