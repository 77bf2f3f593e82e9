"""Training of a small byte-level BPE vocabulary that splits text as the released tokenizer does, or as told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pelagos.chat.tokens import SPECIAL_TOKENS
from pelagos.errors import ConfigError, MissingDependency

if TYPE_CHECKING:
    import tokenizers

# The released tokenizer cuts text in this order: digits in groups of at most three, runs of Chinese and
# Japanese, then words, punctuation and spaces. No piece crosses a cut, so no merge can spell a special token.
RELEASED_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, splits: Sequence[str] = RELEASED_SPLITS
) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens, SPECIAL_TOKENS first, then the 256 bytes.

    `splits` are the patterns that cut the text, in order; no merge crosses a cut. Save it with
    `.save("tokenizer.json")`. Raises ConfigError for a vocabulary too small for those, and MissingDependency without
    the `tokenizers` library. Source of the default splits: released `tokenizer.json`.
    """
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingDependency(f"training a tokenizer needs `pip install tokenizers` ({error})") from None

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size={vocab_size}: the special tokens and the 256 bytes alone take {smallest}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    first: dict[str, Any] = {"special_tokens": list(SPECIAL_TOKENS), "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **first))
    return tokenizer
