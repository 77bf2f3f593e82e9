"""Text to token ids and back, with special tokens only where the renderer wrote them.

Special ids are read from `tokenizer.json`. Text is tokenised by a copy of the vocabulary that has no special
tokens, so no text can produce one; the specials of a prompt are inserted between the pieces.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pelagos.chat.render import Prompt, render_prompt
from pelagos.chat.tokens import SPECIAL_TOKENS
from pelagos.config import local_model
from pelagos.errors import ConfigError, MissingDependency, RequestError

if TYPE_CHECKING:
    import tokenizers

_UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()


class Tokenizer:
    """A byte-level BPE vocabulary with the special tokens of DeepSeek-V4."""

    def __init__(self, full: tokenizers.Tokenizer, *, source: str = "tokenizer") -> None:
        """Wrap a loaded `tokenizers.Tokenizer`; raises ConfigError naming `source` and every special token it lacks."""
        import tokenizers

        # Every added token counts as special: the released vocabulary adds none that text should reach.
        added = full.get_added_tokens_decoder()
        self._ids = {token.content: index for index, token in added.items()}
        self.special_tokens: Mapping[int, str] = {index: token for token, index in self._ids.items()}
        missing = " ".join(token for token in SPECIAL_TOKENS if token not in self._ids)
        if missing:
            raise ConfigError(f"{source}: special tokens missing: {missing}; is this a DeepSeek-V4 tokenizer?")
        self._plain = tokenizers.Tokenizer(full.model)
        self._plain.pre_tokenizer = full.pre_tokenizer
        if full.normalizer is not None:
            self._plain.normalizer = full.normalizer
        self._bytes = _token_bytes(full.get_vocab(), self.special_tokens, source)
        for text in self._ids:
            if not self.special_tokens.keys().isdisjoint(self.encode(text)):
                raise ConfigError(f"{source}: the text {text!r} tokenises to a special id; its merges are not V4's")

    @classmethod
    def load(cls, path_or_name: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`: the file, its directory, a bundled model's name or a cached hub id.

        Raises ConfigError if there is none, if it cannot be read or if special tokens are missing, and
        MissingDependency without the `tokenizers` library.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise MissingDependency(f"text needs the tokenizers library: `pip install tokenizers` ({error})") from None
        file = local_model(path_or_name)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise ConfigError(f"{file}: not found; expected a tokenizer.json, its directory, a bundled name or hub id")
        try:
            full = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{file}: not a tokenizer.json ({error})") from None
        return cls(full, source=str(file))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self._bytes)

    def id(self, token: str) -> int:
        """Return the id of a special token by its spelling; raises ConfigError for any other text."""
        if token not in self._ids:
            raise ConfigError(f"{token!r} is not a special token of this tokenizer")
        return self._ids[token]

    def encode(self, text: str) -> list[int]:
        """Tokenise text; no spelling in it yields a special id. Raises RequestError for unpaired surrogates."""
        try:
            return self._plain.encode(text, add_special_tokens=False).ids
        except TypeError:  # what the library makes of unpaired surrogates
            raise RequestError("text is not valid Unicode: it holds unpaired surrogates") from None

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Tokenise a rendered prompt piece by piece."""
        pieces = ([self._ids[text]] if special else self.encode(text) for text, special in prompt.pieces)
        return [index for piece in pieces for index in piece]

    def encode_chat(self, body: dict[str, Any], *, generation: str = "0731") -> list[int]:
        """Render a chat-completions body (see `render_prompt`) and tokenise it."""
        return self.encode_prompt(render_prompt(body, generation=generation))

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of token ids; broken UTF-8 and unknown ids become U+FFFD."""
        kept = (self.spell(index) for index in ids if not (skip_special and index in self.special_tokens))
        return b"".join(kept).decode("utf-8", errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder for one stream of token ids."""
        return StreamDecoder(self)

    def spell(self, index: int) -> bytes:
        """Return the bytes of a token id; those of U+FFFD for an unknown one."""
        return self._bytes[index] if 0 <= index < len(self._bytes) else _UNKNOWN


class StreamDecoder:
    """Text of one token stream as it grows: a character is given out when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        """Return the text that this token completes; a special token's spelling comes whole, at the end."""
        if index in self._tokenizer.special_tokens:
            return self.flush() + self._tokenizer.special_tokens[index]
        return self._decoder.decode(self._tokenizer.spell(index))

    def flush(self) -> str:
        """Return U+FFFD for a character that was never completed, else an empty text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _token_bytes(vocab: Mapping[str, int], special: Mapping[int, str], source: str) -> list[bytes]:
    """Return the bytes of each id, undoing the byte-to-character table of byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}
    spelled = [_UNKNOWN] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        if index not in special and not table.keys() >= set(token):
            raise ConfigError(f"{source}: token {index} is {token!r}, which is not byte-level BPE; V4's tokenizer is")
        spelled[index] = special[index].encode() if index in special else bytes(table[letter] for letter in token)
    return spelled
