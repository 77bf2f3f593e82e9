import random

import pytest
from tests.chat.conversations import WORDS, some_text

from pelagos.chat import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A small tokenizer.json whose merges have seen the spellings of special tokens as ordinary text."""
    rng = random.Random(0)
    texts = [" ".join(WORDS), 'tool_calls invoke name="f" parameter string="true" ' * 9]
    texts += [some_text(rng, 40) for _ in range(200)]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(texts, 600).save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    return Tokenizer.load(tokenizer_file)
