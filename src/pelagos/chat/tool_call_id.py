"""Tool-call ids as DeepSeek's service makes them: an index, random letters and digits, a checksum."""

from __future__ import annotations

import random
import string

_MASK = (1 << 64) - 1
# The first 32 bytes of XXH3's secret and its constants (xxHash specification): enough for inputs of 17 to 32 bytes.
_SECRET = bytes.fromhex("b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f")
_PRIME = 0x9E3779B185EBCA87
_AVALANCHE = 0x165667919E3779F9


def new_tool_call_id(index: int, *, empty_reasoning: bool, rng: random.Random) -> str:
    """Return an id like `call_00_...`; `ET_` marks a thinking turn with empty reasoning. Source: deepseek-recipe."""
    letters = "".join(rng.choices(string.ascii_letters + string.digits, k=20))
    stem = f"call_{index:02}_{'ET_' if empty_reasoning else ''}{letters}"
    return f"{stem}{_xxh3_64(stem.replace('_', '').encode()) % 10_000:04}"


def _xxh3_64(data: bytes) -> int:
    """XXH3-64 without seed of 17 to 32 bytes."""
    assert 17 <= len(data) <= 32

    def mix(at: int, secret: int) -> int:
        low, high = (
            int.from_bytes(data[at + lane : at + lane + 8], "little")
            ^ int.from_bytes(_SECRET[secret + lane : secret + lane + 8], "little")
            for lane in (0, 8)
        )
        product = low * high
        return (product ^ (product >> 64)) & _MASK

    total = (len(data) * _PRIME + mix(0, 0) + mix(len(data) - 16, 16)) & _MASK
    total = (total ^ (total >> 37)) * _AVALANCHE & _MASK
    return total ^ (total >> 32)
