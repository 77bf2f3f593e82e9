import pytest

from pelagos.chat import train_tokenizer
from pelagos.chat.tokens import SPECIAL_TOKENS, TASK_TOKENS
from pelagos.errors import ConfigError

TEXTS = [
    "Hello world 12345678 " * 20,
    "def f(x):\n    return x + 1\n" * 20,
    "世界著名温泉 <think>a</think> ｜DSML｜ " * 20,
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 320)


def test_special_tokens_come_first_and_in_order(trained):
    assert [trained.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert SPECIAL_TOKENS[:2] == ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
    assert len(set(SPECIAL_TOKENS)) == 18
    assert set(TASK_TOKENS.values()) < set(SPECIAL_TOKENS)
    assert trained.get_vocab_size() == 320


def test_training_is_deterministic(trained):
    assert train_tokenizer(iter(TEXTS), 320).to_str() == trained.to_str()


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("12345678", ["123", "456", "78"]),
        ("a1b22", ["a", "1", "b", "22"]),
        (" Hello world", ["ĠHello", "Ġworld"]),
        ("</think>", ["</", "think", ">"]),
        ("x.\n\ny", ["x", ".ĊĊ", "y"]),
    ],
)
def test_text_is_cut_where_the_released_tokenizer_cuts(trained, text, pieces):
    assert [piece for piece, _ in trained.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_every_text_survives_encode_and_decode(trained):
    text = "tab\t nul\x00 é 你好 ｜DSML｜ \U0001f600 12345\r\n\n  end "
    assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"vocab_size=200.* 274"):
        train_tokenizer(TEXTS, 200)
