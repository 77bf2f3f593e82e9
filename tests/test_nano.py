"""The bundled model as it lies in the repository: its size, its words."""

from __future__ import annotations

import dataclasses

import pytest

from pelagos.chat import Tokenizer
from pelagos.config import bundled_model_dir, nano
from pelagos.evals.bpb import score_documents
from pelagos.load import load_model
from pelagos.model import Transformer

DIRECTORY = bundled_model_dir("nano")
# Written for this test, so in no training text. A model that knows nothing needs 12 bits a token, about 4 a byte.
PROSE = (
    "The captain looked at the sea for a long time before he spoke. There was no wind, and the men sat on the deck "
    "and waited. He said that they would leave in the morning, if the weather was good.\n"
)
PYTHON = '''import os

def count_lines(path):
    """Return the number of lines in a file."""
    with open(path) as f:
        return sum(1 for line in f)

if __name__ == "__main__":
    for name in os.listdir("."):
        print(name, count_lines(name))
'''


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_model("nano")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("nano")


def test_directory_is_within_its_bytes() -> None:
    sizes = {path.name: path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 24_000_000
    assert [name for name, size in sizes.items() if size >= 16 * 2**20] == []
    assert {"README.md", "config.json", "tokenizer.json", "model.safetensors.index.json"} <= sizes.keys()


def test_config_is_the_preset(model: Transformer) -> None:
    assert dataclasses.replace(model.config, extra={}) == dataclasses.replace(nano(), extra={})
    assert model.config.generation == nano().generation


@pytest.mark.parametrize(("text", "bound"), [(PROSE, 2.1), (PYTHON, 1.1)], ids=["prose", "python"])
def test_it_expects_what_people_write(model: Transformer, tokenizer: Tokenizer, text: str, bound: float) -> None:
    [score] = score_documents(model, tokenizer, [text])
    assert score.to_dict()["bits_per_byte"] < bound
    backwards = text[::-1]
    [other] = score_documents(model, tokenizer, [backwards])
    assert other.to_dict()["bits_per_byte"] > 1.5 * bound


def test_greedy_decode_repeats_itself(tokenizer: Tokenizer) -> None:
    from pelagos import LLM
    from pelagos.engine import SamplingParams

    llm = LLM("nano")
    params = SamplingParams(max_tokens=24, temperature=0.0)
    first, second = (llm.generate(["def main(argv"], params)[0] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert len(first.token_ids) == 24
    assert first.text == tokenizer.decode(first.token_ids)
