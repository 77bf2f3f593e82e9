"""Token counts as people write them on a command line: 4096, 128K, 1M (binary suffixes)."""

import re

from pelagos.errors import ConfigError

_MAX_TOKENS = 2**50


def parse_tokens(text: str, name: str) -> int:
    """Read a token count such as `4096`, `128K` or `1M` (binary suffixes); raises ConfigError naming `name`."""
    match = re.fullmatch(r"(\d{1,16})(\.\d{1,6})?([KM]?)", text.strip().upper().replace("_", ""), re.ASCII)
    scale = {"": 1, "K": 2**10, "M": 2**20}
    value = float(match[1] + (match[2] or "")) * scale[match[3]] if match else 0.5
    if value != int(value) or value > _MAX_TOKENS:
        raise ConfigError(f"{name}={text!r}: expected a whole number of tokens, such as 4096, 128K or 1M")
    return int(value)
